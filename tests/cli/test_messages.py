"""What people read when something is wrong: one line that names the flag, what is wrong, and what to do."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infer
import train_dora
import train_opt
import train_qlora
import train_sdxl
from common import errors
from common.cli import running
from common.cli.command_line import parse
from common.cli.hub_ids import check_id
from common.cli.other_tools import OTHER_NAMES, our_name
from common.errors import UserError


def refusal(script, *argv):
    with pytest.raises(UserError) as caught:
        script.main(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- names and values of other tools

HINTS = {
    "--lr 1e-3": "--lr is called --learning_rate here",
    "--network_dim 4": "--network_dim is called --lora_rank here",
    "--rank 4": "--rank is called --lora_rank here",
    "--noise_offset 0.1": "--noise_offset is called --offset_noise_strength here",
    "--train-batch 2": "--train-batch is called --train_batch_size here",
    "--output x": "--output is called --output_dir here",
    "--network_alpha 4": "--network_alpha is called --lora_alpha here",
    "--fp16": "--fp16 is called --mixed_precision here",
    "--lr_scheduler_num_cycles 2": "--lr_scheduler_num_cycles is called --lr_num_cycles here",
    "--shuffle_caption": "--shuffle_caption is called --shuffle_tags here",
    "--weight_decay 0": "--weight_decay is called --adam_weight_decay here",
    "--use_ema false": "--use_ema false: a switch takes no value; write --use_ema to set it, --no_use_ema to clear it",
    "--use_ema=True": "--use_ema True: a switch takes no value; write --use_ema to set it, --no_use_ema to clear it",
    "--no-random-flip 1": "--no-random-flip 1: a switch takes no value; write --random_flip to set it, --no_random_flip to clear it",
}


@pytest.mark.parametrize("typed", HINTS)
def test_a_trainer_knows_what_other_tools_call_its_flags(typed):
    assert HINTS[typed] in refusal(train_opt, *typed.split())


def test_infer_knows_what_other_tools_call_its_flags():
    assert "--num_inference_steps is called --steps here" in refusal(infer, "--num_inference_steps", "3")
    assert "--lora_weights is called --lora here" in refusal(infer, "--lora_weights", "x")
    assert "called" not in refusal(infer, "--network_alpha", "3")  # it has no such flag


def test_every_hint_names_a_flag_and_no_name_is_one_already():
    scripts = (train_sdxl, train_opt, train_qlora, train_dora, infer)
    flags = {script: {field.name for field in dataclasses.fields(script.Flags)} for script in scripts}
    for ours, names in OTHER_NAMES.items():
        having = [script for script in scripts if ours in flags[script]]
        assert having, ours
        for theirs in names.split():
            assert any(our_name(theirs, flags[script]) == ours for script in having), (ours, theirs)
            assert any(theirs not in flags[script] for script in having), (ours, theirs)


def test_words_that_follow_a_flag_with_a_value_are_that_value():
    assert parse(infer.Flags, ["--compare", "--prompt", "no", "yes", "true"]).prompt == ["no", "yes", "true"]


def test_long_values_are_shortened_and_lines_stay_lines():
    message = str(UserError(f"--prompt {'x' * 5000}: is\ntoo long; {'shorten it ' * 500}end"))
    assert len(message) <= errors.LONGEST_LINE and "\n" not in message
    assert message.startswith("--prompt xxx") and message.endswith("shorten it end") and "x" * 400 not in message
    path = "/" + "/".join(["folder"] * 35)
    assert str(UserError(f"--lora {path}: no such file")) == f"--lora {path}: no such file"


# ---------------------------------------------------------------- hub ids


@pytest.mark.parametrize("name", ["gpt2", "a/b", "stabilityai/stable-diffusion-xl-base-1.0", "user_1/_x.y-z"])
def test_a_hub_id_passes(name):
    assert check_id(name, "dataset_name") is None


WRONG_IDS = {
    ("--dataset_name", "my pictures"): ["is no hub id", "--train_data_dir"],
    ("--dataset_name", "https://example.org/x/y"): ["is a web address", "--train_data_dir"],
    ("--dataset_name", "https://huggingface.co/datasets/a/b/tree/main"): ["is a web address; write its id, a/b"],
    ("--dataset_name", ""): ["is empty", "--train_data_dir"],
    ("--dataset_name", "C:\\Users\\me\\pics"): ["is a Windows path", "--train_data_dir"],
    ("--dataset_name", "."): ["is a folder here", "--train_data_dir"],
    ("--dataset_name", "a/b/c"): ["is no hub id", "--train_data_dir"],
    ("--pretrained_model_name_or_path", "my model"): ["is no hub id", "folder or .safetensors file"],
    ("--pretrained_model_name_or_path", "huggingface.co/a/b"): ["a/b"],
    ("--pretrained_model_name_or_path", "https://civitai.com/models/1"): ["is a web address", "download"],
    ("--pretrained_vae_model_name_or_path", "my vae"): ["is no hub id"],
}


@pytest.mark.parametrize(("flag", "value"), WRONG_IDS)
def test_what_cannot_be_a_hub_id_is_not_asked_for(tmp_path, monkeypatch, flag, value):
    """Offline or not, whatever else cannot be had: the answer is about the value, and names what to use instead."""
    monkeypatch.chdir(tmp_path)
    message = refusal(train_sdxl, flag, value)
    assert message.startswith(flag) and all(part in message for part in WRONG_IDS[flag, value]), message
    assert list(tmp_path.iterdir()) == []


def test_the_demo_uses_a_data_set_that_was_typed():
    """It would be overruled by the demo's own folder of images, without a word."""
    flags = parse(train_opt.Flags, ["--demo", "--dataset_name", "someone/pictures"])
    assert (flags.dataset_name, flags.train_data_dir) == ("someone/pictures", [])
    assert parse(train_opt.Flags, ["--demo"]).train_data_dir
    assert "someone/pictures" in refusal(train_opt, "--demo", "--dataset_name", "someone/pictures")


