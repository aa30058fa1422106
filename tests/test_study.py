"""tools/study.py: methods differ in nothing but the method, numbers are metrics.jsonl's, nothing is trained twice."""

import json
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_dora
import train_qlora
import train_sdxl
from common.errors import UserError
from tools import study, study_results

SEEDS, STEPS = (42, 43), 5
ALL_METHODS = study.METHODS
FLAGS = ["--demo", "--seeds", str(len(SEEDS))]
TRAINER_FLAGS = ["--max_train_steps", str(STEPS), "--learning_rate", "1e-2"]


@pytest.fixture(scope="module", autouse=True)
def two_methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "METHODS", {name: study.METHODS[name] for name in ("LoRA", "DoRA")})
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, two_methods, rows_of):
    """A finished study -> namespace(dir, argv, result, runs: {(method, seed): namespace(dir, rows, config)})."""
    folder = tmp_path_factory.mktemp("study")
    argv = [*FLAGS, "--output_dir", str(folder), "--", *TRAINER_FLAGS]
    result, runs = study.main(argv), {}
    for method in study.METHODS:
        for seed in SEEDS:
            place = folder / f"seed_{seed}" / method
            config = json.loads((place / "config.json").read_text())
            runs[method, seed] = SimpleNamespace(dir=place, rows=rows_of(place), config=config)
    return SimpleNamespace(dir=folder, argv=argv, result=result, runs=runs)


def test_every_run_has_the_same_budget(done):
    """Steps, images, learning rates, and within a seed the very same training samples, hence the same held-out ones."""
    for run in done.runs.values():
        flags = run.config["flags"]
        assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))
        assert flags["train_batch_size"] * flags["gradient_accumulation_steps"] == 8 and flags["resolution"] == 64
        assert run.config["data"]["images"] == 18 and flags["validation_split"] == 0.25  # of 24
        assert [(row["lr"], row["epoch"]) for row in run.rows] == [
            (row["lr"], row["epoch"]) for row in done.runs["LoRA", 42].rows
        ]
    for seed in SEEDS:
        assert done.runs["LoRA", seed].config["data"] == done.runs["DoRA", seed].config["data"]
        # the same samples with the same noise: before an adapter has learned anything, the same loss
        assert done.runs["LoRA", seed].rows[0]["mse"] == pytest.approx(done.runs["DoRA", seed].rows[0]["mse"], rel=1e-5)
    assert done.runs["LoRA", 42].rows[0]["mse"] != done.runs["LoRA", 43].rows[0]["mse"]


