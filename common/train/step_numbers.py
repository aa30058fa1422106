"""What a step measures, and how it travels: one vector on the device, then one line of metrics."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.model import noise


class StepNumbers(NamedTuple):
    """What one attempt at a step measures.

    On the device it is one fp32 vector, so that passes and processes add up in one operation. `pack` and `unpack`
    alone know the order; a field that is not packed is 0.
    """

    loss: float  # as optimised
    mse: float
    mse_by_quarter: list  # sums over the examples of each quarter of the timesteps
    count_by_quarter: list
    stops: float  # processes that were asked to stop
    out_of_memory: float  # processes whose passes did not fit
    grad_norm: float
    loss_scale: float

    @classmethod
    def pack(cls, device: torch.device, **fields: torch.Tensor | float) -> torch.Tensor:
        parts = []
        for name in cls._fields:
            value = fields.get(name, 0.0)
            size = noise.QUARTERS if name.endswith("_by_quarter") else 1
            parts.append(value.view(size) if torch.is_tensor(value) else torch.full((size,), value, device=device))
        return torch.cat(parts)

    @classmethod
    def unpack(cls, vector: torch.Tensor) -> "StepNumbers":
        """Wait for the device and read a vector of `pack`."""
        numbers = iter(vector.tolist())
        quarter = lambda: [next(numbers) for _ in range(noise.QUARTERS)]  # noqa: E731
        return cls(*(quarter() if name.endswith("_by_quarter") else next(numbers) for name in cls._fields))

    def mse_quarters(self) -> list[float | None]:
        """Mean mse by quarter of the timesteps, None where the step had none."""
        return [total / n if n else None for total, n in zip(self.mse_by_quarter, self.count_by_quarter)]


@dataclass(frozen=True)
class StepResult:
    """What one attempt at an optimizer step gave. It is not `applied` when gradients or loss were not finite."""

    loss: float
    mse: float
    mse_quarters: list[float | None]
    grad_norm: float
    loss_scale: float
    lr: float
    stop: bool  # some process was asked to stop
    applied: bool
