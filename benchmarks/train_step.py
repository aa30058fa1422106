"""Times the optimizer step of the trainers on the full-size SDXL architecture, by running the trainers themselves.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images        # random weights, no download
    python benchmarks/train_step.py --model /tmp/sdxl --images /tmp/images [--only sdxl,dora@1024 | --matrix] [--vram_gb 11.9] [-- FLAGS]

Every row is one run of a trainer in a process of its own, so peaks, RAM and the time to the first step are that row's. A row that
fails, out of memory or otherwise, is a result: {"row", "failed"}. Flags after `--` go to every trainer. The last line is JSON; what
its keys mean is in benchmarks/README.md.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.table import markdown, read_runs
from common import files
from common.cli.running import run
from common.data.batching import Examples
from common.errors import UserError
from common.model import device
from common.train import report
from common.train.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
FORWARD_TFLOP = {512: 1.589, 768: 3.641, 1024: 6.761}  # UNet, per image
T4_GIB = 14.56  # usable of the 16 on the label
STEPS, TIMED = 12, 8
ROWS = {
    "sdxl": ("train_sdxl", []),
    "opt": ("train_opt", []),
    "qlora": ("train_qlora", []),
    "qlora_normal": ("train_qlora", ["--strategy", "normal"]),
    "dora": ("train_dora", []),
    "lora": ("train_sdxl", ["--resolution", "512", "--lora_alpha", "32", "--lora_dropout", "0.1", "--use_8bit_adam"]),
    "text": (
        "train_sdxl",
        ["--train_text_encoder", "--use_8bit_adam", "--train_batch_size", "3", "--gradient_accumulation_steps", "1"],
    ),
}
MATRIX = [f"{name}@{px}" for name in ("sdxl", "opt", "qlora", "qlora_normal", "dora", "text") for px in FORWARD_TFLOP]
PLAN_LINES = (
    "plan",
    "training: ",
    "out of GPU memory: ",
    "no CUDA graph",
)  # how the trainer's lines on what goes through a pass begin


def main(argv=None):
    """Run the rows asked for, each in a process of its own; print a Markdown table and one line of JSON."""
    options = parse(argv)
    earlier = read_runs(options.out) if options.out and options.out.exists() else []
    if not torch.cuda.is_available():
        raise UserError("a CUDA GPU is needed")
    result = {**description(options), "rows": []}
    with contextlib.nullcontext(options.cache_dir) if options.cache_dir else tempfile.TemporaryDirectory() as cache_dir:
        for name in options.rows:
            result["rows"].append(run_row(name, options, cache_dir, result["matmul_tflops"]))
            print(json.dumps(result["rows"][-1]), flush=True)
            if options.out:  # after every row: what was measured stays when the next one is killed
                options.out.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(options.out, [*earlier, result])
    print(markdown(result["rows"]))
    print(json.dumps(result))


def parse(argv):
    """The command line -> options; `rows` and `cap_gib` follow from it.

    Raises:
        UserError: an unknown row, or a cap that is none.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by full_size.py")
    parser.add_argument("--images", required=True, help="folder made by full_size.py")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--only",
        default=",".join(ROWS),
        help=f"rows of {' '.join(ROWS)}; NAME@RESOLUTION for another one (default: all)",
    )
    chosen.add_argument("--matrix", action="store_true", help="every row but lora at 512, 768 and 1024 px")
    parser.add_argument(
        "--fixed", action="store_true", help="the documented micro-batch with every block recomputed: no measured plan"
    )
    parser.add_argument(
        "--as_t4", action="store_true", help=f"only what a T4 can run: no flash attention, {T4_GIB} GiB"
    )
    parser.add_argument("--vram_gb", type=float, metavar="GIB", help="cap the GPU memory of every row")
    parser.add_argument("--profile", action="store_true", help="print the kernels of each row's profiled step")
    parser.add_argument("--label", default="", help="names the run in the JSON, for benchmarks/table.py")
    parser.add_argument("--commit", help="recorded in the JSON instead of git's answer, for a copy that is no checkout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file that this run is added to")
    parser.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="keep encoded images and captions here (default: a temporary folder for all rows)",
    )
    parser.add_argument("flags", nargs="*", help="after --: flags for every trainer")
    options = parser.parse_args(argv)
    options.rows = MATRIX if options.matrix else options.only.split(",")
    for name in options.rows:
        if name.partition("@")[0] not in ROWS:
            raise UserError(f"--only {name}: no such row; there are {' '.join(ROWS)}")
    if options.vram_gb is not None and not options.vram_gb > 0:
        raise UserError(f"--vram_gb {options.vram_gb}: must be greater than 0")
    options.cap_gib = options.vram_gb or (T4_GIB if options.as_t4 else None)
    return options