def test_the_budget_of_the_real_study_is_equal_too(tmp_path, tmp_path_factory, capsys, monkeypatch):
    """The commands that --dry_run prints, resolved by the trainers themselves; LoRA's is the documented baseline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "METHODS", ALL_METHODS)
    study.main(["--dry_run", "--seeds", "2", "--", "--train_data_dir", str(tmp_path_factory.mktemp("pictures"))])
    *trainings, grid = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert grid[:3] == ["python", "infer.py", "--compare"] and not list(tmp_path.iterdir())
    mains = {"train_sdxl.py": train_sdxl.main, "train_qlora.py": train_qlora.main, "train_dora.py": train_dora.main}
    configs = []
    for _, script, *argv in trainings:
        mains[script]([*argv, "--dry_run"])
        configs.append(json.loads(capsys.readouterr().out))
    assert [config["seed"] for config in configs] == [42] * 4 + [43] * 4
    baseline = configs[0]
    documented = dict(
        resolution=512, lora_rank=16, lora_alpha=32, lora_dropout=0.1, num_train_epochs=3, max_train_steps=None
    )
    assert documented.items() <= baseline.items() and baseline["use_8bit_adam"]
    technique = {"seed", "output_dir", "strategy", "quantize", "lora_rank", "lora_target_modules"}  # DoRA's is no flag
    for config in configs:
        assert {name for name, value in config.items() if value != baseline.get(name)} <= technique


def test_the_table_is_what_metrics_jsonl_and_the_files_say(done):
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    config = done.runs["LoRA", 42].config
    base = sum(
        p.numel() for p in UNet2DConditionModel.from_pretrained(config["base_model"], subfolder="unet").parameters()
    )
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (done.dir / "study.md").read_text().splitlines()
        if "|" in line
    ]
    assert table[0] == [
        "method",
        "trainable",
        "share of UNet + adapter",
        "final training mse",
        "held-out loss",
        "s/img",
        "peak GiB",
        "adapter MB",
    ]
    for cells in table[2:]:
        runs = [done.runs[cells[0], seed] for seed in SEEDS]
        weights = runs[0].dir / "pytorch_lora_weights.safetensors"
        trainable = sum(tensor.numel() for tensor in load_file(weights).values())
        mses = [(run.rows[-2]["mse"] + run.rows[-1]["mse"]) / 2 for run in runs]  # the last quarter, rounded up
        held_out = [run.rows[-1]["val_loss"] for run in runs]
        s_per_img = statistics.median(statistics.median(row["s_per_img"] for row in run.rows) for run in runs)
        losses = [f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" for values in (mses, held_out)]
        share = f"{100 * trainable / (base + trainable):.2f} %"
        expected = [
            f"{trainable:,}",
            share,
            *losses,
            f"{s_per_img:.4f}",
            "only on a GPU",
            f"{weights.stat().st_size / 1e6:.1f}",
        ]
        assert cells[1:] == expected
    assert [cells[0] for cells in table[2:]] == ["LoRA", "DoRA"]
    assert json.loads((done.dir / "study.json").read_text()) == done.result


def test_the_spread_is_over_seeds_and_differences_are_paired(done):
    for row in done.result["methods"]:
        values = [done.runs[row["method"], seed].rows[-1]["val_loss"] for seed in SEEDS]
        assert row["seeds"] == len(SEEDS) and row["val_loss_std"] == pytest.approx(statistics.stdev(values))
    (difference,) = [row for row in done.result["differences"] if row["loss"] == "val_loss"]
    pairs = [
        done.runs["DoRA", seed].rows[-1]["val_loss"] - done.runs["LoRA", seed].rows[-1]["val_loss"] for seed in SEEDS
    ]
    assert difference["mean"] == pytest.approx(statistics.mean(pairs))
    assert difference["standard_error"] == pytest.approx(statistics.stdev(pairs) / len(SEEDS) ** 0.5)


@pytest.mark.parametrize(
    ("offsets", "beyond"),
    [([0.010, 0.011, 0.009], True), ([-0.010, -0.011, -0.009], True), ([0.010, -0.008, 0.001], False)],
)
def test_a_difference_counts_when_it_exceeds_its_own_spread(offsets, beyond):
    """However large the spread that both methods share is."""
    shared = [1.0, 2.0, 3.0]
    rows = [dict(method="LoRA", seed=i, mse=loss, val_loss=loss) for i, loss in enumerate(shared)]
    rows += [dict(method="DoRA", seed=i, mse=loss, val_loss=loss + offsets[i]) for i, loss in enumerate(shared)]
    by_mse, by_held_out = study_results.compare(rows)
    assert by_held_out["beyond_chance"] == beyond and not by_mse["beyond_chance"]
    methods = [dict(seeds=3, steps=STEPS, method="LoRA")]
    text = study_results.conclusion({"methods": methods, "differences": [by_mse, by_held_out]}, demo=False)
    verdict = "different from LoRA" if beyond else "not to be told from LoRA"
    assert f"By held-out loss, {verdict}: DoRA ({statistics.mean(offsets):+.5f} ± " in text and "n = 3 seeds" in text


def test_the_grid_has_a_column_per_method_from_the_first_seed(done):
    manifest = json.loads((done.dir / "manifest.json").read_text())
    assert [column["title"] for column in manifest["columns"]] == ["base", "LoRA", "DoRA"]
    sources = [Path(column["adapters"][0]["path"]).parent for column in manifest["columns"][1:]]
    assert sources == [done.runs[method, 42].dir for method in ("LoRA", "DoRA")] and (done.dir / "compare.png").exists()


def test_a_finished_run_is_not_trained_again(done, monkeypatch):
    for trainer in (train_sdxl, train_dora):
        monkeypatch.setattr(trainer, "main", lambda argv: pytest.fail("trained again"))
    before = {run.dir: (run.dir / "metrics.jsonl").stat().st_mtime_ns for run in done.runs.values()}
    assert study.main(done.argv) == done.result
    assert before == {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in before}


def test_a_run_that_was_stopped_is_not_finished_though_its_weights_are_there(tmp_path, monkeypatch):
    """The same command goes on from its checkpoint and ends with the weights of a run that was never stopped."""
    from safetensors.torch import load_file

    whole, stopped = (study.plan(parsed(tmp_path / name), TRAINER_FLAGS)[0] for name in ("whole", "stopped"))
    short = stopped._replace(recipe=[*stopped.recipe, "--max_train_minutes", "0.0001"])
    with pytest.raises(UserError, match="LoRA, seed 42: time limit reached"):
        study.train(short)
    assert (stopped.folder / "pytorch_lora_weights.safetensors").exists() and not (
        stopped.folder / study.FINISHED
    ).exists()
    for training in (stopped, whole):
        study.train(training)
    expected, found = (load_file(training.folder / "pytorch_lora_weights.safetensors") for training in (whole, stopped))
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)


def parsed(folder):
    return study.parse(study.Flags, [*FLAGS, "--output_dir", str(folder)])


@pytest.mark.parametrize(
    ("own", "trainers", "named"),
    [
        (["--seeds", "1"], [], "--seeds 1"),
        (["--validation_split", "0"], [], "--validation_split 0"),
        ([], ["--learning_rat", "1"], "--learning_rate"),
        ([], ["--learning_rate", "-1"], "--learning_rate -1"),
        ([], ["--max_train_steps", "3"], "trained with other flags"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(done, own, trainers, named, monkeypatch):
    for trainer in (train_sdxl, train_dora):
        monkeypatch.setattr(trainer, "main", lambda argv: pytest.fail("trained"))
    with pytest.raises(UserError) as caught:
        study.main([*done.argv[: done.argv.index("--")], *own, "--", *TRAINER_FLAGS, *trainers])
    assert named in str(caught.value) and "\n" not in str(caught.value)
