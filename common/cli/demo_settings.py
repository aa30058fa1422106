"""What `--demo` means.

It trains the small SDXL on the ink drawings in demo/assets. Where those are absent
(one-file scripts) or not wanted (tests), the tiny random SDXL of common/model/tiny.py and its images take their place.
"""

import os
from pathlib import Path

import common

ASSETS = Path(common.__file__).resolve().parents[1] / "demo" / "assets"
# The small UNet has attention at 8 x 8 and 4 x 4 latents only: its adapter takes in the other linear layers there too.
SMALL_DEMO = dict(
    resolution=128,
    train_batch_size=8,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,
    max_train_steps=250,
    lr_warmup_steps=10,
    learning_rate=2e-3,
    caption_dropout=0.1,
    lora_target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
    checkpointing_steps=125,
    validation_steps=125,
    steps=20,
    guidance_scale=5.0,
    prompts=[
        "a smiling boy with short blond hair and blue eyes wearing a red hoodie in front of the sea",
        "a portrait of a girl with black hair in a ponytail and green eyes wearing a purple kimono "
        "in front of a night sky",
        "a laughing woman with long red hair and purple eyes wearing a green jacket in front of a forest",
    ],
)
TINY_DEMO = dict(
    resolution=64,
    max_train_steps=24,
    lr_warmup_steps=4,
    learning_rate=1e-3,
    checkpointing_steps=12,
    validation_steps=12,
    steps=8,
    prompts=[
        "a laughing boy with blue eyes and orange hair, dressed in black, in front of a green hill",
        "a smiling girl with green eyes and pink hair, dressed in white, in front of the sea",
        "a smiling cat with brown eyes and yellow fur, dressed in blue, in front of a sunset",
    ],
)
# Part of the folder names: raise it when common/model/tiny.py or common/model/tiny_pictures.py builds something else.
VERSION = 2


def is_tiny() -> bool:
    """Whether the random model stands in for the trained one: that is absent, or TINY_DEMO=1 is set, as in tests."""
    return os.environ.get("TINY_DEMO") == "1" or not (ASSETS / "model").is_dir()


def demo_settings(root: Path) -> dict:
    """What --demo sets, by flag; the tiny model and its images belong under `root`, and may not be there yet."""
    if is_tiny():
        own = TINY_DEMO
        model = root / f"model-v{VERSION}"
        data = root / f"data-v{VERSION}"
    else:
        own = SMALL_DEMO
        model = ASSETS / "model"
        data = ASSETS / "data"
    return dict(pretrained_model_name_or_path=str(model), train_data_dir=[str(data)], **own)
