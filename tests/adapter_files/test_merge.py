"""infer.py --merge: a model folder that draws what the active adapters draw, complete or absent, made from a base that is only read."""

import dataclasses
import errno
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from test_formats import ATTENTION, FEED_FORWARD, RESIDUAL, drawn, gap, shake

import infer
from common.adapter_files import diffusers_format
from common.errors import UserError
from common.model import adapters, device
from common.render import manifest

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def fresh(demo):
    """fresh(folder): a pipeline as plain diffusers loads it, the demo's when no folder is named."""

    def fresh(folder=demo.model):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return fresh


@pytest.fixture(scope="module")
def base(fresh):
    """What the model draws without adapters."""
    return drawn(fresh())


@pytest.fixture(scope="module")
def files(fresh, tmp_path_factory):
    """{name: adapter folder}, rank 4 and alpha 8, with random weights; "text" has adapters of the text encoders too."""
    folder = tmp_path_factory.mktemp("adapters")

    def write(name, targets, seed, use_dora=False, text=False):
        pipeline = fresh()
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if text else []
        adapters.add_lora(pipeline.unet, targets, rank=4, alpha=8, use_dora=use_dora)
        adapters.add_text_lora(encoders, rank=4, alpha=8)
        for module in (pipeline.unet, *encoders):
            shake(module, seed)
        diffusers_format.save_adapter(folder / name / diffusers_format.WEIGHTS, pipeline.unet, {}, encoders)
        return folder / name

    return {
        "lora": write("lora", ATTENTION, 1),
        "wide": write("wide", ATTENTION + FEED_FORWARD + RESIDUAL, 2),
        "dora": write("dora", ATTENTION, 3, use_dora=True),
        "dora too": write("dora too", ATTENTION + RESIDUAL, 4, use_dora=True),
        "text": write("text", ATTENTION, 5, text=True),
    }


@pytest.fixture
def merged(tmp_path):
    """merged(*flags): the folder that infer.py --merge writes."""

    def merged(*flags):
        infer.main(["--demo", "--merge", str(tmp_path / "merged"), *map(str, flags)])
        return tmp_path / "merged"

    return merged


# ---------------------------------------------------------------- the same images

TOGETHER = {
    "alpha is not the rank": [("lora", 1.0)],
    "DoRA at a scale": [("dora", 0.6)],
    "DoRA at scale 0 keeps its magnitudes": [("dora", 0.0)],
    "two LoRAs": [("lora", -0.5), ("wide", 1.5)],
    "two DoRAs": [("dora", 0.7), ("dora too", 1.2)],
    "LoRA, DoRA, LoRA": [("lora", 0.5), ("dora too", 0.8), ("wide", 0.3)],
    "text encoders": [("text", 0.8), ("dora", 0.5)],
}


@pytest.mark.parametrize("together", TOGETHER.values(), ids=TOGETHER)
def test_the_merged_model_draws_what_plain_diffusers_draws_with_the_active_adapters(
    together, files, fresh, base, merged
):
    active = fresh()
    for name, _ in together:
        active.load_lora_weights(files[name], adapter_name=name.replace(" ", "_"))
    active.set_adapters([name.replace(" ", "_") for name, _ in together], [scale for _, scale in together])
    folder = merged(*(text for name, scale in together for text in ("--lora", f"{files[name]}:{scale}")))
    assert gap(drawn(active), drawn(fresh(folder))) < 1e-3 < gap(base, drawn(active))


def test_an_adapter_trained_on_a_4_bit_base_is_added_to_the_whole_weights(train, demo, merged):
    run = train("--max_train_steps", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, script="train_qlora")
    base, now = load_file(demo.model / UNET), load_file(merged("--lora", f"{run.dir}:2", "--lora_scale", 0.5) / UNET)
    adapter = run.weights()
    changed = [name for name in base if not torch.equal(base[name], now[name])]
    assert len(changed) == len(adapter) / 2
    for name in changed:
        down, up = (adapter[f"unet.{name.removesuffix('.weight')}.lora.{kind}.weight"] for kind in ("down", "up"))
        assert torch.allclose(now[name], base[name] + up @ down, atol=1e-6)  # train_qlora's alpha is its rank


