"""What changes with the step: the learning rate, which is a function of it, and the loss scale, which remembers."""

from collections.abc import Callable

import torch

GROWTH_INTERVAL = 2000  # steps without an overflow before the loss scale doubles


class LossScale:
    """Dynamic loss scaling for fp16: halved at an overflow, doubled after GROWTH_INTERVAL good steps; else always 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.enabled = dtype == torch.float16
        start = 2.0**12 if self.enabled else 1.0
        self.value = torch.full((), start, device=device)  # on the device: a CUDA graph reads it
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value.mul_(0.5)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value.mul_(2.0)

    def state(self) -> dict[str, float]:
        return {"value": self.value.item(), "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self.good_steps = state["good_steps"]


def lr_schedule(
    name: str, *, warmup_steps: int, total_steps: int, peak_lr: float, num_cycles: int = 1, power: float = 1.0
) -> Callable[[int], float]:
    """One of diffusers' schedules as a function without state: steps done -> factor of the peak learning rate.

    `num_cycles` counts the cosines of "cosine_with_restarts"; `power` is the exponent of "polynomial".
    """
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)  # "polynomial" ends at an absolute rate
    lengths = dict(num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return get_scheduler(name, unused, num_cycles=num_cycles, power=power, **lengths).lr_lambdas[0]
