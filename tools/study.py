"""Trains LoRA, QLoRA aggressive, QLoRA normal and DoRA at equal budget with several seeds: one table, one paragraph, one grid.

    python tools/study.py --demo
    python tools/study.py --seeds 3 -- --train_data_dir FOLDER

Flags after `--` go to every trainer. The same command goes on where the last one was stopped: finished runs stay as they are,
one that was cut short continues from its checkpoint. Writes study.md, study.json and compare.png.
"""

import dataclasses
import importlib
import itertools
import json
import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.cli.command_line import parse
from common.cli.flag_checks import check
from common.cli.flag_facts import flag
from common.cli.model_flags import ModelFlags
from common.cli.running import run
from common.errors import UserError

METHODS = {  # name -> trainer, and what makes its defaults those of the comparison
    "LoRA": ("train_sdxl", "--lora_rank 16 --lora_alpha 32 --lora_dropout 0.1 --use_8bit_adam"),
    "QLoRA aggressive": ("train_qlora", "--strategy aggressive"),
    "QLoRA normal": ("train_qlora", "--strategy normal"),
    "DoRA": ("train_dora", ""),
}
OPTIONS = {  # the same for what train_opt adds to plain LoRA: all of it, and all of it but one
    "train_opt": ("train_opt", ""),
    "without EMA": ("train_opt", "--no_use_ema"),
    "without Min-SNR": ("train_opt", "--min_snr_gamma none"),
    "without offset noise": ("train_opt", "--offset_noise_strength 0"),
}
# A measured plan would give each method another number of images a pass, and so another peak and speed.
BUDGET = "--no_auto_fit --checkpoints_total_limit 1"
FULL_BUDGET = f"--resolution 512 --num_train_epochs 3 --lr_warmup_steps 10 {BUDGET}"
DEMO_BUDGET = f"--demo --learning_rate 1e-3 --train_batch_size 8 --gradient_accumulation_steps 1 --no_gradient_checkpointing {BUDGET}"
FIRST_SEED = 42
LOSSES = {"mse": "final training mse", "val_loss": "held-out loss"}
SCORES = {
    "style": "in the ink style",
    "attributes": "attributes kept",
}  # of the demo's world, by demo/score.py, averaged weights if there are
SCORED_IMAGES = 16
T_95 = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
    9: 2.31,
    10: 2.26,
}  # n -> Student's t, n - 1 degrees, two-sided
FINISHED = "finished.json"  # marks a run's folder; final weights alone do not, a run that was stopped writes them too


@dataclass
class Flags:
    """Compare the four methods, or train_opt with and without its options, at equal budget. Flags after -- go to every trainer."""

    of: Literal["methods", "options"] = flag(
        "methods", "LoRA, two QLoRA strategies and DoRA; or train_opt without EMA, Min-SNR, offset noise"
    )
    output_dir: str = flag("outputs/study", "where study.md, study.json, compare.png and the runs go")
    seeds: int = flag(
        3, f"runs of each method, with seeds {FIRST_SEED}, {FIRST_SEED + 1}, ...; the grid shows the first"
    )
    validation_split: float = flag(0.1, "share of the data held out; every run holds out the same samples", demo=0.25)
    dry_run: bool = flag(False, "print the commands this would run and stop")
    demo: bool = flag(False, "the tiny model and data set that come with the suite, on a CPU")


class Training(NamedTuple):
    """One run of the study; `recipe` is its command line but for the place."""

    method: str
    seed: int
    script: str
    recipe: list
    folder: Path

    @property
    def argv(self):
        return [*self.recipe, "--output_dir", str(self.folder), "--resume_from_checkpoint", "latest"]


