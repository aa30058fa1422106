"""The flags of the trainers, as a documented dataclass. What must hold of several of them stands in flag_checks.py.

Nothing here imports torch: a wrong value is answered at once.
"""

from dataclasses import dataclass
from typing import List, Literal, Optional

from common.cli.flag_facts import FROM_ZERO, POSITIVE, SEED, SHARE, flag, local_path, multiple_of
from common.cli.model_flags import ModelFlags

ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


@dataclass
class TrainFlags(ModelFlags):
    """The flags every trainer has. A trainer's own class overrides defaults and adds the flags of its technique."""

    # data
    dataset_name: str = flag("lambdalabs/naruto-blip-captions", "hub data set of image-caption pairs", group="data")
    train_data_dir: List[str] = flag(
        [],
        "folder of images with metadata.jsonl/.csv or .txt captions, of parquet or arrow files, or written by"
        " save_to_disk; repeatable; FOLDER:2 shows each of its images twice an epoch, and so does a folder 2_NAME in"
        " it; wins over --dataset_name; a name under /kaggle/input works too",
        type=local_path,
        group="data",
    )
    image_column: str = flag("image", "column of the images in a hub data set", group="data")
    caption_column: str = flag("text", "column of the captions in a hub data set or a metadata file", group="data")
    max_train_samples: Optional[int] = flag(None, "use only the first N samples", group="data", range=POSITIVE)
    max_bad_images: int = flag(
        0, "unreadable images are named and skipped; more than this many end the run", group="data", range=FROM_ZERO
    )
    resolution: int = flag(
        1024,
        "pixels: side of the square crop, or of the square with the area of a bucket; a multiple of 32",
        group="data",
        range=multiple_of(32),
        metavar="PX",
    )
    center_crop: bool = flag(
        True,
        "crop the middle; otherwise each image has one random crop, drawn from its content so that it can be cached",
        group="data",
    )
    random_flip: bool = flag(False, "mirror half of the training examples", group="data")
    aspect_ratio_buckets: bool = flag(
        False,
        "keep the aspect ratio: crop to the nearest of the buckets between 1:2 and 2:1 with the area of --resolution",
        group="data",
        changes_a_pass=True,
    )
    caption_dropout: float = flag(
        0.0,
        "share of training examples that see the unconditional input instead of their caption",
        group="captions",
        range=SHARE,
    )
    trigger_word: Optional[str] = flag(
        None, "word put before every caption, e.g. the name of the style; a comma is put after it", group="captions"
    )
    caption_prefix: Optional[str] = flag(
        None, "text put before every caption, and before the trigger word, and a comma after it", group="captions"
    )
    caption_suffix: Optional[str] = flag(None, "text put after every caption, and a comma before it", group="captions")
    shuffle_tags: bool = flag(
        False, "train each caption with the parts between its commas in several random orders", group="captions"
    )
    keep_tokens: int = flag(
        0, "this many first tags of a caption stay first and are never dropped", group="captions", range=FROM_ZERO
    )
    tag_dropout: float = flag(
        0.0, "share of a caption's other tags that a variant of it lacks", group="captions", range=SHARE
    )
    caption_variants: int = flag(
        8,
        "with --shuffle_tags or --tag_dropout: texts made of each caption, one drawn each epoch;"
        " each takes 0.3 MB of cache",
        group="captions",
        range=POSITIVE,
    )
    text_cache: Literal["ram", "disk", "none"] = flag(
        "ram",
        "text embeddings: encoded once and held in RAM, encoded once and kept on disk, or encoded in every step",
        group="memory and speed",
        changes_a_pass=True,
    )
    # adapter
    quantize: Literal["none", "nf4"] = flag(
        "none",
        "keep the frozen UNet's linear layers in 16 bits, or in 4 (bitsandbytes NF4, double quantisation)",
        group="memory and speed",
        changes_a_pass=True,
    )
    lora_rank: int = flag(16, "rank r of the adapter", group="adapter", range=POSITIVE, changes_a_pass=True)
    lora_alpha: Optional[int] = flag(
        None,
        "the adapter is scaled by alpha / rank; none means the rank, so a scale of 1",
        group="adapter",
        range=POSITIVE,
    )
    lora_dropout: float = flag(
        0.0,
        "dropout on the adapter's input; its masks are seeded by step and pass, so they depend on how a batch is split",
        group="adapter",
        range=SHARE,
        changes_a_pass=True,
    )
    lora_target_modules: List[str] = flag(
        ATTENTION_PROJECTIONS,
        "UNet layers that get an adapter, by the end of their names",
        group="adapter",
        changes_a_pass=True,
    )
    lora_backend: Literal["fused", "peft"] = flag(
        "fused",
        "forward passes: adapted layers as one function, fewer passes over memory; or PEFT's and diffusers' own",
        group="memory and speed",
        changes_a_pass=True,
    )
    auto_fit: bool = flag(
        True,
        "on a GPU, measure how many images fit a pass and what must be recomputed; the effective batch stays",
        group="memory and speed",
    )
    max_vram_gb: Optional[float] = flag(
        None,
        "GiB of GPU memory to stay within; none means what is free",
        group="memory and speed",
        range=POSITIVE,
        metavar="GIB",
    )
    cuda_graph: bool = flag(
        True,
        "on a GPU, launch the kernels of a pass once and replay them",
        group="memory and speed",
        changes_a_pass=True,
    )
    train_text_encoder: bool = flag(
        False,
        "give both text encoders LoRA too (q, k, v, out; never DoRA); captions are then encoded in every step",
        group="adapter",
        changes_a_pass=True,
    )
    text_encoder_lr: float = flag(
        5e-5, "peak learning rate of the text encoders' adapters", group="optimisation", range=POSITIVE
    )
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention by xformers instead of torch's own kernels", group="memory and speed", changes_a_pass=True
    )
    # optimisation
    train_batch_size: int = flag(
        1, "examples in one forward pass on one device", group="memory and speed", range=POSITIVE, resume="free"
    )
    gradient_accumulation_steps: int = flag(
        4,
        "passes in one optimizer step on one device; effective batch = batch size x accumulation, which several"
        " processes share out",
        group="optimisation",
        range=POSITIVE,
        resume="free",
    )
    gradient_checkpointing: bool = flag(
        True,
        "recompute activations in the backward pass: less memory, a third more work",
        group="memory and speed",
        changes_a_pass=True,
    )
    num_train_epochs: int = flag(
        10, "passes over the data, unless --max_train_steps is given", group="optimisation", range=POSITIVE
    )
    max_train_steps: Optional[int] = flag(
        None, "optimizer steps; wins over --num_train_epochs", group="optimisation", range=POSITIVE
    )
    learning_rate: float = flag(1e-4, "peak learning rate", group="optimisation", range=POSITIVE)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = flag("cosine", "schedule of the learning rate over the optimizer steps", group="optimisation")
    lr_warmup_steps: int = flag(100, "optimizer steps of linear warm-up", group="optimisation", range=FROM_ZERO)
    lr_num_cycles: int = flag(
        2, "cosines of cosine_with_restarts; 1 never restarts", group="optimisation", range=POSITIVE
    )
    lr_power: float = flag(1.0, "exponent of polynomial; 1 is linear", group="optimisation", range=POSITIVE)
    use_8bit_adam: bool = flag(
        False, "AdamW with 8-bit state (bitsandbytes)", group="optimisation", changes_a_pass=True
    )
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment", group="optimisation", range=SHARE, metavar="X")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment", group="optimisation", range=SHARE, metavar="X")
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay", group="optimisation", range=FROM_ZERO)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", group="optimisation", range=FROM_ZERO)
    max_grad_norm: float = flag(
        1.0, "gradients are clipped to this norm; 0 switches clipping off", group="optimisation", range=FROM_ZERO
    )
    seed: int = flag(
        42, "seed of data order, noise, timesteps and adapter initialisation", group="optimisation", range=SEED
    )
    # loss
    min_snr_gamma: Optional[float] = flag(
        None,
        "Min-SNR loss weighting with this gamma (arXiv 2303.09556); none is plain MSE",
        group="loss",
        range=POSITIVE,
    )
    offset_noise_strength: float = flag(
        0.0, "strength of noise that is constant over an image's channel", group="loss", range=FROM_ZERO
    )
    use_ema: bool = flag(
        False,
        "keep an exponential moving average of the adapter, saved to ema_unet/",
        group="optimisation",
        changes_a_pass=True,
    )
    ema_decay: float = flag(
        0.9999,
        "decay of the average, reached by the ramp (1 + step) / (10 + step)",
        group="optimisation",
        range=SHARE,
        metavar="X",
    )
    # output
    output_dir: str = flag(
        "outputs/train", "where everything the run writes goes", type=local_path, group="output", resume="free"
    )
    save_peft: bool = flag(
        False,
        "write the final adapter as PEFT folders too: peft/, and text encoders in folders within it",
        group="output",
        resume="free",
    )
    checkpointing_steps: int = flag(
        500, "optimizer steps between checkpoints; 0 writes none on the way", group="output", range=FROM_ZERO
    )
    checkpoints_total_limit: Optional[int] = flag(
        3, "keep this many newest checkpoints; the weight files of all steps stay", group="output", range=POSITIVE
    )
    resume_from_checkpoint: Optional[str] = flag(
        None,
        "'latest' or the path of a checkpoint folder: go on exactly where it was",
        type=local_path,
        group="output",
        resume="free",
    )
    max_train_minutes: Optional[float] = flag(
        None,
        "stop early, with everything saved, this many minutes after the start",
        group="output",
        range=POSITIVE,
        resume="free",
        metavar="MINUTES",
    )
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "tracker that gets the numbers of metrics.jsonl too", group="output", resume="free"
    )
    validation_prompt: List[str] = flag([], "prompt to render while training; repeatable", group="validation")
    validation_steps: int = flag(
        500,
        "optimizer steps between validations: images (of the average with --use_ema) and held-out loss (without it)",
        group="validation",
        range=POSITIVE,
    )
    validation_split: float = flag(
        0.0,
        "share of the data held out for a validation loss at fixed noise and timesteps",
        group="validation",
        range=SHARE,
    )
    early_stopping_patience: Optional[int] = flag(
        None, "stop after this many validations without a better held-out loss", group="validation", range=POSITIVE
    )

    def __post_init__(self):
        if self.lora_alpha is None:
            self.lora_alpha = self.lora_rank
