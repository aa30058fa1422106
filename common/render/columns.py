"""The columns of a comparison: the base model and its adapters, with titles and file names that are their own."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.render import manifest
from common.render.chosen_adapters import EMA_FOLDER


class Column(NamedTuple):
    """One way to render every prompt."""

    title: str
    active: list  # [(name in the pipeline, scale)], none of them for the base
    sources: list  # of the adapters, for the manifest
    stem: str  # what its files' names begin with


def make_columns(flags, sampler, adapters: list, files: list[Path]) -> list[Column]:
    """Load the adapters: with --compare the base and each adapter are a column, else all of them together are one.

    Adapters found in outputs/ may belong to another model (the demo's, say): those are named and left out.
    """
    # Every adapter that fits, with its title and source
    loaded = []
    for adapter, file in zip(adapters, files):
        try:
            name = sampler.load(file)
        except UserError as error:
            if flags.lora:
                raise
            sampler.host.say(f"left out: {error}")
            continue
        source = {"path": str(file), "scale": adapter.scale, "sha256": manifest.sha256(file)}
        loaded.append((title_of(file, adapter.scale), [(name, adapter.scale)], [source]))

    # Side by side, or together
    if flags.compare and not loaded:
        raise UserError("--compare: none of the adapters in outputs/ fits this model; name one with --lora")
    if not flags.compare:
        titles, active, sources = zip(*loaded) if loaded else (["base"], [], [])
        loaded = [(" + ".join(titles), sum(active, []), sum(sources, []))]

    # Titles and file names of their own
    columns = []
    for title, active, sources in [("base", [], []), *loaded] if flags.compare else loaded:
        title = unused(title, [column.title for column in columns], "{} ({})")
        columns.append(Column(title, active, sources, stem_of(title, [column.stem for column in columns])))
    return columns


def stem_of(title: str, used: list[str]) -> str:
    """`title` as the beginning of a file name that no other column has."""
    return unused(re.sub(r"[^\w.-]+", "_", title).strip("_"), used, "{}_{}")


def unused(name: str, used: list[str], numbered: str) -> str:
    """`name`, or the first of `numbered`'s with 2, 3, ... that is not in `used` yet."""
    names = itertools.chain([name], (numbered.format(name, i) for i in itertools.count(2)))
    return next(one for one in names if one not in used)


def title_of(file: Path, scale: float) -> str:
    """An adapter's name in pictures and files: its run's folder, with step, EMA, kohya and scale where they matter."""
    folder, step = file.resolve().parent, re.fullmatch(r"pytorch_lora_weights_(\d+)", file.stem)
    if folder.name == EMA_FOLDER:
        title = f"{folder.parent.name} EMA"
    elif step:
        title = f"{folder.name} step {int(step[1])}"
    elif folder.name == "kohya":
        title = f"{file.stem} kohya"
    elif folder.name == "peft":
        title = f"{folder.parent.name} peft"
    else:
        title = folder.name if file.stem in ("pytorch_lora_weights", "adapter_model") else file.stem
    return title if scale == 1 else f"{title} x{scale:g}"
