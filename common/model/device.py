"""--mixed_precision and the hardware -> Host: this process, its device and dtype; and the memory that it takes."""

import contextlib
import functools
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from common.errors import UserError
from common.system.cards import unsupported_card

GIB = 2**30
# One process may encode, convert or render while the others wait. The default is 10 minutes.
LONGEST_WAIT = timedelta(hours=12)
T = TypeVar("T")


@dataclass
class EarlierPeak:
    """The highest allocated memory before torch's counter was last reset: torch has one for the whole process."""

    gib: float = 0.0


@dataclass(frozen=True)
class Host:
    """One process of the run: its device, the dtype of the frozen model, and its place among the processes."""

    device: torch.device
    dtype: torch.dtype
    _: KW_ONLY
    reason: str  # why this device and dtype
    rank: int
    world: int  # number of processes
    started_s: float  # when the run began, on the monotonic clock
    earlier_peak: EarlierPeak = field(default_factory=EarlierPeak)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_cpu(self) -> "Host":
        """The same process computing on its CPU, in fp32."""
        return replace(self, device=torch.device("cpu"), dtype=torch.float32)

    def say(self, line: str) -> None:
        """Print a line once, however many processes there are."""
        if self.is_main:
            print(line, flush=True)

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes as one list, on every process."""
        with _all_processes():
            return gather_object(items) if self.world > 1 else items

    def barrier(self) -> None:
        """Return when every process has come here."""
        with _all_processes():
            PartialState().wait_for_everyone()

    def main_first(self, make: Callable[[], T]) -> T:
        """`make()` on the main process, then on the others, which find what it left on the disk.

        Where it fails on the main process, the others end without a word.
        """
        if not self.is_main:
            if self.gather([]) != [True]:
                raise SystemExit(0)  # the launcher then reports the main process, not this one
            return make()
        done = False
        try:
            made = make()
            done = True
            return made
        finally:
            self.gather([done])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place: one all-reduce, or nothing to do for a single process."""
        if self.world > 1:
            with _all_processes():
                torch.distributed.all_reduce(tensor)
        return tensor

    def peak_gib(self) -> float:
        """Highest memory of the run so far in GiB: allocated on the GPU, or resident in RAM on a CPU."""
        if self.device.type != "cuda":
            return peak_ram_gib()
        return max(self.earlier_peak.gib, torch.cuda.max_memory_allocated(self.device) / GIB)

    def start_new_peak(self) -> None:
        """Let torch.cuda.max_memory_allocated count from here; `peak_gib` remembers what was before."""
        self.earlier_peak.gib = self.peak_gib()
        torch.cuda.reset_peak_memory_stats(self.device)


@contextlib.contextmanager
def _all_processes() -> Iterator[None]:
    """Around a call that all processes make together.

    Raises:
        UserError: it failed, as it does when another process has ended.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        ended = "another process of this run has ended, and said why; --resume_from_checkpoint latest goes on"
        raise UserError(f"{ended} ({str(error).splitlines()[0]})") from None


def start(mixed_precision: str = "fp16", seed: int = 0) -> Host:
    """Join the process group of `accelerate launch` or torchrun, if any; choose device and dtype, and say so.

    Seeds torch's global generators, from which only adapter initialisation and LoRA dropout draw.

    Raises:
        UserError: a card that this PyTorch was not built for; bf16 on a card that only emulates it.
    """
    started_s = time.monotonic()
    quieten_libraries()
    torch.manual_seed(seed)

    # Join the processes; without a GPU they talk by gloo.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available())
    state = PartialState(cpu=use_cpu, timeout=LONGEST_WAIT)
    device = state.device if state.device.type == "cuda" else torch.device("cpu")

    # Forget what an earlier run in this process has left.
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # Choose the dtype, and say it all.
    dtype, reason = _choose_dtype(device, mixed_precision)
    place = dict(rank=state.process_index, world=state.num_processes)
    host = Host(device, dtype, reason=reason, started_s=started_s, **place)
    idle = torch.cuda.device_count() - host.world if device.type == "cuda" else 0
    if idle > 0:
        host.say(f"note: {idle} more GPU{'s'[: idle > 1]} here, idle: accelerate launch --quiet uses all of them")
    processes = f", {host.world} processes" if host.world > 1 else ""
    host.say(f"device: {device.type}, {str(dtype).removeprefix('torch.')}{processes} ({reason})")
    return host


def quieten_libraries() -> None:
    """Their notices and loading bars would drown the run's own lines; their errors still come through."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _choose_dtype(device, mixed_precision):
    """(dtype of the frozen model, why)."""
    if device.type != "cuda":
        return torch.float32, "no CUDA GPU was found; a CPU computes fp16 ten times slower than fp32"
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    if fault := unsupported_card(name, capability, torch.cuda.get_arch_list()):
        raise UserError(fault)
    if mixed_precision == "no":
        return torch.float32, f"{name}, --mixed_precision no"
    if mixed_precision == "bf16":
        # torch.cuda.is_bf16_supported() says True by emulation; only capability 8.0 and up has the units.
        if capability < (8, 0):
            card = f"{name} (sm_{capability[0]}{capability[1]})"
            raise UserError(f"--mixed_precision bf16: {card} has no bf16 units; use fp16")
        return torch.bfloat16, f"{name}, --mixed_precision bf16"
    return torch.float16, f"{name}; fp32 adapter weights and loss scaling"


def limit_memory(device: torch.device, max_gib: float | None) -> float:
    """Hold this process to `max_gib` of GPU memory, or to what is free if that is less or None -> the limit in GiB.

    torch limits the current device, which is this one.
    """
    free_gib = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GIB
    limit_gib = min(max_gib or free_gib, free_gib)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total_bytes)
    return limit_gib


def peak_ram_gib() -> float:
    """Highest resident memory of this process so far, in GiB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not there on Windows

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / GIB


def seconds_since_start() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def free_memory(device: torch.device) -> None:
    """Free what nothing holds any more, models in reference cycles too, and hand the GPU's cached blocks back to it.

    After an error, call it outside of the `except` block, which still holds the tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@functools.lru_cache
def _parallel_streams(device):
    return [torch.cuda.Stream(device) for _ in range(8)]


def side_by_side(functions: list[Callable[[], None]], device: torch.device) -> None:
    """Call functions that are independent of each other; on a GPU, eight of their small kernels run at a time."""
    streams = _parallel_streams(device) if device.type == "cuda" and functions else []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    try:
        for i, function in enumerate(functions):
            with torch.cuda.stream(streams[i % len(streams)] if streams else None):
                function()
    finally:
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
