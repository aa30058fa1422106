"""Steps, from the first or from a checkpoint, to the last: validation, checkpoints, early stop, time limit, signals."""

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from common import checkpoint, device, run_folder
from common.command_line import UserError
from common.engine import PassOutOfMemory
from common.fit import smallest_pass_too_large

NON_FINITE_LIMIT = 3  # batches in a row without a finite loss, before the run gives up
SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class Plan:
    """How long, how much at a time, and what happens on the way. Steps are optimizer steps."""

    output_dir: Path
    total_steps: int
    effective_batch: int
    checkpointing_steps: int
    checkpoints_total_limit: Optional[int]
    validation_steps: int
    early_stopping_patience: Optional[int] = None
    ends_s: float = math.inf  # on the monotonic clock: by then everything must be saved


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    batches: int = 0  # effective batches used: the steps, and those skipped for a loss that was not finite
    effective_batch: int = 0  # images of a step; another number would read the data from another place
    best_val_loss: float = math.inf
    validations_without_gain: int = 0


def total_steps(max_train_steps, num_train_epochs, num_samples, effective_batch):
    """Optimizer steps of a run: `max_train_steps` wins; otherwise as many as cover the epochs. Windows run across epoch ends."""
    return max_train_steps or math.ceil(num_train_epochs * num_samples / effective_batch)


def train(engine, examples, held_out, plan, fit, report, progress, draw_samples, save_weights, stopping):
    """Run to the end of the plan, or until a signal, the time limit or early stopping ends it; returns (progress, why it ended).

    Args:
        examples, held_out: batching.Examples; held_out may be None.
        fit: fit.Fit, how a step is cut into passes; stepped down when one does not fit the memory.
        draw_samples: step -> None, draws the validation images; None when there are none to draw.
        save_weights: step -> None, writes the adapter files of a checkpointed step.
        report: report.Report, closed at the end.
        stopping: stopping.StopRequest, listening.
    Raises:
        UserError: the loss is not finite NON_FINITE_LIMIT times in a row, or no plan fits the memory (both after a checkpoint).
    """
    host, non_finite = engine.host, 0
    ended = (
        "early stopping" if _out_of_patience(plan, progress) else "finished"
    )  # a run that had stopped early stays so
    fetch = _Prefetch(
        lambda number: examples.effective_batch(number, plan.effective_batch, fit.micro_batch, host.rank, host.world)
    )
    save = _Saver(engine, plan, save_weights, progress.step)
    with contextlib.closing(report):
        while progress.step < plan.total_steps and ended == "finished":
            step_started = time.monotonic()
            # the flag of a process travels with its next step, so that all of them stop after the same one
            stopping.doing = (
                f"finishing step {progress.step + 1}{' or the next' if host.world > 1 else ''}, then saving"
            )

            # One optimizer step
            batches = fetch(progress.batches)
            try:
                result = engine.step(
                    progress.step + 1, batches, stopping.reason is not None, lambda: fetch.prepare(progress.batches + 1)
                )
            except PassOutOfMemory as error:
                fetch.forget()
                if not _step_down(fit, error.here, host, report):
                    save(progress)
                    raise smallest_pass_too_large(fit.checkpointing) from None
                continue
            if not result.applied:
                skipped = _skip_batch(engine, result, report)
                progress.batches += skipped
                non_finite = non_finite + 1 if skipped else 0
                if non_finite == NON_FINITE_LIMIT:
                    save(progress)
                    raise UserError(_non_finite_message(examples, progress, plan))
                continue
            non_finite = 0
            progress.step, progress.batches = progress.step + 1, progress.batches + 1

            # What it measured
            row = _row(result, progress, plan, len(examples), time.monotonic() - step_started, engine)
            validates = progress.step % plan.validation_steps == 0 or progress.step == plan.total_steps
            if validates and held_out is not None:
                row |= _validate(engine, held_out, fit.micro_batch, progress)
            report.log(row)

            # Saved first, then drawn: pictures need memory that training does not
            if validates and draw_samples is not None:
                save(progress)
                draw_samples(progress.step)
            stopping.longest_step_s = max(stopping.longest_step_s, time.monotonic() - step_started)

            # Whether to go on
            asked = result.stop or (host.world == 1 and stopping.reason is not None)
            if asked and progress.step < plan.total_steps:
                ended = stopping.reason or "stopped by another process"
            elif _out_of_patience(plan, progress):
                ended = "early stopping"
            elif plan.checkpointing_steps and progress.step % plan.checkpointing_steps == 0:
                stopping.longest_save_s = max(stopping.longest_save_s, save(progress))
        save(progress)
    return progress, ended


