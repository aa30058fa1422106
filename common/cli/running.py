"""`run()` calls a script's main, and says in one line how it ended where it did not end well."""

import contextlib
import dataclasses
import errno
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from common import errors
from common.errors import UserError, one_line
from common.system import launch, stopping

# What a training's "ended" says when there is nothing to go on with.
GONE_TO_THE_END = (None, "finished", "early stopping")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[], Any]) -> Any:
    """Call a script's main -> its result. A UserError becomes one line on stderr and exit status 2.

    So do a full disk and a full GPU. A signal outside of the training loop is one line and exit status 128 + its
    number: 130 after Ctrl-C. Any other error is one line and 1, with its traceback in a file. A training that a signal
    or the time limit has ended names as its last line the command that goes on. A reader of stdout who leaves
    (`| head`) does not end the run; without one for stderr either, it saves and ends.
    """
    stopping.end_in_order()
    with _outliving_its_reader():
        try:
            result = main()
        except (KeyboardInterrupt, Exception) as error:
            said, status = _told(error)
        else:
            if isinstance(result, dict) and result.get("ended") not in GONE_TO_THE_END and launch.rank() == 0:
                print(f"to go on: {launch.resuming_command(sys.argv)}", flush=True)
            launch.leave_group()
            return result
    if launch.rank() == 0 or status in (1, 2):
        launch.say_last(said)
    sys.exit(status)


def _told(error: BaseException) -> tuple[str, int]:
    """(what is said, the exit status) of an error that ends a script."""
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return stopping.ended_by(number), 128 + number
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"error: {one_line(str(error))}: make room there, or name another place", 2
    if errors.ran_out(error):
        return f"error: {errors.OutOfMemory('while loading')}", 2
    return _unforeseen(error), 1


def _unforeseen(error: Exception) -> str:
    """The line for an error that no check has foreseen.

    Its traceback is written to the output folder, or where that is not there to a temporary one.
    """
    # The first frames are main's, whose `flags` name the output folder.
    locals_of = [frame.f_locals.get("flags") for frame, _ in traceback.walk_tb(error.__traceback__)]
    output_dir = next((vars(flags).get("output_dir") for flags in locals_of if dataclasses.is_dataclass(flags)), None)
    place = output_dir if output_dir and os.path.isdir(output_dir) else None
    try:
        descriptor, file = tempfile.mkstemp(prefix="error_", suffix=".txt", dir=place)
    except OSError:  # the folder itself may be at fault
        descriptor, file = tempfile.mkstemp(prefix="error_", suffix=".txt")

    with open(descriptor, "w") as report:
        report.write(f"{shlex.join(sys.argv)}\nPython {sys.version}\n\n{''.join(traceback.format_exception(error))}")
    what = f"{type(error).__name__}: {one_line(str(error))}"
    return f"error: unforeseen {what}; the traceback is in {file}, please report it with that file"


class _Outlet:
    """Standard output or error whose reader may leave: what is still written goes nowhere."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with self._to_nowhere_if_closed():
            return self._stream.write(text)

    def flush(self):
        with self._to_nowhere_if_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _to_nowhere_if_closed(self):
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._stream.fileno() == 2:  # nobody is left to hear of faults: save and end, as a killed notebook wants
                os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _outliving_its_reader() -> Iterator[None]:
    with contextlib.redirect_stdout(_Outlet(sys.stdout)), contextlib.redirect_stderr(_Outlet(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
