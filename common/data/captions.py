"""A sample's own caption -> the texts that are trained: trigger word, prefix and suffix, tags shuffled and dropped.

Tags are drawn as a few variants of each caption, numbered from 0, so that their embeddings can be cached. A variant is
a function of the caption, its number and the options alone: runs with other seeds find the same texts in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.cli.flags import TrainFlags
from common.data.dataset import Sample
from common.data.pairs import few
from common.model.noise import generator_for


@dataclass(frozen=True)
class CaptionOptions:
    """What is put around a caption, and what is done to its tags, the parts between its commas.

    Args:
        keep_tags: this many first tags stay in place and are never dropped.
        tag_dropout: share of the other tags that a variant lacks.
        variants: how many texts a caption has where tags are shuffled or dropped.
    """

    trigger_word: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    variants: int = 1

    @property
    def count(self) -> int:
        """Variants of one caption: 1 where nothing is drawn."""
        return self.variants if self.shuffle_tags or self.tag_dropout else 1

    def plain(self, caption: str) -> str:
        """The text that is validated: every tag in its place."""
        return compose(caption, self)

    def variant(self, caption: str, number: int) -> str:
        """One of the `count` texts that are trained."""
        draws = self.shuffle_tags or self.tag_dropout
        return compose(caption, self, generator_for("caption variant", caption, number) if draws else None)


def options_of(flags: TrainFlags) -> CaptionOptions:
    """What a trainer's flags say about captions."""
    return CaptionOptions(
        trigger_word=flags.trigger_word,
        prefix=flags.caption_prefix,
        suffix=flags.caption_suffix,
        shuffle_tags=flags.shuffle_tags,
        keep_tags=flags.keep_tokens,
        tag_dropout=flags.tag_dropout,
        variants=flags.caption_variants,
    )


def texts(samples: list[Sample], held_out: list[Sample], options: CaptionOptions) -> Iterator[str]:
    """Every text that the training of `samples` can ask for, and the validation of those that are `held_out`."""
    validated = {sample.key for sample in held_out}
    for sample in samples:
        if sample.key in validated:
            yield options.plain(sample.caption)
        else:
            yield from (options.variant(sample.caption, number) for number in range(options.count))


def summary(samples: list[Sample], bad: int, options: CaptionOptions) -> str:
    """How many pictures were read; the first without a caption are named, since they may be masks or outputs."""
    empty = [sample.name for sample in samples if not sample.caption]
    epoch = sum(sample.repeats for sample in samples)
    repeated = f" ({epoch} examples an epoch)" if epoch > len(samples) else ""
    trained_as = f"the caption {options.plain('')!r}" if options.plain("") else "the empty prompt"
    named = f": {few(empty)}" if empty else ""
    uncaptioned = f"{len(empty)} with an empty caption (trained as {trained_as}){named}"
    return f"data: {len(samples)} images{repeated}, {bad} unreadable, {uncaptioned}"


def compose(caption: str, options: CaptionOptions, generator: torch.Generator | None = None) -> str:
    """prefix, trigger word, caption, suffix: those that are not empty, joined by a comma and a space.

    Without a generator the caption stays as it is written. With one it is cut at its commas into tags, and empty tags
    are left out. The first `keep_tags` stay. Each of the others is dropped with the probability `tag_dropout`, and
    those that remain are put into a random order with `shuffle_tags`. Both draws are made whatever is switched on, so
    that switching one on leaves the other alone.
    """
    body = [caption] if generator is None else _drawn_tags(caption, options, generator)
    parts = [options.prefix, options.trigger_word, *body, options.suffix]
    return ", ".join(part.strip() for part in parts if part and part.strip())


def _drawn_tags(caption, options, generator):
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept = tags[: options.keep_tags]
    others = tags[options.keep_tags :]
    shares = torch.rand(len(others), generator=generator).tolist()
    shuffled = torch.randperm(len(others), generator=generator).tolist()
    order = shuffled if options.shuffle_tags else range(len(others))
    return kept + [others[i] for i in order if shares[i] >= options.tag_dropout]
