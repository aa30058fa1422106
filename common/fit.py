"""How much goes through a pass: measured on this card, with these images, instead of guessed; and remembered.

Recomputing activations in the backward pass (checkpointing, arXiv 1604.06174) trades up to a third more work for most of the
memory, block by block; a larger pass uses the GPU better. `measured` times what fits and takes the fastest.
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
from torch.utils.checkpoint import checkpoint

from common import memory
from common.device import GIB
from common.files import write_json

VERSION = 3  # raise it when a pass takes other time or memory than before: remembered plans are then measured again
SPARE_GIB = 0.75  # workspaces of cuBLAS and cuDNN, and the allocator's fragments
LARGEST_PASS = 8
TIMED_CANDIDATES = 3


class BlockCheckpointing:
    """The checkpoint function of a UNet: recomputes every block in the backward pass, except those in `kept`.

    Args:
        preserve_rng_state: needed by layers whose dropout draws from the device's generator.
    """

    def __init__(self, preserve_rng_state=False):
        self.preserve_rng_state = preserve_rng_state
        self.kept = set()
        self.sizes = None  # a dict while blocks are measured: block -> bytes that it would keep

    def __call__(self, block, *args):
        if self.sizes is not None:
            before = torch.cuda.memory_allocated()
            output = block(*args)
            self.sizes[block] = torch.cuda.memory_allocated() - before
            del output
        if block in self.kept:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)


@dataclass
class Fit:
    """How a run cuts its effective batch: `micro_batch` images a pass, and what is recomputed (None: nothing)."""

    micro_batch: int
    checkpointing: Optional[BlockCheckpointing] = None
    remembered: Optional[Path] = None  # the file that holds it for later runs

    def step_down(self):
        """The next smaller plan after an out-of-memory, which no later run starts with; False when there is none."""
        if self.remembered:
            self.remembered.unlink(missing_ok=True)
        if self.checkpointing and self.checkpointing.kept:
            self.checkpointing.kept = set()
        elif self.micro_batch > 1:
            self.micro_batch = -(-self.micro_batch // 2)
        else:
            return False
        return True


def smallest_pass_too_large(checkpointing: BlockCheckpointing | None) -> memory.OutOfMemory:
    """The one line for a card that has no room for one image a pass."""
    if checkpointing is None:
        return memory.OutOfMemory("with one image a pass", f"add --gradient_checkpointing, or {memory.ADVICE}")
    return memory.OutOfMemory("with one image a pass and every block recomputed")


def measured(engine, make_batches, share, checkpointing, budget_gib, remembered):
    """The fastest Fit within `budget_gib` of GPU memory for `share` images a step on this process.

    Args:
        engine: ready to train; gradients are zero again afterwards.
        make_batches: micro_batch -> the batches of one step.
        checkpointing: BlockCheckpointing of the UNet, or None where nothing may be recomputed.
        remembered: Path of the file that keeps the result for runs like this one; what it holds is not measured again.
    Returns:
        (Fit, the line that says what was chosen).
    """
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError
    ):  # there is none, or it is damaged or of another UNet
        micro_batch, kept, line = _read_plan(remembered, engine.unet)
        if checkpointing:
            checkpointing.kept = kept
        return Fit(micro_batch, checkpointing, remembered), f"{line} (as an earlier run measured, {remembered})"
    fit, line, seconds = _measure(engine, make_batches, share, checkpointing, budget_gib)
    if math.isfinite(seconds):
        kept = [name for name, module in engine.unet.named_modules() if checkpointing and module in checkpointing.kept]
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"micro_batch": fit.micro_batch, "kept": kept, "line": line})
    return replace(fit, remembered=remembered), line


def _read_plan(remembered, unet):
    """(images a pass, blocks that are not recomputed, the line that says it) of a plan's file; an error where it cannot be such a plan."""
    plan = json.loads(remembered.read_text())
    micro_batch, line = plan["micro_batch"], plan["line"]
    if not (isinstance(micro_batch, int) and 1 <= micro_batch <= LARGEST_PASS and isinstance(line, str)):
        raise ValueError(f"{remembered}: {micro_batch} images a pass")
    return micro_batch, {unet.get_submodule(name) for name in plan["kept"] if name}, line


