"""A model's files -> its parts on the device: noise schedule, VAE, text encoders, UNet. Never a second copy in RAM.

Whatever the user names (hub id, folder, single file) becomes one diffusers folder first; nothing else knows the difference.
Heavy libraries are imported where they are used: with warm caches a run needs neither VAE nor text encoders.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from common import hub, model_kind, single_file, weights
from common.command_line import UserError
from common.model_kind import Kind
from common.noise import NoiseSchedule

VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


@dataclass(frozen=True)
class Model:
    """A local diffusers folder of SDXL, and the folder of the VAE that goes with it.

    `scheduler`: the configuration of its noise schedule, which says what `kind` says.
    """

    name: str
    folder: Path
    vae: Path
    variant: Optional[str]
    kind: Kind
    scheduler: dict


# ---------------------------------------------------------------- finding it


def model_of(flags, say=print):
    """`find_model` by the flags of a script, which are command_line's ModelFlags; `say` gets one line about what it is."""
    return find_model(
        flags.pretrained_model_name_or_path,
        flags.pretrained_vae_model_name_or_path,
        variant=flags.variant,
        revision=flags.revision,
        config=flags.config_name_or_path,
        cache_dir=flags.cache_dir,
        prediction_type=flags.prediction_type,
        zero_terminal_snr=flags.zero_terminal_snr,
        say=say,
    )


