"""The adapters that a command line means: PATH or PATH:SCALE, those that lie in outputs/, and their averaged weights.

Nothing here imports torch: an adapter that is not there is refused at once.
"""

import re
from pathlib import Path
from typing import NamedTuple

from common import run_folder
from common.errors import UserError

EMA_FOLDER = "ema_unet"


class Adapter(NamedTuple):
    """An adapter as the user named it: a file or folder, and how strongly it counts."""

    path: Path
    scale: float


def parse_lora(text: str) -> Adapter:
    """`PATH` or `PATH:SCALE` -> Adapter. The whole text counts as a path when it is one, so names with colons work.

    Raises:
        UserError: no such path, or what stands behind the colon is no number.
    """
    scaled = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if scaled and not Path(text).exists():
        path, scale = Path(scaled[1]), float(scaled[2])
    else:
        path, scale = Path(text), 1.0
    if not path.exists():
        raise UserError(f"--lora {text}: {_what_is_wrong(text)}")
    return Adapter(path, scale)


def _what_is_wrong(text):
    """Of a text that names no adapter: the scale, where the rest is there; else the path."""
    before, _, after = text.rpartition(":")
    if before and Path(before).exists():
        return f"{before} is there, but {after!r} is no number; a scale is written {before}:0.8"
    if re.fullmatch(r"[\d.,]+", text):
        return "is no file or folder; a scale is written behind its adapter, PATH:0.8"
    return "no such file or folder (PATH or PATH:SCALE)"


def chosen_adapters(flags) -> list[Adapter]:
    """The adapters of --lora, or for --compare those in outputs/; averaged ones with --ema; scaled by --lora_scale.

    Raises:
        UserError: no such adapter, no averaged weights, nothing to compare.
    """
    chosen = [parse_lora(text) for text in flags.lora]
    if flags.ema:
        chosen = [_averaged(adapter) for adapter in chosen]
    if flags.compare and not chosen:
        chosen = _adapters_in_outputs(flags)
    return [Adapter(adapter.path, adapter.scale * flags.lora_scale) for adapter in chosen]


def _averaged(adapter):
    if not (adapter.path / EMA_FOLDER).is_dir():
        raise UserError(f"--ema: no {EMA_FOLDER} in {adapter.path}; train with --use_ema, or leave --ema out")
    return Adapter(adapter.path / EMA_FOLDER, adapter.scale)


def _adapters_in_outputs(flags):
    """What --compare takes where no adapter is named."""
    pattern = f"*/{EMA_FOLDER}/{run_folder.WEIGHTS}" if flags.ema else f"*/{run_folder.WEIGHTS}"
    places = [Path("outputs"), *[Path("outputs/demo")] * flags.demo]  # where `make demo` trains
    chosen = [Adapter(path.parent, 1.0) for place in places for path in sorted(place.glob(pattern))]
    if not chosen:
        raise UserError(
            f"--compare: no adapter given and no outputs/{pattern} here; add --lora PATH, or train one first"
        )
    print(f"no --lora given: comparing {', '.join(str(adapter.path) for adapter in chosen)}")
    return chosen
