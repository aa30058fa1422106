"""A model's name -> its files (Model) -> its parts on the device: noise schedule, VAE, text encoders, UNet.

Whatever the user names (hub id, folder, single file) becomes one diffusers folder first. There is never a second copy
of a part in RAM.

Heavy libraries are imported where they are used: with warm caches a run needs neither VAE nor text encoders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from common.cli import hub
from common.errors import UserError
from common.model import model_kind, single_file, weights
from common.model.model_kind import Kind
from common.model.noise import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from common.cli.model_flags import ModelFlags
    from common.model.device import Host

VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


@dataclass(frozen=True)
class Model:
    """A local diffusers folder of SDXL, and the folder of the VAE that goes with it.

    `scheduler`: the configuration of its noise schedule, which says what `kind` says.
    """

    name: str
    folder: Path
    vae: Path
    variant: str | None
    kind: Kind
    scheduler: dict


# ---------------------------------------------------------------- finding it


def model_of(flags: ModelFlags, say: Callable[[str], None] = print) -> Model:
    """`find_model` by the flags of a script; `say` gets one line about what it is."""
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
    name: str,
    vae: str | None = None,
    *,
    variant: str | None = "fp16",
    revision: str | None = None,
    config: str = "stabilityai/stable-diffusion-xl-base-1.0",
    cache_dir: str = ".",
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    say: Callable[[str], None] = print,
) -> Model:
    """Turn what the user named into local folders, downloading only the files that are used.

    Checks that they are a whole SDXL, by the configurations and the headers of the weight files.

    Args:
        name: a folder, a .safetensors file in the original layout, or a hub id.
        vae: a folder or hub id; None for the model's own, or its drop-in replacement.
        config: folder or hub id of the configurations that go with a single file.
        cache_dir: where a single file is converted to.
        prediction_type, zero_terminal_snr: what the model's files are silent about.
    Raises:
        UserError: not a diffusers model, not SDXL, not supported; a weight that is missing or does not fit.
    """
    # hub id or single file -> folder
    named = f"--pretrained_model_name_or_path {name}"
    place = Path(name)
    if not place.exists():
        vae = vae or hub.default_vae(name, revision)
        place = hub.download_model(name, variant, revision, with_vae=vae is None, say=say)
    folder = single_file.convert(place, config, Path(cache_dir)) if place.is_file() else place

    # what it is, and what it predicts
    model_kind.check_folder(folder, named)
    scheduler = model_kind.read_object(folder, model_kind.SCHEDULER, named)
    marks = model_kind.marks_in_scheduler(scheduler)
    if place.is_file():
        marks = {setting: found + marks[setting] for setting, found in model_kind.marks_in_file(place, named).items()}
    kind = model_kind.decide(named, marks, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    vae_folder = _own_vae(folder, named) if vae is None else _named_vae(vae)
    say(f"model: {name} {kind}; VAE: {vae or 'its own'}")
    scheduler = model_kind.scheduler_of(scheduler, kind)
    model = Model(name, folder, vae=vae_folder, variant=variant, kind=kind, scheduler=scheduler)
    _check_weights(model)
    return model


def _own_vae(folder, named):
    """The folder of a model's own VAE."""
    return _checked_vae([folder / "vae"], named)


def _named_vae(vae):
    """The folder of the VAE that a flag names, a model's or its own."""
    folder = Path(vae)
    if not folder.is_dir():
        folder = hub.download_files(vae, VAE_FILES + [f"vae/{name}" for name in VAE_FILES])
    return _checked_vae([folder, folder / "vae"], f"--pretrained_vae_model_name_or_path {vae}")


def _checked_vae(candidates, named):
    """The first of the folders that holds a VAE, which must be SDXL's."""
    folder = next((folder for folder in candidates if (folder / "config.json").exists()), None)
    if folder is None:
        cure = f"name one: --pretrained_vae_model_name_or_path {hub.FP16_VAE}"
        raise UserError(f"{named}: no VAE in it (vae/config.json); {cure}")
    config = model_kind.read_object(folder, "config.json", f"{named}: its vae")
    class_name = config.get("_class_name")
    channels = config.get("latent_channels", 4)
    if class_name != "AutoencoderKL" or channels != 4:
        raise UserError(f"{named}: its vae is {class_name} of {channels} channels, SDXL's is AutoencoderKL of 4")
    return folder


def _check_weights(model):
    """Every part is there and fits its configuration, before anything is encoded with one of them."""
    for part, class_name in model_kind.PARTS.items():
        weights.check_weights(weights.empty_part(class_name, model.folder / part), _files_of(model, part))
    vae = weights.empty_part("AutoencoderKL", model.vae)
    weights.check_weights(vae, weights.weight_files(model.vae, model.variant))


