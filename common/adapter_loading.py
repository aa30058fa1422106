"""Adapter files -> adapters in a pipeline; what diffusers, transformers and PEFT leave out with a warning is an error."""

import warnings

import torch

from common.adapter_reading import read_adapter
from common.command_line import UserError
from common.formats import COMPONENTS


def load_adapter(pipeline, file, name):
    """Load an adapter file into a StableDiffusionXLPipeline under the adapter name `name`; its scale is 1 until set_adapters says otherwise.

    Equal to load_lora_weights where that works.
    Raises:
        UserError: what read_adapter refuses, and keys that the loaders did not use.
    """
    modules = {component: getattr(pipeline, component) for component in COMPONENTS}
    weights, configs = read_adapter(file, modules)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters side by side are meant
        for component in weights:
            _load_into(pipeline, component, name, weights[component], configs[component])
            _check_loaded(file, modules[component], name, weights[component])


def _load_into(pipeline, component, name, weights, config):
    if component == "unet":
        pipeline.unet.load_lora_adapter(weights, prefix=None, adapter_name=name, metadata=config, low_cpu_mem_usage=True)
    else:
        prefixed = {f"{component}.{key}": tensor for key, tensor in weights.items()}
        encoder, config = getattr(pipeline, component), {f"{component}.{key}": value for key, value in config.items()}
        pipeline.load_lora_into_text_encoder(
            prefixed, None, encoder, prefix=component, adapter_name=name, metadata=config, low_cpu_mem_usage=True
        )


def _check_loaded(file, module, name, weights):
    """diffusers, transformers and PEFT only warn about what they leave out, and draw it at random (DoRA magnitudes of text encoders)."""
    from peft import get_peft_model_state_dict

    # PEFT's default for embedding layers would ask the hub about the base model that the adapter names
    loaded = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    used = {key for key, tensor in loaded.items() if key in weights and torch.equal(tensor.cpu(), weights[key].to(tensor.dtype))}
    if left_out := sorted((weights.keys() | loaded.keys()) - used):
        raise UserError(f"--lora {file}: {len(left_out)} of {len(weights)} keys were not used by the loader, e.g. {left_out[0]}")
