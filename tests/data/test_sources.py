"""Folders: what is read, how often, and that whatever is left out or taken in unmeant is counted and named."""

import json
import shutil

import pytest
from pictures import picture

from common.cli.flag_checks import find_data_dir
from common.data.captions import CaptionOptions, summary
from common.data.dataset import load_samples
from common.errors import UserError


def put(folder, *names, caption="a caption"):
    """Pictures, every one different, with a .txt beside each unless `caption` is None."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((24, 16), seed=len(str(path)) + sum(str(path).encode())).save(path, "PNG")
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)


def read(*folders, **options):
    """([name below the first folder], repeats of each, lines that were said)."""
    said = []
    columns = dict(image_column="image", caption_column="text")
    samples, _ = load_samples(None, [str(folder) for folder in folders], **columns, say=said.append, **options)
    return [sample.name.rpartition("/")[2] for sample in samples], [sample.repeats for sample in samples], said


# ---------------------------------------------------------------- kinds of files


def test_every_name_of_a_picture_that_pillow_reads_is_read(tmp_path):
    names = ["a.jfif", "b.jpe", "c.avif", "d.jp2", "e.JPG", "f.apng"]
    put(tmp_path, *names)
    assert read(tmp_path) == (names, [1] * 6, [])


def test_kinds_that_cannot_be_read_are_counted_and_the_first_named(tmp_path):
    put(tmp_path, "a.png")
    for i in range(5):
        (tmp_path / f"photo{i}.heic").write_bytes(b"of a phone")
    names, _, (said,) = read(tmp_path)
    assert names == ["a.png"]
    assert "5 (photo0.heic, photo1.heic, photo2.heic and 2 more)" in said and "convert them to PNG" in said


def test_pictures_that_no_row_names_are_counted_and_named(tmp_path):
    put(tmp_path, "a.png", "b.png", "sub/c.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "./sub/../b.png", "text": "x"}))
    names, _, (said,) = read(tmp_path)
    assert names == ["b.png"] and "not named in metadata.jsonl: 2 (a.png, sub/c.png)" in said


def test_of_two_metadata_files_the_one_that_is_not_read_is_named(tmp_path):
    put(tmp_path, "a.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,y\n")
    names, _, (said,) = read(tmp_path)
    assert names == ["a.png"] and "metadata.csv is left out, metadata.jsonl beside it is read" in said


def test_pictures_without_a_caption_are_named_in_the_summary(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "a_mask.png", "training.png", caption=None)
    samples, _ = load_samples(None, [str(tmp_path)], image_column="image", caption_column="text")
    line = summary(samples, 0, CaptionOptions())
    assert "3 images, 0 unreadable, 2 with an empty caption (trained as the empty prompt)" in line
    assert f"{tmp_path / 'a_mask.png'}, {tmp_path / 'training.png'}" in line
    assert "(trained as the caption 'inkstyle')" in summary(samples, 0, CaptionOptions(trigger_word="inkstyle"))


@pytest.mark.parametrize("files", [("config.json", "metrics.jsonl"), ("manifest.json", "compare.png")])
def test_what_an_earlier_run_has_drawn_is_left_out_by_name(tmp_path, files):
    put(tmp_path, "a.png")
    put(tmp_path, "out/samples/000012_0.png", "out/training.png", caption=None)
    for name in files:
        (tmp_path / "out" / name).write_bytes(b"{}")
    names, _, (said,) = read(tmp_path)
    assert names == ["a.png"] and "output of an earlier run" in said and "out/samples/000012_0.png" in said


# ---------------------------------------------------------------- repeats and weights


def test_repeats_are_those_of_the_folders_names_and_regularisation_is_left_out_with_a_reason(tmp_path):
    put(tmp_path, "10_ink style/a.png", "1_more/b.png", "2_reg/c.png", "reg/d.png", "other/e.png")
    names, repeats, (left_out, repeated) = read(tmp_path)
    assert dict(zip(names, repeats)) == {"a.png": 10, "b.png": 1, "e.png": 1}
    assert "2_reg/c.png, reg/d.png" in left_out and "prior loss" in left_out
    assert "10_ink style (images: 1), 1_more (images: 1)" in repeated


@pytest.mark.parametrize("name", ["2024_summer", "0_none"])
def test_a_year_is_no_number_of_repeats(tmp_path, name):
    put(tmp_path, f"{name}/a.png")
    with pytest.raises(UserError, match=rf"{name} would mean \d+ repeats .*rename it, e\.g\. 1_{name}"):
        read(tmp_path)


def test_several_folders_are_read_one_after_the_other_and_weights_multiply_repeats(tmp_path):
    put(tmp_path, "one/b.png", "two/3_x/a.png", "two/c.png", "odd:2/d.png")
    names, repeats, _ = read(tmp_path / "one", f"{tmp_path / 'two'}:2", tmp_path / "odd:2", f"{tmp_path / 'odd:2'}:4")
    assert names == ["b.png", "a.png", "c.png", "d.png", "d.png"] and repeats == [1, 6, 2, 1, 4]


@pytest.mark.parametrize("weight", ["0", "0.5", "-1", "x", ""])
def test_a_weight_that_is_no_whole_number_is_refused(tmp_path, weight):
    with pytest.raises(UserError, match="whole number from 1"):
        find_data_dir(f"{tmp_path}:{weight}")


def test_an_epoch_shows_every_picture_as_often_as_it_is_repeated_and_encodes_it_once(assemble, demo, tmp_path):
    repeats = {"4_a": 8, "1_b": 2, "c": 2}
    for path, folder in zip(sorted(demo.data.glob("*.png")), repeats):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder / f"{folder}.png")
        (tmp_path / folder / f"{folder}.txt").write_text(folder)
    examples = assemble(
        "--train_data_dir", f"{tmp_path}:2", "--num_train_epochs", 2, "--max_train_steps", "none"
    ).data.examples
    assert len(examples.latents) == 3 and len(examples) == 12
    for epoch in range(2):
        names = [examples.name_at(epoch * 12 + i).rpartition("/")[2].removesuffix(".png") for i in range(12)]
        assert {name: names.count(name) for name in names} == repeats
