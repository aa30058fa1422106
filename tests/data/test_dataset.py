"""Data: every source gives the same samples, bad files are named, and what is held out is never trained on."""

import csv
import json
import shutil

import pytest
from pictures import picture, sized
from PIL import ImageFile, WebPImagePlugin

from common.data import dataset
from common.data.dataset import load_samples
from common.errors import UserError

CAPTIONS = {"a.png": "a red house", "b.jpg": "a blue cat, sleeping", "sub/c.webp": "Ünïcode: 日本"}
SIZES = {"a.png": (40, 30), "b.jpg": (33, 64), "sub/c.webp": (50, 50)}


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
    columns = dict(image_column="image", caption_column=caption_column)
    return load_samples("unused", [str(folder)], **columns, max_samples=max_samples, max_bad=max_bad)


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
    assert (
        str(folder / metadata) in message
        and "'text'" in message
        and "label" in message
        and "--caption_column" in message
    )


def test_a_line_that_is_not_json_is_named(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": oops}\n')
    message = refusal(folder)
    assert str(folder / "metadata.jsonl") in message and "line 2" in message


@pytest.mark.parametrize(
    "line",
    ['["a.png", "x"]', '"a.png"', "5", "null", '{"file_name": "a.png", "text": 5}', '{"file_name": 5, "text": "x"}'],
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


# ---------------------------------------------------------------- held out


def test_held_out_samples_are_a_fixed_share_by_content_and_never_trained_on():
    samples = [sized(64, 64, f"{i:032x}") for i in range(40)]
    training, held_out = dataset.hold_out(samples, 0.25)
    assert len(held_out) == 10 and len(training) == 30
    assert {s.key for s in training} | {s.key for s in held_out} == {s.key for s in samples}
    assert {s.key for s in dataset.hold_out(samples[::-1], 0.25)[1]} == {
        s.key for s in held_out
    }  # whatever the order of the files
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
