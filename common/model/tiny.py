"""The demo where its trained model is absent: a tiny SDXL with random weights beside a drawn, captioned image set.

Both are made in about a second and without a network. torch and diffusers are imported when the model is made.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from common.cli.demo_settings import demo_settings
from common.model import tiny_pictures

# SDXL's topology and noise schedule, from the config files of stabilityai/stable-diffusion-xl-base-1.0.
# The widths are left open.
UNET = dict(
    layers_per_block=2,
    use_linear_projection=True,
    addition_embed_type="text_time",
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
VAE = dict(
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.13025,
    force_upcast=False,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
)
# 64 px are 8 latents a side. Text is 32 + 48 = 80 wide; pooled text (64) and six time ids of 8 numbers make 112.
TINY = dict(
    unet=dict(
        sample_size=8,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 2, 4],
        cross_attention_dim=80,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=112,
    ),
    text_encoder=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
    ),
    text_encoder_2=dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        projection_dim=64,
        hidden_act="gelu",
    ),
    vae=dict(sample_size=64, block_out_channels=(8, 16, 16, 24), norm_num_groups=8),
)

# The vocabulary: every word of the pictures' captions, and what users add to them
WORDS = (
    *tiny_pictures.WHO,
    *tiny_pictures.MOODS,
    *tiny_pictures.EYES,
    *tiny_pictures.HAIR,
    *tiny_pictures.SCENES,
    "with eyes and hair fur dressed in front of",
    "Naruto style",
)


def tokenizers(texts: Iterable[str]) -> tuple:
    """(tokenizer, tokenizer_2) with a byte-level vocabulary.

    The order is CLIP's: bytes, bytes that end a word, merges, start, end.
    Every word of `texts` becomes one token; other text costs about one a letter.
    As SDXL's, they pad with end-of-text and "!" (id 0).
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = merges_of(sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())}))
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return tuple(
        CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=77) for pad in ("<|endoftext|>", "!")
    )


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word.

    The most frequent pair comes first; of equals the first in the alphabet.
    The trainer of `tokenizers` leaves the order of equals to chance.
    Embeddings trained in one process would be of no use in the next.
    """
    merges = []
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for word in pieces:
            for i in reversed([i for i, pair in enumerate(zip(word, word[1:])) if pair == merges[-1]]):
                word[i : i + 2] = ["".join(word[i : i + 2])]
    return merges


def sdxl(widths: dict[str, dict], texts: Iterable[str], device: str):
    """StableDiffusionXLPipeline with SDXL's topology and untrained fp32 weights, on `device` ("meta": shapes only).

    `widths` holds the open config values of unet, text_encoder, text_encoder_2 and vae; see `tokenizers` for `texts`.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = tokenizers(texts)
    # pooling looks for the config's eos_token_id, so it has to be the tokenizer's own
    ids = dict(vocab_size=len(first), bos_token_id=first.bos_token_id, eos_token_id=first.eos_token_id)
    with torch.device(device):
        parts = dict(
            unet=UNet2DConditionModel(**UNET, **widths["unet"]),
            vae=AutoencoderKL(**VAE, **widths["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**ids | widths["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**ids | widths["text_encoder_2"])),
        )
    return StableDiffusionXLPipeline(
        **parts, tokenizer=first, tokenizer_2=second, scheduler=EulerDiscreteScheduler(**SCHEDULER)
    )


def build_model(folder: Path) -> None:
    """Writes a tiny random SDXL as a diffusers folder (fp32 safetensors, the same weights every time)."""
    import torch

    from common.model.device import quieten_libraries

    quieten_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sdxl(TINY, WORDS, "cpu").save_pretrained(folder)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built if absent.

    It appears whole or not at all; of two processes that build at once the first one wins.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
            build(Path(scratch) / folder.name)
            try:
                os.replace(Path(scratch) / folder.name, folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def demo_assets(root: Path) -> tuple[Path, Path]:
    """(model folder, image folder) of the demo; the first call builds those of the tiny one."""
    settings = demo_settings(root)
    model = Path(settings["pretrained_model_name_or_path"])
    data = Path(settings["train_data_dir"][0])
    return build_once(model, build_model), build_once(data, tiny_pictures.build_images)
