"""Held-out losses, early stopping and validation images: repeatable, and no trace of them in the training."""

import numpy as np
import pytest
import torch
from PIL import Image


def test_the_validation_loss_is_the_same_whenever_the_weights_are(train):
    """Fixed noise and timesteps: with a learning rate of almost nothing it does not move, while the training loss does."""
    flags = ["--max_train_steps", 3, "--learning_rate", 1e-30, "--validation_split", 0.25, "--validation_steps", 1]
    run = train(*flags)
    assert len({row["val_loss"] for row in run.rows}) == 1 and len(set(run.losses)) == 3


def test_the_validation_loss_does_not_depend_on_batch_size_or_training_noise(train):
    flags = ["--max_train_steps", 1, "--validation_split", 0.25]
    runs = [
        train(*flags, "--train_batch_size", 1, "--gradient_accumulation_steps", 8),
        train(*flags, "--train_batch_size", 3),
        train(*flags, "--offset_noise_strength", 0.5, "--caption_dropout", 0.5),
        train(*flags, script="train_sdxl"),
    ]
    losses = [run.rows[-1]["val_loss"] for run in runs]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_held_out_samples_are_not_trained_on_and_validation_does_not_disturb(train, assemble, few_steps):
    parts = assemble("--validation_split", 0.25)
    held_out = {sample.name for sample in parts.data.held_out.latents.samples}
    trained = {name for number in range(9) for name in batch_of_names(parts, number)}
    assert len(held_out) == 6 and len(trained) == 18 and not held_out & trained
    flags = ["--max_train_steps", 4, "--validation_split", 0.25, "--validation_prompt", "a cat"]
    often, once = train(*flags, "--validation_steps", 1), train(*flags, "--validation_steps", 4)
    assert often.losses == once.losses and often.same_weights(once)
    assert ["val_loss" in row for row in often.rows] == [True] * 4 and ["val_loss" in row for row in once.rows] == [
        False
    ] * 3 + [True]


def batch_of_names(parts, number):
    return [name for batch in parts.data.examples.effective_batch(number, 8, 8) for name in batch.names]


def test_early_stopping_stops_a_run_that_does_not_get_better(train):
    flags = ["--max_train_steps", 20, "--learning_rate", 1e-30, "--validation_split", 0.25, "--validation_steps", 2]
    run = train(*flags, "--early_stopping_patience", 2)
    assert (run.result["ended"], run.result["step"]) == (
        "early stopping",
        6,
    )  # the first validation, and two without a gain
    assert (run.dir / "checkpoint-000006").is_dir() and (run.dir / "pytorch_lora_weights.safetensors").exists()


def test_patience_counts_validations_since_the_best_one(train, monkeypatch):
    from common.train.engine import Engine

    flags = [
        "--max_train_steps",
        12,
        "--validation_split",
        0.25,
        "--validation_steps",
        1,
        "--early_stopping_patience",
        2,
    ]
    for losses, stop in (([3, 2, 2.5, 1, 1.5, 1.2], 6), ([5, 4, 3, 2, 1] + [0.5] * 9, 8), ([1, 2, float("nan")], 3)):
        scripted = iter(losses)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "validate", lambda self, make, size, scripted=scripted: next(scripted))
            run = train(*flags)
        assert (run.result["ended"], run.result["step"]) == ("early stopping", stop)
        assert [row["val_loss"] for row in run.rows[:2]] == losses[:2]


def test_validation_images_are_drawn_with_one_seed_each(train, few_steps):
    """Every prompt at every validation; the same picture when only the other prompts change, another one when the weights do."""
    flags = ["--max_train_steps", 4, "--validation_steps", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0]
    both = train(*flags, "--validation_prompt", "a cat", "--validation_prompt", "a boy with blue eyes")
    one = train(*flags, "--validation_prompt", "a cat")
    names = sorted(path.name for path in (both.dir / "samples").iterdir())
    assert names == ["000002_0.png", "000002_1.png", "000004_0.png", "000004_1.png"]
    images = {name: np.asarray(Image.open(both.dir / "samples" / name), int) for name in names}
    assert all(image.shape == (64, 64, 3) and image.std() > 1 for image in images.values())
    assert (images["000002_0.png"] == np.asarray(Image.open(one.dir / "samples/000002_0.png"), int)).all()
    assert (
        abs(images["000002_0.png"] - images["000002_1.png"]).max() > 2
        and abs(images["000002_0.png"] - images["000004_0.png"]).max() > 0
    )


def test_a_validation_image_is_what_plain_diffusers_draws_with_the_average(train, demo):
    from diffusers import StableDiffusionXLPipeline

    flags = [
        "--max_train_steps",
        3,
        "--learning_rate",
        1e-2,
        "--lr_warmup_steps",
        0,
        "--validation_prompt",
        "a laughing cat",
    ]
    run = train(*flags)
    pipeline = StableDiffusionXLPipeline.from_pretrained(demo.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.dir / "ema_unet")
    options = dict(height=64, width=64, num_inference_steps=30, guidance_scale=7.5)
    (image,) = pipeline("a laughing cat", generator=torch.Generator().manual_seed(42), **options).images
    drawn = np.asarray(Image.open(run.dir / "samples/000003_0.png"), int)
    assert abs(np.asarray(image, int) - drawn).max() <= 2
