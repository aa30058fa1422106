"""The bytes of a picture file -> its size and its pixels: upright, in sRGB, without transparency.

Size and pixels come from the same opened file and the same orientation, so that they cannot disagree.
"""

import functools
import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 0x0112  # EXIF and TIFF
_TURN = Image.Transpose
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # colour space of a profile -> Pillow's mode
_BEHIND_PIXELS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # PNG texts that may hold an orientation


class Measured(NamedTuple):
    """What a header says. Sizes are those of the upright picture, in pixels."""

    width: int
    height: int
    profile_is_usable: bool  # True where there is none


def measure(data: bytes) -> Measured:
    """Size of a picture, from its header wherever that is enough.

    Raises:
        Exception: whatever Pillow raises for a file it cannot open.
    """
    image, orientation = _open(data)
    with image:
        width, height = image.size
        turned_by_pillow = image.format == "TIFF" and ORIENTATION in image.tag_v2  # its size is upright already
        if orientation >= 5 and not turned_by_pillow:
            width, height = height, width
        try:
            _profile_of(image)
        except ValueError:
            return Measured(width, height, False)
    return Measured(width, height, True)


def decode(data: bytes) -> Image.Image:
    """The upright picture in sRGB, transparency laid over white: mode RGB.

    A colour profile that cannot be used is taken for sRGB.

    Raises:
        Exception: whatever Pillow raises for a file it cannot decode.
    """
    image, orientation = _open(data)
    with image:
        image.load()
        turn = None if image.format == "TIFF" else _TURNS.get(orientation)  # Pillow turns TIFF while it loads
        try:
            profile = _profile_of(image)
        except ValueError:
            profile = None
        return _to_rgb(image if turn is None else image.transpose(turn), profile)


# ---------------------------------------------------------------- orientation


def _open(data):
    """(the opened image, its orientation 1 to 8); pixels are decoded only where the orientation stands behind them."""
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG" and _has_orientation_behind_pixels(data):
        image.load()
    return image, _orientation(image)


def _orientation(image):
    """EXIF's or XMP's orientation; 1, as stored, where it says nothing that has a meaning."""
    try:
        value = Image.Image.getexif(image).get(ORIENTATION, 1)  # PngImageFile's own decodes the whole picture first
    except MemoryError:
        raise
    except Exception:  # a damaged note on a sound picture: struct.error, TypeError, ValueError and more
        return 1
    return int(value) if value in range(1, 9) else 1


def _has_orientation_behind_pixels(data):
    """Whether a PNG has EXIF or XMP after its first IDAT chunk, where reading the header does not come."""
    start = 8
    after_pixels = False
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        holds_text = kind in (b"tEXt", b"zTXt", b"iTXt") and data[start + 8 : start + 40].startswith(_BEHIND_PIXELS)
        if after_pixels and (kind == b"eXIf" or holds_text):
            return True
        after_pixels = after_pixels or kind == b"IDAT"
        start += 12 + length
    return False


# ---------------------------------------------------------------- colour


def _to_rgb(image, profile):
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    with_alpha = image.convert("RGBA")
    colours = with_alpha.getchannel("R") if _family(image.mode) == "L" else with_alpha.convert("RGB")
    converted = _in_srgb(colours, profile)
    converted.putalpha(with_alpha.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), converted).convert("RGB")


def _eight_bits(image):
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    white = 1.0 if image.mode == "F" else 65535.0  # Pillow's own conversion of 16-bit grey clips it to white
    return Image.fromarray((np.asarray(image, dtype=np.float32) / white * 255).clip(0, 255).astype(np.uint8))


def _in_srgb(image, profile):
    """An image without transparency, mode 1, L, P, RGB, CMYK, LAB ... -> RGB."""
    mode, transform = profile or (None, None)
    if image.mode == "LAB" and transform is None:
        lab = ImageCms.createProfile("LAB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image.convert(mode), transform)


def _family(mode):
    """The kind of colours that an image of Pillow's `mode` holds: L, RGB, CMYK or LAB."""
    if mode in ("CMYK", "LAB"):
        return mode
    return "L" if mode[0] in "1LIF" else "RGB"


def _profile_of(image):
    """(mode, transform) of an image's colour profile, see `_transform`; None where it has none.

    Raises:
        ValueError: the profile is damaged, or one for other colours than the image's.
    """
    profile = image.info.get("icc_profile")
    return _transform(profile, _family(image.mode)) if profile else None


@functools.lru_cache(maxsize=64)
def _transform(profile, family):
    """(mode the image must have, transform to sRGB); the transform is None for a profile that says sRGB anyway."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
        if mode != family and (family, mode) != ("L", "RGB"):  # grey pictures may carry the profile of a display
            raise ValueError(f"a profile of {source.profile.xcolor_space.strip()} colours in a picture of {family}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"the colour profile cannot be used ({error})") from None
    return mode, None if _changes_nothing(transform, mode) else transform


def _changes_nothing(transform, mode):
    """Whether a transform moves no colour of a 9 x 9 x 9 lattice by more than 1 of 255, which is rounding."""
    if mode not in ("RGB", "L"):
        return False
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    colours = Image.fromarray(lattice).convert(mode)
    moved = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int) - np.asarray(colours.convert("RGB"))
    return np.abs(moved).max() <= 1
