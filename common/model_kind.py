"""What a model is, by its own files: SDXL or not, what its UNet predicts, on which noise schedule. The flags speak where the files are silent.

v-prediction: arXiv 2202.00512. Zero-terminal SNR (the last timestep is pure noise): arXiv 2305.08891.
"""

import inspect
import json
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from common.command_line import UserError

PARTS = dict(unet="UNet2DConditionModel", text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection")
SCHEDULER = "scheduler/scheduler_config.json"
READ = ["model_index.json", SCHEDULER, *(f"tokenizer{part}/tokenizer_config.json" for part in ("", "_2"))]
EPSILON, V_PREDICTION = "epsilon", "v_prediction"
# The samplers whose configuration describes DDPM's noise schedule. EDM and flow matching have another one.
DDPM_FAMILY = (
    "DDPM DDIM DDPMParallel DDIMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete"
    " KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver LCM TCD"
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


def read_object(folder, file, named):
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


def check_folder(folder, named):
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
    for name in ("in_channels", "out_channels"):
        if unet.get(name, 4) != 4:
            hint = " (an inpainting or editing model)" if name == "in_channels" else ""
            raise UserError(f"{named}: its unet has {unet[name]} {name}{hint}; only SDXL models with 4 are supported")
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(f"{named}: its unet takes no picture sizes (addition_embed_type), so it is not SDXL's")
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{named}: its unet takes the guidance as an input (time_cond_proj_dim, as LCM has), which is not supported"
        )
    try:
        widths = {
            "cross_attention_dim": text_encoder["hidden_size"] + text_encoder_2["hidden_size"],
            "projection_class_embeddings_input_dim": 6 * unet["addition_time_embed_dim"]
            + text_encoder_2["projection_dim"],
        }
    except (KeyError, TypeError):
        raise UserError(
            f"{named}: the configuration of its unet or of a text encoder lacks widths that SDXL has"
        ) from None
    for name, width in widths.items():
        if unet.get(name) != width:
            raise UserError(
                f"{named}: its unet has the {name} {unet.get(name)}, its text encoders give {width}; they do not fit"
            )


def check_scheduler(config, named):
    """Refuse a noise schedule or a target that training does not know.

    Raises:
        UserError: naming the flag and what the configuration says.
    """
    name = str(config.get("_class_name"))
    if (
        name.removesuffix("Scheduler") not in DDPM_FAMILY
        or config.get("use_flow_sigmas")
        or config.get("timestep_type") == "continuous"
    ):
        raise UserError(
            f"{named}: its scheduler, {name}, has another noise schedule than SDXL's (EDM or flow matching?): not supported"
        )
    if (found := config.get("prediction_type", EPSILON)) not in (EPSILON, V_PREDICTION):
        raise UserError(f"{named}: prediction type {found!r} is not supported, only {EPSILON} and {V_PREDICTION}")
    try:
        finite = bool(alphas_cumprod(config).isfinite().all())
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        finite = False
    if not finite:
        raise UserError(f"{named}: its {SCHEDULER} describes no noise schedule that can be computed")


def alphas_cumprod(config):
    """The noise schedule of a scheduler configuration: [T], in fp32 on the CPU."""
    from diffusers import DDPMScheduler

    # not from_config: it imports every scheduler there is, for seconds, to warn about settings that belong to another one
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{name: config[name] for name in known if name in config}).alphas_cumprod.float()


# ---------------------------------------------------------------- what it predicts


def marks_in_file(file, named):
    """{"prediction_type": [Mark], "zero_terminal_snr": [Mark]}: what a single file says, by NoobAI's keys, modelspec's and kohya's.

    Raises:
        UserError: a damaged file, a prediction type that is not supported.
    """
    try:
        with safe_open(file, "pt") as tensors:
            keys, metadata = set(tensors.keys()), tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{named}: damaged, or no safetensors file ({error}); download or copy it again") from None
    prediction = [Mark(V_PREDICTION, "its key v_pred")] if "v_pred" in keys else []
    zero_snr = [Mark(True, "its key ztsnr")] if "ztsnr" in keys else []
    if (spec := metadata.get("modelspec.prediction_type")) is not None:
        if spec.lower() not in _SPELLINGS:
            raise UserError(f"{named}: modelspec.prediction_type {spec!r} is not supported, only {EPSILON} and v")
        prediction.append(Mark(_SPELLINGS[spec.lower()], "its modelspec.prediction_type"))
    if metadata.get("ss_v_parameterization") in ("True", "False"):
        value = V_PREDICTION if metadata["ss_v_parameterization"] == "True" else EPSILON
        prediction.append(Mark(value, "its ss_v_parameterization"))
    if metadata.get("ss_zero_terminal_snr") == "True":
        zero_snr.append(Mark(True, "its ss_zero_terminal_snr"))
    return {"prediction_type": prediction, "zero_terminal_snr": zero_snr}


def marks_in_scheduler(config):
    """The same of a scheduler configuration. Only what differs from the default counts: converters leave the default where nothing was said."""
    where = "its scheduler configuration"
    return {
        "prediction_type": [Mark(V_PREDICTION, where)] if config.get("prediction_type") == V_PREDICTION else [],
        "zero_terminal_snr": [Mark(True, where)] if config.get("rescale_betas_zero_snr") else [],
    }


def decide(named, marks, *, prediction_type=None, zero_terminal_snr=None):
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
    """The Mark that counts. Trainers write the default where nobody told them anything, so a flag may contradict that."""
    told = [mark for mark in marks if mark.value != default]
    if asked is not None:
        if told and all(mark.value != asked for mark in marks):
            raise UserError(
                f"--{setting} {asked}: contradicts {told[0].where}, by which {named} has {told[0].value}; leave the flag out"
            )
        return Mark(asked, f"--{setting}")
    if told and len(told) < len(marks):
        other = next(mark for mark in marks if mark.value == default)
        raise UserError(
            f"{named}: {told[0].where} says {told[0].value}, {other.where} says {other.value}; decide with --{setting}"
        )
    return next(iter(marks), Mark(default, "its scheduler configuration"))


def scheduler_of(config, kind):
    """A scheduler configuration that says what `kind` says. Zero-terminal SNR starts at the last timestep: "trailing" spacing (sec. 3.3)."""
    config = {**config, "prediction_type": kind.prediction_type}
    return (
        {**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if kind.zero_terminal_snr else config
    )
