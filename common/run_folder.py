"""An output folder: which run owns it, what dead runs have left in it, and its checkpoints by step.

Nothing here imports torch: a folder that cannot be used is refused at once.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
LOCK = ".lock"
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # what file systems without locks answer, some network drives
KAGGLE_INPUT = Path("/kaggle/input")
WRITTEN_BELOW = (".", "ema_unet", "kohya", "peft", "images")  # where a run writes files through partial ones
LITTER = re.compile(r".+\.\d+-[0-9a-f]{8}\.partial|(checkpoint-\d+|.+\.(json|jsonl|png|safetensors))\.partial")


# ---------------------------------------------------------------- one run at a time


@contextlib.contextmanager
def owned(folder: Path, host) -> Iterator[None]:
    """Inside, `folder` belongs to this run alone, and what dead runs left half written is gone.

    The lock is the kernel's: it ends with the process that holds it. A folder that was made here and stays empty is
    removed.

    Args:
        host: the device.Host; its main process holds the lock, and all of them hear of a refusal.
    Raises:
        UserError: another run is writing there.
    """
    is_new = not folder.exists()
    lock = _take_lock(folder) if host.is_main else None
    try:
        if not all(host.gather([lock is not None or not host.is_main])):
            raise _in_use(folder)
        if host.is_main:
            remove_litter(folder)
        yield
    finally:
        if lock is not None:
            _give_back(lock)
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def check_free(folder: Path) -> None:
    """Refuse early, before anything is loaded, what `owned` would refuse.

    One process of a launch asks: they would meet each other.

    Raises:
        UserError: another run is writing there.
    """
    if os.environ.get("RANK", "0") == "0" and (folder / LOCK).exists():
        lock = _take_lock(folder)
        if lock is None:
            raise _in_use(folder)
        _give_back(lock)


def _take_lock(folder: Path):
    """The lock of `folder`, taken as far as its file system has locks; None where another process has it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


def _give_back(lock) -> None:
    """Release a lock, and remove its file while nobody else can have it."""
    with contextlib.suppress(OSError):  # Windows removes it at the release
        os.unlink(lock.lock_file)
    lock.release()


def _in_use(folder: Path) -> UserError:
    return UserError(f"--output_dir {folder}: another run is writing there; wait for it, or name another folder")


def remove_litter(folder: Path) -> None:
    """Remove what runs that were killed have left half written."""
    for place in WRITTEN_BELOW:
        for path in (folder / place).glob("*.partial"):
            if LITTER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------- checkpoints


def find_checkpoints(folder: Path | str) -> list[Path]:
    """Complete checkpoint folders, the oldest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint folder's name; 0 where somebody has given it another one."""
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(number[1]) if number else 0


def find_resume(resume_from_checkpoint: str | None, output_dir: Path | str) -> list[Path]:
    """The folders that `--resume_from_checkpoint` means, the one to try first at the front; [] where there is none.

    'latest' is the newest of this output folder, and the older ones in case it is damaged. On Kaggle each version of a
    notebook starts with an empty one: there it is those of a folder of the same name below /kaggle/input, where the
    output of an earlier version lies.
    """
    if resume_from_checkpoint != "latest":
        return [Path(resume_from_checkpoint)] if resume_from_checkpoint else []
    return (find_checkpoints(output_dir) or _of_earlier_versions(Path(output_dir).resolve().name))[::-1]


def _of_earlier_versions(name: str) -> list[Path]:
    """Complete checkpoint folders in folders called `name` below /kaggle/input, by their step."""
    return sorted(
        (folder for place in KAGGLE_INPUT.glob(f"**/{name}") for folder in find_checkpoints(place)), key=step_of
    )
