"""What an adapter file must hold: layers of this model, whole pairs, finite values, a configuration that PEFT knows."""

import dataclasses
import math
from importlib.metadata import version
from pathlib import Path

import torch

from common.errors import UserError

# PEFT starts these from decompositions of W and subtracts them from it: without the changed W they mean something else.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adaptable_layers(module: torch.nn.Module) -> dict:
    """{name: frozen weight} of the layers that can have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = (torch.nn.Linear, torch.nn.Conv2d, BaseTunerLayer)
    return {name: layer.weight for name, layer in module.named_modules() if isinstance(layer, kinds)}


def misfit(file: Path, keys: list, total: int) -> UserError:
    """The refusal of a file with keys that belong to no layer of this model."""
    return UserError(
        f"--lora {file}: {len(keys)} of {total} keys fit nothing in this SDXL, e.g. {keys[0]}; "
        "an adapter of another kind or model?"
    )


def check_weights(file: Path, module: torch.nn.Module, weights: dict) -> None:
    """Refuse PEFT keys whose layer `module` does not have, of a wrong shape, or without their other half."""
    if misfits := misfitting_keys(module, weights):
        raise misfit(file, misfits, len(weights))


def misfitting_keys(module: torch.nn.Module, weights: dict) -> list:
    """The keys that check_weights refuses."""
    shapes = {name: weight.shape for name, weight in adaptable_layers(module).items()}
    return [key for key in weights if not _fits(shapes, weights, *key.rpartition(".lora_")[::2])]


def _fits(shapes, weights, layer, kind):
    down = weights.get(f"{layer}.lora_A.weight")
    up = weights.get(f"{layer}.lora_B.weight")
    shape = shapes.get(layer)
    if down is None or up is None or shape is None or kind not in ("A.weight", "B.weight", "magnitude_vector"):
        return False
    if kind == "magnitude_vector" and weights[f"{layer}.lora_magnitude_vector"].numel() != shape[0]:
        return False
    return down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], down.shape[0])


def check_values(file: Path, weights: dict) -> None:
    """Refuse {component: {PEFT key: tensor}} that is not finite, or that changes nothing."""
    tensors = {key: tensor for part in weights.values() for key, tensor in part.items()}
    if whole := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        dtype = tensors[whole[0]].dtype
        raise UserError(f"--lora {file}: {len(whole)} tensors hold {dtype}, e.g. {whole[0]}; only floats are read")
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"--lora {file}: {len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}; "
            "the training that wrote it diverged"
        )

    # a pair changes something when neither half is zero, a magnitude when it is not
    nonzero = {key: tensor.any() for key, tensor in tensors.items()}
    firsts = [key for key in tensors if "lora_B" not in key]
    if not any(nonzero[key] and nonzero.get(key.replace("lora_A", "lora_B"), True) for key in firsts):
        raise UserError(
            f"--lora {file}: would change nothing, one half of every pair is zero, e.g. {next(iter(tensors))}; "
            "was it trained?"
        )


def rendering_config(file: Path, source: str, described: dict) -> dict:
    """What a file says of its adapter -> LoraConfig arguments for rendering: without the dropout of its training.

    What a newer PEFT has added is left out where it is switched off, and refused where it is not.

    Args:
        source: where in the file it stands, for messages.
    """
    from peft import LoraConfig

    # what only a newer PEFT knows
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if newer := sorted(name for name, value in described.items() if name not in known and value):
        raise UserError(
            f"--lora {file}: its {source} asks for {', '.join(newer)}, which PEFT {version('peft')} does not know; "
            "pip install -U peft"
        )

    # what means something else here
    init = described.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise UserError(
            f"--lora {file}: its {source} says init_lora_weights {init!r}, which changed the base model too; "
            "convert it to LoRA with PEFT"
        )
    numbers = {name: described.get(name, 1) for name in ("r", "lora_alpha")} | (described.get("alpha_pattern") or {})
    for name, value in numbers.items():
        check_number(file, f"{name} in its {source}", value)
    return {name: value for name, value in described.items() if name in known} | {"lora_dropout": 0.0}


def check_number(file: Path, name: str, value: float) -> None:
    """Refuse what is not a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(
            f"--lora {file}: {name} is {value}, not a number; the file is damaged, or its training diverged"
        )
