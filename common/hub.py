"""Is it here, and can it be had? One place that answers for hub ids, quickly, before anything waits on a dead network."""

import os

from common.flags import UserError

PROBE_S = 5  # the libraries retry for up to 47 s before they say the same


def require(repo_id, repo_type, flag, filename):
    """Return when `repo_id` is cached or the hub can be reached.

    Args:
        repo_type: "model" or "dataset".
        flag: the flag that named it, for the message.
        filename: a file every such repo has; when it is in the local cache, the network is not asked.
    Raises:
        UserError: naming the repo and the ways to work offline.
    """
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
        raise UserError(f"--{flag} {repo_id}: no such {repo_type} on the hub, or it needs a login (huggingface-cli login)") from None
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        raise UserError(f"--{flag} {repo_id}: the hub cannot be reached ({type(error).__name__}); {offline}") from None