def main(argv=None):
    """Train what is not trained yet, then write the results; returns what study.json says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    flags = parse(Flags, own)
    trainings = plan(flags, argv[len(own) + 1 :])
    resolved = [check_training(training) for training in trainings][0]
    grid = grid_argv(flags, resolved, [training.folder for training in trainings if training.seed == FIRST_SEED])
    if flags.dry_run:
        commands = [[f"{training.script}.py", *training.argv] for training in trainings] + [["infer.py", *grid]]
        return print("\n".join(shlex.join(["python", *command]) for command in commands))

    import infer
    from common import files

    for number, training in enumerate(trainings, 1):
        print(f"[{number}/{len(trainings)}] {training.method}, seed {training.seed}", flush=True)
        train(training)
    rows = [measure(training) for training in trainings]
    study = {"methods": summarize(rows, unet_parameters(resolved)), "differences": compare(rows), "runs": rows}
    infer.main(grid)
    files.write_json(Path(flags.output_dir) / "study.json", study)
    Path(flags.output_dir, "study.md").write_text(markdown(study, flags.demo))
    print(f"study.md, study.json and compare.png are in {flags.output_dir}")
    return study


def plan(flags, trainer_flags):
    """Every Training, seed by seed. UserError: a flag of the study that cannot work."""
    if flags.seeds < 2:
        raise UserError(f"--seeds {flags.seeds}: must be at least 2; one run has no spread to measure a difference by")
    if not 0 < flags.validation_split < 1:
        raise UserError(f"--validation_split {flags.validation_split}: must be more than 0 and less than 1")
    trainings, budget = [], [*(DEMO_BUDGET if flags.demo else FULL_BUDGET).split(), *trainer_flags]
    compared = METHODS if flags.of == "methods" else OPTIONS
    for seed, (method, (script, technique)) in itertools.product(
        range(FIRST_SEED, FIRST_SEED + flags.seeds), compared.items()
    ):
        recipe = [*technique.split(), *budget, "--validation_split", str(flags.validation_split), "--seed", str(seed)]
        trainings.append(Training(method, seed, script, recipe, Path(flags.output_dir) / f"seed_{seed}" / method))
    return trainings


def check_training(training):
    """The trainer's flags as it will see them. UserError: it would refuse them, or its folder holds a run made with others."""
    flags = parse(importlib.import_module(training.script).Flags, training.argv)
    check(flags)
    if (training.folder / FINISHED).exists() and read_finished(training)["recipe"] != training.recipe:
        raise UserError(
            f"--output_dir: {training.folder} was trained with other flags (see its {FINISHED}); name another folder"
        )
    return flags


