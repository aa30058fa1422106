"""What a run shows: one progress bar, metrics.jsonl, a tracker, training.png, and grids of labelled images."""

import importlib
import json
import os
from pathlib import Path

from tqdm import tqdm

# Notebooks cut the bar at 80 columns; the numbers come first and what is left belongs to the bar itself.
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
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
        self.path = Path(output_dir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_step] if resumed_step else []
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self.file = self.path.open("a")
        self.tracker = None
        if report_to != "none":
            tracker_class = getattr(importlib.import_module("accelerate.tracking"), TRACKERS[report_to])
            where = {"logging_dir": str(output_dir)} if report_to == "tensorboard" else {}
            self.tracker = tracker_class(Path(output_dir).name, **where)
            self.tracker.start()
            scalars = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
            self.tracker.store_init_configuration(scalars)

    def log(self, row):
        """One optimizer step: to the bar, the file and the tracker."""
        if not self.is_main:
            return
        self.bar.set_postfix_str(shown_numbers(row), refresh=False)
        self.bar.update()
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log({key: value for key, value in row.items() if isinstance(value, (int, float))}, step=row["step"])

    def say(self, line):
        """Print a line without breaking the bar."""
        if self.is_main:
            self.bar.write(line)

    def close(self):
        self.bar.close()
        if self.is_main:
            self.file.close()
            if self.tracker:
                self.tracker.finish()


def shown_numbers(row):
    """What the bar says of a step: "loss 0.1234 lr 1.0e-04 2.345 s/img 13.05 GiB"."""
    return f"loss {row['loss']:.4f} lr {row['lr']:.1e} {row['s_per_img']:.3f} s/img {row['peak_gib']:.2f} GiB"


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_training(output_dir):
    """training.png from metrics.jsonl: loss with a running mean, held-out loss, and the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(Path(output_dir) / "metrics.jsonl")
    if not rows:
        return
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[3, 1], constrained_layout=True)
    top.plot(steps, losses, color="0.75", linewidth=0.8, label="loss of each step")
    top.plot(steps, _running_mean(losses, max(5, len(losses) // 20)), color="tab:blue", label="running mean")
    held_out = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if held_out:
        top.plot(*zip(*held_out), color="tab:red", marker="o", markersize=3, label="held-out mse")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.plot(steps, [row["lr"] for row in rows], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(output_dir) / "training.png", dpi=120)
    plt.close(figure)


def _running_mean(values, window):
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def save_png(path, image, text):
    """Write a PIL image as PNG with `text` {chunk name: str} in it; a reader finds all of it or nothing."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    partial = path.with_name(path.name + ".partial")
    image.save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


CELL_PX, GAP_PX = (256, 512), 10
PAPER, INK, PALE_INK = "#ffffff", "#1c1c22", "#77777f"


def grid(rows, column_titles, row_labels, footer):
    """One labelled picture of many: titles on top, labels at the left, `footer` in small print below.

    Args:
        rows: list of rows of PIL images, all of one size. A side is drawn with 256 to 512 px: less cannot be seen beside its
            label, more makes a file that nobody can send.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    side = min(max(rows[0][0].width, CELL_PX[0]), CELL_PX[1])
    letters = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # Pillow's own font stops at ASCII
    font, small = ImageFont.truetype(letters, side / 14), ImageFont.truetype(letters, side / 20)
    left = side * 2 // 3
    titles = [_wrap(title, font, side) for title in column_titles]
    top = max(_height(title, font) for title in titles) + 2 * GAP_PX
    width = left + len(titles) * (side + GAP_PX) + GAP_PX
    footer = _wrap(footer, small, width - 2 * GAP_PX)
    height = top + len(rows) * (side + GAP_PX) + _height(footer, small) + GAP_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        x = left + GAP_PX + j * (side + GAP_PX) + side // 2
        pen.multiline_text((x, top - GAP_PX), title, INK, font, anchor="md", align="center")
    for i, (label, images) in enumerate(zip(row_labels, rows)):
        y = top + i * (side + GAP_PX)
        pen.multiline_text((GAP_PX, y + side // 2), _wrap(label, font, left - GAP_PX), INK, font, anchor="lm")
        for j, image in enumerate(images):
            # Enlarged pixels stay sharp: a small image should look like what it is.
            method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((side, side), method), (left + GAP_PX + j * (side + GAP_PX), y))
    pen.multiline_text((GAP_PX, height - GAP_PX), footer, PALE_INK, small, anchor="ld")
    return sheet


def _wrap(text, font, width_px):
    """`text` broken into lines that fit; a word that is too long alone is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width_px:
            fitting = next(n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width_px)
            lines.append(word[:fitting])
            word = word[fitting:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(line for line in lines if line)


def _height(text, font):
    from PIL import Image, ImageDraw

    return ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)[3]
