"""Files that a reader finds whole or not at all."""

import json
import os

from safetensors.torch import save_file


def write_json(path, value):
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def write_safetensors(path, tensors, metadata=None):
    """The same for tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial, metadata)
    partial.chmod(0o644)  # safetensors makes its files unreadable for others
    os.replace(partial, path)
