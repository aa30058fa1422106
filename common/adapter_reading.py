"""Adapter files of every format -> weights under PEFT's names: `find_adapter` says what a path means, `read_adapter` reads it.

What would fit in part or change nothing is refused: diffusers and PEFT do both with a warning.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import formats
from common.command_line import UserError
from common.files import read_safetensors

KOHYA_KINDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


def find_adapter(place):
    """What `--lora place` means -> Path of a readable .safetensors file.

    `place` is such a file, a folder that a training run or diffusers wrote (its final weights, not those of a step), or a PEFT folder.
    Raises:
        UserError: nothing there, a pickle, a damaged file.
    """
    path = Path(place)
    file = _weights_in(path) if path.is_dir() else path
    if not file.exists():
        raise UserError(f"--lora {path}: no such file or folder")
    if file.suffix != ".safetensors":
        raise UserError(f"--lora {file}: only .safetensors files are read; pickles (.bin, .pt, .ckpt) can run code")
    try:
        with safe_open(file, "pt") as tensors:
            empty = not tensors.keys()
    except SafetensorError as error:
        raise UserError(f"--lora {file}: damaged or not a safetensors file ({error}); download or copy it again") from None
    if empty:
        raise UserError(f"--lora {file}: has no tensors in it")
    return file


def _weights_in(folder):
    of_step = folder.parent / f"pytorch_lora_weights_{folder.name.removeprefix('checkpoint-')}.safetensors"
    if folder.name.startswith("checkpoint-") and of_step.exists():
        return of_step  # a checkpoint itself holds what training needs, and no adapter file
    for name in (formats.WEIGHTS, formats.PEFT_WEIGHTS):
        if (folder / name).exists():
            return folder / name
    if pickles := sorted(folder.glob("*.bin")):
        return pickles[0]
    steps = sorted(folder.glob("*.safetensors"))
    hint = f"; name one of its files, e.g. {steps[-1].name}" if steps else ""
    raise UserError(f"--lora {folder}: neither {formats.WEIGHTS} nor {formats.PEFT_WEIGHTS} in it{hint}")


def read_adapter(file, modules):
    """Read an adapter file, of whatever format, for a model's `modules` {component: module}.

    alpha comes from the file's metadata or its .alpha tensors, else it is the rank.
    Returns:
        ({component: {PEFT key: tensor}}, {component: LoraConfig arguments}).
    Raises:
        UserError: keys or shapes that fit nothing in this model, weights that are not finite or change nothing.
    """
    tensors, metadata = read_safetensors(file, from_anywhere=True)
    read = _reader_for(tensors)
    weights, configs = read(file, tensors, metadata, modules)
    _check_values(file, weights)
    for component, part in weights.items():
        if misfits := _misfits(modules[component], part):
            raise _misfit(file, misfits, len(part))
    return weights, configs


def _reader_for(tensors):
    if all(key.startswith("lora_") for key in tensors):
        return _read_kohya
    if all(key.startswith(formats.PEFT_PREFIX) for key in tensors):
        return _read_peft
    return _read_diffusers


def _read_diffusers(file, tensors, metadata, modules):
    """Keys COMPONENT.LAYER.lora.down.weight and their older spellings. Returns as read_adapter."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    config = json.loads(metadata.get(formats.ADAPTER_METADATA, "{}"))
    weights, configs = {}, {}
    parts = {
        component: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{component}.")} for component in formats.COMPONENTS
    }
    if sum(map(len, parts.values())) < len(tensors):
        raise _misfit(file, [key for key in tensors if key.partition(".")[0] not in formats.COMPONENTS], len(tensors))
    for component, part in parts.items():
        if not part:
            continue
        if component == "unet":
            part = convert_unet_state_dict_to_peft(part)
        else:
            part = _named_as_in(modules[component], convert_state_dict_to_peft(convert_state_dict_to_diffusers(part)))
        weights[component] = part
        described = {key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")}
        configs[component] = described or _describe(part, {})
    return weights, configs


def _named_as_in(encoder, weights):
    """The opposite of formats.portable, where `encoder` is one without the prefix."""
    flat = all(not name.startswith("text_model.") for name, _ in encoder.named_modules())
    return {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in weights.items()}


def _read_kohya(file, tensors, metadata, modules):
    """Keys PREFIX_LAYER_WITH_UNDERSCORES.KIND; the layer's name is looked up among those the model has. Returns as read_adapter."""
    layers_per_block = modules["unet"].config.layers_per_block
    known = {}
    for component, module in modules.items():
        for layer, _ in module.named_modules():
            known[formats.KOHYA_PREFIXES[component] + layer.replace(".", "_")] = component, layer
            known[formats.kohya_key(component, layer, layers_per_block)] = component, layer
    weights, alphas, unknown = {}, {}, []
    for key, tensor in tensors.items():
        prefix, _, kind = key.partition(".")
        component, layer = known.get(prefix, (None, None))
        if component is None or kind not in (*KOHYA_KINDS, "alpha"):
            unknown.append(key)
        elif kind == "alpha":
            alphas.setdefault(component, {})[layer] = tensor.item()
        else:
            weights.setdefault(component, {})[f"{layer}.{KOHYA_KINDS[kind]}"] = tensor
    if unknown:
        raise _misfit(file, unknown, len(tensors))
    for component, part in weights.items():
        for key in [key for key in part if key.endswith("lora_magnitude_vector")]:
            layer = key.removesuffix(".lora_magnitude_vector")
            part[key] = _magnitude(file, modules[component].get_submodule(layer).weight, part, layer, alphas[component], metadata)
    return weights, {component: _describe(part, alphas.get(component, {})) for component, part in weights.items()}


def _magnitude(file, weight, weights, layer, alphas, metadata):
    """A kohya file's dora_scale -> PEFT's magnitude, [out] or [1, out, 1, 1]. In our files it goes with ||W||, in LyCORIS's with ||W + s B A||."""
    dora_scale, down, up = (weights[f"{layer}.{kind}"].float() for kind in ("lora_magnitude_vector", "lora_A.weight", "lora_B.weight"))
    if len(dora_scale) != len(up):
        raise UserError(f"--lora {file}: its dora_scale runs over input columns, e.g. in {layer}; PEFT's DoRA knows output rows only")
    magnitude = dora_scale.flatten()
    if metadata.get(formats.DORA_NORM) == "base":
        base, merged = formats.row_norms(weight.cpu(), alphas[layer] / len(down) * (up.flatten(1) @ down.flatten(1)).view(weight.shape))
        magnitude = magnitude * merged / base
    return magnitude if weight.dim() == 2 else magnitude.view(1, -1, 1, 1)


def _read_peft(file, tensors, metadata, modules):
    """A PEFT folder of the UNet or of one text encoder; what save_peft wrote has folders of the text encoders in it. Returns as read_adapter."""
    nested = [file.parent / component for component in formats.COMPONENTS[1:]]
    files = [find_adapter(folder) for folder in nested if (folder / formats.PEFT_CONFIG).exists()]
    weights, configs = {}, {}
    for part, content in [(file, tensors), *((file, read_safetensors(file, from_anywhere=True)[0]) for file in files)]:
        config = _peft_config(part)
        component, named = _peft_component(modules, {key.removeprefix(formats.PEFT_PREFIX): tensor for key, tensor in content.items()})
        weights[component], configs[component] = named, config
    return weights, configs


def _peft_config(file):
    """LoraConfig arguments beside a PEFT file."""
    from peft import LoraConfig

    if not (file.parent / formats.PEFT_CONFIG).exists():
        raise UserError(f"--lora {file}: a PEFT file needs its {formats.PEFT_CONFIG} beside it")
    kind = json.loads((file.parent / formats.PEFT_CONFIG).read_text()).get("peft_type")
    if kind != "LORA":
        raise UserError(f"--lora {file.parent}: holds a PEFT adapter of type {kind}; only LoRA and DoRA are supported")
    return LoraConfig.from_pretrained(file.parent).to_dict()


def _peft_component(modules, weights):
    """(component, weights under its names) of the first component that has all the layers; the UNet when none has."""
    named = {component: weights if component == "unet" else _named_as_in(modules[component], weights) for component in formats.COMPONENTS}
    return next((pair for pair in named.items() if not _misfits(modules[pair[0]], pair[1])), ("unet", weights))


def _describe(weights, alphas):
    """LoraConfig arguments for {PEFT key: tensor} of one component; a layer that `alphas` does not name has alpha = rank."""
    ranks = {key.removesuffix(".lora_A.weight"): len(tensor) for key, tensor in weights.items() if key.endswith(".lora_A.weight")}
    alphas = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    r, lora_alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1)
    return dict(
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern={f"^{layer}": rank for layer, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{layer}": alpha for layer, alpha in alphas.items() if alpha != lora_alpha},
        target_modules=list(ranks),
        use_dora=any(key.endswith("lora_magnitude_vector") for key in weights),
    )


# ---------------------------------------------------------------- checks


def _misfit(file, keys, total):
    return UserError(
        f"--lora {file}: {len(keys)} of {total} keys fit nothing in this SDXL, e.g. {keys[0]}; an adapter of another kind or model?"
    )


def _check_values(file, weights):
    tensors = {key: tensor for part in weights.values() for key, tensor in part.items()}
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"--lora {file}: {len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}; the training that wrote it diverged")
    if not any(tensor.any() for key, tensor in tensors.items() if not key.endswith("lora_A.weight")):
        raise UserError(f"--lora {file}: would change nothing, every lora_B is zero, e.g. {next(iter(tensors))}; was it trained?")


def _misfits(module, weights):
    """Keys whose layer `module` does not have, whose shape is wrong for it, or that lack their other half."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (torch.nn.Linear, torch.nn.Conv2d, BaseTunerLayer)
    shapes = {name: layer.weight.shape for name, layer in module.named_modules() if isinstance(layer, layers)}
    return [key for key in weights if not _fits(shapes, weights, *key.rpartition(".lora_")[::2])]


def _fits(shapes, weights, layer, kind):
    down, up, shape = weights.get(f"{layer}.lora_A.weight"), weights.get(f"{layer}.lora_B.weight"), shapes.get(layer)
    if down is None or up is None or shape is None or kind not in ("A.weight", "B.weight", "magnitude_vector"):
        return False
    return down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], down.shape[0])
