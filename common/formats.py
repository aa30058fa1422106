"""Adapter files that load elsewhere: diffusers' format with its metadata, and kohya's for ComfyUI, A1111 and Forge."""

import json
import re

import torch

from common.files import write_safetensors
from common.flags import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA


def save_adapter(path, unet, recipe):
    """Write the UNet's adapter in diffusers' format, with what PEFT needs to rebuild it and the recipe that trained it.

    Without the metadata diffusers would take alpha = rank, and rank 16 / alpha 32 would load at half strength.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    config = unet.peft_config["default"].to_dict()
    described = {f"unet.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", ADAPTER_METADATA: json.dumps(described, sort_keys=True), "recipe": json.dumps(recipe, sort_keys=True)}
    write_safetensors(path, {f"unet.{name}": tensor for name, tensor in weights.items()}, metadata)


def save_kohya(path, unet, recipe):
    """Write the same adapter for ComfyUI, A1111, Forge and kohya's scripts, in fp16.

    Their format, https://github.com/kohya-ss/sd-scripts (networks/lora.py): per layer `lora_down`, `lora_up`, `alpha`
    and, for DoRA, `dora_scale` [out, 1]; layers are named by the original SDXL layout with underscores.
    """
    from peft import get_peft_model_state_dict

    config, tensors = unet.peft_config["default"], {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        layer, _, kind = name.rpartition(".lora_")
        key = "lora_unet_" + _original_layout(layer, unet.config.layers_per_block).replace(".", "_")
        if kind == "magnitude_vector":
            tensors[f"{key}.dora_scale"] = tensor.view(-1, 1).half()
        else:
            tensors[f"{key}.{ {'A.weight': 'lora_down', 'B.weight': 'lora_up'}[kind] }.weight"] = tensor.half()
            tensors[f"{key}.alpha"] = torch.tensor(float(config.lora_alpha))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.sai_model_spec": "1.0.0"}
    write_safetensors(path, tensors, {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})


def _original_layout(name, layers_per_block):
    """Module name in diffusers' UNet -> in the original one, for everything inside an attention block."""
    blocks = layers_per_block + 1
    if found := re.match(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name):
        return f"input_blocks.{1 + int(found[1]) * blocks + int(found[2])}.1.{found[3]}"
    if found := re.match(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name):
        return f"output_blocks.{int(found[1]) * blocks + int(found[2])}.1.{found[3]}"
    if found := re.match(r"mid_block\.attentions\.0\.(.+)", name):
        return f"middle_block.1.{found[1]}"
    raise UserError(f"--lora_target_modules: {name} lies outside the attention blocks and has no name in kohya's format")
