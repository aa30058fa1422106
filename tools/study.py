"""Trains LoRA, QLoRA aggressive, QLoRA normal and DoRA at equal budget with several seeds.

    python tools/study.py --demo
    python tools/study.py --seeds 3 -- --train_data_dir FOLDER

Flags after `--` go to every trainer. The same command goes on where the last one was stopped: finished runs stay as
they are, one that was cut short continues from its checkpoint. Writes study.md (a table and a paragraph, made by
tools/study_results.py), study.json and compare.png.
"""

import dataclasses
import importlib
import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.cli.command_line import parse
from common.cli.flag_checks import check
from common.cli.flag_facts import flag
from common.cli.flags import TrainFlags
from common.cli.model_flags import ModelFlags
from common.cli.running import run
from common.errors import UserError
from tools.study_results import SCORES, compare, markdown, summarize

# name -> trainer, and what makes its defaults those of the comparison
METHODS = {
    "LoRA": ("train_sdxl", "--lora_rank 16 --lora_alpha 32 --lora_dropout 0.1 --use_8bit_adam"),
    "QLoRA aggressive": ("train_qlora", "--strategy aggressive"),
    "QLoRA normal": ("train_qlora", "--strategy normal"),
    "DoRA": ("train_dora", ""),
}
# The same for what train_opt adds to plain LoRA: all of it, and all of it but one
OPTIONS = {
    "train_opt": ("train_opt", ""),
    "without EMA": ("train_opt", "--no_use_ema"),
    "without Min-SNR": ("train_opt", "--min_snr_gamma none"),
    "without offset noise": ("train_opt", "--offset_noise_strength 0"),
}
# A measured plan would give each method another number of images a pass, and so another peak and speed.
BUDGET = "--no_auto_fit --checkpoints_total_limit 1"
FULL_BUDGET = f"--resolution 512 --num_train_epochs 3 --lr_warmup_steps 10 {BUDGET}"
DEMO_BATCH = "--train_batch_size 8 --gradient_accumulation_steps 1 --no_gradient_checkpointing"
DEMO_BUDGET = f"--demo --learning_rate 1e-3 {DEMO_BATCH} {BUDGET}"
FIRST_SEED = 42
SCORED_IMAGES = 16
# Marks a run's folder; final weights alone do not, because a run that was stopped writes them too
FINISHED = "finished.json"


@dataclass
class Flags:
    """Compare the four methods, or train_opt with and without its options, at equal budget.

    Flags after -- go to every trainer.
    """

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
    recipe: list[str]
    folder: Path

    @property
    def argv(self) -> list[str]:
        return [*self.recipe, "--output_dir", str(self.folder), "--resume_from_checkpoint", "latest"]


def main(argv: Sequence[str] | None = None) -> dict | None:
    """Train what is not trained yet, then write the results; returns what study.json says."""
    # Every mistake is answered before anything is trained
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    flags = parse(Flags, own)
    trainings = plan(flags, argv[len(own) + 1 :])
    resolved = [check_training(training) for training in trainings][0]
    shown = [training.folder for training in trainings if training.seed == FIRST_SEED]
    grid = grid_argv(flags, resolved, shown)
    if flags.dry_run:
        return print_commands(trainings, grid)

    import infer
    from common import files

    # Train what is not trained yet
    for number, training in enumerate(trainings, 1):
        print(f"[{number}/{len(trainings)}] {training.method}, seed {training.seed}", flush=True)
        train(training)

    # What the runs say, as numbers, as text and as pictures
    rows = [measure(training) for training in trainings]
    study = {"methods": summarize(rows, unet_parameters(resolved)), "differences": compare(rows), "runs": rows}
    infer.main(grid)
    files.write_json(Path(flags.output_dir) / "study.json", study)
    Path(flags.output_dir, "study.md").write_text(markdown(study, demo=flags.demo))
    print(f"study.md, study.json and compare.png are in {flags.output_dir}")
    return study


def print_commands(trainings: list[Training], grid: list[str]) -> None:
    """What --dry_run shows: the command lines of the study."""
    for training in trainings:
        print(shlex.join(["python", f"{training.script}.py", *training.argv]))
    print(shlex.join(["python", "infer.py", *grid]))


def plan(flags: Flags, trainer_flags: list[str]) -> list[Training]:
    """Every Training, seed by seed.

    Raises:
        UserError: for a flag of the study that cannot work.
    """
    if flags.seeds < 2:
        raise UserError(f"--seeds {flags.seeds}: must be at least 2; one run has no spread to measure a difference by")
    if not 0 < flags.validation_split < 1:
        raise UserError(f"--validation_split {flags.validation_split}: must be more than 0 and less than 1")

    # What all of them share
    compared = METHODS if flags.of == "methods" else OPTIONS
    budget = [*(DEMO_BUDGET if flags.demo else FULL_BUDGET).split(), *trainer_flags]
    seeds = range(FIRST_SEED, FIRST_SEED + flags.seeds)

    # A run for each seed and method
    trainings = []
    for seed, (method, (script, technique)) in itertools.product(seeds, compared.items()):
        recipe = [*technique.split(), *budget, "--validation_split", str(flags.validation_split), "--seed", str(seed)]
        trainings.append(Training(method, seed, script, recipe, Path(flags.output_dir) / f"seed_{seed}" / method))
    return trainings


