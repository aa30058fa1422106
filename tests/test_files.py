"""A byte that changed is never read silently: not in a cache, not in a checkpoint (test_run_folder), not in an adapter."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import files
from common.adapter_files import reading
from common.data import caching
from common.errors import UserError

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "other matrix": torch.ones(2, 2),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "eight": torch.ones(5).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def written(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "alpha": "8"})
    return tmp_path / "x.safetensors"


def content(tensors, metadata):
    kept = {name: value for name, value in metadata.items() if name in ("format", "alpha")}
    return {name: (tensor.dtype, tensor.float().tolist()) for name, tensor in tensors.items()}, kept


def test_what_was_written_is_read_and_plain_safetensors_reads_it_too(written):
    tensors, metadata = files.read_safetensors(written)
    assert content(tensors, metadata) == content(TENSORS, {"format": "pt", "alpha": "8"})
    assert content(load_file(written), metadata) == content(TENSORS, {"format": "pt", "alpha": "8"})


def test_no_single_bit_can_change_without_being_noticed(written):
    """Header, names, shapes, metadata and data; unless all that is said is what was written after all."""
    data, expected = written.read_bytes(), content(*files.read_safetensors(written))
    unnoticed = 0
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        written.write_bytes(changed)
        try:
            found = content(*files.read_safetensors(written))
        except files.DamagedFile as error:
            assert str(written) in str(error)
            continue
        unnoticed += 1
        assert found == expected, position
    assert unnoticed <= len(files.HASHES)  # a bit of the name under which the hashes stand


def test_files_without_hashes_are_read_as_before(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors")
    assert files.read_safetensors(tmp_path / "old.safetensors")[0]["a"].tolist() == [1, 1]


def test_an_adapter_that_another_tool_has_rewritten_with_our_metadata_is_read(written):
    """As kohya's resize_lora does. In a cache or a checkpoint the same is damage: a crash can leave nothing but zeros."""
    with safe_open(written, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(written).items()}, written, metadata)
    with pytest.raises(files.DamagedFile):
        files.read_safetensors(written)
    assert not files.read_safetensors(written, from_anywhere=True)[0]["matrix"].any()


def test_a_changed_byte_in_a_cache_has_its_entry_made_again(tmp_path, capsys):
    store = caching.Store(tmp_path)
    for key in "abc":
        store[key] = torch.full((4,), float(ord(key))), torch.ones(2)
        store.flush()
    shard = next(path for path in tmp_path.glob("*.safetensors") if "b.0" in load_file(path))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()  # what is mapped stays as it was
    shard.write_bytes(data)
    opened = caching.Store(tmp_path)
    assert "b" in opened
    opened.drop_damaged(["a", "c"])
    assert "b" in opened and shard.exists()  # what nobody wants is not read
    opened.drop_damaged("abc")
    assert "a" in opened and "b" not in opened and "c" in opened and not shard.exists()
    assert f"{shard} is damaged" in capsys.readouterr().out


def test_a_run_with_a_changed_byte_in_its_cache_is_the_run_it_would_have_been(train, tmp_path):
    """Latents and captions on disk."""
    flags = ["--max_train_steps", 2, "--cache_dir", tmp_path / "cache"]
    first = train(*flags)
    for kind in ("latents", "text"):
        shard = next((tmp_path / "cache").glob(f"{kind}/*/*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 128
        shard.unlink()
        shard.write_bytes(data)
    assert train(*flags).numbers == first.numbers


def test_a_changed_byte_in_an_adapter_is_one_line(train, demo):
    run = train("--max_train_steps", 1, "--lr_warmup_steps", 0)
    for file in ("pytorch_lora_weights.safetensors", f"kohya/{run.dir.name}.safetensors"):
        data = bytearray((run.dir / file).read_bytes())
        data[-50] ^= 16
        (run.dir / file).write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(run.dir / file)) + ": damaged"):
            reading.read_adapter(reading.find_adapter(run.dir / file), {})
