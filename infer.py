"""Renders images with SDXL and LoRA adapters, side by side with --compare; --merge makes them one model.

python infer.py --compare
python infer.py --compare --lora outputs/train_sdxl --lora outputs/train_dora:0.8
python infer.py --lora outputs/train_opt --prompt "a fox in Naruto style" --num_images 4
python infer.py --merge merged --lora outputs/train_opt --lora outputs/train_dora:0.5
python infer.py --demo --compare
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, Optional

from common import run_folder
from common.cli import hub, render_checks
from common.cli.command_line import DEMO_ROOT, parse, print_config
from common.cli.flag_facts import ANY, FROM_ONE, FROM_ZERO, SEED, allowing, flag, local_path, multiple_of
from common.cli.model_flags import ModelFlags
from common.cli.running import run
from common.errors import UserError
from common.model.schedulers import SCHEDULERS, default_guidance_rescale
from common.render import manifest
from common.render.chosen_adapters import chosen_adapters

REFERENCE_PROMPTS = [
    "Naruto Uzumaki eating ramen",
    "Bill Gates in Naruto style",
    "A boy with blue eyes in Naruto style",
]


@dataclass
class Flags(ModelFlags):
    """Draw images with SDXL and LoRA adapters, or compare adapters with the base model."""

    # what to draw
    compare: bool = flag(
        False,
        "one grid, compare.png: every prompt with the base model and with every adapter alone, at identical seeds",
        group="pictures",
    )
    lora: List[str] = flag(
        [],
        "adapter, PATH or PATH:SCALE: a run's folder, .safetensors file (diffusers, kohya) or PEFT folder; repeatable",
        type=local_path,
        group="adapter",
        metavar="PATH[:SCALE]",
    )
    ema: bool = flag(False, "use the averaged weights of each adapter folder, PATH/ema_unet", group="adapter")
    lora_scale: float = flag(1.0, "multiplies the scale of every adapter", group="adapter", range=ANY)
    merge: Optional[str] = flag(
        None,
        "draw nothing, but write a model folder of this name, with the adapters in its weights; it must not exist yet",
        type=local_path,
        group="adapter",
    )
    prompt: List[str] = flag(
        [],
        'what to show, in quotes; several: --prompt "a fox" "a cat"; none means the reference prompts',
        group="pictures",
    )
    negative_prompt: Optional[str] = flag(None, "what to keep out of the images", group="pictures")
    seed: int = flag(
        42, "image i of a prompt is drawn with seed + i, whatever else is drawn beside it", group="pictures", range=SEED
    )
    num_images: int = flag(1, "images of each prompt", group="pictures", range=FROM_ONE)
    resolution: int = flag(
        1024, "pixels: side of the square image; a multiple of 8", group="pictures", range=multiple_of(8), metavar="PX"
    )
    steps: int = flag(30, "denoising steps", group="pictures", range=FROM_ONE)
    guidance_scale: float = flag(
        7.5,
        "strength of the prompt (classifier-free guidance); 1 switches guidance off",
        group="pictures",
        range=FROM_ZERO,
    )
    guidance_rescale: Optional[float] = flag(
        None,
        "0 to 1: guided noise is scaled back to the spread of unguided one;"
        " none means 0.7 with zero-terminal SNR, else 0",
        group="pictures",
        range=allowing(lambda value: 0 <= value <= 1, "must be at least 0 and at most 1"),
    )
    scheduler: str = flag("euler", "sampler", choices=list(SCHEDULERS), group="pictures")
    image: Optional[str] = flag(
        None, "start from this image (img2img); it is cropped to a square", type=local_path, group="pictures"
    )
    strength: float = flag(
        0.6,
        "with --image: share of the steps that is run, 1 forgets the image",
        group="pictures",
        range=allowing(lambda share: 0 < share <= 1, "must be more than 0 and at most 1"),
        metavar="SHARE",
    )
    # machine
    cuda_graph: bool = flag(
        True,
        "on a GPU that holds the whole model, launch the kernels of a denoising step once and replay them",
        group="memory and speed",
    )
    memory: Literal["auto", "gpu", "offload", "sequential"] = flag(
        "auto",
        "weights on the GPU: all, only the part at work (8 GB cards), or one layer at a time (slow);"
        " auto goes by what is free",
        group="memory and speed",
    )
    batch_size: int = flag(1, "images of one prompt that are drawn together", group="memory and speed", range=FROM_ONE)
    output_dir: str = flag(
        "outputs/infer",
        "where compare.png, manifest.json and images/ go; those of earlier drawings are kept",
        type=local_path,
        demo="outputs/demo",
        group="output",
    )


def main(argv=None):
    """Render, or merge; returns what manifest.json or merge.json says."""
    # Every mistake is answered before torch is imported
    flags = parse(Flags, argv)
    render_checks.check(flags)
    adapters = chosen_adapters(flags)
    if flags.dry_run:
        return print_config(flags)
    hub.check(flags)

    from common.adapter_files import reading
    from common.model import device, loading
    from common.model.tiny import demo_assets
    from common.render import sampling
    from common.render.columns import make_columns

    # What is given: files and an image to start from
    if flags.demo:
        demo_assets(DEMO_ROOT)
    start_s = time.monotonic()
    files = [reading.find_adapter(adapter.path) for adapter in adapters]
    image = load_image(flags.image, flags.resolution)
    host = device.start(flags.mixed_precision, flags.seed)
    if not host.is_main:
        return None  # under `accelerate launch` one process renders

    # What every image depends on
    model = loading.model_of(flags, host.say)
    if flags.guidance_rescale is None:
        flags.guidance_rescale = default_guidance_rescale(model.kind)
    settings = settings_of(flags, image)

    # The model in its memory tier, the adapters beside it
    memory, reason = sampling.choose_memory(flags.memory, host, settings, min(flags.batch_size, flags.num_images))
    host.say(f"memory: {memory} ({reason})")
    options = dict(img2img=image is not None, cuda_graph=flags.cuda_graph)
    sampler = sampling.Sampler(model, host, flags.scheduler, memory, **options)
    columns = make_columns(flags, sampler, adapters, files)
    if flags.merge:
        return merge(flags, sampler, model, columns[0])
    sampler.place()
    load_s = time.monotonic() - start_s

    # images/*.png, then manifest.json and compare.png
    with run_folder.owned(Path(flags.output_dir), host):
        records = render(flags, sampler, columns, settings)
        return manifest.write_results(flags, sampler, model, columns=columns, records=records, load_s=load_s)


def settings_of(flags, image):
    """What every image depends on, whatever its prompt, seed and adapters."""
    from common.render import sampling

    return sampling.Settings(
        resolution=flags.resolution,
        steps=flags.steps,
        guidance_scale=flags.guidance_scale,
        guidance_rescale=flags.guidance_rescale,
        negative_prompt=flags.negative_prompt,
        image=image,
        strength=flags.strength,
    )


def load_image(path, resolution):
    """--image as RGB, the largest middle square scaled to `resolution` px; None without one."""
    if path is None:
        return None
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.fit(
                ImageOps.exif_transpose(image).convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS
            )
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"--image {path}: cannot be read ({error})") from None


def render(flags, sampler, columns, settings):
    """Every prompt and seed in every column -> records for the manifest; each image is on disk once it is made."""
    from tqdm import tqdm

    # What is to be rendered
    prompts = prompts_of(flags)
    seeds = [flags.seed + i for i in range(flags.num_images)]
    batches = [seeds[i : i + flags.batch_size] for i in range(0, len(seeds), flags.batch_size)]
    warn_of_long_prompts(sampler, prompts)
    (Path(flags.output_dir) / "images").mkdir(parents=True, exist_ok=True)

    # Batch by batch
    records = []
    steps = len(columns) * len(prompts) * len(seeds) * settings.steps_run
    with tqdm(total=steps, desc="rendering", unit="step") as bar:
        for column, (i, prompt), batch in itertools.product(columns, enumerate(prompts), batches):
            start_s = time.monotonic()
            images = sampler.render(column.active, prompt, batch, settings, bar.update)
            seconds = round((time.monotonic() - start_s) / len(batch), 3)

            # On the disk at once, and a word on black ones
            for seed, image in zip(batch, images):
                saved = manifest.save_image(flags, column, index=i, prompt=prompt, seed=seed, image=image)
                records.append({**saved, "seconds": seconds})
                if image.convert("L").getextrema()[1] == 0:
                    cure = "try --mixed_precision no or another VAE"
                    bar.write(f"{saved['file']} is all black: not finite in {sampler.host.dtype}; {cure}")
    return records


def prompts_of(flags):
    """Each of --prompt once, or the demo's own, or the reference prompts."""
    from common.cli.demo_settings import demo_settings

    if flags.prompt:
        return list(dict.fromkeys(flags.prompt))
    return demo_settings(DEMO_ROOT)["prompts"] if flags.demo else REFERENCE_PROMPTS


def warn_of_long_prompts(sampler, prompts):
    tokenizer = sampler.pipeline.tokenizer
    for prompt in prompts:
        if (excess := len(tokenizer(prompt).input_ids) - tokenizer.model_max_length) > 0:
            sampler.host.say(f"prompt too long, its last {excess} tokens are ignored: {prompt}")


def merge(flags, sampler, model, column):
    """Write the model with the adapters of `column` in its weights -> what its merge.json says."""
    from common.adapter_files import merging

    host = sampler.host
    place = Path(flags.merge)
    record = {**manifest.provenance(flags, model), "dtype": manifest.dtype_name(host), "adapters": column.sources}
    host.say(f"merging {column.title}")
    merging.merge(sampler.pipeline, column.active, model, place, record)
    use = "name it with --pretrained_model_name_or_path, or load it with from_pretrained"
    host.say(f"the merged model is in {place}: {use}")
    return record


if __name__ == "__main__":
    run(main)
