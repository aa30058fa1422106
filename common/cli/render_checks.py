"""What infer.py refuses before anything heavy is imported: values out of range, contradictions, taken places."""

import os
from pathlib import Path

from common import run_folder
from common.cli.flag_checks import check_model, check_ranges
from common.errors import UserError


def check(flags) -> None:
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    # Ranges, and the image to start from
    check_ranges(flags)
    if flags.image and int(flags.steps * flags.strength) < 1:
        raise UserError(f"--strength {flags.strength}: of {flags.steps} steps it leaves none; raise one of the two")
    if flags.image and not os.path.isfile(flags.image):
        raise UserError(f"--image {flags.image}: no such file")

    # Adapters, places and the model
    if not flags.lora and not flags.compare and (flags.ema or flags.lora_scale != 1):
        name = "--ema" if flags.ema else "--lora_scale"
        raise UserError(f"{name}: there is no adapter it could apply to; add --lora PATH")
    if flags.merge is not None:
        check_merge(flags)
    run_folder.check_free(Path(flags.output_dir))
    check_model(flags)


def check_merge(flags) -> None:
    """The part of `check` for --merge: there is something to merge, and a new place for it outside of the model.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    place = Path(flags.merge)
    model = Path(flags.pretrained_model_name_or_path)
    if not flags.lora:
        raise UserError(f"--merge {place}: no adapter to merge; add --lora PATH[:SCALE]")
    for name in ("compare", "prompt", "image"):
        if getattr(flags, name):
            raise UserError(f"--merge {place}: draws nothing, so --{name} has no meaning; leave it out")
    if place.resolve().is_relative_to(model.resolve()):
        raise UserError(f"--merge {place}: is in the model's own folder, which stays as it is; name a folder elsewhere")
    if os.path.lexists(place):
        raise UserError(f"--merge {place}: exists already, and nothing is written over; name a new folder")
