"""Does speed change what is computed? One trainer twice at one seed: as it comes, and plainly.

    python benchmarks/exactness.py --out exactness.json --steps 200 -- --pretrained_model_name_or_path M --train_data_dir I
    python benchmarks/exactness.py --plot exactness.json exactness.png

As it comes: CUDA graph, fused layers, measured plan. Plainly: PEFT's layers, launched from Python, the documented micro-batch.
The last line is JSON: the median and the largest relative difference of the losses, and how many times as fast the first run is.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RUNS = {"as it comes": [], "plainly": ["--no_cuda_graph", "--lora_backend", "peft", "--no_auto_fit"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_opt", help="trainer (default: train_opt)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--out", default="exactness.json", help="where the losses go (default: exactness.json)")
    parser.add_argument("--plot", nargs=2, metavar=("JSON", "PNG"), help="train nothing, plot an earlier result")
    parser.add_argument("flags", nargs="*", help="after --: flags for both runs")
    options = parser.parse_args()
    if options.plot:
        return plot(json.loads(Path(options.plot[0]).read_text()), options.plot[1])
    runs = {name: losses_of(options.script, [*options.flags, *flags], options.steps) for name, flags in RUNS.items()}
    Path(options.out).write_text(json.dumps(dict(script=options.script, flags=options.flags, runs=runs)))
    print(json.dumps(compared(runs)))


def losses_of(script, flags, steps):
    """{"loss": [...], "s_per_img": median} of a run of `steps` steps in a folder that is removed afterwards."""
    from common import report

    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--max_train_steps", str(steps), "--checkpointing_steps", "0", "--output_dir", folder]
        importlib.import_module(script).main([*flags, *fixed])
        rows = report.read_metrics(Path(folder) / "metrics.jsonl")
    return {"loss": [row["loss"] for row in rows], "s_per_img": statistics.median(row["s_per_img"] for row in rows)}


def differences(runs):
    """Relative difference of the losses, step by step."""
    fast, plain = (runs[name]["loss"] for name in RUNS)
    return [abs(a - b) / abs(b) for a, b in zip(fast, plain, strict=True)]


def compared(runs):
    relative = differences(runs)
    speed = runs["plainly"]["s_per_img"] / runs["as it comes"]["s_per_img"]
    return dict(steps=len(relative), median=statistics.median(relative), largest=max(relative), times_as_fast=round(speed, 1))


def plot(result, place):
    """Both curves, and below them their relative difference on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[2, 1], constrained_layout=True)
    for (name, run), style in zip(result["runs"].items(), ("-", "--")):
        top.plot(range(1, len(run["loss"]) + 1), run["loss"], style, linewidth=1.2, label=f"{name}: {run['s_per_img']:.3f} s/img")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.semilogy(
        range(1, len(run["loss"]) + 1), [max(value, 1e-8) for value in differences(result["runs"])], color="tab:red", linewidth=0.8
    )
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("optimizer step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=110)


if __name__ == "__main__":
    main()
