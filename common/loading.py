"""A model's files -> its parts on the device: noise schedule, VAE, text encoders, UNet. Never a second copy in RAM.

Whatever the user names (hub id, folder, single file) becomes one diffusers folder first; nothing else knows the difference.
Heavy libraries are imported where they are used: with warm caches a run needs neither VAE nor text encoders.
"""

import inspect
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open

from common.command_line import UserError
from common.hub import FP16_VAE
from common.noise import NoiseSchedule

VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]
PARTS = dict(unet="UNet2DConditionModel", text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection")
READ = ["model_index.json", "scheduler/scheduler_config.json", *(f"tokenizer{part}/tokenizer_config.json" for part in ("", "_2"))]
CHUNK_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Model:
    """A local diffusers folder of SDXL, and the folder of the VAE that goes with it."""

    name: str
    folder: Path
    vae: Path
    variant: Optional[str]


# ---------------------------------------------------------------- finding it


def find_model(name, vae=None, variant="fp16", revision=None, config="stabilityai/stable-diffusion-xl-base-1.0", cache_dir="."):
    """Turn what the user named into local folders, downloading only the files that are used (fp16: about 7 GB, not 14).

    Raises:
        UserError: not a diffusers model.
    """
    place = Path(name)
    if place.is_file():
        folder = _convert_single_file(place, config, Path(cache_dir))
    elif place.is_dir():
        folder = place
    else:
        vae = vae or FP16_VAE
        folder = _download_pipeline(name, variant, revision)
    _check_parts(name, folder)
    return Model(name, folder, _find_vae(vae or str(folder)), variant)


def _check_parts(name, folder):
    """Refuse what is not SDXL: Stable Diffusion 1.5 would be loaded far before it fails."""
    named = f"--pretrained_model_name_or_path {name}"
    if not (folder / "model_index.json").exists():
        raise UserError(f"{named}: no model_index.json in it, so it is not a diffusers model folder")
    for file in READ:
        _read_object(folder, file, named)
    for part, wanted in PARTS.items():
        config = _read_object(folder, f"{part}/config.json", named)
        found = config.get("_class_name") or (config.get("architectures") or ["nothing known"])[0]
        if found != wanted:
            raise UserError(f"{named}: its {part} is {found}, SDXL's is {wanted}")


def _read_object(folder, file, named):
    """The JSON object in folder/file; `named` is the flag and its value, for the message where there is none."""
    try:
        return dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{named}: no readable {file} in it; SDXL has one") from None


def _download_pipeline(repo_id, variant, revision):
    from diffusers import StableDiffusionXLPipeline

    unused = dict(vae=None, feature_extractor=None, image_encoder=None, safety_checker=None)
    return Path(StableDiffusionXLPipeline.download(repo_id, variant=variant, revision=revision, use_safetensors=True, **unused))


def _find_vae(vae):
    folder = Path(vae)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(vae, allow_patterns=VAE_FILES + [f"vae/{name}" for name in VAE_FILES]))
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").exists():
            _read_object(candidate, "config.json", f"--pretrained_vae_model_name_or_path {vae}")
            return candidate
    raise UserError(f"--pretrained_vae_model_name_or_path {vae}: no config.json in it or in its vae folder")


def _convert_single_file(path, config, cache_dir):
    """A .safetensors checkpoint in the original layout -> a diffusers folder (fp16) under `cache_dir`, made once."""
    from diffusers import StableDiffusionXLPipeline

    if path.suffix != ".safetensors":
        raise UserError(f"--pretrained_model_name_or_path {path}: only .safetensors files are read; pickles can run code")
    stat = path.stat()
    folder = cache_dir / "single_file" / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=config, dtype=torch.float16)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"--pretrained_model_name_or_path {path}: not a readable SDXL checkpoint ({error})") from None
        pipeline.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def fingerprint(variant, *folders):
    """What identifies the models in `folders` for the caches: the files that are loaded, with size and time of change. Reads no weights."""
    files = []
    for folder in folders:
        loaded = _variant_in(folder, variant) or ""  # the part after the first dot: model.fp16-00001-of-00002.safetensors
        weights = [path for path in folder.glob("*.safetensors") if path.stem.partition(".")[2].partition("-")[0] == loaded]
        files += sorted([*weights, *folder.glob("*.json"), *folder.glob("*.txt")])
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


# ---------------------------------------------------------------- its parts


def load_noise_schedule(model, device):
    """The training noise schedule that belongs to the model's scheduler configuration -> NoiseSchedule on `device`."""
    from diffusers import DDPMScheduler

    config = DDPMScheduler.load_config(model.folder, subfolder="scheduler")
    # not from_config: it imports every scheduler there is, for seconds, to warn about settings that belong to another one
    scheduler = DDPMScheduler(**{name: config[name] for name in inspect.signature(DDPMScheduler.__init__).parameters if name in config})
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{model.name}: prediction type {scheduler.config.prediction_type!r} is not supported, only epsilon and v_prediction"
        )
    return NoiseSchedule(scheduler.alphas_cumprod.to(device, torch.float32), scheduler.config.prediction_type)


