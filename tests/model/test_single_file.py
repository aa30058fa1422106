"""Single files in the original layout: the same model as the folder they were made of, converted once, whole or not at all."""

import errno
import json
import os
import shutil
import time

import pytest
import torch
from original_layout import original_layout
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.model import device, loading, single_file


@pytest.fixture(scope="module")
def tensors(demo):
    return original_layout(demo.model)


@pytest.fixture
def write(tensors, tmp_path):
    """write(keep, **extra): a single file with the names that `keep` keeps -> its path."""

    def write(keep=lambda name: True, metadata=None, **extra):
        path = tmp_path / "model.safetensors"
        save_file({**{name: tensor for name, tensor in tensors.items() if keep(name)}, **extra}, path, metadata)
        return path

    return write


def find(path, demo, cache, **options):
    return loading.find_model(str(path), config=str(options.pop("config", demo.model)), cache_dir=str(cache), **options)


def test_every_weight_is_that_of_the_folder_and_of_diffusers_own_reader(write, demo, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    host = device.start("no")
    path = write()
    single, folder = find(path, demo, tmp_path / "cache"), loading.find_model(str(demo.model))
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=str(demo.model), local_files_only=True)
    for load, names in (
        (lambda model: [loading.load_unet(model, host)], ["unet"]),
        (lambda model: [loading.load_vae(model, host)], ["vae"]),
        (
            lambda model: [encoder for _, encoder in loading.load_text_encoders(model, host)],
            ["text_encoder", "text_encoder_2"],
        ),
    ):
        for ours, theirs, name in zip(load(single), load(folder), names):
            half = {key: tensor.half() for key, tensor in ours.state_dict().items()}
            assert all(torch.equal(half[key], tensor.half()) for key, tensor in theirs.state_dict().items())
            reader = getattr(pipeline, name).state_dict()
            assert half.keys() == reader.keys() and all(torch.equal(half[key], reader[key].half()) for key in half)


REFUSED = {
    "UNet only": (lambda name: name.startswith("model."), {}, "has no text_encoder"),
    "no second text encoder": (lambda name: "embedders.1" not in name, {}, "has no text_encoder_2"),
    "a key is missing": (
        lambda name: not name.endswith("middle_block.1.proj_in.weight"),
        {},
        "1 of its weights are missing",
    ),
    "no sizes": (lambda name: "label_emb" not in name, {}, "incomplete, or of another architecture"),
    "an adapter": (lambda name: False, {"lora_unet_mid.lora_down.weight": torch.zeros(1)}, "is an adapter"),
    "Stable Diffusion 1": (
        lambda name: "embedders" not in name,
        {"cond_stage_model.x": torch.zeros(1)},
        "Stable Diffusion 1",
    ),
    "EDM": (lambda name: True, {"edm_mean": torch.zeros(4)}, "EDM model"),
    "no VAE": (
        lambda name: not name.startswith("first_stage"),
        {},
        "no VAE in it .* --pretrained_vae_model_name_or_path",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_sdxl_is_one_line_and_half_a_conversion_never_stays(write, demo, train, tmp_path, case):
    keep, extra, said = REFUSED[case]
    flags = ["--config_name_or_path", demo.model, "--cache_dir", tmp_path / "cache"]
    with pytest.raises(UserError, match=said) as caught:
        train("--pretrained_model_name_or_path", write(keep, **extra), *flags, into=tmp_path / "run")
    assert (
        "\n" not in str(caught.value) and "model.safetensors" in str(caught.value) and not (tmp_path / "run").exists()
    )
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_file_without_vae_works_with_another(write, demo, tmp_path):
    path = write(lambda name: not name.startswith("first_stage"))
    assert find(path, demo, tmp_path / "cache", vae=str(demo.model)).vae == demo.model / "vae"


def test_other_shapes_than_the_configuration_says_are_refused_and_with_their_own_they_load(write, demo, tmp_path):
    """As SSD-1B: fewer transformer blocks than SDXL in one place."""
    config = tmp_path / "config"
    shutil.copytree(demo.model, config)
    file = config / "unet/config.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "transformer_layers_per_block": [1, 1, 1]}))
    fewer = write(lambda name: ".transformer_blocks.1." not in name)
    with pytest.raises(UserError, match="--config_name_or_path of its architecture"):
        find(fewer, demo, tmp_path / "cache")
    find(fewer, demo, tmp_path / "cache", config=config)


def test_the_configuration_is_part_of_what_a_conversion_belongs_to(write, demo, tmp_path):
    """Another configuration counts the second time too; the same one is not converted again."""
    path = write()
    plain = find(path, demo, tmp_path / "cache")
    config = tmp_path / "config"
    shutil.copytree(demo.model, config)
    file = config / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    velocity = find(path, demo, tmp_path / "cache", config=config)
    assert (plain.kind.prediction_type, velocity.kind.prediction_type) == ("epsilon", "v_prediction")
    made = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "cache/single_file").iterdir()}
    assert find(path, demo, tmp_path / "cache").folder == plain.folder and len(made) == 2
    assert {folder: folder.stat().st_mtime_ns for folder in made} == made


