"""A model's configuration files and the flags -> Kind: is it SDXL, what does its UNet predict, on which noise schedule.

The flags speak where the files are silent.

v-prediction: arXiv 2202.00512. Zero-terminal SNR (the last timestep is pure noise): arXiv 2305.08891.
"""

import inspect
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError

PARTS = dict(unet="UNet2DConditionModel", text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection")
SCHEDULER = "scheduler/scheduler_config.json"
READ = ["model_index.json", SCHEDULER, *(f"tokenizer{part}/tokenizer_config.json" for part in ("", "_2"))]
EPSILON = "epsilon"
V_PREDICTION = "v_prediction"
# The samplers whose configuration describes DDPM's noise schedule. EDM and flow matching have another one.
DDPM_FAMILY = (
    "DDPM DDIM DDPMParallel DDIMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete"
    " KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep"
    " UniPCMultistep SASolver LCM TCD"
).split()
_SPELLINGS = {
    "v": V_PREDICTION,
    "v_prediction": V_PREDICTION,
    "v-prediction": V_PREDICTION,
    "epsilon": EPSILON,
    "eps": EPSILON,
}


class Mark(NamedTuple):
    """What one place in a model's files says about it."""

    value: object
    where: str


class Kind(NamedTuple):
    """What the noise schedule and the UNet's target are. `said_by`: the flag, or the place in the model's files."""

    prediction_type: str  # EPSILON or V_PREDICTION
    zero_terminal_snr: bool
    said_by: str

    def __str__(self):
        snr = ", zero-terminal SNR" if self.zero_terminal_snr else ""
        return f"predicts {self.prediction_type}{snr} (by {self.said_by})"


# ---------------------------------------------------------------- is it SDXL


def read_object(folder: Path, file: str, named: str) -> dict:
    """The JSON object in folder/file.

    Args:
        named: the flag and its value, for the message.
    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{named}: no readable {file} in it; SDXL has one") from None


def check_folder(folder: Path, named: str) -> None:
    """Refuse what is not SDXL, by its configuration files: Stable Diffusion 1.5 would be loaded far before it fails.

    Raises:
        UserError: naming the flag, the part and what is not supported about it.
    """
    if not (folder / "model_index.json").exists():
        raise UserError(f"{named}: no model_index.json in it, so it is not a diffusers model folder")
    for file in READ:
        read_object(folder, file, named)
    configs = {part: read_object(folder, f"{part}/config.json", named) for part in PARTS}
    for part, wanted in PARTS.items():
        found = configs[part].get("_class_name") or (configs[part].get("architectures") or ["nothing known"])[0]
        if found != wanted:
            raise UserError(f"{named}: its {part} is {found}, SDXL's is {wanted}")
    _check_unet(configs["unet"], configs["text_encoder"], configs["text_encoder_2"], named=named)
    check_scheduler(read_object(folder, SCHEDULER, named), named)


def _check_unet(unet, text_encoder, text_encoder_2, *, named):
    """Refuse a UNet whose inputs are not SDXL's, or which does not fit the text encoders: by their configurations."""
    for name in ("in_channels", "out_channels"):
        if unet.get(name, 4) != 4:
            hint = " (an inpainting or editing model)" if name == "in_channels" else ""
            raise UserError(f"{named}: its unet has {unet[name]} {name}{hint}; only SDXL models with 4 are supported")
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(f"{named}: its unet takes no picture sizes (addition_embed_type), so it is not SDXL's")
    if unet.get("time_cond_proj_dim") is not None:
        guidance = "the guidance as an input (time_cond_proj_dim, as LCM has)"
        raise UserError(f"{named}: its unet takes {guidance}, which is not supported")

    # What the text encoders give is what it takes: per token, and pooled beside six numbers of sizes.
    try:
        tokens = text_encoder["hidden_size"] + text_encoder_2["hidden_size"]
        pooled = 6 * unet["addition_time_embed_dim"] + text_encoder_2["projection_dim"]
    except (KeyError, TypeError):
        lacking = "the configuration of its unet or of a text encoder lacks widths that SDXL has"
        raise UserError(f"{named}: {lacking}") from None
    for name, width in (("cross_attention_dim", tokens), ("projection_class_embeddings_input_dim", pooled)):
        if (found := unet.get(name)) != width:
            raise UserError(
                f"{named}: its unet has the {name} {found}, its text encoders give {width}; they do not fit"
            )


def check_scheduler(config: dict, named: str) -> None:
    """Refuse a noise schedule or a target that training does not know.

    Raises:
        UserError: naming the flag and what the configuration says.
    """
    name = str(config.get("_class_name"))
    is_ddpm = name.removesuffix("Scheduler") in DDPM_FAMILY
    if not is_ddpm or config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        other = "another noise schedule than SDXL's (EDM or flow matching?)"
        raise UserError(f"{named}: its scheduler, {name}, has {other}: not supported")
    if (found := config.get("prediction_type", EPSILON)) not in (EPSILON, V_PREDICTION):
        raise UserError(f"{named}: prediction type {found!r} is not supported, only {EPSILON} and {V_PREDICTION}")

    # a schedule in numbers
    try:
        finite = bool(alphas_cumprod(config).isfinite().all())
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        finite = False
    if not finite:
        raise UserError(f"{named}: its {SCHEDULER} describes no noise schedule that can be computed")


def alphas_cumprod(config: dict) -> torch.Tensor:
    """The noise schedule of a scheduler configuration: [T], in fp32 on the CPU."""
    from diffusers import DDPMScheduler

    # from_config would import every scheduler there is, for seconds, to warn about settings of another one.
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{name: config[name] for name in known if name in config}).alphas_cumprod.float()


