"""Pictures and samples of them, for tests of what becomes of pixels and sizes."""

import io

import numpy as np
from PIL import Image

from common import dataset
from common.dataset import Sample
from common.pairs import Pair


def picture(size, seed=0, mode="RGB"):
    """Smooth colours with a direction, so that a wrong turn, mirror or crop shows."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 5 * y + seed))], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def sample_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return dataset._measured(Pair("picture", "caption", buffer.getvalue), [])


def sized(width, height, key="ab" * 16):
    """A Sample of which only the numbers matter."""
    return Sample("picture", key, "", width, height, None)
