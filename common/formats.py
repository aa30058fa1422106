"""Adapter files that load elsewhere: diffusers' format, kohya's (ComfyUI, A1111, Forge), PEFT's. `adapter_loading` reads them."""

import copy
import json
import re

import torch

from common.files import write_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA
DORA_NORM = "dora_norm"  # our key in a kohya file's metadata: what its dora_scale is to be divided by
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


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
        config = module.peft_config["default"].to_dict()
        described |= {f"{component}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", ADAPTER_METADATA: json.dumps(described, sort_keys=True), "recipe": json.dumps(recipe, sort_keys=True)}
    write_safetensors(path, weights, metadata)


def _spelt_by_diffusers(component, weights):
    """PEFT's keys -> diffusers', the same way for every layer.

    Its own conversion respells only the attention layers of a UNet, and of a file with two spellings its loader reads that of the first key.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    if component != "unet":
        return convert_state_dict_to_diffusers(weights)
    return {name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor for name, tensor in weights.items()}


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
        config.base_model_name_or_path, config.inference_mode = recipe["base_model"], True
        base = type(module)
        config.save_pretrained(part, auto_mapping_dict={"base_model_class": base.__name__, "parent_library": base.__module__})


def save_kohya(path, unet, recipe, text_encoders=()):
    """Write the same adapters for ComfyUI, A1111, Forge and kohya's scripts, in fp16 (dora_scale in fp32).

    Their format, https://github.com/kohya-ss/sd-scripts (networks/lora.py): per layer `lora_down`, `lora_up`, `alpha`
    and, for DoRA, `dora_scale` [out, 1]; layers are named by the original SDXL layout with underscores.
    """
    from peft import get_peft_model_state_dict

    config, tensors = unet.peft_config["default"], {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        for name, tensor in get_peft_model_state_dict(module).items():
            layer, _, kind = name.rpartition(".lora_")
            key = kohya_key(component, layer, unet.config.layers_per_block)
            if kind == "magnitude_vector":
                tensors[f"{key}.dora_scale"] = _dora_scale(module.get_submodule(layer), tensor)
            else:
                tensors[f"{key}.{ {'A.weight': 'lora_down', 'B.weight': 'lora_up'}[kind] }.weight"] = tensor.half()
                tensors[f"{key}.alpha"] = torch.tensor(float(module.peft_config["default"].lora_alpha))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.sai_model_spec": "1.0.0"}
    metadata |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    metadata |= _kind_metadata(recipe)
    if config.use_dora:
        metadata[DORA_NORM] = "base"
    write_safetensors(path, tensors, {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})


def _kind_metadata(recipe):
    """What the base model predicts, as modelspec (https://github.com/Stability-AI/ModelSpec) and kohya's scripts write it."""
    velocity = recipe.get("prediction_type") == "v_prediction"
    return {
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "ss_v_parameterization": str(velocity),
        "ss_zero_terminal_snr": str(recipe.get("zero_terminal_snr", False)),
    }


def _dora_scale(layer, magnitude):
    """PEFT's magnitude m -> the dora_scale [out, 1] (convolutions: [out, 1, 1, 1]) with which ComfyUI and Forge compute the same weight.

    DoRA is (W + s B A) m / ||W + s B A|| (arXiv 2402.09353, eq. 5), norms over rows. For a scale of this shape they compute
    (W + s B A) dora_scale / ||W|| (weight_decompose in https://github.com/comfyanonymous/ComfyUI, comfy/weight_adapter/base.py).
    """
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer())
    base, merged = row_norms(weight, layer.get_delta_weight("default"))
    return (magnitude.float().flatten() * base / merged).view(-1, *[1] * (weight.dim() - 1))


def row_norms(weight, delta):
    """(||W||, ||W + delta||) over rows, each [out], in fp32."""
    weight = weight.detach().float()
    return weight.flatten(1).norm(dim=1), (weight + delta.detach().to(weight)).flatten(1).norm(dim=1)


def portable(component, name):
    """A name as every tool knows it: transformers 5 dropped `text_model.` from those inside CLIPTextModel."""
    return name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"


def kohya_key(component, layer, layers_per_block):
    """Name of a layer in a kohya file: prefix, then the UNet's original or the text encoder's portable name, with underscores."""
    name = _original_layout(layer, layers_per_block) if component == "unet" else portable(component, layer)
    return KOHYA_PREFIXES[component] + name.replace(".", "_")


_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def _original_layout(name, layers_per_block):
    """Module name in diffusers' UNet -> in the original one (https://github.com/Stability-AI/generative-models, openaimodel.py).

    There the blocks of all levels are numbered through; within one, 0 is the residual part (or the downsampler), 1 the attention
    (or an upsampler without one before it), 2 the upsampler.
    """
    found = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        return _OUTSIDE_BLOCKS.get(name, name)
    side, level, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = _IN_RESNET.get(rest, rest) if kind == "resnets" else "op" if kind == "downsamplers" else rest
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind.endswith("samplers"):
        index = layers_per_block  # they close their level
    first = level * (layers_per_block + 1)
    part = {"resnets": 0, "downsamplers": 0, "attentions": 1, "upsamplers": 2}[kind]  # SDXL upsamples only after attention
    return f"input_blocks.{1 + first + index}.{part}.{rest}" if side == "down" else f"output_blocks.{first + index}.{part}.{rest}"
