"""What a run writes beside its log: adapter files, checkpoints, validation pictures; elsewhere if the folder fails."""

import contextlib
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from common import errors, run_folder
from common.adapter_files import diffusers_format, dora, kohya, peft_format
from common.data import caching
from common.errors import UserError
from common.model import device, weights
from common.render import validation_images
from common.train import checkpoint, report

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
LICENSE_NOTE = (
    "a derivative of base_model, under its licence (SDXL base 1.0: CreativeML Open RAIL++-M); the images have theirs"
)


def recipe_of(flags, data) -> dict:
    """What config.json and every adapter file say about how they were made."""
    latents = data.examples.latents
    examples = [(sample.key, sample.caption) for sample in latents.samples for _ in range(sample.repeats)]
    return {
        "flags": asdict(flags),
        "base_model": data.model.name,
        "revision": flags.revision,
        "license_note": LICENSE_NOTE,
        "vae": str(data.model.vae),
        "prediction_type": data.model.kind.prediction_type,
        "zero_terminal_snr": data.model.kind.zero_terminal_snr,
        "data": {"images": len(latents), "fingerprint": caching.content_key(examples)},
        "versions": {package: version(package) for package in PACKAGES},
    }


class Results:
    """The files of one run in its output folder, written by the main process.

    Args:
        recipe: see `recipe_of`.
        saved_step: the step whose files are there already: that of the checkpoint that the run goes on from.
    """

    def __init__(self, flags, engine, data, recipe: dict, saved_step: int = 0) -> None:
        self.flags = flags
        self.engine = engine
        self.host = engine.host
        self.data = data
        self.recipe = recipe
        self.output_dir = Path(flags.output_dir)
        self._saved_step = saved_step

    @property
    def name(self) -> str:
        return self.output_dir.resolve().name

    @property
    def has_pictures(self) -> bool:
        """Whether `render` has a prompt to render."""
        return bool(self.flags.validation_prompt)

    # ---------------------------------------------------------------- on the way

    def save_step(self, progress) -> None:
        """Write the adapter file and a checkpoint of a step, unless they are there already.

        Raises:
            UserError: the run has diverged; what is not finite is not saved, so the newest checkpoint is one to go on
                from.
        """
        if what := self.engine.not_finite():
            raise UserError(self._diverged(what, progress.step))
        step = progress.step
        if self.host.is_main and step != self._saved_step:
            # The adapter file first: from the checkpoint on, a killed run would not come back to write it
            self._save_adapter(self.output_dir / f"pytorch_lora_weights_{step:06d}.safetensors")
            limit = self.flags.checkpoints_total_limit
            checkpoint.save_checkpoint(self.output_dir, step, self.engine, asdict(progress), limit)
        self._saved_step = step
        self.host.barrier()

    def _diverged(self, what, step):
        """The weights themselves are at fault, whatever images the last batches held."""
        saved = run_folder.find_checkpoints(self.output_dir)
        cure = "start again"
        if saved:
            cure = f"--resume_from_checkpoint latest goes on from step {run_folder.step_of(saved[-1])}"
        return (
            f"the training has diverged: after step {step} its own numbers ({what}) hold NaN or infinity;"
            f" nothing was saved of them. Lower --learning_rate, or use --mixed_precision no; {cure}"
        )

    def render(self, step: int) -> None:
        """samples/STEP_I.png for every --validation_prompt, with the average if there is one.

        Where memory runs out there are none, which is said.
        """
        if not self.host.is_main:
            return
        self.engine.run_pass.clear()  # its memory is needed for the pictures; the next steps capture it again
        try:
            images = self._pictures()
        except (RuntimeError, errors.OutOfMemory) as error:
            if not errors.ran_out(error):
                raise
            self.host.say(f"no validation images of step {step}: out of GPU memory; everything trained so far is saved")
            images = []

        # Outside of the block above what did not fit is free
        device.free_memory(self.host.device)
        folder = self.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            image.save(folder / f"{step:06d}_{i}.png")

    def _pictures(self):
        average = self.engine.ema
        with average.applied() if average else contextlib.nullcontext():
            return validation_images.render_while_training(
                unet=self.engine.unet,
                text=self.data.text,
                model=self.data.model,
                host=self.host,
                prompts=self.flags.validation_prompt,
                resolution=self.flags.resolution,
                seed=self.flags.seed,
            )

    # ---------------------------------------------------------------- at the end

    def write(self) -> None:
        """The adapter in every format asked for, and its average."""
        if self.host.is_main:
            self._write_adapter(self.output_dir)
            if self.engine.ema is not None:
                with self.engine.ema.applied():
                    self._write_adapter(self.output_dir / "ema_unet", ending="_ema")
            if self.flags.save_peft:
                peft_format.save_peft(self.output_dir / "peft", **self._adapters())
        self.host.barrier()

    def _write_adapter(self, folder, ending=""):
        self._save_adapter(folder / diffusers_format.WEIGHTS)
        self.save_kohya(ending)

    def _save_adapter(self, path):
        diffusers_format.save_adapter(path, **self._adapters())

    def save_kohya(self, ending: str = "", **options) -> float:
        """Write kohya/NAME`ending`.safetensors, with the options and the result of kohya.save_kohya."""
        unet_files = weights.weight_files(self.data.model.folder / "unet", self.data.model.variant)
        weight_of = dora.frozen_weights(self.engine.unet, unet_files)
        path = self.output_dir / "kohya" / f"{self.name}{ending}.safetensors"
        return kohya.save_kohya(path, **self._adapters(), weight_of=weight_of, **options)

    def _adapters(self):
        return dict(unet=self.engine.unet, recipe=self.recipe, text_encoders=self.data.trained_encoders)

    def summary(self, progress, ended: str, total_steps: int) -> dict:
        """Say how the run went and what reads its files -> what a trainer's main returns."""
        on_device = f"{self.host.peak_gib():.2f} GiB on the {self.host.device.type}"
        peaks = f"peak {on_device}, {device.peak_ram_gib():.2f} GiB of RAM"
        where = f"everything is in {self.output_dir}"
        self.host.say(f"{ended} after step {progress.step} of {total_steps}; {peaks}; {where}")
        for_others = f"kohya/{self.name}.safetensors: for {_readers(self.engine.unet)}"
        self.host.say(f"{diffusers_format.WEIGHTS}: for diffusers and infer.py; {for_others}")

        # The last line of metrics.jsonl speaks for the run
        rows = report.read_metrics(self.output_dir / "metrics.jsonl")
        return {
            "output_dir": str(self.output_dir),
            "step": progress.step,
            "ended": ended,
            "weights": str(self.output_dir / diffusers_format.WEIGHTS),
            "metrics": rows[-1] if rows else None,
        }

    # ---------------------------------------------------------------- when the folder fails

    def rescue(self, progress, error: OSError) -> UserError:
        """Save to the local disk, as a file cannot be read or written (a Drive that was unmounted, say).

        Returns:
            the error that says where.
        """
        place = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._save_adapter(place / diffusers_format.WEIGHTS)
        checkpoint.save_checkpoint(place, progress.step, self.engine, asdict(progress), None)
        what = " ".join(str(error).split())  # diffusers' errors have several lines
        return UserError(
            f"the run ended on a file error ({what}): perhaps --output_dir {self.output_dir} is full or gone, or a file"
            f" of the model is; adapter and checkpoint of step {progress.step} are in {place}: go on with --output_dir"
            f" elsewhere --resume_from_checkpoint {run_folder.find_checkpoints(place)[-1]}"
        )


def _readers(unet):
    """The tools that read a kohya file of this adapter."""
    if not unet.peft_config["default"].use_dora:
        return "ComfyUI, Forge, A1111 and kohya's scripts"
    return (
        "ComfyUI and Forge only (A1111 and kohya's scripts draw a DoRA wrong and do not say so:"
        " --export_dora_as_lora RANK)"
    )
