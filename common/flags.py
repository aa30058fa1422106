"""The flags of the scripts, as documented dataclasses; `check()` refuses what cannot work.

Nothing here imports torch: a wrong value is answered at once.
"""

import contextlib
import importlib.util
import math
import netrc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, Optional
from urllib.parse import urlsplit

from common import packages, run_folder
from common.command_line import CACHE_DIR, DEMO_ROOT, Described, UserError, flag, local_path

ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
POLYNOMIAL_END = 1e-7  # the learning rate at which diffusers' polynomial schedule ends


@dataclass
class ModelFlags(Described):
    """Which model to load, and how: the same for every script."""

    pretrained_model_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "SDXL: hub id, local folder or single .safetensors file",
        type=local_path,
    )
    pretrained_vae_model_name_or_path: Optional[str] = flag(
        None,
        "VAE: hub id or folder; none means madebyollin/sdxl-vae-fp16-fix for a hub model with SDXL's original VAE, else the model's own",
        type=local_path,
    )
    config_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "where configs and tokenizers of a single-file model come from: hub id or folder",
        type=local_path,
    )
    variant: Optional[str] = flag(
        "fp16", "weight files to prefer; plain ones are used where a local folder has no such variant"
    )
    revision: Optional[str] = flag(None, "branch, tag or commit of the hub model")
    prediction_type: Optional[str] = flag(
        None,
        "what the model predicts, for files that do not say it; none means by its files",
        choices=["epsilon", "v_prediction"],
    )
    zero_terminal_snr: Optional[bool] = flag(
        None,
        "the model's last timestep is pure noise (arXiv 2305.08891), for files that do not say it; none means by its files",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "fp16", "precision of the model on a GPU; a CPU computes in fp32"
    )
    cache_dir: str = flag(
        CACHE_DIR,
        "where encoded images and captions, and unpacked single-file models, are kept between runs",
        type=local_path,
    )
    dry_run: bool = flag(False, "print the resolved configuration as JSON and stop")
    demo: bool = flag(False, "a small SDXL and a small data set that come with the suite: no network, minutes on a CPU")


