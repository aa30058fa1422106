"""A single .safetensors checkpoint in the original layout -> a diffusers folder (fp16), made once, whole or not at all.

RAM holds one part at a time. diffusers converts the names; the result is checked against the architecture.
"""

import hashlib
import shutil
import time
import uuid
from pathlib import Path

from safetensors import safe_open

from common.cli import hub
from common.errors import UserError
from common.files import write_safetensors
from common.model import model_kind, weights

VERSION = 1  # raise it when the same file gives another folder: old ones are then never found
PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
CLASSES = {**model_kind.PARTS, "vae": "AutoencoderKL"}
DEAD_S = 3600  # a conversion takes minutes
_OF_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # by which ComfyUI knows such models
_OF_ADAPTERS = ("lora_", "lora.", "lokr_", "hada_", "dora_scale")
_COPIED = ("model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*", "*/config.json")


def convert(path: Path, config: str, cache_dir: Path) -> Path:
    """The folder of `path` under `cache_dir`. It has no vae folder where the file has no VAE.

    Args:
        config: folder or hub id of the configurations and tokenizers.
    Raises:
        UserError: not a whole SDXL checkpoint, or not of the architecture that `config` describes.
        OSError: the folder cannot be written.
    """
    # what the file is
    named = f"--pretrained_model_name_or_path {path}"
    if path.suffix != ".safetensors":
        raise UserError(f"{named}: only .safetensors files are read; pickles can run code")
    names = list(weights.shapes_in(path))
    _refuse_foreign(names, named)

    # the configurations and tokenizers that go with it
    configs = Path(config) if Path(config).is_dir() else hub.download_files(config, list(_COPIED))
    model_kind.check_folder(configs, f"--config_name_or_path {config}")
    found = [file for pattern in _COPIED for file in configs.glob(pattern) if file.is_file()]
    copied = {file.relative_to(configs): file.read_bytes() for file in found}

    # one folder for this file and these configurations, made where it is not there yet
    stat = path.stat()
    contents = sorted((str(file), content) for file, content in copied.items())
    identity = VERSION, stat.st_size, stat.st_mtime_ns, contents
    key = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    folder = cache_dir / "single_file" / f"{path.stem}-{key}"
    if not folder.exists():
        _write(folder, path, names, copied)
    return folder


def _refuse_foreign(names, named):
    if any(mark in name for name in names for mark in _OF_ADAPTERS):
        cure = "name the model here, and infer.py takes adapters by --lora"
        raise UserError(f"{named}: is an adapter (LoRA), not a model; {cure}")
    if edm := [name for name in _OF_EDM if name in names]:
        raise UserError(f"{named}: is an EDM model (it has the key {edm[0]}), which is not supported")
    if any(name.startswith("cond_stage_model.") for name in names):
        raise UserError(f"{named}: is Stable Diffusion 1 or 2, not SDXL")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise UserError(f"{named}: is SDXL's refiner, not its base model")
    for part, prefix in PREFIXES.items():
        if part != "vae" and not any(name.startswith(prefix) for name in names):
            needed = "a whole SDXL checkpoint in the original layout is needed"
            raise UserError(f"{named}: has no {part} (no names in {prefix}); {needed}")


def _write(folder, path, names, copied):
    """Convert into a folder of its own name, then rename it: other processes see it whole.

    Of two that convert the same file, the second drops its own folder.
    """
    _remove_dead(folder.parent)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        for file, content in copied.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).write_bytes(content)
        # Every part is checked before the first is written.
        parts = {part: _read_part(path, names, part, partial / part) for part in PREFIXES}
        for part, tensors in parts.items():
            _write_part(tensors, part, partial / part)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(place):
    """Remove what killed processes have left: conversions that were begun more than DEAD_S ago."""
    for partial in place.glob("*.partial"):
        if time.time() - partial.stat().st_mtime > DEAD_S:
            shutil.rmtree(partial, ignore_errors=True)


def _read_part(path, names, part, folder):
    """{name in diffusers: tensor} of a part, mapped rather than read; none of them where the file has no VAE.

    Raises:
        UserError: it does not fit folder/config.json.
    """
    own = [name for name in names if name.startswith(PREFIXES[part])]
    if not own:
        return {}

    # under diffusers' names
    empty = weights.empty_part(CLASSES[part], folder)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in own}
    try:
        tensors = _respell(part, tensors, empty)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its {part} is incomplete, or of another architecture ({error})") from None

    # whole, and of the shapes that the configuration gives
    try:
        matched = weights.match(empty, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        weights.refuse_missing(empty, set(matched.values()), path)
    except UserError as error:
        raise UserError(f"{error}; is it complete, and is --config_name_or_path of its architecture?") from None
    return {name: tensors[name] for name in matched}


def _write_part(tensors, part, folder):
    if not tensors:
        return shutil.rmtree(folder, ignore_errors=True)  # a configuration without weights
    stem = weights.TRANSFORMERS_STEM if part.startswith("text_encoder") else weights.DIFFUSERS_STEM
    shards = _shards(tensors)
    for i, shard in enumerate(shards, 1):
        halves = {name: tensors[name].half() for name in shard}
        write_safetensors(folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", halves, {"format": "pt"})


def _respell(part, tensors, empty):
    """Weights by their original names -> by diffusers' names."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    if part == "unet":
        return convert_ldm_unet_checkpoint(tensors, empty.config)
    if part == "vae":
        return convert_ldm_vae_checkpoint(tensors, empty.config)
    if part == "text_encoder_2":
        return convert_open_clip_checkpoint(empty, tensors, prefix=PREFIXES[part])
    return {name.removeprefix(PREFIXES[part]): tensor for name, tensor in tensors.items()}


def _shards(tensors):
    """Names in lists of at most CHUNK_BYTES in fp16 (or one tensor): no more than that is copied at a time."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        size += 2 * tensor.numel()
        if shards[-1] and size > weights.CHUNK_BYTES:
            shards.append([])
            size = 2 * tensor.numel()
        shards[-1].append(name)
    return shards
