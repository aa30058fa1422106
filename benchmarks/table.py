"""Puts the tables of measured runs into a Markdown file, or checks that they are there.

    python benchmarks/table.py docs/benchmarks.json README.md [--check]

The JSON is what `train_step.py --label LABEL --out FILE` collects. Between the lines `<!-- table LABEL -->` and
`<!-- end -->` stand the runs of that label: GPU, commit and command, and a table of their rows. `--check` writes
nothing; it exits 1 where text and JSON differ.
"""

import argparse
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli.running import run
from common.errors import UserError

BLOCK = re.compile(r"^<!-- table (?P<label>[^\n]+) -->\n(?P<text>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
# (title, key of a row, format)
COLUMNS = [
    ("images a step", "images_per_step", "{}"),
    ("s/img", "s_per_img", "{:.4f}"),
    ("GPU busy s/img", "gpu_busy_s_per_img", "{:.4f}"),
    ("allocated GiB", "peak_allocated_gib", "{:.2f}"),
    ("reserved GiB", "peak_reserved_gib", "{:.2f}"),
    ("RAM GiB", "ram_gib", "{:.2f}"),
    ("matmul share", "matmul_share", "{:.1%}"),
    ("first step s", "first_step_s", "{:.1f}"),
]
# Runs that share them share a table
SETTINGS = ("gpu", "torch", "commit", "cap_gib", "as_t4", "fixed", "flags")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        before = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.text}: cannot be read ({error})") from None
    after = filled(before, read_runs(options.runs), options.text)

    # Write it, or only compare
    if not options.check:
        options.text.write_text(after, encoding="utf-8")
    elif after != before:
        cure = f"run python benchmarks/table.py {options.runs} {options.text}"
        sys.exit(f"{options.text} is not what {options.runs} gives: {cure}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="JSON", help="file written by train_step.py --out")
    parser.add_argument("text", type=Path, metavar="MARKDOWN", help="file with the markers")
    check = "write nothing; exit 1 when the file is not what the JSON gives"
    parser.add_argument("--check", action="store_true", help=check)
    return parser.parse_args(argv)


def read_runs(path: Path) -> list[dict]:
    """The runs that train_step.py has written to `path`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(runs, list) and all(isinstance(row["row"], str) for measured in runs for row in measured["rows"]):
            return runs
        reason = "not a list of runs"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not a list of runs: {type(error).__name__}: {error}"
    raise UserError(f"{path}: {reason}")


def filled(text: str, runs: list[dict], path: str | Path) -> str:
    """`text` with what `runs` give between every pair of markers.

    Raises:
        UserError: `path` has no markers or unpaired ones, or names a label that no run has.
    """
    blocks = list(BLOCK.finditer(text))
    if not blocks:
        raise UserError(f"{path}: no line <!-- table LABEL --> with a line <!-- end --> below it")
    for block in blocks:
        if "<!-- table " in block["text"]:
            raise UserError(f"{path}: <!-- table {block['label']} --> has no line <!-- end -->")
        if not any(measured["label"] == block["label"] for measured in runs):
            raise UserError(f"{path}: <!-- table {block['label']} -->: no run has this label")

    # What stands between them
    def block_of(match):
        label = match["label"]
        return _block(label, [measured for measured in runs if measured["label"] == label])

    return BLOCK.sub(block_of, text)


def _block(label, runs):
    """Both markers, and between them a table for all runs of equal settings at a time, below how they were measured."""
    parts = [f"<!-- table {label} -->"]
    for _, group in itertools.groupby(runs, key=lambda measured: [measured[name] for name in SETTINGS]):
        group = list(group)
        commands = ", ".join(f"`{command}`" for command in dict.fromkeys(measured["command"] for measured in group))
        rows = [row for measured in group for row in measured["rows"]]
        parts += [f"{_machine(group[0])}: {commands}", "", markdown(rows), ""]
    return "\n".join([*parts[:-1], "<!-- end -->"])


def _machine(measured):
    """Where a run was measured, and with which code."""
    cap = f", held to {measured['cap_gib']:g} GiB" if measured["cap_gib"] else ""
    kernels = ", attention as on a T4" if measured["as_t4"] else ""
    return f"{measured['gpu']}{cap}{kernels}, torch {measured['torch']}, commit {measured['commit']}"


def markdown(rows: list[dict]) -> str:
    """Rows of a run as a Markdown table; one that failed says why, one that filled the caches is cold."""
    lines = ["| run | px | " + " | ".join(title for title, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        name, _, typed_px = row["row"].partition("@")
        cells = " | ".join(_failure(row["failed"]) if "failed" in row else _figures(row))
        lines.append(f"| {name} | {row.get('resolution', typed_px)} | {cells} |")
    return "\n".join(lines)


def _failure(reason):
    """Cells of a row that failed: the reason, then nothing."""
    return [textwrap.shorten(reason.replace("|", "/"), 80, placeholder=" ..."), *[""] * (len(COLUMNS) - 1)]


def _figures(row):
    """Cells of a row that was measured."""
    cells = ["" if row[key] is None else shape.format(row[key]) for _, key, shape in COLUMNS]
    cells[-1] += "" if row["caches_warm"] else " (cold)"  # the first step waited for images, captions or plan
    return cells


if __name__ == "__main__":
    run(main)
