"""How a step is cut into passes: what was measured once is remembered, until it no longer holds."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
from diffusers import UNet2DConditionModel

from common.train import pass_plan
from common.train.pass_plan import BlockRecompute, PassPlan


@pytest.fixture(scope="module")
def unet(demo):
    return UNet2DConditionModel.from_pretrained(demo.model, subfolder="unet").requires_grad_(False)


def engine_of(unet, recompute=None):
    return SimpleNamespace(unet=unet, recompute=recompute)


def never(*_):
    raise AssertionError("measured, though there is a plan")


def recall_or_measure(engine, place, budget_gib=10.0):
    return pass_plan.recall_or_measure(engine, never, share=4, budget_gib=budget_gib, remembered=place)


def test_a_plan_is_measured_once_and_remembered(unet, tmp_path, monkeypatch):
    """The second run keeps the same blocks of its own UNet, and measures nothing."""
    place = tmp_path / "plans" / "key.json"

    def measure(engine, make_batches, share, budget_gib):
        engine.recompute.kept = {engine.unet.mid_block.resnets[1], engine.unet.conv_in}
        return PassPlan(2, engine.recompute), "plan: so", 0.1

    monkeypatch.setattr(pass_plan, "_measure", measure)
    plan, line = recall_or_measure(engine_of(unet, BlockRecompute()), place)
    assert (plan.micro_batch, line, plan.remembered) == (2, "plan: so", place) and place.exists()

    monkeypatch.setattr(pass_plan, "_measure", never)
    other = engine_of(copy.deepcopy(unet), BlockRecompute())
    plan, line = recall_or_measure(other, place)
    assert plan.micro_batch == 2 and line == f"plan: so (as an earlier run measured, {place})"
    assert other.recompute.kept == {other.unet.mid_block.resnets[1], other.unet.conv_in}


def test_a_plan_that_ran_out_of_memory_is_forgotten(tmp_path):
    place = tmp_path / "key.json"
    place.write_text(json.dumps({"micro_batch": 4, "kept": [], "line": "plan: so"}))
    plan, _ = recall_or_measure(engine_of(None), place)
    assert plan.step_down() and plan.micro_batch == 2 and not place.exists()
    assert plan.step_down() and plan.micro_batch == 1 and not plan.step_down()


@pytest.mark.parametrize("damaged", ["{", "{}", '{"micro_batch": 4, "kept": ["no.such.block"], "line": ""}'])
def test_a_damaged_plan_is_measured_again(unet, tmp_path, monkeypatch, damaged):
    place = tmp_path / "key.json"
    place.write_text(damaged)
    monkeypatch.setattr(pass_plan, "_measure", lambda engine, *_: (PassPlan(1, engine.recompute), "plan: anew", 0.1))
    assert recall_or_measure(engine_of(unet, BlockRecompute()), place)[1] == "plan: anew"
    assert json.loads(place.read_text())["line"] == "plan: anew"


def test_a_plan_that_never_fitted_is_not_remembered(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(pass_plan, "_measure", lambda *_: (PassPlan(1), "plan: too large", float("inf")))
    recall_or_measure(engine_of(unet), tmp_path / "key.json", budget_gib=1.0)
    assert not list(tmp_path.iterdir())


def test_a_plan_belongs_to_what_changes_a_pass(assemble):
    flags, given = assemble().flags, ("a GPU", 14.5, 4, (4, 8, 8), 1000)
    key = pass_plan.plan_key(flags, *given)
    same = dict(output_dir="elsewhere", seed=1, max_train_steps=7, learning_rate=1.0)
    assert pass_plan.plan_key(dataclasses.replace(flags, **same), *given) == key

    others = dict(
        text_cache="none",
        lora_rank=5,
        lora_target_modules=["to_q"],
        quantize="nf4",
        use_8bit_adam=True,
        lora_dropout=0.3,
    )
    keys = {pass_plan.plan_key(dataclasses.replace(flags, **{name: value}), *given) for name, value in others.items()}
    keys |= {pass_plan.plan_key(flags, *given[:i], "other", *given[i + 1 :]) for i in range(len(given))}
    assert len(keys | {key}) == len(others) + len(given) + 1
