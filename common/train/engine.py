"""One optimizer step, in one place: forward, loss, backward, all-reduce, overflow check, clipping, optimizer, EMA.

Within the passes nothing waits for the GPU; the CPU reads one small vector per step, which is also the log line.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from common import errors
from common.fast.graphs import Graphed
from common.model import memory, noise
from common.model.adapters import EMA, FlatParameters, without_dropout
from common.model.device import Host, free_memory
from common.model.schedules import LossScale
from common.train.engine_state import check_state, first_not_finite, load_optimizer_state, optimizer_state
from common.train.pass_plan import BlockRecompute
from common.train.step_numbers import StepNumbers, StepResult


class PassOutOfMemory(Exception):
    """A pass needs more GPU memory than there is: on this process (`here`), or only on another one."""

    def __init__(self, here: bool) -> None:
        super().__init__("out of GPU memory in a pass")
        self.here = here


@dataclass(frozen=True)
class EngineSettings:
    """What may be set about a step."""

    max_grad_norm: float  # 0: no clipping
    min_snr_gamma: float | None = None  # None: plain MSE
    seed: int = 0  # of the LoRA dropout masks, together with the step, the pass within it and the process
    cuda_graph: bool = True  # replay passes instead of launching them, on a GPU


class Engine:
    """The UNet, its flat parameters and its optimizer.

    Args:
        text: maps a batch's fields to (prompt_embeds, pooled), see caching.CachedText.
        schedule: on the device.
        lr_factor: optimizer steps done -> factor of the peak learning rate, see schedules.lr_schedule.
        dropout_seed: int64 scalar on the device, from which fused layers derive their masks.
        ema: None where no average is kept.
        recompute: of the UNet; None where it recomputes nothing.
    """

    def __init__(
        self,
        *,
        unet: torch.nn.Module,
        text: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
        schedule: noise.NoiseSchedule,
        flat: FlatParameters,
        optimizer: torch.optim.Optimizer,
        lr_factor: Callable[[int], float],
        host: Host,
        dropout_seed: torch.Tensor,
        ema: EMA | None,
        recompute: BlockRecompute | None,
        settings: EngineSettings,
    ) -> None:
        self.unet = unet
        self.text = text
        self.schedule = schedule
        self.num_timesteps = len(schedule.alphas_cumprod)
        self.host = host
        self.settings = settings

        # What a step moves, and what moves it
        self.flat = flat
        self.ema = ema
        self.optimizer = optimizer
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.lr_factor = lr_factor
        self.loss_scale = LossScale(host.dtype, host.device)
        self.dropout_seed = dropout_seed
        self.recompute = recompute

        # What is launched once and replayed; what is done where memory is short
        graph = dict(device=host.device, enabled=settings.cuda_graph, say=host.say)
        self.run_pass = Graphed(lambda fields: self.forward_backward(fields), **graph)
        self.publish = Graphed(lambda _: flat.publish(), **graph, has_smaller=False)
        ways = {
            "as in training": self._summed_mse,
            "one image at a time": self._one_at_a_time,
            "no held-out loss": self._no_room,
        }
        self._validate = memory.StepDown("while validating", ways, host)

    def predict(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the UNet on a batch's fields -> (prediction, target), both [B, C, h, w]."""
        z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
        x_t, target = self.schedule.noise(z, fields["eps"], fields["t"])

        # A dropped caption is zeros, for SDXL base
        prompt_embeds, pooled = self.text(fields)
        keep = fields["keep_text"].to(prompt_embeds.dtype)
        prompt_embeds = prompt_embeds * keep[:, None, None]
        added = {"text_embeds": pooled * keep[:, None], "time_ids": fields["time_ids"].to(self.host.dtype)}
        x_t = x_t.to(self.host.dtype)
        return self.unet(x_t, fields["t"], prompt_embeds, added_cond_kwargs=added, return_dict=False)[0], target

    def losses(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted loss of these examples, as optimised; their share of the step's numbers, a StepNumbers vector)."""
        mse = noise.mse_per_sample(*self.predict(fields))
        weighted = mse * fields["weight"]
        if self.settings.min_snr_gamma is not None:
            weighted = weighted * self.schedule.min_snr_weight(fields["t"], self.settings.min_snr_gamma)
        loss = weighted.sum()

        # What the log line shows
        mse = mse.detach()
        numbers = StepNumbers.pack(
            mse.device,
            loss=loss.detach(),
            mse=(mse * fields["weight"]).sum(),
            mse_by_quarter=noise.by_quarter(mse, fields["t"], self.num_timesteps),
            count_by_quarter=noise.by_quarter(torch.ones_like(mse), fields["t"], self.num_timesteps),
        )
        return loss, numbers

    def forward_backward(self, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add the gradients of these examples to the flat gradient -> StepNumbers vector on the device."""
        loss, numbers = self.losses(fields)
        (loss * self.loss_scale.value).backward()
        return numbers

    def step(
        self, number: int, batches: list, stop: bool = False, meanwhile: Callable[[], None] = lambda: None
    ) -> StepResult:
        """One attempt at an optimizer step on this process's share of an effective batch.

        Args:
            number: optimizer steps done after this one, from 1.
            batches: batching.Batch list; their weights, over all processes, sum to 1.
            stop: this process was asked to stop; every process hears of it with the statistics.
            meanwhile: called while the GPU works, before the CPU waits for it.
        Raises:
            PassOutOfMemory: a pass does not fit on some process; nothing has moved.
        """
        # The gradient of this process's share
        device = self.host.device
        total = self._passes(number, batches)
        here = total is None
        flags = StepNumbers.pack(device, stops=float(stop), out_of_memory=float(here))
        total = flags if here else total + flags
        meanwhile()

        # Every process takes part in the sums, whether its passes fitted or not: the others would wait for ever
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
        """StepNumbers vector of all batches, and their gradient in `flat`; None, and zeros, if one does not fit."""
        try:
            total = 0
            for index, batch in enumerate(batches):
                self._seed_dropout(number, index)
                total = total + self.run_pass(batch.tensors)
            return total
        except RuntimeError as error:
            if not errors.ran_out(error):
                raise

        # Outside of the block above the failed pass's tensors are free
        self.run_pass.clear()
        free_memory(self.host.device)
        self.flat.grad.zero_()
        return None

    def _seed_dropout(self, number, index):
        identity = self.settings.seed, "dropout", number, index, self.host.rank
        seed = noise.generator_for(*identity).initial_seed() >> 1
        torch.manual_seed(seed)  # for PEFT's own dropout
        self.dropout_seed.fill_(seed)

    def _finish(self, number, numbers):
        """Clip, update the parameters and the average -> StepResult; after an overflow only the loss scale moves."""
        applied = math.isfinite(numbers.grad_norm) and math.isfinite(numbers.loss)
        lr_factor = self.lr_factor(number - 1)
        if applied:
            self._clip(numbers)
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
                group["lr"] = peak * lr_factor
            self._update()
            if self.ema is not None:
                self.ema.update(number)

        # Ready for the next attempt
        self.loss_scale.update(overflow=not applied)
        self.flat.grad.zero_()
        return StepResult(
            loss=numbers.loss,
            mse=numbers.mse,
            mse_quarters=numbers.mse_quarters(),
            grad_norm=numbers.grad_norm,
            loss_scale=numbers.loss_scale,
            lr=self.peak_lrs[0] * lr_factor,
            stop=numbers.stops > 0,
            applied=applied,
        )

    def _clip(self, numbers):
        """Take the loss scale off the gradient, and what its norm has beyond the limit."""
        limit = self.settings.max_grad_norm
        clip = min(1.0, limit / (numbers.grad_norm + 1e-6)) if limit else 1.0
        self.flat.grad.mul_(clip / numbers.loss_scale)

    def _update(self):
        """Step the optimizer.

        Its first step makes its state: the graphs make room for it, as it could not be repeated half done.
        """
        if not self.optimizer.state:
            self.run_pass.clear()
        self.optimizer.step()
        self.publish({})

    # ---------------------------------------------------------------- held-out loss

    @torch.no_grad()
    def validate(self, make_batches: Callable[[int], Iterable], micro_batch: int) -> float | None:
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

    # ---------------------------------------------------------------- state

    def optimizer_state_bytes(self) -> int:
        """What the optimizer will keep on the device: two moments, of 1 byte each with 8-bit state, else 4."""
        return 2 * len(self.flat) * (1 if "8bit" in type(self.optimizer).__name__ else 4)

    def state(self) -> dict[str, object]:
        """What training moves and what it belongs to: {name: tensor, not copied, or a value that JSON can hold}."""
        average = {} if self.ema is None else {"ema": self.ema.average}
        return {
            "layout": self.flat.layout,
            "optimizer_class": type(self.optimizer).__name__,
            "flat": self.flat.data,
            **average,
            **optimizer_state(self.optimizer, self.flat),
            "loss_scale": self.loss_scale.state(),
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Go on from a `state`, whose tensors may lie on the CPU. What is refused leaves the engine as it was.

        Raises:
            UserError: the state of another adapter or optimizer.
            ValueError, KeyError, TypeError, AttributeError: not the whole state of an engine, or not finite.
        """
        check_state(state, self.state())
        self.flat.data.copy_(state["flat"])
        self.flat.publish()
        if self.ema is not None:
            self.ema.average.copy_(state["ema"])
        load_optimizer_state(self.optimizer, self.flat, state)
        self.loss_scale.load_state(state["loss_scale"])

    def not_finite(self) -> str | None:
        """The first tensor of the state that holds a NaN or an infinity, by its name; None where all is finite."""
        return first_not_finite(self.state())