def find_model(
    name,
    vae=None,
    *,
    variant="fp16",
    revision=None,
    config="stabilityai/stable-diffusion-xl-base-1.0",
    cache_dir=".",
    prediction_type=None,
    zero_terminal_snr=None,
    say=print,
):
    """Turn what the user named into local folders, downloading only the files that are used, and check that they are a whole SDXL.

    Reads configurations and the headers of weight files.
    Raises:
        UserError: not a diffusers model, not SDXL, not supported; a weight that is missing or does not fit.
    """
    named = f"--pretrained_model_name_or_path {name}"
    place = Path(name)
    if not place.exists():
        vae = vae or hub.default_vae(name, revision)
        place = hub.download_model(name, variant, revision, with_vae=vae is None, say=say)
    marks = {"prediction_type": [], "zero_terminal_snr": []}
    folder = place
    if place.is_file():
        folder = single_file.convert(place, config, Path(cache_dir))
        marks = model_kind.marks_in_file(place, named)
    model_kind.check_folder(folder, named)
    scheduler = model_kind.read_object(folder, model_kind.SCHEDULER, named)
    marks = {setting: marks[setting] + more for setting, more in model_kind.marks_in_scheduler(scheduler).items()}
    kind = model_kind.decide(named, marks, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    vae_folder = _find_vae(vae, folder, named)
    say(f"model: {name} {kind}; VAE: {vae or 'its own'}")
    model = Model(name, folder, vae_folder, variant, kind, model_kind.scheduler_of(scheduler, kind))
    _check_weights(model)
    return model


def _find_vae(vae, folder, named):
    """The folder of the VAE that the user named, else of the model's own."""
    if vae is not None:
        named, folder = f"--pretrained_vae_model_name_or_path {vae}", Path(vae)
        if not folder.is_dir():
            folder = hub.download_files(vae, VAE_FILES + [f"vae/{name}" for name in VAE_FILES])
    for candidate in (folder, folder / "vae") if vae is not None else (folder / "vae",):
        if (candidate / "config.json").exists():
            config = model_kind.read_object(candidate, "config.json", f"{named}: its vae")
            if config.get("_class_name") != "AutoencoderKL" or config.get("latent_channels", 4) != 4:
                raise UserError(
                    f"{named}: its vae is {config.get('_class_name')} of {config.get('latent_channels', 4)} channels,"
                    " SDXL's is AutoencoderKL of 4"
                )
            return candidate
    raise UserError(
        f"{named}: no VAE in it (vae/config.json); name one: --pretrained_vae_model_name_or_path {hub.FP16_VAE}"
    )


def _check_weights(model):
    """Every part is there and fits its configuration, before anything is encoded with one of them."""
    for part, class_name in model_kind.PARTS.items():
        weights.check_weights(weights.empty_part(class_name, model.folder / part), _files_of(model, part))
    weights.check_weights(
        weights.empty_part("AutoencoderKL", model.vae), weights.weight_files(model.vae, model.variant)
    )


def _files_of(model, part):
    stem = weights.TRANSFORMERS_STEM if part.startswith("text_encoder") else weights.DIFFUSERS_STEM
    return weights.weight_files(model.folder / part, model.variant, stem)


def fingerprint(variant, *folders):
    """What identifies the models in `folders` for the caches: the files that are loaded, with size and time of change. Reads no weights."""
    files = []
    for folder in folders:
        loaded = (
            weights.variant_in(folder, variant) or ""
        )  # the part after the first dot: model.fp16-00001-of-00002.safetensors
        found = [
            path for path in folder.glob("*.safetensors") if path.stem.partition(".")[2].partition("-")[0] == loaded
        ]
        files += sorted([*found, *folder.glob("*.json"), *folder.glob("*.txt")])
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


# ---------------------------------------------------------------- its parts


def load_noise_schedule(model, device):
    """The training noise schedule that belongs to the model's scheduler configuration -> NoiseSchedule on `device`."""
    return NoiseSchedule(model_kind.alphas_cumprod(model.scheduler).to(device), model.kind.prediction_type)


def load_vae(model, host):
    """AutoencoderKL on the device; in fp32 where its config says that fp16 overflows (`force_upcast`)."""
    vae = weights.empty_part("AutoencoderKL", model.vae)
    dtype = torch.float32 if vae.config.force_upcast else host.dtype
    weights.fill(vae, weights.weight_files(model.vae, model.variant), host.device, dtype)
    return vae.requires_grad_(False).eval()


def load_text_encoders(model, host):
    """[(tokenizer, encoder)] of CLIP-L and bigG. The second must be CLIPTextModelWithProjection: its projection makes `pooled`."""
    from transformers import CLIPTokenizer

    pairs = []
    for suffix in ("", "_2"):
        part = f"text_encoder{suffix}"
        encoder = weights.empty_part(model_kind.PARTS[part], model.folder / part)
        weights.fill(encoder, _files_of(model, part), host.device, host.dtype)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(model.folder / f"tokenizer{suffix}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model.folder}/tokenizer{suffix}: cannot be read ({str(error).splitlines()[0]})"
            ) from None
        if not 100 < len(tokenizer) <= encoder.config.vocab_size:  # without its files a tokenizer loads with 2 words
            raise UserError(
                f"{model.folder}/tokenizer{suffix}: {len(tokenizer)} words for {encoder.config.vocab_size} embeddings; files missing?"
            )
        pairs.append((tokenizer, encoder.to(host.device).requires_grad_(False).eval()))
    return pairs


def load_unet(model, host, quantize="none"):
    """The UNet, frozen, built without memory and filled straight on the device: RAM holds 0.5 GiB of it at a time.

    `quantize="nf4"` keeps the weights of its linear layers in 4 bits (bitsandbytes NF4, double quantisation), except those of the
    time and size embeddings; each is quantised as it arrives, so the device never holds the fp16 model either.
    """
    unet = weights.empty_part(model_kind.PARTS["unet"], model.folder / "unet")
    if quantize == "nf4":
        with torch.device("meta"):
            _make_linears_4bit(unet, host.dtype)
    weights.fill(unet, _files_of(model, "unet"), host.device, host.dtype)
    return unet.requires_grad_(False).train()


def _make_linears_4bit(unet, compute_dtype):
    from bitsandbytes.nn import Linear4bit

    for name, module in list(unet.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(("time_embedding", "add_embedding")):
            parent, _, child = name.rpartition(".")
            options = dict(
                bias=module.bias is not None, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True
            )
            layer = Linear4bit(module.in_features, module.out_features, **options)
            layer.support_avx512bf16_for_cpu = (
                False  # else such a CPU repacks the weights in eval mode, which cuts their gradient
            )
            setattr(unet.get_submodule(parent), child, layer)
    unet.is_loaded_in_4bit = True  # what PEFT asks before it treats a layer as 4-bit


def zero_unconditional(model):
    """Whether the model's unconditional input is zeros (SDXL base) rather than the encoded empty prompt."""
    return json.loads((model.folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True)
