"""Files that name a layer and a kind in every key (kohya, LyCORIS, ComfyUI, diffusers) -> PEFT's names and settings."""

from pathlib import Path

from common.adapter_files import diffusers_format, lycoris
from common.adapter_files.checks import adaptable_layers, misfit
from common.adapter_files.kohya import read_layer
from common.adapter_files.names import DOWN, MAGNITUDE, UP, layer_spellings

EMBEDDINGS = "bundle_emb."  # textual inversions that A1111 packs beside an adapter
_DOWN_SUFFIXES = (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A.weight")
_UP_SUFFIXES = (".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight")
_SUFFIXES = {
    **{f".{kind}": kind for kind in (*lycoris.KINDS, "alpha", "dora_scale", MAGNITUDE)},
    **dict.fromkeys(_DOWN_SUFFIXES, DOWN),
    **dict.fromkeys(_UP_SUFFIXES, UP),
}


def read_layers(file: Path, tensors: dict, metadata: dict, modules: dict) -> tuple[dict, dict]:
    """Keys LAYER.KIND, where the layer may have any of the names it has anywhere.

    alpha comes from the metadata that diffusers writes, or from tensors, else it is the rank.
    Returns:
        as adapter_reading.read_adapter.
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
        read = read_layer(file, layer, weight=weight, parts=parts, metadata=metadata, identities=identities)
        if read is None:
            raise misfit(file, list(keys.values()), len(tensors))
        kinds, alpha = read
        alphas.setdefault(component, {})[layer] = alpha
        weights.setdefault(component, {}).update({f"{layer}.{kind}": tensor for kind, tensor in kinds.items()})

    # rank and alpha: as diffusers wrote them, or as the tensors say
    written = diffusers_format.read_settings(file, metadata)
    by_tensors = {component for (component, _), keys in layers.items() if keys.keys() - {DOWN, UP, MAGNITUDE}}
    configs = {
        component: written[component]
        if component in written.keys() - by_tensors
        else lora_arguments(part, alphas[component])
        for component, part in weights.items()
    }
    return weights, configs


def _by_layer(file, tensors, spellings):
    """{(component, layer): {kind: key}}."""
    layers, unknown = {}, []
    for key in tensors:
        name = key.replace(".processor.", ".")
        if MAGNITUDE in key:
            name = name.removesuffix(".weight")
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        place = spellings.get(name.removesuffix(suffix)) if suffix else None

        # no layer of this model, or a second tensor for one place
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


def lora_arguments(weights: dict, alphas: dict) -> dict:
    """LoraConfig arguments for {PEFT key: tensor} of one component and the alpha of each of its layers."""
    suffix = ".lora_A.weight"
    ranks = {key.removesuffix(suffix): len(tensor) for key, tensor in weights.items() if key.endswith(suffix)}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return dict(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{layer}": value for layer, value in ranks.items() if value != rank},
        alpha_pattern={f"^{layer}": value for layer, value in alphas.items() if value != alpha},
        target_modules=list(ranks),
        use_dora=any(key.endswith(MAGNITUDE) for key in weights),
    )
