"""How the demo's models learn: one loop for all stages, with fp32 weights, their average, and a file to go on from."""

import math
import time
from collections.abc import Callable

import torch
import torch.nn as nn

from common.fast import graphs
from demo import small

WARMUP_STEPS = 100
EMA_DECAY = 0.9995
REPORT_EVERY_S = 10
SAVE_EVERY_S = 60


class Learner:
    """AdamW and an average of the weights, both in fp32, for modules that compute in flags.dtype (bf16 on a GPU).

    `modules` keep a rounded copy of the fp32 weights.
    That is less memory traffic than casting every weight and activation in every step.
    """

    def __init__(self, modules: nn.ModuleDict, flags):
        self.names = [name for name, _ in modules.named_parameters()]
        self.masters = [p.detach().float().clone().requires_grad_() for p in modules.parameters()]
        self.average = [p.detach().clone() for p in self.masters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.modules = modules.to(flags.dtype)
        self.rate = torch.zeros((), device=flags.device)  # a tensor, because a CUDA graph keeps numbers as they were
        options = dict(
            lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=flags.device == "cuda"
        )
        self.optimizer = torch.optim.AdamW(self.masters, **options)

    def update(self) -> None:
        """One step from the gradients of the modules; nothing in it waits for the GPU."""
        params = list(self.modules.parameters())
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in params])
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, self.masters)

    def follow(self, step: int) -> None:
        """Move the average towards the weights after `step` steps."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [master.detach() for master in self.masters], 1 - decay)

    def averaged(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.average))


def learning_rate(peak: float, steps_here: int, progress: float) -> float:
    """Warm-up over the first steps of this run, cosine over the stage's whole budget (`progress` in [0, 1])."""
    return peak * min(1, (steps_here + 1) / WARMUP_STEPS) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def check_finite(loss: float, step: int, stage: str) -> None:
    if not math.isfinite(loss):
        raise SystemExit(f"{stage}: loss {loss} at step {step}; run it again, it goes on from the last file")


def train_for(flags, modules: nn.ModuleDict, loss: Callable, *, graph: bool = False, **metadata) -> nn.ModuleDict:
    """The loop of all stages: updates `modules` by loss() -> scalar tensor until the minutes (or --steps) are over.

    Starts from flags.path if it exists, writes the average there, and returns the modules with it, in fp32.
    """
    # Where the last run stopped
    modules.to(flags.device)
    found = small.load_parts(flags.path, modules) if flags.path.exists() else {}
    minutes = spent = found.get("minutes", 0.0)
    step = first = found.get("steps", 0)
    torch.manual_seed(flags.seed + step)
    learner = Learner(modules, flags)

    def one_step(_):
        modules.zero_grad()  # to None: a graph's own gradients are then written, not added to
        value = loss()
        value.backward()
        learner.update()
        return value.detach()

    def save():
        small.save_parts(flags.path, learner.averaged(), minutes=minutes, steps=step, **metadata)

    start = time.monotonic()
    saved_s = shown_s = 0.0
    shown_step = step
    run = graphs.Graphed(one_step, torch.device(flags.device), enabled=graph and not flags.eager)
    while (progress := step / flags.steps if flags.steps else minutes / flags.minutes) < 1:
        learner.rate.fill_(learning_rate(flags.lr, step - first, progress))
        value = run({})
        step += 1
        learner.follow(step)
        if step % 20 == 0 or flags.device == "cpu":
            check_finite(value.item(), step, flags.path.stem)  # waits, so that the clock is that of the GPU

        # Now and then a line and a file
        seconds = time.monotonic() - start
        minutes = spent + seconds / 60
        if seconds - shown_s > REPORT_EVERY_S:
            speed = f"{(step - shown_step) * flags.batch / (seconds - shown_s):,.0f} examples/s"
            print(f"{flags.path.stem}: step {step}, {minutes:.2f} min, loss {value.item():.4f}, {speed}", flush=True)
            shown_s = seconds
            shown_step = step
        if seconds - saved_s > SAVE_EVERY_S:
            save()
            saved_s = seconds

    # The average is the result
    save()
    count = sum(map(torch.numel, learner.masters))
    print(f"{flags.path.stem}: {step} steps in {minutes:.2f} min, {count / 1e6:.2f} M parameters")
    modules.float().load_state_dict(learner.averaged())
    return modules.eval().requires_grad_(False)
