"""Adapters that would be read in part, wrong, or to no effect are refused in one line, and leave nothing in the pipeline."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_foreign_adapters import KOHYA_Q, Q, save_adapter_with
from test_formats import ATTENTION, loaded, peft_folder, shake

from common.adapter_files import diffusers_format, peft_format
from common.errors import UserError
from common.model import adapters


def pair(layer=f"unet.{Q}", inside=32, outside=32, names=("lora.down.weight", "lora.up.weight")):
    return {f"{layer}.{names[0]}": torch.ones(4, inside), f"{layer}.{names[1]}": torch.ones(outside, 4)}


KOHYA = ("lora_down.weight", "lora_up.weight")
REFUSED = {
    "SD 1.5, diffusers": (
        pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 320, 320),
        "2 of 2 keys fit nothing",
    ),
    "SD 1.5, kohya": (
        pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, KOHYA),
        "2 of 2 keys fit nothing",
    ),
    "right names, wrong shapes": (pair(inside=320, outside=320), f"fit nothing in this SDXL, e.g. unet.{Q}"),
    "part of a LoHa": ({f"{KOHYA_Q}.hada_w1_a": torch.ones(32, 4)}, f"e.g. {KOHYA_Q}.hada_w1_a"),
    "a LoKr of other shapes": (
        {f"{KOHYA_Q}.lokr_w1": torch.ones(4, 4), f"{KOHYA_Q}.lokr_w2": torch.ones(4, 4)},
        "2 of 2 keys",
    ),
    "factors that do not go together": (
        {
            f"{KOHYA_Q}.lokr_w1": torch.ones(4, 4),
            f"{KOHYA_Q}.lokr_w2_a": torch.ones(8, 2),
            f"{KOHYA_Q}.lokr_w2_b": torch.ones(3, 8),
        },
        "3 of 3 keys",
    ),
    "half of a pair": (
        pair() | {f"unet.{Q.replace('to_q', 'to_k')}.lora.down.weight": torch.ones(4, 32)},
        "1 of 3 keys",
    ),
    "dora_scale without its halves": (
        pair() | {f"{KOHYA_Q.replace('to_q', 'to_k')}.dora_scale": torch.ones(32, 1)},
        "1 of 3 keys",
    ),
    "dora_scale of another size": (
        pair(KOHYA_Q, names=KOHYA) | {f"{KOHYA_Q}.dora_scale": torch.ones(8, 1)},
        "3 of 3 keys",
    ),
    "two spellings of one layer": (pair() | pair(KOHYA_Q, names=KOHYA), "2 of 4 keys"),
    "alpha is NaN": (pair() | {f"unet.{Q}.alpha": torch.tensor(float("nan"))}, f"the alpha of {Q} is nan"),
    "alpha is infinite": (pair() | {f"unet.{Q}.alpha": torch.tensor(float("inf"))}, f"the alpha of {Q} is inf"),
    "alpha is a vector": (pair() | {f"unet.{Q}.alpha": torch.ones(4)}, f"the alpha of {Q} is a tensor of 4 numbers"),
    "a checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4)}, "1 of 1 keys"),
    "untrained": ({key: tensor * ("up" not in key) for key, tensor in pair().items()}, "would change nothing"),
    "diverged": ({key: tensor * float("nan") for key, tensor in pair().items()}, "2 tensors hold NaN"),
    "whole numbers": ({key: tensor.to(torch.int8) for key, tensor in pair().items()}, "2 tensors hold torch.int8"),
    "an embedding": ({"bundle_emb.ink.clip_l": torch.zeros(2, 64)}, "text embeddings and no layers"),
    "nothing in it": ({}, "has no tensors"),
}


@pytest.fixture(scope="module")
def untouched(fresh):
    """One pipeline for all refusals: they leave nothing in it."""
    return fresh()


def refusal_of(pipeline, place):
    with pytest.raises(UserError) as refusal:
        loaded(pipeline, place)
    assert "\n" not in str(refusal.value) and not pipeline.get_list_adapters()
    return str(refusal.value)


@pytest.mark.parametrize("tensors, complaint", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_that_names_the_file(untouched, tmp_path, tensors, complaint):
    file = tmp_path / "foreign.safetensors"
    save_file(tensors, file)
    said = refusal_of(untouched, file)
    assert said.startswith(f"--lora {file}: ") and complaint in said


CONFIGS = {
    "a setting of a newer PEFT": ({"use_quantum": True}, "asks for use_quantum, which PEFT"),
    "a start that changes the base": ({"init_lora_weights": "pissa_niter_4"}, "which changed the base model too"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "lora_alpha in its"),
}


@pytest.mark.parametrize("change, complaint", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_would_be_read_wrong_is_refused(fresh, untouched, tmp_path, change, complaint):
    trained = fresh()
    adapters.add_lora(trained.unet, ATTENTION, rank=4, alpha=8)
    shake(trained.unet)
    config = tmp_path / "peft" / peft_format.PEFT_CONFIG
    peft_folder(trained, config.parent)
    described = json.loads(config.read_text())
    for settings, expected in (({"not_used": None, "nor_this": {}}, None), (change, complaint)):
        config.write_text(json.dumps(described | settings))
        save_adapter_with(
            tmp_path / "a.safetensors", trained.unet, {f"unet.{k}": v for k, v in (described | settings).items()}
        )
        for place in (config.parent, tmp_path / "a.safetensors"):
            if expected is None:
                assert loaded(fresh(), place).get_list_adapters() == {"unet": ["adapter00"]}
            else:
                assert expected in refusal_of(untouched, place)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", '{"r": "x"}'], ids=["cut", "a list", "a number", "no PEFT type"])
def test_a_damaged_configuration_is_named(fresh, untouched, tmp_path, text):
    trained = fresh()
    adapters.add_lora(trained.unet, ATTENTION, rank=4, alpha=8)
    folder = peft_folder(trained, tmp_path / "peft")
    (folder / peft_format.PEFT_CONFIG).write_text(text)
    assert str(folder) in refusal_of(untouched, folder)
    diffusers_format.save_adapter(tmp_path / "a.safetensors", trained.unet, {})
    save_file(
        load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", {diffusers_format.ADAPTER_METADATA: text}
    )
    assert "a.safetensors: " in refusal_of(untouched, tmp_path / "a.safetensors")


def test_a_peft_adapter_of_another_kind_is_named(fresh, untouched, tmp_path):
    trained = fresh()
    adapters.add_lora(trained.unet, ATTENTION, rank=4, alpha=8)
    folder = peft_folder(trained, tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    assert "of type LOHA" in refusal_of(untouched, folder)