def description(options):
    """What a run's rows have in common: code, machine and settings. Measures the GPU's matrix rate."""
    gpu, _ = in_own_process("gpu")
    if "failed" in gpu:
        raise UserError(f"the GPU's matrix rate was not measured: {gpu['failed']}")
    return dict(
        commit=options.commit or git_commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        **gpu,
        torch=torch.__version__,
        cap_gib=options.cap_gib,
        as_t4=options.as_t4,
        fixed=options.fixed,
        label=options.label,
        flags=options.flags,
        command=command(options),
    )


def git_commit():
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def command(options):
    """The command that measures the same again, without what only concerns files and output."""
    parts = ["python", "benchmarks/train_step.py", "--model", "M", "--images", "I"]
    parts += ["--matrix"] if options.matrix else ["--only", options.only]
    parts += [f"--{name}" for name in ("fixed", "as_t4") if getattr(options, name)]
    parts += ["--vram_gb", f"{options.vram_gb:g}"] if options.vram_gb else []
    return shlex.join([*parts, *(["--", *options.flags] if options.flags else [])])


def run_row(name, options, cache_dir, matmul_tflops):
    """One run of a trainer in a process of its own -> the row's figures, or {"row", "failed": one line}."""
    cached = set(Path(cache_dir).rglob("*"))
    with tempfile.TemporaryDirectory() as folder:
        script, argv = trainer_command(name, options, cache_dir, f"{folder}/run")
        settings = dict(cap_gib=options.cap_gib, as_t4=options.as_t4, profile=options.profile)
        result, printed = in_own_process("measure", script=script, argv=argv, matmul_tflops=matmul_tflops, **settings)
    if "failed" in result:
        return {"row": name, **result}
    return {"row": name, **result, "plan": plan_in(printed), "caches_warm": set(Path(cache_dir).rglob("*")) == cached}


def trainer_command(name, options, cache_dir, output_dir):
    """(trainer, its flags) of the row `name`; flags that were typed after -- win over the row's own."""
    row, _, resolution = name.partition("@")
    script, own = ROWS[row]
    argv = [*own, *(["--resolution", resolution] if resolution else [])]
    argv += ["--max_vram_gb", str(options.cap_gib)] if options.cap_gib else []
    argv += ["--no_auto_fit"] if options.fixed else []
    argv += ["--pretrained_model_name_or_path", options.model, "--train_data_dir", options.images, *options.flags]
    argv += [
        "--cache_dir",
        str(cache_dir),
        "--output_dir",
        output_dir,
        "--max_train_steps",
        str(STEPS),
        "--checkpointing_steps",
        "0",
    ]
    return script, argv


def plan_in(printed):
    """What the trainer said of how it cuts a step into passes."""
    return "; ".join(line for line in printed.splitlines() if line.startswith(PLAN_LINES))


