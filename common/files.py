"""Files that a reader finds whole or not at all."""

import json
import os
import re

from safetensors import SafetensorError
from safetensors.torch import save_file


def write_json(path, value):
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def write_safetensors(path, tensors, metadata=None):
    """The same for tensors.

    Raises:
        OSError: where it cannot be written; safetensors has an error of its own for that, with the number in its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    partial.chmod(0o644)  # safetensors makes its files unreadable for others
    os.replace(partial, path)
