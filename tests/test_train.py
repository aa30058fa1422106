"""The trainers as a whole: what they write, and that every option changes what it should and nothing else."""

import json
import math
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from common.command_line import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
FIELDS = "step epoch loss mse lr grad_norm s_per_img peak_gib mse_t0 mse_t1 mse_t2 mse_t3".split()


def equal_weights(run, other, name=WEIGHTS):
    a, b = run.weights(name), other.weights(name)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def batch_of(parts, number=0):
    """Effective batch `number` as {name of the sample: {field: tensor}}; 8 samples, none twice."""
    batches = parts.data.examples.effective_batch(number, 8, 8)
    return {name: {key: values[i] for key, values in batch.tensors.items()} for batch in batches for i, name in enumerate(batch.names)}


@pytest.fixture
def few_steps(monkeypatch):
    """Validation images of 4 denoising steps instead of 30."""
    from common import sampling

    monkeypatch.setattr(sampling, "STEPS", 4)


# ---------------------------------------------------------------- files


def test_a_run_writes_the_documented_files(train, few_steps, tmp_path):
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--validation_prompt", "a cat", "--validation_steps", 2]
    run = train(*flags, into=tmp_path / "style")
    written = sorted(str(path.relative_to(run.dir)) for path in run.dir.rglob("*") if path.is_file())
    assert written == sorted(
        [
            WEIGHTS,
            f"ema_unet/{WEIGHTS}",
            "pytorch_lora_weights_000002.safetensors",
            "pytorch_lora_weights_000004.safetensors",
            "kohya/style.safetensors",
            *(f"checkpoint-{step}/state.{kind}" for step in ("000002", "000004") for kind in ("json", "safetensors")),
            "config.json",
            "metrics.jsonl",
            "training.png",
            "samples/000002_0.png",
            "samples/000004_0.png",
        ]
    )
    expected = {"output_dir": str(run.dir), "step": 4, "ended": "finished", "weights": str(run.dir / WEIGHTS), "metrics": run.rows[-1]}
    assert run.result == expected
    with Image.open(run.dir / "training.png") as plot:
        assert min(plot.size) > 300 and len(plot.convert("L").getcolors(256)) > 10


def test_without_an_average_there_is_no_ema_folder(train):
    run = train("--max_train_steps", 1, "--no_use_ema")
    assert not (run.dir / "ema_unet").exists()


