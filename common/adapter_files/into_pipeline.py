"""Adapter files -> adapters in a pipeline; what diffusers and PEFT leave out with a warning is an error."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.adapter_files.names import COMPONENTS
from common.adapter_files.reading import read_adapter

if TYPE_CHECKING:  # slow to import
    from diffusers import StableDiffusionXLPipeline
from common.errors import UserError


def load_adapter(
    pipeline: "StableDiffusionXLPipeline", file: Path, name: str, *, say: Callable[[str], None] = print
) -> None:
    """Load an adapter file as the adapter `name` of a pipeline; its scale is 1 until set_adapters is called.

    Equal to load_lora_weights where that works. PEFT injects layers in training mode: the model's parts are in eval
    mode afterwards. `say` is told what is left out.

    Raises:
        UserError: what read_adapter refuses, and keys that the loaders did not use.
    """
    modules = {component: getattr(pipeline, component) for component in COMPONENTS}
    weights, configs = read_adapter(file, modules, say)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters side by side are meant
        for component, part in weights.items():
            _load_into(modules[component], component, name, part, configs[component])
            modules[component].eval()
            _check_loaded(file, modules[component], name, part)


def _load_into(module, component, name, weights, config):
    """Into text encoders through PEFT itself: transformers 5.24.0 asks for a version of it that does not exist."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if component == "unet":
        module.load_lora_adapter(weights, prefix=None, adapter_name=name, metadata=config, low_cpu_mem_usage=True)
    else:
        inject_adapter_in_model(
            LoraConfig(**config), module, adapter_name=name, low_cpu_mem_usage=True, state_dict=weights
        )
        set_peft_model_state_dict(module, weights, adapter_name=name, low_cpu_mem_usage=True)


def _check_loaded(file, module, name, weights):
    """diffusers and PEFT only warn about what they leave out, and initialise it at random."""
    from peft import get_peft_model_state_dict

    # PEFT's default for embedding layers would ask the hub about the base model that the adapter names
    loaded = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    used = {key for key, tensor in loaded.items() if key in weights and torch.equal(tensor, weights[key].to(tensor))}
    if left_out := sorted((weights.keys() | loaded.keys()) - used):
        raise UserError(
            f"--lora {file}: {len(left_out)} of {len(weights)} keys were not used by the loader, e.g. {left_out[0]}"
        )
