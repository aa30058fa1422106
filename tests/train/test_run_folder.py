"""An output folder belongs to one run, its checkpoints are complete and finite, and the newest sound one is gone on from."""

import json
import math
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch

import train_opt
from common import files, run_folder
from common.errors import UserError
from common.train import checkpoint

STEPS = ["--max_train_steps", 6, "--checkpointing_steps", 2, "--lr_warmup_steps", 0]


@pytest.fixture(scope="module")
def whole(train):
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    return train(*STEPS)


@pytest.fixture
def halfway(whole, tmp_path):
    """A copy of it as a kill after step 4 would have left it."""
    folder = tmp_path / "run"
    shutil.copytree(whole.dir, folder)
    shutil.rmtree(folder / "checkpoint-000006")
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_000006.safetensors"):
        (folder / name).unlink()
    return folder


def flip(file: Path, position: int = -100) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


# ---------------------------------------------------------------- one run at a time


def hold(folder, taken):
    """In another process: own the folder until killed."""
    with run_folder.owned(Path(folder), alone()):
        taken.set()
        time.sleep(60)


def alone():
    from common.model.device import Host

    return Host(torch.device("cpu"), torch.float32, reason="", rank=0, world=1, started_s=0.0)


@pytest.fixture
def elsewhere():
    """elsewhere(folder): another process owns the folder, until it is killed -> that process."""
    context, started = multiprocessing.get_context("fork"), []

    def elsewhere(folder):
        taken = context.Event()
        started.append(context.Process(target=hold, args=(folder, taken)))
        started[-1].start()
        assert taken.wait(60)
        return started[-1]

    yield elsewhere
    for process in started:
        process.kill()
        process.join()


def test_a_second_run_into_a_folder_is_one_line_before_anything_is_loaded(elsewhere, tmp_path, files_in):
    elsewhere(tmp_path / "run")
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=f"--output_dir {tmp_path / 'run'}: another run is writing there") as caught:
        train_opt.main(["--demo", "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"])
    assert "\n" not in str(caught.value) and files_in(tmp_path) == before
    with pytest.raises(UserError, match="another run"), run_folder.owned(tmp_path / "run", alone()):
        pass


def test_the_lock_of_a_run_that_was_killed_does_not_block_and_its_litter_goes(elsewhere, tmp_path):
    folder = tmp_path / "run"
    process = elsewhere(folder)
    process.kill()
    process.join()
    ours = ["checkpoint-000004.71-0a1b2c3d.partial", "metrics.jsonl.71-0a1b2c3d.partial", "checkpoint-000003.partial"]
    (folder / ours[0]).mkdir()
    (folder / ours[1]).touch()
    (folder / ours[2]).mkdir()
    (folder / "film.mkv.partial").touch()  # of somebody else
    run_folder.check_free(folder)
    with run_folder.owned(folder, alone()):
        assert [path.name for path in folder.glob("*.partial")] == ["film.mkv.partial"]


def test_a_refused_run_leaves_no_folder_and_a_lock_no_file(tmp_path):
    with pytest.raises(UserError, match="something"), run_folder.owned(tmp_path / "new" / "run", alone()):
        raise UserError("something")
    assert not (tmp_path / "new" / "run").exists()
    with run_folder.owned(tmp_path, alone()):
        (tmp_path / "kept").touch()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["kept"]


