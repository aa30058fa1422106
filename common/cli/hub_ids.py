"""What a hub id looks like, and what else people give where one is wanted: answered before anything is asked."""

import os
import re
from pathlib import PureWindowsPath
from urllib.parse import urlsplit

from common.errors import UserError

NAME = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"(?:{NAME}/)?{NAME}", re.ASCII)
LONGEST = 96
HUBS = ("huggingface.co", "hf.co", "www.huggingface.co")
INSTEAD = {  # what to do where the value is no hub id
    "dataset_name": "for a folder of images use --train_data_dir FOLDER",
    "pretrained_model_name_or_path": "name a folder or .safetensors file that exists, or a hub id OWNER/NAME",
    "pretrained_vae_model_name_or_path": "name a folder that exists, or a hub id OWNER/NAME",
    "config_name_or_path": "name a folder that exists, or a hub id OWNER/NAME",
}


def check_id(repo_id: str, flag: str) -> None:
    """Refuse what cannot be a hub id.

    Raises:
        UserError: naming the flag, what the value is instead, and the cure.
    """
    instead = INSTEAD[flag]
    if not repo_id.strip():
        raise UserError(f"--{flag}: is empty; {instead}")
    if "://" in repo_id or repo_id.partition("/")[0] in HUBS:
        raise UserError(
            f"--{flag} {repo_id}: is a web address; {_id_in(repo_id) or f'download what is there, and {instead}'}"
        )

    # A place on this machine, or nothing that the hub has.
    if "\\" in repo_id or PureWindowsPath(repo_id).drive:
        raise UserError(f"--{flag} {repo_id}: is a Windows path, and nothing is there; {instead}")
    if os.path.isdir(repo_id):
        raise UserError(f"--{flag} {repo_id}: is a folder here, not a hub id; {instead}")
    if not HUB_ID.fullmatch(repo_id) or len(repo_id) > LONGEST or ".." in repo_id or "--" in repo_id:
        raise UserError(
            f"--{flag} {repo_id}: is no hub id (OWNER/NAME of letters, digits, - _ .), and no such place is here;"
            f" {instead}"
        )


def _id_in(address: str) -> str | None:
    """The cure for the address of a page on the hub: the id in it."""
    parts = urlsplit(address if "://" in address else f"https://{address}")
    names = [name for name in parts.path.split("/") if name and name != "datasets"]
    return f"write its id, {'/'.join(names[:2])}" if parts.hostname in HUBS and len(names) > 1 else None
