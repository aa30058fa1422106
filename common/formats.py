"""Adapter files that load elsewhere: diffusers' format, kohya's (ComfyUI, A1111, Forge), PEFT's. `adapter_loading` reads them."""

import copy
import json

import torch

from common import dora
from common.adapter_names import COMPONENTS, kohya_key, portable
from common.files import write_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA


def save_adapter(path, unet, recipe, text_encoders=()):
    """Write the adapters of the UNet, and of both text encoders if given, in diffusers' format, with what PEFT needs to rebuild them
    and the recipe that trained them.

    Without the metadata diffusers would take alpha = rank, and rank 16 / alpha 32 would load at half strength.
    """
    from peft import get_peft_model_state_dict

    weights, described = {}, {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = {portable(component, name): tensor for name, tensor in get_peft_model_state_dict(module).items()}
        weights |= {f"{component}.{name}": tensor for name, tensor in _spelt_by_diffusers(component, part).items()}
        described |= {f"{component}.{name}": value for name, value in _described(module.peft_config["default"]).items()}
    metadata = {
        "format": "pt",
        ADAPTER_METADATA: json.dumps(described, sort_keys=True),
        "recipe": json.dumps(recipe, sort_keys=True),
    }
    write_safetensors(path, weights, metadata)


def _described(config):
    """What of a LoraConfig a loader needs.

    Not the dropout of training, with which it would draw; nor defaults, of which an older PEFT may not know all.
    """
    from peft import LoraConfig

    settings = {**config.to_dict(), "lora_dropout": 0.0}
    defaults = LoraConfig().to_dict()
    always = ("r", "lora_alpha", "rank_pattern")  # diffusers 0.37 and 0.39 look the pattern up unasked
    needed = {name: value for name, value in settings.items() if name in always or value != defaults[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in needed.items()}


def _spelt_by_diffusers(component, weights):
    """PEFT's keys -> diffusers', the same way for every layer.

    Its own conversion respells only the attention layers of a UNet, and of a file with two spellings its loader reads that of the first key.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    if component != "unet":
        return convert_state_dict_to_diffusers(weights)
    return {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
        for name, tensor in weights.items()
    }


def save_peft(folder, unet, recipe, text_encoders=()):
    """Write the same adapters as PEFT folders: the UNet's is `folder`, those of text encoders lie in its text_encoder and text_encoder_2.

    As PeftModel.save_pretrained writes it for a whole model, so `PeftModel.from_pretrained(unet, folder)` reads it back.
    """
    from peft import get_peft_model_state_dict

    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = folder if component == "unet" else folder / component
        weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
        write_safetensors(part / PEFT_WEIGHTS, weights, {"format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})
        config = copy.copy(module.peft_config["default"])
        config.base_model_name_or_path = recipe["base_model"]
        config.inference_mode = True
        config.lora_dropout = 0.0  # of training: the recipe keeps it
        base = type(module)
        config.save_pretrained(
            part, auto_mapping_dict={"base_model_class": base.__name__, "parent_library": base.__module__}
        )


def save_kohya(path, unet, recipe, text_encoders=(), *, weight_of=None, dora_rank=None):
    """Write the same adapters for ComfyUI, A1111, Forge and kohya's scripts, in fp16 (dora_scale in fp32).

    Their format, https://github.com/kohya-ss/sd-scripts (networks/lora.py): per layer `lora_down`, `lora_up`, `alpha`
    and, for DoRA, `dora_scale` [out, 1]; layers are named by the original SDXL layout with underscores.

    Args:
        weight_of: see dora.frozen_weights; the model's own weights when None.
        dora_rank: write DoRA layers as LoRA of this rank instead, for tools that know no DoRA.
    Returns:
        the share of the DoRA layers' change that is in the file, by its norm: 1 without `dora_rank`.
    """
    weight_of = weight_of or dora.frozen_weights(unet, [])
    config = unet.peft_config["default"]
    tensors, squares = {}, torch.zeros(2)  # of what is left out, and of all
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        for layer, parts in _by_layer(module).items():
            key = kohya_key(component, layer, unet.config.layers_per_block)
            up, down = parts["B.weight"], parts["A.weight"]
            alpha = module.peft_config["default"].lora_alpha
            if "magnitude_vector" in parts:
                known = (
                    parts["magnitude_vector"],
                    weight_of(layer),
                    module.get_submodule(layer).get_delta_weight("default"),
                )
                if dora_rank:
                    up, down, left_out = _as_lora(dora.change(*known), dora_rank)
                    alpha = len(down)
                    squares += left_out
                else:
                    tensors[f"{key}.dora_scale"] = dora.dora_scale(*known)
            tensors[f"{key}.lora_down.weight"] = down.half()
            tensors[f"{key}.lora_up.weight"] = up.half()
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    share = (1 - squares[0] / squares[1]).clamp(min=0).sqrt().item() if dora_rank else 1.0

    rank, alpha = (dora_rank, dora_rank) if dora_rank else (config.r, config.lora_alpha)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.sai_model_spec": "1.0.0"}
    metadata |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    metadata |= _kind_metadata(recipe)
    if dora_rank:
        metadata["dora_as_lora"] = f"rank {dora_rank} of the DoRA's change: {share:.4f} of its norm"
    elif config.use_dora:
        metadata |= dora.METADATA
    write_safetensors(path, tensors, {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})
    return share


def _kind_metadata(recipe):
    """What the base model predicts, as modelspec (https://github.com/Stability-AI/ModelSpec) and kohya's scripts write it."""
    velocity = recipe.get("prediction_type") == "v_prediction"
    return {
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "ss_v_parameterization": str(velocity),
        "ss_zero_terminal_snr": str(recipe.get("zero_terminal_snr", False)),
    }


def _by_layer(module):
    """{layer: {"A.weight": tensor, "B.weight": tensor, "magnitude_vector": tensor of DoRA}}."""
    from peft import get_peft_model_state_dict

    layers = {}
    for name, tensor in get_peft_model_state_dict(module).items():
        layer, _, kind = name.rpartition(".lora_")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _as_lora(change, rank):
    """The best LoRA of `rank` for a weight's change -> (up, down, squared norms of what it leaves out and of all [2])."""
    up, down = dora.low_rank(change.flatten(1), rank)
    left_out = (change.flatten(1) - up @ down).square().sum()
    kernel = change.shape[2:]
    up, down = up.reshape(len(up), -1, *[1] * len(kernel)), down.reshape(-1, *change.shape[1:])
    return up, down, torch.stack([left_out, change.square().sum()]).cpu()
