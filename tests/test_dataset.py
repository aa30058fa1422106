"""Data: every source gives the same samples, bad files are named, and pixels and micro-conditioning are what SDXL was trained with."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, WebPImagePlugin

from common import dataset
from common.command_line import UserError
from common.dataset import Framing, Sample, buckets, frame, load_samples, pixels, time_ids

CAPTIONS = {"a.png": "a red house", "b.jpg": "a blue cat, sleeping", "sub/c.webp": "Ünïcode: 日本"}
SIZES = {"a.png": (40, 30), "b.jpg": (33, 64), "sub/c.webp": (50, 50)}


def picture(size, seed=0, mode="RGB"):
    """Smooth colours with a direction, so that a wrong turn, mirror or crop shows."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 5 * y + seed))], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def sample_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return dataset._open_sample("picture", "caption", buffer.getvalue)


def sized(width, height, key="ab" * 16):
    """A Sample of which only the numbers matter."""
    return Sample("picture", key, "", width, height, None)


@pytest.fixture
def folder(tmp_path):
    """Three images of different formats and sizes, without captions."""
    for i, (name, size) in enumerate(SIZES.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(size, i).save(tmp_path / name)
    return tmp_path


def write_jsonl(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(folder, caption_column="text", max_samples=None, max_bad=0):
    return load_samples("unused", str(folder), "image", caption_column, max_samples, max_bad)


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        read(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- sources


def with_jsonl(folder):
    write_jsonl(folder, [{"file_name": name, "text": caption} for name, caption in CAPTIONS.items()])


def with_csv(folder):
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        writer = csv.writer(file)
        writer.writerows([("file_name", "text"), *CAPTIONS.items()])


def with_txt(folder):
    for name, caption in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


@pytest.mark.parametrize("captioned", [with_jsonl, with_csv, with_txt])
def test_every_source_gives_the_same_samples(folder, captioned):
    captioned(folder)
    samples, bad = read(folder)
    assert bad == 0
    assert [s.name for s in samples] == [str(folder / name) for name in CAPTIONS]
    assert [s.caption for s in samples] == list(CAPTIONS.values())
    assert [(s.width, s.height) for s in samples] == list(SIZES.values())
    assert [s.read() for s in samples] == [(folder / name).read_bytes() for name in CAPTIONS]


def test_another_caption_column_and_blank_lines(folder):
    (folder / "metadata.jsonl").write_text('\n{"file_name": "a.png", "prompt": " spaces around "}\n\n')
    samples, _ = read(folder, caption_column="prompt")
    assert [(s.name, s.caption) for s in samples] == [(str(folder / "a.png"), "spaces around")]


def test_a_key_is_the_content_not_the_name(folder):
    (folder / "z.png").write_bytes((folder / "a.png").read_bytes())
    write_jsonl(folder, [{"file_name": name, "text": name} for name in ("a.png", "z.png", "b.jpg")])
    a, z, b = read(folder)[0]
    assert a.key == z.key != b.key


def test_max_samples_takes_the_first(folder):
    with_jsonl(folder)
    assert [s.caption for s in read(folder, max_samples=2)[0]] == list(CAPTIONS.values())[:2]


def test_the_demo_has_two_dozen_captioned_images(demo):
    samples, bad = read(demo.data)
    assert (len(samples), bad) == (24, 0)
    assert all(s.caption for s in samples) and len({s.key for s in samples}) == 24
    assert {(s.width, s.height) for s in samples} == {(96, 96), (128, 96), (96, 128)}  # buckets have something to do


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_finding_the_samples_decodes_no_picture(tmp_path, monkeypatch, suffix):
    """Else every start of a run, with warm caches too, would decode 1,221 pictures one after the other (37 ms for a PNG of 1080 px)."""
    picture((40, 30)).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.txt").write_text("x")
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", lambda self: decoded.append(self))
    assert [(s.width, s.height) for s in read(tmp_path)[0]] == [(40, 30)]
    assert not decoded


# ---------------------------------------------------------------- captions that are not there


def test_a_folder_without_captions_is_refused_and_told_what_to_add(folder):
    message = refusal(folder)
    assert f"--train_data_dir {folder}" in message and "metadata.jsonl" in message and "a.txt" in message


def test_metadata_in_a_folder_below_is_pointed_at(folder):
    (folder / "train").mkdir()
    write_jsonl(folder / "train", [])
    assert f"there is {folder / 'train/metadata.jsonl'}: name that folder" in refusal(folder)


@pytest.mark.parametrize("litter", [".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "._a.png"])
def test_what_notebooks_and_archivers_leave_behind_is_no_data(folder, litter):
    with_txt(folder)
    before = [s.name for s in read(folder)[0]]
    (folder / litter).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "a.png", folder / litter)
    assert [s.name for s in read(folder)[0]] == before


def test_a_caption_may_hold_any_character_but_a_line_feed(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one\u2028two"}\n', encoding="utf-8")
    assert [s.caption for s in read(folder)[0]] == ["one\u2028two"]


def test_an_empty_folder_is_refused(tmp_path):
    assert f"--train_data_dir {tmp_path}" in refusal(tmp_path)


def test_a_missing_txt_an_empty_one_and_a_null_are_the_empty_caption(folder):
    (folder / "a.txt").write_text("a house")
    (folder / "b.txt").write_text(" \n")
    assert [s.caption for s in read(folder)[0]] == ["a house", "", ""]
    write_jsonl(folder, [{"file_name": "a.png", "text": None}, {"file_name": "b.jpg", "text": ""}])
    assert [s.caption for s in read(folder)[0]] == ["", ""]


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_a_metadata_file_without_the_caption_column_names_itself_and_its_columns(folder, metadata):
    text = '{"file_name": "a.png", "label": "x"}\n' if metadata.endswith("jsonl") else "file_name,label\na.png,x\n"
    (folder / metadata).write_text(text)
    message = refusal(folder)
    assert str(folder / metadata) in message and "'text'" in message and "label" in message and "--caption_column" in message


def test_a_line_that_is_not_json_is_named(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": oops}\n')
    message = refusal(folder)
    assert str(folder / "metadata.jsonl") in message and "line 2" in message


@pytest.mark.parametrize(
    "line", ['["a.png", "x"]', '"a.png"', "5", "null", '{"file_name": "a.png", "text": 5}', '{"file_name": 5, "text": "x"}']
)
def test_json_that_is_no_caption_row_is_named_in_one_line(folder, line):
    (folder / "metadata.jsonl").write_text(line + "\n")
    assert str(folder / "metadata.jsonl") in refusal(folder)


def test_an_empty_metadata_file_is_refused(folder):
    (folder / "metadata.jsonl").write_text("")
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_captions_that_are_not_utf8_are_named_in_one_line(folder, name):
    """Windows editors save Latin-1; the user has to learn which file it is."""
    (folder / name).write_bytes("file_name,text\na.png,caf\u00e9\n".encode("latin-1"))
    message = refusal(folder)
    assert str(folder / name) in message and "UTF-8" in message


# ---------------------------------------------------------------- images that are none


def test_a_text_file_named_png_is_named_and_the_flag_to_allow_it_with(folder):
    (folder / "b.jpg").write_text("not an image")
    with_jsonl(folder)
    message = refusal(folder)
    assert str(folder / "b.jpg") in message and "--max_bad_images 1" in message


def test_as_many_bad_images_as_allowed_are_skipped_by_name(folder, capsys):
    (folder / "b.jpg").write_text("not an image")
    with_jsonl(folder)
    samples, bad = read(folder, max_bad=1)
    assert bad == 1 and [s.caption for s in samples] == [CAPTIONS["a.png"], CAPTIONS["sub/c.webp"]]
    assert str(folder / "b.jpg") in capsys.readouterr().out


def test_one_more_bad_image_than_allowed_ends_it(folder):
    (folder / "b.jpg").write_text("not an image")
    (folder / "a.png").write_bytes(b"")
    with_jsonl(folder)
    message = refusal(folder, max_bad=1)
    assert "and 1 more" in message and "--max_bad_images 2" in message
    assert read(folder, max_bad=2)[1] == 2


def test_a_file_that_is_not_there_is_a_bad_image(folder):
    write_jsonl(folder, [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "y"}])
    assert str(folder / "gone.png") in refusal(folder)
    assert len(read(folder, max_bad=1)[0]) == 1


def test_nothing_but_bad_images_is_refused_however_many_are_allowed(folder):
    for name in SIZES:
        (folder / name).write_text("not an image")
    with_jsonl(folder)
    assert "none of its 3 images" in refusal(folder, max_bad=99)


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
    np.testing.assert_allclose(pixels(sample, frame(sample, 64)), reference(image.convert("RGB"), frame(sample, 64)), atol=1e-6)


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
    "options", [{}, {"center_crop": False}, {"aspect_ratio_buckets": True}, {"center_crop": False, "aspect_ratio_buckets": True}]
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


# ---------------------------------------------------------------- held out


def test_held_out_samples_are_a_fixed_share_by_content_and_never_trained_on():
    samples = [sized(64, 64, f"{i:032x}") for i in range(40)]
    training, held_out = dataset.hold_out(samples, 0.25)
    assert len(held_out) == 10 and len(training) == 30
    assert {s.key for s in training} | {s.key for s in held_out} == {s.key for s in samples}
    assert {s.key for s in dataset.hold_out(samples[::-1], 0.25)[1]} == {s.key for s in held_out}  # whatever the order of the files
    assert held_out != samples[:10] and held_out != samples[-10:]
    assert dataset.hold_out(samples, 0.0) == (samples, [])
    assert len(dataset.hold_out(samples, 0.001)[1]) == 1


def test_equal_pictures_are_held_out_together():
    samples = [sized(64, 64, f"{i % 5:032x}") for i in range(20)]
    training, held_out = dataset.hold_out(samples, 0.4)
    assert len(held_out) == 8 and not {s.key for s in training} & {s.key for s in held_out}


def test_holding_everything_out_is_refused():
    with pytest.raises(UserError, match="--validation_split 0.99"):
        dataset.hold_out([sized(64, 64)], 0.99)
