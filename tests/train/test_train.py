"""The trainers as a whole: what they write, and that every option changes what it should and nothing else."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

WEIGHTS = "pytorch_lora_weights.safetensors"
FIELDS = "step epoch loss mse lr grad_norm s_per_img peak_gib mse_t0 mse_t1 mse_t2 mse_t3".split()

# ---------------------------------------------------------------- files


def test_a_run_writes_the_documented_files(train, few_steps, tmp_path):
    flags = [
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        2,
        "--validation_prompt",
        "a cat",
        "--validation_steps",
        2,
    ]
    run = train(*flags, into=tmp_path / "style")
    written = sorted(str(path.relative_to(run.dir)) for path in run.dir.rglob("*") if path.is_file())
    assert written == sorted(
        [
            WEIGHTS,
            f"ema_unet/{WEIGHTS}",
            "pytorch_lora_weights_000002.safetensors",
            "pytorch_lora_weights_000004.safetensors",
            "kohya/style.safetensors",
            "kohya/style_ema.safetensors",
            *(f"checkpoint-{step}/state.{kind}" for step in ("000002", "000004") for kind in ("json", "safetensors")),
            "config.json",
            "metrics.jsonl",
            "training.png",
            "samples/000002_0.png",
            "samples/000004_0.png",
        ]
    )
    expected = {
        "output_dir": str(run.dir),
        "step": 4,
        "ended": "finished",
        "weights": str(run.dir / WEIGHTS),
        "metrics": run.rows[-1],
    }
    assert run.result == expected
    with Image.open(run.dir / "training.png") as plot:
        assert min(plot.size) > 300 and len(plot.convert("L").getcolors(256)) > 10


def test_without_an_average_there_is_no_ema_folder(train):
    run = train("--max_train_steps", 1, "--no_use_ema")
    assert not (run.dir / "ema_unet").exists()


def test_config_json_is_what_was_trained_with(train, demo):
    run = train("--max_train_steps", 1, "--lora-alpha", 4)
    config = json.loads((run.dir / "config.json").read_text())
    assert (
        config["flags"]["lora_alpha"] == 4
        and config["flags"]["min_snr_gamma"] == 5.0
        and config["flags"]["output_dir"] == str(run.dir)
    )
    assert config["base_model"] == str(demo.model) and config["data"]["images"] == 24
    with safe_open(run.dir / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == config


@pytest.mark.parametrize("kind", ["final", "ema", "kohya", "kohya_ema"])
def test_the_files_load_in_plain_diffusers_at_full_strength(train, demo, kind):
    """alpha 4 at rank 8: a loader that is not told would take alpha = rank. The UNet's answer is W + alpha / r * B A."""
    from diffusers import StableDiffusionXLPipeline

    run = train("--max_train_steps", 3, "--lr_warmup_steps", 0, "--learning_rate", 1e-2, "--lora_alpha", 4)
    pipeline = StableDiffusionXLPipeline.from_pretrained(demo.model)
    unet, generator = pipeline.unet, torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 80), (2, 64)))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}

    @torch.no_grad()
    def answer():
        return unet(x, 500, text, added_cond_kwargs=conditions).sample

    base, state = answer(), {name: values.clone() for name, values in unet.state_dict().items()}
    weights = run.weights(f"ema_unet/{WEIGHTS}" if "ema" in kind else WEIGHTS)
    for name in {name.partition(".lora.")[0] for name in weights}:
        down, up = weights[f"{name}.lora.down.weight"], weights[f"{name}.lora.up.weight"]
        unet.get_submodule(name.removeprefix("unet.")).weight.data += 4 / 8 * (up @ down)
    expected = answer()
    unet.load_state_dict(state)
    kohya = {f"kohya{ending}": run.dir / "kohya" / f"{run.dir.name}{ending}.safetensors" for ending in ("", "_ema")}
    where = {"final": run.dir, "ema": run.dir / "ema_unet", **kohya}[kind]
    pipeline.load_lora_weights(where)
    change = (expected - base).abs().max()
    assert change > 1e-3
    assert (answer() - expected).abs().max() < (1e-2 if kind in kohya else 1e-4) * change  # kohya's file is fp16


