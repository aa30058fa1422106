"""The small models of the procedural world and their files: an SDXL of 11 M parameters, a CLIP, a judge of pictures.

The weights of a training stage are one safetensors file (fp16) named after it.
A key in it is the part's name, a dot, the parameter's name.
"""

import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from common.cli import demo_settings
from common.model import tiny
from demo import painting, world

LABELS = world.ATTRIBUTES | {"style": world.STYLES}  # what the judge reads off a picture
COUNTS = [len(values) for values in LABELS.values()]
LOGITS = sum(COUNTS)
HELD_OUT = 10**6  # seed of pictures that no stage trains on
# Stage -> parts of the pipeline that it trains
PARTS = dict(vae=["vae"], text=["text_encoder", "text_encoder_2"], unet=["unet"])
# 11 M parameters, 22 MB in fp16. Text is 96 + 128 = 224 wide; pooled text (128) and six time ids of 32 numbers are 320.
WIDTHS = dict(
    unet=dict(
        block_out_channels=(64, 96, 96),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 3, 3],  # as in SDXL's file: the number of heads
        cross_attention_dim=224,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=320,
    ),
    text_encoder=dict(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3, projection_dim=96
    ),
    text_encoder_2=dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=128,
        hidden_act="gelu",
    ),
    vae=dict(block_out_channels=(32, 48, 64, 80), norm_num_groups=16),
)


def words() -> list[str]:
    """Every word of the world's captions, and one that users write."""
    some = world.draw_attributes(4096, seed=0)
    texts = world.captions(some, seed=0) + world.captions(some, seed=0, full=True)
    return sorted({word for text in texts for word in text.split()} | {"style"})


def text_ids(tokenizer) -> dict:
    """The config values of a text encoder that depend on its tokenizer."""
    return dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)


def pipeline(size: int):
    """StableDiffusionXLPipeline for pictures of `size` px: SDXL's topology at WIDTHS, untrained."""
    first, second = tiny.tokenizers(words())
    own = dict(
        unet=dict(sample_size=size // 8),
        vae=dict(sample_size=size),
        text_encoder=text_ids(first),
        text_encoder_2=text_ids(second),
    )
    pipe = tiny.sdxl({part: WIDTHS[part] | own[part] for part in WIDTHS}, ["a"], "cpu")
    pipe.register_modules(tokenizer=first, tokenizer_2=second)
    return pipe


def clip_model(size: int, tokenizer) -> nn.Module:
    """An untrained CLIPModel of 1.8 M parameters that sees 8 x 8 patches and reads with `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    text = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, projection_dim=96)
    vision = dict(hidden_size=144, intermediate_size=576, num_hidden_layers=4, num_attention_heads=4, projection_dim=96)
    return CLIPModel(
        CLIPConfig(
            text_config=text | text_ids(tokenizer),
            vision_config=vision | dict(image_size=size, patch_size=size // 8),
            projection_dim=96,
        )
    )


class Judge(nn.Module):
    """A CNN of 0.3 M parameters: pictures [B, 3, S, S] in [-1, 1] -> logits [B, outputs].

    By default the logits are those of LABELS, side by side.
    """

    def __init__(self, outputs: int = LOGITS):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:])]
        layers.append(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        blocks = [nn.Sequential(layer, nn.GroupNorm(8, layer.out_channels), nn.SiLU()) for layer in layers]
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Linear(2 * widths[-1], outputs)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features = self.layers(pictures)
        # the mean says how much there is of a feature, the maximum whether there is any
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))

    @torch.no_grad()
    def read(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 [N, 3, S, S] -> the most likely value of each label, int64 [N, len(LABELS)]."""
        weight = self.head.weight
        logits = [self(to_floats(some).to(weight)) for some in pictures.to(weight.device).split(256)]
        return torch.stack([part.argmax(1) for part in torch.cat(logits).split(COUNTS, dim=1)], dim=1)


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte()


def save_parts(path: Path, tensors: dict, **metadata) -> None:
    """Write {name: tensor} in fp16, complete or not at all, with `metadata` as JSON values."""
    half = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path.with_suffix(".partial"), {key: json.dumps(value) for key, value in metadata.items()})
    path.with_suffix(".partial").replace(path)


