"""A PEFT folder -> weights under PEFT's names, for the part of the model that they belong to."""

import json
from pathlib import Path

from common import formats
from common.adapter_checks import drawing_config, misfitting_keys
from common.adapter_names import COMPONENTS
from common.command_line import UserError
from common.files import read_safetensors


def read_peft(file: Path, modules: dict) -> tuple[dict, dict]:
    """A folder of the UNet or of one text encoder; save_peft's has folders of the text encoders in it. Returns as read_adapter."""
    nested = [file.parent / component / formats.PEFT_WEIGHTS for component in COMPONENTS[1:]]
    weights, configs = {}, {}
    for part in (file, *(part for part in nested if part.exists())):
        config = _config(part)
        named = {
            key.removeprefix(formats.PEFT_PREFIX): tensor
            for key, tensor in read_safetensors(part, from_anywhere=True)[0].items()
        }
        component, named = _component(modules, named)
        weights[component], configs[component] = named, config
    return weights, configs


def _config(file):
    """LoraConfig arguments beside a PEFT file."""
    place = file.parent / formats.PEFT_CONFIG
    if not place.exists():
        raise UserError(f"--lora {file}: a PEFT file needs its {formats.PEFT_CONFIG} beside it")
    try:
        described = dict(json.loads(place.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"--lora {place}: cannot be read as JSON; download or copy it again") from None
    if described.get("peft_type") != "LORA":
        raise UserError(
            f"--lora {file.parent}: holds a PEFT adapter of type {described.get('peft_type')}; only LoRA and DoRA are supported"
        )
    return drawing_config(file, formats.PEFT_CONFIG, described)


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
