"""Is it here, and can it be had? One place that answers for hub ids, quickly, before anything waits on a dead network."""

import os
from pathlib import Path

from common.command_line import DEMO_ROOT, UserError
from common.hub_ids import check_id

PROBE_S = 5  # the libraries retry for up to 47 s before they say the same


FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # the original SDXL VAE overflows in fp16


def check(flags):
    """Every repo that the flags name and that is not a local path is cached or within reach.

    Raises:
        UserError: naming the flag, the repo and the ways to work offline.
    """
    if "dataset_name" in vars(flags) and flags.train_data_dir is None:
        _require(flags.dataset_name, "dataset", "dataset_name", "README.md")
    model, vae = Path(flags.pretrained_model_name_or_path), flags.pretrained_vae_model_name_or_path
    is_local, in_demo = model.exists(), model.is_relative_to(DEMO_ROOT)
    if model.is_file() and not os.path.isdir(flags.config_name_or_path):
        _require(flags.config_name_or_path, "model", "config_name_or_path", "model_index.json")
    if not is_local and not in_demo:
        _require(flags.pretrained_model_name_or_path, "model", "pretrained_model_name_or_path", "model_index.json")
        vae = vae or FP16_VAE
    if vae and not Path(vae).is_dir():
        _require(vae, "model", "pretrained_vae_model_name_or_path", "config.json")


def _require(repo_id, repo_type, flag, filename):
    """Return when `repo_id` is cached (it then holds `filename`, which every such repo has) or the hub knows it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    check_id(repo_id, flag)
    if isinstance(try_to_load_from_cache(repo_id, filename, repo_type=repo_type), str):
        return
    offline = "offline, give a local path instead, or try --demo"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise UserError(f"--{flag} {repo_id}: not in the local cache, and HF_HUB_OFFLINE is set; {offline}")
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=PROBE_S)
    except RepositoryNotFoundError:
        raise UserError(f"--{flag} {repo_id}: no such {repo_type} on the hub, or it needs a login (huggingface-cli login)") from None
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        raise UserError(f"--{flag} {repo_id}: the hub cannot be reached ({type(error).__name__}); {offline}") from None
