"""Which files of a hub model are taken, with the hub replaced by a folder of repositories."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from original_layout import original_layout
from safetensors.torch import save_file

from common.cli import hub
from common.errors import UserError
from common.model import loading


@pytest.fixture
def repos(tmp_path, monkeypatch):
    """Folders below it are repositories; `reachable` False is a dead network. What is downloaded lands in cached/."""
    repos, cached, state = tmp_path / "hub", tmp_path / "cached", {"reachable": True}

    def names(repo_id):
        return [str(path.relative_to(repos / repo_id)) for path in (repos / repo_id).rglob("*") if path.is_file()]

    def list_repo_files(_, repo_id, revision=None):
        if not state["reachable"]:
            raise ConnectionError
        return names(repo_id)

    def snapshot_download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only or not state["reachable"]:
            if not (cached / repo_id).exists():
                raise LocalEntryNotFoundError("not cached")
            return str(cached / repo_id)
        for name in names(repo_id):
            if any(fnmatch(name, pattern + "*" if pattern.endswith("/") else pattern) for pattern in allow_patterns):
                (cached / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(repos / repo_id / name, cached / repo_id / name)
        return str(cached / repo_id)

    def hf_hub_download(repo_id, filename, revision=None):
        if not state["reachable"]:
            raise LocalEntryNotFoundError("not cached")
        if filename not in names(repo_id):
            raise EntryNotFoundError("no such file")
        return str(repos / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    repos.mkdir()
    return SimpleNamespace(root=repos, cached=cached, state=state)


def publish(repos, demo, name="a/model", variant=".fp16", **vae):
    """A repository with the demo model, its weights named by `variant`, and what nobody loads beside it."""
    folder = repos.root / name
    shutil.copytree(demo.model, folder)
    for file in list(folder.rglob("*.safetensors")):
        shutil.copy(file, file.with_name(f"{file.stem}.non_ema.safetensors"))
        file.rename(file.with_name(f"{file.stem}{variant}.safetensors"))
    config = folder / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **vae}))
    return name


def taken(repos, name="a/model"):
    return sorted(str(path.relative_to(repos.cached / name)) for path in (repos.cached / name).rglob("*.safetensors"))


@pytest.mark.parametrize("variant", [".fp16", ""])
def test_fp16_files_are_taken_and_plain_ones_with_a_line_where_there_are_none(repos, demo, variant):
    name, said = publish(repos, demo, variant=variant), []
    loading.find_model(name, say=said.append)
    stems = dict(
        unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model", text_encoder_2="model"
    )
    assert taken(repos) == sorted(f"{part}/{stem}{variant}.safetensors" for part, stem in stems.items())
    assert any("has no fp16 files" in line for line in said) == (not variant)
    repos.state["reachable"] = False  # what was downloaded is found without the hub
    loading.find_model(name, str(demo.model))


def test_a_repository_with_one_single_file_is_that_file_and_several_are_named(repos, demo, tmp_path):
    (repos.root / "a/file").mkdir(parents=True)
    save_file(original_layout(demo.model), repos.root / "a/file/model.safetensors")
    said = []
    loading.find_model("a/file", config=str(demo.model), cache_dir=str(tmp_path / "cache"), say=said.append)
    assert any("the single file model.safetensors" in line for line in said)
    (repos.root / "a/file/other.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors, other.safetensors"):
        loading.find_model("a/file")


def test_pickles_and_a_cold_cache_are_one_line(repos, demo):
    name = publish(repos, demo)
    for file in (repos.root / name / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match="no safetensors files of its unet"):
        loading.find_model(name)
    repos.state["reachable"] = False
    with pytest.raises(UserError, match="not in the local cache"):
        loading.find_model("b/model")


def test_the_fp16_vae_replaces_the_original_one_only(repos, demo):
    original = publish(repos, demo, "a/original", **hub.ORIGINAL_VAE)
    statistics = publish(
        repos, demo, "a/statistics", **{**hub.ORIGINAL_VAE, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    )
    scaled = publish(repos, demo, "a/scaled", **{**hub.ORIGINAL_VAE, "scaling_factor": 0.2})
    assert [hub.default_vae(name, None) for name in (original, statistics, scaled)] == [hub.FP16_VAE, None, None]
    repos.state["reachable"] = False
    assert hub.default_vae("a/old", None) == hub.FP16_VAE
