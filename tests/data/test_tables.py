"""Data sets of `datasets`: from the hub, from save_to_disk, from parquet and arrow files, the same samples; odd columns in one line."""

import io
import shutil

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pictures import picture

from common.data import dataset
from common.errors import UserError


def png(width):
    buffer = io.BytesIO()
    picture((width, 16)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


TEXT = Value("string")


def table(captions, kind=TEXT, images=None):
    images = images or [png(20 + i) for i in range(len(captions))]
    features = Features({"image": datasets.Image(), "text": kind, "preview": datasets.Image()})
    return Dataset.from_dict({"image": images, "text": captions, "preview": [None] * len(captions)}, features=features)


def read(folder=None, *, image_column="image", max_bad=0):
    """([(caption, width)], number of bad pictures, lines that were said); of the hub's "some/set" without a folder."""
    said, folders = [], [] if folder is None else [str(folder)]
    columns = dict(image_column=image_column, caption_column="text")
    samples, bad = dataset.load_samples("some/set", folders, **columns, max_bad=max_bad, say=said.append)
    assert all(sample.read().startswith(b"\x89PNG") for sample in samples)
    return [(sample.caption, sample.width) for sample in samples], bad, said


EXPECTED = [("one", 20), ("two", 21)]


def saved(folder):
    table(["one", "two"]).save_to_disk(folder / "data")


def parquet(folder):
    (folder / "data/sub").mkdir(parents=True)
    table(["one", "two"]).to_parquet(folder / "data/sub/train-00000-of-00001.parquet")
    table(["never"]).to_parquet(folder / "data/sub/test-00000-of-00001.parquet")


def arrow(folder):
    saved(folder / "saved")
    (folder / "data").mkdir()
    shutil.copy(next((folder / "saved").rglob("*.arrow")), folder / "data/some.arrow")


@pytest.mark.parametrize("make", [saved, parquet, arrow])
def test_tables_in_a_local_folder_are_read(tmp_path, make):
    make(tmp_path)
    assert read(tmp_path / "data") == (EXPECTED, 0, [])


def test_a_data_set_with_only_a_test_split_is_used_with_a_line(tmp_path, monkeypatch):
    DatasetDict(test=table(["one", "two"])).save_to_disk(tmp_path / "data")
    rows, _, (said,) = read(tmp_path / "data")
    assert rows == EXPECTED and "no split named train; its split test is used" in said
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"validation": table(["one", "two"])})
    rows, _, (said,) = read()
    assert rows == EXPECTED and "some/set has no split named train; its split validation is used" in said


HUB_CAPTIONS = {
    "null": (table([None, "x"]), ["", "x"]),
    "labels": (table([1, 0], ClassLabel(names=["cat", "dog"])), ["dog", "cat"]),
    "labels that are absent": (table([-1, None], ClassLabel(names=["cat", "dog"])), ["", ""]),
}


@pytest.mark.parametrize("kind", HUB_CAPTIONS)
def test_labels_are_captions_by_name_and_null_is_the_empty_one(monkeypatch, kind):
    data, captions = HUB_CAPTIONS[kind]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict(train=data))
    assert [caption for caption, _ in read()[0]] == captions


HUB_REFUSED = {
    "--caption_column text: row 0 of some/set holds ['a', 'b'] (list), not a text": table(
        [["a", "b"], ["c"]], datasets.Sequence(Value("string"))
    ),
    "--caption_column text: row 0 of some/set holds 7 (int), not a text": table([7, 8], Value("int64")),
    "--image_column image: some/set has no images there": Dataset.from_dict({"image": [3], "text": ["x"]}),
    "--image_column image: some/set has the columns text": Dataset.from_dict({"text": ["x"]}),
}


@pytest.mark.parametrize("message", HUB_REFUSED)
def test_columns_that_hold_something_else_are_refused_in_one_line(monkeypatch, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: DatasetDict(train=HUB_REFUSED[message]))
    with pytest.raises(UserError) as caught:
        read()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_null_picture_is_a_bad_one(monkeypatch):
    data = DatasetDict(train=table(["a", "b"], images=[None, png(21)]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: data)
    assert read(max_bad=1)[:2] == ([("b", 21)], 1)
    with pytest.raises(UserError, match=r"some/set\[0\] \(is null\).*--max_bad_images 1"):
        read()


def test_a_table_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.parquet").write_text("none")
    with pytest.raises(UserError, match="cannot be read as a data set"):
        read(tmp_path)