def test_every_metrics_row_has_the_documented_fields(train):
    run = train("--max_train_steps", 5, "--lr_warmup_steps", 2)
    for step, row in enumerate(run.rows, 1):
        assert set(FIELDS) <= row.keys()
        assert row["step"] == step and row["epoch"] == pytest.approx(step * 8 / 24, abs=1e-3)
        assert all(isinstance(row[name], float) and math.isfinite(row[name]) for name in FIELDS[2:8])
        assert row["s_per_img"] > 0 and 0.05 < row["peak_gib"] < 64
        quarters = [row[f"mse_t{i}"] for i in range(4) if row[f"mse_t{i}"] is not None]
        assert min(quarters) <= row["mse"] * (1 + 1e-6) and row["mse"] <= max(quarters) * (1 + 1e-6)
        assert row["loss"] <= row["mse"]  # Min-SNR only turns down
    assert run.rows[0]["lr"] == 0 and run.rows[2]["lr"] == pytest.approx(1e-3)


def test_the_mse_of_a_row_is_the_mean_of_its_quarters(train, assemble):
    run, examples = train("--max_train_steps", 2), assemble().data.examples
    for number, row in enumerate(run.rows):
        (batch,) = examples.effective_batch(number, 8, 8)
        counts = torch.bincount(batch.tensors["t"] // 250, minlength=4).tolist()
        assert [row[f"mse_t{i}"] is None for i in range(4)] == [count == 0 for count in counts]
        assert sum((row[f"mse_t{i}"] or 0) * count for i, count in enumerate(counts)) / 8 == pytest.approx(
            row["mse"], rel=1e-5
        )


def test_plain_mse_is_the_loss_of_train_sdxl_and_the_mse_of_both(train):
    """So that scripts with different losses can be compared: with the same noise the first mse is the same."""
    sdxl, opt = (
        train("--max_train_steps", 1, script="train_sdxl"),
        train("--max_train_steps", 1, "--offset_noise_strength", 0),
    )
    assert sdxl.rows[0]["loss"] == sdxl.rows[0]["mse"]
    assert (
        opt.rows[0]["mse"] == pytest.approx(sdxl.rows[0]["mse"], rel=1e-6) and opt.rows[0]["loss"] < opt.rows[0]["mse"]
    )


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("--max_train_steps", 3, "--report_to", "tensorboard")
    scalars = {}
    for folder in {path.parent for path in run.dir.rglob("events.out.tfevents.*")}:
        accumulator = EventAccumulator(str(folder)).Reload()
        scalars.update({tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]})
    for name in ("loss", "lr", "grad_norm"):
        assert [event.step for event in scalars[name]] == [1, 2, 3]
        assert [event.value for event in scalars[name]] == pytest.approx([row[name] for row in run.rows], rel=1e-6)


def test_steps_follow_from_epochs_where_no_number_of_steps_is_given(train):
    """20 samples, 8 at a time, 2 epochs: 5 steps; the last window runs into a third epoch rather than being cut."""
    from common.train.run_length import total_steps

    assert (
        total_steps(None, 2, 20, 8) == 5
        and total_steps(None, 15, 1221, 8) == 2290
        and total_steps(3000, 15, 1221, 8) == 3000
    )
    assert train("--max_train_samples", 20, "--max_train_steps", 3).rows[-1]["epoch"] == pytest.approx(24 / 20)


# ---------------------------------------------------------------- the same run twice


def test_the_same_command_gives_the_same_bits(train, plain):
    again = train("--max_train_steps", 4)
    assert again.numbers == plain.numbers
    assert again.same_weights(plain) and again.same_weights(plain, f"ema_unet/{WEIGHTS}")


def test_an_empty_cache_and_a_full_one_give_the_same_bits(train, plain, tmp_path):
    """Loading VAE and text encoders must not use up random numbers of the adapter's initialisation."""
    flags = ["--max_train_steps", 4, "--cache_dir", tmp_path / "cache"]
    cold, warm = train(*flags), train(*flags)
    assert cold.numbers == warm.numbers and cold.same_weights(warm)
    assert cold.losses == pytest.approx(
        plain.losses, rel=1e-5
    )  # other tests may have filled that cache in batches of other sizes


def test_another_seed_gives_another_run(train, plain):
    assert all(a != b for a, b in zip(train("--max_train_steps", 2, "--seed", 43).losses, plain.losses))


def test_gradient_checkpointing_changes_memory_not_numbers(train, plain):
    run = train("--max_train_steps", 4, "--gradient_checkpointing")
    assert run.losses == pytest.approx(plain.losses, rel=1e-6)
    assert [row["grad_norm"] for row in run.rows] == pytest.approx([row["grad_norm"] for row in plain.rows], rel=1e-5)