def load_vae(model, host):
    """AutoencoderKL on the device; in fp32 where its config says that fp16 overflows (`force_upcast`)."""
    from diffusers import AutoencoderKL

    upcast = AutoencoderKL.load_config(model.vae).get("force_upcast", True)
    dtype = torch.float32 if upcast else host.dtype
    vae = AutoencoderKL.from_pretrained(model.vae, variant=_variant_in(model.vae, model.variant), dtype=dtype, use_safetensors=True)
    return vae.to(host.device).requires_grad_(False).eval()


def load_text_encoders(model, host):
    """[(tokenizer, encoder)] of CLIP-L and bigG. The second must be CLIPTextModelWithProjection: its projection makes `pooled`."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    pairs = []
    for part, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        folder = model.folder / f"text_encoder{part}"
        variant = _variant_in(folder, model.variant)
        encoder = cls.from_pretrained(folder, variant=variant, dtype=host.dtype, use_safetensors=True).to(host.device)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(model.folder / f"tokenizer{part}")
        except (OSError, ValueError) as error:
            raise UserError(f"{model.folder}/tokenizer{part}: cannot be read ({str(error).splitlines()[0]})") from None
        if not 100 < len(tokenizer) <= encoder.config.vocab_size:  # without its files a tokenizer loads with 2 words
            raise UserError(
                f"{model.folder}/tokenizer{part}: {len(tokenizer)} words for {encoder.config.vocab_size} embeddings; files missing?"
            )
        pairs.append((tokenizer, encoder.requires_grad_(False).eval()))
    return pairs


def load_unet(model, host, quantize="none"):
    """The UNet, frozen, built without memory and filled straight on the device: RAM holds 0.5 GiB of it at a time.

    `quantize="nf4"` keeps the weights of its linear layers in 4 bits (bitsandbytes NF4, double quantisation), except those of the
    time and size embeddings; each is quantised as it arrives, so the device never holds the fp16 model either.
    """
    from diffusers import UNet2DConditionModel

    folder = model.folder / "unet"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        if quantize == "nf4":
            _make_linears_4bit(unet, host.dtype)
    fill(unet, weight_files(folder, model.variant), host.device, host.dtype)
    return unet.requires_grad_(False).train()


def _make_linears_4bit(unet, compute_dtype):
    from bitsandbytes.nn import Linear4bit

    for name, module in list(unet.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(("time_embedding", "add_embedding")):
            parent, _, child = name.rpartition(".")
            options = dict(bias=module.bias is not None, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True)
            layer = Linear4bit(module.in_features, module.out_features, **options)
            layer.support_avx512bf16_for_cpu = False  # else such a CPU repacks the weights in eval mode, which cuts their gradient
            setattr(unet.get_submodule(parent), child, layer)
    unet.is_loaded_in_4bit = True  # what PEFT asks before it treats a layer as 4-bit


def weight_files(folder, variant):
    """The safetensors files of a component: those of the variant when there are any, else the plain ones."""
    stem = f"diffusion_pytorch_model.{_variant_in(folder, variant)}" if _variant_in(folder, variant) else "diffusion_pytorch_model"
    files = sorted({*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")})
    if not files:
        raise UserError(f"{folder}: no {stem}.safetensors in it (only safetensors are read; pickles can run code)")
    return files


def fill(module, files, device, dtype):
    """Fill a module made on the meta device from safetensors files.

    A file is mapped for CHUNK_BYTES at a time: what was read is not counted as ours for longer than that.
    Raises:
        UserError: a damaged file, or names that do not fit the module.
    """
    missing = set(module.state_dict())
    for file in files:
        for names in _chunks(file):
            with safe_open(file, "pt", device=str(device)) as tensors:
                chunk = {name: tensors.get_tensor(name).to(dtype) for name in names}
            if unknown := chunk.keys() - missing:
                raise UserError(f"{file}: {sorted(unknown)[0]} does not belong to this architecture")
            missing -= chunk.keys()
            for name in [name for name in chunk if name.endswith(".weight") and _is_4bit(module, name)]:
                layer = module.get_submodule(name.removesuffix(".weight"))
                empty = layer.weight
                options = dict(
                    requires_grad=False, compress_statistics=empty.compress_statistics, quant_type=empty.quant_type, module=layer
                )
                layer.weight = type(empty)(chunk.pop(name), **options).to(device)  # Params4bit quantises when it is moved
            module.load_state_dict(chunk, strict=False, assign=True)
    if missing:
        raise UserError(f"{files[0].parent}: {len(missing)} weights are missing, e.g. {sorted(missing)[0]}")


def _is_4bit(module, weight_name):
    return type(module.get_parameter(weight_name)).__name__ == "Params4bit"  # by name: bitsandbytes may not be installed


def _chunks(file):
    """The tensor names of a file, in its own order, in lists of about CHUNK_BYTES."""
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.offset_keys())
            sizes = {name: 2 * torch.Size(tensors.get_slice(name).get_shape()).numel() for name in names}
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); download or copy it again") from None
    ends = itertools.accumulate(sizes.values())
    for _, group in itertools.groupby(zip(names, ends), key=lambda pair: pair[1] // CHUNK_BYTES):
        yield [name for name, _ in group]


def _variant_in(folder, variant):
    return variant if variant and any(folder.glob(f"*.{variant}*.safetensors")) else None


def zero_unconditional(model):
    """Whether the model's unconditional input is zeros (SDXL base) rather than the encoded empty prompt."""
    return json.loads((model.folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True)
