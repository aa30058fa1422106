"""Adapters fused into the model that they were loaded beside, and that model written as a new diffusers folder."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from common.errors import UserError
from common.files import write_json
from common.model.model_kind import SCHEDULER

if TYPE_CHECKING:  # slow to import
    from diffusers import StableDiffusionXLPipeline

    from common.model.loading import Model

SAVED = ("unet", "text_encoder", "text_encoder_2", "vae")
# byte for byte: saved again, tokenizers lose files that other tools read
COPIED = ("scheduler", "tokenizer", "tokenizer_2")


def merge(
    pipeline: "StableDiffusionXLPipeline", adapters: list[tuple[str, float]], model: "Model", place: Path, record: dict
) -> None:
    """Fuse adapters into a pipeline, layer by layer in place, and write it to a new folder, whole or not at all.

    The folder renders what `set_adapters` renders at the same scales, for several LoRA and DoRA adapters together too.

    Args:
        adapters: [(name in the pipeline, scale)].
        model: the loading.Model that the pipeline was loaded from; its own folder is only read.
        place: Path of the new folder.
        record: what merge.json in it says.
    Raises:
        UserError: no room on the disk, not writable, merged weights that are not finite.
    """
    _check_room(pipeline, place)
    _fuse(pipeline, adapters)
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        _write(pipeline, model, partial, record)
        partial.rename(place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--merge {place}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(pipeline, place):
    tensors = chain.from_iterable(getattr(pipeline, name).parameters() for name in SAVED)
    disk = next(folder for folder in place.absolute().parents if folder.is_dir())
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"--merge {place}: needs {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free on that disk"
        )


def _fuse(pipeline, adapters):
    """Add the adapters to the weights and take their layers out: what remains is a plain model."""
    pipeline.set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])
    try:
        pipeline.fuse_lora(safe_fusing=True)  # at the scales just set; lora_scale would come on top
    except ValueError:
        raise UserError(f"--merge: the merged weights are not finite in {pipeline.dtype}; lower the scales") from None
    pipeline.unload_lora_weights()


def _write(pipeline, model, folder, record):
    """The weights as the libraries save them; everything that no adapter changes as it lies in the model's folder."""
    for name in SAVED:
        getattr(pipeline, name).save_pretrained(folder / name)
    for name in COPIED:
        shutil.copytree(model.folder / name, folder / name)
    shutil.copy(model.folder / "model_index.json", folder)
    # a flag, or the model's single file, may have said what the scheduler is
    if json.loads((folder / SCHEDULER).read_text()) != model.scheduler:
        write_json(folder / SCHEDULER, model.scheduler)
    write_json(folder / "merge.json", record)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes its files unreadable for others
