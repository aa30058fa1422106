"""The suite in the package sets of its users' machines, as CPU builds.

    python tools/hosts.py kaggle colab     # every notebook on hosts/*.txt with the install line on top
    python tools/hosts.py newest           # every script on what requirements.txt brings today
    python tools/hosts.py latest           # the same without its upper bounds: warns of what is coming

Kaggle and Colab are run twice: the second time the install line upgrades all that it may. Environments are made anew
in .venv-hosts/, executed notebooks are kept in outputs/hosts/. A table of what was run ends the output. Anything that
fails ends it at once. Each takes minutes and 3 GB of disk.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import requirements  # noqa: E402

ENVIRONMENTS = ROOT / ".venv-hosts"
KEPT = ROOT / "outputs" / "hosts"
TORCH = "torch==2.13.0"  # of these versions the one with a small CPU build
NEED_THEIR_OWN_TORCH = ("torch", "torchvision", "timm")
SHOWN = ("transformers", "diffusers", "peft", "accelerate")  # packages whose versions the table names
DEMOS = (
    "train_sdxl.py --train_text_encoder",
    "train_opt.py",
    "train_qlora.py",
    "train_dora.py",
    "infer.py --compare --lora {kept}/0 {kept}/1 {kept}/2 {kept}/3",
)


class Row(NamedTuple):
    """One line of the closing table."""

    packages: str
    installed: str
    ran: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=["kaggle", "colab", "newest", "latest"])
    rows = [row for name in parser.parse_args().sets for row in run_set(name)]
    print("\n| packages | the install line | what was run |\n|---|---|---|")
    print("\n".join(f"| {row.packages} | {row.installed} | {row.ran} |" for row in rows))


def run_set(name: str) -> list[Row]:
    if name in ("kaggle", "colab"):
        host = make_host(name)
        return [run_host(name, host), run_host(f"{name}, upgraded", host, "--upgrade")]
    return [run_newest(name)]


# ---------------------------------------------------------------- Kaggle and Colab


def make_host(name: str) -> Path:
    """An environment with what the host has preinstalled -> its site-packages."""
    wanted = []
    for line in (ROOT / "hosts" / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#") and line.partition("==")[0] not in NEED_THEIR_OWN_TORCH:
            wanted.append(line)
    python = make_environment(name)
    pip(python, [TORCH, *wanted])
    return site_packages(python)


def run_host(name: str, host: Path, *options: str) -> Row:
    """The install line on top of a host's packages, which stay as they are for the next one; then every notebook."""
    python = make_environment(f"{name.replace(', ', '-')}-on-top")
    (site_packages(python) / "host.pth").write_text(f"{host}\n")

    # The install line, with its seconds and megabytes
    started_s = time.monotonic()
    said = pip(python, [*options, *requirements()])
    seconds = time.monotonic() - started_s
    sizes = re.findall(r"(?:Downloading|Using cached) .*\(([\d.]+) (kB|MB)\)", said)
    megabytes = sum(float(size) / (1000 if unit == "kB" else 1) for size, unit in sizes)
    conflicts = "" if "dependency conflicts" not in said else ", with conflicts"
    if conflicts and not options:
        sys.exit(f"{name}: the install line breaks what the host has\n{said}")

    # Every notebook in its --demo form, then an interrupt in this host's own kernel
    ran = notebooks(python, name)
    pip(python, ["pytest"])
    check(python, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/system/test_kernel.py"])
    versions = pinned(python, [*SHOWN, "ipykernel"])
    installed = f"{seconds:.0f} s, {megabytes:.0f} MB{conflicts}"
    return Row(f"{name}: {versions}", installed, f"{ran}; interrupt in its kernel")


def notebooks(python: Path, name: str) -> str:
    """Execute all, keep them -> what is said about it."""
    started_s = time.monotonic()
    check(python, ["tools/bundle.py", "--execute", "--keep", KEPT / name.replace(", ", "-")])
    return f"every notebook, {time.monotonic() - started_s:.0f} s"


# ---------------------------------------------------------------- the newest packages


def run_newest(name: str) -> Row:
    """What the ranges, or without them the registry, bring today; the demo of every script."""
    python = make_environment(name)
    wanted = requirements()
    if name == "latest":
        wanted = [re.match(r"[\w-]+", line)[0] for line in wanted]
    started_s = time.monotonic()
    pip(python, [TORCH, *wanted])
    seconds = time.monotonic() - started_s

    # The last demo renders with the adapters of those before
    for number, demo in enumerate(DEMOS):
        script, *flags = demo.format(kept=KEPT / name).split()
        check(python, [script, "--demo", *flags, "--output_dir", KEPT / name / str(number)])
    versions = pinned(python, [*SHOWN, "datasets"])
    return Row(f"{name}: {versions}", f"{seconds:.0f} s with torch", f"demo of {', '.join(DEMOS)}")


# ---------------------------------------------------------------- environments


def make_environment(name: str) -> Path:
    """A new, empty one -> its Python."""
    folder = ENVIRONMENTS / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(KEPT / name, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def site_packages(python: Path) -> Path:
    (folder,) = python.parents[1].glob("lib/python3.*/site-packages")
    return folder


def pip(python: Path, arguments: list[str]) -> str:
    """pip install -> what it said."""
    print(f"pip install {' '.join(arguments)[:110]} ...", flush=True)
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    done = subprocess.run([*install, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout)
    return done.stdout


def pinned(python: Path, names: list[str]) -> str:
    """name version, name version of what is installed."""
    code = f"from importlib.metadata import version\nprint(', '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def check(python: Path, arguments: list[str | Path]) -> None:
    """Run in the repository as on a small machine without a GPU; a failure ends everything."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_DEMO": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(part) for part in (python, *arguments)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
