"""Times rendering on one GPU: infer.py's sampler against the plain diffusers pipeline.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images        # random weights, no download
    python benchmarks/sample.py --model /tmp/sdxl [--lora outputs/train_sdxl] [--steps 30] [--resolution 1024] [--as_t4]

Prompt, noise and scheduler are the same.
For the base model, and with --lora for the adapter too: seconds per image, how many times as fast, and how much the
images differ.
The last line is JSON.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.row_process import T4_GIB, t4_attention
from common.adapter_files import reading
from common.cli.running import run
from common.errors import UserError
from common.model import device, loading
from common.render import sampling

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "a lighthouse on a cliff above the sea"
SEED = 0
TIMED = 3  # images, after a first one
TITLES = (
    "what",
    "plain diffusers s",
    "ours s",
    "times as fast",
    "reserved GiB, plain / ours",
    "largest difference of 255",
)


class Timing(NamedTuple):
    """What rendering one image took."""

    image: "Image"
    seconds: float
    reserved_gib: float


def main(argv: list[str] | None = None) -> None:
    """Render with both; print a Markdown table and one line of JSON."""
    options = parse(argv)
    if not torch.cuda.is_available():
        raise UserError("a CUDA GPU is needed")

    # Both, one after the other
    if options.as_t4:
        share = T4_GIB * device.GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    with t4_attention() if options.as_t4 else contextlib.nullcontext():
        by_us = ours(options)
        gc.collect()  # the first model, before the second one comes
        by_diffusers = plain(options)
    rows = [compared(name, by_us[name], by_diffusers[name]) for name in by_us]

    # A table to read, and JSON to keep
    print(markdown(rows))
    settings = {name: getattr(options, name) for name in ("steps", "resolution", "as_t4")}
    print(json.dumps(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, **settings, rows=rows)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by full_size.py")
    parser.add_argument("--lora", type=Path, help="adapter: a run's folder or a file")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels (default: 1024)")
    as_t4 = f"only what a T4 can run: no flash attention, {T4_GIB} GiB"
    parser.add_argument("--as_t4", action="store_true", help=as_t4)
    return parser.parse_args(argv)


def markdown(rows: list[dict]) -> str:
    """Rows of `compared` as a Markdown table."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for row in rows:
        speed = f"{row['plain_s']} | {row['ours_s']} | {row['times_as_fast']}"
        memory = f"{row['plain_reserved_gib']} / {row['ours_reserved_gib']}"
        lines.append(f"| {row['what']} | {speed} | {memory} | {row['largest_difference']} |")
    return "\n".join(lines)


def ours(options: argparse.Namespace) -> dict[str, Timing]:
    """{"base": Timing, "adapter": Timing} by common/render/sampling.py."""
    sampler = sampling.Sampler(loading.find_model(options.model), device.start("fp16"), "euler", "gpu")
    columns = {"base": []}
    if options.lora:
        columns["adapter"] = [(sampler.load(reading.find_adapter(options.lora)), 1.0)]
    sampler.place()
    settings = sampling.Settings(resolution=options.resolution, steps=options.steps)
    return {name: timed(sampler.render, active, PROMPT, [SEED], settings) for name, active in columns.items()}


def plain(options: argparse.Namespace) -> dict[str, Timing]:
    """The same by diffusers alone."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        options.model, variant="fp16", dtype=torch.float16, add_watermarker=False
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.to("cuda").set_progress_bar_config(disable=True)
    size = dict(height=options.resolution, width=options.resolution)
    settings = dict(num_inference_steps=options.steps, guidance_scale=sampling.GUIDANCE, **size)

    def render():
        return pipeline(PROMPT, generator=sampling.generator(SEED), **settings).images

    results = {"base": timed(render)}
    if options.lora:
        file = reading.find_adapter(options.lora)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        results["adapter"] = timed(render)
    return results


def timed(render: Callable, *arguments: Any) -> Timing:
    """The first image, median seconds of TIMED images after it, and the peak of reserved memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + TIMED):
        torch.cuda.synchronize()
        started = time.perf_counter()
        images = render(*arguments)
        seconds.append(time.perf_counter() - started)
    return Timing(images[0], statistics.median(seconds[1:]), torch.cuda.max_memory_reserved() / device.GIB)


def compared(what: str, ours: Timing, plain: Timing) -> dict:
    """A row of the table: `what` was rendered, by both."""
    from PIL import ImageChops

    difference = ImageChops.difference(ours.image, plain.image).getextrema()
    return dict(
        what=what,
        plain_s=round(plain.seconds, 3),
        ours_s=round(ours.seconds, 3),
        times_as_fast=round(plain.seconds / ours.seconds, 2),
        plain_reserved_gib=round(plain.reserved_gib, 2),
        ours_reserved_gib=round(ours.reserved_gib, 2),
        largest_difference=max(high for _, high in difference),
    )


if __name__ == "__main__":
    run(main)
