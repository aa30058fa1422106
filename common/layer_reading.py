"""Files that name a layer and a kind in every key (kohya, LyCORIS, ComfyUI, diffusers) -> weights under PEFT's names."""

import json
from pathlib import Path

from common import dora, formats, lycoris
from common.adapter_checks import adaptable_layers, check_number, drawing_config, misfit
from common.adapter_names import layer_spellings
from common.command_line import UserError

EMBEDDINGS = "bundle_emb."  # textual inversions that A1111 packs beside an adapter
DOWN, UP, MAGNITUDE = "lora_down.weight", "lora_up.weight", "lora_magnitude_vector"
_SUFFIXES = {
    **{f".{kind}": kind for kind in (*lycoris.KINDS, "alpha", "dora_scale", MAGNITUDE)},
    **dict.fromkeys(
        (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A.weight"), DOWN
    ),
    **dict.fromkeys((".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight"), UP),
}


def read_layers(file: Path, tensors: dict, metadata: dict, modules: dict) -> tuple[dict, dict]:
    """Keys LAYER.KIND, where the layer may have any of the names it has anywhere. Returns as adapter_reading.read_adapter.

    alpha comes from the metadata that diffusers writes, or from tensors, else it is the rank.
    Raises:
        UserError: names that this model does not have, layers that are incomplete, an alpha that is no number.
    """
    weights_of = {component: adaptable_layers(module) for component, module in modules.items()}
    layers = _by_layer(file, tensors, layer_spellings(weights_of, modules["unet"].config.layers_per_block))

    # each layer as a pair and, with DoRA, a magnitude
    weights, alphas, identities = {}, {}, {}
    for (component, layer), keys in layers.items():
        weight = weights_of[component][layer]
        parts = {kind: _readable(tensors[key]).to(weight.device) for kind, key in keys.items()}
        read = _read_layer(file, layer, weight, parts, metadata, identities)
        if read is None:
            raise misfit(file, list(keys.values()), len(tensors))
        kinds, alphas.setdefault(component, {})[layer] = read
        weights.setdefault(component, {}).update({f"{layer}.{kind}": tensor for kind, tensor in kinds.items()})

    # rank and alpha: as diffusers wrote them, or as the tensors say
    described = _described(file, metadata)
    by_tensors = {component for (component, _), keys in layers.items() if keys.keys() - {DOWN, UP, MAGNITUDE}}
    configs = {
        component: described[component]
        if component in described.keys() - by_tensors
        else lora_arguments(part, alphas[component])
        for component, part in weights.items()
    }
    return weights, configs


def _by_layer(file, tensors, spellings):
    """{(component, layer): {kind: key}}."""
    layers, unknown = {}, []
    for key in tensors:
        name = (
            key.replace(".processor.", ".").removesuffix(".weight")
            if MAGNITUDE in key
            else key.replace(".processor.", ".")
        )
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        place = spellings.get(name.removesuffix(suffix)) if suffix else None
        if place is None or _SUFFIXES[suffix] in layers.get(place, {}):
            unknown.append(key)
        else:
            layers.setdefault(place, {})[_SUFFIXES[suffix]] = key
    if unknown:
        raise misfit(file, unknown, len(tensors))
    return layers


def _readable(tensor):
    """8-bit floats as fp16, which holds each of them exactly; torch computes with neither kind."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _read_layer(file, layer, weight, parts, metadata, identities):
    """({PEFT kind: tensor}, alpha) of one layer; None where its tensors do not make a change of `weight`."""
    alpha = _alpha(file, layer, parts.pop("alpha", None))
    dora_scale, magnitude = parts.pop("dora_scale", None), parts.pop(MAGNITUDE, None)
    pair = lycoris.read_pair(parts, alpha)
    n, k = len(weight), weight[0].numel()
    if pair is None or pair.up.shape[1] != len(pair.down) or (len(pair.up), pair.down.shape[1]) != (n, k):
        return None
    if UP not in parts:
        pair = lycoris.smallest(pair, weight, identities)

    if dora_scale is not None and dora_scale.numel() == n and len(dora_scale) == n:
        magnitude = _magnitude(weight, pair, dora_scale, metadata)
    elif (
        dora_scale is not None
        and tuple(dora_scale.shape[:2]) == (1, weight.shape[1])
        and dora_scale.numel() == weight.shape[1]
    ):
        pair = lycoris.full_rank(lycoris.column_dora(weight, pair, dora_scale), weight, identities)
    elif dora_scale is not None:
        return None

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
    """A dora_scale over rows -> PEFT's magnitude [N]: in our files it goes with ||W||, in LyCORIS's with ||W + s U D||."""
    magnitude = dora_scale.float().flatten()
    if metadata.get(dora.DORA_NORM) == "base":
        base, merged = dora.row_norms(weight, pair.product().view(weight.shape))
        magnitude = magnitude * merged / base
    return magnitude


def _described(file, metadata):
    """{component: LoraConfig arguments} that diffusers wrote into a file's metadata."""
    try:
        described = json.loads(metadata.get(formats.ADAPTER_METADATA, "{}"))
        fields = [(*key.partition(".")[::2], value) for key, value in described.items()]
    except (ValueError, AttributeError):
        raise UserError(f"--lora {file}: its {formats.ADAPTER_METADATA} cannot be read; the file is damaged") from None
    components = {component for component, _, _ in fields}
    parts = {component: {name: value for part, name, value in fields if part == component} for component in components}
    return {component: drawing_config(file, formats.ADAPTER_METADATA, part) for component, part in parts.items()}


def lora_arguments(weights: dict, alphas: dict) -> dict:
    """LoraConfig arguments for {PEFT key: tensor} of one component and the alpha of each of its layers."""
    ranks = {
        key.removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in weights.items()
        if key.endswith(".lora_A.weight")
    }
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return dict(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{layer}": value for layer, value in ranks.items() if value != rank},
        alpha_pattern={f"^{layer}": value for layer, value in alphas.items() if value != alpha},
        target_modules=list(ranks),
        use_dora=any(key.endswith(MAGNITUDE) for key in weights),
    )
