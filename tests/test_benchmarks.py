"""benchmarks/: a row is the run that its name says, what fails is a result, README's tables are what was measured."""

import importlib
import json
import shlex
import statistics
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import row_process, table, train_step
from common.cli.running import run
from common.data.batching import Examples
from common.errors import UserError
from common.train.engine import Engine

GPU = dict(gpu="NVIDIA T4", matmul_tflops=25.0)
FIGURES = dict(
    resolution=512,
    images_per_step=4,
    s_per_img=0.25,
    gpu_busy_s_per_img=0.2,
    matmul_share=0.508,
    data_share=0.001,
    first_step_s=21.0,
    peak_allocated_gib=10.1,
    peak_reserved_gib=11.0,
    ram_gib=2.8,
    whole_run_s=40.0,
)
PLAN = "plan: 4 images in 1 pass, 0 of 70 blocks recomputed, 0.250 s/img, about 10.0 of 14.5 GiB"
TRAINING = "training: 12 steps of 4 images, 4 at a time, from step 0"


def parsed(*argv):
    return train_step.parse(["--model", "M", "--images", "I", *argv])


@pytest.fixture
def measured(monkeypatch, capsys):
    """measured(*argv) -> (lines printed, JSON of the run): train_step.py with a GPU and trainings that are not there.

    1024 px never fits.
    """

    def in_own_process(task, argv=(), **settings):
        if task == "gpu":
            return GPU, ""
        if "1024" in argv:
            return {"failed": "out of GPU memory"}, ""
        return FIGURES, f"device: cuda\n{PLAN}\n{TRAINING}\n"

    def measured(*argv):
        capsys.readouterr()
        train_step.main(["--model", "M", "--images", "I", "--commit", "abc1234", *map(str, argv)])
        lines = capsys.readouterr().out.splitlines()
        return lines, json.loads(lines[-1])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_step, "in_own_process", in_own_process)
    return measured


# ---------------------------------------------------------------- which command a row is


@pytest.mark.parametrize(
    ("setting", "cap_gib"),
    [([], None), (["--fixed"], None), (["--as_t4"], 14.56), (["--as_t4", "--vram_gb", "8"], 8)],
    ids=str,
)
def test_a_row_is_its_trainers_documented_configuration_at_the_named_size(setting, cap_gib, tmp_path, capsys):
    """As the trainers themselves resolve it. --fixed takes the measured plan away, and nothing else."""
    (tmp_path / "images").mkdir()
    options = parsed("--images", str(tmp_path / "images"), *setting, "--", "--seed", "7")
    free = {
        "resolution",
        "seed",
        "pretrained_model_name_or_path",
        "train_data_dir",
        "cache_dir",
        "output_dir",
        "checkpointing_steps",
    }
    for name in [*train_step.MATRIX, *train_step.ROWS]:
        row, _, resolution = name.partition("@")
        folders = dict(cache_dir=tmp_path / "cache", output_dir=str(tmp_path / "run"))
        script, argv = train_step.trainer_command(name, options, **folders)
        documented, config = (resolved(script, flags, capsys) for flags in (train_step.ROWS[row][1], argv))
        changed = {key: value for key, value in config.items() if value != documented[key] and key not in free}
        expected = {"max_train_steps": row_process.STEPS} | ({"max_vram_gb": cap_gib} if cap_gib else {})
        assert changed == expected | ({"auto_fit": False} if "--fixed" in setting else {})
        assert config["resolution"] == int(resolution or documented["resolution"]) and config["seed"] == 7
        assert config["gradient_checkpointing"] and config["checkpointing_steps"] == 0


def resolved(script, flags, capsys):
    importlib.import_module(script).main([*flags, "--dry_run"])
    return json.loads(capsys.readouterr().out)


def test_the_matrix_is_every_trainer_at_every_size():
    assert len(set(train_step.MATRIX)) == 18 and parsed("--matrix").rows == train_step.MATRIX
    assert {name.partition("@")[2] for name in train_step.MATRIX} == {"512", "768", "1024"}
    assert parsed().rows == list(train_step.ROWS)


