"""Steps, from the first or from a checkpoint, to the last: validation, checkpoints, early stop, time limit, signals."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.data.batching import Batch, Examples
from common.errors import UserError
from common.model import device
from common.system.stopping import StopRequest
from common.train.engine import Engine, PassOutOfMemory
from common.train.pass_plan import PassPlan, smallest_pass_too_large
from common.train.report import Report
from common.train.results import Results
from common.train.run_length import RunLength
from common.train.step_numbers import StepResult

NON_FINITE_LIMIT = 3  # batches in a row without a finite loss, before the run gives up
SMALLEST_SCALE = 2.0**-10


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    batches: int = 0  # effective batches used: the steps, and those skipped for a loss that was not finite
    effective_batch: int = 0  # images of a step; another number would read the data from another place
    best_val_loss: float = math.inf
    validations_without_gain: int = 0


@dataclass(frozen=True)
class Run:
    """What the loop works on."""

    engine: Engine
    examples: Examples
    held_out: Examples | None
    length: RunLength
    plan: PassPlan  # stepped down when a pass does not fit the memory
    progress: Progress  # moves with every step
    results: Results
    report: Report  # closed at the end
    stopping: StopRequest  # listening


def train(run: Run) -> str:
    """Run to the last step, or until a signal, the time limit or early stopping ends it; returns why it ended.

    Raises:
        UserError: the run has diverged, the loss is not finite NON_FINITE_LIMIT times in a row, or no plan fits the
            memory (the latter two after a checkpoint).
    """
    length, progress, stopping = run.length, run.progress, run.stopping
    attempts = _Attempts(run)
    ended = "early stopping" if _is_out_of_patience(run) else None  # a run that had stopped early stays so
    with contextlib.closing(run.report):
        while progress.step < length.total_steps and not ended:
            # One optimizer step
            started_s = time.monotonic()
            result = attempts.step()
            if result is None:
                continue

            # What it measured
            row = _row(run, result, time.monotonic() - started_s)
            validates = progress.step % length.validation_steps == 0 or progress.step == length.total_steps
            if validates and run.held_out is not None:
                row |= _validate(run)
            run.report.log(row)

            # Saved first, then rendered: pictures need memory that training does not
            if validates and run.results.has_pictures:
                _save(run)
                run.results.render(progress.step)
            stopping.step_took(time.monotonic() - started_s)

            # Whether to go on
            ended = _reason_to_end(run, result)
            if not ended and length.checkpointing_steps and progress.step % length.checkpointing_steps == 0:
                stopping.save_took(_save(run))
        _save(run)
    return ended or "finished"


# ---------------------------------------------------------------- one step


class _Attempts:
    """Attempts at the next step of a run, until one is applied."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._batches = _Prefetch(self._make_batches)
        self._non_finite = 0  # batches skipped in a row

    def step(self) -> StepResult | None:
        """One attempt; None where nothing was applied, and the next attempt is smaller, or goes to the next batch.

        Raises:
            UserError: see `train`.
        """
        progress, host, stopping = self.run.progress, self.run.engine.host, self.run.stopping
        # The flag of a process travels with its next step, so that all of them stop after the same one
        or_next = " or the next" if host.world > 1 else ""
        stopping.doing = f"finishing step {progress.step + 1}{or_next}, then saving"

        # Forward, backward, update; meanwhile the next batches
        batches = self._batches(progress.batches)
        make_next = lambda: self._batches.prepare(progress.batches + 1)  # noqa: E731
        try:
            result = self.run.engine.step(progress.step + 1, batches, stopping.reason is not None, make_next)
        except PassOutOfMemory as error:
            self._batches.forget()
            self._step_down(error.here)
            return None

        # Whether it counts
        if not result.applied:
            self._after_not_finite(result)
            return None
        self._non_finite = 0
        progress.step += 1
        progress.batches += 1
        return result

    def _make_batches(self, number) -> list[Batch]:
        run, host = self.run, self.run.engine.host
        size = run.length.effective_batch
        return run.examples.effective_batch(number, size, run.plan.micro_batch, host.rank, host.world)

    def _step_down(self, here):
        """After a pass that did not fit on some process: the next smaller plan where it did not."""
        plan, host = self.run.plan, self.run.engine.host
        has_smaller = plan.step_down() if here else True
        if not all(host.gather([has_smaller])):
            _save(self.run)
            raise smallest_pass_too_large(plan.recompute) from None
        if here:
            all_recomputed = plan.recompute and not plan.recompute.kept
            recomputed = "every block recomputed" if all_recomputed else "as before otherwise"
            self.run.report.say(
                f"out of GPU memory: the step is repeated with {plan.micro_batch} images a pass, {recomputed}"
            )

    def _after_not_finite(self, result):
        """Skip the batch; a mere overflow of gradients is tried again at half the scale."""
        scale, report = self.run.engine.loss_scale, self.run.report
        if math.isfinite(result.loss) and scale.enabled and result.loss_scale > SMALLEST_SCALE:
            report.say(
                f"gradients overflowed in fp16 at loss scale {result.loss_scale:g}: the step is repeated at half of it"
            )
            self._non_finite = 0
            return
        report.say(f"loss {result.loss}, gradient norm {result.grad_norm}: the batch is skipped")
        self.run.progress.batches += 1
        self._non_finite += 1
        if self._non_finite == NON_FINITE_LIMIT:
            _save(self.run)
            raise UserError(_non_finite_message(self.run))


