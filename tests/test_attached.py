"""What is attached to a notebook without internet is found, and taken where the hub's defaults cannot be had."""

from common.attached import Attached, find_attached


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