def test_the_recorded_command_measures_the_same_again():
    for argv in (
        ["--matrix", "--fixed"],
        ["--only", "opt@512", "--as_t4", "--", "--lora_rank", "4"],
        ["--vram_gb", "14.5", "--label", "x"],
    ):
        options = parsed(*argv)
        python, script, *again = shlex.split(train_step.command(options))
        repeated = train_step.parse(again)
        assert script == "benchmarks/train_step.py"
        assert repeated.rows == options.rows
        assert (repeated.cap_gib, repeated.as_t4) == (options.cap_gib, options.as_t4)
        for name in options.rows:
            folders = dict(cache_dir="c", output_dir="o")
            recorded = train_step.trainer_command(name, options, **folders)
            assert train_step.trainer_command(name, repeated, **folders) == recorded


@pytest.mark.parametrize(
    ("argv", "named"), [(["--only", "sdxl,lore@512"], "lore@512"), (["--vram_gb", "0"], "--vram_gb 0")]
)
def test_a_row_or_a_cap_that_cannot_be_is_refused(argv, named):
    with pytest.raises(UserError, match=named):
        parsed(*argv)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        run(lambda: train_step.main(["--model", "M", "--images", "I"]))
    assert caught.value.code == 2 and capsys.readouterr().err.splitlines()[0].endswith("error: a CUDA GPU is needed")


# ---------------------------------------------------------------- what a row is measured with


def test_speed_is_the_median_of_the_steps_before_the_profiled_one(train, tmp_path):
    """Of a training as it is, on this machine's CPU; every batch but those of the warm-up and the profiled step counts.

    With a cache of its own: latents encoded four at a time may differ in the last bit from those of other tests.
    """
    data_s = []
    original = Examples.effective_batch
    flags = ["--train_batch_size", 1, "--max_train_samples", 4, "--cache_dir", tmp_path]
    with row_process.timed_batches(data_s):
        trained = train("--max_train_steps", row_process.STEPS, *flags)
    assert Examples.effective_batch is original and len(data_s) == row_process.STEPS + 1

    # Figures of that training
    found = row_process.speed(trained.dir, [9.0, 0.4], data_s, matmul_tflops=1.0)
    s_per_img = statistics.median(row["s_per_img"] for row in trained.rows[3:11])
    assert found["s_per_img"] == round(s_per_img, 4)
    assert found["images_per_step"] == 2 and found["gpu_busy_s_per_img"] == 0.2
    assert found["data_share"] == round(statistics.median(data_s[4:12]) / 2 / s_per_img, 4) > 0
    assert found["first_step_s"] == trained.rows[0]["seconds"]
    assert found["resolution"] == 64 and found["matmul_share"] is None  # the arithmetic is known at three sizes


def test_the_share_counts_two_forward_passes(tmp_path):
    flags = dict(resolution=1024, train_batch_size=2, gradient_accumulation_steps=2)
    step = dict(step=1, loss=0.1, mse=0.1, lr=1e-4, s_per_img=0.5, seconds=20.0)
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    (tmp_path / "metrics.jsonl").write_text((json.dumps(step) + "\n") * row_process.STEPS)
    found = row_process.speed(tmp_path, [1.0], [0.002] * 13, matmul_tflops=65.0)
    assert found["matmul_share"] == round(2 * 6.761 / 0.5 / 65, 3)


@pytest.mark.parametrize("as_t4", [True, False])
def test_as_t4_the_trainer_has_no_flash_attention(as_t4, monkeypatch):
    """And a training that was cut short is no measurement; whatever was replaced for it is back afterwards."""
    kernels = []
    before = (Engine.step, torch.cuda.reset_peak_memory_stats, torch.backends.cuda.flash_sdp_enabled())

    def main(argv):
        kernels.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return {"ended": "time limit reached", "step": 3}

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))
    with pytest.raises(UserError, match="time limit reached after step 3"):
        row_process.measure("train_opt", [], matmul_tflops=1.0, cap_gib=None, as_t4=as_t4, profile=False)
    assert kernels == [(not as_t4, True)]
    assert before == (Engine.step, torch.cuda.reset_peak_memory_stats, torch.backends.cuda.flash_sdp_enabled())


# ---------------------------------------------------------------- what becomes of a row


