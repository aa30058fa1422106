"""Draws images with SDXL and LoRA adapters; --compare sets base and adapters side by side at identical seeds; --merge makes them one model.

python infer.py --compare
python infer.py --compare --lora outputs/train_sdxl --lora outputs/train_dora:0.8
python infer.py --lora outputs/train_opt --prompt "a fox in Naruto style" --num_images 4
python infer.py --merge merged --lora outputs/train_opt --lora outputs/train_dora:0.5
python infer.py --demo --compare
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
import itertools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, NamedTuple, Optional

from common import hub, manifest, run_folder
from common.command_line import DEMO_ROOT, parse, print_config
from common.errors import UserError
from common.flag_checks import check_model, check_ranges
from common.flag_facts import ANY, FROM_ONE, FROM_ZERO, SEED, allowing, flag, local_path, multiple_of
from common.model_flags import ModelFlags
from common.running import run
from common.schedulers import SCHEDULERS, default_guidance_rescale

REFERENCE_PROMPTS = [
    "Naruto Uzumaki eating ramen",
    "Bill Gates in Naruto style",
    "A boy with blue eyes in Naruto style",
]
EMA_FOLDER = "ema_unet"


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
        [], "what to draw, repeatable; none means the three reference prompts (or the demo's own)", group="pictures"
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


class Adapter(NamedTuple):
    """An adapter as the user named it: a file or folder, and how strongly it counts."""

    path: Path
    scale: float


class Column(NamedTuple):
    """One way to draw every prompt. `active`: [(name in the pipeline, scale)], none of them for the base; `sources`: for the manifest;
    `stem`: what its files' names begin with."""

    title: str
    active: list
    sources: list
    stem: str


def main(argv=None):
    """Draw, or merge; returns what manifest.json or merge.json says."""
    flags = parse(Flags, argv)
    check(flags)
    adapters = chosen_adapters(flags)
    if flags.dry_run:
        return print_config(flags)
    hub.check(flags)

    from common import adapter_reading, device, loading, sampling
    from demo.build import demo_assets

    if flags.demo:
        demo_assets(DEMO_ROOT)
    start_s = time.monotonic()
    files = [adapter_reading.find_adapter(adapter.path) for adapter in adapters]
    image = load_image(flags.image, flags.resolution)
    host = device.start(flags.mixed_precision, flags.seed)
    if not host.is_main:
        return None  # under `accelerate launch` one process draws
    model = loading.model_of(flags, host.say)
    if flags.guidance_rescale is None:
        flags.guidance_rescale = default_guidance_rescale(model.kind)
    options = dict(steps=flags.steps, guidance_scale=flags.guidance_scale, guidance_rescale=flags.guidance_rescale)
    options |= dict(negative_prompt=flags.negative_prompt, image=image, strength=flags.strength)
    settings = sampling.Settings(flags.resolution, **options)
    memory, reason = sampling.choose_memory(flags.memory, host, settings, min(flags.batch_size, flags.num_images))
    host.say(f"memory: {memory} ({reason})")
    sampler = sampling.Sampler(model, host, flags.scheduler, memory, flags.image is not None, flags.cuda_graph)
    columns = make_columns(flags, sampler, adapters, files)  # loads the adapters
    if flags.merge:
        return merge(flags, sampler, model, columns[0])
    sampler.place()
    load_s = time.monotonic() - start_s
    with run_folder.owned(Path(flags.output_dir), host):
        records = draw(flags, sampler, columns, settings)  # images/*.png
        return manifest.write_results(flags, sampler, model, columns, records, load_s)


# ---------------------------------------------------------------- flags


def check(flags):
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    check_ranges(flags)
    if flags.image and int(flags.steps * flags.strength) < 1:
        raise UserError(f"--strength {flags.strength}: of {flags.steps} steps it leaves none; raise one of the two")
    if flags.image and not os.path.isfile(flags.image):
        raise UserError(f"--image {flags.image}: no such file")
    if not flags.lora and not flags.compare and (flags.ema or flags.lora_scale != 1):
        raise UserError(
            f"{'--ema' if flags.ema else '--lora_scale'}: there is no adapter it could apply to; add --lora PATH"
        )
    if flags.merge is not None:
        check_merge(flags)
    run_folder.check_free(Path(flags.output_dir))
    check_model(flags)


