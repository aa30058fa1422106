"""What is attached to a Kaggle notebook below /kaggle/input: models, captioned pictures and wheels.

There may be no internet, and these are all there is.
"""

import os
import time
from typing import NamedTuple

KAGGLE_INPUT = "/kaggle/input"
DEPTH = 6  # folders below the root: Kaggle's own layout takes up to five
SEARCH_S = 1.5  # a data set of a million files is not searched to its end
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Attached(NamedTuple):
    """Folders, each list sorted."""

    models: list[str]  # with model_index.json
    data: list[str]  # with metadata.jsonl or .csv, or with a .txt beside a picture
    wheels: list[str]  # with .whl files


def find_attached(root: str = KAGGLE_INPUT) -> Attached:
    """Search `root`, which may be absent; below a model or a data folder nothing more is looked for."""
    found = Attached([], [], [])
    started_s = time.monotonic()
    for folder, below, files in os.walk(root):
        below.sort()
        if any(name.endswith(".whl") for name in files):
            found.wheels.append(folder)

        # A model or a data set ends the search of its branch, as do depth and time.
        if "model_index.json" in files:
            found.models.append(folder)
            below.clear()
        elif _holds_captions(files):
            found.data.append(folder)
            below.clear()
        elif folder.count(os.sep) - root.count(os.sep) >= DEPTH or time.monotonic() - started_s > SEARCH_S:
            below.clear()
    return Attached(*map(sorted, found))


def _holds_captions(files: list[str]) -> bool:
    """Whether these are the files of a folder that `--train_data_dir` can read."""
    if "metadata.jsonl" in files or "metadata.csv" in files:
        return True
    texts = {name.removesuffix(".txt") for name in files if name.endswith(".txt")}
    return any(os.path.splitext(name)[0] in texts for name in files if name.lower().endswith(IMAGE_SUFFIXES))
