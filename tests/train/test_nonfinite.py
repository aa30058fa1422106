"""Gradients that overflow and losses that are not finite: what they cost, and what they leave alone."""

import itertools
import math

import pytest
import torch

from common.errors import UserError
from common.model import schedules

# ---------------------------------------------------------------- overflows


def overflow_at(engine, attempts, value=math.inf):
    """Scaled gradients, as on a GPU; the attempts at a step of these numbers find an inf in them."""
    engine.loss_scale.enabled = True
    engine.loss_scale.value.fill_(2.0**12)
    original, count = engine.step, itertools.count()

    def step(number, batches, stop=False, meanwhile=lambda: None):
        def overflow():
            if attempt in attempts:
                engine.flat.grad[123] = value
            meanwhile()

        attempt = next(count)
        return original(number, batches, stop, overflow)

    engine.step = step


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_overflow_changes_nothing_but_the_scale(assemble, value):
    parts = assemble("--lr_warmup_steps", 0)
    engine = parts.engine
    overflow_at(engine, {2}, value)
    for number in (1, 2):
        assert engine.step(number, parts.data.examples.effective_batch(number - 1, 8, 4)).applied
    group = engine.flat.groups[0]["params"][0]
    state = {key: torch.as_tensor(values).clone() for key, values in engine.optimizer.state[group].items()}
    weights, average = engine.flat.data.clone(), engine.ema.average.clone()
    result = engine.step(3, parts.data.examples.effective_batch(2, 8, 4))
    assert not result.applied and math.isfinite(result.loss)
    assert torch.equal(engine.flat.data, weights) and torch.equal(engine.ema.average, average)
    assert all(
        torch.equal(torch.as_tensor(engine.optimizer.state[group][key]), values) for key, values in state.items()
    )
    assert engine.loss_scale.value.item() == 2.0**11
    assert not engine.flat.grad.any()
    assert (
        engine.step(3, parts.data.examples.effective_batch(2, 8, 4)).applied
        and engine.loss_scale.value.item() == 2.0**11
    )


def test_a_run_with_overflows_ends_like_one_without(train):
    """The step is done again with the same examples at half the scale: no step, no learning rate and no batch is lost."""
    clean = train(
        "--max_train_steps", 5, "--lr_warmup_steps", 1, prepare=lambda engine, data: overflow_at(engine, set())
    )
    overflowed = train(
        "--max_train_steps", 5, "--lr_warmup_steps", 1, prepare=lambda engine, data: overflow_at(engine, {1, 2, 5})
    )
    assert [row["loss_scale"] for row in clean.rows] == [4096] * 5
    assert [row["loss_scale"] for row in overflowed.rows] == [4096, 1024, 1024, 512, 512]
    for a, b in zip(clean.numbers, overflowed.numbers, strict=True):
        assert {**a, "loss_scale": None} == {**b, "loss_scale": None}
    for name in ("pytorch_lora_weights.safetensors", "ema_unet/pytorch_lora_weights.safetensors"):
        assert overflowed.same_weights(clean, name)


def test_loss_scaling_does_not_change_the_update(train, plain):
    scaled = train("--max_train_steps", 4, prepare=lambda engine, data: overflow_at(engine, set()))
    assert scaled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [row["grad_norm"] for row in scaled.rows] == pytest.approx(
        [row["grad_norm"] for row in plain.rows], rel=1e-5
    )


def test_the_scale_doubles_after_enough_good_steps():
    scale = schedules.LossScale(torch.float16, torch.device("cpu"))
    start = scale.value.item()
    assert scale.enabled and start == 2.0 ** round(math.log2(start))  # a power of two: scaling is exact
    scale.update(overflow=True)
    for _ in range(schedules.GROWTH_INTERVAL - 1):
        scale.update(overflow=False)
    assert scale.value.item() == start / 2
    scale.update(overflow=False)
    assert scale.value.item() == start
    off = schedules.LossScale(torch.float32, torch.device("cpu"))
    off.update(overflow=True)
    assert off.value.item() == 1


# ---------------------------------------------------------------- losses that are not finite


def poison(numbers, renumber=lambda number: number):
    """For train(prepare=...): the effective batches of these numbers have a NaN in them."""

    def prepare(engine, data):
        original = data.examples.effective_batch

        def effective_batch(number, *rest):
            batches = original(renumber(number), *rest)
            if number in numbers:
                batches[0].tensors["mean"][0, 0, 0, 0] = math.nan
            return batches

        data.examples.effective_batch = effective_batch

    return prepare


def test_a_batch_whose_loss_is_not_finite_is_left_out(train):
    """The run goes on with the next one, as if that batch did not exist."""
    run = train("--max_train_steps", 4, "--lr_warmup_steps", 1, prepare=poison({1}))
    without = train(
        "--max_train_steps", 4, "--lr_warmup_steps", 1, prepare=poison((), lambda number: number + (number >= 1))
    )
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    assert run.losses == without.losses and [row["lr"] for row in run.rows] == [row["lr"] for row in without.rows]
    assert run.same_weights(without)


def test_three_in_a_row_end_the_run_with_their_names_and_a_checkpoint(train, assemble, tmp_path):
    with pytest.raises(UserError) as caught:
        train("--max_train_steps", 6, into=tmp_path, prepare=poison({2, 3, 4}))
    message = str(caught.value)
    assert "\n" not in message and "3" in message and "not finite" in message
    (last,) = assemble().data.examples.effective_batch(4, 8, 8)
    assert all(name in message for name in last.names)
    assert (tmp_path / "checkpoint-000002").is_dir()
    resumed = train("--max_train_steps", 6, "--resume_from_checkpoint", "latest", into=tmp_path)
    without = train("--max_train_steps", 6, prepare=poison((), lambda number: number + 3 * (number >= 2)))
    assert resumed.losses == without.losses  # the batches that failed are not tried again
    assert resumed.same_weights(without)


def test_three_that_are_not_in_a_row_do_not_end_it(train):
    run = train("--max_train_steps", 4, prepare=poison({1, 2, 4, 5}))
    assert run.result["step"] == 4 and all(math.isfinite(loss) for loss in run.losses)


def test_a_run_that_fails_in_its_first_steps_does_not_promise_a_checkpoint_it_has_not(train, tmp_path):
    with pytest.raises(UserError) as caught:
        train("--max_train_steps", 6, into=tmp_path, prepare=poison({0, 1, 2}))
    assert ("checkpoint was saved" in str(caught.value)) == any(path.is_dir() for path in tmp_path.glob("checkpoint-*"))
