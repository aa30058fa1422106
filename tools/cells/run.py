# @title How a command is run
import codecs
import os
import shlex
import signal
import subprocess
import sys


def run(*command):
    """Show what a command prints while it runs.

    An interrupt of the cell is passed on to the command. Its failure fails the notebook.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # In a session of its own an interrupt reaches it once, by killpg below, and not with the notebook's kernel.
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **output)

    # What is read may end within a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
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
