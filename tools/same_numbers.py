"""Do two states of the code compute the same? All four trainers and infer.py in both, on the demo, compared bit by bit.

    python tools/same_numbers.py BEFORE AFTER            # folders of checkouts, or git revisions of this repository
    python tools/same_numbers.py main . --small          # with the trained demo model instead of the tiny one

Compared are the rows of metrics.jsonl without times and memory, every tensor and the metadata of every adapter file,
and the pixels of every picture. A line for each script says what was compared, below it what differs; that makes the
exit status 1. infer.py renders with the adapters of three trainers, so it needs them among the scripts. Every script
runs in a process of its own, on the CPU with one thread. Minutes.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RUNS = {  # script -> its flags; each writes to runs/SCRIPT
    "train_sdxl": "--train_text_encoder --lora_dropout 0.1",
    "train_opt": "--use_ema --save_peft --validation_split 0.25",
    "train_qlora": "--save_peft",
    "train_dora": "--use_ema",
    "infer": "--compare --num_images 2 --steps 3 --seed 7 --lora runs/train_sdxl runs/train_opt runs/train_dora:0.5",
}
TRAINING = "--max_train_steps 4 --checkpointing_steps 2 --validation_steps 4"
CLOCKS = ("s_per_img", "peak_gib", "seconds")  # fields of a metrics row that measure the machine
# Of metadata: keys that name this run and not what it computed.
OF_THIS_RUN = re.compile(r".*(sha\d*|xxh\d*|hash|fingerprint|path|dir|date|time|version|commit)s?(_.*)?", re.IGNORECASE)
MOST_SHOWN = 10  # differences of one script


class Outcome(NamedTuple):
    """What of one script was compared, and what differs."""

    compared: str
    differences: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="folder of a checkout, or a git revision")
    parser.add_argument("after", help="the same of the code that is compared with it")
    parser.add_argument("--small", action="store_true", help="train the demo's small model, not the tiny random one")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="scripts (default: all)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch, checkouts(options.before, options.after) as sides:
        homes = [Path(scratch) / name for name in ("before", "after")]
        for checkout, home in zip(sides, homes):
            run_all(options.only, checkout, home, tiny=not options.small)
        outcomes = {name: compared(*(home / "runs" / name for home in homes)) for name in options.only}
    for script, outcome in outcomes.items():
        report(script, outcome)
    sys.exit(any(outcome.differences for outcome in outcomes.values()))


def report(script: str, outcome: Outcome) -> None:
    """One line on how a script fared, and below it the first differences."""
    verdict = f"{len(outcome.differences)} differ" if outcome.differences else "equal"
    print(f"{script}: {verdict}: {outcome.compared}", flush=True)
    for line in outcome.differences[:MOST_SHOWN]:
        print(f"    {line}", flush=True)
    if len(outcome.differences) > MOST_SHOWN:
        print(f"    and {len(outcome.differences) - MOST_SHOWN} more", flush=True)


# ---------------------------------------------------------------- running


@contextlib.contextmanager
def checkouts(*names: str) -> Iterator[list[Path]]:
    """Inside, every folder as it is and every git revision as a worktree of its own."""
    with contextlib.ExitStack() as stack:
        yield [Path(name).resolve() if Path(name).is_dir() else stack.enter_context(worktree(name)) for name in names]


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkout"
        added = git("worktree", "add", "--detach", str(folder), revision)
        if added.returncode != 0:
            sys.exit(f"{revision}: neither a folder nor a git revision ({added.stderr.strip().splitlines()[-1]})")
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def run_all(scripts: list[str], checkout: Path, home: Path, *, tiny: bool) -> None:
    """Run scripts of one side in a new folder that becomes `home`, caches and all: both sides see the same paths."""
    here = home.with_name("here")
    here.mkdir()
    for script in scripts:
        run_script(script, checkout, here, tiny=tiny)
    here.rename(home)


def run_script(script: str, checkout: Path, here: Path, *, tiny: bool) -> None:
    """Run a script in the folder `here`; a failure ends everything."""
    flags = [*RUNS[script].split(), *([] if script == "infer" else TRAINING.split())]
    command = [sys.executable, checkout / f"{script}.py", "--demo", *flags, "--output_dir", f"runs/{script}"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    caches = {"XDG_CACHE_HOME": str(here / "cache"), "HF_HOME": str(here / "hub"), "HF_HUB_OFFLINE": "1"}
    machine = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    demo = {"TINY_DEMO": "1" if tiny else "0"}
    environment = {**os.environ, **threads, **caches, **machine, **demo}
    environment.pop("PYTHONPATH", None)  # each side imports its own modules

    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{script} of {checkout} failed:\n{done.stdout}{done.stderr}")


# ---------------------------------------------------------------- comparing


def compared(before: Path, after: Path) -> Outcome:
    """What two runs of one script left in their folders."""
    counts = dict.fromkeys(("rows", "files", "tensors", "pictures"), 0)
    differences = []
    for name in sorted({path.relative_to(side) for side in (before, after) for path in results_in(side)}):
        pair = (before / name, after / name)
        if not all(file.exists() for file in pair):
            differences.append(f"{name}: only {'after' if pair[1].exists() else 'before'}")
            continue

        # Each kind of file has its own comparison
        found, counted = COMPARISONS[name.suffix](*pair)
        differences += [f"{name}: {line}" for line in found]
        for what, number in counted.items():
            counts[what] += number
    if not any(counts.values()):
        differences.append("nothing was written that could be compared")
    return Outcome(", ".join(f"{number} {what}" for what, number in counts.items() if number), differences)


def results_in(folder: Path) -> Iterator[Path]:
    """Metrics, adapter files and pictures; not checkpoints, whose layout is the code's own affair."""
    for path in folder.rglob("*"):
        in_checkpoint = any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts)
        if path.suffix in COMPARISONS and not in_checkpoint:
            yield path