def _out_of_patience(plan, progress):
    return (
        plan.early_stopping_patience is not None and progress.validations_without_gain >= plan.early_stopping_patience
    )


class _Prefetch:
    """The result of `make(number)`, made ahead of time when `prepare` is given a chance."""

    def __init__(self, make):
        self._make, self._number, self._made = make, None, None

    def prepare(self, number):
        if number != self._number:
            self._number, self._made = number, self._make(number)

    def forget(self):
        self._number = None

    def __call__(self, number):
        self.prepare(number)
        return self._made


class _Saver:
    """Writes the adapter file and a checkpoint of a step, unless that step's are there already; returns the seconds it took.

    Raises:
        UserError: the run has diverged; what is not finite is not saved, so the newest checkpoint is one to go on from.
    """

    def __init__(self, engine, plan, save_weights, step):
        self._engine, self._plan, self._save_weights, self._saved = engine, plan, save_weights, step

    def __call__(self, progress):
        started = time.monotonic()
        if what := checkpoint.not_finite(self._engine):
            raise UserError(_diverged_message(what, progress, self._plan))
        if self._engine.host.is_main and progress.step != self._saved:
            self._save_weights(
                progress.step
            )  # first: from the checkpoint on, a killed run would not come back to write it
            limit = self._plan.checkpoints_total_limit
            checkpoint.save_checkpoint(self._plan.output_dir, progress.step, self._engine, asdict(progress), limit)
        self._saved = progress.step
        self._engine.host.barrier()
        return time.monotonic() - started


def _step_down(fit, here, host, report):
    """After a pass that did not fit on some process: the next smaller plan where it did not; False when one of them has none."""
    has_smaller = fit.step_down() if here else True
    if not all(host.gather([has_smaller])):
        return False
    if here:
        recomputed = (
            "every block recomputed" if fit.checkpointing and not fit.checkpointing.kept else "as before otherwise"
        )
        report.say(f"out of GPU memory: the step is repeated with {fit.micro_batch} images a pass, {recomputed}")
    return True


def _skip_batch(engine, result, report):
    """After a step that was not applied: whether to drop its batch. A mere gradient overflow is tried again at half the scale."""
    if math.isfinite(result.loss) and engine.loss_scale.enabled and result.loss_scale > SMALLEST_SCALE:
        report.say(
            f"gradients overflowed in fp16 at loss scale {result.loss_scale:g}: the step is repeated at half of it"
        )
        return False
    report.say(f"loss {result.loss}, gradient norm {result.grad_norm}: the batch is skipped")
    return True


def _non_finite_message(examples, progress, plan):
    first = (progress.batches - NON_FINITE_LIMIT) * plan.effective_batch
    names = dict.fromkeys(examples.name_at(i) for i in range(first, progress.batches * plan.effective_batch))
    return (
        f"the loss was not finite in {NON_FINITE_LIMIT} batches in a row, made of {', '.join(names)}; look at these images,"
        f" lower --learning_rate, or use --mixed_precision no{'; a checkpoint was saved' if progress.step else ''}"
    )


def _diverged_message(what, progress, plan):
    """The weights themselves are at fault, whatever images the last batches held."""
    saved = run_folder.find_checkpoints(plan.output_dir)
    cure = (
        f"--resume_from_checkpoint latest goes on from step {run_folder.step_of(saved[-1])}" if saved else "start again"
    )
    return (
        f"the training has diverged: after step {progress.step} its own numbers ({what}) hold NaN or infinity; nothing was saved of them."
        f" Lower --learning_rate, or use --mixed_precision no; {cure}"
    )


def _row(result, progress, plan, num_samples, seconds, engine):
    """One line of metrics.jsonl."""
    return dict(
        step=progress.step,
        epoch=round(progress.batches * plan.effective_batch / num_samples, 4),
        loss=result.loss,
        mse=result.mse,
        **{f"mse_t{i}": value for i, value in enumerate(result.mse_quarters)},
        lr=result.lr,
        grad_norm=result.grad_norm,
        loss_scale=result.loss_scale,
        s_per_img=seconds / plan.effective_batch,
        peak_gib=engine.host.peak_gib(),
        seconds=round(device.seconds_since_start(), 2),
    )


def _validate(engine, held_out, micro_batch, progress):
    """What a validation adds to the row of metrics; `progress` counts how long there was no gain."""
    loss = engine.validate(
        lambda size: held_out.validation_batches(size, engine.host.rank, engine.host.world),
        micro_batch,
    )
    if loss is None:  # there was no memory for it, which has been said
        return {}
    gained = loss < progress.best_val_loss
    progress.best_val_loss = min(loss, progress.best_val_loss)
    progress.validations_without_gain = 0 if gained else progress.validations_without_gain + 1
    return {"val_loss": loss}