class _Prefetch:
    """The result of `make(number)`, made ahead of time when `prepare` is given a chance."""

    def __init__(self, make: Callable[[int], list]) -> None:
        self._make = make
        self._number = None
        self._made = None

    def prepare(self, number: int) -> None:
        if number != self._number:
            self._number = number
            self._made = self._make(number)

    def forget(self) -> None:
        self._number = None

    def __call__(self, number: int) -> list:
        self.prepare(number)
        return self._made


def _non_finite_message(run):
    size, last = run.length.effective_batch, run.progress.batches
    positions = range((last - NON_FINITE_LIMIT) * size, last * size)
    names = dict.fromkeys(run.examples.name_at(position) for position in positions)
    saved = "; a checkpoint was saved" if run.progress.step else ""
    return (
        f"the loss was not finite in {NON_FINITE_LIMIT} batches in a row, made of {', '.join(names)}; look at these"
        f" images, lower --learning_rate, or use --mixed_precision no{saved}"
    )


# ---------------------------------------------------------------- after it


def _row(run, result, seconds):
    """One line of metrics.jsonl."""
    progress, size = run.progress, run.length.effective_batch
    return dict(
        step=progress.step,
        epoch=round(progress.batches * size / len(run.examples), 4),
        loss=result.loss,
        mse=result.mse,
        **{f"mse_t{i}": value for i, value in enumerate(result.mse_quarters)},
        lr=result.lr,
        grad_norm=result.grad_norm,
        loss_scale=result.loss_scale,
        s_per_img=seconds / size,
        peak_gib=run.engine.host.peak_gib(),
        seconds=round(device.seconds_since_start(), 2),
    )


def _validate(run):
    """What a validation adds to the row of metrics; the progress counts how long there was no gain."""
    progress, host = run.progress, run.engine.host
    make_batches = lambda size: run.held_out.validation_batches(size, host.rank, host.world)  # noqa: E731
    loss = run.engine.validate(make_batches, run.plan.micro_batch)
    if loss is None:  # there was no memory for it, which has been said
        return {}
    gained = loss < progress.best_val_loss
    progress.best_val_loss = min(loss, progress.best_val_loss)
    progress.validations_without_gain = 0 if gained else progress.validations_without_gain + 1
    return {"val_loss": loss}


def _save(run):
    """Save the step, unless it is saved already, and plot what led to it; returns the seconds it took."""
    started_s = time.monotonic()
    run.results.save_step(run.progress)
    run.report.plot()
    return time.monotonic() - started_s


def _reason_to_end(run, result):
    """Why no further step is taken; None where the run goes on, or is at its last step."""
    asked = result.stop or (run.engine.host.world == 1 and run.stopping.reason is not None)
    if asked and run.progress.step < run.length.total_steps:
        return run.stopping.reason or "stopped by another process"
    return "early stopping" if _is_out_of_patience(run) else None


def _is_out_of_patience(run):
    patience = run.length.early_stopping_patience
    return patience is not None and run.progress.validations_without_gain >= patience
