"""The tiny demo: an SDXL with random weights and a drawn, captioned image set, made in about a second and without a network."""

import json
import math
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from demo.settings import demo_settings

# The topology and the noise schedule of SDXL (config.json files of stabilityai/stable-diffusion-xl-base-1.0); the widths are left open.
UNET = dict(
    layers_per_block=2,
    use_linear_projection=True,
    addition_embed_type="text_time",
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
VAE = dict(
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.13025,
    force_upcast=False,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
)
# 64 px are 8 latents a side. Text is 32 + 48 = 80 wide; pooled text (64) and six time ids of 8 numbers make 112.
TINY = dict(
    unet=dict(
        sample_size=8,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 2, 4],
        cross_attention_dim=80,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=112,
    ),
    text_encoder=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
    ),
    text_encoder_2=dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        projection_dim=64,
        hidden_act="gelu",
    ),
    vae=dict(sample_size=64, block_out_channels=(8, 16, 16, 24), norm_num_groups=8),
)

INK, SKIN = "#2b2340", "#ffdcbf"
EYES = dict(blue="#3f8ff0", green="#3fb96a", brown="#8a5630", purple="#9a5be0")
WHO, MOODS = ("boy", "girl", "cat"), ("smiling", "laughing")
HAIR = dict(orange="#ff9038", black="#4a4560", pink="#ff8fb8", yellow="#ffd84d", white="#eeeef6", blue="#5aa7f2")
# A scene is a sky and, from back to front, shapes: four numbers are an ellipse (x, y, rx, ry), more are the corners of a polygon.
# Unit: 1/100 of the shorter side; x counts from the middle, y up from the lower edge.
SCENES = {
    "a green hill": (
        "#a9e2ff",
        ("#fff3a0", -34, 84, 10, 10),
        ("#8fd66a", 40, 0, 70, 44),
        ("#63bd58", -40, -12, 80, 40),
    ),
    "the sea": (
        "#c9f0ff",
        ("#ffffff", 40, 84, 18, 7),
        ("#3fa3e0", -80, -9, -80, 44, 80, 44, 80, -9),
        ("#ffe2a0", -10, -20, 90, 36),
    ),
    "a sunset": ("#ffb36b", ("#ff6b5e", 28, 62, 26, 26), ("#9a5a8c", -46, 8, 60, 38), ("#6f4480", 50, -4, 60, 34)),
    "a snowy mountain": (
        "#d6ecff",
        ("#8fa3cf", -80, 0, -28, 98, 34, 0),
        ("#ffffff", -41, 76, -28, 98, -13, 76, -27, 68),
        ("#eef6ff", 0, -30, 100, 58),
    ),
    "a pink garden": (
        "#ffe6ef",
        ("#ffb0cc", -44, 82, 24, 18),
        ("#ffb0cc", 46, 74, 22, 17),
        ("#a5dc8c", 0, -26, 100, 56),
    ),
}


