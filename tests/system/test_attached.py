"""What is attached to a notebook without internet is found, and taken where the hub's defaults cannot be had."""

import json
import shutil

import pytest

from common.cli import hub
from common.errors import UserError
from common.system.attached import Attached, find_attached


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_models_data_and_wheels_are_found_at_kaggles_depths(tmp_path):
    touch(
        tmp_path / "models/owner/sdxl/diffusers/base/1/model_index.json",
        tmp_path / "ink/metadata.jsonl",
        tmp_path / "table/metadata.csv",
        tmp_path / "datasets/owner/texts/a.PNG",
        tmp_path / "datasets/owner/texts/a.txt",
        tmp_path / "wheels/bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl",
    )
    folders = [["models/owner/sdxl/diffusers/base/1"], ["datasets/owner/texts", "ink", "table"], ["wheels"]]
    assert find_attached(str(tmp_path)) == Attached(*([str(tmp_path / name) for name in names] for names in folders))


def test_other_files_are_neither(tmp_path):
    touch(tmp_path / "a/picture.png", tmp_path / "a/readme.txt", tmp_path / "b/config.json", tmp_path / "c/train.csv")
    assert find_attached(str(tmp_path)) == find_attached(str(tmp_path / "absent")) == Attached([], [], [])


def test_the_parts_of_a_model_are_not_searched(tmp_path):
    touch(tmp_path / "sdxl/model_index.json", tmp_path / "sdxl/samples/metadata.jsonl")
    assert find_attached(str(tmp_path)) == Attached([str(tmp_path / "sdxl")], [], [])


# ---------------------------------------------------------------- out of the hub's reach


@pytest.fixture
def attached(monkeypatch, tmp_path, demo):
    """/kaggle/input with a model and captioned pictures; the hub's defaults are neither cached nor within reach."""
    root = tmp_path / "input"
    shutil.copytree(demo.model, root / "models/owner/sdxl/1")
    shutil.copytree(demo.data, root / "ink")
    monkeypatch.setattr(hub, "find_attached", lambda: find_attached(str(root)))
    return root


def test_a_trainer_as_typed_takes_the_attached_model_and_pictures(attached, tmp_path, capsys):
    import train_opt

    small = [
        "--resolution",
        "64",
        "--max_train_steps",
        "1",
        "--gradient_accumulation_steps",
        "1",
        "--no_gradient_checkpointing",
    ]
    train_opt.main([*small, "--output_dir", str(tmp_path / "run")])
    flags = json.loads((tmp_path / "run/config.json").read_text())["flags"]
    assert flags["pretrained_model_name_or_path"] == str(attached / "models/owner/sdxl/1")
    assert flags["train_data_dir"] == [str(attached / "ink")]
    assert f"taking {attached / 'ink'}" in capsys.readouterr().out


def test_of_several_attached_models_one_has_to_be_named(attached, tmp_path):
    import infer

    touch(attached / "other/model_index.json")
    with pytest.raises(UserError) as caught:
        infer.main(["--output_dir", str(tmp_path / "pictures")])
    assert all(
        part in str(caught.value) for part in (str(attached / "other"), "sdxl/1", "name one with --pretrained_model")
    )


def test_what_was_typed_is_not_replaced(attached, tmp_path):
    import infer

    with pytest.raises(UserError, match="--pretrained_model_name_or_path someone/something"):
        infer.main(["--pretrained_model_name_or_path", "someone/something", "--output_dir", str(tmp_path / "pictures")])
