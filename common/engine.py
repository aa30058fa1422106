"""One optimizer step, in one place: forward, loss, backward, all-reduce, overflow check, clipping, optimizer, EMA.

Within the passes of a step nothing waits for the GPU; the host reads one small tensor per step, which is also the log line.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from common import memory, noise
from common.adapters import without_dropout
from common.device import free_memory
from common.graphs import Graphed

GROWTH_INTERVAL = 2000  # steps without an overflow before the loss scale doubles


class LossScale:
    """Dynamic loss scaling for fp16: halved at an overflow, doubled after GROWTH_INTERVAL good steps; 1 for other dtypes."""

    def __init__(self, dtype, device):
        self.enabled = dtype == torch.float16
        self.value = torch.full(
            (), 2.0**12 if self.enabled else 1.0, device=device
        )  # on the device: a CUDA graph reads it
        self.good_steps = 0

    def update(self, overflow):
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value.mul_(0.5)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value.mul_(2.0)


def lr_schedule(name, warmup_steps, total_steps, peak_lr, num_cycles=1, power=1.0):
    """One of diffusers' schedules as a function: optimizer steps done -> factor of the peak learning rate. It has no state.

    `num_cycles` counts the cosines of "cosine_with_restarts"; `power` is the exponent of "polynomial".
    """
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)  # "polynomial" ends at an absolute rate
    lengths = dict(num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return get_scheduler(name, unused, num_cycles=num_cycles, power=power, **lengths).lr_lambdas[0]


class PassOutOfMemory(Exception):
    """A forward and backward pass needs more GPU memory than there is: on this process (`here`), or only on another one."""

    def __init__(self, here: bool) -> None:
        super().__init__("out of GPU memory in a pass")
        self.here = here


class StepNumbers(NamedTuple):
    """What one attempt at a step measures. On the device it is one fp32 vector, so that passes and processes add up in one operation.

    `pack` and `unpack` alone know the order; a field that is not packed is 0.
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


@dataclass(frozen=True)
class StepResult:
    """What one attempt at an optimizer step gave. `applied` is False when gradients overflowed or the loss was not finite."""

    loss: float
    mse: float
    mse_quarters: list  # mean mse by quarter of the timesteps, None where the step had none
    grad_norm: float
    loss_scale: float
    lr: float
    stop: bool  # some process was asked to stop
    applied: bool