def _measure(engine, make_batches, share, checkpointing, budget_gib):
    """(Fit, the line that says it, seconds per image: infinite when nothing that was tried fits)."""
    engine.host.say(
        "measuring how many images fit a pass: about 10 s on a fast card, up to a minute on a T4; remembered afterwards"
    )
    base, lowest, sizes = _probe(engine, make_batches(1)[0], checkpointing)
    room = (budget_gib - SPARE_GIB) * GIB - base

    # Time the largest passes that may fit, and take the fastest
    candidates = [
        n for n in range(1, min(share, LARGEST_PASS) + 1) if share % n == 0 and (n * lowest <= room or n == 1)
    ]
    timed = []
    for size in candidates[-TIMED_CANDIDATES:]:
        seconds, kept = _timed(engine, make_batches, checkpointing, size, sizes, (room - size * lowest) / size)
        timed.append((seconds, size, kept))
    seconds, size, kept = min(timed, key=lambda row: row[0])
    if checkpointing:
        checkpointing.kept = kept

    # What to say of it
    used_gib = (base + size * (lowest + sum(sizes[block] for block in kept))) / GIB
    passes = share // size
    speed = f"{seconds:.3f} s/img" if math.isfinite(seconds) else "the least there is"
    line = (
        f"plan: {size} image{'s'[: size > 1]} in {passes} pass{'es' if passes > 1 else ''}, {len(sizes) - len(kept)} of {len(sizes)} blocks"
        f" recomputed, {speed}, about {used_gib:.1f} of {budget_gib:.1f} GiB"
    )
    return Fit(size, checkpointing), line, seconds


def _timed(engine, make_batches, checkpointing, size, sizes, room):
    """(seconds per image, blocks kept) of passes of `size` images. The room is an estimate: where it is too much, half of it, then none."""
    for part in (1.0, 0.5, 0.0):
        kept = _blocks_to_keep(sizes, part * room)
        seconds = _seconds_per_image(engine, make_batches, checkpointing, size, kept)
        if math.isfinite(seconds) or not kept:
            break
    return seconds, kept


def _probe(engine, batch, checkpointing):
    """One pass of one image -> bytes before it, optimizer state included; peak bytes above that; {block: bytes it would keep}."""
    base = torch.cuda.memory_allocated() + engine.optimizer_state_bytes()
    before = torch.cuda.memory_allocated()
    if checkpointing:
        checkpointing.sizes = {}
    engine.host.start_new_peak()
    try:
        engine.forward_backward({name: tensor.to(engine.host.device) for name, tensor in batch.tensors.items()})
    except RuntimeError as error:
        if memory.ran_out(error):
            raise smallest_pass_too_large(checkpointing) from None
        raise
    lowest, sizes = torch.cuda.max_memory_allocated() - before, {}
    if checkpointing:
        sizes, checkpointing.sizes = checkpointing.sizes, None
    engine.flat.grad.zero_()
    return base, lowest, sizes


def _blocks_to_keep(sizes, room):
    """As many blocks as keep their activations in `room` bytes; the last first, as theirs are needed for the shortest time."""
    kept = set()
    for block, size in reversed(sizes.items()):
        if size <= room:
            kept.add(block)
            room -= size
    return kept


def _seconds_per_image(engine, make_batches, checkpointing, size, kept):
    """Time one pass as it will be run; infinite when it does not fit after all."""
    if checkpointing:
        checkpointing.kept = kept
    tensors, seconds = make_batches(size)[0].tensors, math.inf
    try:
        for _ in range(4):  # as it is, captured, replayed twice
            started = time.perf_counter()
            engine.run_pass(tensors)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / size
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        seconds = math.inf
    engine.run_pass.clear()
    engine.flat.grad.zero_()
    return seconds
