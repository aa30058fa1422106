"""Runs that end early: killed, asked to stop, out of time. Resumed, they end as if nothing had happened, to the bit."""

import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from common.errors import UserError
from common.system import stopping

# No warm-up: its first step has a learning rate of 0, and a run that stopped there would have nothing to lose.
STEPS = ["--max_train_steps", 12, "--checkpointing_steps", 4, "--lr_warmup_steps", 0]
RECIPES = {
    "adamw": [],
    "8-bit adam, buckets, flips": [
        "--use_8bit_adam",
        "--aspect_ratio_buckets",
        "--random_flip",
        "--caption_dropout",
        0.2,
    ],
}
COMMON = ["--demo", "--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--no_gradient_checkpointing"]


@pytest.fixture(scope="module")
def whole(train):
    """The same runs without an interruption, made once each."""
    made = {}

    def whole(*flags):
        if flags not in made:
            made[flags] = train(*flags)
        return made[flags]

    return whole


def assert_equal_runs(run, other):
    """Rows and weights, EMA and optimizer state: everything, to the bit."""
    assert run.numbers == other.numbers
    names = ["pytorch_lora_weights.safetensors", "ema_unet/pytorch_lora_weights.safetensors"]
    last = max(path.name for path in other.dir.glob("checkpoint-*"))
    for name in [*names, f"{last}/state.safetensors"]:
        assert run.same_weights(other, name), name