def check_training(training: Training) -> TrainFlags:
    """The trainer's flags as it will see them.

    Raises:
        UserError: if the trainer would refuse them, or its folder holds a run made with others.
    """
    flags = parse(importlib.import_module(training.script).Flags, training.argv)
    check(flags)
    if (training.folder / FINISHED).exists() and read_finished(training)["recipe"] != training.recipe:
        found = f"{training.folder} was trained with other flags (see its {FINISHED})"
        raise UserError(f"--output_dir: {found}; name another folder")
    return flags


def read_finished(training: Training) -> dict:
    """What marks a run as finished: {"recipe", "device", scores}.

    Raises:
        UserError: if it cannot be read.
    """
    marker = training.folder / FINISHED
    try:
        finished = dict(json.loads(marker.read_text()))
        return {**finished, "recipe": list(finished["recipe"]), "device": str(finished["device"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--output_dir: {marker} is damaged; remove the run's folder to train it again") from None


def grid_argv(flags: Flags, resolved: TrainFlags, folders: list[Path]) -> list[str]:
    """infer.py's command line: a column for each folder, on the model of the trainers' flags."""
    model = []
    for field in dataclasses.fields(ModelFlags):
        value = getattr(resolved, field.name)
        if field.name in ("demo", "dry_run") or value is field.default is None:
            continue
        if isinstance(value, bool):
            model.append(f"--{'' if value else 'no_'}{field.name}")
        else:
            model += [f"--{field.name}", str(value)]
    place = ["--resolution", str(resolved.resolution), "--output_dir", flags.output_dir]
    return ["--compare", *["--demo"] * flags.demo, *model, *place, "--lora", *map(str, folders)]


# ---------------------------------------------------------------- training and measuring


def train(training: Training) -> None:
    """Train to the end, from a checkpoint if there is one, unless that was done before.

    Raises:
        UserError: if the run was stopped.
    """
    from accelerate import PartialState

    from common import files

    if (training.folder / FINISHED).exists():
        return
    ended = importlib.import_module(training.script).main(training.argv)["ended"]
    if ended != "finished":
        cure = "only whole runs are compared, the same command goes on"
        raise UserError(f"{training.method}, seed {training.seed}: {ended}; {cure}")
    scores = score(training.folder) if "--demo" in training.recipe else {}
    finished = {"recipe": training.recipe, "device": PartialState().device.type, **scores}
    files.write_json(training.folder / FINISHED, finished)


def score(folder: Path) -> dict[str, float]:
    """What a run of the demo's trained model has learnt and kept: {"style": share, "attributes": share}.

    The averaged weights are judged where there are some. The random model has no scores.
    """
    from common.cli.demo_settings import is_tiny
    from demo import score as demo_score

    if is_tiny():
        return {}
    averaged = folder / "ema_unet"
    scores = demo_score.of_adapter(averaged if averaged.exists() else folder, SCORED_IMAGES)
    return {key: scores[key][0] for key in SCORES}


def measure(training: Training) -> dict:
    """The figures of a finished run.

    `mse` is the mean over the last quarter of its steps. `peak_gib` is None on a CPU, where the process's peak includes
    the runs before.
    """
    from common.adapter_files import diffusers_format
    from common.train import report

    # What the run left behind
    steps = report.read_metrics(training.folder / "metrics.jsonl")
    last_quarter = steps[len(steps) * 3 // 4 :]
    weights = training.folder / diffusers_format.WEIGHTS
    finished = read_finished(training)

    # A row of study.json
    return dict(
        **{key: finished[key] for key in SCORES if key in finished},
        method=training.method,
        seed=training.seed,
        steps=len(steps),
        mse=statistics.fmean(step["mse"] for step in last_quarter),
        val_loss=steps[-1]["val_loss"],
        s_per_img=statistics.median(step["s_per_img"] for step in steps),
        peak_gib=max(step["peak_gib"] for step in steps) if finished["device"] == "cuda" else None,
        trainable=count(weights),
        adapter_mb=weights.stat().st_size / 1e6,
    )


def count(file: Path) -> int:
    """How many numbers a safetensors file holds; only its header is read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def unet_parameters(flags: ModelFlags) -> int:
    """Parameters of the frozen UNet that a trainer's flags name."""
    from common.model import loading, weights

    model = loading.model_of(flags)
    return sum(count(file) for file in weights.weight_files(model.folder / "unet", model.variant))


if __name__ == "__main__":
    run(main)
