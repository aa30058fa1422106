"""Image-caption pairs from the hub or a folder -> Sample; and a sample's picture -> pixels with its micro-conditioning."""

import csv
import functools
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

from common.command_line import UserError
from common.flags import find_data_dir

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BUCKET_RATIO = 2.0  # widest and tallest bucket


@dataclass(frozen=True)
class Sample:
    """One training pair. `key` is a hash of the file's bytes; width and height are those of the upright picture, in pixels."""

    name: str
    key: str
    caption: str
    width: int
    height: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a training square or bucket: resize to cover, then crop. All in pixels."""

    resized: tuple  # (width, height)
    left: int
    top: int
    width: int
    height: int


# ---------------------------------------------------------------- sources


def load_samples(dataset_name, train_data_dir, image_column, caption_column, max_samples, max_bad):
    """All readable samples of a folder or a hub data set, and a count of what was skipped.

    Returns:
        (samples, bad): a list of Sample, and the number of unreadable images.
    Raises:
        UserError: no such data, no captions, or more than `max_bad` unreadable images.
    """
    if train_data_dir is not None:
        source, pairs = train_data_dir, _folder_pairs(find_data_dir(train_data_dir), caption_column)
    else:
        source, pairs = dataset_name, _hub_pairs(dataset_name, image_column, caption_column)
    samples, bad = [], []
    for name, caption, read in pairs[:max_samples]:
        try:
            samples.append(_open_sample(name, caption, read))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{name} ({error})")
    refuse_bad(bad, max_bad)
    if not samples:
        raise UserError(f"{source}: holds no image" if not bad else f"{source}: none of its {len(bad)} images can be read, e.g. {bad[0]}")
    return samples, len(bad)


def refuse_bad(bad, max_bad, before=0):
    """Name unreadable images; more than `max_bad` of them, counting those found `before`, are a UserError."""
    if bad and before + len(bad) > max_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"unreadable image {bad[0]}{more}: repair or remove it, or allow it with --max_bad_images {before + len(bad)}")
    for name in bad:
        print(f"skipped unreadable image {name}")


def _open_sample(name, caption, read):
    data = read()
    with Image.open(io.BytesIO(data)) as image:  # reads the header only
        width, height = image.size
        in_header = image.format != "PNG" or "exif" in image.info  # Pillow decodes a whole PNG to look behind the pixels
        if in_header and image.getexif().get(0x0112, 1) >= 5:  # orientations 5-8 lie on their side
            width, height = height, width
    key = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Sample(name, key, (caption or "").strip(), width, height, read)


def _folder_pairs(folder, caption_column):
    """[(file name, caption, read)] of a folder with metadata.jsonl, metadata.csv or .txt captions beside the images."""
    for metadata, rows_of in (("metadata.jsonl", _jsonl_rows), ("metadata.csv", _csv_rows)):
        if (folder / metadata).exists():
            return _metadata_pairs(folder / metadata, rows_of(folder / metadata), caption_column)
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not _is_litter(path, folder))
    if not images:
        raise UserError(f"--train_data_dir {folder}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    captions = [path.with_suffix(".txt") for path in images]
    if not any(path.exists() for path in captions):
        elsewhere = sorted(folder.glob("*/metadata.*"))
        hint = f" (there is {elsewhere[0]}: name that folder)" if elsewhere else ""
        raise UserError(
            f"--train_data_dir {folder}: no captions{hint}; add metadata.jsonl or .csv (columns file_name and {caption_column}),"
            f" or a .txt beside each image ({captions[0].name})"
        )
    return [(str(image), _read_text(text) if text.exists() else "", image.read_bytes) for image, text in zip(images, captions)]


def _is_litter(path, folder):
    """Hidden files, and what notebooks and archivers leave behind: copies that would be trained on twice."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def _metadata_pairs(metadata, rows, caption_column):
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{metadata}: row {number} is not an object with file_name and {caption_column}")
        for column in ("file_name", caption_column):
            if column not in row:
                raise UserError(f"{metadata}: row {number} has no {column!r} (it has {', '.join(map(str, row))}); see --caption_column")
            if not isinstance(row[column], (str, type(None))) or (row[column] is None and column == "file_name"):
                raise UserError(f"{metadata}: row {number}: {column} is {row[column]!r}, not a text")
    folder = metadata.parent
    return [(str(folder / row["file_name"]), row[caption_column], (folder / row["file_name"]).read_bytes) for row in rows]


