"""What must hold of the flags before anything heavy is imported or anything is written: ranges, places, packages.

Nothing here imports torch: what cannot work is refused at once.
"""

import contextlib
import importlib.util
import netrc
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import run_folder
from common.cli.command_line import DEMO_ROOT
from common.cli.flag_facts import outside_range
from common.cli.flags import TrainFlags
from common.cli.model_flags import ModelFlags
from common.errors import UserError
from common.system import packages

POLYNOMIAL_END = 1e-7  # the learning rate at which diffusers' polynomial schedule ends


def check(flags: TrainFlags) -> None:
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    check_ranges(flags)

    # What needs another flag beside it.
    if flags.early_stopping_patience and not flags.validation_split:
        raise UserError("--early_stopping_patience needs a held-out loss: add --validation_split 0.05")
    if flags.keep_tokens and not (flags.shuffle_tags or flags.tag_dropout):
        raise UserError(
            f"--keep_tokens {flags.keep_tokens}: keeps tags in place that nothing moves;"
            " add --shuffle_tags or --tag_dropout"
        )

    if flags.lr_scheduler == "polynomial" and flags.learning_rate <= POLYNOMIAL_END:
        raise UserError(
            f"--learning_rate {flags.learning_rate}: polynomial ends at {POLYNOMIAL_END};"
            " give more, or another --lr_scheduler"
        )
    if not all(name.strip() for name in flags.lora_target_modules):
        raise UserError(
            "--lora_target_modules: an empty name would mean every layer; give the ends of layer names, e.g. to_q to_k"
        )

    _check_places(flags)
    _check_packages(flags)
    check_model(flags)


def check_ranges(flags: Any) -> None:
    """Every number is in the range that stands at its flag.

    Raises:
        UserError: naming the flag, the value and what it must be.
    """
    if complaint := outside_range(flags):
        raise UserError(complaint)


def check_model(flags: ModelFlags) -> None:
    """What every script needs: packages, a model that is there if it is meant to be local, and places to write to."""
    if found := packages.lacking():
        raise UserError(packages.refusal(found))
    for name in ("output_dir", "cache_dir"):
        check_writable(name, getattr(flags, name))
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        place = getattr(flags, name)
        looks_local = place and (
            place.startswith(("/", ".", "~")) or place.endswith(".safetensors") or place.count("/") > 1
        )
        if looks_local and "://" not in place and not os.path.exists(place) and not _of_the_demo(place):
            raise UserError(f"--{name} {place}: no such folder or file")


def check_writable(name: str, place: str) -> None:
    """A folder that is there with the right to write in it, or that can be made."""
    path = Path(place).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not nearest.is_dir():
        raise UserError(f"--{name} {place}: {nearest} is a file; name a folder")
    try:  # rights alone do not tell: a disk may be read-only, and /proc takes no folders
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        said = f"no right to write in {nearest} ({error.strerror})"
        raise UserError(f"--{name} {place}: {said}; name another folder") from None


def _of_the_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _check_places(flags):
    output = Path(flags.output_dir)
    resume = flags.resume_from_checkpoint
    for name in flags.train_data_dir:
        if not _of_the_demo(name):
            _check_data_dir(name, output)
    if resume not in (None, "latest") and not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: no such checkpoint folder")
    run_folder.check_free(output)

    # A run that is there is gone on with, or left alone.
    continues = resume == "latest" or (resume and Path(resume).resolve().parent == output.resolve())
    if not continues and any((output / name).exists() for name in ("metrics.jsonl", run_folder.WEIGHTS)):
        raise UserError(
            f"--output_dir {output}: already holds a run; continue it with --resume_from_checkpoint latest,"
            " or name another folder"
        )
    if resume == "latest" and (output / run_folder.WEIGHTS).exists() and not run_folder.find_checkpoints(output):
        raise UserError(
            f"--resume_from_checkpoint latest: {output} holds a finished run, which would be written over,"
            " and no checkpoint to go on from; name another --output_dir"
        )


def _check_data_dir(name, output):
    folder, _ = find_data_dir(name)
    if output.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--output_dir {output}: lies in --train_data_dir {folder}, so the pictures of the run would be trained on;"
            " name a folder outside, and move a run that is there already"
        )


def _check_packages(flags):
    wanted = (  # (whether it is asked for, package, by what)
        (flags.use_8bit_adam, "bitsandbytes", "--use_8bit_adam"),
        (flags.quantize == "nf4", "bitsandbytes", "--quantize nf4"),
        (
            flags.enable_xformers_memory_efficient_attention,
            "xformers",
            "--enable_xformers_memory_efficient_attention",
        ),
        (flags.report_to != "none", flags.report_to, f"--report_to {flags.report_to}"),
    )
    for is_wanted, package, typed in wanted:
        if is_wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{typed} needs a package that is not installed: pip install {package}")
    if flags.report_to == "wandb":
        _check_wandb_login()


def _check_wandb_login():
    """wandb itself would ask for a key, or fail, when everything is loaded; it reads the same three places."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    usual = [os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc")]
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else usual
    for place in filter(os.path.isfile, places):
        with contextlib.suppress(netrc.NetrcParseError, OSError):
            if netrc.netrc(place).authenticators(server):
                return
    raise UserError(
        "--report_to wandb: not logged in; run wandb login, set WANDB_API_KEY,"
        " or WANDB_MODE=offline to keep it on this disk"
    )


def find_data_dir(name: str) -> tuple[Path, int]:
    """(folder, weight) of a value of --train_data_dir: of NAME or /kaggle/input/NAME weight 1, of NAME:2 weight 2.

    A folder whose own name ends in a colon and a number is found first.

    Raises:
        UserError: there is no such folder, or the weight is no whole number from 1.
    """
    before, _, after = name.rpartition(":")
    for place, weight in ((name, "1"), (before, after)):
        for folder in (Path(place), Path("/kaggle/input") / place):
            if place and folder.is_dir():
                if not (weight.isdecimal() and int(weight)):
                    raise UserError(
                        f"--train_data_dir {name}: {weight!r} is no weight; give a whole number from 1, e.g. {folder}:2"
                    )
                return folder, int(weight)
    raise UserError(f"--train_data_dir {name}: no such folder (also looked in /kaggle/input)")
