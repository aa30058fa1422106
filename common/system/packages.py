"""The packages the suite needs, in the ranges it was tested with. Nothing here imports them."""

import importlib.util
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version

# The same as requirements.txt, which a one-file script does not have beside it.
# Floors: what Kaggle and Colab ship with (hosts/). Upper bounds: the newest minor release that was tested.
REQUIREMENTS = {
    "torch": ">=2.6",  # transformers switches PyTorch off below
    "diffusers": ">=0.37.1,<0.43",
    "transformers": ">=5.0,<5.25",
    "peft": ">=0.19.1,<0.22",
    "accelerate": ">=1.13,<1.16",
    "bitsandbytes": ">=0.50.2,<0.51",
    "datasets": ">=4.0,<5.3",
    "argparse-dataclass": ">=2.0,<3",
    "huggingface_hub": ">=1.11,<2.5",
    "safetensors": ">=0.7,<0.9",
    "tqdm": ">=4.67",
    "pillow": ">=11.3",
    "numpy": ">=2.0",
    "psutil": ">=5.9.5",
    "matplotlib": ">=3.10",
}
MODULES = {"argparse-dataclass": "argparse_dataclass", "pillow": "PIL"}  # where the name to import is another one
WHERE_USED = ("bitsandbytes",)  # asked for by the flags that use it


def lacking() -> dict[str, str | None]:
    """{package: its version, or None when it is absent} of what is missing or too old, those of WHERE_USED left out.

    The upper bounds are for pip: a newer package may well work.
    """
    found = {}
    for name, wanted in REQUIREMENTS.items():
        if name in WHERE_USED:
            continue
        if is_absent(name):
            found[name] = None
        elif (installed := installed_version(name)) and release(installed) < release(wanted.removeprefix(">=")):
            found[name] = installed
    return found


def is_absent(name: str) -> bool:
    return importlib.util.find_spec(MODULES.get(name, name)) is None


def installed_version(name: str) -> str | None:
    """None also where a package lies on the path without its metadata."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers a version or a list of bounds begins with: (2, 6, 0) of 2.6.0+cu124."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))


def refusal(found: dict[str, str | None]) -> str:
    """One line that names what `lacking` found, with the command that brings it."""
    said = ", ".join(f"{name} is missing" if has is None else f"{name} {has} is too old" for name, has in found.items())
    return f"{said}: pip install " + " ".join(f'"{name}{REQUIREMENTS[name]}"' for name in found)


def require_parser() -> None:
    """End with one line and exit status 2 where argparse-dataclass is absent: common.cli.command_line imports it."""
    if is_absent("argparse-dataclass"):
        print(f"{os.path.basename(sys.argv[0])}: error: {refusal(lacking())}", file=sys.stderr)
        sys.exit(2)