def read_finished(training):
    """What marks a run as finished. UserError: it cannot be read."""
    marker = training.folder / FINISHED
    try:
        finished = dict(json.loads(marker.read_text()))
        return {**finished, "recipe": list(finished["recipe"]), "device": str(finished["device"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--output_dir: {marker} is damaged; remove the run's folder to train it again") from None


def grid_argv(flags, resolved, folders):
    """infer.py's command line: a column for each folder, on the model of the trainers' flags."""
    model = []
    for field in dataclasses.fields(ModelFlags):
        value = getattr(resolved, field.name)
        if field.name in ("demo", "dry_run") or value is field.default is None:
            continue
        model += (
            [f"--{'' if value else 'no_'}{field.name}"] if isinstance(value, bool) else [f"--{field.name}", str(value)]
        )
    place = ["--resolution", str(resolved.resolution), "--output_dir", flags.output_dir]
    return ["--compare", *["--demo"] * flags.demo, *model, *place, "--lora", *map(str, folders)]


# ---------------------------------------------------------------- training and measuring


def train(training):
    """Train to the end, from a checkpoint if there is one, unless that was done before. UserError: the run was stopped."""
    from accelerate import PartialState

    from common import files

    if (training.folder / FINISHED).exists():
        return
    ended = importlib.import_module(training.script).main(training.argv)["ended"]
    if ended != "finished":
        raise UserError(
            f"{training.method}, seed {training.seed}: {ended}; only whole runs are compared, the same command goes on"
        )
    scores = score(training.folder) if "--demo" in training.recipe else {}
    files.write_json(
        training.folder / FINISHED, {"recipe": training.recipe, "device": PartialState().device.type, **scores}
    )


def score(folder):
    """What a run of the demo's trained model has learnt and kept: {"style": share, "attributes": share}; nothing for the random one."""
    from common.cli.demo_settings import is_tiny
    from demo import score as demo_score

    if is_tiny():
        return {}
    averaged = folder / "ema_unet"
    scores = demo_score.of_adapter(averaged if averaged.exists() else folder, SCORED_IMAGES)
    return {key: scores[key][0] for key in SCORES}


def measure(training):
    """The figures of a finished run. peak_gib is None on a CPU, where the process's peak includes the runs before."""
    from common.adapter_files import diffusers_format
    from common.train import report

    steps, weights = report.read_metrics(training.folder / "metrics.jsonl"), training.folder / diffusers_format.WEIGHTS
    finished = read_finished(training)
    return dict(
        **{key: finished[key] for key in SCORES if key in finished},
        method=training.method,
        seed=training.seed,
        steps=len(steps),
        mse=statistics.fmean(step["mse"] for step in steps[len(steps) * 3 // 4 :]),
        val_loss=steps[-1]["val_loss"],
        s_per_img=statistics.median(step["s_per_img"] for step in steps),
        peak_gib=max(step["peak_gib"] for step in steps) if finished["device"] == "cuda" else None,
        trainable=count(weights),
        adapter_mb=weights.stat().st_size / 1e6,
    )


def count(file):
    """How many numbers a safetensors file holds; only its header is read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def unet_parameters(flags):
    """Parameters of the frozen UNet that a trainer's flags name."""
    from common.model import loading, weights

    model = loading.model_of(flags)
    return sum(count(file) for file in weights.weight_files(model.folder / "unet", model.variant))


# ---------------------------------------------------------------- what the numbers say


def summarize(rows, base):
    """One row per method from those of its seeds; `base`: parameters of the frozen UNet."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        entry = {key: own[0][key] for key in ("method", "steps", "trainable", "adapter_mb")}
        entry |= dict(seeds=len(own), share_percent=100 * entry["trainable"] / (base + entry["trainable"]))
        for loss in measured(rows):
            values = [row[loss] for row in own]
            entry |= {loss: statistics.fmean(values), f"{loss}_std": statistics.stdev(values)}
        entry["s_per_img"] = statistics.median(row["s_per_img"] for row in own)
        entry["peak_gib"] = None if own[0]["peak_gib"] is None else max(row["peak_gib"] for row in own)
        table.append(entry)
    return table


def measured(rows):
    """{key: title} of the columns that have a spread over the seeds."""
    return {key: title for key, title in {**LOSSES, **SCORES}.items() if key in rows[0]}


def compare(rows):
    """Differences from the first method, paired by seed: the runs of a seed see the same samples with the same noise.

    `beyond_chance`: more than t standard errors, which chance alone exceeds once in twenty.
    """
    by_run, seeds = {(row["method"], row["seed"]): row for row in rows}, sorted({row["seed"] for row in rows})
    first, *others = dict.fromkeys(row["method"] for row in rows)
    compared = []
    for loss, method in itertools.product(measured(rows), others):
        values = [by_run[method, seed][loss] - by_run[first, seed][loss] for seed in seeds]
        mean, error = statistics.fmean(values), statistics.stdev(values) / len(seeds) ** 0.5
        beyond = abs(mean) > T_95[min(len(seeds), max(T_95))] * error
        compared.append(dict(loss=loss, method=method, mean=mean, standard_error=error, beyond_chance=beyond))
    return compared


def markdown(study, demo):
    """study.md: the table, what may be concluded from it, the grid."""
    columns = measured(study["runs"])
    titles = ["method", "trainable", "share of UNet + adapter", *columns.values(), "s/img", "peak GiB", "adapter MB"]
    lines = [titles, ["---"] * len(titles)]
    for row in study["methods"]:
        losses = [f"{row[loss]:.4f} ± {row[f'{loss}_std']:.4f}" for loss in columns]
        peak = "only on a GPU" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        what = [row["method"], f"{row['trainable']:,}", f"{row['share_percent']:.2f} %"]
        lines.append([*what, *losses, f"{row['s_per_img']:.4f}", peak, f"{row['adapter_mb']:.1f}"])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# The methods at equal budget\n\n{table}\n\n{conclusion(study, demo)}\n\n![grid](compare.png)\n"


def conclusion(study, demo):
    """One paragraph: which differences exceed the spread over seeds, and which do not."""
    n, steps, first = (study["methods"][0][key] for key in ("seeds", "steps", "method"))
    said = [
        f"n = {n} seeds, {steps} steps each; ± is the standard deviation over the seeds. The runs of a seed see the same samples with the",
        f"same noise and hold out the same ones, so each method is compared with {first} seed by seed: mean difference ± its standard error.",
        f"One of more than {T_95[min(n, max(T_95))]} standard errors counts as different; chance alone exceeds that once in twenty.",
    ]
    columns = {**LOSSES, **SCORES}
    for loss, beyond in itertools.product(columns, (True, False)):
        rows = [row for row in study["differences"] if row["loss"] == loss and row["beyond_chance"] == beyond]
        named = ", ".join(f"{row['method']} ({row['mean']:+.5f} ± {row['standard_error']:.5f})" for row in rows)
        said += (
            [f"By {columns[loss]}, {'different' if beyond else 'not to be told'} from {first}: {named}."]
            if rows
            else []
        )
    from common.cli.demo_settings import is_tiny

    random_model = (
        "The demo model's weights are random here: this shows that the comparison works, not which method is better."
    )
    return " ".join(said + [random_model] * (demo and is_tiny()))


if __name__ == "__main__":
    run(main)