def test_ema_means_the_averaged_weights(train, fresh, merged):
    run = train("--max_train_steps", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--use_ema")
    active = fresh()
    active.load_lora_weights(run.dir / "ema_unet")
    expected = drawn(active)
    assert gap(expected, drawn(fresh(merged("--ema", "--lora", run.dir)))) < 1e-3


# ---------------------------------------------------------------- the folder


def test_on_a_gpu_the_weights_are_written_in_fp16_under_the_names_of_the_base(files, merged, demo, monkeypatch):
    start = device.start
    monkeypatch.setattr(device, "start", lambda *options: dataclasses.replace(start(*options), dtype=torch.float16))
    folder = merged("--lora", files["text"], "--lora", files["dora"])
    for file in demo.model.rglob("*.safetensors"):
        base, now = load_file(file), load_file(folder / file.relative_to(demo.model))
        assert base.keys() == now.keys() and {tensor.dtype for tensor in now.values()} == {torch.float16}


def test_nothing_but_weights_changes_and_merge_json_says_what_was_merged(files, merged, demo, files_in):
    before = files_in(demo.model), files_in(files["text"])
    folder = merged("--lora", f"{files['text']}:0.5", "--lora", f"{files['dora']}:2", "--lora_scale", 0.5)
    assert (files_in(demo.model), files_in(files["text"])) == before
    now, base = files_in(folder), before[0]
    assert now.keys() - base.keys() == {"merge.json"} and base.keys() <= now.keys()
    kept = {name for name in base if base[name] == now[name]}
    assert {name for name in base if name.startswith(("tokenizer", "scheduler", "model_index", "vae/d"))} <= kept
    record = json.loads(now["merge.json"])
    assert record["model"]["name"] == str(demo.model) and record["dtype"] == "float32"
    assert [(source["path"], source["scale"]) for source in record["adapters"]] == [
        (str(files["text"] / diffusers_format.WEIGHTS), 0.25),
        (str(files["dora"] / diffusers_format.WEIGHTS), 1.0),
    ]
    assert [source["sha256"] for source in record["adapters"]] == [
        manifest.sha256(files[name] / diffusers_format.WEIGHTS) for name in ("text", "dora")
    ]
    assert all(path.stat().st_mode & 0o044 for path in folder.rglob("*"))  # others may read it


def test_a_merged_model_is_a_model_to_train_and_to_draw_with(files, merged, fresh, train, tmp_path):
    folder = merged("--lora", files["lora"])
    model = ("--pretrained_model_name_or_path", folder)
    run = train("--max_train_steps", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, *model)
    assert json.loads((run.dir / "config.json").read_text())["base_model"] == str(folder)
    # W + A, then B on top of it: the same as both on W
    tuned, both = fresh(folder), fresh()
    tuned.load_lora_weights(run.dir)
    both.load_lora_weights(files["lora"], adapter_name="first")
    both.load_lora_weights(run.dir, adapter_name="second")
    both.set_adapters(["first", "second"])
    assert gap(drawn(tuned), drawn(both)) < 1e-3 < gap(drawn(fresh(folder)), drawn(tuned))
    infer.main(["--demo", "--merge", str(tmp_path / "again"), "--lora", str(run.dir), *map(str, model)])
    assert gap(drawn(tuned), drawn(fresh(tmp_path / "again"))) < 1e-3


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "ctrl-c"]
)
def test_a_merge_that_is_cut_short_leaves_nothing(files, merged, tmp_path, monkeypatch, failure):
    def cut_short(unet, folder, **options):
        folder.mkdir(parents=True)
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", cut_short)
    with pytest.raises(UserError if isinstance(failure, OSError) else KeyboardInterrupt) as raised:
        merged("--lora", files["lora"])
    assert list(tmp_path.iterdir()) == []
    assert isinstance(failure, KeyboardInterrupt) or "cannot be written ([Errno 28] No space left" in str(raised.value)


def test_a_disk_that_is_too_small_is_noticed_first(files, merged, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="MB are free"):
        merged("--lora", files["lora"])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_are_not_written(files, merged, tmp_path):
    with pytest.raises(UserError, match="not finite in torch.float32; lower the scales"):
        merged("--lora", files["lora"], "--lora_scale", 1e39)
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "it exists": ("{taken}", ["--lora", "{lora}"], "exists already"),
    "an empty folder exists": ("{empty}", ["--lora", "{lora}"], "exists already"),
    "the model itself": ("{model}", ["--lora", "{lora}"], "is in the model's own folder"),
    "inside the model": ("{model}/merged", ["--lora", "{lora}"], "is in the model's own folder"),
    "nothing to merge": ("{new}", [], "add --lora PATH"),
    "no such adapter": ("{new}", ["--lora", "{new}"], "no such file or folder"),
    "compare": ("{new}", ["--lora", "{lora}", "--compare"], "--compare has no meaning"),
    "prompt": ("{new}", ["--lora", "{lora}", "--prompt", "a fox"], "--prompt has no meaning"),
}


@pytest.mark.parametrize("place, flags, complaint", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_in_one_line_before_anything_is_loaded(
    files, demo, tmp_path, files_in, monkeypatch, place, flags, complaint
):
    (tmp_path / "taken").write_text("precious")
    (tmp_path / "empty").mkdir()
    places = dict(
        taken=tmp_path / "taken", empty=tmp_path / "empty", new=tmp_path / "new", model=demo.model, lora=files["lora"]
    )
    before = files_in(demo.model), files_in(tmp_path)
    monkeypatch.setattr(device, "start", lambda *options: pytest.fail("started the device"))
    with pytest.raises(UserError) as refusal:
        infer.main(["--demo", "--merge", *(text.format(**places) for text in (place, *flags))])
    assert complaint in str(refusal.value) and "\n" not in str(refusal.value)
    assert (files_in(demo.model), files_in(tmp_path)) == before and not (tmp_path / "new").exists()