def wait_for_row(process, folder, step, rows_of, timeout_s=3600):
    """Return when metrics.jsonl of a running process holds `step`."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and f'"step": {step},' in (folder / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(
        f"step {step} was not reached: {process.communicate() if process.poll() is not None else 'timeout'}"
    )


def launch(start, root, folder, *flags):
    return start(root / "train_opt.py", *COMMON, "--output_dir", folder, *flags)


def complete(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*") if path.suffix != ".partial")


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_resumes_to_the_same_losses_and_the_same_bits(
    start, root, train, whole, rows_of, tmp_path, recipe
):
    """kill -9 after step 6, between the checkpoints of steps 4 and 8; killed in one process, resumed in another."""
    process = launch(start, root, tmp_path, *STEPS, *RECIPES[recipe])
    wait_for_row(process, tmp_path, 6, rows_of)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert complete(tmp_path) == ["checkpoint-000004"]
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    resumed = train(*STEPS, *RECIPES[recipe], "--resume_from_checkpoint", "latest", into=tmp_path)
    assert [row["step"] for row in resumed.rows] == list(
        range(1, 13)
    )  # the rows after the checkpoint are not there twice
    assert_equal_runs(resumed, whole(*STEPS, *RECIPES[recipe]))


def test_a_row_cut_short_by_the_kill_is_dropped(train, whole, tmp_path):
    train(*STEPS, "--max_train_minutes", 1e-9, into=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "epoch": 0.66')
    assert_equal_runs(train(*STEPS, "--resume_from_checkpoint", "latest", into=tmp_path), whole(*STEPS))


# ---------------------------------------------------------------- asked to stop


def test_sigterm_ends_with_a_checkpoint_that_resumes_exactly(start, root, train, whole, rows_of, tmp_path):
    """As Kaggle ends a session: the process is told, and goes in order."""
    process = launch(start, root, tmp_path, *STEPS, "--checkpointing_steps", 0)
    wait_for_row(process, tmp_path, 3, rows_of)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0 and "SIGTERM" in out and "Traceback" not in err
    step = rows_of(tmp_path)[-1]["step"]
    assert 3 <= step < 12 and complete(tmp_path) == [f"checkpoint-{step:06d}"]
    assert (tmp_path / f"pytorch_lora_weights_{step:06d}.safetensors").exists() and (
        tmp_path / "pytorch_lora_weights.safetensors"
    ).exists()
    assert_equal_runs(train(*STEPS, "--resume_from_checkpoint", "latest", into=tmp_path), whole(*STEPS))


def signal_at(step, number, times=1):
    """For train(prepare=...): this process gets the signal while the step is being computed."""

    def prepare(engine, data):
        original = engine.step

        def stepped(current, *rest):
            result = original(current, *rest)
            if current == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.05)  # two that arrive at once count as one
            return result

        engine.step = stepped

    return prepare


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_a_checkpoint_that_resumes_exactly(train, whole, tmp_path, number):
    """Twice, as a finger that trembles presses it: the second is the same request."""
    handlers = [signal.getsignal(n) for n in stopping.SIGNALS]
    stopped = train(*STEPS, into=tmp_path, prepare=signal_at(5, number, times=2))
    assert stopped.result["ended"] == f"{signal.Signals(number).name} received"
    assert stopped.result["step"] == 5  # the step in flight is finished, and no other is begun
    assert complete(tmp_path)[-1] == "checkpoint-000005"
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == handlers
    assert_equal_runs(train(*STEPS, "--resume_from_checkpoint", "latest", into=tmp_path), whole(*STEPS))


def test_a_time_limit_ends_early_with_a_checkpoint_that_resumes_exactly(train, whole, tmp_path):
    stopped = train(*STEPS, "--max_train_minutes", 1e-9, into=tmp_path)
    assert stopped.result["ended"] == "time limit reached" and 1 <= stopped.result["step"] < 4
    assert complete(tmp_path) == [f"checkpoint-{stopped.result['step']:06d}"]
    assert_equal_runs(train(*STEPS, "--resume_from_checkpoint", "latest", into=tmp_path), whole(*STEPS))


def test_a_run_in_many_short_sessions_is_one_run(train, whole, tmp_path):
    """A session a step: data order, schedule, average and optimizer all go on."""
    flags = ["--max_train_steps", 4, "--lr_warmup_steps", 0, "--use_8bit_adam"]
    sessions = [train(*flags, "--max_train_minutes", 1e-9, "--resume_from_checkpoint", "latest", into=tmp_path)]
    while sessions[-1].result["ended"] != "finished" and len(sessions) < 9:
        sessions.append(train(*flags, "--max_train_minutes", 1e-9, "--resume_from_checkpoint", "latest", into=tmp_path))
    assert len(sessions) >= 2
    assert_equal_runs(sessions[-1], whole(*flags))


def test_lora_dropout_resumes_exactly(train, whole, tmp_path):
    flags = ["--max_train_steps", 4, "--lr_warmup_steps", 0, "--lora_dropout", 0.3]
    train(*flags, "--max_train_minutes", 1e-9, into=tmp_path)
    assert_equal_runs(train(*flags, "--resume_from_checkpoint", "latest", into=tmp_path), whole(*flags))


def test_early_stopping_counts_on_after_a_resume(train, tmp_path, monkeypatch):
    """Best loss and patience are part of where a run stands."""
    from common.train.engine import Engine

    flags = [
        "--max_train_steps",
        9,
        "--validation_split",
        0.25,
        "--validation_steps",
        1,
        "--early_stopping_patience",
        3,
    ]
    scripted = iter([1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(Engine, "validate", lambda *arguments: next(scripted))
    first = train(*flags, "--max_train_minutes", 1e-9, into=tmp_path)
    rest = train(*flags, "--resume_from_checkpoint", "latest", into=tmp_path)
    assert first.result["step"] < 4 and (rest.result["ended"], rest.result["step"]) == ("early stopping", 4)
    again = train(*flags, "--resume_from_checkpoint", "latest", into=tmp_path)
    assert (again.result["ended"], again.result["step"]) == (
        "early stopping",
        4,
    )  # it does not creep on a step a command


# ---------------------------------------------------------------- what is resumed from


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """A run of 12 steps that stopped after one or two, to be copied."""
    return train(*STEPS, "--max_train_minutes", 1e-9, into=tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped.dir, tmp_path / "run")
    return tmp_path / "run"


def resume(train, folder, *flags, checkpoint="latest"):
    return train(*STEPS, "--resume_from_checkpoint", checkpoint, *flags, into=folder)


def refusal(train, folder, *flags, **options):
    with pytest.raises(UserError) as caught:
        resume(train, folder, *flags, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_half_written_checkpoint_is_not_resumed_from(train, whole, copy):
    (newest,) = (path for path in copy.glob("checkpoint-*"))
    for name in ("checkpoint-000011.partial", "checkpoint-000010.partial"):
        shutil.copytree(newest, copy / name)
    (copy / "checkpoint-000011.partial" / "state.json").unlink()
    (copy / "checkpoint-000010.partial" / "state.safetensors").write_bytes(b"half")
    assert_equal_runs(resume(train, copy), whole(*STEPS))


def test_latest_in_an_empty_folder_starts_at_the_beginning(train, whole, tmp_path, capsys):
    assert_equal_runs(resume(train, tmp_path / "new"), whole(*STEPS))
    assert "starting at the beginning" in capsys.readouterr().out


def test_a_path_resumes_from_there_into_another_folder(train, whole, copy, tmp_path):
    (checkpoint,) = copy.glob("checkpoint-*")
    run = resume(train, tmp_path / "elsewhere", checkpoint=checkpoint)
    rest = whole(*STEPS)
    assert run.numbers == rest.numbers[-len(run.rows) :] and len(run.rows) == 12 - int(checkpoint.name[-6:])
    assert run.same_weights(rest)


def test_resuming_a_finished_run_changes_no_weight_and_no_row(train, whole, tmp_path):
    shutil.copytree(whole(*STEPS).dir, tmp_path / "run")
    again = resume(train, tmp_path / "run")
    assert again.result["step"] == 12
    assert again.rows == whole(*STEPS).rows
    assert_equal_runs(again, whole(*STEPS))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_rank", 4], "--lora_rank"),
        (["--lora_target_modules", "to_q"], "--lora_target_modules"),
        (["--no_use_ema"], "--use_ema"),
        (["--use_8bit_adam"], "--use_8bit_adam"),
    ],
)
def test_another_adapter_or_optimizer_is_refused_in_one_line_and_nothing_is_written_over(
    train, copy, files_in, flags, named
):
    before = files_in(copy)
    message = refusal(train, copy, *flags)
    assert "--resume_from_checkpoint" in message and named in message
    assert files_in(copy) == before


def test_other_data_is_said_so(train, copy, demo, capsys, tmp_path):
    """The order of samples is a permutation of what there is: with other data a run goes on, but not the same one."""
    shutil.copytree(demo.data, tmp_path / "data")
    rows = (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows[:20]) + "\n")
    resume(train, copy, "--train_data_dir", tmp_path / "data")
    said = capsys.readouterr().out
    assert "--train_data_dir" in said and "resuming with other data: 20 images now, 24 before" in said


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones(train, copy, files_in):
    """Rotation and 'latest' would take the newer ones, which belong to another future."""
    (older,) = copy.glob("checkpoint-*")
    shutil.copytree(older, copy / "checkpoint-000011")
    before = files_in(copy)
    message = refusal(train, copy, checkpoint=older)
    assert "checkpoint-000011 is newer" in message and files_in(copy) == before


def test_a_limit_leaves_time_to_save(monkeypatch):
    """A step takes 2 s and a checkpoint 10: of 60 s the last 34 are for ending."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    request = stopping.StopRequest(ends_s=160.0)
    request.step_took(2.0)
    request.save_took(10.0)
    request.step_took(1.0)
    now[0] = 125.9
    assert request.reason is None
    now[0] = 126.1
    assert request.reason == "time limit reached"