def test_what_a_trainer_refuses_is_the_result_of_its_row():
    settings = dict(matmul_tflops=1.0, cap_gib=None, as_t4=False, profile=False)
    result, _ = row_process.in_own_process("measure", script="train_sdxl", argv=["--resolution", "7"], **settings)
    assert result == {"failed": "--resolution 7: must be a multiple of 32, at least 64; the nearest is 64"}


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. " + "Tried to allocate 2 GiB. " * 50),
            "CUDA out of memory. Tried to allocate 2 GiB. ",
        ),
        (ValueError("no such thing:\n  x"), "ValueError: no such thing: x"),
    ],
)
def test_a_failure_in_a_rows_process_is_one_line(error, failed, monkeypatch, tmp_path):
    def fail(**_):
        raise error

    monkeypatch.setitem(row_process.TASKS, "measure", fail)
    row_process.main("measure", "{}", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() == {"failed"} and result["failed"].startswith(failed)
    assert "\n" not in result["failed"] and len(result["failed"]) <= 200


@pytest.mark.parametrize(("code", "failed"), [(-9, "killed by SIGKILL"), (1, "ended with exit status 1")])
def test_a_process_that_dies_is_a_result_too(code, failed, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code, stdout="loading\n"))
    assert row_process.in_own_process("measure")[0] == {"failed": failed}


def test_a_row_that_fails_leaves_the_others(measured):
    lines, result = measured("--only", "sdxl@1024,lora@512", "--vram_gb", "14.5", "--fixed", "--", "--lora_rank", "4")
    assert result["rows"][0] == {"row": "sdxl@1024", "failed": "out of GPU memory"}
    assert result["rows"][1] == {"row": "lora@512", **FIGURES, "plan": f"{PLAN}; {TRAINING}", "caches_warm": True}
    assert lines[-5:-1] == [
        "| run | px | images a step | s/img | GPU busy s/img | allocated GiB | reserved GiB | RAM GiB "
        "| matmul share | first step s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| sdxl | 1024 | out of GPU memory |  |  |  |  |  |  |  |",
        "| lora | 512 | 4 | 0.2500 | 0.2000 | 10.10 | 11.00 | 2.80 | 50.8% | 21.0 |",
    ]
    described = dict(
        commit="abc1234", gpu="NVIDIA T4", cap_gib=14.5, as_t4=False, fixed=True, flags=["--lora_rank", "4"], label=""
    )
    assert described.items() <= result.items() and {"date", "torch", "matmul_tflops"} <= result.keys()


def test_several_calls_collect_in_one_file(measured, tmp_path):
    out = tmp_path / "new" / "runs.json"
    runs = [measured("--only", "lora", "--label", label, "--out", out)[1] for label in ("a", "b")]
    assert json.loads(out.read_text()) == runs and [path.name for path in out.parent.iterdir()] == ["runs.json"]


def test_rows_that_are_done_outlive_an_interruption(measured, tmp_path, monkeypatch):
    def killed_at_dora(name, *_, **__):
        if name == "dora":
            raise KeyboardInterrupt
        return {"row": name, **FIGURES, "caches_warm": True}

    monkeypatch.setattr(train_step, "run_row", killed_at_dora)
    with pytest.raises(KeyboardInterrupt):
        measured("--only", "lora,dora,opt", "--out", tmp_path / "runs.json")
    assert [row["row"] for row in json.loads((tmp_path / "runs.json").read_text())[0]["rows"]] == ["lora"]


@pytest.mark.parametrize("content", ["[{", "{}", '[{"rows": 3}]', '[{"rows": [{}]}]'])
def test_a_damaged_file_is_refused_and_left_alone(content, measured, tmp_path):
    out = tmp_path / "runs.json"
    out.write_text(content)
    with pytest.raises(UserError) as caught:
        measured("--only", "lora", "--out", out)
    assert str(out) in str(caught.value) and "\n" not in str(caught.value) and out.read_text() == content


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert train_step.git_commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert train_step.git_commit() == "unknown"


# ---------------------------------------------------------------- tables


@pytest.fixture
def files(measured, tmp_path):
    """(JSON of three runs, Markdown with their tables filled in)."""
    runs, text = tmp_path / "runs.json", tmp_path / "text.md"
    measured("--only", "lora", "--label", "T4, small", "--as_t4", "--out", runs)
    measured("--only", "sdxl@1024", "--label", "T4, small", "--as_t4", "--out", runs)
    measured("--only", "lora", "--label", "fixed", "--fixed", "--out", runs)
    text.write_text(
        "# Before\n<!-- table T4, small -->\n<!-- end -->\nbetween\n<!-- table fixed -->\nold\n<!-- end -->\nafter\n"
    )
    table.main([str(runs), str(text)])
    return runs, text


