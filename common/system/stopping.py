"""How a run is asked to end: signals and the time limit; what the first Ctrl-C says, and what later ones do."""

import contextlib
import math
import os
import signal
import socket
import stat
import sys
import threading
import time

from common.system import launch

# Windows has no SIGHUP.
SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
DOUBLE_PRESS_S = 1.0  # a second press within it is the same request


def end_in_order() -> None:
    """From here on a signal raises KeyboardInterrupt(its number), so that what is open gets closed and kept.

    Its double is ignored.
    """
    raised_s = -math.inf

    def end(number, frame):
        nonlocal raised_s
        if time.monotonic() - raised_s <= DOUBLE_PRESS_S:
            return
        raised_s = time.monotonic()
        _leave_the_terminal(number)
        # numpy, imported by torch, would swallow the exception, and be half a numpy from then on
        if _imports(frame):
            _say(ended_by(number))
            os._exit(128 + number)
        raise KeyboardInterrupt(number)

    _handle(end)


def ended_by(number: int) -> str:
    """What is said of a process that a signal has ended."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _leave_the_terminal(number):
    """At a SIGHUP: a terminal that is gone fails every write to it, which must not stop the saving.

    A file or pipe is written on.
    """
    for stream in (1, 2) if signal.Signals(number).name == "SIGHUP" else ():
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def _imports(frame):
    """Whether `frame` is within an import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
        frame = frame.f_back
    return frame is not None


def _say(line):
    """Say `line` below the progress bar; the main thread may be in the middle of using the stream."""
    if launch.rank() != 0:
        return
    with contextlib.suppress(OSError):  # Ctrl-C ends what reads the lines too: `2>&1 | tee log`
        os.write(2, f"\n{os.path.basename(sys.argv[0])}: {line}\n".encode())


def _handle(handler):
    """Install `handler` for SIGNALS -> {number: the handler before}; a SIGHUP that nohup switched off stays off."""
    wanted = [number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


class StopRequest:
    """SIGINT, SIGTERM, SIGHUP or the time limit: the step in flight is finished, then a checkpoint is written.

    The limit is `ends_s` less what ending takes: the step in flight and the next one, a checkpoint, and the results,
    which take about as long as two more. The loop reports to `step_took` and `save_took`, and keeps `doing` up to date.

    Args:
        ends_s: on the monotonic clock; by then everything must be saved.
    """

    def __init__(self, ends_s: float = math.inf):
        self._signal = None
        self._ends_s = ends_s
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0
        self.doing = "saving"  # what is done before the run ends, for the answer to a signal

    def step_took(self, seconds: float) -> None:
        self._longest_step_s = max(self._longest_step_s, seconds)

    def save_took(self, seconds: float) -> None:
        self._longest_save_s = max(self._longest_save_s, seconds)

    @property
    def reason(self) -> str | None:
        ending_s = 2 * self._longest_step_s + 3 * self._longest_save_s
        return self._signal or ("time limit reached" if time.monotonic() + ending_s > self._ends_s else None)

    @contextlib.contextmanager
    def listening(self):
        """The first signal asks for a stop and is answered; after DOUBLE_PRESS_S another Ctrl-C ends the process."""
        before = _handle(self._ask)
        # Python runs a handler between two of its own instructions, and a wait for the GPU can take many seconds:
        # the answer comes from a thread, which the interpreter's wakeup descriptor tells at once.
        ours, interpreters = socket.socketpair()
        interpreters.setblocking(False)
        descriptor_before = signal.set_wakeup_fd(interpreters.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(ours,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            interpreters.close()  # which ends the thread
            thread.join()
            ours.close()

    def _ask(self, number, frame=None):
        _leave_the_terminal(number)
        self._signal = self._signal or f"{signal.Signals(number).name} received"

    def _answer(self, numbers):
        """Answer the signals whose numbers arrive as bytes, until the other end is closed."""
        first_s = None
        while received := numbers.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if first_s is None:
                first_s = time.monotonic()
                self._ask(number)
                again = "; press again to lose it" if number == signal.SIGINT else ""
                _say(f"{signal.Signals(number).name}: {self.doing}{again}")
            elif number == signal.SIGINT and time.monotonic() - first_s > DOUBLE_PRESS_S:
                _say("ended at once; --resume_from_checkpoint latest goes on from the last checkpoint")
                os._exit(128 + number)
