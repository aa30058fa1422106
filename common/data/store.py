"""What was computed once, under the key of what it was computed from.

Pairs of tensors lie in files that any number of processes share.
"""

import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import files

SHARD_ENTRIES = 64


class Store:
    """key -> tuple of tensors, in memory-mapped safetensors shards in one folder, or in RAM when `folder` is None.

    Shards are written whole under a new name and never changed, so any number of processes may share a folder.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._pending = {}
        self._shards = {}  # path -> the open file
        self._shard_of = {}  # key -> the open file
        self.reload()

    def reload(self):
        """Find the shards that other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if path not in self._shards:
                try:
                    self._shards[path] = safe_open(path, "pt")
                    self._shard_of.update((key, self._shards[path]) for key in _keys_in(self._shards[path]))
                except FileNotFoundError:
                    continue  # another process has found it damaged
                except SafetensorError as error:
                    self._remove(path, error)

    def drop_damaged(self, keys):
        """Remove the damaged ones of the shards that hold one of `keys`: all their entries are made again."""
        wanted = set(keys)
        for path, shard in list(self._shards.items()):
            if not wanted.isdisjoint(_keys_in(shard)) and (damaged := files.first_damage(shard)):
                del self._shards[path]
                self._remove(path, f"{damaged} is not what was written")
        self._shard_of = {key: shard for shard in self._shards.values() for key in _keys_in(shard)}

    def _remove(self, path, damage):
        path.unlink(missing_ok=True)  # another process may have seen it too
        print(f"cache: {path} is damaged ({damage}) and was removed; its entries are encoded again")

    def __contains__(self, key):
        return key in self._pending or key in self._shard_of

    def __getitem__(self, key):
        if key in self._pending:
            return self._pending[key]
        shard = self._shard_of[key]
        return shard.get_tensor(f"{key}.0"), shard.get_tensor(f"{key}.1")

    def __setitem__(self, key, pair):
        self._pending[key] = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in pair)
        if self.folder and len(self._pending) >= SHARD_ENTRIES:
            self.flush()

    def flush(self):
        """Write what is pending as one more shard: complete or absent, never half."""
        if not self.folder or not self._pending:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        files.write_safetensors(
            path, {f"{key}.{i}": tensor for key, pair in self._pending.items() for i, tensor in enumerate(pair)}
        )
        self._pending = {}
        self.reload()


def _keys_in(shard):
    """Keys of the entries in an open shard."""
    return {name.rpartition(".")[0] for name in shard.keys()}