@pytest.mark.parametrize("flags", [["--learning_rate", 5e-4], ["--seed", 7], ["--lora_alpha", 16]])
def test_a_changed_setting_is_named_when_the_run_goes_on(train, copy, capsys, flags):
    resume(train, copy, *flags)
    assert f"resuming with {flags[0]} {flags[1]}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no state.json", "no tensors", "half a json", "empty json", "half the tensors"])
def test_a_damaged_checkpoint_is_named_in_one_line(train, copy, damage):
    (checkpoint,) = copy.glob("checkpoint-*")
    file = checkpoint / ("state.json" if "json" in damage else "state.safetensors")
    data = file.read_bytes()
    file.unlink()
    if damage.startswith("half"):
        file.write_bytes(data[: len(data) // 2])
    if damage.startswith("empty"):
        file.write_text("{}")
    assert str(checkpoint) in refusal(train, copy)


def test_a_folder_that_is_no_checkpoint_is_refused(train, copy):
    assert "--resume_from_checkpoint" in refusal(train, copy, checkpoint=copy)


def test_a_damaged_config_does_not_stop_a_run_from_going_on(train, whole, copy):
    (copy / "config.json").write_text('{"flags": {"resol')
    assert_equal_runs(resume(train, copy), whole(*STEPS))


def test_latest_goes_on_from_the_output_of_an_earlier_kaggle_version(
    train, whole, stopped, tmp_path, monkeypatch, capsys
):
    """Attached as input, read-only, below a folder that is named after the notebook; the new output folder is empty."""
    from common import run_folder

    monkeypatch.setattr(run_folder, "KAGGLE_INPUT", tmp_path / "input")
    shutil.copytree(stopped.dir, tmp_path / "input/my-notebook/outputs/run")
    shutil.copytree(stopped.dir, tmp_path / "input/my-notebook/outputs/another")
    run = resume(train, tmp_path / "working/run")
    assert f"resumed from {tmp_path / 'input/my-notebook/outputs/run'}" in capsys.readouterr().out
    assert run.same_weights(whole(*STEPS))


def test_where_there_are_checkpoints_already_nothing_else_is_searched(copy, tmp_path, monkeypatch):
    """/kaggle/input may hold a whole data set, through which a search takes long."""
    from common import run_folder

    monkeypatch.setattr(run_folder, "KAGGLE_INPUT", SimpleNamespace(glob=lambda pattern: pytest.fail("searched")))
    assert run_folder.find_resume("latest", copy) == run_folder.find_checkpoints(copy)[::-1]
    with pytest.raises(pytest.fail.Exception, match="searched"):
        run_folder.find_resume("latest", tmp_path / "empty")


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ENOSPC])
def test_an_output_folder_that_vanishes_or_fills_costs_no_step(train, whole, tmp_path, monkeypatch, number):
    """A Drive that is unmounted between two checkpoints: everything is saved on the local disk, and goes on from there."""
    from common import files

    original = files.save_file

    def fails(tensors, place, *rest):
        if tmp_path / "drive" in place.parents:
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        original(tensors, place, *rest)

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(UserError) as caught:
        train(*STEPS, into=tmp_path / "drive/run")
    assert os.strerror(number) in str(caught.value) and "of step 4 are" in str(caught.value)
    rescued = str(caught.value).rpartition(" ")[2]
    run = resume(train, tmp_path / "elsewhere", checkpoint=rescued)
    assert run.result["step"] == 12 and run.same_weights(whole(*STEPS))


