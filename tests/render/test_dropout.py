"""An adapter that was trained with dropout is drawn without: twice the same, alone and beside others, merged, and in plain diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

import infer
from common.adapter_files import diffusers_format, peft_format
from common.cli.demo_settings import TINY_DEMO

PROMPT, OTHER = TINY_DEMO["prompts"][:2]
SCRIPTS = {"train_sdxl": 0.0, "train_opt": 0.0, "train_qlora": 0.1, "train_dora": 0.1}  # lora_dropout, by default


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request, train):
    """A short run of each script, with its own defaults for the adapter."""
    flags = ["--max_train_steps", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--save_peft"]
    folder = train(*flags, script=request.param).dir
    return request.param, folder


def draw(folder, *flags, prompt=PROMPT):
    """infer.py -> pixels of PROMPT."""
    manifest = infer.main(
        ["--demo", "--steps", "2", "--output_dir", str(folder), "--prompt", prompt, PROMPT, *map(str, flags)]
    )
    return pixels(
        Image.open(folder / next(record["file"] for record in manifest["images"] if record["prompt"] == PROMPT))
    )


def pixels(image):
    return np.asarray(image).astype(int)


def test_one_seed_is_one_picture_whoever_draws_it_and_whatever_is_drawn_beside_it(run, demo, tmp_path):
    _, folder = run
    alone = draw(tmp_path / "alone", "--lora", folder)
    assert np.array_equal(alone, draw(tmp_path / "again", "--lora", folder))
    assert np.abs(alone - draw(tmp_path / "beside", "--lora", folder, prompt=OTHER)).max() <= 1

    pipeline = StableDiffusionXLPipeline.from_pretrained(demo.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    options = dict(height=64, width=64, num_inference_steps=2, guidance_scale=7.5)
    plain = [
        pixels(pipeline(PROMPT, **options, generator=torch.Generator().manual_seed(42)).images[0]) for _ in range(2)
    ]
    assert np.array_equal(*plain) and np.abs(alone - plain[0]).max() <= 1

    infer.main(["--demo", "--merge", str(tmp_path / "merged"), "--lora", str(folder)])
    merged = draw(tmp_path / "of_merged", "--pretrained_model_name_or_path", tmp_path / "merged")
    assert np.abs(alone - merged).max() <= 2 < np.abs(alone - draw(tmp_path / "base")).max()


def test_what_loaders_read_says_no_dropout_and_the_recipe_tells_the_truth(run):
    script, folder = run
    with safe_open(folder / diffusers_format.WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert not json.loads(metadata[diffusers_format.ADAPTER_METADATA]).get("unet.lora_dropout")
    assert json.loads((folder / "peft" / peft_format.PEFT_CONFIG).read_text())["lora_dropout"] == 0
    assert json.loads(metadata["recipe"])["flags"]["lora_dropout"] == SCRIPTS[script]
