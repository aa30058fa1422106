"""Names of SDXL's layers in adapter files: those of diffusers, the original layout, kohya, LyCORIS and ComfyUI."""

import re

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
COMFYUI_PREFIXES = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
LYCORIS_PREFIX = "lycoris_"  # of the UNet's layers

# Kinds of a layer's tensors: kohya's names of the pair, which LyCORIS shares, and PEFT's of DoRA's magnitude.
DOWN = "lora_down.weight"
UP = "lora_up.weight"
MAGNITUDE = "lora_magnitude_vector"

# diffusers' old names of what it calls to_out.0 in the UNet, and of the projections in text encoders
_OLD_PROJECTIONS = {
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
    ".to_out.0": ".to_out",
}


def layer_spellings(layers: dict, layers_per_block: int) -> dict:
    """Every name by which a file may call one of `layers` {component: names} -> (component, name)."""
    places = [(component, layer) for component, names in layers.items() for layer in names]
    return {spelling: place for place in places for spelling in _spellings(*place, layers_per_block)}


def _spellings(component, layer, layers_per_block):
    shared = shared_name(component, layer, layers_per_block)
    yield COMFYUI_PREFIXES[component] + shared
    for name in (layer, shared):
        yield KOHYA_PREFIXES[component] + name.replace(".", "_")
        if component == "unet":
            yield LYCORIS_PREFIX + name.replace(".", "_")
    for name in (layer, portable(component, layer)):
        yield f"{component}.{name}"
        for now, before in _OLD_PROJECTIONS.items():
            if name.endswith(now):
                yield f"{component}.{name.removesuffix(now)}{before}"


def portable(component: str, name: str) -> str:
    """A name as every tool knows it: transformers 5 dropped `text_model.` from those in CLIPTextModel."""
    return name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"


def kohya_key(component: str, layer: str, layers_per_block: int) -> str:
    """Name of a layer in a kohya file: prefix, then its shared name with underscores for dots."""
    return KOHYA_PREFIXES[component] + shared_name(component, layer, layers_per_block).replace(".", "_")


def shared_name(component: str, layer: str, layers_per_block: int) -> str:
    """The name that tools outside of diffusers share: of the UNet's original layout, or the encoder's portable one."""
    return original_name(layer, layers_per_block) if component == "unet" else portable(component, layer)


_IN_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_PARTS = {"resnets": 0, "downsamplers": 0, "attentions": 1, "upsamplers": 2}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str, layers_per_block: int) -> str:
    """Module name in diffusers' UNet -> in the original one.

    https://github.com/Stability-AI/generative-models, openaimodel.py. There the blocks of all levels are numbered
    through. Within one, 0 is the residual part (or the downsampler), 1 the attention, 2 the upsampler, which in SDXL
    comes only after attention.
    """
    found = _IN_BLOCK.fullmatch(name)
    if not found:
        return _OUTSIDE_BLOCKS.get(name, name)
    side, level, kind, index, rest = found.groups()
    level = int(level or 0)
    index = int(index)
    if kind == "resnets":
        rest = _IN_RESNET.get(rest, rest)
    elif kind == "downsamplers":
        rest = "op"

    # the middle block, then those of the levels
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind.endswith("samplers"):
        index = layers_per_block  # they close their level
    first = level * (layers_per_block + 1)
    if side == "down":
        return f"input_blocks.{1 + first + index}.{_PARTS[kind]}.{rest}"
    return f"output_blocks.{first + index}.{_PARTS[kind]}.{rest}"
