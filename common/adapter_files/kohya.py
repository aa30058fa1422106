"""A layer in kohya's format, which ComfyUI, A1111 and Forge read: written as LoRA or DoRA, read with all of LyCORIS.

The format, https://github.com/kohya-ss/sd-scripts (networks/lora.py): per layer `lora_down`, `lora_up`, `alpha` and,
for DoRA, `dora_scale` [N, 1] of a weight [N, K]. Layers are named by the original SDXL layout with underscores.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from common.adapter_files import dora, lycoris
from common.adapter_files.checks import check_number
from common.adapter_files.names import COMPONENTS, DOWN, MAGNITUDE, UP, kohya_key
from common.errors import UserError
from common.files import write_safetensors


def save_kohya(
    path: Path,
    unet: torch.nn.Module,
    recipe: dict,
    text_encoders: tuple[torch.nn.Module, ...] | list = (),
    *,
    weight_of: Callable[[str], torch.Tensor] | None = None,
    dora_rank: int | None = None,
) -> float:
    """Write the adapters of the UNet, and of both text encoders if given, in fp16 (dora_scale in fp32).

    Args:
        weight_of: see dora.frozen_weights; the model's own weights when None.
        dora_rank: write DoRA layers as LoRA of this rank instead, for tools that know no DoRA.
    Returns:
        the share of the DoRA layers' change that is in the file, by its norm: 1 without `dora_rank`.
    """
    weight_of = weight_of or dora.frozen_weights(unet, [])
    tensors = {}
    squares = torch.zeros(2)  # norms of what `dora_rank` leaves out, and of all
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        for layer, parts in _by_layer(module).items():
            key = kohya_key(component, layer, unet.config.layers_per_block)
            up, down = parts["B.weight"], parts["A.weight"]
            alpha = module.peft_config["default"].lora_alpha

            # DoRA: a scale beside the pair, or another pair in its place
            if "magnitude_vector" in parts:
                delta = module.get_submodule(layer).get_delta_weight("default")
                magnitude, weight = parts["magnitude_vector"], weight_of(layer)
                if dora_rank:
                    up, down, norms = _as_lora(dora.change(magnitude, weight, delta), dora_rank)
                    alpha = len(down)
                    squares += norms
                else:
                    tensors[f"{key}.dora_scale"] = dora.dora_scale(magnitude, weight, delta)

            tensors[f"{key}.{DOWN}"] = down.half()
            tensors[f"{key}.{UP}"] = up.half()
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))

    share = (1 - squares[0] / squares[1]).clamp(min=0).sqrt().item() if dora_rank else 1.0
    write_safetensors(path, tensors, _metadata(unet.peft_config["default"], recipe, dora_rank, share))
    return share


def _by_layer(module):
    """{layer: {"A.weight": tensor, "B.weight": tensor, "magnitude_vector": tensor of DoRA}}."""
    from peft import get_peft_model_state_dict

    layers = {}
    for name, tensor in get_peft_model_state_dict(module).items():
        layer, _, kind = name.rpartition(".lora_")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _as_lora(change, rank):
    """The best LoRA of `rank` for a change -> (up, down, squared norms of what it leaves out and of all [2])."""
    up, down = dora.low_rank(change.flatten(1), rank)
    left_out = (change.flatten(1) - up @ down).square().sum()
    kernel = change.shape[2:]
    up, down = up.reshape(len(up), -1, *[1] * len(kernel)), down.reshape(-1, *change.shape[1:])
    return up, down, torch.stack([left_out, change.square().sum()]).cpu()


def _metadata(config, recipe, dora_rank, share):
    """What a file says of itself; modelspec is https://github.com/Stability-AI/ModelSpec, ss_ are kohya's own."""
    velocity = recipe.get("prediction_type") == "v_prediction"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(dora_rank or config.r),
        "ss_network_alpha": str(dora_rank or config.lora_alpha),
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "ss_v_parameterization": str(velocity),
        "ss_zero_terminal_snr": str(recipe.get("zero_terminal_snr", False)),
    }

    # DoRA, and what has become of it
    if dora_rank:
        metadata["dora_as_lora"] = f"rank {dora_rank} of the DoRA's change: {share:.4f} of its norm"
    elif config.use_dora:
        metadata |= dora.METADATA
    return {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)}


def read_layer(
    file: Path, layer: str, *, weight: torch.Tensor, parts: dict, metadata: dict, identities: dict
) -> tuple[dict, float] | None:
    """One layer's tensors -> ({PEFT kind: tensor}, alpha); None where they do not make a change of `weight`.

    Args:
        file, layer: for messages.
        weight: the frozen weight, [N, K] or [N, channels, height, width].
        parts: {kind: tensor}; kinds of kohya, LyCORIS and MAGNITUDE, which diffusers writes.
        metadata: of the file.
        identities: see lycoris.full_rank.
    Raises:
        UserError: an alpha that is no number.
    """
    alpha = _alpha(file, layer, parts.get("alpha"))
    dora_scale = parts.get("dora_scale")
    magnitude = parts.get(MAGNITUDE)
    factors = {kind: tensor for kind, tensor in parts.items() if kind not in ("alpha", "dora_scale", MAGNITUDE)}

    # the change as a pair of matrices
    pair = lycoris.read_pair(factors, alpha)
    n, k = len(weight), weight[0].numel()
    if pair is None or pair.up.shape[1] != len(pair.down) or (len(pair.up), pair.down.shape[1]) != (n, k):
        return None
    if UP not in factors:
        pair = lycoris.smallest(pair, weight, identities)

    # DoRA: over rows a magnitude, over columns another change
    if dora_scale is not None:
        if dora_scale.numel() == n and len(dora_scale) == n:
            magnitude = _magnitude(weight, pair, dora_scale, metadata)
        elif tuple(dora_scale.shape[:2]) == (1, weight.shape[1]) and dora_scale.numel() == weight.shape[1]:
            pair = lycoris.full_rank(lycoris.column_dora(weight, pair, dora_scale), weight, identities)
        else:
            return None

    # of the shapes that PEFT gives them
    kernel = weight.shape[2:]
    kinds = {
        "lora_A.weight": pair.down.view(-1, *weight.shape[1:]),
        "lora_B.weight": pair.up.reshape(n, -1, *[1] * len(kernel)),
    }
    if magnitude is not None:
        kinds[MAGNITUDE] = magnitude.view(1, -1, 1, 1) if kernel else magnitude.flatten()
    return kinds, pair.scale * len(pair.down)


def _alpha(file, layer, tensor):
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise UserError(
            f"--lora {file}: the alpha of {layer} is a tensor of {tensor.numel()} numbers; the file is damaged"
        )
    check_number(file, f"the alpha of {layer}", float(tensor))
    return float(tensor)


def _magnitude(weight, pair, dora_scale, metadata):
    """A dora_scale over rows -> PEFT's magnitude [N].

    In our files it goes with ||W||, in LyCORIS's with ||W + s U D||.
    """
    magnitude = dora_scale.float().flatten()
    if metadata.get(dora.DORA_NORM) == "base":
        base, merged = dora.row_norms(weight, pair.product().view(weight.shape))
        magnitude = magnitude * merged / base
    return magnitude
