"""Puts the tables of measured runs into a Markdown file, or checks that they are there.

    python benchmarks/table.py docs/benchmarks.json README.md [--check]

The JSON is what `train_step.py --label LABEL --out FILE` collects. Between the lines `<!-- table LABEL -->` and `<!-- end -->` stand
the runs of that label: GPU, commit and command, and a table of their rows. `--check` writes nothing; it exits 1 where text and JSON differ.
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
COLUMNS = [  # (title, key of a row, format)
    ("images a step", "images_per_step", "{}"),
    ("s/img", "s_per_img", "{:.4f}"),
    ("GPU busy s/img", "gpu_busy_s_per_img", "{:.4f}"),
    ("allocated GiB", "peak_allocated_gib", "{:.2f}"),
    ("reserved GiB", "peak_reserved_gib", "{:.2f}"),
    ("RAM GiB", "ram_gib", "{:.2f}"),
    ("matmul share", "matmul_share", "{:.1%}"),
    ("first step s", "first_step_s", "{:.1f}"),
]
SETTINGS = ("gpu", "torch", "commit", "cap_gib", "as_t4", "fixed", "flags")  # runs that share them share a table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="JSON", help="file written by train_step.py --out")
    parser.add_argument("text", type=Path, metavar="MARKDOWN", help="file with the markers")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when the file is not what the JSON gives"
    )
    options = parser.parse_args(argv)
    try:
        before = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.text}: cannot be read ({error})") from None
    after = filled(before, read_runs(options.runs), options.text)
    if options.check and after != before:
        sys.exit(
            f"{options.text} is not what {options.runs} gives: run python benchmarks/table.py {options.runs} {options.text}"
        )
    if not options.check:
        options.text.write_text(after, encoding="utf-8")


def read_runs(path):
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


def filled(text, runs, path):
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
    return BLOCK.sub(
        lambda block: _block(block["label"], [measured for measured in runs if measured["label"] == block["label"]]),
        text,
    )


def _block(label, runs):
    """Markers and what stands between them: a line on how they were measured and a table, for all runs of equal settings at a time."""
    parts = [f"<!-- table {label} -->"]
    for _, alike in itertools.groupby(runs, key=lambda measured: [measured[name] for name in SETTINGS]):
        alike = list(alike)
        commands = ", ".join(f"`{command}`" for command in dict.fromkeys(measured["command"] for measured in alike))
        parts += [
            f"{_machine(alike[0])}: {commands}",
            "",
            markdown([row for measured in alike for row in measured["rows"]]),
            "",
        ]
    return "\n".join([*parts[:-1], "<!-- end -->"])


def _machine(measured):
    cap = f", held to {measured['cap_gib']:g} GiB" if measured["cap_gib"] else ""
    kernels = ", attention as on a T4" if measured["as_t4"] else ""
    return f"{measured['gpu']}{cap}{kernels}, torch {measured['torch']}, commit {measured['commit']}"


def markdown(rows):
    """Rows of a run as a Markdown table; one that failed says why, one that filled the caches is cold."""
    lines = ["| run | px | " + " | ".join(title for title, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        name, _, typed_px = row["row"].partition("@")
        if "failed" in row:
            cells = [textwrap.shorten(row["failed"].replace("|", "/"), 80, placeholder=" ...")] + [""] * (
                len(COLUMNS) - 1
            )
        else:
            cells = ["" if row[key] is None else shape.format(row[key]) for _, key, shape in COLUMNS]
            cells[-1] += "" if row["caches_warm"] else " (cold)"  # the first step waited for images, captions or plan
        lines.append(f"| {name} | {row.get('resolution', typed_px)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
