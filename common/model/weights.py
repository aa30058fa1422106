"""A part's configuration and safetensors files -> the module, filled: UNet, VAE and text encoders go the same way.

The part is built without memory, checked against its files and filled from them. `fill` is strict: a weight that is
missing, unknown or of another shape is refused before anything of the part is loaded.
"""

import itertools
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError

CHUNK_BYTES = 512 * 2**20
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
# What older and other tools keep beside the weights of a text encoder: SDXL computes with none of it.
_UNUSED = re.compile(r"(^|\.)(position_ids|logit_scale|text_projection\.weight)$")
# The attention of a VAE as diffusers before 0.17 named it.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def empty_part(class_name: str, folder: Path) -> torch.nn.Module:
    """The part that folder/config.json describes, on the meta device: names and shapes, no memory.

    Raises:
        UserError: a configuration that the class does not take.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    try:
        if class_name.startswith("CLIP"):
            config = transformers.CLIPTextConfig.from_pretrained(folder)
            with init_empty_weights(include_buffers=False):  # position_ids is in no file: it must be computed
                return getattr(transformers, class_name)(config)
        part = getattr(diffusers, class_name)
        with torch.device("meta"):
            return part.from_config(part.load_config(folder))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}/config.json: describes no {class_name} ({why})") from None


# ---------------------------------------------------------------- its files


def variant_in(folder: Path, variant: str | None) -> str | None:
    """`variant` where the folder has weights of it, else None: the plain ones."""
    return variant if variant and any(folder.glob(f"*.{variant}*.safetensors")) else None


def weight_files(folder: Path, variant: str | None, stem: str = DIFFUSERS_STEM) -> list[Path]:
    """The safetensors files of a part: those of the variant when there are any, else the plain ones.

    One file, or its numbered shards in order.

    Raises:
        UserError: there are none.
    """
    found = variant_in(folder, variant)
    name = f"{stem}.{found}" if found else stem
    whole = folder / f"{name}.safetensors"
    if whole.exists():
        return [whole]
    suffix = f".{found}" if found else ""
    spellings = f"{name}-?????-of-?????.safetensors", f"{stem}-?????-of-?????{suffix}.safetensors"
    shards = sorted({shard for spelling in spellings for shard in folder.glob(spelling)})
    if not shards:
        raise UserError(f"{folder}: no {name}.safetensors in it (only safetensors are read; pickles can run code)")
    return shards


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file, in the order of its data; only the header is read.

    Raises:
        UserError: a damaged file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}); download or copy it again") from None


def match(module: torch.nn.Module, shapes: dict[str, tuple[int, ...]], file: Path) -> dict[str, str]:
    """{name in the file: name in the module} for the weights of `shapes` that the module has.

    Raises:
        UserError: a weight that the module does not have, or has in another shape.
    """
    wanted = module.state_dict()
    names = {}
    for name, shape in shapes.items():
        own = next((spelling for spelling in _spellings(name) if spelling in wanted), None)
        if own is None and _UNUSED.search(name):
            continue
        if own is None:
            raise UserError(f"{file}: {name} does not belong to this architecture ({type(module).__name__})")
        asked = list(wanted[own].shape)
        if list(shape) != asked:
            raise UserError(f"{file}: {name} has the shape {list(shape)}, its configuration asks for {asked}")
        names[name] = own
    return names


def _spellings(name):
    """A weight's name in the files of all versions -> what it may be called in the module of this one."""
    before, _, layer = name.rpartition(".")[0].rpartition(".")
    respelt = f"{before}.{_OLD_ATTENTION[layer]}.{name.rpartition('.')[2]}" if layer in _OLD_ATTENTION else name
    # transformers 5 dropped `text_model.` from the names inside CLIPTextModel; files have it, or not
    return name, respelt, name.removeprefix("text_model."), f"text_model.{name}"


def refuse_missing(module: torch.nn.Module, found: set[str], where: Path) -> None:
    """Check that `found` names every weight of the module; `where` is the file or folder that should have held them.

    Raises:
        UserError: one is missing.
    """
    if missing := sorted(module.state_dict().keys() - found):
        example = f"{missing[0]} of {type(module).__name__}"
        raise UserError(f"{where}: {len(missing)} of its weights are missing, e.g. {example}")


def check_weights(module: torch.nn.Module, files: list[Path]) -> dict[Path, dict[str, str]]:
    """{file: {name in the file: name in the module}}. Reads headers only.

    Raises:
        UserError: a damaged file; a weight that is missing, unknown or of another shape. It names the file.
    """
    matched = {file: match(module, shapes_in(file), file) for file in files}
    found = set(itertools.chain.from_iterable(names.values() for names in matched.values()))
    refuse_missing(module, found, files[0] if len(files) == 1 else files[0].parent)
    return matched


# ---------------------------------------------------------------- filling


def fill(module: torch.nn.Module, files: list[Path], *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module made on the meta device from safetensors files, in `dtype`, straight on `device`.

    A file is mapped for CHUNK_BYTES at a time: what was read is not counted as ours for longer than that.

    Raises:
        UserError: see `check_weights`.
    """
    for file, names in check_weights(module, files).items():
        for chunk in _chunks(file, names):
            with safe_open(file, "pt", device=str(device)) as tensors:
                weights = {names[name]: tensors.get_tensor(name).to(dtype) for name in chunk}
            for name in [name for name in weights if name.endswith(".weight") and _is_4bit(module, name)]:
                _quantise(module.get_submodule(name.removesuffix(".weight")), weights.pop(name), device)
            module.load_state_dict(weights, strict=False, assign=True)


def _quantise(layer, weight, device):
    empty = layer.weight
    options = dict(compress_statistics=empty.compress_statistics, quant_type=empty.quant_type, module=layer)
    unquantised = type(empty)(weight, requires_grad=False, **options)
    layer.weight = unquantised.to(device)  # Params4bit quantises when it is moved


def _is_4bit(module, weight_name):
    """By the name of its class: bitsandbytes may not be installed."""
    return type(module.get_parameter(weight_name)).__name__ == "Params4bit"


def _chunks(file, names):
    """The tensor `names` of a file, in its own order, in lists of about CHUNK_BYTES."""
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes_in(file).items() if name in names}
    ends = itertools.accumulate(sizes.values())
    for _, group in itertools.groupby(zip(sizes, ends), key=lambda pair: pair[1] // CHUNK_BYTES):
        yield [name for name, _ in group]
