"""A table that `datasets` reads -> Pairs: a hub data set, a save_to_disk folder, parquet or arrow files.

Pictures stay encoded bytes, memory-mapped by `datasets`, which is imported where a table is read.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.data.pairs import Pair, fault, read_file
from common.errors import UserError

TABLE_KINDS = ("parquet", "arrow")
# The split in the name of a table's file.
SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test|dev)(?![a-z])")


class Columns(NamedTuple):
    """The flags that name the columns of a table."""

    image_column: str
    caption_column: str


def hub_pairs(dataset_name: str, columns: Columns, say: Callable[[str], None]) -> list[Pair]:
    """The pairs of a hub data set."""
    from datasets import load_dataset

    splits = _loaded(dataset_name, load_dataset, dataset_name)
    return _pairs(splits, dataset_name, columns, folder=Path("."), say=say)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    names = {path.name for path in folder.iterdir()}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def saved_pairs(folder: Path, columns: Columns, say: Callable[[str], None]) -> list[Pair]:
    """The pairs of a folder that save_to_disk wrote."""
    from datasets import load_from_disk

    splits = _loaded(folder, load_from_disk, str(folder))
    return _pairs(splits, folder, columns, folder=folder, say=say)


def table_files(folder: Path) -> list[Path]:
    """Parquet files below a folder; where there is none, arrow files."""
    kinds = (sorted(folder.rglob(f"*.{kind}")) for kind in TABLE_KINDS)
    return next(filter(None, kinds), [])


def file_pairs(folder: Path, files: list[Path], columns: Columns, say: Callable[[str], None]) -> list[Pair]:
    """The pairs of parquet or arrow files; their names say which split they belong to, as on the hub."""
    from datasets import load_dataset

    by_split = {}
    for path in files:
        split = SPLIT.search(path.name.lower())
        by_split.setdefault(split[1] if split else "train", []).append(str(path))
    splits = _loaded(folder, load_dataset, files[0].suffix[1:], data_files=by_split)
    return _pairs(splits, folder, columns, folder=folder, say=say)


def _loaded(source, load, *arguments, **options):
    """What a function of `datasets` loads, as {split: Dataset}."""
    from datasets.exceptions import DatasetsError

    try:
        loaded = load(*arguments, **options)
    except (DatasetsError, ValueError) as error:
        raise UserError(f"{source}: cannot be read as a data set ({fault(error)})") from None
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _pairs(splits, source, columns, *, folder, say):
    """The pairs of a data set's split train, or of its first; paths in it are relative to `folder`."""
    split = "train" if "train" in splits else next(iter(splits))
    if split != "train":
        say(f"data: {source} has no split named train; its split {split} is used (it has: {', '.join(splits)})")
    data = splits[split]
    for flag, column in columns._asdict().items():
        if column not in data.column_names:
            raise UserError(f"--{flag} {column}: {source} has the columns {', '.join(data.column_names)}")
    captions = _captions(data, source, columns.caption_column)
    read = functools.partial(_read, _encoded(data, source, columns.image_column), columns.image_column, folder)
    return [Pair(f"{source}[{i}]", caption, functools.partial(read, i)) for i, caption in enumerate(captions)]


def _captions(data, source, column):
    """A caption or None for every row: texts as they are, labels by their names.

    Raises:
        UserError: the column holds something else.
    """
    from datasets import ClassLabel

    values = data.select_columns([column])[:][column]
    feature = data.features[column]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    for i, value in enumerate(values):
        if not isinstance(value, (str, type(None))):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
            raise UserError(
                f"--caption_column {column}: row {i} of {source} holds {shown} ({type(value).__name__}), not a text;"
                f" name a column with one text a row (columns: {', '.join(data.column_names)})"
            )
    return values


def _encoded(data, source, column):
    """The pictures alone, as {"bytes", "path"}: reading a whole row would decode the pictures of other columns too."""
    from datasets import Image

    try:
        return data.select_columns([column]).cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow raises
        kind = data.features[column]
        raise UserError(f"--image_column {column}: {source} has no images there but {kind} ({fault(error)})") from None


def _read(data, column, folder, index):
    """The bytes of one picture."""
    cell = data[index][column]
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("is null")
    return cell["bytes"] if cell["bytes"] is not None else read_file(folder / cell["path"])