def in_own_process(task, **arguments):
    """Run `task` of TASKS in a new process -> (its result, what it printed); {"failed": one line} when it ended without one.

    Linux counts what the parent has resident into a new process's peak, so this process must stay small: it never uses the GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "result.json"
        argv = [sys.executable, __file__, "--internal", task, json.dumps(arguments), str(place)]
        process = subprocess.run(argv, stdout=subprocess.PIPE, text=True, errors="replace")
        print(process.stdout, end="", flush=True)
        if place.exists():
            return json.loads(place.read_text()), process.stdout
    code = process.returncode
    return {
        "failed": f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    }, process.stdout


# ---------------------------------------------------------------- in the process of a row


def internal(task, arguments, place):
    """Write what `task` returns to the file `place`, or {"failed": one line} of what it raises."""
    try:
        result = TASKS[task](**json.loads(arguments))
    except (UserError, torch.OutOfMemoryError) as error:
        result = {"failed": one_line(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"failed": one_line(f"{type(error).__name__}: {error}")}
    files.write_json(Path(place), result)


def one_line(error):
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def measure(script, argv, matmul_tflops, cap_gib, as_t4, profile):
    """Run a trainer here -> the figures of a row. Everything but the run itself comes after it: the first step counts from the start."""
    if cap_gib:
        share = cap_gib * device.GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    trainer = importlib.import_module(script)
    busy_s, data_s, peaks_gib = [], [], []
    attention = t4_attention() if as_t4 else contextlib.nullcontext()
    with attention, profiled_step(STEPS, busy_s, profile), timed_batches(data_s), memory_peaks(peaks_gib):
        result = trainer.main(argv)
    if result["ended"] != "finished":
        raise UserError(f"{result['ended']} after step {result['step']}")
    allocated_gib, reserved_gib = map(max, zip(*peaks_gib, peaks_now_gib()))
    return dict(
        **speed(Path(result["output_dir"]), busy_s, data_s, matmul_tflops),
        peak_allocated_gib=round(allocated_gib, 2),
        peak_reserved_gib=round(reserved_gib, 2),
        ram_gib=round(device.peak_ram_gib(), 2),
        whole_run_s=round(device.seconds_since_start(), 1),
    )


def speed(run_dir, busy_s, data_s, matmul_tflops):
    """The figures that follow from a run's folder and from its times.

    Args:
        busy_s: seconds of GPU work of the last step, for each attempt at it.
        data_s: host seconds of every batch made; the last one is made in the last step, for the step that would follow.
    """
    flags = json.loads((run_dir / "config.json").read_text())["flags"]
    steps = report.read_metrics(run_dir / "metrics.jsonl")
    resolution, images = flags["resolution"], flags["train_batch_size"] * flags["gradient_accumulation_steps"]
    timed = slice(-TIMED - 1, -1)  # the last step runs under the profiler
    s_per_img = statistics.median(step["s_per_img"] for step in steps[timed])
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
def replaced(owner, name, stand_in):
    """Inside, `owner.name(...)` calls `stand_in(original, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: stand_in(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def profiled_step(number, busy_s, show):
    """Inside, the engine's step `number` runs under the profiler; its kernels' seconds are appended to `busy_s`."""

    def step(original, engine, n, *args, **kwargs):
        if n != number:
            return original(engine, n, *args, **kwargs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = original(engine, n, *args, **kwargs)
            torch.cuda.synchronize()
        kernels = profile.key_averages()
        busy_s.append(sum(event.self_device_time_total for event in kernels) / 1e6)
        if show:
            print(kernels.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90))
        return result

    return replaced(Engine, "step", step)


def timed_batches(data_s):
    """Inside, the seconds that each effective batch takes to make are appended to `data_s`."""

    def effective_batch(original, *args, **kwargs):
        started = time.perf_counter()
        batches = original(*args, **kwargs)
        data_s.append(time.perf_counter() - started)
        return batches

    return replaced(Examples, "effective_batch", effective_batch)


def peaks_now_gib():
    """(allocated, reserved) at most since torch's counters were last set back."""
    return torch.cuda.max_memory_allocated() / device.GIB, torch.cuda.max_memory_reserved() / device.GIB


def memory_peaks(peaks_gib):
    """Inside, (allocated, reserved) peaks are appended to `peaks_gib` before torch's counters are set back."""

    def reset(original, *args):
        peaks_gib.append(peaks_now_gib())
        original(*args)

    return replaced(torch.cuda, "reset_peak_memory_stats", reset)


def t4_attention():
    """The attention kernels of a sm_75 card."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def gpu():
    """The GPU's name, and what it makes of 8192 x 8192 fp16 matrix products in TFLOP/s."""
    n, seconds = 8192, []
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return dict(gpu=torch.cuda.get_device_name(), matmul_tflops=round(2 * n**3 / statistics.median(seconds) / 1e12, 1))


TASKS = {"measure": measure, "gpu": gpu}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--internal"]:
        internal(*sys.argv[2:])
    else:
        run(main)