# ---------------------------------------------------------------- logins, scales


@pytest.mark.parametrize("login", ["key", "netrc", "offline", "none", "other host"])
def test_wandb_without_a_login_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, login):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    host = {"netrc": "api.wandb.ai", "other host": "api.example.org"}.get(login)
    if host:
        (tmp_path / "home/.netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
        (tmp_path / "home/.netrc").chmod(0o600)
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if login == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    flags = parse(train_sdxl.Flags, ["--report_to", "wandb"])
    if login in ("none", "other host"):
        with pytest.raises(UserError, match="--report_to wandb: not logged in.*WANDB_MODE=offline"):
            train_sdxl.check(flags)
    else:
        train_sdxl.check(flags)


@pytest.mark.parametrize(
    ("script", "typed", "expected"),
    [
        (train_sdxl, "--lora_rank 4", (4, 4)),
        (train_opt, "--lora_rank 64", (64, 64)),
        (train_opt, "--lora_rank 4 --lora_alpha 8", (4, 8)),
        (train_sdxl, "", (16, 16)),
        (train_opt, "--lora_alpha none", (8, 8)),
        (train_qlora, "--lora_rank 4", (4, 32)),
        (train_qlora, "--strategy normal", (16, 32)),
    ],
)
def test_the_rank_alone_keeps_the_scale_where_the_recipe_has_one(script, typed, expected):
    flags = parse(script.Flags, typed.split())
    assert (flags.lora_rank, flags.lora_alpha) == expected


def test_the_start_says_a_scale_that_is_not_one(assemble, capsys):
    assemble("--lora_alpha", 16)
    assert "scaled by alpha / rank = 16 / 8" in capsys.readouterr().out
    assemble()
    assert "alpha" not in capsys.readouterr().out


# ---------------------------------------------------------------- what nobody has foreseen


def outcome(main, capsys):
    """(exit status, the one line) of a script's run."""
    with pytest.raises(SystemExit) as caught:
        running.run(main)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return caught.value.code, line


@pytest.mark.parametrize(
    "error", [KeyError("conv_in"), ConnectionResetError(104, "reset"), RuntimeError("a\nb " * 999)]
)
def test_an_unforeseen_error_is_one_line_and_a_file_with_the_traceback(tmp_path, capsys, error):
    def main():
        flags = parse(train_opt.Flags, ["--output_dir", str(tmp_path)])  # noqa: F841 (where the output folder is found)
        raise error

    status, line = outcome(main, capsys)
    (file,) = tmp_path.glob("error_*.txt")
    assert status == 1 and type(error).__name__ in line and str(file) in line
    assert "Traceback" in file.read_text() and "in main" in file.read_text()


def test_where_there_is_no_output_folder_the_traceback_is_in_a_temporary_file(tmp_path, monkeypatch, capsys):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def main():
        flags = parse(train_opt.Flags, ["--output_dir", str(tmp_path / "absent")])
        raise ValueError(f"no {flags.output_dir}")

    _, line = outcome(main, capsys)
    file = Path(re.search(r"traceback is in (\S+),", line)[1])
    assert file.parent == tmp_path and not (tmp_path / "absent").exists()


PRINTS = """
import sys
sys.path.insert(0, {root!r})
from common.cli.running import run
def main():
    for i in range(20000):
        print("line", i, flush=True)
    open({proof!r}, "w").close()
run(main)
"""


def test_a_reader_of_stdout_who_leaves_ends_nothing(root, tmp_path):
    """`train_opt.py | head -1`: the training goes on, and there is no traceback."""
    proof = tmp_path / "ran to its end"
    code = PRINTS.format(root=str(root), proof=str(proof))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(30) == 0 and proof.exists()


def test_nothing_that_only_unix_has_is_imported_with_the_package(root):
    """Windows stops at the first module of this kind, at the top of a file."""
    unix_only = re.compile(r"^(import|from) (resource|fcntl|pwd|grp|termios)\b", re.MULTILINE)
    assert [
        path.name for path in [*root.glob("common/**/*.py"), *root.glob("*.py")] if unix_only.search(path.read_text())
    ] == []
