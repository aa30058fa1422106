"""Out of GPU memory: what is tried next."""

from collections.abc import Callable

from common.errors import OutOfMemory, ran_out
from common.model import device


class StepDown:
    """Ways to do one thing, from the fastest to the leanest. A way that ran out of memory is not tried again.

    Args:
        doing: what is done, for messages: "while encoding images".
        ways: {what a way is called, for messages: function}; all of them take the same arguments.
        host: the process whose device is cleared after a failure.
    """

    def __init__(self, doing: str, ways: dict[str, Callable], host: device.Host) -> None:
        self.doing = doing
        self.ways = list(ways.items())
        self.host = host

    def __call__(self, *arguments):
        """Return what the first way gives that does not run out of memory.

        Raises:
            OutOfMemory: the last one ran out too.
        """
        while self.ways:
            try:
                return self.ways[0][1](*arguments)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            device.free_memory(self.host.device)
            self.ways.pop(0)
            if self.ways:
                print(f"out of GPU memory {self.doing}: {self.ways[0][0]} from here on", flush=True)
        raise OutOfMemory(self.doing)