def check_merge(flags):
    """The part of `check` for --merge: there is something to merge, and a new place for it outside of the model.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    place, model = Path(flags.merge), Path(flags.pretrained_model_name_or_path)
    if not flags.lora:
        raise UserError(f"--merge {place}: no adapter to merge; add --lora PATH[:SCALE]")
    for name in ("compare", "prompt", "image"):
        if getattr(flags, name):
            raise UserError(f"--merge {place}: draws nothing, so --{name} has no meaning; leave it out")
    if place.resolve().is_relative_to(model.resolve()):
        raise UserError(f"--merge {place}: is in the model's own folder, which stays as it is; name a folder elsewhere")
    if os.path.lexists(place):
        raise UserError(f"--merge {place}: exists already, and nothing is written over; name a new folder")


def parse_lora(text):
    """`PATH` or `PATH:SCALE` -> Adapter. The whole text counts as a path when it is one, so names with colons work.

    Raises:
        UserError: no such path.
    """
    scaled = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if scaled and not Path(text).exists():
        path, scale = Path(scaled[1]), float(scaled[2])
    else:
        path, scale = Path(text), 1.0
    if not path.exists():
        raise UserError(f"--lora {text}: no such file or folder (PATH or PATH:SCALE)")
    return Adapter(path, scale)


def chosen_adapters(flags):
    """The adapters of --lora, or for --compare those that lie in outputs/; averaged ones with --ema; scaled by --lora_scale.

    Raises:
        UserError: no such adapter, no averaged weights, nothing to compare.
    """
    chosen = [parse_lora(text) for text in flags.lora]
    if flags.ema:
        for adapter in chosen:
            if not (adapter.path / EMA_FOLDER).is_dir():
                raise UserError(f"--ema: no {EMA_FOLDER} in {adapter.path}; train with --use_ema, or leave --ema out")
        chosen = [Adapter(adapter.path / EMA_FOLDER, adapter.scale) for adapter in chosen]
    if flags.compare and not chosen:
        pattern = f"*/{EMA_FOLDER}/{run_folder.WEIGHTS}" if flags.ema else f"*/{run_folder.WEIGHTS}"
        places = [Path("outputs"), *[Path("outputs/demo")] * flags.demo]  # where `make demo` trains
        chosen = [Adapter(path.parent, 1.0) for place in places for path in sorted(place.glob(pattern))]
        if not chosen:
            raise UserError(
                f"--compare: no adapter given and no outputs/{pattern} here; add --lora PATH, or train one first"
            )
        print(f"no --lora given: comparing {', '.join(str(adapter.path) for adapter in chosen)}")
    return [Adapter(adapter.path, adapter.scale * flags.lora_scale) for adapter in chosen]


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


# ---------------------------------------------------------------- drawing


def make_columns(flags, sampler, adapters, files):
    """Load the adapters and say who draws: with --compare the base and each adapter alone, else all of them together.

    Adapters found in outputs/ may belong to another model (the demo's, say): those are named and left out.
    """
    loaded = []
    for adapter, file in zip(adapters, files):
        try:
            name = sampler.load(file)
        except UserError as error:
            if flags.lora:
                raise
            sampler.host.say(f"left out: {error}")
            continue
        source = {"path": str(file), "scale": adapter.scale, "sha256": manifest.sha256(file)}
        loaded.append((title_of(file, adapter.scale), [(name, adapter.scale)], [source]))
    if flags.compare and not loaded:
        raise UserError("--compare: none of the adapters in outputs/ fits this model; name one with --lora")
    if not flags.compare:
        titles, active, sources = zip(*loaded) if loaded else (["base"], [], [])
        loaded = [(" + ".join(titles), sum(active, []), sum(sources, []))]
    columns = []
    for title, active, sources in [("base", [], []), *loaded] if flags.compare else loaded:
        title = unused(title, [column.title for column in columns], "{} ({})")
        columns.append(Column(title, active, sources, stem_of(title, [column.stem for column in columns])))
    return columns


def stem_of(title, used):
    """`title` as the beginning of a file name that no other column has."""
    return unused(re.sub(r"[^\w.-]+", "_", title).strip("_"), used, "{}_{}")


def unused(name, used, numbered):
    """`name`, or the first of `numbered`'s with 2, 3, ... that is not in `used` yet."""
    return next(
        one
        for one in itertools.chain([name], (numbered.format(name, i) for i in itertools.count(2)))
        if one not in used
    )


def title_of(file, scale):
    """What an adapter is called in pictures and file names: its run's folder, with step, EMA, kohya and scale where they matter."""
    folder, step = file.resolve().parent, re.fullmatch(r"pytorch_lora_weights_(\d+)", file.stem)
    if folder.name == EMA_FOLDER:
        title = f"{folder.parent.name} EMA"
    elif step:
        title = f"{folder.name} step {int(step[1])}"
    elif folder.name == "kohya":
        title = f"{file.stem} kohya"
    elif folder.name == "peft":
        title = f"{folder.parent.name} peft"
    else:
        title = folder.name if file.stem in ("pytorch_lora_weights", "adapter_model") else file.stem
    return title if scale == 1 else f"{title} x{scale:g}"


def draw(flags, sampler, columns, settings):
    """Every prompt and seed in every column -> records for the manifest; each image is on disk as soon as it is drawn."""
    from tqdm import tqdm

    from demo.settings import demo_settings

    prompts = list(dict.fromkeys(flags.prompt)) or (
        demo_settings(DEMO_ROOT)["prompts"] if flags.demo else REFERENCE_PROMPTS
    )
    seeds = [flags.seed + i for i in range(flags.num_images)]
    batches = [seeds[i : i + flags.batch_size] for i in range(0, len(seeds), flags.batch_size)]
    warn_of_long_prompts(sampler, prompts)
    (Path(flags.output_dir) / "images").mkdir(parents=True, exist_ok=True)
    records = []
    with tqdm(total=len(columns) * len(prompts) * len(seeds) * settings.steps_run, desc="drawing", unit="step") as bar:
        for column, (i, prompt), batch in itertools.product(columns, enumerate(prompts), batches):
            start_s = time.monotonic()
            images = sampler.draw(column.active, prompt, batch, settings, bar.update)
            seconds = (time.monotonic() - start_s) / len(batch)
            for seed, image in zip(batch, images):
                records.append(
                    {**manifest.save_image(flags, column, i, prompt, seed, image), "seconds": round(seconds, 3)}
                )
                if image.convert("L").getextrema()[1] == 0:
                    bar.write(
                        f"{records[-1]['file']} is all black: not finite in {sampler.host.dtype}; try --mixed_precision no or another VAE"
                    )
    return records


def warn_of_long_prompts(sampler, prompts):
    tokenizer = sampler.pipeline.tokenizer
    for prompt in prompts:
        if (excess := len(tokenizer(prompt).input_ids) - tokenizer.model_max_length) > 0:
            sampler.host.say(f"prompt too long, its last {excess} tokens are ignored: {prompt}")


def merge(flags, sampler, model, column):
    """Write the model with the adapters of `column` in its weights -> what its merge.json says."""
    from common import merging

    place, host = Path(flags.merge), sampler.host
    record = {**manifest.provenance(flags, model), "dtype": manifest.dtype_name(host), "adapters": column.sources}
    host.say(f"merging {column.title}")
    merging.merge(sampler.pipeline, column.active, model, place, record)
    host.say(
        f"the merged model is in {place}: name it with --pretrained_model_name_or_path, or load it with from_pretrained"
    )
    return record


if __name__ == "__main__":
    run(main)
