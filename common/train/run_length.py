"""How long a run takes, in optimizer steps, and how many images a step has on however many processes."""

import math
from dataclasses import dataclass

from common.model.device import Host


@dataclass(frozen=True)
class RunLength:
    """How long a run takes, and after how many steps what happens. Steps are optimizer steps."""

    total_steps: int
    effective_batch: int
    checkpointing_steps: int
    validation_steps: int
    early_stopping_patience: int | None = None
    ends_s: float = math.inf  # on the monotonic clock: by then everything must be saved


def run_length(flags, host: Host, num_examples: int) -> RunLength:
    """The same on however many processes: they share out the images of a step, of which each has at least one."""
    effective_batch = max(flags.train_batch_size * flags.gradient_accumulation_steps, host.world)
    return RunLength(
        total_steps=total_steps(flags.max_train_steps, flags.num_train_epochs, num_examples, effective_batch),
        effective_batch=effective_batch,
        checkpointing_steps=flags.checkpointing_steps,
        validation_steps=flags.validation_steps,
        early_stopping_patience=flags.early_stopping_patience,
        ends_s=host.started_s + 60 * (flags.max_train_minutes or math.inf),
    )


def total_steps(max_train_steps: int | None, num_train_epochs: int, num_samples: int, effective_batch: int) -> int:
    """Optimizer steps of a run: `max_train_steps`, or as many as cover the epochs. Windows run across epoch ends."""
    return max_train_steps or math.ceil(num_train_epochs * num_samples / effective_batch)


def uneven_shares(flags, world: int, effective_batch: int) -> str | None:
    """What is done where the images of a step cannot be shared out evenly; None where they can."""
    asked = flags.train_batch_size * flags.gradient_accumulation_steps
    if asked < world:
        return (
            f"note: {asked} images a step cannot be shared by {world} processes: each takes one, so the effective"
            f" batch is {world}"
        )
    least, larger = divmod(effective_batch, world)
    if not larger:
        return None
    return (
        f"note: {effective_batch} images a step cannot be shared evenly by {world} processes: {larger} of them take"
        f" {least + 1}, the others {least}; the effective batch stays {effective_batch}"
    )
