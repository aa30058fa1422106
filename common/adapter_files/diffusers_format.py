"""diffusers' adapter file, written and read: LAYER.lora.down.weight and .up.weight, PEFT's settings in the metadata."""

import json
from pathlib import Path

import torch

from common.adapter_files.checks import rendering_config
from common.adapter_files.names import COMPONENTS, portable
from common.errors import UserError
from common.files import write_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA


def save_adapter(
    path: Path, unet: torch.nn.Module, recipe: dict, text_encoders: tuple[torch.nn.Module, ...] | list = ()
) -> None:
    """Write the adapters of the UNet, and of both text encoders if given, with the recipe that trained them.

    The metadata holds what PEFT needs to rebuild the adapters. Without it diffusers would take alpha = rank, and
    rank 16 / alpha 32 would load at half strength.
    """
    from peft import get_peft_model_state_dict

    weights, described = {}, {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = {portable(component, name): tensor for name, tensor in get_peft_model_state_dict(module).items()}
        weights |= {f"{component}.{name}": tensor for name, tensor in _spelt_by_diffusers(component, part).items()}
        described |= {f"{component}.{name}": value for name, value in _settings(module.peft_config["default"]).items()}
    metadata = {
        "format": "pt",
        ADAPTER_METADATA: json.dumps(described, sort_keys=True),
        "recipe": json.dumps(recipe, sort_keys=True),
    }
    write_safetensors(path, weights, metadata)


def read_settings(file: Path, metadata: dict) -> dict:
    """{component: LoraConfig arguments} that diffusers wrote into a file's metadata; {} where there are none.

    The keys of such a file are read by layer_reading.py, with those of other tools.
    Raises:
        UserError: settings that cannot be read, or that mean something else in the installed PEFT.
    """
    try:
        described = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        fields = [(*key.partition(".")[::2], value) for key, value in described.items()]
    except (ValueError, AttributeError):
        raise UserError(f"--lora {file}: its {ADAPTER_METADATA} cannot be read; the file is damaged") from None
    components = {component for component, _, _ in fields}
    parts = {component: {name: value for part, name, value in fields if part == component} for component in components}
    return {component: rendering_config(file, ADAPTER_METADATA, part) for component, part in parts.items()}


def _settings(config):
    """What of a LoraConfig a loader needs.

    Not the dropout of training, which would act while rendering; nor defaults, of which an older PEFT may not know all.
    """
    from peft import LoraConfig

    settings = {**config.to_dict(), "lora_dropout": 0.0}
    defaults = LoraConfig().to_dict()
    always = ("r", "lora_alpha", "rank_pattern")  # diffusers 0.37 and 0.39 look the pattern up unasked
    needed = {name: value for name, value in settings.items() if name in always or value != defaults[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in needed.items()}


def _spelt_by_diffusers(component, weights):
    """PEFT's keys -> diffusers', the same way for every layer.

    Its own conversion respells only the attention layers of a UNet. Of a file with two spellings its loader reads only
    that of the first key.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    if component != "unet":
        return convert_state_dict_to_diffusers(weights)
    return {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
        for name, tensor in weights.items()
    }
