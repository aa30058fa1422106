"""Files that a reader finds whole or not at all, on the disk before they count.

safetensors files know when a byte has changed.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError

# Key in a safetensors file's metadata: {tensor name: hash}, and the hash of the other metadata under "".
HASHES = "xxh3_64"
# What file systems answer that cannot sync a folder.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


class DamagedFile(UserError):
    """A file that is not what was written."""


# ---------------------------------------------------------------- whole or absent


def partial_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, to write to until it can take the place of `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write to: afterwards it is on the disk and takes the place of `path`; after an error it is gone."""
    partial = partial_name(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # that of the block itself says more
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which is yet to be made; one that has the name already is removed."""
    partial = partial_name(folder)
    try:
        yield partial
        _sync(partial)
        if folder.exists():
            remove_folder(folder, replaced_by=partial)
        else:
            partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path, replaced_by: Path | None = None) -> None:
    """Remove a folder so that it is whole or absent at every instant; another one may take its name."""
    doomed = partial_name(folder)
    folder.rename(doomed)
    if replaced_by is not None:
        replaced_by.rename(folder)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a power cut (fsync).

    Windows has no such call for folders.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------- tensors


def write_safetensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """The same for tensors, with a hash of each in the metadata.

    Raises:
        OSError: where it cannot be written; safetensors has an error of its own for that, with the number in its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = metadata or {}
    hashes = {"": _hash_of_metadata(metadata), **{name: _hash(name, tensor) for name, tensor in copies.items()}}
    with replacing(path) as partial:
        try:
            save_file(copies, partial, {**metadata, HASHES: json.dumps(hashes)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        partial.chmod(0o644)  # safetensors makes its files unreadable for others


def read_safetensors(path: Path, *, from_anywhere: bool = False) -> tuple[dict, dict]:
    """({name: tensor on the CPU}, metadata) of a safetensors file, each tensor as it was written.

    Args:
        from_anywhere: another tool may have written it and copied our metadata into it;
            it is then read as one without hashes.
    Raises:
        DamagedFile: naming the file and what in it has changed.
    """
    try:
        with safe_open(path, "pt") as opened:
            if damaged := first_damage(opened, from_anywhere=from_anywhere):
                raise DamagedFile(f"{path}: damaged, {damaged} is not what was written; make it or copy it again")
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise DamagedFile(f"{path}: damaged or not a safetensors file ({error}); make it or copy it again") from None


def first_damage(opened, *, from_anywhere: bool = False) -> str | None:
    """What in an open safetensors file is not as it was written; None where all is, and where the file has no hashes.

    With `from_anywhere` a file in which no matrix agrees is one of another tool, which kept our metadata:
    it has no hashes of its own.
    """
    metadata = dict(opened.metadata() or {})
    try:
        hashes = dict(json.loads(metadata.pop(HASHES, "{}")))
    except (ValueError, TypeError):
        return "its metadata"
    if not hashes:
        return None

    # Compare what is there with what was written.
    names = set(opened.keys())
    wrong = [
        name for name in hashes if name and (name not in names or _hash(name, opened.get_tensor(name)) != hashes[name])
    ]
    matrices = {name for name in names if len(shape := opened.get_slice(name).get_shape()) > 1 and all(shape)}
    if from_anywhere and len(matrices) > 1 and matrices <= set(wrong):
        return None
    if wrong:
        return wrong[0]
    return None if hashes.get("") == _hash_of_metadata(metadata) else "its metadata"


def _hash(name: str, tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_metadata(metadata: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(metadata, sort_keys=True).encode())


def save_png(path, image, text):
    """Write a PIL image as PNG with `text` {chunk name: str} in it; a reader finds all of it or nothing."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)
