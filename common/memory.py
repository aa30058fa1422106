"""Out of GPU memory, in one place: how it is recognised, what is tried next, and what the last line advises."""

from collections.abc import Callable

import torch

from common import device
from common.errors import UserError

ALLOCATION_FAILED = ("out of memory", "ALLOC_FAILED")  # torch's and CUDA's words; those of cuBLAS and cuDNN
# All of it may change when a run is resumed; --lora_rank and --use_8bit_adam may not.
ADVICE = (
    "end what else is on this GPU, lower --resolution, or use --quantize nf4;"
    " --resume_from_checkpoint latest takes all of these"
)


class OutOfMemory(UserError):
    """GPU memory is used up, and there is no leaner way left to try."""

    def __init__(self, doing: str, advice: str = ADVICE) -> None:
        super().__init__(f"out of GPU memory {doing}: {advice}")


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that GPU memory is used up: not every library raises torch's own class."""
    if isinstance(error, (torch.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)


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
