"""Is it here, and can it be had? Hub ids are answered for quickly, before anything waits on a dead network."""

import json
import os
from pathlib import Path

from common.cli.command_line import DEMO_ROOT
from common.cli.hub_ids import check_id
from common.errors import UserError
from common.system import launch
from common.system.attached import find_attached

PROBE_S = 5  # the libraries retry for up to 47 s before they say the same

FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # the original SDXL VAE overflows in fp16
# What makes a VAE the original one, of which FP16_VAE is a drop-in replacement.
ORIGINAL_VAE = dict(
    scaling_factor=0.13025,
    latent_channels=4,
    block_out_channels=[128, 256, 512, 512],
    latents_mean=None,
    latents_std=None,
)
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
CONFIGS = ("model_index.json", "scheduler/", "tokenizer/", "tokenizer_2/")


def check(flags):
    """Every repo that the flags name and that is not a local path is cached or within reach.

    A default that is not gives way, in `flags`, to what is attached to a Kaggle notebook.

    Raises:
        UserError: naming the flag, the repo and the ways to work offline.
    """
    for name in _flags_of_ids(flags):  # all of them first: an id that is none needs no network to be refused
        check_id(getattr(flags, name), name)
    if "dataset_name" in vars(flags) and not flags.train_data_dir:
        _require_or_take(flags, "dataset_name", "dataset", "README.md", kind="data", into="train_data_dir")
    if not os.path.exists(flags.pretrained_model_name_or_path) and not _in_demo(flags.pretrained_model_name_or_path):
        _require_or_take(flags, "pretrained_model_name_or_path", "model", "model_index.json", kind="models")
    model = Path(flags.pretrained_model_name_or_path)
    vae = flags.pretrained_vae_model_name_or_path
    if model.is_file() and not os.path.isdir(flags.config_name_or_path):
        _require_or_take(flags, "config_name_or_path", "model", "model_index.json", kind="models")
    if not model.exists() and not _in_demo(model):
        vae = vae or default_vae(flags.pretrained_model_name_or_path, flags.revision)
    if vae and not Path(vae).is_dir():
        _require(vae, "model", "pretrained_vae_model_name_or_path", "config.json")


def _flags_of_ids(flags):
    """The names of the flags whose values are no local paths, and so hub ids."""
    if "dataset_name" in vars(flags) and not flags.train_data_dir:
        yield "dataset_name"
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        place = getattr(flags, name)
        if place is not None and not os.path.exists(place) and not _in_demo(place):
            yield name
    if os.path.isfile(flags.pretrained_model_name_or_path) and not os.path.isdir(flags.config_name_or_path):
        yield "config_name_or_path"


def _in_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _require_or_take(flags, name, repo_type, filename, *, kind, into=None):
    """`_require` of what the flag `name` says.

    Where a default cannot be had, the flag `into` gets the one attached folder of its kind.
    """
    repo_id = getattr(flags, name)
    into = into or name
    try:
        _require(repo_id, repo_type, name, filename)
    except UserError as error:
        is_default = repo_id == type(flags).__dataclass_fields__[name].default
        folders = getattr(find_attached(), kind) if is_default else []
        if not folders:
            raise
        if len(folders) > 1:
            raise UserError(f"{error}; attached are {', '.join(folders)}: name one with --{into}") from None
        setattr(flags, into, folders if isinstance(getattr(flags, into), list) else folders[0])
        if launch.rank() == 0:
            print(f"--{name} {repo_id} cannot be had: taking {folders[0]}, which is attached to this notebook")