def tokenizers(texts: Iterable[str]):
    """(tokenizer, tokenizer_2) with a byte-level vocabulary in CLIP's order: bytes, bytes that end a word, merges, start, end.

    Every word of `texts` becomes one token; other text costs about one a letter. As SDXL's, they pad with end-of-text and "!" (id 0).
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = merges_of(sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())}))
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return tuple(
        CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=77) for pad in ("<|endoftext|>", "!")
    )


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word: the most frequent pair first, of equals the first in the alphabet.

    The trainer of `tokenizers` leaves the order of equals to chance: embeddings trained in one process would be of no use in the next.
    """
    merges, pieces = [], [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for word in pieces:
            for at in reversed([i for i, pair in enumerate(zip(word, word[1:])) if pair == merges[-1]]):
                word[at : at + 2] = ["".join(word[at : at + 2])]
    return merges


def sdxl(widths: dict[str, dict], texts: Iterable[str], device: str):
    """StableDiffusionXLPipeline with SDXL's topology and untrained fp32 weights, made on `device` ("meta": shapes only).

    `widths` holds the open config values of unet, text_encoder, text_encoder_2 and vae; see `tokenizers` for `texts`.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = tokenizers(texts)
    # pooling looks for the config's eos_token_id, so it has to be the tokenizer's own
    ids = dict(vocab_size=len(first), bos_token_id=first.bos_token_id, eos_token_id=first.eos_token_id)
    with torch.device(device):
        parts = dict(
            unet=UNet2DConditionModel(**UNET, **widths["unet"]),
            vae=AutoencoderKL(**VAE, **widths["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**ids | widths["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**ids | widths["text_encoder_2"])),
        )
    return StableDiffusionXLPipeline(
        **parts, tokenizer=first, tokenizer_2=second, scheduler=EulerDiscreteScheduler(**SCHEDULER)
    )


def build_model(folder: Path) -> None:
    """Writes a tiny random SDXL as a diffusers folder (fp32 safetensors, the same weights every time)."""
    import torch

    from common.device import quieten_libraries

    quieten_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = [*WHO, *MOODS, *EYES, *HAIR, *SCENES, "with eyes and hair fur dressed in front of", "Naruto style"]
        sdxl(TINY, words, "cpu").save_pretrained(folder)


class Ink:
    """A picture of flat colours in dark outlines; drawn enlarged and then shrunk, because Pillow's shapes have hard edges."""

    def __init__(self, width_px: int, height_px: int, sky: str):
        self.size, enlarged = (width_px, height_px), 4 if min(width_px, height_px) < 512 else 2
        self.image = Image.new("RGB", (width_px * enlarged, height_px * enlarged), sky)
        self.draw, self.unit = ImageDraw.Draw(self.image), min(self.image.size) / 100

    def pixels(self, numbers) -> list[float]:
        """x, y, x, y, ... in scene units -> pixels of the enlarged picture."""
        return [
            self.image.width / 2 + n * self.unit if i % 2 == 0 else self.image.height - n * self.unit
            for i, n in enumerate(numbers)
        ]

    def shape(self, fill: str, *numbers: float, line: float = 1.6) -> None:
        """An ellipse (x, y, rx, ry) or a polygon (x, y, x, y, x, y, ...) with an outline."""
        if len(numbers) == 4:
            x, y, rx, ry = numbers
            self.draw.ellipse(
                self.pixels((x - rx, y + ry, x + rx, y - ry)), fill, INK if line else None, round(line * self.unit)
            )
        else:
            self.draw.polygon(self.pixels(numbers), fill)
            if line:
                self.stroke(*numbers, *numbers[:4], line=line)

    def stroke(self, *numbers: float, line: float = 1.6) -> None:
        self.draw.line(self.pixels(numbers), INK, round(line * self.unit), joint="curve")


def spikes(x: float, y: float, inner: float, outer: float, count: int, start: int, end: int) -> list[float]:
    """Corners of a fan of `count` points between two angles (degrees, counter-clockwise from three o'clock)."""
    angles = [math.radians(start + (end - start) * i / (2 * count)) for i in range(2 * count + 1)]
    return [
        n
        for i, a in enumerate(angles)
        for r in [outer if i % 2 else inner]
        for n in (x + r * math.cos(a), y + r * math.sin(a))
    ]


def draw_head(ink: Ink, who: str, hair: str) -> None:
    """Head, and hair or ears, around (0, 44)."""
    if who == "cat":
        for side in (-1, 1):
            ink.shape(hair, side * 25, 50, side * 23, 86, side * 5, 66)
            ink.shape("#ffb3b8", side * 21, 60, side * 20.5, 76, side * 12, 66, line=0)
    elif who == "girl":
        ink.shape(hair, 0, 44, 33, 36)
        ink.shape(hair, -33, 44, -37, 8, -18, 12, 18, 12, 37, 8, 33, 44)
        ink.shape(hair, 0, 44, 31.5, 34.5, line=0)
    else:
        ink.shape(hair, *spikes(0, 47, 28, 41, 9, -15, 195))
    ink.shape(hair if who == "cat" else SKIN, 0, 44, 26, 24)
    if who != "cat":
        fringe = (-26, 46, -19, 50, -13, 59, -4, 51, 3, 60, 10, 51, 17, 57, 26, 46)
        ink.shape(hair, *fringe, 27, 62, 14, 72, -14, 72, -27, 62, line=0)
        ink.stroke(*fringe)


def draw_face(ink: Ink, who: str, mood: str, eyes: str) -> None:
    for side in (-1, 1):
        ink.shape("#ff9d9d", side * 18, 31, 4, 2.4, line=0)
        ink.shape(eyes, side * 11, 40, 6.4, 7.8)
        ink.shape(INK, side * 11, 39, 2.2, 3.6, line=0)
        ink.shape("#ffffff", side * 11 - 2, 43, 2, 2.4, line=0)
    if mood == "laughing":
        ink.shape("#d8505a", -7, 31, 7, 31, 5, 25, 0, 23, -5, 25)
    else:
        ink.stroke(-6, 29, -4, 27, -1.5, 26, 1.5, 26, 4, 27, 6, 29, line=2)
    if who == "cat":
        ink.shape("#ff8f9a", -2.5, 35, 2.5, 35, 0, 32, line=1)


def draw_character(rng: random.Random, width_px: int, height_px: int) -> tuple[Image.Image, str]:
    """One picture and its caption; every attribute is chosen independently of the others."""
    who, mood, eyes, hair, clothes, scene = (
        rng.choice(list(choices)) for choices in (WHO, MOODS, EYES, HAIR, HAIR, SCENES)
    )
    sky, *shapes = SCENES[scene]
    ink = Ink(width_px, height_px, sky)
    for fill, *numbers in shapes:
        ink.shape(fill, *numbers, line=1)
    ink.shape(HAIR[clothes], -32, -9, -28, 14, -12, 22, 12, 22, 28, 14, 32, -9)
    draw_head(ink, who, HAIR[hair])
    draw_face(ink, who, mood, EYES[eyes])
    text = f"a {mood} {who} with {eyes} eyes and {hair} {'fur' if who == 'cat' else 'hair'}, dressed in {clothes}, in front of {scene}"
    return ink.image.resize(ink.size, Image.Resampling.LANCZOS), text


def build_images(folder: Path, count: int = 24) -> None:
    """Writes `count` PNGs of three shapes and metadata.jsonl (file_name, text); the same ones every time."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(count):
            image, text = draw_character(rng, *rng.choice([(96, 96), (128, 96), (96, 128)]))
            image.save(folder / f"{i:03d}.png")
            metadata.write(json.dumps({"file_name": f"{i:03d}.png", "text": text}) + "\n")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built if absent. It appears complete or not at all; of two processes that build at once the first one wins."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
            build(Path(scratch) / folder.name)
            try:
                os.replace(Path(scratch) / folder.name, folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def demo_assets(root: Path) -> tuple[Path, Path]:
    """(model folder, image folder) of the demo; the first call builds those of the tiny one."""
    settings = demo_settings(root)
    model, data = Path(settings["pretrained_model_name_or_path"]), Path(settings["train_data_dir"][0])
    return build_once(model, build_model), build_once(data, build_images)
