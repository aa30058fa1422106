"""Is it here, and can it be had? One place that answers for hub ids, quickly, before anything waits on a dead network."""

import os
from pathlib import Path

from common import launch
from common.attached import find_attached
from common.command_line import DEMO_ROOT, UserError

PROBE_S = 5  # the libraries retry for up to 47 s before they say the same


FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # the original SDXL VAE overflows in fp16


def check(flags):
    """Every repo that the flags name and that is not a local path is cached or within reach.

    A default that is not gives way, in `flags`, to what is attached to a Kaggle notebook.

    Raises:
        UserError: naming the flag, the repo and the ways to work offline.
    """
    if "dataset_name" in vars(flags) and not flags.train_data_dir:
        _require_or_take(flags, "dataset_name", "dataset", "README.md", kind="data", into="train_data_dir")
    if not os.path.exists(flags.pretrained_model_name_or_path) and not _in_demo(flags.pretrained_model_name_or_path):
        _require_or_take(flags, "pretrained_model_name_or_path", "model", "model_index.json", kind="models")
    model, vae = Path(flags.pretrained_model_name_or_path), flags.pretrained_vae_model_name_or_path
    if model.is_file() and not os.path.isdir(flags.config_name_or_path):
        _require_or_take(flags, "config_name_or_path", "model", "model_index.json", kind="models")
    if not model.exists() and not _in_demo(model):
        vae = vae or FP16_VAE
    if vae and not Path(vae).is_dir():
        _require(vae, "model", "pretrained_vae_model_name_or_path", "config.json")


def _in_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _require_or_take(flags, name, repo_type, filename, *, kind, into=None):
    """`_require` of what the flag `name` says; where a default cannot be had, the flag `into` gets the one attached folder of its kind."""
    repo_id, into = getattr(flags, name), into or name
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