class Engine:
    """The UNet, its flat parameters and its optimizer.

    Args:
        text: maps a batch's fields to (prompt_embeds, pooled), see caching.CachedText.
        schedule: noise.NoiseSchedule on the device.
        lr_factor: optimizer steps done -> factor of the peak learning rate, see `lr_schedule`.
        min_snr_gamma: None for plain MSE.
        ema: adapters.EMA or None.
        seed: of the LoRA dropout masks, together with the step, the pass within it and the process.
        dropout_seed: int64 scalar on the device, from which fused layers derive their masks.
        cuda_graph: replay passes instead of launching them, on a GPU.
        checkpointing: fit.BlockCheckpointing of the UNet, or None when it recomputes nothing.
    """

    def __init__(
        self,
        unet,
        text,
        schedule,
        flat,
        optimizer,
        lr_factor,
        host,
        max_grad_norm,
        min_snr_gamma=None,
        ema=None,
        seed=0,
        dropout_seed=None,
        cuda_graph=True,
        checkpointing=None,
    ):
        self.unet, self.text, self.schedule, self.flat, self.ema = unet, text, schedule, flat, ema
        self.optimizer, self.lr_factor, self.host, self.checkpointing = optimizer, lr_factor, host, checkpointing
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.max_grad_norm, self.min_snr_gamma, self.seed, self.dropout_seed = (
            max_grad_norm,
            min_snr_gamma,
            seed,
            dropout_seed,
        )
        self.loss_scale = LossScale(host.dtype, host.device)
        self.num_timesteps = len(schedule.alphas_cumprod)
        ways = {
            "as in training": self._summed_mse,
            "one image at a time": self._one_at_a_time,
            "no held-out loss": self._no_room,
        }
        self._validate = memory.StepDown("while validating", ways, host)
        self.run_pass = Graphed(
            lambda fields: self.forward_backward(fields), host.device, enabled=cuda_graph, say=host.say
        )
        self.publish = Graphed(
            lambda _: flat.publish(), host.device, enabled=cuda_graph, say=host.say, has_smaller=False
        )

    def optimizer_state_bytes(self):
        """What the optimizer will keep on the device: two moments, of 1 byte each with 8-bit state, else 4."""
        return 2 * len(self.flat) * (1 if "8bit" in type(self.optimizer).__name__ else 4)

    def predict(self, fields):
        """Run the UNet on a batch's fields -> (prediction, target), both [B, C, h, w]."""
        z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
        x_t, target = self.schedule.noise(z, fields["eps"], fields["t"])
        prompt_embeds, pooled = self.text(fields)
        keep = fields["keep_text"].to(prompt_embeds.dtype)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": fields["time_ids"].to(self.host.dtype)}
        x_t, prompt_embeds = x_t.to(self.host.dtype), prompt_embeds * keep[:, None, None]
        return self.unet(x_t, fields["t"], prompt_embeds, added_cond_kwargs=added, return_dict=False)[0], target

    def losses(self, fields):
        """(loss as optimised, StepNumbers vector): the weighted loss of these examples, and their share of the step's numbers."""
        mse = noise.mse_per_sample(*self.predict(fields))
        weighted = mse * fields["weight"]
        if self.min_snr_gamma is not None:
            weighted = weighted * self.schedule.min_snr_weight(fields["t"], self.min_snr_gamma)
        loss = weighted.sum()

        # What the log line shows
        mse, t = mse.detach(), fields["t"]
        numbers = StepNumbers.pack(
            mse.device,
            loss=loss.detach(),
            mse=(mse * fields["weight"]).sum(),
            mse_by_quarter=noise.by_quarter(mse, t, self.num_timesteps),
            count_by_quarter=noise.by_quarter(torch.ones_like(mse), t, self.num_timesteps),
        )
        return loss, numbers

    def forward_backward(self, fields):
        """Add the gradients of these examples to the flat gradient -> StepNumbers vector on the device."""
        loss, numbers = self.losses(fields)
        (loss * self.loss_scale.value).backward()
        return numbers

    def step(self, number, batches, stop=False, meanwhile=lambda: None):
        """One attempt at an optimizer step on this process's share of an effective batch.

        Args:
            number: optimizer steps done after this one, from 1.
            batches: batching.Batch list; their weights, over all processes, sum to 1.
            stop: this process was asked to stop; every process hears of it with the statistics.
            meanwhile: called while the GPU works, before the host waits for it.
        Raises:
            PassOutOfMemory: a pass does not fit on some process; nothing has moved.
        """
        device = self.host.device
        total = self._passes(number, batches)
        here = total is None
        flags = StepNumbers.pack(device, stops=float(stop), out_of_memory=float(here))
        total = flags if here else total + flags
        meanwhile()

        # Every process takes part in the sums, whether its passes fitted or not: the others would wait for it for ever
        self.host.sum(self.flat.grad)
        self.host.sum(total)

        # Inf or NaN anywhere shows in the norm: it is the overflow check too
        norm = torch.linalg.vector_norm(self.flat.grad) / self.loss_scale.value
        total = total + StepNumbers.pack(device, grad_norm=norm, loss_scale=self.loss_scale.value)
        numbers = StepNumbers.unpack(total)  # the one wait of the step
        if numbers.out_of_memory:
            self.flat.grad.zero_()
            raise PassOutOfMemory(here)
        return self._finish(number, numbers)

    def _passes(self, number, batches):
        """The StepNumbers vector of all batches, with their gradients in the flat gradient; None, and no gradients, when one does not fit."""
        try:
            total = 0
            for index, batch in enumerate(batches):
                self._seed_dropout(number, index)
                total = total + self.run_pass(batch.tensors)
            return total
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
        self.run_pass.clear()
        free_memory(self.host.device)  # outside of the block above the failed pass's tensors are free
        self.flat.grad.zero_()
        return None

    def _seed_dropout(self, number, index):
        seed = noise.generator_for(self.seed, "dropout", number, index, self.host.rank).initial_seed() >> 1
        torch.manual_seed(seed)  # for PEFT's own dropout
        if self.dropout_seed is not None:
            self.dropout_seed.fill_(seed)

    def _finish(self, number, numbers):
        """Clip, update the parameters and the average -> StepResult; after an overflow only the loss scale moves."""
        applied = math.isfinite(numbers.grad_norm) and math.isfinite(numbers.loss)
        lr_factor = self.lr_factor(number - 1)
        if applied:
            clip = min(1.0, self.max_grad_norm / (numbers.grad_norm + 1e-6)) if self.max_grad_norm else 1.0
            self.flat.grad.mul_(clip / numbers.loss_scale)
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
                group["lr"] = peak * lr_factor
            self._update()
            if self.ema is not None:
                self.ema.update(number)
        self.loss_scale.update(overflow=not applied)
        self.flat.grad.zero_()
        return StepResult(
            loss=numbers.loss,
            mse=numbers.mse,
            mse_quarters=[
                total / n if n else None for total, n in zip(numbers.mse_by_quarter, numbers.count_by_quarter)
            ],
            grad_norm=numbers.grad_norm,
            loss_scale=numbers.loss_scale,
            lr=self.peak_lrs[0] * lr_factor,
            stop=numbers.stops > 0,
            applied=applied,
        )

    def _update(self):
        """Step the optimizer. Its first step makes its state: the graphs make room for it, as it could not be repeated half done."""
        if not self.optimizer.state:
            self.run_pass.clear()
        self.optimizer.step()
        self.publish({})

    @torch.no_grad()
    def validate(self, make_batches, micro_batch):
        """Mean unweighted mse over the examples of `make_batches(micro_batch)`, on every process; without dropout.

        Where memory runs out, the graphs of the passes are dropped and the examples go through one at a time.
        Returns:
            the mean; None when some process had no room for a single example.
        """
        with without_dropout([self.unet, *self.text.encoders]):
            totals = self._validate(make_batches, micro_batch)
        total, examples = self.host.sum(totals).tolist()
        return total / examples if math.isfinite(examples) else None

    def _one_at_a_time(self, make_batches, micro_batch):
        self.run_pass.clear()
        return self._summed_mse(make_batches, 1)

    def _no_room(self, make_batches, micro_batch):
        return torch.full((2,), math.nan, device=self.host.device)

    def _summed_mse(self, make_batches, micro_batch):
        """[sum of mse, number of examples] of validation batches, on the device."""
        totals = torch.zeros(2, device=self.host.device)
        for batch in make_batches(micro_batch):
            fields = {name: tensor.to(self.host.device, non_blocking=True) for name, tensor in batch.tensors.items()}
            mse = noise.mse_per_sample(*self.predict(fields))
            totals += torch.stack([mse.sum(), torch.tensor(float(len(batch)), device=mse.device)])
        return totals