def _jsonl_rows(path):
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines() would cut captions at U+2028 too
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
    return rows


def _csv_rows(path):
    return list(csv.DictReader(io.StringIO(_read_text(path))))


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _hub_pairs(dataset_name, image_column, caption_column):
    """The same of a hub data set's train split; pictures stay encoded bytes, memory-mapped by `datasets`."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    data = load_dataset(dataset_name, split="train")
    for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in data.column_names:
            raise UserError(f"--{flag} {column}: {dataset_name} has the columns {', '.join(data.column_names)}")
    data = data.cast_column(image_column, ImageFeature(decode=False))
    captions = data[caption_column]

    def read(index):
        cell = data[index][image_column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return [(f"{dataset_name}[{i}]", captions[i], functools.partial(read, i)) for i in range(len(data))]


def hold_out(samples, share):
    """Split off a `share` of the samples (at least one when share > 0) -> (training, held out).

    Chosen by content, so that runs with other seeds, and on data that has grown, are measured on the same pictures; equal
    pictures are never on both sides.
    """
    if not share:
        return samples, []
    keys = sorted({sample.key for sample in samples}, key=lambda key: hashlib.blake2b(f"held out {key}".encode()).digest())
    count = max(1, round(len(keys) * share))
    if count >= len(keys):
        raise UserError(f"--validation_split {share}: leaves none of the {len(keys)} different pictures to train on")
    held_out = set(keys[:count])
    return [s for s in samples if s.key not in held_out], [s for s in samples if s.key in held_out]


# ---------------------------------------------------------------- framing


def buckets(resolution):
    """[(width, height)] between 1:2 and 2:1, sides a multiple of a step, area at most resolution^2 (SDXL, arXiv 2307.01952, app. I)."""
    step = 64 if resolution >= 512 else 16
    sides = range(resolution // step * step, int(resolution * BUCKET_RATIO), step)
    wide = [(width, resolution**2 // width // step * step) for width in sides]
    wide = [(w, h) for w, h in wide if h and 1 <= w / h <= BUCKET_RATIO] + [(resolution, resolution)]
    return sorted({*wide, *((h, w) for w, h in wide)})


def frame(sample, resolution, center_crop=True, aspect_ratio_buckets=False):
    """Choose the Framing of a sample. A random crop is drawn from the image's content, so it is the same in every run."""
    width, height = resolution, resolution
    if aspect_ratio_buckets:
        ratio = sample.width / sample.height
        width, height = min(buckets(resolution), key=lambda bucket: abs(np.log(bucket[0] / bucket[1] / ratio)))
    scale = max(width / sample.width, height / sample.height)
    resized = max(width, round(sample.width * scale)), max(height, round(sample.height * scale))
    spare_x, spare_y = resized[0] - width, resized[1] - height
    across, down = (0.5, 0.5) if center_crop else np.random.default_rng(int(sample.key, 16)).random(2)
    return Framing(resized, round(spare_x * across), round(spare_y * down), width, height)


def time_ids(sample, framing, flip=False):
    """SDXL's micro-conditioning of one example: (original height, width, crop top, left, target height, width), pixels, [6].

    Original size is the file's; the crop is counted in the resized picture, from the edge that is left after a flip.
    """
    left = framing.resized[0] - framing.left - framing.width if flip else framing.left
    return torch.tensor([sample.height, sample.width, framing.top, left, framing.height, framing.width], dtype=torch.float32)


def pixels(sample, framing, flip=False):
    """Decode, turn upright, resize, crop, flip -> fp32 [3, H, W] in [-1, 1].

    Raises:
        OSError, ValueError or SyntaxError from Pillow, for a file that cannot be decoded.
    """
    with Image.open(io.BytesIO(sample.read())) as image:
        image = _to_rgb(ImageOps.exif_transpose(image))
    if image.size != (sample.width, sample.height):
        raise ValueError(f"is {image.size}, but its header says {(sample.width, sample.height)}")
    image = image.resize(framing.resized, Image.Resampling.LANCZOS)
    image = image.crop((framing.left, framing.top, framing.left + framing.width, framing.top + framing.height))
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)


def _to_rgb(image):
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's own conversion clips it to white
        white = 1.0 if image.mode == "F" else 65535.0
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / white * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