def _files_of(model, part):
    stem = weights.TRANSFORMERS_STEM if part.startswith("text_encoder") else weights.DIFFUSERS_STEM
    return weights.weight_files(model.folder / part, model.variant, stem)


def fingerprint(variant: str | None, *folders: Path) -> list[tuple[str, int, int]]:
    """What identifies the models in `folders` for the caches: (path, bytes, mtime) of every file that is loaded.

    Reads no weights.
    """
    files = []
    for folder in folders:
        loaded = weights.variant_in(folder, variant) or ""
        found = [path for path in folder.glob("*.safetensors") if _variant_of(path) == loaded]
        files += sorted([*found, *folder.glob("*.json"), *folder.glob("*.txt")])
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _variant_of(path):
    """fp16 of model.fp16-00001-of-00002.safetensors; "" of model.safetensors."""
    return path.stem.partition(".")[2].partition("-")[0]


# ---------------------------------------------------------------- its parts


def load_noise_schedule(model: Model, device: torch.device) -> NoiseSchedule:
    """The training noise schedule that belongs to the model's scheduler configuration -> NoiseSchedule on `device`."""
    return NoiseSchedule(model_kind.alphas_cumprod(model.scheduler).to(device), model.kind.prediction_type)


def load_vae(model: Model, host: Host) -> AutoencoderKL:
    """AutoencoderKL on the device; in fp32 where its config says that fp16 overflows (`force_upcast`)."""
    vae = weights.empty_part("AutoencoderKL", model.vae)
    dtype = torch.float32 if vae.config.force_upcast else host.dtype
    weights.fill(vae, weights.weight_files(model.vae, model.variant), device=host.device, dtype=dtype)
    return vae.requires_grad_(False).eval()


def load_text_encoders(
    model: Model, host: Host
) -> list[tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]]:
    """(tokenizer, encoder) of CLIP-L and of bigG, whose projection makes `pooled`."""
    pairs = []
    for suffix in ("", "_2"):
        part = f"text_encoder{suffix}"
        encoder = weights.empty_part(model_kind.PARTS[part], model.folder / part)
        weights.fill(encoder, _files_of(model, part), device=host.device, dtype=host.dtype)
        tokenizer = _load_tokenizer(model.folder / f"tokenizer{suffix}", encoder.config.vocab_size)
        pairs.append((tokenizer, encoder.to(host.device).requires_grad_(False).eval()))
    return pairs


def _load_tokenizer(folder, vocab_size):
    """The tokenizer in `folder`, which must fit an encoder of `vocab_size` embeddings."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({str(error).splitlines()[0]})") from None
    if not 100 < len(tokenizer) <= vocab_size:  # without its files a tokenizer loads with 2 words
        raise UserError(f"{folder}: {len(tokenizer)} words for {vocab_size} embeddings; files missing?")
    return tokenizer


def load_unet(model: Model, host: Host, quantize: Literal["none", "nf4"] = "none") -> UNet2DConditionModel:
    """The UNet, frozen, built without memory and filled straight on the device: RAM holds 0.5 GiB of it at a time.

    `quantize="nf4"` keeps the weights of its linear layers in 4 bits (bitsandbytes NF4, double quantisation), except
    those of the time and size embeddings. Each is quantised as it arrives, so the device never holds the fp16 model.
    """
    unet = weights.empty_part(model_kind.PARTS["unet"], model.folder / "unet")
    if quantize == "nf4":
        with torch.device("meta"):
            _make_linears_4bit(unet, host.dtype)
    weights.fill(unet, _files_of(model, "unet"), device=host.device, dtype=host.dtype)
    return unet.requires_grad_(False).train()


def _make_linears_4bit(unet, compute_dtype):
    from bitsandbytes.nn import Linear4bit

    options = dict(compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True)
    for name, module in list(unet.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(("time_embedding", "add_embedding")):
            parent, _, child = name.rpartition(".")
            layer = Linear4bit(module.in_features, module.out_features, bias=module.bias is not None, **options)
            # Else a CPU with these units repacks the weights in eval mode, which cuts their gradient.
            layer.support_avx512bf16_for_cpu = False
            setattr(unet.get_submodule(parent), child, layer)
    unet.is_loaded_in_4bit = True  # what PEFT asks before it treats a layer as 4-bit


def zero_unconditional(model: Model) -> bool:
    """Whether the model's unconditional input is zeros (SDXL base) rather than the encoded empty prompt."""
    return json.loads((model.folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True)
