"""A Sample -> Framing (how its picture is resized and cropped) -> time_ids, which SDXL is told, and pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from common.data import decoding
from common.data.dataset import Sample

BUCKET_RATIO = 2.0  # widest and tallest bucket
THIN = 8  # a resized picture with more than this many times the area of its crop is cropped first
LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a training square or bucket: resize to cover, then crop. All in pixels."""

    resized: tuple[int, int]  # (width, height)
    left: int
    top: int
    width: int
    height: int


def buckets(resolution: int) -> list[tuple[int, int]]:
    """[(width, height)] between 1:2 and 2:1, sides a multiple of a step, area at most resolution^2.

    SDXL, arXiv 2307.01952, app. I.
    """
    step = 64 if resolution >= 512 else 16
    sides = range(resolution // step * step, int(resolution * BUCKET_RATIO), step)
    wide = [(width, resolution**2 // width // step * step) for width in sides]
    wide = [(w, h) for w, h in wide if h and 1 <= w / h <= BUCKET_RATIO] + [(resolution, resolution)]
    return sorted({*wide, *((h, w) for w, h in wide)})


def frame(sample: Sample, resolution: int, *, center_crop: bool = True, aspect_ratio_buckets: bool = False) -> Framing:
    """Choose the Framing of a sample. A random crop is drawn from the image's content: it is the same in every run."""
    # what is left of the picture
    width = height = resolution
    if aspect_ratio_buckets:
        ratio = sample.width / sample.height
        width, height = min(buckets(resolution), key=lambda bucket: abs(np.log(bucket[0] / bucket[1] / ratio)))

    # resized to cover that
    scale = max(width / sample.width, height / sample.height)
    resized = max(width, round(sample.width * scale)), max(height, round(sample.height * scale))

    # where the crop lies in it
    spare_x = resized[0] - width
    spare_y = resized[1] - height
    across, down = (0.5, 0.5) if center_crop else np.random.default_rng(int(sample.key, 16)).random(2)
    left = round(spare_x * across)
    return Framing(resized, left=left, top=round(spare_y * down), width=width, height=height)


def time_ids(sample: Sample, framing: Framing, flip: bool = False) -> torch.Tensor:
    """SDXL's micro-conditioning: (original height, width, crop top, left, target height, width) in pixels, [6].

    Original size is the file's; the crop is counted in the resized picture, from the edge that is left after a flip.
    The crop of a line of pixels can lie beyond what fp16 holds, and counts as its largest number then.
    """
    left = framing.resized[0] - framing.left - framing.width if flip else framing.left
    ids = [sample.height, sample.width, framing.top, left, framing.height, framing.width]
    return torch.tensor(ids, dtype=torch.float32).clamp(max=LARGEST_FP16)


def pixels(sample: Sample, framing: Framing, flip: bool = False) -> torch.Tensor:
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
    right = framing.left + framing.width
    bottom = framing.top + framing.height
    if framing.resized[0] * framing.resized[1] <= THIN * framing.width * framing.height:
        resized = image.resize(framing.resized, Image.Resampling.LANCZOS)
        return resized.crop((framing.left, framing.top, right, bottom))

    # The same crop, in the coordinates of the picture as it is.
    across = image.width / framing.resized[0]
    down = image.height / framing.resized[1]
    end = min(right * across, image.width), min(bottom * down, image.height)
    box = (framing.left * across, framing.top * down, *end)
    return image.resize((framing.width, framing.height), Image.Resampling.LANCZOS, box=box)
