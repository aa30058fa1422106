"""The process in which one row of train_step.py is measured: a trainer runs here, watched from outside.

    python benchmarks/row_process.py TASK ARGUMENTS FILE        # started by train_step.py

TASK is one of TASKS, ARGUMENTS are its keywords as JSON. FILE receives the result, or {"failed": one line}.
"""

import contextlib
import importlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import files
from common.data.batching import Examples
from common.errors import UserError
from common.model import device
from common.train import report
from common.train.engine import Engine

FORWARD_TFLOP = {512: 1.589, 768: 3.641, 1024: 6.761}  # UNet, per image
T4_GIB = 14.56  # usable of the 16 on the label
STEPS = 12
TIMED = 8  # the steps before the last one, which runs under the profiler


def in_own_process(task: str, **arguments: Any) -> tuple[dict, str]:
    """Run `task` of TASKS in a new process -> (its result, what it printed).

    The result is {"failed": one line} when the process ended without one. Linux counts what the parent has resident
    into a new process's peak, so the parent must stay small: it never uses the GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "result.json"
        argv = [sys.executable, __file__, task, json.dumps(arguments), str(place)]
        process = subprocess.run(argv, stdout=subprocess.PIPE, text=True, errors="replace")
        print(process.stdout, end="", flush=True)
        if place.exists():
            return json.loads(place.read_text()), process.stdout
    code = process.returncode
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return {"failed": ended}, process.stdout


def main(task: str, arguments: str, place: str | Path) -> None:
    """Write what `task` returns to the file `place`, or {"failed": one line} of what it raises."""
    try:
        result = TASKS[task](**json.loads(arguments))
    except (UserError, torch.OutOfMemoryError) as error:
        result = {"failed": one_line(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"failed": one_line(f"{type(error).__name__}: {error}")}
    files.write_json(Path(place), result)


def one_line(error: Exception | str) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def measure(
    script: str, argv: list[str], *, matmul_tflops: float, cap_gib: float | None, as_t4: bool, profile: bool
) -> dict:
    """Run a trainer here -> the figures of a row.

    Everything but the run itself comes after it: the first step counts from the start.

    Raises:
        UserError: the trainer refused its flags, or the run was stopped before its end.
    """
    if cap_gib:
        share = cap_gib * device.GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    # The run, watched from outside
    trainer = importlib.import_module(script)
    busy_s = []
    data_s = []
    peaks_gib = []
    attention = t4_attention() if as_t4 else contextlib.nullcontext()
    with attention, profiled_step(STEPS, busy_s, profile), timed_batches(data_s), memory_peaks(peaks_gib):
        result = trainer.main(argv)
    if result["ended"] != "finished":
        raise UserError(f"{result['ended']} after step {result['step']}")

    # Figures of a row
    allocated_gib, reserved_gib = map(max, zip(*peaks_gib, peaks_now_gib()))
    return dict(
        **speed(Path(result["output_dir"]), busy_s, data_s, matmul_tflops=matmul_tflops),
        peak_allocated_gib=round(allocated_gib, 2),
        peak_reserved_gib=round(reserved_gib, 2),
        ram_gib=round(device.peak_ram_gib(), 2),
        whole_run_s=round(device.seconds_since_start(), 1),
    )


def speed(run_dir: Path, busy_s: list[float], data_s: list[float], *, matmul_tflops: float) -> dict:
    """The figures that follow from a run's folder and from its times.

    Args:
        busy_s: seconds of GPU work of the last step, for each attempt at it.
        data_s: host seconds of every batch made; the last one is made in the last step, for the step that would follow.
        matmul_tflops: TFLOP/s of this GPU's fp16 matrix products, of which `matmul_share` is a share.
    """
    flags = json.loads((run_dir / "config.json").read_text())["flags"]
    resolution = flags["resolution"]
    images = flags["train_batch_size"] * flags["gradient_accumulation_steps"]

    # Median of the timed steps
    steps = report.read_metrics(run_dir / "metrics.jsonl")
    timed = slice(-TIMED - 1, -1)
    s_per_img = statistics.median(step["s_per_img"] for step in steps[timed])

    # The row's figures
    tflop = FORWARD_TFLOP.get(resolution)
    return dict(
        resolution=resolution,
        images_per_step=images,
        s_per_img=round(s_per_img, 4),
        gpu_busy_s_per_img=round(busy_s[-1] / images, 4),
        matmul_share=round(2 * tflop / s_per_img / matmul_tflops, 3) if tflop else None,
        data_share=round(statistics.median(data_s[timed]) / (s_per_img * images), 4),
        first_step_s=steps[0]["seconds"],
    )


@contextlib.contextmanager
def replaced(owner: Any, name: str, stand_in: Callable) -> Iterator[None]:
    """Within the context, `owner.name(...)` calls `stand_in(original, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: stand_in(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def profiled_step(number: int, busy_s: list[float], show: bool) -> AbstractContextManager:
    """Within the context, the engine's step `number` runs under the profiler; its kernels' seconds go to `busy_s`."""

    def step(original, engine, n, *args, **kwargs):
        if n != number:
            return original(engine, n, *args, **kwargs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = original(engine, n, *args, **kwargs)
            torch.cuda.synchronize()

        # Seconds of its kernels
        kernels = profile.key_averages()
        busy_s.append(sum(event.self_device_time_total for event in kernels) / 1e6)
        if show:
            print(kernels.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90))
        return result

    return replaced(Engine, "step", step)


def timed_batches(data_s: list[float]) -> AbstractContextManager:
    """Within the context, the seconds that each effective batch takes to make are appended to `data_s`."""

    def effective_batch(original, *args, **kwargs):
        started = time.perf_counter()
        batches = original(*args, **kwargs)
        data_s.append(time.perf_counter() - started)
        return batches

    return replaced(Examples, "effective_batch", effective_batch)


def peaks_now_gib() -> tuple[float, float]:
    """(allocated, reserved) at most since torch's counters were last set back."""
    return torch.cuda.max_memory_allocated() / device.GIB, torch.cuda.max_memory_reserved() / device.GIB


def memory_peaks(peaks_gib: list[tuple[float, float]]) -> AbstractContextManager:
    """Within the context, (allocated, reserved) go to `peaks_gib` before torch's counters are set back."""

    def reset(original, *args):
        peaks_gib.append(peaks_now_gib())
        original(*args)

    return replaced(torch.cuda, "reset_peak_memory_stats", reset)


def t4_attention() -> AbstractContextManager:
    """The attention kernels of a sm_75 card."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def gpu() -> dict:
    """The GPU's name, and its rate in TFLOP/s at fp16 matrix products [8192, 8192] @ [8192, 8192]."""
    n = 8192
    seconds = []
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    tflops = 2 * n**3 / statistics.median(seconds) / 1e12
    return dict(gpu=torch.cuda.get_device_name(), matmul_tflops=round(tflops, 1))


TASKS = {"measure": measure, "gpu": gpu}


if __name__ == "__main__":
    main(*sys.argv[1:])