def load_parts(path: Path, modules: dict) -> dict:
    """Fill {part: module} from a stage's file (its other parts are left alone) -> the file's metadata."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage `{path.stem}` first")
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for part, module in modules.items():
        module.load_state_dict(
            {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        )
    return metadata


def vocabulary_of(tokenizer) -> int:
    """A number that changes with the vocabulary: embeddings are of no use with another one."""
    return zlib.crc32(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())


def check_vocabulary(path: Path, metadata: dict, tokenizer) -> None:
    if metadata.get("vocabulary") != vocabulary_of(tokenizer):
        raise SystemExit(
            f"{path} was trained with another vocabulary: "
            "train `text`, `clip` and `unet` again, with one version of tokenizers"
        )


def load_pipeline(out: Path, size: int, stages: Iterable[str] = tuple(PARTS)):
    """The pipeline with the weights that `stages` have left in `out`, in fp32 on the CPU."""
    pipe = pipeline(size)
    for stage in stages:
        path = out / f"{stage}.safetensors"
        metadata = load_parts(path, {part: getattr(pipe, part) for part in PARTS[stage]})
        if stage == "vae":
            if "scaling_factor" not in metadata:
                raise SystemExit(f"{path} is not trained to the end: run the stage `vae` again")
            pipe.vae.register_to_config(scaling_factor=metadata["scaling_factor"])
        if stage == "text":
            check_vocabulary(path, metadata, pipe.tokenizer)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    return pipe


def load_judge(path: Path) -> Judge:
    judge = Judge()
    load_parts(path, dict(judge=judge))
    return judge.requires_grad_(False).eval()


def clip_scores(pictures: list[Image.Image], captions: list[str]) -> list[float]:
    """100 x cosine of each PIL image with its caption, by the small CLIP in demo/assets.

    The CLIP score of arXiv 2104.08718 without its factor of 2.5.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = demo_settings.ASSETS / "clip"
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = CLIPTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = clip(pixel_values=pixels, **texts)
    return (100 * (output.image_embeds * output.text_embeds).sum(-1)).tolist()  # both have a length of 1


def pack(out: Path, to: Path, size: int) -> None:
    """Assemble `to`/model (diffusers), `to`/clip (transformers) and `to`/judge.safetensors from the stages, in fp16."""
    from transformers import CLIPImageProcessor

    # What the stages have left
    pipe = load_pipeline(out, size)
    clip = clip_model(size, pipe.tokenizer)
    check_vocabulary(out / "clip.safetensors", load_parts(out / "clip.safetensors", dict(clip=clip)), pipe.tokenizer)

    # The folders that users load
    for folder in (to / "model", to / "clip"):
        shutil.rmtree(folder, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(to / "model")
    clip.half().save_pretrained(to / "clip")
    pipe.tokenizer.save_pretrained(to / "clip")
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(to / "clip")
    judge = load_judge(out / "judge.safetensors")
    save_parts(to / "judge.safetensors", {f"judge.{name}": tensor for name, tensor in judge.state_dict().items()})

    # Their sizes
    for name in ("model", "clip", "judge.safetensors"):
        files = [file for file in [to / name, *(to / name).rglob("*")] if file.is_file()]
        print(f"{to / name}: {sum(file.stat().st_size for file in files) / 1e6:.2f} MB in {len(files)} files")


def write_pictures(folder: Path, *, count: int, seed: int, size: int, full: bool = False) -> None:
    """A new folder of `count` ink drawings and metadata.jsonl: file_name, text and the attributes.

    The text leaves some attributes out, unless `full`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    attributes = world.draw_attributes(count, seed)
    pictures = painting.render(attributes, seed, "ink", size)
    texts = world.captions(attributes, seed, full)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i, (row, picture, text) in enumerate(zip(attributes, pictures, texts)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png", optimize=True)
            metadata.write(json.dumps({"file_name": f"{i:03d}.png", "text": text, **world.describe(row)}) + "\n")
