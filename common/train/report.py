"""What a run shows: one progress bar, metrics.jsonl, a tracker, training.png, and grids of labelled images."""

import importlib
import json
from pathlib import Path

from tqdm import tqdm

from common.files import replacing

# Notebooks cut the bar at 80 columns; the numbers come first and what is left belongs to the bar itself.
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
REQUIRED = ("step", "loss", "mse", "lr")  # what makes a line of metrics.jsonl a row
TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker"}


class Report:
    """Numbers of a run, written by the main process only.

    Args:
        resumed_step: rows after it, from a run that was killed, are dropped from metrics.jsonl.
        report_to: "none", "tensorboard" or "wandb"; accelerate's trackers do the rest.
        config: the flags, for the tracker.
    """

    def __init__(self, output_dir, total_steps, resumed_step, report_to, config, is_main):
        self.is_main = is_main
        self.bar = tqdm(total=total_steps, initial=resumed_step, bar_format=BAR_FORMAT, disable=not is_main)
        if not is_main:
            return

        # Rows up to the step that is resumed are kept; metrics.jsonl grows from there.
        self.path = Path(output_dir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_step] if resumed_step else []
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a")
        self.plotted_rows = 0
        self.rows = len(kept)

        # A tracker takes scalars only as its configuration.
        self.tracker = None
        if report_to != "none":
            tracker_class = getattr(importlib.import_module("accelerate.tracking"), TRACKERS[report_to])
            where = {"logging_dir": str(output_dir)} if report_to == "tensorboard" else {}
            self.tracker = tracker_class(Path(output_dir).name, **where)
            self.tracker.start()
            scalars = {
                key: value if isinstance(value, (bool, int, float, str)) else str(value)
                for key, value in config.items()
            }
            self.tracker.store_init_configuration(scalars)

    def log(self, row):
        """One optimizer step: to the bar, the file and the tracker."""
        if not self.is_main:
            return
        self.bar.set_postfix_str(shown_numbers(row), refresh=False)
        self.bar.update()
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.rows += 1
        if self.tracker:
            self.tracker.log(
                {key: value for key, value in row.items() if isinstance(value, (int, float))}, step=row["step"]
            )
        if "val_loss" in row:
            self.plot()

    def plot(self):
        """Plot training.png anew, unless it shows all there is already.

        A picture is not worth a run: what goes wrong is said.
        """
        if not self.is_main or self.rows == self.plotted_rows:
            return
        self.plotted_rows = self.rows
        try:
            plot_training(self.path.parent)
        except Exception as error:
            self.say(f"training.png could not be drawn ({type(error).__name__}: {error})")

    def say(self, line):
        """Print a line without breaking the bar."""
        if self.is_main:
            self.bar.write(line)

    def close(self):
        self.bar.close()
        if self.is_main:
            self.file.close()
            self.plot()
            if self.tracker:
                self.tracker.finish()


def shown_numbers(row):
    """What the bar says of a step: "loss 0.1234 lr 1.0e-04 2.345 s/img 13.05 GiB"."""
    return f"loss {row['loss']:.4f} lr {row['lr']:.1e} {row['s_per_img']:.3f} s/img {row['peak_gib']:.2f} GiB"


def read_metrics(path):
    """Rows of a metrics.jsonl; a line that is damaged, or cut short by a kill, is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if all(isinstance(row[name], (int, float)) for name in REQUIRED):
                rows.append(row)
        except (ValueError, KeyError, TypeError):  # no JSON, or not a row of ours
            continue
    return rows


def plot_training(output_dir):
    """training.png from metrics.jsonl.

    A panel each shows the loss that is minimised, the mse beside the held-out mse, and the learning rate.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(Path(output_dir) / "metrics.jsonl")
    if not rows:
        return
    panels = [name for name in ("loss", "mse") if name == "mse" or any(row["loss"] != row["mse"] for row in rows)]
    figure = Figure(figsize=(9, 2.6 * len(panels) + 1.6), layout="constrained")
    *above, bottom = figure.subplots(len(panels) + 1, 1, sharex=True, height_ratios=[*[2] * len(panels), 1])
    for axis, name in zip(above, panels):
        _draw_loss(axis, rows, name)
    bottom.plot([row["step"] for row in rows], [row["lr"] for row in rows], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    for axis in (*above, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(Path(output_dir) / "training.png") as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw_loss(axis, rows, name):
    """One panel: `name` of each step, its running mean, and beside the mse that of the held-out images."""
    steps = [row["step"] for row in rows]
    values = [row[name] for row in rows]
    axis.plot(steps, values, color="0.75", linewidth=0.8, label="each step")
    axis.plot(steps, _running_mean(values, max(5, len(values) // 20)), color="tab:blue", label="running mean")
    held_out = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if held_out and name == "mse":
        axis.plot(*zip(*held_out), color="tab:red", marker="o", markersize=3, label="held out")
    axis.set_ylabel({"loss": "loss, as weighted", "mse": "mse"}[name])
    axis.legend(frameon=False)


def _running_mean(values, window):
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
