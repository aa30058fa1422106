"""One optimizer step, in one place: forward, loss, backward, all-reduce, overflow check, clipping, optimizer, EMA.

Within the passes of a step nothing waits for the GPU; the host reads one small tensor per step, which is also the log line.
"""

import math
from dataclasses import dataclass

import torch

from common import noise
from common.adapters import without_dropout
from common.graphs import Graphed

GROWTH_INTERVAL = 2000  # steps without an overflow before the loss scale doubles


class LossScale:
    """Dynamic loss scaling for fp16: halved at an overflow, doubled after GROWTH_INTERVAL good steps; 1 for other dtypes."""

    def __init__(self, dtype, device):
        self.enabled = dtype == torch.float16
        self.value = torch.full((), 2.0**12 if self.enabled else 1.0, device=device)  # on the device: a CUDA graph reads it
        self.good_steps = 0

    def update(self, overflow):
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value.mul_(0.5)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value.mul_(2.0)


def lr_schedule(name, warmup_steps, total_steps, peak_lr):
    """One of diffusers' schedules as a function: optimizer steps done -> factor of the peak learning rate. It has no state."""
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)  # "polynomial" ends at an absolute rate
    return get_scheduler(name, unused, num_warmup_steps=warmup_steps, num_training_steps=total_steps).lr_lambdas[0]


class PassOutOfMemory(Exception):
    """A forward and backward pass needs more GPU memory than there is."""


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
        self.max_grad_norm, self.min_snr_gamma, self.seed, self.dropout_seed = max_grad_norm, min_snr_gamma, seed, dropout_seed
        self.loss_scale = LossScale(host.dtype, host.device)
        self.num_timesteps = len(schedule.alphas_cumprod)
        self.run_pass = Graphed(lambda fields: self.forward_backward(fields), host.device, enabled=cuda_graph, say=host.say)
        self.publish = Graphed(lambda _: flat.publish(), host.device, enabled=cuda_graph, say=host.say, has_smaller=False)

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
        """(loss as optimised, statistics): the weighted loss of these examples, and [mse, mse by quarter, count by quarter]."""
        mse = noise.mse_per_sample(*self.predict(fields))
        weighted = mse * fields["weight"]
        if self.min_snr_gamma is not None:
            weighted = weighted * self.schedule.min_snr_weight(fields["t"], self.min_snr_gamma)
        mse, t = mse.detach(), fields["t"]
        quarters = [noise.by_quarter(values, t, self.num_timesteps) for values in (mse, torch.ones_like(mse))]
        return weighted.sum(), torch.cat([(mse * fields["weight"]).sum().view(1), *quarters])

    def forward_backward(self, fields):
        """Add the gradients of these examples to the flat gradient -> [loss, *statistics] on the device."""
        loss, statistics = self.losses(fields)
        (loss * self.loss_scale.value).backward()
        return torch.cat([loss.detach().view(1), statistics])

    def step(self, number, batches, stop=False, meanwhile=lambda: None):
        """One attempt at an optimizer step on this process's share of an effective batch.

        Args:
            number: optimizer steps done after this one, from 1.
            batches: batching.Batch list; their weights, over all processes, sum to 1.
            stop: this process was asked to stop; every process hears of it with the statistics.
            meanwhile: called while the GPU works, before the host waits for it.
        Raises:
            PassOutOfMemory: a pass does not fit; nothing has moved.
        """
        total = torch.cat([self._passes(number, batches), torch.full((1,), float(stop), device=self.host.device)])
        meanwhile()
        self.host.sum(self.flat.grad)
        self.host.sum(total)
        norm = (
            torch.linalg.vector_norm(self.flat.grad) / self.loss_scale.value
        )  # inf or NaN anywhere shows here: this is the overflow check too
        numbers = torch.cat([total, norm.view(1), self.loss_scale.value.view(1)]).tolist()  # the one wait of the step
        return self._finish(number, *numbers)

    def _passes(self, number, batches):
        try:
            total = 0
            for index, batch in enumerate(batches):
                self._seed_dropout(number, index)
                total = total + self.run_pass(batch.tensors)
            return total
        except torch.OutOfMemoryError:
            pass  # outside of this block the failed pass's tensors are free
        self.flat.grad.zero_()
        self.run_pass.clear()
        raise PassOutOfMemory

    def _seed_dropout(self, number, index):
        seed = noise.generator_for(self.seed, "dropout", number, index, self.host.rank).initial_seed() >> 1
        torch.manual_seed(seed)  # for PEFT's own dropout
        if self.dropout_seed is not None:
            self.dropout_seed.fill_(seed)

    def _finish(self, number, loss, mse, *rest):
        sums, counts, (stop, norm, scale) = rest[: noise.QUARTERS], rest[noise.QUARTERS : 2 * noise.QUARTERS], rest[2 * noise.QUARTERS :]
        applied, lr_factor = math.isfinite(norm) and math.isfinite(loss), self.lr_factor(number - 1)
        if applied:
            clip = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
            self.flat.grad.mul_(clip / scale)
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
                group["lr"] = peak * lr_factor
            self.optimizer.step()
            self.publish({})
            if self.ema is not None:
                self.ema.update(number)
        self.loss_scale.update(overflow=not applied)
        self.flat.grad.zero_()
        quarters = [total / n if n else None for total, n in zip(sums, counts)]
        return StepResult(loss, mse, quarters, norm, scale, self.peak_lrs[0] * lr_factor, stop > 0, applied)

    @torch.no_grad()
    def validate(self, batches):
        """Mean unweighted mse over validation batches, on every process; without dropout."""
        totals = torch.zeros(2, device=self.host.device)
        with without_dropout([self.unet, *self.text.encoders]):
            for batch in batches:
                fields = {name: tensor.to(self.host.device, non_blocking=True) for name, tensor in batch.tensors.items()}
                mse = noise.mse_per_sample(*self.predict(fields))
                totals += torch.stack([mse.sum(), torch.tensor(float(len(batch)), device=mse.device)])
        total, examples = self.host.sum(totals).tolist()
        return total / examples