@dataclass
class TrainFlags(ModelFlags):
    """The flags every trainer has. A trainer's own class overrides defaults and adds the flags of its technique."""

    # data
    dataset_name: str = flag("lambdalabs/naruto-blip-captions", "hub data set of image-caption pairs")
    train_data_dir: List[str] = flag(
        [],
        "folder of images with metadata.jsonl/.csv or .txt captions, of parquet or arrow files, or written by save_to_disk; repeatable;"
        " FOLDER:2 shows each of its images twice an epoch, and so does a folder 2_NAME in it; wins over --dataset_name; a name under"
        " /kaggle/input works too",
        type=local_path,
    )
    image_column: str = flag("image", "column of the images in a hub data set")
    caption_column: str = flag("text", "column of the captions in a hub data set or a metadata file")
    max_train_samples: Optional[int] = flag(None, "use only the first N samples")
    max_bad_images: int = flag(0, "unreadable images are named and skipped; more than this many end the run")
    resolution: int = flag(
        1024, "pixels: side of the square crop, or of the square with the area of a bucket; a multiple of 32"
    )
    center_crop: bool = flag(
        True,
        "crop the middle; otherwise each image has one random crop, drawn from its content so that it can be cached",
    )
    random_flip: bool = flag(False, "mirror half of the training examples")
    aspect_ratio_buckets: bool = flag(
        False,
        "keep the aspect ratio: crop to the nearest of the buckets between 1:2 and 2:1 with the area of --resolution",
    )
    caption_dropout: float = flag(
        0.0, "share of training examples that see the unconditional input instead of their caption"
    )
    trigger_word: Optional[str] = flag(
        None, "word put before every caption, e.g. the name of the style, with a comma after it"
    )
    caption_prefix: Optional[str] = flag(
        None, "text put before every caption, and before the trigger word, with a comma after it"
    )
    caption_suffix: Optional[str] = flag(None, "text put after every caption, with a comma before it")
    shuffle_tags: bool = flag(False, "train each caption with the parts between its commas in several random orders")
    keep_tokens: int = flag(0, "this many first tags of a caption stay first and are never dropped")
    tag_dropout: float = flag(0.0, "share of a caption's other tags that a variant of it lacks")
    caption_variants: int = flag(
        8,
        "with --shuffle_tags or --tag_dropout: texts made of each caption, one drawn each epoch; 0.3 MB of text cache for each",
    )
    text_cache: Literal["ram", "disk", "none"] = flag(
        "ram", "text embeddings: encoded once and held in RAM, encoded once and kept on disk, or encoded in every step"
    )
    # adapter
    quantize: Literal["none", "nf4"] = flag(
        "none", "keep the frozen UNet's linear layers in 16 bits, or in 4 (bitsandbytes NF4, double quantisation)"
    )
    lora_rank: int = flag(16, "rank r of the adapter")
    lora_alpha: Optional[int] = flag(
        None, "the adapter is scaled by alpha / rank; none means the rank, so a scale of 1"
    )
    lora_dropout: float = flag(
        0.0,
        "dropout on the adapter's input; its masks are seeded by step and pass, so they depend on how a batch is split",
    )
    lora_target_modules: List[str] = flag(
        ATTENTION_PROJECTIONS, "UNet layers that get an adapter, by the end of their names"
    )
    lora_backend: Literal["fused", "peft"] = flag(
        "fused",
        "forward passes: adapted layers as one function, frozen ones with fewer passes over memory; or PEFT's and diffusers' own",
    )
    auto_fit: bool = flag(
        True, "on a GPU, measure how many images fit a pass and what must be recomputed; the effective batch stays"
    )
    max_vram_gb: Optional[float] = flag(None, "GiB of GPU memory to stay within; none means what is free")
    cuda_graph: bool = flag(True, "on a GPU, launch the kernels of a pass once and replay them")
    train_text_encoder: bool = flag(
        False,
        "give both text encoders LoRA too (q, k, v, out projections; never DoRA); captions are then encoded in every step",
    )
    text_encoder_lr: float = flag(5e-5, "peak learning rate of the text encoders' adapters")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention by xformers instead of torch's own kernels"
    )
    # optimisation
    train_batch_size: int = flag(1, "examples in one forward pass on one device")
    gradient_accumulation_steps: int = flag(
        4,
        "passes in one optimizer step on one device; effective batch = batch size x accumulation, which several processes share out",
    )
    gradient_checkpointing: bool = flag(
        True, "recompute activations in the backward pass: less memory, a third more work"
    )
    num_train_epochs: int = flag(10, "passes over the data, unless --max_train_steps is given")
    max_train_steps: Optional[int] = flag(None, "optimizer steps; wins over --num_train_epochs")
    learning_rate: float = flag(1e-4, "peak learning rate")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = flag("cosine", "schedule of the learning rate over the optimizer steps")
    lr_warmup_steps: int = flag(100, "optimizer steps of linear warm-up")
    lr_num_cycles: int = flag(2, "cosines of cosine_with_restarts; 1 never restarts")
    lr_power: float = flag(1.0, "exponent of polynomial; 1 is linear")
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit state (bitsandbytes)")
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment")
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 switches clipping off")
    seed: int = flag(42, "seed of data order, noise, timesteps and adapter initialisation")
    # loss
    min_snr_gamma: Optional[float] = flag(
        None, "Min-SNR loss weighting with this gamma (arXiv 2303.09556); none is plain MSE"
    )
    offset_noise_strength: float = flag(0.0, "strength of noise that is constant over an image's channel")
    use_ema: bool = flag(False, "keep an exponential moving average of the adapter, saved to ema_unet/")
    ema_decay: float = flag(0.9999, "decay of the average, reached by the ramp (1 + step) / (10 + step)")
    # output
    output_dir: str = flag("outputs/train", "where everything the run writes goes", type=local_path)
    save_peft: bool = flag(
        False, "write the final adapter as PEFT folders too: peft/, and text encoders in folders within it"
    )
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints; 0 writes none on the way")
    checkpoints_total_limit: Optional[int] = flag(
        3, "keep this many newest checkpoints; the weight files of all steps stay"
    )
    resume_from_checkpoint: Optional[str] = flag(
        None, "'latest' or the path of a checkpoint folder: go on exactly where it was", type=local_path
    )
    max_train_minutes: Optional[float] = flag(
        None, "stop early, with everything saved, this many minutes after the start"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "tracker that gets the numbers of metrics.jsonl too"
    )
    validation_prompt: List[str] = flag([], "prompt to draw while training; repeatable")
    validation_steps: int = flag(
        500,
        "optimizer steps between validations: images (of the average with --use_ema) and held-out loss (without it)",
    )
    validation_split: float = flag(0.0, "share of the data held out for a validation loss at fixed noise and timesteps")
    early_stopping_patience: Optional[int] = flag(
        None, "stop after this many validations without a better held-out loss"
    )

    def __post_init__(self):
        if self.lora_alpha is None:
            self.lora_alpha = self.lora_rank