# ---------------------------------------------------------------- what it predicts


def marks_in_file(file: Path, named: str) -> dict[str, list[Mark]]:
    """{"prediction_type": [Mark], "zero_terminal_snr": [Mark]}: what a single file says of itself.

    Raises:
        UserError: a damaged file, a prediction type that is not supported.
    """
    try:
        with safe_open(file, "pt") as tensors:
            keys = set(tensors.keys())
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{named}: damaged, or no safetensors file ({error}); download or copy it again") from None

    # NoobAI's keys
    prediction = [Mark(V_PREDICTION, "its key v_pred")] if "v_pred" in keys else []
    zero_snr = [Mark(True, "its key ztsnr")] if "ztsnr" in keys else []

    # modelspec's metadata
    if (spec := metadata.get("modelspec.prediction_type")) is not None:
        if spec.lower() not in _SPELLINGS:
            raise UserError(f"{named}: modelspec.prediction_type {spec!r} is not supported, only {EPSILON} and v")
        prediction.append(Mark(_SPELLINGS[spec.lower()], "its modelspec.prediction_type"))

    # kohya's metadata
    if metadata.get("ss_v_parameterization") in ("True", "False"):
        value = V_PREDICTION if metadata["ss_v_parameterization"] == "True" else EPSILON
        prediction.append(Mark(value, "its ss_v_parameterization"))
    if metadata.get("ss_zero_terminal_snr") == "True":
        zero_snr.append(Mark(True, "its ss_zero_terminal_snr"))
    return {"prediction_type": prediction, "zero_terminal_snr": zero_snr}


def marks_in_scheduler(config: dict) -> dict[str, list[Mark]]:
    """The same of a scheduler configuration.

    Only what differs from the default counts: converters leave the default where nothing was said.
    """
    where = "its scheduler configuration"
    return {
        "prediction_type": [Mark(V_PREDICTION, where)] if config.get("prediction_type") == V_PREDICTION else [],
        "zero_terminal_snr": [Mark(True, where)] if config.get("rescale_betas_zero_snr") else [],
    }


def decide(
    named: str,
    marks: dict[str, list[Mark]],
    *,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> Kind:
    """What the files say, or the flags where they are given -> Kind.

    Args:
        marks: [Mark] for each of the two settings.
        prediction_type, zero_terminal_snr: the flags, None where they were not given.
    Raises:
        UserError: the files contradict each other, or the flag contradicts them.
    """
    prediction = _agreed(named, "prediction_type", marks["prediction_type"], asked=prediction_type, default=EPSILON)
    zero_snr = _agreed(named, "zero_terminal_snr", marks["zero_terminal_snr"], asked=zero_terminal_snr, default=False)
    said_by = [prediction.where, *([zero_snr.where] if zero_snr.value and zero_snr.where != prediction.where else [])]
    return Kind(prediction.value, zero_snr.value, " and ".join(said_by))


def _agreed(named, setting, marks, *, asked, default):
    """The Mark that counts. Trainers write the default where nobody said anything, so a flag may contradict that."""
    told = [mark for mark in marks if mark.value != default]
    if asked is not None:
        if told and all(mark.value != asked for mark in marks):
            contradicted = f"{told[0].where}, by which {named} has {told[0].value}"
            raise UserError(f"--{setting} {asked}: contradicts {contradicted}; leave the flag out")
        return Mark(asked, f"--{setting}")
    if told and len(told) < len(marks):
        other = next(mark for mark in marks if mark.value == default)
        said = f"{told[0].where} says {told[0].value}, {other.where} says {other.value}"
        raise UserError(f"{named}: {said}; decide with --{setting}")
    return next(iter(marks), Mark(default, "its scheduler configuration"))


def scheduler_of(config: dict, kind: Kind) -> dict:
    """A scheduler configuration that says what `kind` says.

    Zero-terminal SNR starts at the last timestep: "trailing" spacing (arXiv 2305.08891, sec. 3.3).
    """
    config = {**config, "prediction_type": kind.prediction_type}
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**config, **zero_snr} if kind.zero_terminal_snr else config
