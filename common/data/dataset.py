"""Pairs of sources.py -> Samples: every picture measured, the unreadable counted; and which Samples are held out."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from common.data import decoding
from common.data.pairs import Pair, fault, few, or_fault
from common.data.sources import read_pairs
from common.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One training pair, which an epoch shows `repeats` times.

    `key` is a hash of the file's bytes; width and height are those of the upright picture, in pixels.
    """

    name: str
    key: str
    _: KW_ONLY
    caption: str
    width: int
    height: int
    read: Callable[[], bytes]
    repeats: int = 1


def load_samples(
    dataset_name: str,
    folders: list[str],
    *,
    image_column: str,
    caption_column: str,
    max_samples: int | None = None,
    max_bad: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[list[Sample], int]:
    """All readable samples of some folders, or of a hub data set where none is named, and a count of what was skipped.

    Args:
        folders: values of --train_data_dir.
        say: takes one line for everything that is left out, or not as it seems.
    Returns:
        (samples, bad): a list of Sample, and the number of unreadable images.
    Raises:
        UserError: no such data, no captions, or more than `max_bad` unreadable images.
    """
    pairs = read_pairs(dataset_name, folders, image_column=image_column, caption_column=caption_column, say=say)
    odd_profiles = []
    found = [(pair, or_fault(functools.partial(_measured, pair, odd_profiles))) for pair in pairs[:max_samples]]
    samples = [sample for _, sample in found if isinstance(sample, Sample)]
    bad = [f"{pair.name} ({fault(error)})" for pair, error in found if isinstance(error, Exception)]

    # what cannot be trained on
    refuse_bad(bad, max_bad, say=say)
    if odd_profiles:
        say(f"data: taken as sRGB, the colour profile cannot be used: {len(odd_profiles)} ({few(odd_profiles)})")
    if not samples:
        source = " ".join(folders) or dataset_name
        found = f"none of its {len(bad)} images can be read, e.g. {bad[0]}" if bad else "holds no image"
        raise UserError(f"{source}: {found}")
    return samples, len(bad)


def refuse_bad(bad: list[str], max_bad: int, before: int = 0, say: Callable[[str], None] = print) -> None:
    """Name unreadable images; more than `max_bad` of them, counting those found `before`, are a UserError."""
    if bad and before + len(bad) > max_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        allowed = f"--max_bad_images {before + len(bad)}"
        raise UserError(f"unreadable image {bad[0]}{more}: repair or remove it, or allow it with {allowed}")
    for name in bad:
        say(f"skipped unreadable image {name}")


def _measured(pair: Pair, odd_profiles: list[str]) -> Sample:
    """The Sample of a pair; a colour profile that cannot be used puts its name on the list."""
    data = pair.read()
    measured = decoding.measure(data)
    if not measured.profile_is_usable:
        odd_profiles.append(pair.name)
    key = hashlib.blake2b(data, digest_size=16).hexdigest()
    size = dict(width=measured.width, height=measured.height)
    caption = (pair.caption or "").strip()
    return Sample(pair.name, key, caption=caption, **size, read=pair.read, repeats=pair.repeats)


def hold_out(samples: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split off a `share` of the samples (at least one when share > 0) -> (training, held out).

    Chosen by content, so that runs with other seeds, and on data that has grown, are measured on the same pictures.
    Equal pictures are never on both sides.
    """
    if not share:
        return samples, []
    different = {sample.key for sample in samples}
    keys = sorted(different, key=lambda key: hashlib.blake2b(f"held out {key}".encode()).digest())
    count = max(1, round(len(keys) * share))
    if count >= len(keys):
        raise UserError(f"--validation_split {share}: leaves none of the {len(keys)} different pictures to train on")
    held_out = set(keys[:count])
    training = [sample for sample in samples if sample.key not in held_out]
    return training, [sample for sample in samples if sample.key in held_out]