def check(flags):
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    positive = "lora_rank lora_alpha train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps max_train_samples "
    positive += "learning_rate text_encoder_lr min_snr_gamma max_train_minutes validation_steps early_stopping_patience checkpoints_total_limit max_vram_gb"
    positive += " caption_variants lr_num_cycles lr_power"
    for name in positive.split():
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be greater than 0, and finite")
    from_zero = (
        "max_bad_images keep_tokens lr_warmup_steps adam_weight_decay adam_epsilon max_grad_norm offset_noise_strength"
    )
    for name in f"{from_zero} checkpointing_steps".split():
        if not 0 <= getattr(flags, name) < math.inf:
            raise UserError(f"--{name} {getattr(flags, name)}: must be 0 or greater, and finite")
    for name in "caption_dropout tag_dropout lora_dropout adam_beta1 adam_beta2 ema_decay validation_split".split():
        if not 0 <= getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)}: must be at least 0 and less than 1")
    if flags.resolution < 64 or flags.resolution % 32:
        nearest = max(64, round(flags.resolution / 32) * 32)
        raise UserError(
            f"--resolution {flags.resolution}: must be a multiple of 32, at least 64; the nearest is {nearest}"
        )
    if flags.early_stopping_patience and not flags.validation_split:
        raise UserError("--early_stopping_patience needs a held-out loss: add --validation_split 0.05")
    if flags.keep_tokens and not (flags.shuffle_tags or flags.tag_dropout):
        raise UserError(
            f"--keep_tokens {flags.keep_tokens}: keeps tags in place that nothing moves; add --shuffle_tags or --tag_dropout"
        )
    if flags.lr_scheduler == "polynomial" and flags.learning_rate <= POLYNOMIAL_END:
        raise UserError(
            f"--learning_rate {flags.learning_rate}: polynomial ends at {POLYNOMIAL_END}; give more, or another --lr_scheduler"
        )
    if not all(name.strip() for name in flags.lora_target_modules):
        raise UserError(
            "--lora_target_modules: an empty name would mean every layer; give the ends of layer names, e.g. to_q to_k"
        )
    _check_places(flags)
    _check_packages(flags)
    check_model(flags)


def check_model(flags):
    """The part of `check` that every script needs: packages, a model that is meant to be local, and a place for what is written."""
    if found := packages.lacking():
        raise UserError(packages.refusal(found))
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: must be at least 0 and less than 2^32")
    for name in ("output_dir", "cache_dir"):
        check_writable(name, getattr(flags, name))
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        place = getattr(flags, name)
        looks_local = place and (
            place.startswith(("/", ".", "~")) or place.endswith(".safetensors") or place.count("/") > 1
        )
        if looks_local and "://" not in place and not os.path.exists(place) and not _of_the_demo(place):
            raise UserError(f"--{name} {place}: no such folder or file")


def check_writable(name, place):
    """A folder that is there with the right to write in it, or that can be made."""
    path = Path(place).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not nearest.is_dir():
        raise UserError(f"--{name} {place}: {nearest} is a file; name a folder")
    try:  # rights alone do not tell: a disk may be read-only, and /proc takes no folders
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise UserError(
            f"--{name} {place}: no right to write in {nearest} ({error.strerror}); name another folder"
        ) from None


def _of_the_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _check_places(flags):
    output, resume = Path(flags.output_dir), flags.resume_from_checkpoint
    for name in flags.train_data_dir:
        if not _of_the_demo(name):
            _check_data_dir(name, output)
    if resume not in (None, "latest") and not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: no such checkpoint folder")
    run_folder.check_free(output)
    continues = resume == "latest" or (resume and Path(resume).resolve().parent == output.resolve())
    if not continues and any((output / name).exists() for name in ("metrics.jsonl", run_folder.WEIGHTS)):
        raise UserError(
            f"--output_dir {output}: already holds a run; continue it with --resume_from_checkpoint latest, or name another folder"
        )
    if resume == "latest" and (output / run_folder.WEIGHTS).exists() and not run_folder.find_checkpoints(output):
        raise UserError(
            f"--resume_from_checkpoint latest: {output} holds a finished run, which would be written over, and no checkpoint to go on from;"
            " name another --output_dir"
        )


def _check_data_dir(name, output):
    folder, _ = find_data_dir(name)
    if output.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--output_dir {output}: lies in --train_data_dir {folder}, so the pictures of the run would be trained on;"
            " name a folder outside, and move a run that is there already"
        )


def _check_packages(flags):
    wanted = [("bitsandbytes", "--use_8bit_adam")] if flags.use_8bit_adam else []
    wanted += [("bitsandbytes", "--quantize nf4")] if flags.quantize == "nf4" else []
    wanted += (
        [("xformers", "--enable_xformers_memory_efficient_attention")]
        if flags.enable_xformers_memory_efficient_attention
        else []
    )
    wanted += [(flags.report_to, f"--report_to {flags.report_to}")] if flags.report_to != "none" else []
    for package, typed in wanted:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{typed} needs a package that is not installed: pip install {package}")
    if flags.report_to == "wandb":
        _check_wandb_login()


def _check_wandb_login():
    """wandb itself would ask for a key, or fail, when everything is loaded; it reads the same three places."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    places = (
        [os.environ["NETRC"]]
        if "NETRC" in os.environ
        else [os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc")]
    )
    for place in filter(os.path.isfile, places):
        with contextlib.suppress(netrc.NetrcParseError, OSError):
            if netrc.netrc(place).authenticators(server):
                return
    raise UserError(
        "--report_to wandb: not logged in; run wandb login, set WANDB_API_KEY, or WANDB_MODE=offline to keep it on this disk"
    )


def find_data_dir(name):
    """(folder, weight) of a value of --train_data_dir: the folder NAME, or /kaggle/input/NAME, with weight 1; of NAME:2, 2.

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
