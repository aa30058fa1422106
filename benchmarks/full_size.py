"""Writes what the benchmarks run on without a download: a full-size SDXL with random weights, and captioned images.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images

The checkpoint is 7 GB of fp16 in diffusers' layout, under the file names of variant "fp16". Speed and memory do not
depend on the weights. The images are photographs that scikit-image, scikit-learn and matplotlib bring along, where they
are installed. Rendered pictures of 1080 px make up the rest.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli.flag_checks import check_writable
from common.cli.running import run
from common.errors import UserError
from common.model import tiny, tiny_pictures

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

# Widths of stabilityai/stable-diffusion-xl-base-1.0 (its config.json files); VAE of madebyollin/sdxl-vae-fp16-fix.
FULL = dict(
    unet=dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    text_encoder=dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    ),
    text_encoder_2=dict(
        vocab_size=49408,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    ),
    vae=dict(sample_size=512, block_out_channels=(128, 256, 512, 512)),
)
PARAMETERS = dict(unet=2_567_463_684, text_encoder=123_060_480, text_encoder_2=694_659_840, vae=83_653_863)

# package/path -> caption
PHOTOS = {
    "skimage/data/astronaut.png": (
        "a smiling astronaut in an orange suit before a flag and a model of the space shuttle"
    ),
    "skimage/data/camera.png": "a man in a dark coat looking through a camera on a tripod, black and white",
    "skimage/data/chelsea.png": "the face of a ginger tabby cat, close up",
    "skimage/data/coffee.png": "a cup of coffee on a red saucer on a wooden table",
    "skimage/data/coins.png": "four rows of ancient coins on a dark cloth",
    "skimage/data/hubble_deep_field.jpg": "hundreds of distant galaxies in a black sky",
    "skimage/data/moon.png": "craters on the grey surface of the moon",
    "skimage/data/motorcycle_left.png": "a red motorcycle in a garage full of tools",
    "skimage/data/retina.jpg": "the red retina of an eye with its blood vessels",
    "skimage/data/rocket.jpg": "a white rocket on a floodlit launch pad at dusk",
    "skimage/data/brick.png": "a wall of grey bricks",
    "skimage/data/grass.png": "blades of grass from above",
    "sklearn/datasets/images/china.jpg": "a chinese pagoda above green trees and a lake",
    "sklearn/datasets/images/flower.jpg": "an orange dahlia in front of dark leaves",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg": "a navy officer in uniform and cap with a flag behind her",
}


def write_model(folder: Path) -> None:
    """Write one component at a time, so that a 12 GB machine can do it.

    model_index.json comes last and marks a complete checkpoint.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = tiny.sdxl(FULL, PHOTOS.values(), "meta")
    torch.manual_seed(0)
    for name, expected in PARAMETERS.items():
        model = getattr(pipeline, name).half()
        count = sum(p.numel() for p in model.parameters())
        assert count == expected, f"{name}: {count:,} parameters, not SDXL's {expected:,}"
        randomize(model.to_empty(device=device))
        model.save_pretrained(folder / name, variant="fp16")
        model.to("meta")
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / name)
    pipeline.save_config(folder)


def randomize(model: "nn.Module") -> None:
    """Fill uninitialised weights so that activations stay small in fp16.

    Matrices have half the gain that keeps the variance; norms are 1, biases 0.

    Buffers stay uninitialised: none of SDXL's is saved (position_ids are made anew at loading).
    """
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.5 / p[0].numel() ** 0.5)
            else:
                p.fill_(1 if "norm" in name and name.endswith("weight") else 0)


def installed_photos() -> list[tuple[Path, str]]:
    """(file, caption) of the sample photographs on this machine; no package is imported and nothing is downloaded."""
    photos = []
    for path, caption in PHOTOS.items():
        package, _, path_in_package = path.partition("/")
        spec = find_spec(package)
        if spec and (file := Path(spec.submodule_search_locations[0]) / path_in_package).is_file():
            photos.append((file, caption))
    return photos


def pictures() -> "Iterator[tuple[Image, str]]":
    """Endless (image, caption): first the photographs, then rendered ones of 1080x1080."""
    from PIL import Image

    for file, caption in installed_photos():
        yield Image.open(file), caption
    rng = random.Random(0)
    while True:
        yield tiny_pictures.render_character(rng, 1080, 1080)


def write_images(folder: Path, count: int) -> None:
    """Write `count` files and metadata.jsonl: jpg, png and webp by turns.

    Number 1 is greyscale, number 4 has an alpha channel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i, (image, caption) in enumerate(itertools.islice(pictures(), count)):
            name = f"{i:03d}.{('jpg', 'png', 'webp')[i % 3]}"
            image = image.convert({1: "L", 4: "RGBA"}.get(i, "RGB"))
            if i == 4:
                image.putalpha(image.convert("L"))
            image.save(folder / name)
            metadata.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def main() -> None:
    flags = parse()

    # The images
    start = time.perf_counter()
    write_images(flags.images, flags.count)
    seconds = time.perf_counter() - start
    photos = min(len(installed_photos()), flags.count)
    print(f"{flags.images}: {photos} photographs, {flags.count - photos} rendered pictures, {seconds:.1f} s")

    # The checkpoint
    start = time.perf_counter()
    write_model(flags.model)
    seconds = time.perf_counter() - start
    size_gb = sum(file.stat().st_size for file in flags.model.rglob("*.safetensors")) / 1e9
    print(f"{flags.model}: {size_gb:.2f} GB of weights, {seconds:.1f} s")


def parse() -> argparse.Namespace:
    """The command line -> flags.

    Raises:
        UserError: no images asked for, or a folder that exists, cannot be written or is named twice.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="new folder for the checkpoint (7 GB)")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="new folder for the captioned images")
    parser.add_argument("--count", type=int, default=32, help="number of images (default: 32)")
    flags = parser.parse_args()

    # Refusals before anything is written
    if flags.count < 1:
        raise UserError(f"--count {flags.count}: must be at least 1")
    for name in ("model", "images"):
        folder = getattr(flags, name)
        if folder.exists():
            raise UserError(f"--{name} {folder} exists already: name a new folder or remove it")
        check_writable(name, folder)
    if flags.model.resolve() == flags.images.resolve():
        raise UserError("--model and --images name the same folder")
    return flags


if __name__ == "__main__":
    run(main)
