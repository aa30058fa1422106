"""Does speed change what is computed? One trainer twice at one seed: as it comes, and plainly.

    python benchmarks/exactness.py --out exactness.json -- --pretrained_model_name_or_path M --train_data_dir I
    python benchmarks/exactness.py --plot exactness.json exactness.png

As it comes: CUDA graph, fused layers, measured plan. Plainly: PEFT's layers, launched from Python, the documented
micro-batch. The last line is JSON: the median and the largest relative difference of the losses, and how many times as
fast the first run is.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import files
from common.cli.running import run
from common.errors import UserError
from common.train import report

TRAINERS = ("train_sdxl", "train_opt", "train_qlora", "train_dora")
RUNS = {"as it comes": [], "plainly": ["--no_cuda_graph", "--lora_backend", "peft", "--no_auto_fit"]}
Runs = dict[str, dict]  # name of RUNS -> {"loss": one of every step, "s_per_img": median}


def main(argv: list[str] | None = None) -> None:
    """Train twice and compare, or plot an earlier comparison."""
    options = parse(argv)
    if options.plot:
        return plot(read_runs(options.plot[0]), options.plot[1])

    # Refusals before the hours, not after them
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be at least 1")
    try:
        options.out.open("a").close()
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written ({error.strerror})") from None

    # Both runs and their comparison
    runs = {name: losses_of(options.script, [*options.flags, *flags], options.steps) for name, flags in RUNS.items()}
    files.write_json(options.out, dict(script=options.script, flags=options.flags, runs=runs))
    print(json.dumps(compared(runs)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_opt", choices=TRAINERS, help="trainer (default: train_opt)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    destination = "where the losses go (default: exactness.json)"
    parser.add_argument("--out", type=Path, default="exactness.json", help=destination)
    only_plot = "train nothing, plot an earlier result"
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "PNG"), help=only_plot)
    parser.add_argument("flags", nargs="*", help="after --: flags for both runs")
    return parser.parse_args(argv)


def losses_of(script: str, flags: list[str], steps: int) -> dict:
    """{"loss": [...], "s_per_img": median} of a run of `steps` steps in a folder that is removed afterwards.

    Raises:
        UserError: the run was stopped before its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--max_train_steps", str(steps), "--checkpointing_steps", "0", "--output_dir", folder]
        result = importlib.import_module(script).main([*flags, *fixed])
        if result["ended"] != "finished":
            stopped = f"{result['ended']} after step {result['step']} of {steps}"
            raise UserError(f"{stopped}: there is nothing to compare, and nothing was written")
        rows = report.read_metrics(Path(folder) / "metrics.jsonl")
    return {"loss": [row["loss"] for row in rows], "s_per_img": statistics.median(row["s_per_img"] for row in rows)}


def read_runs(place: Path) -> Runs:
    """The two runs that `--out` has written to `place`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        runs = json.loads(place.read_text(encoding="utf-8"))["runs"]
        same_length = len(runs["plainly"]["loss"]) == len(runs["as it comes"]["loss"])
        if same_length and all(run["s_per_img"] > 0 for run in runs.values()):
            return runs
        reason = "runs of different lengths"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"--plot {place}: not what --out writes ({reason})")


def differences(runs: Runs) -> list[float]:
    """Relative difference of the losses, step by step."""
    fast, plain = (runs[name]["loss"] for name in RUNS)
    return [abs(a - b) / abs(b) for a, b in zip(fast, plain, strict=True)]


def compared(runs: Runs) -> dict:
    """The comparison in four numbers, the last line that is printed."""
    relative = differences(runs)
    speed = runs["plainly"]["s_per_img"] / runs["as it comes"]["s_per_img"]
    return dict(
        steps=len(relative), median=statistics.median(relative), largest=max(relative), times_as_fast=round(speed, 1)
    )


def plot(runs: Runs, place: Path) -> None:
    """Both curves, and below them their relative difference on a logarithmic axis.

    Raises:
        UserError: `place` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Losses above
    layout = dict(figsize=(9, 6), sharex=True, height_ratios=[2, 1], constrained_layout=True)
    figure, (top, bottom) = plt.subplots(2, 1, **layout)
    relative = differences(runs)
    steps = range(1, len(relative) + 1)
    for (name, curve), style in zip(runs.items(), ("-", "--")):
        top.plot(steps, curve["loss"], style, linewidth=1.2, label=f"{name}: {curve['s_per_img']:.3f} s/img")
    top.set_ylabel("loss")
    top.legend(frameon=False)

    # Their difference below
    bottom.semilogy(steps, [max(value, 1e-8) for value in relative], color="tab:red", linewidth=0.8)
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("optimizer step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)

    # The picture's file
    try:
        figure.savefig(place, dpi=110)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise UserError(f"--plot {place}: cannot be written ({error})") from None


if __name__ == "__main__":
    run(main)
