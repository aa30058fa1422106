"""--train_data_dir or --dataset_name -> Pairs: folders with metadata or .txt captions here, tables in tables.py.

Whatever is left out, or taken in without being meant to be, is counted and named in one line.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.cli.flag_checks import find_data_dir
from common.data import tables
from common.data.metadata_files import read_rows, read_text
from common.data.pairs import Pair, few, read_file
from common.errors import UserError

IMAGE_SUFFIXES = set(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .avif .jp2 .j2k .jpx .tga .ppm".split()
)
OTHER_SUFFIXES = set(".heic .heif .jxl .svg .psd .xcf .kra .clip .eps .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split())
METADATA = ("metadata.jsonl", "metadata.csv")
REPEATS = re.compile(r"(\d+)_")  # the start of a folder's name, as kohya's scripts read it
MOST_REPEATS = 1000  # beyond it, the number is rather a year
REGULARISATION = re.compile(r"(\d+_)?reg(s|ulari[sz]ation)?([ _-]?(images|imgs|data|set))?", re.IGNORECASE)
# What a trainer, and infer.py, leave behind.
RUN_FILES = (("config.json", "metrics.jsonl"), ("manifest.json", "compare.png"))


class Found(NamedTuple):
    """What lies in a folder and below it; `left_out` maps a reason to files."""

    pictures: list[Path]
    left_out: dict[str, list[Path]]


def read_pairs(
    dataset_name: str, folders: list[str], *, image_column: str, caption_column: str, say: Callable[[str], None]
) -> list[Pair]:
    """The pairs of every folder, one after the other, or of the hub data set where no folder is named.

    Raises:
        UserError: naming the flag or the file.
    """
    columns = tables.Columns(image_column, caption_column)
    if not folders:
        return tables.hub_pairs(dataset_name, columns, say)
    pairs = []
    for name in folders:
        folder, weight = find_data_dir(name)
        pairs += [pair._replace(repeats=pair.repeats * weight) for pair in _folder_pairs(folder, columns, say)]
    return pairs


# ---------------------------------------------------------------- one folder


def _folder_pairs(folder, columns, say):
    if tables.is_saved(folder):
        return tables.saved_pairs(folder, columns, say)
    found = _find(folder)
    if metadata := [folder / name for name in METADATA if (folder / name).is_file()]:
        for path in metadata[1:]:
            say(f"data: {path} is left out, {metadata[0].name} beside it is read")
        return _metadata_pairs(metadata[0], found, columns.caption_column, say)
    _say_left_out(folder, found.left_out, say)
    if not found.pictures and (files := tables.table_files(folder)):
        return tables.file_pairs(folder, files, columns, say)
    return _text_pairs(folder, found.pictures, columns.caption_column, say)


def _find(folder):
    """Every picture below a folder, in order of names, without what is not meant to be trained on."""
    runs = _run_folders(folder)
    pictures = []
    left_out = {}
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | OTHER_SUFFIXES or _is_litter(path, folder) or path.is_dir():
            continue
        reason = _reason_to_leave(path, folder, runs)
        if reason:
            left_out.setdefault(reason, []).append(path)
        else:
            pictures.append(path)
    return Found(pictures, left_out)


def _is_litter(path, folder):
    """Hidden files, and what notebooks and archivers leave behind: copies that would be trained on twice."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def _run_folders(folder):
    """Output folders of this suite below `folder`."""
    parents = {path.parent for name in ("metrics.jsonl", "compare.png") for path in folder.rglob(name)} - {folder}
    return {place for place in parents if any(all((place / name).is_file() for name in names) for names in RUN_FILES)}


def _reason_to_leave(path, folder, runs):
    if path.suffix.lower() in OTHER_SUFFIXES:
        return "of kinds that cannot be read here (convert them to PNG)"
    if runs.intersection(path.parents):
        return "output of an earlier run"
    if any(REGULARISATION.fullmatch(part) for part in path.relative_to(folder).parts[:-1]):
        return "regularisation pictures (they belong to DreamBooth's prior loss, which is not trained here)"
    return None


def _say_left_out(folder, left_out, say):
    for reason, paths in left_out.items():
        if paths:
            shown = few(path.relative_to(folder) for path in paths)
            say(f"data: left out in {folder}, {reason}: {len(paths)} ({shown})")


# ---------------------------------------------------------------- captions


def _metadata_pairs(metadata, found, caption_column, say):
    """The pictures that the rows name, whatever they are; all others are left out."""
    folder = metadata.parent
    rows = [(folder / name, caption) for name, caption in read_rows(metadata, caption_column)]
    named = {os.path.normpath(path) for path, _ in rows}
    by_reason = {f"not named in {metadata.name}": found.pictures, **found.left_out}
    for reason, paths in by_reason.items():
        by_reason[reason] = [path for path in paths if os.path.normpath(path) not in named]
    _say_left_out(folder, by_reason, say)
    return [Pair(str(path), caption, functools.partial(read_file, path)) for path, caption in rows]


def _text_pairs(folder, pictures, caption_column, say):
    """Pictures with a .txt beside them; folders named as kohya's scripts read them (`10_name`) are repeated."""
    if not pictures:
        raise UserError(f"--train_data_dir {folder}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    texts = [path.with_suffix(".txt") for path in pictures]
    if not any(text.is_file() for text in texts):
        elsewhere = sorted(folder.glob("*/metadata.*"))
        hint = f" (there is {elsewhere[0]}: name that folder)" if elsewhere else ""
        raise UserError(
            f"--train_data_dir {folder}: no captions{hint}; add metadata.jsonl or .csv (columns file_name and"
            f" {caption_column}), or a .txt beside each image ({texts[0].name})"
        )
    repeats = _repeats(folder, pictures, say)
    captions = [read_text(text) if text.is_file() else "" for text in texts]
    rows = zip(pictures, captions, repeats)
    return [Pair(str(path), caption, functools.partial(read_file, path), times) for path, caption, times in rows]


def _repeats(folder, pictures, say):
    """How often an epoch shows each picture: the number before its folder's name, one level below the data folder."""
    parts = [path.relative_to(folder).parts for path in pictures]
    tops = [names[0] if len(names) > 1 else "" for names in parts]
    times = {name: int(number[1]) for name in dict.fromkeys(tops) if (number := REPEATS.match(name))}
    for name, number in times.items():
        if not 1 <= number <= MOST_REPEATS:
            raise UserError(
                f"--train_data_dir {folder}: the name of {name} would mean {number} repeats"
                f" (1 to {MOST_REPEATS} can be given so); rename it, e.g. 1_{name}"
            )

    # said, because a name may be no more than a name
    if times:
        counted = Counter(name for name in tops if name in times)
        shown = few((f"{name} (images: {count})" for name, count in counted.items()), 10)
        say(f"data: folders repeated as their names say: {shown}")
    return [times.get(name, 1) for name in tops]