def metrics(file: Path) -> dict[str, object]:
    """{"step 3": the row's numbers without clocks}; JSON keeps every bit of a float."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    numbered = ((number, key, value) for number, row in enumerate(rows, 1) for key, value in row.items())
    return {f"row {number}, {key}": value for number, key, value in numbered if key not in CLOCKS}


def tensors(file: Path) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)}."""
    from safetensors.torch import load_file

    return {name: (str(tensor.dtype), tuple(tensor.shape), _bytes(tensor)) for name, tensor in load_file(file).items()}


def _bytes(tensor) -> bytes:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def metadata(file: Path) -> dict[str, object]:
    """The metadata of a safetensors file, texts that hold JSON opened, without what is of this run alone."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        found = opened.metadata() or {}
    return dict(flattened("metadata", {key: opened_json(value) for key, value in found.items()}))


def opened_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def flattened(name: str, value: object) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every leaf of nested dictionaries whose keys say something of the numbers."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        if not OF_THIS_RUN.fullmatch(key):
            yield from flattened(f"{name}.{key}", inner)


def mapping_differences(before: dict, after: dict) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            yield f"{name}: only {'before' if name in before else 'after'}"
        elif repr(before[name]) != repr(after[name]):
            shown = [repr(side[name]) for side in (before, after)]
            yield f"{name}: {' -> '.join(shown)}" if max(map(len, shown)) < 60 else f"{name}: other values"


def picture_differences(before: Path, after: Path) -> Iterator[str]:
    from PIL import Image, ImageChops

    with Image.open(before) as a, Image.open(after) as b:
        if (a.size, a.mode) != (b.size, b.mode):
            yield f"{a.mode} of {a.size} -> {b.mode} of {b.size}"
        elif a.tobytes() != b.tobytes():
            extrema = ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema()
            yield f"pixels differ by up to {max(high for _, high in extrema)} of 255"


def compare_metrics(before: Path, after: Path) -> tuple[list[str], dict[str, int]]:
    return list(mapping_differences(metrics(before), metrics(after))), {"rows": len(before.read_text().splitlines())}


def compare_adapters(before: Path, after: Path) -> tuple[list[str], dict[str, int]]:
    weights = tensors(before)
    differences = [
        *mapping_differences(weights, tensors(after)),
        *mapping_differences(metadata(before), metadata(after)),
    ]
    return differences, {"files": 1, "tensors": len(weights)}


def compare_pictures(before: Path, after: Path) -> tuple[list[str], dict[str, int]]:
    return list(picture_differences(before, after)), {"pictures": 1}


# suffix -> (before, after) -> (what differs, what was compared)
COMPARISONS = {".jsonl": compare_metrics, ".safetensors": compare_adapters, ".png": compare_pictures}


if __name__ == "__main__":
    main()
