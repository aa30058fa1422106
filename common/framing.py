"""A sample's size -> how its picture is cut, and what SDXL is told about it; and the cut picture -> pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from common import decoding

BUCKET_RATIO = 2.0  # widest and tallest bucket
THIN = 8  # a resized picture with more than this many times the area of its crop is cropped first
LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a training square or bucket: resize to cover, then crop. All in pixels."""

    resized: tuple  # (width, height)
    left: int
    top: int
    width: int
    height: int


def buckets(resolution):
    """[(width, height)] between 1:2 and 2:1, sides a multiple of a step, area at most resolution^2.

    SDXL, arXiv 2307.01952, app. I.
    """
    step = 64 if resolution >= 512 else 16
    sides = range(resolution // step * step, int(resolution * BUCKET_RATIO), step)
    wide = [(width, resolution**2 // width // step * step) for width in sides]
    wide = [(w, h) for w, h in wide if h and 1 <= w / h <= BUCKET_RATIO] + [(resolution, resolution)]
    return sorted({*wide, *((h, w) for w, h in wide)})


def frame(sample, resolution, center_crop=True, aspect_ratio_buckets=False):
    """Choose the Framing of a sample. A random crop is drawn from the image's content: it is the same in every run."""
    width, height = resolution, resolution
    if aspect_ratio_buckets:
        ratio = sample.width / sample.height
        width, height = min(buckets(resolution), key=lambda bucket: abs(np.log(bucket[0] / bucket[1] / ratio)))
    scale = max(width / sample.width, height / sample.height)
    resized = max(width, round(sample.width * scale)), max(height, round(sample.height * scale))
    spare_x, spare_y = resized[0] - width, resized[1] - height
    across, down = (0.5, 0.5) if center_crop else np.random.default_rng(int(sample.key, 16)).random(2)
    return Framing(resized, round(spare_x * across), round(spare_y * down), width, height)


def time_ids(sample, framing, flip=False):
    """SDXL's micro-conditioning: (original height, width, crop top, left, target height, width) in pixels, [6].

    Original size is the file's; the crop is counted in the resized picture, from the edge that is left after a flip.
    The crop of a line of pixels can lie beyond what fp16 holds, and counts as its largest number then.
    """
    left = framing.resized[0] - framing.left - framing.width if flip else framing.left
    ids = [sample.height, sample.width, framing.top, left, framing.height, framing.width]
    return torch.tensor(ids, dtype=torch.float32).clamp(max=LARGEST_FP16)


def pixels(sample, framing, flip=False):
    """Decode, turn upright, resize, crop, flip -> fp32 [3, H, W] in [-1, 1].

    Raises:
        Exception: whatever Pillow raises for a file that cannot be decoded.
    """
    image = decoding.decode(sample.read())
    if image.size != (sample.width, sample.height):
        raise ValueError(f"is {image.size}, but its header says {(sample.width, sample.height)}")
    image = _cut(image, framing)
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)


def _cut(image, framing):
    """Resize and crop; a thin picture is cropped first, or a line of 1 x 1000 pixels would become 1024 x 1,024,000."""
    right, bottom = framing.left + framing.width, framing.top + framing.height
    if framing.resized[0] * framing.resized[1] <= THIN * framing.width * framing.height:
        resized = image.resize(framing.resized, Image.Resampling.LANCZOS)
        return resized.crop((framing.left, framing.top, right, bottom))
    across, down = image.width / framing.resized[0], image.height / framing.resized[1]
    end = min(right * across, image.width), min(bottom * down, image.height)
    box = (framing.left * across, framing.top * down, *end)
    return image.resize((framing.width, framing.height), Image.Resampling.LANCZOS, box=box)