def test_marks_of_the_file_count_on_every_start_and_beside_any_configuration(write, demo, tmp_path):
    path = write(v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    for _ in range(2):
        model = find(path, demo, tmp_path / "cache")
        assert model.kind[:2] == ("v_prediction", True)
        assert loading.load_noise_schedule(model, torch.device("cpu")).alphas_cumprod[-1] == 0
        assert model.scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_leave_nothing(write, demo, tmp_path, monkeypatch, error):
    path = write()

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(single_file, "write_safetensors", fail)
        with pytest.raises(type(error)):
            find(path, demo, tmp_path / "cache")
    assert list((tmp_path / "cache/single_file").iterdir()) == []
    find(path, demo, tmp_path / "cache")


def test_two_at_once_and_what_a_killed_one_left(write, demo, tmp_path, monkeypatch):
    """While one converts, another finishes: the first drops its own, and nobody deletes what is read. Litter goes after an hour."""
    path, place = write(), tmp_path / "cache/single_file"
    old, new = place / "a.partial", place / "b.partial"
    for litter in (old, new):
        litter.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * single_file.DEAD_S,) * 2)
    write_part, others = single_file._write_part, []

    def overtaken(*rest):
        if not others:
            others.append(None)
            others[0] = find(path, demo, tmp_path / "cache").folder
            others.append({file: file.stat().st_ino for file in others[0].rglob("*")})
        write_part(*rest)

    monkeypatch.setattr(single_file, "_write_part", overtaken)
    assert find(path, demo, tmp_path / "cache").folder == others[0]
    assert {file: file.stat().st_ino for file in others[0].rglob("*")} == others[1]
    assert sorted(place.iterdir()) == sorted([others[0], new])


def test_the_first_launch_of_two_processes_works(start, root, write, demo, tmp_path):
    """A new cache and a single file: the main process converts, the other waits for it."""
    flags = [
        "--demo",
        "--max_train_steps",
        1,
        "--pretrained_model_name_or_path",
        write(),
        "--config_name_or_path",
        demo.model,
    ]
    flags += ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", "--no_gradient_checkpointing"]
    launched = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, root / "train_sdxl.py", *flags
    )
    said, errors = launched.communicate()
    assert launched.returncode == 0, errors[-2000:]
    assert len(list((tmp_path / "cache/single_file").iterdir())) == 1
    assert load_file(tmp_path / "run/pytorch_lora_weights.safetensors") and "2 processes" in said


# ---------------------------------------------------------------- the families of models that are used

EULER_A = dict(_class_name="EulerAncestralDiscreteScheduler")
FAMILIES = {  # scheduler configuration; names in the single file; how its VAE differs
    "SDXL base": ({}, (), {}),
    "Illustrious": (EULER_A, (), dict(force_upcast=True)),
    "NoobAI epsilon": (EULER_A, (), {}),
    "NoobAI v": (dict(prediction_type="v_prediction", rescale_betas_zero_snr=True), (), {}),
    "NoobAI v, one file": ({}, ("v_pred", "ztsnr"), {}),
    "Pony, one file": ({}, ("denoiser.sigmas",), {}),
    "Animagine": (EULER_A, (), dict(latents_mean=None, latents_std=None)),
    "Turbo": (dict(**EULER_A, timestep_spacing="trailing"), (), {}),
    "Lightning": (dict(timestep_spacing="trailing"), (), dict(scaling_factor=0.13025)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_are_trained_drawn_and_reloaded_with_no_flag(demo, train, write, tmp_path, family):
    import infer

    changes, keys, vae = FAMILIES[family]
    folder = tmp_path / "folder"
    shutil.copytree(demo.model, folder)
    for file, more in (("scheduler/scheduler_config.json", changes), ("vae/config.json", vae)):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **more}))
    model = write(**{key: torch.tensor([]) for key in keys}) if "one file" in family else folder
    flags = [
        "--pretrained_model_name_or_path",
        str(model),
        "--config_name_or_path",
        str(folder),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    size = 96 if family == "Illustrious" else 64  # trained at 1536, half as large again as SDXL's 1024
    run = train(
        *flags, "--max_train_steps", 2, "--max_train_samples", 4, "--resolution", size, "--aspect_ratio_buckets"
    )
    velocity = " v" in family
    recipe = json.loads((run.dir / "config.json").read_text())
    assert (recipe["prediction_type"] == "v_prediction", recipe["zero_terminal_snr"]) == (velocity, velocity)
    drawing = ["--demo", *flags, "--steps", "2", "--resolution", str(size), "--prompt", "a boy", "--lora", str(run.dir)]
    manifest = infer.main([*drawing, "--compare", "--output_dir", str(tmp_path / "drawn")])
    base, adapter = manifest["columns"]
    assert adapter["mean_abs_difference_from_base"] > base["mean_abs_difference_from_base"] == 0
    assert {image["guidance_rescale"] for image in manifest["images"]} == {0.7 if velocity else 0.0}
    assert manifest["model"]["prediction_type"] == recipe["prediction_type"]
    if velocity:
        kohya = next((run.dir / "kohya").glob("*.safetensors"))
        from safetensors import safe_open

        with safe_open(kohya, "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.prediction_type"] == "v" and metadata["ss_zero_terminal_snr"] == "True"
        infer.main(["--demo", *flags, "--lora", str(run.dir), "--merge", str(tmp_path / "merged")])
        assert loading.find_model(str(tmp_path / "merged")).kind[:2] == ("v_prediction", True)
