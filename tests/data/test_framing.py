"""From a picture to pixels: orientation, transparency, crops, buckets and micro-conditioning are what SDXL was trained with."""

import numpy as np
import pytest
import torch
from pictures import picture, sample_of, sized
from PIL import Image

from common.data.framing import Framing, buckets, frame, pixels, time_ids

# ---------------------------------------------------------------- pixels


def reference(image, framing, flip=False):
    """The same with nothing but Pillow and numpy: resize to cover, crop, mirror, scale to [-1, 1]."""
    resized = np.asarray(image.resize(framing.resized, Image.Resampling.LANCZOS)).astype(np.float64)
    cropped = resized[framing.top : framing.top + framing.height, framing.left : framing.left + framing.width]
    return (cropped[:, ::-1] if flip else cropped).transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(128, 96), (96, 128), (96, 96), (40, 200), (700, 512)])
@pytest.mark.parametrize("options", [{}, {"center_crop": False}, {"aspect_ratio_buckets": True}])
def test_pixels_agree_with_pillow_and_numpy(size, flip, options):
    image = picture(size)
    sample = sample_of(image)
    framing = frame(sample, 64, **options)
    result = pixels(sample, framing, flip)
    assert result.dtype == torch.float32 and result.shape == (3, framing.height, framing.width)
    np.testing.assert_allclose(result, reference(image, framing, flip), atol=1e-6)


def test_black_is_minus_one_and_white_is_one():
    for colour, value in (("black", -1.0), ("white", 1.0)):
        sample = sample_of(Image.new("RGB", (70, 64), colour))
        assert (pixels(sample, frame(sample, 64)) == value).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_picture_and_size_upright(orientation):
    """The stored pixels are what the camera saw; undoing each orientation gives the one upright picture back."""
    turn = Image.Transpose
    as_stored = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM}
    as_stored |= {5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    upright, exif = picture((96, 64)), Image.Exif()
    exif[0x0112] = orientation
    stored = upright if as_stored[orientation] is None else upright.transpose(as_stored[orientation])
    sample = sample_of(stored, exif=exif)
    assert (sample.width, sample.height) == (96, 64)
    framing = frame(sample, 64)
    np.testing.assert_allclose(pixels(sample, framing), reference(upright, framing), atol=1e-6)
    assert time_ids(sample, framing)[:2].tolist() == [64, 96]


def test_transparency_is_laid_over_white():
    image = picture((64, 64)).convert("RGBA")
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, :32] = 255
    image.putalpha(Image.fromarray(alpha))
    sample = sample_of(image)
    result = pixels(sample, frame(sample, 64))
    assert (result[:, :, 32:] == 1).all()
    np.testing.assert_allclose(result[:, :, :32], reference(picture((64, 64)), frame(sample, 64))[:, :, :32], atol=1e-6)


@pytest.mark.parametrize("kind", ["half", "palette", "grey"])
def test_other_kinds_of_transparency_too(kind):
    if kind == "half":
        image, expected = Image.new("RGBA", (64, 64), (0, 0, 0, 128)), 1 - 2 * 128 / 255
    elif kind == "palette":
        image, expected = Image.new("P", (64, 64), 3), 1.0
        image.putpalette([0] * 768)
        image.info["transparency"] = 3
    else:
        image, expected = Image.new("LA", (64, 64), (0, 0)), 1.0
    options = {"transparency": 3} if kind == "palette" else {}
    sample = sample_of(image, **options)
    assert (pixels(sample, frame(sample, 64)) - expected).abs().max() < 0.01


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    image = picture((64, 64), mode=mode)
    sample = sample_of(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_allclose(
        pixels(sample, frame(sample, 64)), reference(image.convert("RGB"), frame(sample, 64)), atol=1e-6
    )


def grey16(top):
    ramp = np.linspace(0, top, 64, dtype=np.uint16)
    return sample_of(Image.fromarray(np.tile(ramp, (64, 1))))


def test_16_bit_grey_keeps_its_gradient():
    """Pillow's own conversion clips everything above 255 to white."""
    sample = grey16(65535)
    result = pixels(sample, frame(sample, 64))
    np.testing.assert_allclose(result, np.broadcast_to(np.linspace(-1, 1, 64), (3, 64, 64)), atol=0.01)


def test_16_bit_grey_keeps_its_brightness():
    """65535 is white, so half of it is middle grey: a dark scan stays dark."""
    sample = grey16(32768)
    result = pixels(sample, frame(sample, 64))
    np.testing.assert_allclose(result, np.broadcast_to(np.linspace(-1, 0, 64), (3, 64, 64)), atol=0.01)


# ---------------------------------------------------------------- framing


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [  # resized, left, top, width, height: the shorter side becomes the resolution, the middle is kept
        ((1024, 1024), 1024, Framing((1024, 1024), 0, 0, 1024, 1024)),
        ((128, 96), 64, Framing((85, 64), 10, 0, 64, 64)),
        ((96, 128), 64, Framing((64, 85), 0, 10, 64, 64)),
        ((1920, 1080), 1024, Framing((1820, 1024), 398, 0, 1024, 1024)),
        ((300, 200), 768, Framing((1152, 768), 192, 0, 768, 768)),  # small pictures are enlarged
        ((4000, 1000), 512, Framing((2048, 512), 768, 0, 512, 512)),
    ],
)
def test_centre_crops(size, resolution, expected):
    assert frame(sized(*size), resolution) == expected


