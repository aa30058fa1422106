"""Caches: an entry is what the model makes of this very content, is made once, and can never be mistaken for another."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from common.data import caching, dataset, encoding
from common.data.framing import frame
from common.errors import UserError
from common.model import device, loading

PROMPTS = ["a smiling boy with blue eyes", "", "Ünïcode 日本, and 7 more?", "a laughing cat in front of the sea " * 30]


@pytest.fixture(scope="module")
def host():
    return device.start()


@pytest.fixture
def place(tmp_path, demo):
    """A copy of the demo's model and of six of its images, and an empty cache: a place to change things in."""
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(demo.model, model)
    data.mkdir()
    rows = (demo.data / "metadata.jsonl").read_text().splitlines()[:6]
    (data / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for row in rows:
        shutil.copy(demo.data / json.loads(row)["file_name"], data)
    return SimpleNamespace(model=model, data=data, cache=tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch):
    """What has been encoded so far: the number of images and the number of captions."""
    counts = SimpleNamespace(images=0, captions=0)
    encode, encode_text = AutoencoderKL.encode, encoding.encode_text

    def count_images(self, x, *rest, **options):
        counts.images += len(x)
        return encode(self, x, *rest, **options)

    def count_captions(encoders, input_ids):
        counts.captions += len(input_ids)
        return encode_text(encoders, input_ids)

    monkeypatch.setattr(AutoencoderKL, "encode", count_images)
    monkeypatch.setattr(encoding, "encode_text", count_captions)

    def since():
        images, captions, counts.images, counts.captions = counts.images, counts.captions, 0, 0
        return images, captions

    return since


def samples_in(place):
    return dataset.load_samples(None, [str(place.data)], image_column="image", caption_column="text")[0]


def latents_of(place, host, flips=(False,), max_bad=0, samples=None, vae=None, variant="fp16", **framing):
    model = loading.find_model(str(place.model), vae, variant=variant, cache_dir=place.cache)
    framing = {"resolution": 64, "center_crop": True, "aspect_ratio_buckets": False, **framing}
    options = dict(host=host, cache_dir=place.cache, max_bad=max_bad, flips=flips)
    return caching.cache_latents(samples or samples_in(place), model, **options, **framing)


def text_of(place, host, captions=None, mode="disk"):
    model = loading.find_model(str(place.model), cache_dir=place.cache)
    captions = [sample.caption for sample in samples_in(place)] if captions is None else captions
    return caching.cache_text(captions, model, host=host, mode=mode, cache_dir=place.cache)


def change_weights(folder):
    """Other weights of the same shapes, under the same names."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(
            {name: tensor * 1.25 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
            file,
            {"format": "pt"},
        )


def add_caption(place, name, caption):
    rows = [json.loads(line) for line in (place.data / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "text": caption if row["file_name"] == name else row["text"]} for row in rows]
    (place.data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def direct_moments(folder, image, size, scaling=0.13025):
    """A VAE, Pillow and numpy, and nothing of ours: resize the shorter side, crop the middle, encode, scale."""
    import numpy as np

    vae = AutoencoderKL.from_pretrained(folder)
    scale = max(size[0] / image.width, size[1] / image.height)
    resized = image.convert("RGB").resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    left, top = round((resized.width - size[0]) / 2), round((resized.height - size[1]) / 2)
    array = np.asarray(resized.crop((left, top, left + size[0], top + size[1])), np.float32) / 127.5 - 1
    posterior = vae.encode(torch.from_numpy(array.transpose(2, 0, 1).copy())[None]).latent_dist
    return posterior.mean[0] * scaling, posterior.std[0] * scaling


# ---------------------------------------------------------------- what an entry is


def test_moments_are_the_scaled_posterior_of_the_vae(place, host):
    latents = latents_of(place, host)
    assert len(latents) == 6
    for i, sample in enumerate(latents.samples):
        mean, std = latents.moments(i)
        assert mean.shape == std.shape == (4, 8, 8)
        expected = direct_moments(place.model / "vae", Image.open(sample.name), (64, 64))
        torch.testing.assert_close(mean, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, expected[1], rtol=1e-4, atol=1e-5)


def test_flipped_moments_are_those_of_the_mirrored_picture(place, host):
    """Encoded apart: the VAE of a mirrored picture is not the mirrored latent."""
    latents = latents_of(place, host, flips=(False, True))
    for i, sample in enumerate(latents.samples):
        expected = direct_moments(place.model / "vae", ImageOps.mirror(Image.open(sample.name)), (64, 64))
        framing = latents.framings[i]
        if (
            framing.resized[0] - framing.width - framing.left == framing.left
        ):  # the middle is the middle of the mirror image too
            torch.testing.assert_close(latents.moments(i, flip=True)[0], expected[0], rtol=1e-4, atol=1e-5)
        assert not torch.equal(latents.moments(i, flip=True)[0], latents.moments(i)[0])
        assert not torch.allclose(latents.moments(i, flip=True)[0], latents.moments(i)[0].flip(-1), atol=1e-3)


def test_buckets_keep_their_shape(place, host):
    latents = latents_of(place, host, aspect_ratio_buckets=True)
    shapes = set()
    for i, sample in enumerate(latents.samples):
        framing = latents.framings[i]
        expected = direct_moments(place.model / "vae", Image.open(sample.name), (framing.width, framing.height))
        torch.testing.assert_close(latents.moments(i)[0], expected[0], rtol=1e-4, atol=1e-5)
        shapes.add(tuple(latents.moments(i)[0].shape))
    assert len(shapes) > 1


def test_a_vae_with_channel_statistics_is_normalised_by_them(place, host):
    """Some fine-tunes ship latents_mean and latents_std; diffusers' pipelines undo (z - mean) * scaling / std."""
    before = latents_of(place, host).moments(0)
    config = json.loads((place.model / "vae" / "config.json").read_text())
    statistics = dict(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[2.0, 1.0, 0.5, 4.0])
    (place.model / "vae" / "config.json").write_text(json.dumps({**config, **statistics}))
    after = latents_of(place, host).moments(0)
    mean, std = (torch.tensor(statistics[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(after[0], (before[0] / 0.13025 - mean) * 0.13025 / std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1], before[1] / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["ram", "disk", "none"])
def test_text_is_what_the_sdxl_pipeline_encodes(place, host, mode):
    text = text_of(place, host, PROMPTS, mode)
    pipeline = StableDiffusionXLPipeline.from_pretrained(place.model)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in PROMPTS:
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False
        )
        with torch.no_grad():
            prompt_embeds, pooled = text({name: value[None] for name, value in text.fields(prompt).items()})
        assert prompt_embeds.shape == (1, 77, 80)
        torch.testing.assert_close(prompt_embeds, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, expected_pooled, rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_the_pipelines_unconditional_input(demo):
    """SDXL base zeroes it; the model's own model_index.json says so."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(demo.model)
    _, negative, _, negative_pooled = pipeline.encode_prompt("x", device="cpu", do_classifier_free_guidance=True)
    assert loading.zero_unconditional(SimpleNamespace(folder=demo.model))
    assert not negative.any() and not negative_pooled.any()


# ---------------------------------------------------------------- made once


def test_a_second_run_encodes_nothing(place, host, encoded):
    latents_of(place, host)
    text_of(place, host)
    assert encoded() == (6, 6)
    latents_of(place, host)
    text_of(place, host)
    assert encoded() == (0, 0)


def test_equal_captions_and_equal_images_are_encoded_once(place, host, encoded):
    shutil.copy(place.data / "000.png", place.data / "again.png")
    with (place.data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "again.png", "text": samples_in(place)[1].caption}) + "\n")
    assert len(latents_of(place, host)) == 7
    text_of(place, host)
    assert encoded() == (6, 6)


def test_editing_one_caption_encodes_that_caption_alone(place, host, encoded):
    latents_of(place, host)
    text_of(place, host)
    encoded()
    add_caption(place, "002.png", "something else altogether")
    latents_of(place, host)
    text = text_of(place, host)
    assert encoded() == (0, 1)
    again = text_of(place, host, ["something else altogether"], "ram")
    torch.testing.assert_close(
        text.fields("something else altogether"), again.fields("something else altogether"), rtol=1e-4, atol=1e-5
    )


def test_editing_one_image_encodes_that_image_alone(place, host, encoded):
    before = latents_of(place, host)
    text_of(place, host)
    encoded()
    ImageOps.invert(Image.open(place.data / "002.png").convert("RGB")).save(place.data / "002.png")
    after = latents_of(place, host)
    text_of(place, host)
    assert encoded() == (1, 0)
    changed = [i for i in range(6) if not torch.equal(before.moments(i)[0], after.moments(i)[0])]
    assert changed == [2]
    expected = direct_moments(place.model / "vae", Image.open(place.data / "002.png"), (64, 64))
    torch.testing.assert_close(after.moments(2)[0], expected[0], rtol=1e-4, atol=1e-5)


def test_renaming_an_image_encodes_nothing(place, host, encoded):
    latents_of(place, host)
    encoded()
    (place.data / "000.png").rename(place.data / "renamed.png")
    metadata = place.data / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"000.png"', '"renamed.png"'))
    latents_of(place, host)
    assert encoded() == (0, 0)


# ---------------------------------------------------------------- never mistaken


@pytest.mark.parametrize("change", [{"resolution": 96}, {"center_crop": False}, {"aspect_ratio_buckets": True}])
def test_another_framing_never_reads_an_old_entry(place, host, encoded, change):
    latents_of(place, host)
    encoded()
    latents = latents_of(place, host, **change)
    differ = [i for i, framing in enumerate(latents.framings) if framing != frame(latents.samples[i], 64)]
    assert differ and encoded() == (len(differ), 0)
    for i, (sample, framing) in enumerate(zip(latents.samples, latents.framings)):
        assert latents.moments(i)[0].shape == (4, framing.height // 8, framing.width // 8)
        if change.get("center_crop", True):
            expected = direct_moments(place.model / "vae", Image.open(sample.name), (framing.width, framing.height))
            torch.testing.assert_close(latents.moments(i)[0], expected[0], rtol=1e-4, atol=1e-5)


def test_replaced_vae_weights_never_read_an_old_entry(place, host, encoded):
    latents_of(place, host)
    encoded()
    change_weights(place.model / "vae")
    latents = latents_of(place, host)
    assert encoded() == (6, 0)
    expected = direct_moments(place.model / "vae", Image.open(latents.samples[0].name), (64, 64))
    torch.testing.assert_close(latents.moments(0)[0], expected[0], rtol=1e-4, atol=1e-5)


def test_a_variant_beside_the_plain_weights_is_another_vae(place, host, encoded):
    """Both in one folder, and --variant says which of them is loaded."""
    latents_of(place, host)
    plain = place.model / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy2(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    encoded()
    latents_of(place, host, variant=None)
    assert encoded() == (0, 0)  # the plain weights are the ones that were there
    latents_of(place, host, variant="fp16")
    assert encoded() == (6, 0)


def test_another_vae_never_reads_an_old_entry_and_the_old_ones_stay(place, host, encoded):
    latents_of(place, host)
    shutil.copytree(place.model / "vae", place.model.parent / "other")
    change_weights(place.model.parent / "other")
    encoded()
    other = latents_of(place, host, vae=str(place.model.parent / "other"))
    assert encoded() == (6, 0)
    latents_of(place, host)
    assert encoded() == (0, 0)
    expected = direct_moments(place.model.parent / "other", Image.open(other.samples[0].name), (64, 64))
    torch.testing.assert_close(other.moments(0)[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_replaced_text_encoders_never_read_an_old_entry(place, host, encoded, part):
    latents_of(place, host)
    before = text_of(place, host).fields(samples_in(place)[0].caption)["prompt_embeds"]
    encoded()
    change_weights(place.model / part)
    after = text_of(place, host).fields(samples_in(place)[0].caption)["prompt_embeds"]
    latents_of(place, host)
    assert encoded() == (0, 6) and not torch.allclose(before, after, atol=1e-3)


def test_a_changed_tokenizer_never_reads_an_old_entry(place, host, encoded):
    text_of(place, host)
    encoded()
    file = next((place.model / "tokenizer").glob("tokenizer_config.json"))
    file.write_text(file.read_text() + "\n")
    text_of(place, host)
    assert encoded() == (0, 6)


def test_another_dtype_never_reads_an_old_entry(place, host, encoded):
    latents_of(place, host)
    encoded()
    halves = dataclasses.replace(host, dtype=torch.bfloat16)
    assert latents_of(place, halves).moments(0)[0].dtype == torch.bfloat16
    assert encoded() == (6, 0)


# ---------------------------------------------------------------- interrupted, damaged, shared


def test_an_interrupted_encode_of_images_goes_on_where_it_was(place, host, encoded, monkeypatch):
    monkeypatch.setattr(caching, "VAE_PIXELS", 4 * 64 * 64)
    encode, calls = AutoencoderKL.encode, []

    def interrupted(self, x, *rest, **options):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, x, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            latents_of(place, host)
    assert encoded() == (4, 0)
    latents = latents_of(place, host)
    assert encoded() == (2, 0) and len(latents) == 6


def test_an_interrupted_encode_of_captions_goes_on_where_it_was(place, host, encoded, monkeypatch):
    monkeypatch.setattr(caching, "TEXT_BATCH", 2)
    encode_text, calls = encoding.encode_text, []

    def interrupted(encoders, input_ids):
        calls.append(len(input_ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_text(encoders, input_ids)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text_of(place, host)
    assert encoded() == (0, 4)
    text_of(place, host)
    assert encoded() == (0, 2)


def test_a_killed_encode_loses_no_more_than_the_shard_it_was_filling(place, host, encoded, monkeypatch):
    """kill -9 runs no cleanup: what was flushed is there, and a half-written shard is not taken for one."""
    monkeypatch.setattr("common.data.store.SHARD_ENTRIES", 2)
    monkeypatch.setattr(caching, "VAE_PIXELS", 4 * 64 * 64)
    encode, calls = AutoencoderKL.encode, []

    class Killed(BaseException):
        pass

    def killed(self, x, *rest, **options):
        calls.append(len(x))
        if len(calls) == 2:
            patch.setattr(caching.Store, "flush", lambda self: None)
            raise Killed
        return encode(self, x, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", killed)
        with pytest.raises(Killed):
            latents_of(place, host)
    shard = next(place.cache.glob("latents/*/*.safetensors"))
    shard.with_name("0" * 32 + ".safetensors.partial").write_bytes(shard.read_bytes()[:100])
    encoded()
    assert len(latents_of(place, host)) == 6
    assert encoded() == (2, 0)


@pytest.mark.parametrize("damage", ["cut", "empty", "overwritten"])
def test_a_damaged_shard_is_replaced(place, host, encoded, capsys, damage):
    before = latents_of(place, host)
    expected = [before.moments(i) for i in range(6)]
    shards = list(place.cache.glob("latents/*/*.safetensors"))
    for shard in shards:
        data = shard.read_bytes()
        shard.unlink()  # what is mapped stays readable
        shard.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "overwritten": b"\xff" * len(data)}[damage])
    encoded()
    after = latents_of(place, host)
    assert encoded() == (6, 0)
    assert str(shards[0]) in capsys.readouterr().out
    for i in range(6):
        assert torch.equal(after.moments(i)[0], expected[i][0]) and torch.equal(after.moments(i)[1], expected[i][1])
    latents_of(place, host)
    assert encoded() == (0, 0)


def test_two_stores_share_a_folder(tmp_path):
    first, second = caching.Store(tmp_path / "shared"), caching.Store(tmp_path / "shared")
    pairs = {name: (torch.full((2, 3), float(i)), torch.full((2,), -float(i))) for i, name in enumerate("abcd")}
    first["a"], second["b"] = pairs["a"], pairs["b"]
    first["c"], second["c"] = pairs["c"], pairs["c"]  # both made it: either copy will do
    first.flush()
    second.flush()
    assert "b" not in first
    first.reload()
    second["d"] = pairs["d"]
    second.flush()
    third = caching.Store(tmp_path / "shared")
    first.reload()
    for store in (first, second, third):
        assert all(name in store for name in "abcd") and "e" not in store
        for name, pair in pairs.items():
            assert torch.equal(store[name][0], pair[0]) and torch.equal(store[name][1], pair[1])
    assert not list((tmp_path / "shared").glob("*.partial"))


def test_what_a_store_holds_does_not_change_with_the_tensor_it_was_given(tmp_path):
    for folder in (None, tmp_path):
        store, tensor = caching.Store(folder), torch.ones(3)
        store["a"] = (tensor, tensor)
        tensor.zero_()
        assert store["a"][0].tolist() == [1, 1, 1]


def test_a_store_in_ram_writes_no_file(place, host):
    text_of(place, host, mode="ram")
    assert not (place.cache / "text").exists()


# ---------------------------------------------------------------- images that only the decoder finds out


def cut_short(place, name):
    Image.open(place.data / name).convert("RGB").save(place.data / name, "JPEG")
    data = (place.data / name).read_bytes()
    (place.data / name).write_bytes(data[: len(data) // 2])  # the header is whole: its size can be read


def test_an_image_that_ends_too_early_is_named(place, host):
    cut_short(place, "001.png")
    with pytest.raises(UserError, match="001.png.*--max_bad_images 1"):
        latents_of(place, host)


@pytest.mark.parametrize("flips", [(False,), (False, True)])
def test_it_is_skipped_and_counted_once_where_it_is_allowed(place, host, capsys, flips):
    """Needing its mirror image too does not make it two bad images."""
    cut_short(place, "001.png")
    for _ in range(2):  # from an empty cache and from a full one
        latents = latents_of(place, host, flips=flips, max_bad=1)
        assert [s.name[-7:] for s in latents.samples] == ["000.png", "002.png", "003.png", "004.png", "005.png"]
        assert capsys.readouterr().out.count("skipped unreadable image") == 1


def test_latents_that_are_not_finite_are_refused_by_name_and_not_kept(place, host):
    tensors = load_file(next((place.model / "vae").glob("*.safetensors")))
    tensors["quant_conv.weight"].fill_(float("nan"))
    save_file(tensors, next((place.model / "vae").glob("*.safetensors")), {"format": "pt"})
    for _ in range(2):
        with pytest.raises(UserError, match=r"00\d\.png.*non-finite.*--pretrained_vae_model_name_or_path"):
            latents_of(place, host)
