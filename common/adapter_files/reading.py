"""Adapter files of every format -> weights under PEFT's names: `find_adapter` resolves a path, `read_adapter` reads it.

What would fit in part or change nothing is refused: diffusers and PEFT do both with a warning.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.adapter_files import diffusers_format, layer_reading, peft_format
from common.adapter_files.checks import check_values, check_weights
from common.errors import UserError
from common.files import read_safetensors


def find_adapter(place: str | Path) -> Path:
    """What `--lora place` means -> Path of a readable .safetensors file.

    `place` is such a file, a folder that a training run or diffusers wrote (its final weights, not those of a step), or
    a PEFT folder.

    Raises:
        UserError: nothing there, a pickle, a damaged file.
    """
    path = Path(place)
    file = _weights_in(path) if path.is_dir() else path
    if not file.exists():
        raise UserError(f"--lora {path}: no such file or folder")
    if file.suffix != ".safetensors":
        raise UserError(f"--lora {file}: only .safetensors files are read; pickles (.bin, .pt, .ckpt) can run code")

    # it can be opened, and holds tensors
    try:
        with safe_open(file, "pt") as tensors:
            empty = not tensors.keys()
    except SafetensorError as error:
        raise UserError(
            f"--lora {file}: damaged or not a safetensors file ({error}); download or copy it again"
        ) from None
    if empty:
        raise UserError(f"--lora {file}: has no tensors in it")
    return file


def _weights_in(folder):
    of_step = folder.parent / f"pytorch_lora_weights_{folder.name.removeprefix('checkpoint-')}.safetensors"
    if folder.name.startswith("checkpoint-") and of_step.exists():
        return of_step  # a checkpoint itself holds what training needs, and no adapter file
    for name in (diffusers_format.WEIGHTS, peft_format.PEFT_WEIGHTS):
        if (folder / name).exists():
            return folder / name
    if pickles := sorted(folder.glob("*.bin")):
        return pickles[0]
    steps = sorted(folder.glob("*.safetensors"))
    hint = f"; name one of its files, e.g. {steps[-1].name}" if steps else ""
    raise UserError(f"--lora {folder}: neither {diffusers_format.WEIGHTS} nor {peft_format.PEFT_WEIGHTS} in it{hint}")


def read_adapter(file: Path, modules: dict, say: Callable = print) -> tuple[dict, dict]:
    """Read an adapter file, of whatever format, for a model's `modules` {component: module}.

    `say` is told what is left out.

    Returns:
        ({component: {PEFT key: tensor}}, {component: LoraConfig arguments}).
    Raises:
        UserError: keys or shapes that fit nothing in this model, weights that are not finite or change nothing, a
            configuration that the installed PEFT does not know.
    """
    tensors, metadata = read_safetensors(file, from_anywhere=True)
    if bundled := {key for key in tensors if key.startswith(layer_reading.EMBEDDINGS)}:
        words = ", ".join(sorted({key.removeprefix(layer_reading.EMBEDDINGS).partition(".")[0] for key in bundled}))
        say(f"{file}: the text embeddings in it ({words}) are left out, its layers are used")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in bundled}
    if not tensors:
        raise UserError(f"--lora {file}: holds text embeddings and no layers; it is no adapter")

    if all(key.startswith(peft_format.PEFT_PREFIX) for key in tensors):
        weights, configs = peft_format.read_peft(file, modules)
    else:
        weights, configs = layer_reading.read_layers(file, tensors, metadata, modules)
    check_values(file, weights)
    for component, part in weights.items():
        check_weights(file, modules[component], part)
    return weights, configs
