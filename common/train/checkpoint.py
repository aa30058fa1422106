"""Checkpoints: everything needed to go on exactly where a run was. A folder is complete or absent."""

import json
import math
from pathlib import Path

import torch
import xxhash

from common import run_folder
from common.errors import UserError
from common.files import DamagedFile, read_safetensors, remove_folder, replacing_folder, write_json, write_safetensors

STATE_HASH = "state.json"  # in the metadata of state.safetensors: what belongs together is read together or not at all
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile)  # what reading a damaged one raises


def save_checkpoint(output_dir: Path, step: int, engine, progress: dict, limit: int | None) -> None:
    """Write checkpoint-STEP/: the engine's state and `progress`; then drop all but the `limit` newest."""
    state = engine.state()
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    plain["progress"] = progress

    folder = Path(output_dir) / f"checkpoint-{step:06d}"
    with replacing_folder(folder) as partial:
        write_safetensors(partial / "state.safetensors", tensors, {STATE_HASH: _fingerprint(plain)})
        write_json(partial / "state.json", plain)
    for old in run_folder.find_checkpoints(output_dir)[:-limit] if limit else ():
        remove_folder(old)


def load_checkpoint(folder: Path, engine) -> dict:
    """Put the engine where the checkpoint was made; returns its `progress`.

    What is refused leaves the engine as it was.
    Raises:
        DamagedFile: a checkpoint that is not what was written, or not finite.
        UserError: one of another adapter or optimizer.
    """
    try:
        state, progress = _read(folder)
        engine.load_state(state)
    except DAMAGE as error:
        raise DamagedFile(
            f"--resume_from_checkpoint {folder}: damaged or incomplete ({type(error).__name__}: {error});"
            " remove it, or name an earlier one"
        ) from None
    except UserError as error:
        raise UserError(f"--resume_from_checkpoint {folder}: {error}") from None
    return progress


def _read(folder):
    """(the engine's state, with its tensors on the CPU; progress)."""
    tensors, metadata = read_safetensors(folder / "state.safetensors")
    plain = json.loads((folder / "state.json").read_text())
    if metadata.get(STATE_HASH) not in (None, _fingerprint(plain)):
        raise ValueError("state.json is not what was written")
    progress = plain.pop("progress")
    numbers = [progress[name] for name in ("step", "batches", "effective_batch")]
    if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers):
        raise ValueError(f"state.json has {numbers} for steps, batches and images a step")
    return {**plain, **tensors}, progress


def _fingerprint(plain):
    """Hash of what state.json says, however it is laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def read_config(output_dir: Path) -> dict:
    """The recipe in a run's config.json, {"flags", "data": {"images", "fingerprint"}}; empty if absent or damaged."""
    try:
        recipe = json.loads((output_dir / "config.json").read_text())
        data = {"images": int(recipe["data"]["images"]), "fingerprint": str(recipe["data"]["fingerprint"])}
        return {"flags": dict(recipe["flags"]), "data": data}
    except (OSError, ValueError, KeyError, TypeError):
        return {"flags": {}, "data": {}}
