"""How the pages of the suite read, in numbers: the table of docs/log.md, and the limits that tests/test_house.py holds.

    python tools/house.py              # this checkout
    python tools/house.py ../other     # another one
    python tools/house.py --faults     # every place beyond a limit, as FILE:LINE

Counted are the scripts at the root and the files of common/; --faults looks into demo/, tools/ and benchmarks/ too.
"""

import argparse
import ast
import difflib
import io
import itertools
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ("train_sdxl.py", "train_opt.py", "train_qlora.py", "train_dora.py")

# The limits
STRETCH = 15  # lines of a body without a blank line or a comment
POSITIONAL = 5  # arguments of a call
WIDTH = 120  # columns
FUNCTION = 50  # lines without the docstring
FILE = 300  # lines
ENTRIES = 12  # of a folder of common/
DIFFERENCE = 50  # lines that `diff` shows between two trainers
WIDE = 110  # columns that are counted, and no fault

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Fault(NamedTuple):
    """One place beyond a limit."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--faults", action="store_true", help="every place beyond a limit")
    options = parser.parse_args()
    if options.faults:
        print(*faults(options.root), sep="\n")
    else:
        print(*(f"{what}: {number}" for what, number in measures(options.root).items()), sep="\n")


def pages(root: Path, *folders: str) -> list[Path]:
    """The Python files at the root and below `folders`."""
    below = (file for name in folders for file in (root / name).rglob("*.py"))
    return sorted([*root.glob("*.py"), *below])


def measures(root: Path) -> dict[str, float | str]:
    """The rows of the table, of the scripts and common/."""
    files = pages(root, "common")
    lines = [line for file in files for line in file.read_text().splitlines()]
    functions = [(file, function) for file in files for function in functions_of(file)]
    folders = {file.parent for file in files} - {root}

    # What is counted in relation to something
    stretches = [(longest_stretch(file, function)[0], file, function.name) for file, function in functions]
    longest, file, name = max(stretches, key=lambda row: row[0])
    comments = sum(map(comments_in, files)) / len(lines)
    wide = sum(len(line) > WIDE for line in lines) / len(lines)
    parallel = sum(map(parallel_assignments, files)) / len(lines)

    # The rows of the table
    return {
        "longest stretch without blank line or comment": f"{longest} ({file.relative_to(root)} {name})",
        "comment lines, per cent": round(100 * comments, 1),
        "lines over 120": sum(len(line) > WIDTH for line in lines),
        "lines over 110, per cent": round(100 * wide, 1),
        "parallel assignments per 1,000 lines": round(1000 * parallel, 1),
        "calls with 6 or more positional arguments": sum(len(list(crowded_calls(file))) for file in files),
        "entries in the largest folder of common": max(len(entries(folder)) for folder in folders),
        "functions over 50 lines": sum(length(function) > FUNCTION for _, function in functions),
        "files over 300 lines": sum(len(file.read_text().splitlines()) > FILE for file in files),
        "largest diff of two trainers": max(differences(root).values()),
    }


def faults(root: Path) -> Iterator[Fault]:
    """Every place beyond a limit, in every folder but tests."""
    for file in pages(root, "common", "demo", "tools", "benchmarks"):
        for line, what in faults_of(file):
            yield Fault(file.relative_to(root), line, what)
    for folder in sorted({file.parent for file in pages(root, "common")} - {root}):
        if len(entries(folder)) > ENTRIES:
            yield Fault(folder.relative_to(root), 0, f"{len(entries(folder))} entries")
    for pair, count in differences(root).items():
        if count > DIFFERENCE:
            yield Fault(Path(pair[0]), 1, f"{count} lines of diff to {pair[1]}")


def faults_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, what is beyond a limit there) for every such place of one file."""
    # Its length and its width
    lines = file.read_text().splitlines()
    if len(lines) > FILE:
        yield 1, f"{len(lines)} lines"
    for number, line in enumerate(lines, 1):
        if len(line) > WIDTH:
            yield number, f"{len(line)} columns"

    # Its functions and its calls
    for function in functions_of(file):
        if length(function) > FUNCTION:
            yield function.lineno, f"{function.name} has {length(function)} lines"
        stretch, start = longest_stretch(file, function)
        if stretch > STRETCH:
            yield start, f"{stretch} lines of {function.name} without blank line or comment"
    for call in crowded_calls(file):
        yield call.lineno, f"{len(call.args)} positional arguments"


def functions_of(file: Path) -> list[Function]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    lines = function.end_lineno - function.lineno + 1
    return lines - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def longest_stretch(file: Path, function: Function) -> tuple[int, int]:
    """(lines, first line) of the longest run of a body's lines, each neither blank nor a comment."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0, function.lineno
    lines = file.read_text().splitlines()
    longest = (0, function.lineno)
    run = 0
    for number in range(body[0].lineno, function.end_lineno + 1):
        text = lines[number - 1].strip()
        run = run + 1 if text and not text.startswith("#") else 0
        longest = max(longest, (run, number - run + 1), key=lambda pair: pair[0])
    return longest


def comments_in(file: Path) -> int:
    """Lines that are, or end in, a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def parallel_assignments(file: Path) -> int:
    """Assignments of several values to several names that are no swap."""
    count = 0
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign):
            sides = (node.targets[0], node.value)
            if all(isinstance(side, ast.Tuple) for side in sides):
                taken, given = ({ast.unparse(item) for item in side.elts} for side in sides)
                count += given != taken
    return count


def crowded_calls(file: Path) -> Iterator[ast.Call]:
    """Calls with more positional arguments than a reader tells apart; `*values` counts as one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and len(node.args) > POSITIONAL:
            yield node


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]


def differences(root: Path) -> dict[tuple[str, str], int]:
    """{pair of trainers: lines that `diff` shows as removed or added}."""
    texts = {name: (root / name).read_text().splitlines() for name in TRAINERS}
    return {(a, b): _differing(texts[a], texts[b]) for a, b in itertools.combinations(TRAINERS, 2)}


def _differing(before: list[str], after: list[str]) -> int:
    return sum(line[:2] in ("- ", "+ ") for line in difflib.ndiff(before, after))


if __name__ == "__main__":
    sys.exit(main())