@pytest.mark.parametrize("size", [(333, 517), (517, 333), (1001, 1000), (3001, 1999), (65, 64), (1, 1), (5000, 64)])
@pytest.mark.parametrize(
    "options",
    [{}, {"center_crop": False}, {"aspect_ratio_buckets": True}, {"center_crop": False, "aspect_ratio_buckets": True}],
)
def test_a_crop_lies_inside_the_resized_picture_which_keeps_its_aspect(size, options):
    framing = frame(sized(*size), 512, **options)
    assert 0 <= framing.left <= framing.resized[0] - framing.width
    assert 0 <= framing.top <= framing.resized[1] - framing.height
    scale = max(framing.width / size[0], framing.height / size[1])
    assert abs(framing.resized[0] - size[0] * scale) <= 0.5 and abs(framing.resized[1] - size[1] * scale) <= 0.5
    assert framing.resized[0] == framing.width or framing.resized[1] == framing.height  # no more is cut than must be


def test_random_crops_come_from_the_content():
    keys = [f"{i * 7919:032x}" for i in range(60)]
    framings = [frame(sized(1200, 600, key), 512, center_crop=False) for key in keys]
    assert framings == [frame(sized(1200, 600, key), 512, center_crop=False) for key in keys]
    lefts = [framing.left for framing in framings]
    assert len(set(lefts)) > 40 and min(lefts) < 60 and max(lefts) > 450  # all over the 512 spare pixels
    assert {framing.top for framing in framings} == {0}


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
def test_buckets_have_about_the_area_and_lie_between_1_2_and_2_1(resolution):
    step = 64 if resolution >= 512 else 16
    for width, height in buckets(resolution):
        assert width % step == 0 and height % step == 0
        assert 0.5 <= width / height <= 2
        assert width * height <= resolution**2 < (width + step) * (height + step)
    assert (resolution, resolution) in buckets(resolution)


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
def test_what_is_a_bucket_is_one_upright_too(resolution):
    """SDXL's own list (arXiv 2307.01952, app. I) has 704 x 1408 as well as 1408 x 704."""
    assert {(height, width) for width, height in buckets(resolution)} == set(buckets(resolution))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (1024, 1024)),
        ((1600, 1200), (1152, 896)),
        ((1200, 1600), (896, 1152)),
        ((1920, 1080), (1344, 768)),
        ((9000, 1000), (1408, 704)),
    ],
)
def test_an_image_goes_to_the_bucket_of_its_aspect_ratio(size, bucket):
    framing = frame(sized(*size), 1024, aspect_ratio_buckets=True)
    assert (framing.width, framing.height) == bucket


# ---------------------------------------------------------------- micro-conditioning


def test_time_ids_are_original_size_crop_and_target_size():
    sample, framing = sized(1920, 1080), Framing((1820, 1024), 300, 0, 1024, 1024)
    assert time_ids(sample, framing).tolist() == [1080, 1920, 0, 300, 1024, 1024]
    bucket = frame(sized(1600, 1200), 1024, aspect_ratio_buckets=True)
    assert time_ids(sized(1600, 1200), bucket).tolist() == [1200, 1600, bucket.top, bucket.left, 896, 1152]


def test_a_flip_mirrors_the_left_crop_and_nothing_else():
    sample, framing = sized(1920, 1080), Framing((1820, 1024), 300, 0, 1024, 1024)
    assert time_ids(sample, framing, flip=True).tolist() == [1080, 1920, 0, 1820 - 300 - 1024, 1024, 1024]
    upright = Framing((1024, 1820), 0, 300, 1024, 1024)
    assert time_ids(sized(1080, 1920), upright, flip=True).tolist() == [1920, 1080, 300, 0, 1024, 1024]


def test_flipping_after_the_crop_is_cropping_the_mirror_image_at_its_time_ids():
    """So a flipped example is told the truth: it is what cropping the mirrored file at that left edge gives."""
    image = picture((150, 64))
    sample = sample_of(image)
    framing = Framing((150, 64), 20, 0, 64, 64)
    left = int(time_ids(sample, framing, flip=True)[3])
    mirrored = sample_of(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert torch.equal(pixels(sample, framing, flip=True), pixels(mirrored, Framing((150, 64), left, 0, 64, 64)))
