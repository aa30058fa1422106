"""Upright, in sRGB: size and pixels agree whatever a file says of its orientation, and colours are those that are meant."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import black_ink_profile, icc_profile, picture, sample_of, sized
from PIL import Image, ImageCms

from common.data import dataset, decoding
from common.data.framing import frame, pixels, time_ids
from common.errors import UserError

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
SIX = Image.Exif()
SIX[0x0112] = 6


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- orientation


def png_with(kind, data, behind_pixels):
    """A PNG of the stored picture with one more chunk, before or after the pixels."""
    png = encoded(STORED, "PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    place = png.index(b"IEND" if behind_pixels else b"IDAT") - 4
    return png[:place] + chunk + png[place:]


def jpeg_with(*entries):
    """A JPEG of the stored picture whose EXIF has these raw entries."""
    body = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    jpeg = encoded(STORED, "JPEG", quality=95)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


UPRIGHT = picture((64, 96))
STORED = UPRIGHT.transpose(Image.Transpose.ROTATE_90)  # orientation 6 undoes it
RAW = SIX.tobytes()
PROFILE_TEXT = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(RAW), RAW.hex().encode())
ORIENTATION_6 = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
TURNED = {
    "jpeg xmp": lambda: encoded(STORED, "JPEG", xmp=XMP, quality=95),
    "webp": lambda: encoded(STORED, "WEBP", exif=SIX, lossless=True),
    "tiff": lambda: encoded(STORED, "TIFF", exif=SIX),
    "tiff xmp": lambda: encoded(STORED, "TIFF", tiffinfo={700: XMP}),
    "png eXIf behind the pixels": lambda: png_with(b"eXIf", RAW[6:], True),
    "png raw profile": lambda: png_with(b"tEXt", PROFILE_TEXT, False),
    "png raw profile behind the pixels": lambda: png_with(b"tEXt", PROFILE_TEXT, True),
    "png xmp": lambda: png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP, False),
    "png xmp behind the pixels": lambda: png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP, True),
    "jpeg with a float for a whole number": lambda: jpeg_with(ORIENTATION_6, struct.pack(">HHIf", 0x0101, 11, 1, 1.5)),
}
AS_STORED = {
    "an orientation that is text": lambda: jpeg_with(struct.pack(">HHI4s", 0x0112, 2, 2, b"6\0\0\0")),
    "an orientation of 9": lambda: jpeg_with(struct.pack(">HHIHH", 0x0112, 3, 1, 9, 0)),
    "exif that is none": lambda: png_with(b"tEXt", b"Raw profile type exif\0none", False),
    "the same behind the pixels": lambda: png_with(b"tEXt", b"Raw profile type exif\0none", True),
}


@pytest.mark.parametrize("kind", [*TURNED, *AS_STORED])
def test_exif_of_any_kind_leaves_size_and_pixels_in_agreement(kind):
    data, expected = (TURNED[kind](), UPRIGHT) if kind in TURNED else (AS_STORED[kind](), STORED)
    measured, image = decoding.measure(data), decoding.decode(data)
    assert measured[:2] == image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 2  # JPEG is not exact


def test_whatever_pillow_raises_is_that_pictures_fault(tmp_path, monkeypatch):
    for name in ("a", "b"):
        picture((40, 30), seed=ord(name)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    measure, broken = decoding.measure, (tmp_path / "a.png").read_bytes()

    def fails(data, error):
        if data == broken:
            raise error
        return measure(data)

    columns = dict(image_column="image", caption_column="text")
    for error in (RuntimeError("decoder\ngave up"), struct.error("4 bytes"), AssertionError()):
        monkeypatch.setattr(decoding, "measure", lambda data, error=error: fails(data, error))
        samples, bad = dataset.load_samples(None, [str(tmp_path)], **columns, max_bad=1)
        assert [sample.caption for sample in samples] == ["b"] and bad == 1
        with pytest.raises(UserError, match=r"a\.png .*--max_bad_images 1"):
            dataset.load_samples(None, [str(tmp_path)], **columns)
    monkeypatch.setattr(decoding, "measure", lambda data: fails(data, MemoryError()))
    with pytest.raises(MemoryError):
        dataset.load_samples(None, [str(tmp_path)], **columns, max_bad=1)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_named_like_a_picture_is_a_bad_picture(tmp_path, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / "a.png")
    else:
        (tmp_path / "a.png").symlink_to("/dev/zero")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is not a regular file"):
        dataset.load_samples(None, [str(tmp_path)], image_column="image", caption_column="text")


# ---------------------------------------------------------------- colour

# Columns: red, green and blue in XYZ, adapted to D50.
SRGB = np.array([(0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410)])
ADOBE = np.array([(0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)])


def stored_as(colour, primaries, gamma):
    """An sRGB colour as bytes of another space (IEC 61966-2-1's curve; a matrix; a power)."""
    share = np.array(colour) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return tuple(
        round(255 * value) for value in np.clip(np.linalg.solve(primaries, SRGB @ linear), 0, 1) ** (1 / gamma)
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize(
    ("primaries", "gamma", "colour"),
    [(ADOBE, 563 / 256, (0, 200, 60)), (SRGB, 1.0, (120, 90, 60)), (ADOBE, 1.0, (200, 10, 90))],
)
def test_a_colour_profile_is_converted_to_srgb(primaries, gamma, colour, mode):
    stored = stored_as(colour, primaries, gamma)
    assert np.abs(np.subtract(stored, colour)).max() > 10  # else nothing would have to be converted
    image = Image.new("RGB", (8, 8), stored)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    data = encoded(image, "PNG", icc_profile=icc_profile(primaries.T, gamma))
    assert decoding.measure(data).profile_is_usable
    assert np.abs(np.asarray(decoding.decode(data)).astype(int) - colour).max() <= 3


def test_a_grey_profile_is_converted_too():
    """Linear light of 0.2 is 123.5 of 255 in sRGB."""
    data = encoded(Image.new("L", (8, 8), 51), "PNG", icc_profile=icc_profile(None, 1.0))
    assert decoding.measure(data).profile_is_usable
    assert np.abs(np.asarray(decoding.decode(data)) - 123.5).max() <= 2


def test_a_profile_of_inks_is_converted_too():
    """Half of the black ink is L* 50, 119 of 255 in sRGB, and this printer's cyan is invisible; without the profile it is cyan."""
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 128))
    data = encoded(image, "TIFF", icc_profile=black_ink_profile())
    assert decoding.measure(data).profile_is_usable
    assert np.abs(np.asarray(decoding.decode(data)).astype(int) - 119).max() <= 2


