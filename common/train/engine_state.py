"""The state of an engine, {name: tensor or plain value}: the optimizer's part of it, and what is refused as none."""

import math

import torch

from common.errors import UserError
from common.model.adapters import FlatParameters


def optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> dict[str, object]:
    """{"optimizer.GROUP.KEY": tensor} of the flat groups, and "optimizer": {the same: number} of what is no tensor."""
    tensors, numbers = {}, {}
    for i, group in enumerate(flat.groups):
        for key, value in optimizer.state[group["params"][0]].items():
            kind = tensors if torch.is_tensor(value) else numbers
            kind[f"optimizer.{i}.{key}"] = value
    return {**tensors, "optimizer": numbers}


def load_optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters, state: dict[str, object]) -> None:
    """Put the optimizer where `optimizer_state` was taken; its tensors are copied to where the optimizer needs them."""
    tensors = {name: value for name, value in state.items() if name.startswith("optimizer.")}
    for name, value in {**tensors, **state["optimizer"]}.items():
        _, group, key = name.split(".", 2)
        parameter = flat.groups[int(group)]["params"][0]
        # torch keeps AdamW's step count on the CPU unless the optimizer is fused
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        device = torch.device("cpu") if on_cpu else flat.data.device
        optimizer.state[parameter][key] = value.to(device, copy=True) if torch.is_tensor(value) else value


def first_not_finite(state: dict[str, object]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity; None where all is finite."""
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # Both show in the extremes, which take one pass and no memory
    return next((name for name, tensor in floats.items() if not torch.stack(tensor.aminmax()).isfinite().all()), None)


def check_state(state: dict[str, object], own: dict[str, object]) -> None:
    """Refuse what an engine whose state is `own` cannot go on from.

    Raises:
        UserError: the state of another adapter or optimizer.
        ValueError, KeyError, TypeError, AttributeError: not the whole state of an engine, or not finite.
    """
    numbers = [state["loss_scale"]["value"], state["loss_scale"]["good_steps"]]
    if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers):
        raise ValueError(f"{numbers} for loss scale and good steps")
    if what := first_not_finite(state):
        raise ValueError(f"{what} holds NaN or infinity")
    if absent := {"optimizer_class", "optimizer", "flat"} - state.keys():
        raise ValueError(f"no {min(absent)} in it")

    # Whole, but of another run
    layout = [(name, tuple(shape)) for name, shape in state["layout"]]  # JSON has lists
    if layout != own["layout"]:
        raise UserError(
            f"its adapter has {_size(layout)}, this one {_size(own['layout'])}; resume with the same script, base"
            " model, --lora_rank, --lora_target_modules, --strategy and --train_text_encoder"
        )
    if state["optimizer_class"] != own["optimizer_class"]:
        raise UserError(f"made with {state['optimizer_class']}; resume with the same --use_8bit_adam")
    if ("ema" in state) != ("ema" in own):
        raise UserError(f"made {'with' if 'ema' in state else 'without'} --use_ema; resume the same way")


def _size(layout):
    return f"{sum(math.prod(shape) for _, shape in layout):,} numbers in {len(layout)} weights"
