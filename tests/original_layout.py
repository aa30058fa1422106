"""A diffusers folder of SDXL -> the tensors of a single file in the original layout, for tests of what reads such files.

https://github.com/Stability-AI/generative-models: openaimodel.py for the UNet, model.py for the VAE, open_clip for the second text encoder.
"""

import re

import torch
from safetensors.torch import load_file

from common.adapter_files.names import original_name

_VAE = [
    (r"mid_block\.attentions\.0\.(.*)", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    ("down_blocks", "down"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
]
_OPEN_CLIP = [
    (r"^text_model\.", ""),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    ("final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
]


def original_layout(folder):
    """{name: tensor} of the UNet, the VAE and both text encoders in `folder`, with the leftovers that real files have."""
    unet, vae, clip, open_clip = (
        load_file(next((folder / part).glob("*.safetensors")))
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    )
    tensors = {f"model.diffusion_model.{_unet_name(name)}": tensor for name, tensor in unet.items()}
    tensors |= {f"first_stage_model.{_vae_name(name)}": _convolution(name, tensor) for name, tensor in vae.items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    tensors |= {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    prefix = "conditioner.embedders.1.model."
    tensors |= {f"{prefix}{name}": tensor for name, tensor in _open_clip(open_clip)}
    tensors[f"{prefix}logit_scale"] = torch.tensor(4.6)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _respelt(name, rules):
    for pattern, spelling in rules:
        name = re.sub(pattern, spelling, name)
    return name


def _unet_name(name):
    module, _, kind = name.rpartition(".")
    original = original_name(module, 2).replace("conv_norm_out", "out.0")
    if ".resnets." in module:
        original = original.replace(".norm1", ".in_layers.0").replace(".norm2", ".out_layers.0")
    return f"{original}.{kind}"


def _vae_name(name):
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
    return _respelt(name, _VAE)


def _convolution(name, tensor):
    """There the attention of the VAE is made of 1x1 convolutions."""
    return tensor[:, :, None, None] if "attentions" in name and tensor.dim() == 2 else tensor


def _open_clip(weights):
    """(name, tensor): q, k and v are one matrix, the projection is transposed."""
    for name, tensor in weights.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T
        elif ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            layer, _, kind = _respelt(name, _OPEN_CLIP).partition(".self_attn.q_proj.")
            yield f"{layer}.attn.in_proj_{kind}", torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield re.sub("positional_embedding.*", "positional_embedding", _respelt(name, _OPEN_CLIP)), tensor
