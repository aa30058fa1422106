"""Times the optimizer step of the trainers on the full-size SDXL architecture, by running the trainers themselves.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images        # random weights, no download
    python benchmarks/train_step.py --model /tmp/sdxl --images /tmp/images [--only sdxl,dora@1024] [--as_t4] [--vram_gb 11.9] [-- FLAGS]

One row a setting: seconds per image (median step / its images), GPU-busy seconds per image (profiler), peak allocated and
reserved GiB of the whole run, and the share of this GPU's own fp16 matrix rate that the arithmetic of two forward passes takes.
Flags after `--` go to every trainer. The last line is JSON.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from common import device, report
from common.engine import Engine

FORWARD_TFLOP = {512: 1.589, 768: 3.641, 1024: 6.761}  # UNet, per image
T4_GIB = 14.56  # usable of the 16 on the label
STEPS, TIMED = 12, 8
PROFILE_TABLE = bool(os.environ.get("PROFILE_TABLE"))  # also print the kernels of the profiled step
ROWS = {
    "sdxl": ("train_sdxl", []),
    "opt": ("train_opt", []),
    "qlora": ("train_qlora", []),
    "qlora_normal": ("train_qlora", ["--strategy", "normal"]),
    "dora": ("train_dora", []),
    "lora": ("train_sdxl", ["--resolution", "512", "--lora_alpha", "32", "--lora_dropout", "0.1", "--use_8bit_adam"]),
    "text": ("train_sdxl", ["--train_text_encoder", "--use_8bit_adam", "--train_batch_size", "3", "--gradient_accumulation_steps", "1"]),
}


def main():
    """Run the rows asked for; print a Markdown table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by full_size.py")
    parser.add_argument("--images", required=True, help="folder made by full_size.py")
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows of {' '.join(ROWS)}; NAME@RESOLUTION for another one")
    parser.add_argument("--as_t4", action="store_true", help="only what a T4 can run: no flash attention, 14.56 GiB")
    parser.add_argument("--vram_gb", type=float, help="cap the memory of this process, in GiB")
    parser.add_argument("flags", nargs="*", help="after --: flags for every trainer")
    options = parser.parse_args()
    cap = options.vram_gb or (T4_GIB if options.as_t4 else None)
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap * device.GIB / torch.cuda.get_device_properties(0).total_memory)
    rate, rows = matmul_tflops(), []
    common = ["--max_vram_gb", str(cap)] if cap else []
    common += ["--pretrained_model_name_or_path", options.model, "--train_data_dir", options.images, *options.flags]
    with t4_attention() if options.as_t4 else contextlib.nullcontext(), tempfile.TemporaryDirectory() as scratch:
        for name in options.only.split(","):
            row, _, resolution = name.partition("@")
            script, flags = ROWS[row]
            argv = [*flags, *common, "--cache_dir", f"{scratch}/cache", *(["--resolution", resolution] if resolution else [])]
            rows.append({"row": name, **measure(script, argv, f"{scratch}/{len(rows)}", rate)})
            print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows))
    gpu = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, matmul_tflops=round(rate, 1), cap_gib=cap, as_t4=options.as_t4)
    print(json.dumps({**gpu, "rows": rows}))


def measure(script, argv, output_dir, rate):
    """One row: a run of the trainer, its figures taken from metrics.jsonl and the last step profiled."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = importlib.import_module(script)
    argv = [*argv, "--output_dir", output_dir, "--max_train_steps", str(STEPS), "--checkpointing_steps", "0"]
    started, busy = time.time(), []
    try:
        with profiled_step(STEPS, busy):
            trainer.main(argv)
    except torch.OutOfMemoryError as error:
        return {"oom": str(error).splitlines()[0]}
    config = json.loads(Path(output_dir, "config.json").read_text())
    steps = report.read_metrics(Path(output_dir, "metrics.jsonl"))
    resolution, images = config["flags"]["resolution"], config["flags"]["train_batch_size"] * config["flags"]["gradient_accumulation_steps"]
    s_per_img = statistics.median(step["s_per_img"] for step in steps[-TIMED - 1 : -1])
    return dict(
        resolution=resolution,
        images_per_step=images,
        s_per_img=round(s_per_img, 4),
        gpu_busy_s_per_img=round(busy[0] / images, 4),
        peak_allocated_gib=round(torch.cuda.max_memory_allocated() / device.GIB, 2),
        peak_reserved_gib=round(torch.cuda.max_memory_reserved() / device.GIB, 2),
        ram_gib=round(device.peak_ram_gib(), 2),
        matmul_share=round(2 * FORWARD_TFLOP.get(resolution, float("nan")) / s_per_img / rate, 3),
        whole_run_s=round(time.time() - started, 1),
    )


@contextlib.contextmanager
def profiled_step(number, busy):
    """Inside, the engine's step `number` runs under the profiler; its kernels' seconds are appended to `busy`."""
    original = Engine.step

    def step(engine, n, *args, **kwargs):
        if n != number:
            return original(engine, n, *args, **kwargs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = original(engine, n, *args, **kwargs)
            torch.cuda.synchronize()
        busy.append(sum(event.self_device_time_total for event in profile.key_averages()) / 1e6)
        if PROFILE_TABLE:
            print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90))
        return result

    Engine.step = step
    try:
        yield
    finally:
        Engine.step = original


def matmul_tflops(n=8192):
    """What this GPU makes of n x n fp16 matrix products, in TFLOP/s."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds) / 1e12


def t4_attention():
    """The attention kernels of a sm_75 card."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def markdown(rows):
    """The rows as a Markdown table; out of memory is a result."""
    lines = [
        "| run | px | images a step | s/img | GPU busy s/img | allocated GiB | reserved GiB | matmul share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        keys = "resolution images_per_step s_per_img gpu_busy_s_per_img peak_allocated_gib peak_reserved_gib matmul_share".split()
        cells = ["out of memory"] + [""] * 6 if "oom" in row else [str(row[key]) for key in keys]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
