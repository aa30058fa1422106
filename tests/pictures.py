"""Pictures and samples of them, for tests of what becomes of pixels and sizes."""

import io
import struct

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


def icc_profile(primaries, gamma):
    """A minimal ICC profile of a display: rows of D50-adapted XYZ for red, green and blue, one gamma; None for one of grey."""
    number = lambda value: struct.pack(">i", round(value * 65536))  # noqa: E731
    xyz = lambda row: b"XYZ \0\0\0\0" + b"".join(map(number, row))  # noqa: E731
    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(white)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz(primaries[0]), b"gXYZ": xyz(primaries[1]), b"bXYZ": xyz(primaries[2])}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)

    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    colours = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I4x4s4s4s4s12x4s28x", start + len(body), b"\2\x10\0\0", b"mntr", colours, b"XYZ ", b"acsp")
    return head + b"".join(map(number, white)) + bytes(128 - 80) + table + body