def test_lab_is_read_without_a_profile():
    """L* of 50.2 without colour is 119 in sRGB."""
    image = decoding.decode(encoded(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"))
    assert np.abs(np.asarray(image).astype(int) - 119).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profile_that_says_srgb_changes_no_bit(mode):
    image = picture((64, 48), mode=mode)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(image, "PNG", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(decoding.decode(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["broken", "of other colours"])
def test_a_profile_that_cannot_be_used_is_counted_and_the_picture_taken_as_srgb(tmp_path, kind):
    image = picture((64, 48), mode="RGB" if kind == "broken" else "CMYK")
    profile = b"no profile" * 20 if kind == "broken" else icc_profile(ADOBE.T, 2.2)
    image.save(tmp_path / "a.tif", icc_profile=profile)
    (tmp_path / "a.txt").write_text("x")
    said = []
    samples, bad = dataset.load_samples(
        None, [str(tmp_path)], image_column="image", caption_column="text", say=said.append
    )
    assert bad == 0 and len(said) == 1 and "taken as sRGB" in said[0] and f"1 ({tmp_path / 'a.tif'})" in said[0]
    np.testing.assert_array_equal(np.asarray(decoding.decode(samples[0].read())), np.asarray(image.convert("RGB")))


# ---------------------------------------------------------------- thin pictures


def test_a_thin_picture_is_never_resized_whole(monkeypatch):
    """1 x 1000 at 1024 px would be 1024 x 1,024,000: 4 GB."""
    sample = sample_of(Image.new("RGB", (1, 1000), (10, 200, 30)))
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest, **more: sizes.append(size) or resize(self, size, *rest, **more)
    )
    result = pixels(sample, frame(sample, 1024))
    assert sizes == [(1024, 1024)] and result.shape == (3, 1024, 1024)
    assert (result - torch.tensor([10, 200, 30]).view(3, 1, 1) / 127.5 + 1).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"center_crop": False}])
@pytest.mark.parametrize("size", [(16, 500), (500, 16)])
def test_a_thin_pictures_crop_is_what_resizing_all_of_it_gives(size, options):
    image = picture(size)
    sample = sample_of(image)
    framing = frame(sample, 64, **options)
    box = (framing.left, framing.top, framing.left + 64, framing.top + 64)
    expected = np.asarray(image.resize(framing.resized, Image.Resampling.LANCZOS).crop(box)).astype(int)
    result = (pixels(sample, framing).numpy().transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(result - expected).max() <= 1.01


def test_the_conditioning_of_a_thin_picture_is_finite_in_fp16():
    """Its crop begins 511,488 pixels down, and fp16 ends at 65,504: an inf would make the loss NaN."""
    sample = sized(1, 1000)
    assert time_ids(sample, frame(sample, 1024)).half().isfinite().all()