def test_a_table_says_how_it_was_measured_and_runs_of_one_setting_share_it(files):
    command = "python benchmarks/train_step.py --model M --images I"
    heading = f"torch {torch.__version__}, commit abc1234"
    columns = table.markdown([]).splitlines()
    t4_commands = f"`{command} --only lora --as_t4`, `{command} --only sdxl@1024 --as_t4`"
    row = "| lora | 512 | 4 | 0.2500 | 0.2000 | 10.10 | 11.00 | 2.80 | 50.8% | 21.0 |"
    assert files[1].read_text().splitlines() == [
        "# Before",
        "<!-- table T4, small -->",
        f"NVIDIA T4, held to 14.56 GiB, attention as on a T4, {heading}: {t4_commands}",
        "",
        *columns,
        row,
        "| sdxl | 1024 | out of GPU memory |  |  |  |  |  |  |  |",
        "<!-- end -->",
        "between",
        "<!-- table fixed -->",
        f"NVIDIA T4, {heading}: `{command} --only lora --fixed`",
        "",
        *columns,
        row,
        "<!-- end -->",
        "after",
    ]


def test_runs_of_different_settings_have_a_table_each(files):
    runs = json.loads(files[0].read_text())
    commits = ["abc1234", "abc1234-dirty"]
    runs[1]["commit"] = commits[1]
    runs[2]["label"] = "T4, small"
    filled = table.filled("<!-- table T4, small -->\n<!-- end -->\n", runs, "text.md")
    assert filled.count("| run | px |") == 3 and all(f"commit {commit}:" in filled for commit in commits)


def test_check_accepts_what_the_json_gives_and_nothing_else(files):
    runs, text = files
    table.main([str(runs), str(text), "--check"])
    changed = text.read_text().replace("0.2500", "0.2400", 1)
    text.write_text(changed)
    said = "text.md is not what .*runs.json gives: run python benchmarks/table.py"
    with pytest.raises(SystemExit, match=said) as caught:
        table.main([str(runs), str(text), "--check"])

    # A text as the code is printed, and the exit status is 1
    assert "\n" not in caught.value.code and text.read_text() == changed
    table.main([str(runs), str(text)])
    table.main([str(runs), str(text), "--check"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no marker", "no line <!-- table LABEL -->"),
        (
            "<!-- table fixed -->\n<!-- table T4, small -->\n<!-- end -->\n",
            "<!-- table fixed --> has no line <!-- end -->",
        ),
        ("<!-- table H100 -->\n<!-- end -->\n", "<!-- table H100 -->: no run has this label"),
    ],
)
def test_markers_that_cannot_be_filled_are_refused(text, named, files):
    files[1].write_text(text)
    with pytest.raises(UserError) as caught:
        table.main([str(path) for path in files])
    assert named in str(caught.value) and "\n" not in str(caught.value) and files[1].read_text() == text


def test_text_that_is_not_there_or_no_text_is_refused(files, tmp_path):
    (tmp_path / "picture.md").write_bytes(b"\x89PNG\xff")
    for name in ("none.md", "picture.md"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            table.main([str(files[0]), str(tmp_path / name)])


def test_a_first_step_with_empty_caches_is_told_from_one_with_warm_ones():
    rows = [{"row": "lora", **FIGURES, "caches_warm": warm} for warm in (True, False)]
    assert [line.split(" | ")[-1] for line in table.markdown(rows).splitlines()[2:]] == ["21.0 |", "21.0 (cold) |"]


def test_a_long_failure_fits_a_cell_and_breaks_no_column():
    failed = "out of memory | " + "lower the resolution " * 20
    line = table.markdown([{"row": "opt", "failed": failed}]).splitlines()[-1]
    assert line.count("|") == len(table.COLUMNS) + 3 and len(line) < 140


def test_the_readme_is_what_was_measured(root):
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert table.filled(text, table.read_runs(root / "docs" / "benchmarks.json"), readme) == text