def _require(repo_id, repo_type, flag, filename):
    """Return when `repo_id` is cached (it then holds `filename`, which every such repo has) or the hub knows it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(repo_id, filename, repo_type=repo_type), str):
        return
    offline = "offline, give a local path instead, or try --demo"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise UserError(f"--{flag} {repo_id}: not in the local cache, and HF_HUB_OFFLINE is set; {offline}")
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=PROBE_S)
    except RepositoryNotFoundError:
        raise UserError(
            f"--{flag} {repo_id}: no such {repo_type} on the hub, or it needs a login (huggingface-cli login)"
        ) from None
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        raise UserError(f"--{flag} {repo_id}: the hub cannot be reached ({type(error).__name__}); {offline}") from None


# ---------------------------------------------------------------- downloading


def default_vae(repo_id, revision):
    """FP16_VAE where the model's own VAE is SDXL's original one.

    None where it is another: the model's UNet knows only that.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        config = json.loads(
            Path(hf_hub_download(repo_id, "vae/config.json", revision=revision)).read_text(encoding="utf-8")
        )
    except LocalEntryNotFoundError:
        return FP16_VAE  # a cached model whose VAE was never needed
    except EntryNotFoundError:
        return None  # a repo that holds a single file
    return FP16_VAE if all(config.get(name) == value for name, value in ORIGINAL_VAE.items()) else None


def download_model(repo_id, variant, revision, *, with_vae, say):
    """Only the model's files that are used (fp16: about 7 GB, not 14) -> its local folder, or its single file.

    Args:
        variant: weight files to prefer; parts without it come as plain ones, with a line.
    Raises:
        UserError: no such revision, no access, or no safetensors files of a model.
    """
    files = _files_of(repo_id, revision)
    if files is None:
        return _model_in(download_files(repo_id, None, revision), repo_id)
    if "model_index.json" not in files:
        file = _single_file(files, repo_id)
        say(f"model: {repo_id} holds the single file {file}, and no diffusers folder: taking that")
        return download_files(repo_id, [file], revision) / file
    parts = {part: _weights_of(part, files, variant, repo_id) for part in PARTS if part != "vae" or with_vae}
    plain = [part for part, chosen in parts.items() if variant and not any(f".{variant}" in file for file in chosen)]
    if plain:
        say(f"model: {repo_id} has no {variant} files of {', '.join(plain)}: taking the plain ones")
    configs = [file for file in files if file.startswith(CONFIGS) or file.partition("/")[2] == "config.json"]
    return download_files(repo_id, configs + sum(parts.values(), []), revision)


def download_files(repo_id, patterns, revision=None):
    """The local folder with the files of `repo_id` that match; with None, what an earlier download has left there.

    Raises:
        UserError: no access, or nothing there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=patterns is None)
        )
    except GatedRepoError:
        raise UserError(f"{repo_id}: accept its terms on the hub, then log in (hf auth login)") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repo_id}: not in the local cache, and the hub cannot be reached; give a local path instead"
        ) from None


def _files_of(repo_id, revision):
    """Names of all files of a repo, None where the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        raise UserError(f"--revision {revision}: {repo_id} has no such branch, tag or commit") from None
    except Exception:  # whatever the HTTP stack of the day raises for a dead network
        return None


def _model_in(folder, repo_id):
    if (folder / "model_index.json").exists():
        return folder
    return folder / _single_file([path.name for path in folder.iterdir()], repo_id)


def _single_file(files, repo_id):
    """The one model file among `files`.

    Raises:
        UserError: there is none, or more than one.
    """
    found = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if len(found) == 1:
        return found[0]
    what = f"several single files ({', '.join(found[:3])})" if found else "no safetensors file"
    raise UserError(
        f"--pretrained_model_name_or_path {repo_id}: it has no model_index.json and {what};"
        " download one file and give its path"
    )


def _weights_of(part, files, variant, repo_id):
    """The weight files of a part: those of the variant when there are any, else the plain ones."""
    names = [
        file for file in files if file.startswith(f"{part}/") and file.endswith(".safetensors") and file.count("/") == 1
    ]
    chosen = [file for file in names if variant and f".{variant}" in file] or [
        file for file in names if file.count(".") == 1
    ]
    if not chosen:
        raise UserError(
            f"--pretrained_model_name_or_path {repo_id}: no safetensors files of its {part}"
            " (only those are read; pickles can run code)"
        )
    return chosen
