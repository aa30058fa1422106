"""Checkpoints: everything needed to go on exactly where a run was. A folder is complete or absent."""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.command_line import UserError
from common.files import write_json, write_safetensors

KAGGLE_INPUT = Path("/kaggle/input")


def save_checkpoint(output_dir, step, engine, progress, limit):
    """Write checkpoint-STEP/: flat parameters, average, optimizer state and `progress`; then drop all but `limit` newest."""
    folder = Path(output_dir) / f"checkpoint-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tensors, numbers = {"flat": engine.flat.data}, {}
    if engine.ema is not None:
        tensors["ema"] = engine.ema.average
    for i, group in enumerate(engine.flat.groups):
        for key, value in engine.optimizer.state[group["params"][0]].items():
            (tensors if torch.is_tensor(value) else numbers)[f"optimizer.{i}.{key}"] = value
    write_safetensors(partial / "state.safetensors", tensors)
    scale = {"value": engine.loss_scale.value.item(), "good_steps": engine.loss_scale.good_steps}
    made_with = {"layout": engine.flat.layout, "optimizer_class": type(engine.optimizer).__name__}
    write_json(partial / "state.json", {**made_with, "optimizer": numbers, "loss_scale": scale, "progress": progress})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in find_checkpoints(output_dir)[:-limit] if limit else ():
        shutil.rmtree(old)


def find_checkpoints(output_dir):
    """Complete checkpoint folders, oldest first."""
    return sorted(path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def find_resume(resume_from_checkpoint, output_dir):
    """The folder that `--resume_from_checkpoint` means, or None when there is nothing to resume.

    'latest' is the newest of this output folder; on Kaggle, where each version of a notebook starts with an empty one, else the newest of
    a folder of the same name below /kaggle/input, where the output of an earlier version was attached.
    """
    if resume_from_checkpoint != "latest":
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None
    found = find_checkpoints(output_dir) or _checkpoints_of_earlier_versions(Path(output_dir).resolve().name)
    return found[-1] if found else None


def _checkpoints_of_earlier_versions(name):
    """Complete checkpoint folders in folders called `name` below /kaggle/input, by their step."""
    return sorted((folder for place in KAGGLE_INPUT.glob(f"**/{name}") for folder in find_checkpoints(place)), key=step_of)


def step_of(folder):
    """The optimizer step in a checkpoint folder's name; 0 where somebody has given it another one."""
    number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(number[1]) if number else 0


def read_config(output_dir):
    """The recipe in a run's config.json: {"flags": ..., "data": ...}, empty where it is absent or damaged."""
    try:
        recipe = json.loads((output_dir / "config.json").read_text())
        return {"flags": dict(recipe["flags"]), "data": dict(recipe["data"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"flags": {}, "data": {}}


def _numbers(layout):
    return f"{sum(math.prod(shape) for _, shape in layout):,} numbers in {len(layout)} weights"


def load_checkpoint(folder, engine):
    """Put the engine where the checkpoint was made; returns its `progress`.

    Raises:
        UserError: a damaged checkpoint, or one of another adapter.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        layout, optimizer_class = [(name, tuple(shape)) for name, shape in state["layout"]], state["optimizer_class"]
        tensors = load_file(folder / "state.safetensors", device=str(engine.host.device))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"--resume_from_checkpoint {folder}: damaged or incomplete ({type(error).__name__}: {error}); remove it, or name an earlier one"
        ) from None
    if layout != engine.flat.layout:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its adapter has {_numbers(layout)}, this one {_numbers(engine.flat.layout)}; resume with the"
            " same script, base model, --lora_rank, --lora_target_modules, --strategy and --train_text_encoder"
        )
    if optimizer_class != type(engine.optimizer).__name__:
        raise UserError(f"--resume_from_checkpoint {folder}: made with {optimizer_class}; resume with the same --use_8bit_adam")
    if ("ema" in tensors) != (engine.ema is not None):
        raise UserError(
            f"--resume_from_checkpoint {folder}: made {'with' if 'ema' in tensors else 'without'} --use_ema; resume the same way"
        )
    engine.flat.data.copy_(tensors.pop("flat"))
    engine.flat.publish()
    if engine.ema is not None:
        engine.ema.average.copy_(tensors.pop("ema"))
    for name, value in {**tensors, **state["optimizer"]}.items():
        _, group, key = name.split(".", 2)
        parameter = engine.flat.groups[int(group)]["params"][0]
        # torch keeps AdamW's step count on the CPU unless the optimizer is fused
        on_cpu = key == "step" and torch.is_tensor(value) and not engine.optimizer.defaults.get("fused")
        engine.optimizer.state[parameter][key] = value.cpu() if on_cpu else value
    engine.loss_scale.value.fill_(state["loss_scale"]["value"])
    engine.loss_scale.good_steps = state["loss_scale"]["good_steps"]
    return state["progress"]
