"""Can this machine run the suite, and which script? What is there, what is in the way, and what to type next.

python verify_setup.py [--json]

Needs nothing but Python. Exit status: 0 when the command it names can run, 1 when something is in the way, 2 for a
wrong flag.
"""

import argparse
import json
import platform
import sys
import textwrap
import time

if sys.version_info < (3, 11):  # noqa: UP036  the imports below would end in a traceback
    sys.exit("verify_setup.py: Python " + platform.python_version() + " is too old: the packages need 3.11 or newer")
if sys.platform == "win32":
    sys.exit("verify_setup.py: Windows itself is not supported: run it in WSL 2, or on Kaggle or Colab")

from collections.abc import Iterator
from dataclasses import asdict
from typing import NoReturn

from common.system import packages
from common.system.machine import OPTIONAL, Facts, probe
from common.system.verdict import SCRIPTS, Estimate, Script, Verdict, dotted, judge

WIDTH = 80  # of a notebook's output
SHOWN = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
LABEL = 11  # columns of the first word of a row


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; the flags are --json and --help\n")


def main(argv: list[str] | None = None) -> int:
    """Probe, judge, print; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    flags = parser.parse_args(argv)

    started_s = time.monotonic()
    facts = probe()
    verdict = judge(facts)
    if flags.json:
        print(as_json(facts, verdict, time.monotonic() - started_s))
    else:
        print(screen(facts, verdict))
    return 1 if verdict.problems else 0


def as_json(facts: Facts, verdict: Verdict, seconds: float) -> str:
    """Facts and verdict as one JSON object."""
    estimates = {command: found._asdict() for command, found in verdict.estimates.items()}
    named = {"attached": facts.attached._asdict(), "estimates": estimates}
    return json.dumps({**asdict(facts), **verdict._asdict(), **named, "seconds": round(seconds, 1)}, indent=2)


# ---------------------------------------------------------------- the screen


def screen(facts: Facts, verdict: Verdict) -> str:
    """Everything for a person to read, 80 columns wide; only commands and paths are longer."""
    # what was found, and what each script needs
    lines = [line for label, text in rows(facts) for line in wrapped(label, text)]
    if facts.gpus and not facts.gpus[0].fault:
        lines += ["", *script_table(verdict)]

    # what to know, what to mend, what to type
    for label, sentences in (("note", verdict.notes), ("PROBLEM", verdict.problems)):
        lines += [""] if sentences else []
        lines += [line for sentence in sentences for line in wrapped(label, sentence)]
    before = "when that is mended" if verdict.problems else "ready"
    return "\n".join([*lines, "", f"{before}:", f"    {verdict.command}"])


def rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """(label, text) of what was found."""
    # the machine
    python = f"Python {dotted(facts.python)}"
    yield "machine", f"{facts.host}, {python}, {facts.cores} CPU cores, {facts.ram_gib:.1f} GiB of RAM"
    for i, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        yield f"GPU {i}", f"{gpu.name} (sm_{major}{minor}), {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
    if not facts.gpus:
        yield "GPU", "none"

    # what is installed, and how it fared
    yield "packages", package_row(facts)
    if facts.smoke:
        results = {test: "ok" if result == "ok" else "FAILED" for test, result in facts.smoke.items()}
        yield "tried", ", ".join(f"{test} {result}" for test, result in results.items())
    if facts.matmul_tflops:
        yield "speed", f"{facts.matmul_tflops:.0f} TFLOP/s of fp16 matrix products"

    # where files come from and go to
    yield "disk", "free: " + ", ".join(f"{disk.free_gb:.0f} GB ({name})" for name, disk in facts.disks.items())
    for state in dict.fromkeys(facts.hub.values()):
        repo_ids = [repo_id for repo_id in facts.hub if facts.hub[repo_id] == state]
        yield "hub", f"{state}: {', '.join(repo_ids)}"
    for kind, folders in facts.attached._asdict().items():
        for folder in folders:
            yield "attached", f"{kind}: {folder}"


def package_row(facts: Facts) -> str:
    """How many of them there are, and the versions of those that matter most."""
    count = len(packages.REQUIREMENTS)
    versions = [f"{name} {facts.packages[name]}" for name in (*SHOWN, *OPTIONAL) if facts.packages[name]]
    return ", ".join([f"{count - len(facts.lacking)} of {count} ok", *versions])


def script_table(verdict: Verdict) -> Iterator[str]:
    """What the default run of each script needs, whether that is free, and how long it takes."""
    yield f"{'default run of':<34}{'needs':>9}  takes about, on GPU 0"
    for script in SCRIPTS:
        found = verdict.estimates[script.command]
        yield f"{script.command:<34}{found.needs_gib:>5.1f} GiB  {time_line(script, found)}"


def time_line(script: Script, found: Estimate) -> str:
    """How long the default run takes, where it fits and the rate of the GPU is known."""
    if not found.fits:
        return "does not fit"
    if found.hours is None:
        return "fits"
    length = f"{found.hours:.1f} h" if found.hours >= 1.5 else f"{found.hours * 60:.0f} min"
    digits = 1 if found.s_per_img >= 1 else 2
    return f"{length} ({script.images:,} images of {found.s_per_img:.{digits}f} s)"


def wrapped(label: str, text: str) -> Iterator[str]:
    """A labelled sentence in lines of 80 columns; a command after a line break stays in one piece."""
    sentence, _, command = text.partition("\n")
    indent = " " * LABEL
    whole = dict(break_on_hyphens=False, break_long_words=False)
    yield from textwrap.wrap(f"{label:<{LABEL}}{sentence}", WIDTH, subsequent_indent=indent, **whole)
    if command:
        yield f"{indent}{command}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("verify_setup.py: interrupted", file=sys.stderr)
        sys.exit(130)