def test_config_json_is_what_was_trained_with(train, demo):
    run = train("--max_train_steps", 1, "--lora-alpha", 4)
    config = json.loads((run.dir / "config.json").read_text())
    assert config["flags"]["lora_alpha"] == 4 and config["flags"]["min_snr_gamma"] == 5.0 and config["flags"]["output_dir"] == str(run.dir)
    assert config["base_model"] == str(demo.model) and config["data"]["images"] == 24
    with safe_open(run.dir / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == config


@pytest.mark.parametrize("kind", ["final", "ema", "kohya"])
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
    weights = run.weights(f"ema_unet/{WEIGHTS}" if kind == "ema" else WEIGHTS)
    for name in {name.partition(".lora.")[0] for name in weights}:
        down, up = weights[f"{name}.lora.down.weight"], weights[f"{name}.lora.up.weight"]
        unet.get_submodule(name.removeprefix("unet.")).weight.data += 4 / 8 * (up @ down)
    expected = answer()
    unet.load_state_dict(state)
    where = {"final": run.dir, "ema": run.dir / "ema_unet", "kohya": next((run.dir / "kohya").glob("*.safetensors"))}[kind]
    pipeline.load_lora_weights(where)
    change = (expected - base).abs().max()
    assert change > 1e-3
    assert (answer() - expected).abs().max() < (1e-2 if kind == "kohya" else 1e-4) * change  # kohya's file is fp16


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
        assert sum((row[f"mse_t{i}"] or 0) * count for i, count in enumerate(counts)) / 8 == pytest.approx(row["mse"], rel=1e-5)


def test_plain_mse_is_the_loss_of_train_sdxl_and_the_mse_of_both(train):
    """So that scripts with different losses can be compared: with the same noise the first mse is the same."""
    sdxl, opt = train("--max_train_steps", 1, script="train_sdxl"), train("--max_train_steps", 1, "--offset_noise_strength", 0)
    assert sdxl.rows[0]["loss"] == sdxl.rows[0]["mse"]
    assert opt.rows[0]["mse"] == pytest.approx(sdxl.rows[0]["mse"], rel=1e-6) and opt.rows[0]["loss"] < opt.rows[0]["mse"]


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
    from common.loops import total_steps

    assert total_steps(None, 2, 20, 8) == 5 and total_steps(None, 15, 1221, 8) == 2290 and total_steps(3000, 15, 1221, 8) == 3000
    assert train("--max_train_samples", 20, "--max_train_steps", 3).rows[-1]["epoch"] == pytest.approx(24 / 20)


# ---------------------------------------------------------------- the same run twice


def test_the_same_command_gives_the_same_bits(train, plain):
    again = train("--max_train_steps", 4)
    assert again.numbers == plain.numbers
    assert equal_weights(again, plain) and equal_weights(again, plain, f"ema_unet/{WEIGHTS}")


def test_an_empty_cache_and_a_full_one_give_the_same_bits(train, plain, tmp_path):
    """Loading VAE and text encoders must not use up random numbers of the adapter's initialisation."""
    flags = ["--max_train_steps", 4, "--cache_dir", tmp_path / "cache"]
    cold, warm = train(*flags), train(*flags)
    assert cold.numbers == warm.numbers == plain.numbers
    assert equal_weights(cold, warm) and equal_weights(cold, plain)


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
        parts.engine.unet.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(lambda *_: count.append(1))
        parts.engine.step(1, parts.data.examples.effective_batch(0, 8, 8))
        return len(count)

    assert (forwards("--no_gradient_checkpointing"), forwards("--gradient_checkpointing")) == (1, 2)


def test_where_text_embeddings_are_kept_changes_no_loss(train, plain, tmp_path):
    runs = {mode: train("--max_train_steps", 4, "--text_cache", mode, "--cache_dir", tmp_path / mode) for mode in ("ram", "disk", "none")}
    assert runs["ram"].losses == runs["disk"].losses == plain.losses
    assert runs["none"].losses == pytest.approx(plain.losses, rel=1e-5)
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
    assert first.numbers == again.numbers and equal_weights(first, again)
    assert first.losses[0] == plain.losses[0]  # B = 0: there is nothing to drop yet
    assert first.losses[1:] != plain.losses[1:]
    assert train(*flags, "--gradient_checkpointing").losses == pytest.approx(first.losses, rel=1e-5)


def test_8bit_adam_follows_adamw(train):
    """The same path within the rounding of its state, not the same numbers."""
    flags = ["--max_train_steps", 6, "--lr_warmup_steps", 0]
    exact, rounded = train(*flags), train(*flags, "--use_8bit_adam")
    assert rounded.losses == pytest.approx(exact.losses, rel=1e-2)
    assert not equal_weights(exact, rounded)
    tensors = rounded.weights("checkpoint-000006/state.safetensors")
    assert torch.uint8 in {values.dtype for values in tensors.values()}


def test_training_learns(train):
    """The loss at fixed noise falls: all of the above would hold for a sign error in the update too."""
    flags = ["--max_train_steps", 20, "--lr_warmup_steps", 2, "--learning_rate", 1e-2, "--validation_split", 0.25, "--validation_steps", 5]
    losses = [row["val_loss"] for row in train(*flags).rows if "val_loss" in row]
    assert losses[-1] < 0.98 * losses[0]


# ---------------------------------------------------------------- augmentation


def test_buckets_keep_the_aspect_ratio_and_tell_the_unet(assemble):
    parts = assemble("--aspect_ratio_buckets")
    shapes = set()
    for fields in (fields for number in range(3) for fields in batch_of(parts, number).values()):
        height, width, top, left, target_height, target_width = fields["time_ids"].tolist()
        assert fields["mean"].shape == (4, target_height // 8, target_width // 8)
        assert (height > width) == (target_height > target_width) and (height < width) == (target_height < target_width)
        shapes.add(tuple(fields["mean"].shape))
    assert len(shapes) == 3
    assert {batch.tensors["mean"].shape[0] for batch in parts.data.examples.effective_batch(0, 8, 4)} <= {1, 2, 3, 4}


def test_buckets_and_squares_train_differently(train, plain):
    run = train("--max_train_steps", 3, "--aspect_ratio_buckets")
    assert all(a != b for a, b in zip(run.losses, plain.losses)) and all(math.isfinite(loss) for loss in run.losses)


def test_a_flip_mirrors_half_of_the_examples_and_leaves_the_rest_alone(assemble):
    """A flipped example has the moments of the mirrored picture and its left crop; noise, timestep and caption stay."""
    straight, flipped = assemble(), assemble("--random_flip")
    cache, mirrored = flipped.data.examples.latents, 0
    index_of = {sample.name: i for i, sample in enumerate(cache.samples)}
    for number in range(6):
        for name, a in batch_of(straight, number).items():
            b, i = batch_of(flipped, number)[name], index_of[name]
            for key in ("t", "eps", "posterior_eps", "prompt_embeds", "pooled", "keep_text", "weight"):
                assert torch.equal(a[key], b[key]), key
            if torch.equal(b["mean"], a["mean"]):
                assert torch.equal(a["time_ids"], b["time_ids"])
                continue
            mirrored += 1
            assert torch.equal(b["mean"], cache.moments(i, flip=True)[0]) and torch.equal(b["std"], cache.moments(i, flip=True)[1])
            framing = cache.framings[i]
            assert b["time_ids"][3] == framing.resized[0] - framing.left - framing.width
            assert a["time_ids"][3] == framing.left
    assert 12 <= mirrored <= 36  # of 48


def test_a_dropped_caption_is_the_unconditional_input_and_nothing_else_changes(assemble):
    with_captions, dropped = assemble(), assemble("--caption_dropout", 0.5)
    inputs, count = [], 0
    unet = dropped.engine.unet
    unet.register_forward_pre_hook(
        lambda module, args, options: inputs.append((args[2], options["added_cond_kwargs"]["text_embeds"])), with_kwargs=True
    )
    for number in range(6):
        before, after = (parts.data.examples.effective_batch(number, 8, 8)[0] for parts in (with_captions, dropped))
        assert before.names == after.names
        for key in ("t", "eps", "posterior_eps", "mean", "std", "time_ids"):
            assert torch.equal(before.tensors[key], after.tensors[key]), key
        with torch.no_grad():
            dropped.engine.predict(after.tensors)
        for keep, text, pooled, caption in zip(after.tensors["keep_text"], *inputs.pop(), before.tensors["prompt_embeds"]):
            assert torch.equal(text, caption if keep else torch.zeros_like(caption))
            assert bool(pooled.any()) == bool(keep)
            count += not keep
    assert 12 <= count <= 36  # of 48


def test_a_model_with_an_encoded_empty_prompt_is_trained_on_that(assemble, demo, tmp_path):
    """Where the pipeline does not force zeros, its unconditional input is the empty prompt's embedding."""
    shutil.copytree(demo.model, tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    parts = assemble("--caption_dropout", 0.5, "--pretrained_model_name_or_path", tmp_path / "model")
    zeroed = batch_of(assemble("--caption_dropout", 0.5))
    empty = parts.data.text.fields("")
    dropped = [fields for name, fields in batch_of(parts).items() if not zeroed[name]["keep_text"]]
    kept = [fields for name, fields in batch_of(parts).items() if zeroed[name]["keep_text"]]
    assert dropped and kept and empty["prompt_embeds"].any()
    for fields in dropped:
        assert fields["keep_text"] == 1 and torch.equal(fields["prompt_embeds"], empty["prompt_embeds"])
        assert torch.equal(fields["pooled"], empty["pooled"])
    assert not any(torch.equal(fields["prompt_embeds"], empty["prompt_embeds"]) for fields in kept)


def test_random_crops_differ_from_the_middle_and_are_the_same_every_time(assemble):
    middle, random, again = (batch_of(assemble(*flags)) for flags in ([], ["--no_center_crop"], ["--no_center_crop"]))
    lefts = {name: [run[name]["time_ids"][2:4].tolist() for run in (middle, random, again)] for name in middle}
    assert all(random == again for _, random, again in lefts.values())
    assert any(middle != random for middle, random, _ in lefts.values())


def test_max_train_samples_trains_on_the_first(assemble):
    parts = assemble("--max_train_samples", 3)
    assert {name[-7:] for batch in parts.data.examples.effective_batch(0, 8, 8) for name in batch.names} == {
        "000.png",
        "001.png",
        "002.png",
    }


def test_bad_images_count_together_however_they_are_found_out(train, demo, tmp_path):
    """One that is no image, and one whose end is missing: two."""
    shutil.copytree(demo.data, tmp_path / "data")
    (tmp_path / "data/003.png").write_text("not an image")
    Image.open(tmp_path / "data/005.png").convert("RGB").save(tmp_path / "data/005.png", "JPEG")
    data = (tmp_path / "data/005.png").read_bytes()
    (tmp_path / "data/005.png").write_bytes(data[: len(data) // 2])
    flags = ["--max_train_steps", 1, "--train_data_dir", tmp_path / "data"]
    with pytest.raises(UserError, match="003.png"):
        train(*flags)
    with pytest.raises(UserError, match="005.png.*--max_bad_images 2"):
        train(*flags, "--max_bad_images", 1, into=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run = train(*flags, "--max_bad_images", 2)
    assert json.loads((run.dir / "config.json").read_text())["data"]["images"] == 22


# ---------------------------------------------------------------- validation


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
    assert often.losses == once.losses and equal_weights(often, once)
    assert ["val_loss" in row for row in often.rows] == [True] * 4 and ["val_loss" in row for row in once.rows] == [False] * 3 + [True]


def batch_of_names(parts, number):
    return [name for batch in parts.data.examples.effective_batch(number, 8, 8) for name in batch.names]


def test_early_stopping_stops_a_run_that_does_not_get_better(train):
    flags = ["--max_train_steps", 20, "--learning_rate", 1e-30, "--validation_split", 0.25, "--validation_steps", 2]
    run = train(*flags, "--early_stopping_patience", 2)
    assert (run.result["ended"], run.result["step"]) == ("early stopping", 6)  # the first validation, and two without a gain
    assert (run.dir / "checkpoint-000006").is_dir() and (run.dir / WEIGHTS).exists()


def test_patience_counts_validations_since_the_best_one(train, monkeypatch):
    from common.engine import Engine

    flags = ["--max_train_steps", 12, "--validation_split", 0.25, "--validation_steps", 1, "--early_stopping_patience", 2]
    for losses, stop in (([3, 2, 2.5, 1, 1.5, 1.2], 6), ([5, 4, 3, 2, 1] + [0.5] * 9, 8), ([1, 2, float("nan")], 3)):
        scripted = iter(losses)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "validate", lambda self, batches, scripted=scripted: next(scripted))
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
    assert abs(images["000002_0.png"] - images["000002_1.png"]).max() > 2 and abs(images["000002_0.png"] - images["000004_0.png"]).max() > 0


def test_a_validation_image_is_what_plain_diffusers_draws_with_the_average(train, demo):
    from diffusers import StableDiffusionXLPipeline

    flags = ["--max_train_steps", 3, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--validation_prompt", "a laughing cat"]
    run = train(*flags)
    pipeline = StableDiffusionXLPipeline.from_pretrained(demo.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.dir / "ema_unet")
    options = dict(height=64, width=64, num_inference_steps=30, guidance_scale=7.5)
    (image,) = pipeline("a laughing cat", generator=torch.Generator().manual_seed(42), **options).images
    drawn = np.asarray(Image.open(run.dir / "samples/000003_0.png"), int)
    assert abs(np.asarray(image, int) - drawn).max() <= 2


# ---------------------------------------------------------------- a hub that is not there


@pytest.fixture
def silent_hub():
    """Address of a server that takes connections and never answers."""
    server, taken = socket.create_server(("127.0.0.1", 0)), []

    def take():
        try:
            while True:
                taken.append(server.accept())
        except OSError:  # closed
            return

    threading.Thread(target=take, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("hub", ["refusing", "silent"])
def test_an_unreachable_hub_gets_one_line_within_ten_seconds(root, start, silent_hub, tmp_path, hub):
    """And what to do without it. The libraries alone would try again for 47 s. Nothing is written."""
    (tmp_path / "work").mkdir()
    started = time.monotonic()
    address = silent_hub if hub == "silent" else "http://127.0.0.1:9"
    process = start(root / "train_opt.py", cwd=tmp_path / "work", HF_HUB_OFFLINE="0", HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    out, err = process.communicate(timeout=60)
    took_s = time.monotonic() - started
    lines = [line for line in err.splitlines() if "error:" in line]
    assert process.returncode == 2 and "Traceback" not in err and len(lines) == 1
    assert all(part in lines[0] for part in ("--dataset_name lambdalabs/naruto-blip-captions", "--demo", "local path"))
    assert list((tmp_path / "work").iterdir()) == []
    assert took_s < 10


@pytest.mark.parametrize("flag", ["dataset_name", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
def test_offline_a_hub_id_is_named_with_its_flag(demo, tmp_path, flag):
    import train_opt

    local = {"dataset_name": [], "pretrained_model_name_or_path": ["--train_data_dir", str(demo.data)]}
    local["pretrained_vae_model_name_or_path"] = [
        *local["pretrained_model_name_or_path"],
        "--pretrained_model_name_or_path",
        str(demo.model),
    ]
    with pytest.raises(UserError) as caught:
        train_opt.main([*local[flag], f"--{flag}", "someone/something", "--output_dir", str(tmp_path / "run")])
    assert all(part in str(caught.value) for part in (f"--{flag} someone/something", "--demo", "local path"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what is not SDXL


def refused(train, into, *flags):
    with pytest.raises(UserError) as caught:
        train("--max_train_steps", 1, *flags, into=into)
    assert "\n" not in str(caught.value) and not into.exists()
    return str(caught.value)


@pytest.mark.parametrize("target", ["attn1", "nowhere"])
def test_a_target_that_cannot_be_adapted_is_refused(train, tmp_path, target):
    assert f"--lora_target_modules {target}" in refused(train, tmp_path / "run", "--lora_target_modules", target)


def test_convolutions_are_adapted_by_peft_alone(train, tmp_path):
    flags = ["--lora_target_modules", "to_q", "conv1"]
    assert "--lora_backend peft" in refused(train, tmp_path / "run", *flags)
    run = train(*flags, "--lora_backend", "peft", "--max_train_steps", 1, into=tmp_path / "run")
    assert any("conv1" in name for name in run.weights())


def test_a_model_of_another_kind_is_refused_by_its_parts(train, demo, tmp_path):
    shutil.copytree(demo.model, tmp_path / "model")
    model = ["--pretrained_model_name_or_path", tmp_path / "model"]
    config = tmp_path / "model/unet/config.json"
    config.write_text(config.read_text().replace("UNet2DConditionModel", "SD3Transformer2DModel"))
    assert "its unet is SD3Transformer2DModel" in refused(train, tmp_path / "run", *model)
    shutil.rmtree(tmp_path / "model/text_encoder_2")
    shutil.copytree(demo.model / "unet", tmp_path / "model/unet", dirs_exist_ok=True)
    assert "no readable text_encoder_2/config.json" in refused(train, tmp_path / "run", *model)


# ---------------------------------------------------------------- called from a notebook


def test_a_second_call_in_one_process_starts_clean_and_the_first_leaves_no_model(train, monkeypatch):
    """Same losses, and the model of the first run is gone when the second one begins."""
    import gc
    import weakref

    from common import loading

    load, models = loading.load_unet, []
    monkeypatch.setattr(loading, "load_unet", lambda *rest: models.append(weakref.ref(unet := load(*rest))) or unet)
    first = train("--max_train_steps", 2)
    second = train("--max_train_steps", 2)
    assert first.losses == second.losses and first.result["metrics"] == first.rows[-1]
    gc.collect()
    assert [model() for model in models] == [None, None]
