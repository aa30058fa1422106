"""Where a run starts: at the beginning, or exactly where a checkpoint was made."""

from pathlib import Path

from common import files, run_folder
from common.cli.flag_facts import names_where
from common.errors import UserError
from common.train import checkpoint, loops


def resume(flags, engine, recipe, length):
    """The Progress to start from; what differs from the run's beginning is said.

    Raises:
        UserError: a damaged or foreign checkpoint, another effective batch, newer checkpoints beside it.
    """
    host = engine.host
    found = run_folder.find_resume(flags.resume_from_checkpoint, flags.output_dir)
    if not found:
        if flags.resume_from_checkpoint:
            host.say(f"no checkpoint in {flags.output_dir} yet: starting at the beginning")
        return loops.Progress(effective_batch=length.effective_batch)

    # Later checkpoints of the same folder would be taken for its continuation.
    newest = max([*run_folder.find_checkpoints(flags.output_dir), found[0]], key=run_folder.step_of)
    if run_folder.step_of(newest) > run_folder.step_of(found[0]):
        raise UserError(
            f"--resume_from_checkpoint {found[0]}: {newest} is newer and would be mixed up with what follows;"
            " resume with 'latest', move the newer ones away, or name another --output_dir"
        )

    # The state of the run, and the images of a step, on which it depends.
    folder, progress = _load_newest(found, engine)
    if progress.effective_batch != length.effective_batch:
        raise UserError(
            f"--resume_from_checkpoint: the run has {progress.effective_batch} images a step,"
            f" now there are {length.effective_batch} (--train_batch_size x --gradient_accumulation_steps);"
            " resume with the same product"
        )
    _set_aside(found[: found.index(folder)], Path(flags.output_dir), host)

    # What differs is said, but for flags that change nothing of what is computed.
    before = checkpoint.read_config(folder.parent)
    free = names_where(flags, resume="free")
    for name, value in recipe["flags"].items():
        if before["flags"].get(name, value) != value and name not in free:
            host.say(f"resuming with --{name} {value}, which was {before['flags'][name]}")
    if before["data"] not in ({}, recipe["data"]):
        was = before["data"]["images"]
        now = recipe["data"]["images"]
        host.say(
            f"resuming with other data: {now} images now, {was} before, or edited ones;"
            " the run is no longer that of its first data"
        )
    host.say(f"resumed from {folder}")
    return progress


def _load_newest(found, engine):
    """(folder, Progress) of the first checkpoint of `found` that is as it was written; the others are named.

    Raises:
        UserError: none is.
    """
    for folder in found:
        try:
            return folder, loops.Progress(**checkpoint.load_checkpoint(folder, engine))
        except files.DamagedFile as error:
            if folder == found[-1]:
                raise
            engine.host.say(f"passed over: {error}")


def _set_aside(damaged, output_dir, host):
    """Rename damaged checkpoints of this run: as its newest they would be kept, and sound ones rotated away."""
    host.barrier()
    for folder in damaged if host.is_main else ():
        if folder.parent == output_dir:
            folder.rename(files.partial_name(folder).with_suffix(".damaged"))
