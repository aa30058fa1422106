"""Times drawing: infer.py's sampler against the plain diffusers pipeline, on one GPU, with the same prompt, noise and scheduler.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images        # random weights, no download
    python benchmarks/sample.py --model /tmp/sdxl [--lora outputs/train_sdxl] [--steps 30] [--resolution 1024] [--as_t4]

For the base model, and with --lora for the adapter too: seconds per image, how many times as fast, and how far apart the images are.
The last line is JSON.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.train_step import T4_GIB, t4_attention
from common.adapter_files import reading
from common.cli.running import run
from common.errors import UserError
from common.model import device, loading
from common.render import sampling

PROMPT, SEED, TIMED = "a lighthouse on a cliff above the sea", 0, 3


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by full_size.py")
    parser.add_argument("--lora", type=Path, help="adapter: a run's folder or a file")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument(
        "--as_t4", action="store_true", help=f"only what a T4 can run: no flash attention, {T4_GIB} GiB"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("a CUDA GPU is needed")
    if options.as_t4:
        torch.cuda.set_per_process_memory_fraction(
            T4_GIB * device.GIB / torch.cuda.get_device_properties(0).total_memory
        )
    with t4_attention() if options.as_t4 else contextlib.nullcontext():
        by_us = ours(options)
        gc.collect()  # the first model, before the second one comes
        by_diffusers = plain(options)
    rows = [compared(name, by_us[name], by_diffusers[name]) for name in by_us]
    print(
        "| what | plain diffusers s | ours s | times as fast | reserved GiB, plain / ours | largest difference of 255 |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        memory = f"{row['plain_reserved_gib']} / {row['ours_reserved_gib']}"
        print(
            f"| {row['what']} | {row['plain_s']} | {row['ours_s']} | {row['times_as_fast']} | {memory} | {row['largest_difference']} |"
        )
    settings = {name: getattr(options, name) for name in ("steps", "resolution", "as_t4")}
    print(json.dumps(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, **settings, rows=rows)))


def ours(options):
    """{"base": (image, seconds, reserved GiB), "adapter": ...} by common/render/sampling.py."""
    sampler = sampling.Sampler(loading.find_model(options.model), device.start("fp16"), "euler", "gpu")
    columns = {"base": []}
    if options.lora:
        columns["adapter"] = [(sampler.load(reading.find_adapter(options.lora)), 1.0)]
    sampler.place()
    settings = sampling.Settings(resolution=options.resolution, steps=options.steps)
    return {name: timed(sampler.render, active, PROMPT, [SEED], settings) for name, active in columns.items()}


def plain(options):
    """The same by diffusers alone."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        options.model, variant="fp16", dtype=torch.float16, add_watermarker=False
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.to("cuda").set_progress_bar_config(disable=True)
    settings = dict(
        num_inference_steps=options.steps,
        guidance_scale=sampling.GUIDANCE,
        height=options.resolution,
        width=options.resolution,
    )

    def draw():
        return pipeline(PROMPT, generator=sampling.generator(SEED), **settings).images

    results = {"base": timed(draw)}
    if options.lora:
        file = reading.find_adapter(options.lora)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        results["adapter"] = timed(draw)
    return results


def timed(draw, *arguments):
    """(first image, median seconds of TIMED images after a first one, peak of reserved GiB)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + TIMED):
        torch.cuda.synchronize()
        started = time.perf_counter()
        images = draw(*arguments)
        seconds.append(time.perf_counter() - started)
    return images[0], statistics.median(seconds[1:]), torch.cuda.max_memory_reserved() / device.GIB


def compared(what, ours, plain):
    from PIL import ImageChops

    apart = ImageChops.difference(ours[0], plain[0]).getextrema()
    return dict(
        what=what,
        plain_s=round(plain[1], 3),
        ours_s=round(ours[1], 3),
        times_as_fast=round(plain[1] / ours[1], 2),
        plain_reserved_gib=round(plain[2], 2),
        ours_reserved_gib=round(ours[2], 2),
        largest_difference=max(high for _, high in apart),
    )


if __name__ == "__main__":
    run(main)
