# @title How a command is run
import codecs
import os
import shlex
import signal
import subprocess
import sys


def run(*command):
    """Show what a command prints while it runs. An interrupt of the cell is passed on to it; its failure fails the notebook."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # In a session of its own an interrupt reaches it once, by killpg below, and not with the notebook's kernel.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be cut in two
    while True:
        try:
            while data := process.stdout.read1():
                sys.stdout.write(decoder.decode(data))
                sys.stdout.flush()
            status = process.wait()
            break
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)  # the script finishes its step and saves: go on reading
    if status != 0:
        raise subprocess.CalledProcessError(status, shlex.join(command))
