"""Pair: a picture that was found and its caption, before either is read; and the words for files with faults."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Pair(NamedTuple):
    """`read` gives the bytes of the picture's file; an epoch shows the picture `repeats` times."""

    name: str
    caption: str | None
    read: Callable[[], bytes]
    repeats: int = 1


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device would never end.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError("is not a regular file")
    return path.read_bytes()


def few(names: Iterable, shown: int = 3) -> str:
    """The first names in a row: `a, b, c and 4 more`."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def or_fault(read: Callable[[], T]) -> T | Exception:
    """What `read()` returns, or the exception it raises.

    Pillow and the libraries below it raise nearly any class for a damaged file.
    """
    try:
        return read()
    except MemoryError:  # the machine's, not the file's
        raise
    except Exception as error:
        return error


def fault(error: Exception) -> str:
    """What is wrong, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