def test_latest_in_a_finished_run_without_checkpoints_is_refused_and_nothing_is_written_over(whole, tmp_path, files_in):
    shutil.copytree(whole.dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = files_in(tmp_path)
    with pytest.raises(UserError, match="holds a finished run") as caught:
        train_opt.main(["--demo", "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"])
    assert "\n" not in str(caught.value) and files_in(tmp_path) == before


# ---------------------------------------------------------------- complete or absent


def test_steps_sort_as_numbers(tmp_path):
    for name in ("checkpoint-1000000", "checkpoint-999999", "checkpoint-000500", "checkpoint-2000000.damaged"):
        (tmp_path / name).mkdir()
    assert [run_folder.step_of(path) for path in run_folder.find_checkpoints(tmp_path)] == [500, 999_999, 1_000_000]


def test_a_checkpoint_is_complete_or_absent_at_every_instant_of_rotation_and_replacement(
    assemble, tmp_path, monkeypatch
):
    """A kill may come between any two files that are removed."""
    engine, seen = assemble().engine, []

    def look(*arguments):
        seen.append({path.name: len(list(path.iterdir())) for path in run_folder.find_checkpoints(tmp_path)})

    for module, name in ((shutil, "rmtree"), (Path, "unlink"), (Path, "rename")):
        original = getattr(module, name)

        def watched(*arguments, original=original, **options):
            look()
            result = original(*arguments, **options)
            look()
            return result

        monkeypatch.setattr(module, name, watched)
    for step in (1, 2, 2, 3):
        checkpoint.save_checkpoint(tmp_path, step, engine, {}, 1)
    assert {count for folders in seen for count in folders.values()} == {2} and list(seen[-1]) == ["checkpoint-000003"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000003"]


def test_what_counts_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder: without them a crash can leave files of zeros."""
    import os

    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: events.append(Path(f"/proc/self/fd/{descriptor}").resolve()) or fsync(descriptor),
    )
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("rename") or replace(old, new))
    files.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    partial, renamed, folder = events
    assert (
        partial.name.startswith("a.safetensors.")
        and partial.suffix == ".partial"
        and renamed == "rename"
        and folder == tmp_path
    )


# ---------------------------------------------------------------- the newest is not always good


@pytest.mark.parametrize("damage", ["a bit of the tensors", "a digit of state.json", "NaN"])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(train, whole, halfway, capsys, damage):
    newest = halfway / "checkpoint-000004"
    if damage == "a bit of the tensors":
        flip(newest / "state.safetensors")
    elif damage == "NaN":
        tensors, metadata = files.read_safetensors(newest / "state.safetensors")
        tensors["optimizer.0.exp_avg"] = torch.full_like(tensors["optimizer.0.exp_avg"], math.nan)
        files.write_safetensors(newest / "state.safetensors", tensors, metadata)
    else:
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace('"batches": 4', '"batches": 5'))
    resumed = train(*STEPS, "--resume_from_checkpoint", "latest", into=halfway)
    said = capsys.readouterr().out
    assert (
        f"passed over: --resume_from_checkpoint {newest}: damaged" in said
        and f"resumed from {halfway / 'checkpoint-000002'}" in said
    )
    assert resumed.numbers == whole.numbers and resumed.same_weights(whole)
    assert [path.name for path in run_folder.find_checkpoints(halfway)] == [
        f"checkpoint-00000{step}" for step in (2, 4, 6)
    ]


def test_a_damaged_checkpoint_that_was_named_is_refused(train, halfway, files_in):
    flip(halfway / "checkpoint-000004/state.safetensors")
    before = files_in(halfway)
    with pytest.raises(UserError, match="checkpoint-000004: damaged or incomplete") as caught:
        train(*STEPS, "--resume_from_checkpoint", halfway / "checkpoint-000004", into=halfway)
    assert "\n" not in str(caught.value) and files_in(halfway) == before


def test_an_older_checkpoint_without_hashes_is_read_as_before(train, whole, halfway):
    from safetensors.torch import load_file, save_file

    file = halfway / "checkpoint-000004/state.safetensors"
    save_file(load_file(file), file)
    resumed = train(*STEPS, "--resume_from_checkpoint", "latest", into=halfway)
    assert resumed.numbers == whole.numbers and resumed.same_weights(whole)


@pytest.mark.parametrize(("part", "named"), [("flat", "flat"), ("ema", "ema"), ("exp_avg_sq", "flat")])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_blames_no_image(train, tmp_path, part, named):
    """A NaN in the weights, their average or the optimizer's state after step 3: only the checkpoint of step 2 may remain."""

    def prepare(engine, data):
        original = engine.step

        def step(number, *rest):
            result = original(number, *rest)
            if number == 3:
                state = engine.optimizer.state[engine.flat.groups[0]["params"][0]]
                {"flat": engine.flat.data, "ema": engine.ema.average, **state}[part][7] = math.nan
            return result

        engine.step = step

    with pytest.raises(UserError) as caught:
        train(*STEPS, "--checkpoints_total_limit", 1, into=tmp_path, prepare=prepare)
    message = str(caught.value)
    assert (
        "diverged" in message and f"({named})" in message and ".png" not in message and "goes on from step 2" in message
    )
    assert [path.name for path in run_folder.find_checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert not list(tmp_path.glob("pytorch_lora_weights.safetensors")) and not list(tmp_path.glob("*_00000[346]*"))
    assert (tmp_path / "training.png").exists()  # it shows how it came to that
    assert checkpoint.read_config(tmp_path)["data"]["images"] == 24


@pytest.mark.parametrize(
    "content", ["[]", '{"flags": {}, "data": {}}', '{"flags": 3, "data": {"images": 1, "fingerprint": ""}}', "\x00"]
)
def test_a_config_that_others_wrote_is_as_good_as_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert checkpoint.read_config(tmp_path) == {"flags": {}, "data": {}}


@pytest.mark.parametrize(
    "change", [{"micro_batch": 0}, {"micro_batch": "2"}, {"micro_batch": 10**6}, {"line": None}, {"kept": 3}]
)
def test_a_remembered_plan_that_cannot_be_one_is_measured_again(tmp_path, change):
    from common.train import pass_plan

    (tmp_path / "plan.json").write_text(json.dumps({"micro_batch": 2, "kept": [], "line": "plan", **change}))
    with pytest.raises((ValueError, TypeError)):
        pass_plan._read_plan(tmp_path / "plan.json", torch.nn.Module())
