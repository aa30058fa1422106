"""How this process was started: alone, by `accelerate launch` or by torchrun; and the command that goes on."""

import json
import os
import re
import shlex
import signal
import sys
import time

SPEAKS_AFTER_S = 2.0  # a launcher that has seen one process fail ends the others well within it


def rank() -> int:
    """The place of this process among those of the run, from 0."""
    return int(os.environ.get("RANK", 0))


def say_last(said: str) -> None:
    """One line on stderr before the process ends, said once.

    Another process than the first speaks only if none has ended the run.
    """
    line = f"{os.path.basename(sys.argv[0])}: {said}"
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the launcher ends the others
        time.sleep(SPEAKS_AFTER_S)
        line += f" (process {rank()})"
    print(line, file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows its content at the end of its own report
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)


def leave_group() -> None:
    """Take leave of the other processes; without it torch warns at the end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def resuming_command(argv: list[str]) -> str:
    """The command line `argv`, quoted for a shell, with its launcher and `--resume_from_checkpoint latest`."""
    kept = []
    words = iter(argv)
    for word in words:
        if re.fullmatch("--resume[_-]from[_-]checkpoint", word):
            next(words, None)
        elif not re.match("--resume[_-]from[_-]checkpoint=", word):
            kept.append(word)
    return shlex.join([*_launcher(), *kept, "--resume_from_checkpoint", "latest"])


def _launcher():
    """The words before the script; a launcher's own options are not known here, but for the number of processes."""
    world = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # every launch by accelerate sets it
        return ["accelerate", "launch", "--quiet", *(["--num_processes", world] if world != "1" else [])]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", world]
    return ["python"]
