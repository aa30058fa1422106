"""Which sample comes when, with which noise: cached entries + (seed, step, index) -> Batch.

The trajectory is a function of the seed alone. It does not depend on how an effective batch is cut into forward passes,
on the number of processes, or on where a run was interrupted.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from common.data import framing
from common.data.caching import CachedText, LatentCache, LiveText
from common.data.captions import CaptionOptions
from common.model import noise

VALIDATION_DRAWS = 4  # timesteps per held-out sample, spread evenly over the schedule


@dataclass(frozen=True)
class Batch:
    """Examples of one shape, ready for a forward pass. Every tensor starts with B; latents are [B, C, h, w].

    `tensors`: mean, std, posterior_eps, eps, t, time_ids [B, 6], weight [B] (each example's share of the step's loss),
    keep_text [B] (0 where the caption is dropped), and what the text conditioning needs.
    """

    tensors: dict[str, torch.Tensor]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


@lru_cache(maxsize=2)
def _epoch_order(seed, epoch, count):
    return torch.randperm(count, generator=noise.generator_for(seed, "epoch", epoch)).tolist()


def sample_at(position: int, count: int, seed: int) -> int:
    """Index of the sample at `position` of an endless sequence of epochs, each a fresh permutation."""
    epoch, offset = divmod(position, count)
    return _epoch_order(seed, epoch, count)[offset]


class Examples:
    """Training examples by number.

    Args:
        captions: from a sample's caption to the texts that are trained.
        num_timesteps: length T of the noise schedule.
        zero_unconditional: the model's unconditional input is zeros (SDXL base), not the encoded empty prompt.
    """

    def __init__(
        self,
        latents: LatentCache,
        text: CachedText | LiveText,
        *,
        seed: int,
        num_timesteps: int,
        captions: CaptionOptions,
        flip_share: float = 0.0,
        drop_share: float = 0.0,
        offset_strength: float = 0.0,
        zero_unconditional: bool = True,
    ) -> None:
        self.latents = latents
        self.text = text
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.captions = captions
        self.occurrences = [index for index, sample in enumerate(latents.samples) for _ in range(sample.repeats)]
        self.draw_options = dict(flip_share=flip_share, drop_share=drop_share, offset_strength=offset_strength)
        self.zero_unconditional = zero_unconditional

    def __len__(self) -> int:
        """Examples of an epoch: the samples, each as often as it is repeated."""
        return len(self.occurrences)

    def effective_batch(self, number: int, size: int, micro_size: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's share of effective batch `number`: Batches of at most `micro_size` examples of one shape."""
        rows = [self._training_row(number, i, size) for i in range(rank, size, world)]
        return _group(rows, micro_size)

    def validation_batches(self, micro_size: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """Every sample at VALIDATION_DRAWS fixed timesteps with fixed noise, caption kept, not flipped."""
        rows = [self._validation_row(number) for number in range(rank, len(self.latents) * VALIDATION_DRAWS, world)]
        return _group(rows, micro_size)

    def probes(self, timesteps: list[int]) -> list[Batch]:
        """Batches of one example: one sample after the other at the `timesteps` given, in one of its training texts.

        Noise is fixed, the picture not flipped.
        """
        rows = []
        for number, t in enumerate(timesteps):
            index = number % len(self.latents)
            caption = self.captions.variant(self.latents.samples[index].caption, 0)
            rows.append(self._fixed_row(index, t, caption, "probe", number))
        return _group(rows, 1)

    def name_at(self, position: int) -> str:
        """Name of the sample at `position` of the run, for messages."""
        return self.latents.samples[self.occurrences[sample_at(position, len(self), self.seed)]].name

    def _training_row(self, number, i, size):
        position = number * size + i
        occurrence = sample_at(position, len(self), self.seed)
        index = self.occurrences[occurrence]
        generator = noise.generator_for(self.seed, number, i)
        draws = noise.draw(generator, self.latents.shape(index), self.num_timesteps, **self.draw_options)
        caption = self._drawn_caption(self.latents.samples[index].caption, position // len(self), occurrence)
        return self._row(index, draws, caption, weight=1 / size)

    def _drawn_caption(self, caption, epoch, occurrence):
        """The variant that this occurrence of a sample has in this epoch."""
        number = 0
        if self.captions.count > 1:
            generator = noise.generator_for(self.seed, "caption", epoch, occurrence)
            number = int(torch.randint(self.captions.count, (), generator=generator))
        return self.captions.variant(caption, number)

    def _validation_row(self, number):
        index, part = divmod(number, VALIDATION_DRAWS)
        t = int((part + (index + 0.5) / len(self.latents)) / VALIDATION_DRAWS * self.num_timesteps)
        caption = self.captions.plain(self.latents.samples[index].caption)
        return self._fixed_row(index, t, caption, "validation", part)

    def _fixed_row(self, index, t, caption, purpose, number):
        """A sample at timestep t, caption kept, not flipped, with noise that is the same in every run."""
        # Not from the run's seed: the losses of runs with several seeds are to be compared
        generator = noise.generator_for(purpose, self.latents.samples[index].key, number)
        draws = noise.draw(generator, self.latents.shape(index), self.num_timesteps)
        fixed = replace(draws, flip=False, drop_caption=False, timestep=t)
        return self._row(index, fixed, caption, weight=1.0)

    def _row(self, index, draws, caption, weight):
        """(name, {field: tensor}) of one example."""
        sample = self.latents.samples[index]
        mean, std = self.latents.moments(index, draws.flip)
        caption = "" if draws.drop_caption and not self.zero_unconditional else caption
        keep = 0.0 if draws.drop_caption and self.zero_unconditional else 1.0
        return sample.name, dict(
            mean=mean,
            std=std,
            posterior_eps=draws.posterior_eps,
            eps=draws.eps,
            t=torch.tensor(draws.timestep),
            time_ids=framing.time_ids(sample, self.latents.framings[index], draws.flip),
            weight=torch.tensor(weight),
            keep_text=torch.tensor(keep),
            **self.text.fields(caption),
        )


def _group(rows, micro_size):
    """Rows -> Batches of one shape each, in order of first appearance, none larger than `micro_size`."""
    by_shape = {}
    for name, fields in rows:
        by_shape.setdefault(fields["mean"].shape, []).append((name, fields))
    parts = [group[i : i + micro_size] for group in by_shape.values() for i in range(0, len(group), micro_size)]
    return [_stack(part) for part in parts]


def _stack(rows):
    """Rows of one shape -> Batch; pinned, so that the GPU can fetch it unaided."""
    names, fields = zip(*rows)
    tensors = {key: torch.stack([row[key] for row in fields]) for key in fields[0]}
    if torch.cuda.is_available():
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return Batch(tensors, list(names))
