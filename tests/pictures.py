"""Pictures and samples of them, for tests of what becomes of pixels and sizes."""

import io
import struct

import numpy as np
from PIL import Image

from common.data import dataset
from common.data.dataset import Sample
from common.data.pairs import Pair


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
    return Sample("picture", key, caption="", width=width, height=height, read=None)


WHITE = (0.9642, 1.0, 0.8249)  # D50


def _number(value):
    return struct.pack(">i", round(value * 65536))


def icc_profile(primaries, gamma):
    """A minimal ICC profile of a display: rows of D50-adapted XYZ for red, green and blue, one gamma; None for one of grey."""
    xyz = lambda row: b"XYZ \0\0\0\0" + b"".join(map(_number, row))  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    if primaries is None:
        return _icc_file(b"mntrGRAYXYZ ", {b"wtpt": xyz(WHITE), b"kTRC": curve})
    colours = {b"rXYZ": xyz(primaries[0]), b"gXYZ": xyz(primaries[1]), b"bXYZ": xyz(primaries[2])}
    return _icc_file(
        b"mntrRGB XYZ ", {b"wtpt": xyz(WHITE), **colours, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)}
    )


def black_ink_profile():
    """An ICC profile of a printer whose cyan, magenta and yellow are invisible: L* falls linearly with the black ink."""
    ramp = bytes(range(256))
    identity = b"".join(map(_number, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    corners = b"".join(
        bytes((0 if k else 255, 128, 128)) for _ in range(8) for k in (0, 1)
    )  # L*, a*, b*; black varies fastest
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + 4 * ramp + corners + 3 * ramp
    return _icc_file(b"prtrCMYKLab ", {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(_number, WHITE)), b"A2B0": table})


def _icc_file(kind, tags):
    """A version 2 profile; `kind` is device class, colour space and connection space."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        **tags,
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4x4s12s12x4s28x", start + len(body), b"\2\x10\0\0", kind, b"acsp")
    return head + b"".join(map(_number, WHITE)) + bytes(128 - 80) + table + body
