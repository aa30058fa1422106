"""How much goes through a pass: measured on this card, with these images, instead of guessed; and remembered.

Recomputing activations in the backward pass (arXiv 1604.06174) trades up to a third more work for most of the memory,
block by block; a larger pass uses the GPU better. `choose` times what fits and takes the fastest.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from common import errors
from common.cli.flag_facts import names_where
from common.data import caching
from common.fast import kernel_check
from common.files import write_json
from common.model import device
from common.model.device import GIB

VERSION = 3  # raise it when a pass takes other time or memory than before: remembered plans are then measured again
SPARE_GIB = 0.75  # workspaces of cuBLAS and cuDNN, and the allocator's fragments
LARGEST_PASS = 8
TIMED_CANDIDATES = 3
NOT_A_PLAN = (OSError, ValueError, KeyError, TypeError, AttributeError)  # absent, damaged, or of another UNet


class BlockRecompute:
    """What diffusers calls with every block of a UNet: recomputes it in the backward pass, unless it is in `kept`.

    Args:
        preserve_rng_state: needed by layers whose dropout draws from the device's generator.
    """

    def __init__(self, preserve_rng_state: bool = False) -> None:
        self.preserve_rng_state = preserve_rng_state
        self.kept = set()
        self.sizes = None  # a dict while blocks are measured: block -> bytes that it would keep

    def __call__(self, block: torch.nn.Module, *args):
        if self.sizes is not None:
            before = torch.cuda.memory_allocated()
            output = block(*args)
            self.sizes[block] = torch.cuda.memory_allocated() - before
            del output
        if block in self.kept:
            return block(*args)
        return recomputed(block, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)


@dataclass
class PassPlan:
    """How a step is cut into passes: `micro_batch` images each, and what is recomputed (None: nothing)."""

    micro_batch: int
    recompute: BlockRecompute | None = None
    remembered: Path | None = None  # the file that holds it for later runs

    def step_down(self) -> bool:
        """Take the next smaller plan, and let no later run start with this one; False when there is none."""
        if self.remembered:
            self.remembered.unlink(missing_ok=True)
        if self.recompute and self.recompute.kept:
            self.recompute.kept = set()
        elif self.micro_batch > 1:
            self.micro_batch = -(-self.micro_batch // 2)
        else:
            return False
        return True


def smallest_pass_too_large(recompute: BlockRecompute | None) -> errors.OutOfMemory:
    """The one line for a card that has no room for one image a pass."""
    if recompute is None:
        return errors.OutOfMemory(
            "with one image a pass", f"add --gradient_checkpointing, or {errors.OUT_OF_MEMORY_ADVICE}"
        )
    return errors.OutOfMemory("with one image a pass and every block recomputed")


# ---------------------------------------------------------------- chosen for a run


def choose(flags, engine, data) -> PassPlan:
    """On a GPU the plan that is fastest by measurement, unless --no_auto_fit; else --train_batch_size images a pass.

    Args:
        engine: ready to train; gradients are zero again afterwards.
        data: assembly.Data.
    """
    host = engine.host
    if host.device.type != "cuda" or not flags.auto_fit:
        return PassPlan(flags.train_batch_size, engine.recompute)

    # Anew, as encoding may have left less; in eighths, as what is free differs by some MiB from run to run
    budget_gib = int(8 * device.limit_memory(host.device, flags.max_vram_gb)) / 8
    effective_batch = data.length.effective_batch
    share = len(range(host.rank, effective_batch, host.world))  # if uneven, the first processes have one more

    def make_batches(micro_batch):
        return data.examples.effective_batch(0, effective_batch, micro_batch, host.rank, host.world)

    # Measured, or read from where a run like this one has left it
    shape = make_batches(1)[0].tensors["mean"].shape
    gpu = torch.cuda.get_device_name(), torch.backends.cuda.flash_sdp_enabled(), budget_gib, host.rank
    remembered = Path(flags.cache_dir) / "plans" / f"{plan_key(flags, gpu, share, shape, len(engine.flat))}.json"
    plan, line = recall_or_measure(engine, make_batches, share=share, budget_gib=budget_gib, remembered=remembered)
    host.say(line)
    return plan


def plan_key(flags, *measured_with) -> str:
    """What a remembered plan belongs to: the flags and versions that change a pass, and what it was measured with."""
    versions = VERSION, version("torch"), version("diffusers"), kernel_check.refused()
    values = [getattr(flags, name) for name in names_where(flags, changes_a_pass=True)]
    return caching.content_key("plan", *versions, *measured_with, values)


def recall_or_measure(
    engine, make_batches: Callable[[int], list], *, share: int, budget_gib: float, remembered: Path
) -> tuple[PassPlan, str]:
    """The fastest plan within `budget_gib` of GPU memory for `share` images a step on this process.

    Args:
        make_batches: micro_batch -> the batches of one step.
        remembered: the file that keeps the result for runs like this one; what it holds is not measured again.
    Returns:
        (PassPlan, the line that says what was chosen).
    """
    with contextlib.suppress(*NOT_A_PLAN):
        micro_batch, kept, line = _read_plan(remembered, engine.unet)
        if engine.recompute:
            engine.recompute.kept = kept
        plan = PassPlan(micro_batch, engine.recompute, remembered)
        return plan, f"{line} (as an earlier run measured, {remembered})"

    plan, line, seconds = _measure(engine, make_batches, share, budget_gib)
    if math.isfinite(seconds):
        _write_plan(remembered, plan, line, engine.unet)
    return replace(plan, remembered=remembered), line


def _read_plan(remembered, unet):
    """(images a pass, blocks that are not recomputed, the line that says it); raises one of NOT_A_PLAN."""
    plan = json.loads(remembered.read_text())
    micro_batch, line = plan["micro_batch"], plan["line"]
    if not (isinstance(micro_batch, int) and 1 <= micro_batch <= LARGEST_PASS and isinstance(line, str)):
        raise ValueError(f"{remembered}: {micro_batch} images a pass")
    return micro_batch, {unet.get_submodule(name) for name in plan["kept"] if name}, line


def _write_plan(remembered, plan, line, unet):
    kept = plan.recompute.kept if plan.recompute else ()
    names = [name for name, module in unet.named_modules() if module in kept]
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_json(remembered, {"micro_batch": plan.micro_batch, "kept": names, "line": line})


# ---------------------------------------------------------------- measured


class Trial(NamedTuple):
    """A plan that was timed."""

    seconds: float  # per image; infinite when it does not fit
    micro_batch: int
    kept: set  # blocks that are not recomputed


def _measure(engine, make_batches, share, budget_gib):
    """(PassPlan, the line that says it, seconds per image: infinite when nothing that was tried fits)."""
    engine.host.say(
        "measuring how many images fit a pass: about 10 s on a fast card, up to a minute on a T4; remembered afterwards"
    )
    base, lowest, sizes = _probe(engine, make_batches(1)[0])
    room = (budget_gib - SPARE_GIB) * GIB - base

    # Time the largest passes that may fit, and take the fastest
    divisors = [n for n in range(1, min(share, LARGEST_PASS) + 1) if share % n == 0]
    candidates = [n for n in divisors if n * lowest <= room or n == 1]
    trials = []
    for micro_batch in candidates[-TIMED_CANDIDATES:]:
        spare = (room - micro_batch * lowest) / micro_batch
        trials.append(_try(engine, make_batches, micro_batch=micro_batch, sizes=sizes, room=spare))
    best = min(trials, key=lambda trial: trial.seconds)
    if engine.recompute:
        engine.recompute.kept = best.kept

    # What to say of it
    used_gib = (base + best.micro_batch * (lowest + sum(sizes[block] for block in best.kept))) / GIB
    passes = share // best.micro_batch
    cut = f"{best.micro_batch} image{'s'[: best.micro_batch > 1]} in {passes} pass{'es' if passes > 1 else ''}"
    blocks = f"{len(sizes) - len(best.kept)} of {len(sizes)} blocks recomputed"
    speed = f"{best.seconds:.3f} s/img" if math.isfinite(best.seconds) else "the least there is"
    line = f"plan: {cut}, {blocks}, {speed}, about {used_gib:.1f} of {budget_gib:.1f} GiB"
    return PassPlan(best.micro_batch, engine.recompute), line, best.seconds


def _try(engine, make_batches, *, micro_batch, sizes, room) -> Trial:
    """Time passes of one size. The room in bytes an image is an estimate: if too much, half of it, then none."""
    for part in (1.0, 0.5, 0.0):
        kept = _blocks_to_keep(sizes, part * room)
        seconds = _seconds_per_image(engine, make_batches, micro_batch, kept)
        if math.isfinite(seconds) or not kept:
            break
    return Trial(seconds, micro_batch, kept)


def _probe(engine, batch):
    """One pass of one image, every block recomputed.

    Returns:
        (bytes before it, optimizer state included; peak bytes above those; {block: bytes it would keep}).
    """
    before = torch.cuda.memory_allocated()
    base = before + engine.optimizer_state_bytes()
    if engine.recompute:
        engine.recompute.sizes = {}

    # The pass, with its peak
    engine.host.start_new_peak()
    try:
        engine.forward_backward({name: tensor.to(engine.host.device) for name, tensor in batch.tensors.items()})
    except RuntimeError as error:
        if errors.ran_out(error):
            raise smallest_pass_too_large(engine.recompute) from None
        raise
    lowest = torch.cuda.max_memory_allocated() - before
    engine.flat.grad.zero_()

    # The sizes of the blocks, where some can be recomputed
    sizes = {}
    if engine.recompute:
        sizes = engine.recompute.sizes
        engine.recompute.sizes = None
    return base, lowest, sizes


def _blocks_to_keep(sizes, room):
    """As many blocks as keep their activations in `room` bytes; the last first: their activations live shortest."""
    kept = set()
    for block, size in reversed(sizes.items()):
        if size <= room:
            kept.add(block)
            room -= size
    return kept


def _seconds_per_image(engine, make_batches, micro_batch, kept):
    """Time one pass as it will be run; infinite when it does not fit after all."""
    if engine.recompute:
        engine.recompute.kept = kept
    tensors = make_batches(micro_batch)[0].tensors
    seconds = math.inf

    # Launched as it is, captured, replayed twice: the last one counts
    try:
        for _ in range(4):
            started_s = time.perf_counter()
            engine.run_pass(tensors)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started_s) / micro_batch
    except RuntimeError as error:
        if not errors.ran_out(error):
            raise
        seconds = math.inf

    # As if nothing had been run
    engine.run_pass.clear()
    engine.flat.grad.zero_()
    return seconds
