"""PEFT's adapter folder, written and read: adapter_model.safetensors and adapter_config.json beside it."""

import copy
import json
from pathlib import Path

import torch

from common.adapter_files.checks import misfitting_keys, rendering_config
from common.adapter_files.names import COMPONENTS
from common.errors import UserError
from common.files import read_safetensors, write_safetensors

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def save_peft(
    folder: Path, unet: torch.nn.Module, recipe: dict, text_encoders: tuple[torch.nn.Module, ...] | list = ()
) -> None:
    """Write the UNet's adapter into `folder`, those of text encoders into its text_encoder and text_encoder_2.

    As PeftModel.save_pretrained writes it for a whole model, so `PeftModel.from_pretrained(unet, folder)` reads it
    back.
    """
    from peft import get_peft_model_state_dict

    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = folder if component == "unet" else folder / component
        weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
        write_safetensors(part / PEFT_WEIGHTS, weights, {"format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})

        # the configuration, for use and not for more training
        config = copy.copy(module.peft_config["default"])
        config.base_model_name_or_path = recipe["base_model"]
        config.inference_mode = True
        config.lora_dropout = 0.0  # of training: the recipe keeps it
        base = type(module)
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config.save_pretrained(part, auto_mapping_dict=mapping)


def read_peft(file: Path, modules: dict) -> tuple[dict, dict]:
    """A folder of the UNet or of one text encoder, and the folders of text encoders that save_peft puts into it.

    Returns:
        as adapter_reading.read_adapter.
    Raises:
        UserError: no configuration, or one that cannot be read or is of another kind of adapter.
    """
    nested = [file.parent / component / PEFT_WEIGHTS for component in COMPONENTS[1:]]
    weights, configs = {}, {}
    for part in (file, *(part for part in nested if part.exists())):
        config = _config(part)
        tensors, _ = read_safetensors(part, from_anywhere=True)
        named = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
        component, named = _component(modules, named)
        weights[component] = named
        configs[component] = config
    return weights, configs


def _config(file):
    """LoraConfig arguments beside a PEFT file."""
    place = file.parent / PEFT_CONFIG
    if not place.exists():
        raise UserError(f"--lora {file}: a PEFT file needs its {PEFT_CONFIG} beside it")
    try:
        described = dict(json.loads(place.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"--lora {place}: cannot be read as JSON; download or copy it again") from None
    if (kind := described.get("peft_type")) != "LORA":
        raise UserError(f"--lora {file.parent}: holds a PEFT adapter of type {kind}; only LoRA and DoRA are supported")
    return rendering_config(file, PEFT_CONFIG, described)


def _component(modules, weights):
    """(component, weights under its names) of the first component that has all the layers; the UNet when none has."""
    named = {
        component: weights if component == "unet" else _named_as_in(modules[component], weights)
        for component in COMPONENTS
    }
    return next((pair for pair in named.items() if not misfitting_keys(modules[pair[0]], pair[1])), ("unet", weights))


def _named_as_in(encoder, weights):
    """The opposite of adapter_names.portable, where `encoder` is one without the prefix."""
    flat = all(not name.startswith("text_model.") for name, _ in encoder.named_modules())
    return {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in weights.items()}
