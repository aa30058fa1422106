"""Checkpoints: everything needed to go on exactly where a run was. A folder is complete or absent."""

import json
import math
from pathlib import Path

import torch
import xxhash

from common import run_folder
from common.command_line import UserError
from common.files import DamagedFile, read_safetensors, remove_folder, replacing_folder, write_json, write_safetensors

STATE_HASH = "state.json"  # in the metadata of state.safetensors: what belongs together is read together or not at all


def save_checkpoint(output_dir: Path, step: int, engine, progress: dict, limit: int | None) -> None:
    """Write checkpoint-STEP/: flat parameters, average, optimizer state and `progress`; then drop all but `limit` newest."""
    folder = Path(output_dir) / f"checkpoint-{step:06d}"
    tensors, numbers = _tensors_of(engine)
    scale = {"value": engine.loss_scale.value.item(), "good_steps": engine.loss_scale.good_steps}
    made_with = {"layout": engine.flat.layout, "optimizer_class": type(engine.optimizer).__name__}
    state = {**made_with, "optimizer": numbers, "loss_scale": scale, "progress": progress}

    with replacing_folder(folder) as partial:
        write_safetensors(partial / "state.safetensors", tensors, {STATE_HASH: _fingerprint(state)})
        write_json(partial / "state.json", state)
    for old in run_folder.find_checkpoints(output_dir)[:-limit] if limit else ():
        remove_folder(old)


def _tensors_of(engine) -> tuple[dict, dict]:
    """({name: tensor}, {name: number}) of everything that training moves."""
    tensors, numbers = {"flat": engine.flat.data}, {}
    if engine.ema is not None:
        tensors["ema"] = engine.ema.average
    for i, group in enumerate(engine.flat.groups):
        for key, value in engine.optimizer.state[group["params"][0]].items():
            (tensors if torch.is_tensor(value) else numbers)[f"optimizer.{i}.{key}"] = value
    return tensors, numbers


def _fingerprint(state: dict) -> str:
    """Hash of what state.json says, however it is laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(state, sort_keys=True).encode())


def not_finite(engine) -> str | None:
    """The first of the engine's tensors that holds a NaN or an infinity, by its name in a checkpoint; None where all is finite."""
    return _first_not_finite(_tensors_of(engine)[0])


def _first_not_finite(tensors: dict) -> str | None:
    # NaN and infinity both show in the extremes, which take one pass and no memory
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return next((name for name, tensor in floats.items() if not torch.stack(tensor.aminmax()).isfinite().all()), None)


def read_config(output_dir: Path) -> dict:
    """The recipe in a run's config.json: {"flags": {}, "data": {"images", "fingerprint"}}, empty where it is absent or damaged."""
    try:
        recipe = json.loads((output_dir / "config.json").read_text())
        data = {"images": int(recipe["data"]["images"]), "fingerprint": str(recipe["data"]["fingerprint"])}
        return {"flags": dict(recipe["flags"]), "data": data}
    except (OSError, ValueError, KeyError, TypeError):
        return {"flags": {}, "data": {}}


# ---------------------------------------------------------------- going on


def load_checkpoint(folder: Path, engine) -> dict:
    """Put the engine where the checkpoint was made; returns its `progress`. What is refused leaves the engine as it was.

    Raises:
        DamagedFile: a checkpoint that is not what was written, or not finite.
        UserError: one of another adapter or optimizer.
    """
    state, tensors = _read(folder)
    _check_fits(folder, state, tensors, engine)

    engine.flat.data.copy_(tensors.pop("flat"))
    engine.flat.publish()
    if engine.ema is not None:
        engine.ema.average.copy_(tensors.pop("ema"))
    for name, value in {**tensors, **state["optimizer"]}.items():
        _, group, key = name.split(".", 2)
        parameter = engine.flat.groups[int(group)]["params"][0]
        # torch keeps AdamW's step count on the CPU unless the optimizer is fused
        on_cpu = key == "step" and not engine.optimizer.defaults.get("fused")
        place = torch.device("cpu") if on_cpu else engine.host.device
        engine.optimizer.state[parameter][key] = value.to(place, copy=True) if torch.is_tensor(value) else value
    engine.loss_scale.value.fill_(state["loss_scale"]["value"])
    engine.loss_scale.good_steps = state["loss_scale"]["good_steps"]
    return state["progress"]


def _read(folder: Path) -> tuple[dict, dict]:
    """(what state.json says, {name: tensor on the CPU})."""
    try:
        tensors, metadata = read_safetensors(folder / "state.safetensors")
        state = json.loads((folder / "state.json").read_text())
        if metadata.get(STATE_HASH) not in (None, _fingerprint(state)):
            raise ValueError("state.json is not what was written")
        state["layout"] = [(name, tuple(shape)) for name, shape in state["layout"]]
        numbers = [state["loss_scale"]["value"], state["loss_scale"]["good_steps"]]
        numbers += [state["progress"][name] for name in ("step", "batches", "effective_batch")]
        if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers):
            raise ValueError(f"state.json has {numbers} for loss scale, good steps, steps, batches and images a step")
        if what := _first_not_finite(tensors):
            raise ValueError(f"{what} holds NaN or infinity")
        if absent := {"optimizer_class", "optimizer", "flat"} - state.keys() - tensors.keys():
            raise ValueError(f"no {min(absent)} in it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile) as error:
        raise DamagedFile(
            f"--resume_from_checkpoint {folder}: damaged or incomplete ({type(error).__name__}: {error}); remove it, or name an earlier one"
        ) from None
    return state, tensors


def _check_fits(folder: Path, state: dict, tensors: dict, engine) -> None:
    layout = state["layout"]
    if layout != engine.flat.layout:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its adapter has {_numbers(layout)}, this one {_numbers(engine.flat.layout)}; resume with the"
            " same script, base model, --lora_rank, --lora_target_modules, --strategy and --train_text_encoder"
        )
    if state["optimizer_class"] != type(engine.optimizer).__name__:
        raise UserError(
            f"--resume_from_checkpoint {folder}: made with {state['optimizer_class']}; resume with the same --use_8bit_adam"
        )
    if ("ema" in tensors) != (engine.ema is not None):
        raise UserError(
            f"--resume_from_checkpoint {folder}: made {'with' if 'ema' in tensors else 'without'} --use_ema; resume the same way"
        )


def _numbers(layout: list) -> str:
    return f"{sum(math.prod(shape) for _, shape in layout):,} numbers in {len(layout)} weights"
