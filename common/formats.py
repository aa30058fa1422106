"""Adapter files that load elsewhere, and adapters from elsewhere: diffusers' format, kohya's (ComfyUI, A1111, Forge), PEFT's.

Writing: `save_adapter` and `save_kohya`. Reading: `find_adapter` says what a path means, `load_adapter` puts it into a pipeline, and
refuses what would load in part or change nothing: diffusers does both with a warning.
"""

import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.files import write_safetensors
from common.flags import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA
DORA_NORM = "dora_norm"  # our key in a kohya file's metadata: what its dora_scale is to be divided by
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
KOHYA_KINDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}

# ---------------------------------------------------------------- writing


def save_adapter(path, unet, recipe, text_encoders=()):
    """Write the adapters of the UNet, and of both text encoders if given, in diffusers' format, with what PEFT needs to rebuild them
    and the recipe that trained them.

    Without the metadata diffusers would take alpha = rank, and rank 16 / alpha 32 would load at half strength.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    weights, described = {}, {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = {_portable(component, name): tensor for name, tensor in get_peft_model_state_dict(module).items()}
        weights |= {f"{component}.{name}": tensor for name, tensor in convert_state_dict_to_diffusers(part).items()}
        config = module.peft_config["default"].to_dict()
        described |= {f"{component}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", ADAPTER_METADATA: json.dumps(described, sort_keys=True), "recipe": json.dumps(recipe, sort_keys=True)}
    write_safetensors(path, weights, metadata)


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
            key = _kohya_key(component, layer, unet.config.layers_per_block)
            if kind == "magnitude_vector":
                tensors[f"{key}.dora_scale"] = _dora_scale(module.get_submodule(layer), tensor)
            else:
                tensors[f"{key}.{ {'A.weight': 'lora_down', 'B.weight': 'lora_up'}[kind] }.weight"] = tensor.half()
                tensors[f"{key}.alpha"] = torch.tensor(float(module.peft_config["default"].lora_alpha))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.sai_model_spec": "1.0.0"}
    metadata |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    if config.use_dora:
        metadata[DORA_NORM] = "base"
    write_safetensors(path, tensors, {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})


def _dora_scale(layer, magnitude):
    """PEFT's magnitude m -> the dora_scale [out, 1] (convolutions: [out, 1, 1, 1]) with which ComfyUI and Forge compute the same weight.

    DoRA is (W + s B A) m / ||W + s B A|| (arXiv 2402.09353, eq. 5), norms over rows. For a scale of this shape they compute
    (W + s B A) dora_scale / ||W|| (weight_decompose in https://github.com/comfyanonymous/ComfyUI, comfy/weight_adapter/base.py).
    """
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer())
    base, merged = _row_norms(weight, layer.get_delta_weight("default"))
    return (magnitude.float().flatten() * base / merged).view(-1, *[1] * (weight.dim() - 1))


def _row_norms(weight, delta):
    """(||W||, ||W + delta||) over rows, each [out], in fp32."""
    weight = weight.detach().float()
    return weight.flatten(1).norm(dim=1), (weight + delta.detach().to(weight)).flatten(1).norm(dim=1)


def _portable(component, name):
    """A name as every tool knows it: transformers 5 dropped `text_model.` from those inside CLIPTextModel."""
    return name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"


def _kohya_key(component, layer, layers_per_block):
    """Name of a layer in a kohya file: prefix, then the UNet's original or the text encoder's portable name, with underscores."""
    name = _original_layout(layer, layers_per_block) if component == "unet" else _portable(component, layer)
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


# ---------------------------------------------------------------- reading


def find_adapter(place):
    """What `--lora place` means -> Path of a readable .safetensors file.

    `place` is such a file, a folder that a training run or diffusers wrote (its final weights, not those of a step), or a PEFT folder.
    Raises:
        UserError: nothing there, a pickle, a damaged file.
    """
    path = Path(place).expanduser()
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
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (folder / name).exists():
            return folder / name
    if pickles := sorted(folder.glob("*.bin")):
        return pickles[0]
    steps = sorted(folder.glob("*.safetensors"))
    hint = f"; name one of its files, e.g. {steps[-1].name}" if steps else ""
    raise UserError(f"--lora {folder}: neither {WEIGHTS} nor {PEFT_WEIGHTS} in it{hint}")


def load_adapter(pipeline, file, name):
    """Load an adapter file into a StableDiffusionXLPipeline under the adapter name `name`; its scale is 1 until set_adapters says otherwise.

    Equal to load_lora_weights where that works; alpha comes from the file's metadata or its .alpha tensors, else it is the rank.
    Raises:
        UserError: keys or shapes that fit nothing in this model, keys that were not used, weights that are not finite or change nothing.
    """
    with safe_open(file, "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 (not a dict)
    modules = {component: getattr(pipeline, component) for component in COMPONENTS}
    read = _reader_for(file, tensors)
    weights, configs = read(file, tensors, metadata, modules)
    _check_values(file, weights)
    for component, part in weights.items():
        if misfits := _misfits(modules[component], part):
            raise _misfit(file, misfits, len(tensors))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters side by side are meant
        for component in weights:
            _load_into(pipeline, component, name, weights[component], configs[component])
            _check_loaded(file, modules[component], name, weights[component])


def _reader_for(file, tensors):
    if all(key.startswith("lora_") for key in tensors):
        return _read_kohya
    if all(key.startswith("base_model.model.") for key in tensors):
        return _read_peft
    return _read_diffusers


def _read_diffusers(file, tensors, metadata, modules):
    """Keys COMPONENT.LAYER.lora.down.weight and their older spellings -> ({component: {PEFT key: tensor}}, {component: LoraConfig arguments})."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    config = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    weights, configs = {}, {}
    parts = {component: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{component}.")} for component in COMPONENTS}
    if sum(map(len, parts.values())) < len(tensors):
        raise _misfit(file, [key for key in tensors if key.partition(".")[0] not in COMPONENTS], len(tensors))
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
    """The opposite of _portable, where `encoder` is one without the prefix."""
    flat = all(not name.startswith("text_model.") for name, _ in encoder.named_modules())
    return {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in weights.items()}


def _read_kohya(file, tensors, metadata, modules):
    """Keys PREFIX_LAYER_WITH_UNDERSCORES.KIND; the layer's name is looked up among those the model has. Returns as _read_diffusers."""
    layers_per_block = modules["unet"].config.layers_per_block
    known = {}
    for component, module in modules.items():
        for layer, _ in module.named_modules():
            known[KOHYA_PREFIXES[component] + layer.replace(".", "_")] = component, layer
            known[_kohya_key(component, layer, layers_per_block)] = component, layer
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
    if metadata.get(DORA_NORM) == "base":
        base, merged = _row_norms(weight.cpu(), alphas[layer] / len(down) * (up.flatten(1) @ down.flatten(1)).view(weight.shape))
        magnitude = magnitude * merged / base
    return magnitude if weight.dim() == 2 else magnitude.view(1, -1, 1, 1)


def _read_peft(file, tensors, metadata, modules):
    """A PEFT folder, of the UNet or of one text encoder: whichever has its layers. Returns as _read_diffusers."""
    from peft import LoraConfig

    if not (file.parent / PEFT_CONFIG).exists():
        raise UserError(f"--lora {file}: a PEFT file needs its {PEFT_CONFIG} beside it")
    described = json.loads((file.parent / PEFT_CONFIG).read_text())
    if described.get("peft_type") != "LORA":
        raise UserError(
            f"--lora {file.parent}: holds a PEFT adapter of type {described.get('peft_type')}; only LoRA and DoRA are supported"
        )
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    component = next((component for component in COMPONENTS if not _misfits(modules[component], weights)), "unet")
    return {component: weights}, {component: LoraConfig.from_pretrained(file.parent).to_dict()}


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


def _load_into(pipeline, component, name, weights, config):
    if component == "unet":
        pipeline.unet.load_lora_adapter(weights, prefix=None, adapter_name=name, metadata=config, low_cpu_mem_usage=True)
    else:
        prefixed = {f"{component}.{key}": tensor for key, tensor in weights.items()}
        encoder, config = getattr(pipeline, component), {f"{component}.{key}": value for key, value in config.items()}
        pipeline.load_lora_into_text_encoder(
            prefixed, None, encoder, prefix=component, adapter_name=name, metadata=config, low_cpu_mem_usage=True
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


def _check_loaded(file, module, name, weights):
    """diffusers, transformers and PEFT only warn about what they leave out, and draw it at random (DoRA magnitudes of text encoders)."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(module, adapter_name=name)
    used = {key for key, tensor in loaded.items() if key in weights and torch.equal(tensor.cpu(), weights[key].to(tensor.dtype))}
    if left_out := sorted((weights.keys() | loaded.keys()) - used):
        raise UserError(f"--lora {file}: {len(left_out)} of {len(weights)} keys were not used by the loader, e.g. {left_out[0]}")