def test_gradient_checkpointing_is_what_recomputes(assemble):
    """Twice the forward passes of every block, if it is on."""

    def forwards(*flags):
        parts, count = assemble(*flags), []
        parts.engine.unet.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(
            lambda *_: count.append(1)
        )
        parts.engine.step(1, parts.data.examples.effective_batch(0, 8, 8))
        return len(count)

    assert (forwards("--no_gradient_checkpointing"), forwards("--gradient_checkpointing")) == (1, 2)


def test_where_text_embeddings_are_kept_changes_no_loss(train, plain, tmp_path):
    runs = {
        mode: train("--max_train_steps", 4, "--text_cache", mode, "--cache_dir", tmp_path / mode)
        for mode in ("ram", "disk", "none")
    }
    assert runs["ram"].losses == runs["disk"].losses
    for mode in runs:
        assert runs[mode].losses == pytest.approx(plain.losses, rel=1e-5), mode
    on_disk = {mode: any((tmp_path / mode).glob("text/**/*.safetensors")) for mode in runs}
    assert on_disk == {"ram": False, "disk": True, "none": False}


def test_text_is_encoded_live_with_caption_dropout_and_validation_too(train, few_steps):
    flags = [
        "--max_train_steps",
        3,
        "--caption_dropout",
        0.4,
        "--validation_split",
        0.25,
        "--validation_prompt",
        "a cat",
        "--validation_steps",
        3,
    ]
    cached, live = train(*flags), train(*flags, "--text_cache", "none")
    assert live.losses == pytest.approx(cached.losses, rel=1e-5)
    assert live.rows[-1]["val_loss"] == pytest.approx(cached.rows[-1]["val_loss"], rel=1e-5)
    difference = np.asarray(Image.open(live.dir / "samples/000003_0.png"), int) - np.asarray(
        Image.open(cached.dir / "samples/000003_0.png"), int
    )
    assert abs(difference).max() <= 2


def test_lora_dropout_is_reproducible_and_not_nothing(train, plain):
    flags = ["--max_train_steps", 4, "--lora_dropout", 0.4]
    first, again = train(*flags), train(*flags)
    assert first.numbers == again.numbers and first.same_weights(again)
    assert first.losses[0] == plain.losses[0]  # B = 0: there is nothing to drop yet
    assert first.losses[1:] != plain.losses[1:]
    assert train(*flags, "--gradient_checkpointing").losses == pytest.approx(first.losses, rel=1e-5)


def test_8bit_adam_follows_adamw(train):
    """The same path within the rounding of its state, not the same numbers."""
    flags = ["--max_train_steps", 6, "--lr_warmup_steps", 0]
    exact, rounded = train(*flags), train(*flags, "--use_8bit_adam")
    assert rounded.losses == pytest.approx(exact.losses, rel=1e-2)
    assert not exact.same_weights(rounded)
    tensors = rounded.weights("checkpoint-000006/state.safetensors")
    assert torch.uint8 in {values.dtype for values in tensors.values()}


def test_training_learns(train):
    """The loss at fixed noise falls: all of the above would hold for a sign error in the update too."""
    flags = [
        "--max_train_steps",
        20,
        "--lr_warmup_steps",
        2,
        "--learning_rate",
        1e-2,
        "--validation_split",
        0.25,
        "--validation_steps",
        5,
    ]
    losses = [row["val_loss"] for row in train(*flags).rows if "val_loss" in row]
    assert losses[-1] < 0.98 * losses[0]


def test_max_train_samples_trains_on_the_first(assemble):
    parts = assemble("--max_train_samples", 3)
    assert {name[-7:] for batch in parts.data.examples.effective_batch(0, 8, 8) for name in batch.names} == {
        "000.png",
        "001.png",
        "002.png",
    }


# ---------------------------------------------------------------- called from a notebook


def test_a_second_call_in_one_process_starts_clean_and_the_first_leaves_no_model(train, monkeypatch):
    """Same losses, and the model of the first run is gone when the second one begins."""
    import gc
    import weakref

    from common.model import loading

    load, models = loading.load_unet, []
    monkeypatch.setattr(loading, "load_unet", lambda *rest: models.append(weakref.ref(unet := load(*rest))) or unet)
    first = train("--max_train_steps", 2)
    second = train("--max_train_steps", 2)
    assert first.losses == second.losses and first.result["metrics"] == first.rows[-1]
    gc.collect()
    assert [model() for model in models] == [None, None]