def test_a_model_file_that_vanishes_costs_no_step_and_is_what_the_message_names(train, demo, tmp_path):
    """The VAE is read again for each validation image; the output folder is as writable as before."""
    shutil.copytree(demo.model, tmp_path / "model")
    flags = [
        "--pretrained_model_name_or_path",
        tmp_path / "model",
        "--validation_prompt",
        "a cat",
        "--validation_steps",
        2,
    ]
    with pytest.raises(UserError) as caught:
        train(*STEPS, *flags, into=tmp_path / "run", prepare=lambda engine, data: shutil.rmtree(tmp_path / "model/vae"))
    message = str(caught.value)
    assert str(tmp_path / "model/vae") in message and "of step 2 are" in message and "\n" not in message
    assert json.loads((Path(message.rpartition(" ")[2]) / "state.json").read_text())["progress"]["step"] == 2


# ---------------------------------------------------------------- what is kept


def test_rotation_keeps_the_newest_checkpoints_and_the_weights_of_all(train, tmp_path):
    flags = ["--max_train_steps", 7, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2]
    run = train(*flags, into=tmp_path)
    assert complete(run.dir) == ["checkpoint-000006", "checkpoint-000007"]
    weights = sorted(path.name for path in run.dir.glob("pytorch_lora_weights_*"))
    assert weights == [f"pytorch_lora_weights_{step:06d}.safetensors" for step in (2, 4, 6, 7)]
    final, last = run.weights(), run.weights("pytorch_lora_weights_000007.safetensors")
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert any(
        not torch.equal(final[name], values)
        for name, values in run.weights("pytorch_lora_weights_000006.safetensors").items()
    )


def test_a_limit_of_one_never_leaves_the_run_without_a_checkpoint(train, tmp_path, monkeypatch):
    """The last step is a checkpointed one too: what is there already is not taken away first. A kill may come at any moment."""
    left, rmtree = [], shutil.rmtree

    def watched(path, *rest, **options):
        rmtree(path, *rest, **options)
        left.append(complete(tmp_path))

    monkeypatch.setattr(shutil, "rmtree", watched)
    train("--max_train_steps", 4, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1, into=tmp_path)
    since_the_first = list(itertools.dropwhile(lambda names: not names, left))
    assert since_the_first and all(since_the_first)


def test_a_checkpoint_is_complete_and_self_describing(stopped):
    (folder,) = stopped.dir.glob("checkpoint-*")
    state = json.loads((folder / "state.json").read_text())
    assert state["progress"]["step"] == int(folder.name[-6:])
    tensors = stopped.weights(f"{folder.name}/state.safetensors")
    assert {"flat", "ema"} <= tensors.keys() and len(tensors["flat"]) == 125_696
