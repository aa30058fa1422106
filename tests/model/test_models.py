"""What a model is, is checked and not believed: strict parts, marks and flags, what the UNet does, schedulers and shapes that are refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.model import device, loading, model_kind, noise, schedulers, weights
from common.train import prediction

ENCODERS = ("text_encoder", "text_encoder_2")
SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"


@pytest.fixture(scope="module")
def host():
    return device.start("no")


@pytest.fixture
def altered(demo, tmp_path):
    """altered(file, **changes): a copy of the demo model with another configuration -> its folder."""

    def altered(file=None, **changes):
        folder = tmp_path / "model"
        shutil.copytree(demo.model, folder, dirs_exist_ok=True)
        if file:
            config = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**config, **changes}))
        return folder

    return altered


def rewrite(folder, change):
    """Put change({name: tensor}) in place of the weights of a part."""
    file = next(folder.glob("*.safetensors"))
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


# ---------------------------------------------------------------- strict parts


def test_every_part_is_bit_equal_to_from_pretrained(demo, host, tmp_path):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model = loading.find_model(str(demo.model))
    encoders = [encoder for _, encoder in loading.load_text_encoders(model, host)]
    reference = []
    for part, encoder, cls in zip(ENCODERS, encoders, (CLIPTextModel, CLIPTextModelWithProjection)):
        ours = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
        file = load_file(demo.model / part / "model.safetensors")
        assert (
            all(
                torch.equal(ours.pop(name.removeprefix("text_model.")), tensor.float()) for name, tensor in file.items()
            )
            and not ours
        )
        # saved anew: transformers 5.0 reads random numbers from files of 5.23, whose names have no `text_model.`
        encoder.save_pretrained(tmp_path / part)
        reference.append(cls.from_pretrained(tmp_path / part).eval())
    ids = torch.randint(300, (2, 77), generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(encoders, reference):
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (ours, theirs)]
        assert torch.equal(outputs[0].hidden_states[-2], outputs[1].hidden_states[-2])
        assert torch.equal(outputs[0][0], outputs[1][0]) and not ours.training
    vae, plain = loading.load_vae(model, host), AutoencoderKL.from_pretrained(demo.model / "vae").float()
    assert vae.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_weight_that_is_missing_unknown_or_of_another_shape_is_one_line_that_names_the_file(altered, part):
    folder = altered()
    file = next((folder / part).glob("*.safetensors"))
    first = sorted(load_file(file))[0]
    faults = [
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if name != first},
            "1 of its weights are missing",
        ),
        (lambda tensors: {**tensors, "more.weight": torch.zeros(1)}, "more.weight does not belong"),
        (lambda tensors: {**tensors, first: torch.zeros(1, 2, 3)}, r"has the shape \[1, 2, 3\]"),
    ]
    whole = file.read_bytes()
    for change, said in faults:
        rewrite(folder / part, change)
        with pytest.raises(UserError, match=said) as caught:
            loading.find_model(str(folder))
        assert str(file) in str(caught.value)
        file.write_bytes(whole)


def test_old_spellings_leftovers_and_shards_are_the_same_model(altered, host):
    """position_ids and the `text_model.` prefix of older transformers, attention names of older diffusers, shards in both spellings."""
    folder = altered()
    before = loading.find_model(str(folder))
    vae, (_, encoder) = loading.load_vae(before, host), loading.load_text_encoders(before, host)[0]
    prefixed = lambda tensors: {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}  # noqa: E731
    bare = lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()}  # noqa: E731
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def deprecated(tensors):
        def spell(name):
            return next((name.replace(f".{new}.", f".{was}.") for new, was in old.items() if f".{new}." in name), name)

        assert sum(spell(name) != name for name in tensors) == 16
        return {spell(name): tensor for name, tensor in tensors.items()}

    rewrite(folder / "vae", deprecated)
    ids = {"embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6)}
    for spelt in (prefixed, bare):
        rewrite(folder / "text_encoder", lambda tensors, spelt=spelt: {**spelt(tensors), **ids})
        now = loading.load_text_encoders(loading.find_model(str(folder)), host)[0][1]
        assert all(torch.equal(now.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    now = loading.load_vae(loading.find_model(str(folder)), host)
    assert all(torch.equal(now.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    names = sorted(tensors := load_file(whole))
    whole.unlink()
    for spelling in ("diffusion_pytorch_model.fp16-0000{}-of-00002", "diffusion_pytorch_model-0000{}-of-00002.fp16"):
        for i, half in enumerate((names[::2], names[1::2]), 1):
            save_file(
                {name: tensors[name] for name in half},
                folder / "unet" / f"{spelling.format(i)}.safetensors",
                {"format": "pt"},
            )
        assert len(weights.weight_files(folder / "unet", "fp16")) == 2
        loading.find_model(str(folder))
        (folder / "unet" / f"{spelling.format(2)}.safetensors").unlink()
        with pytest.raises(UserError, match="weights are missing"):
            loading.find_model(str(folder))
        (folder / "unet" / f"{spelling.format(1)}.safetensors").unlink()


# ---------------------------------------------------------------- what is not supported


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (SCHEDULER, dict(_class_name="EDMEulerScheduler"), "EDMEulerScheduler"),
        (SCHEDULER, dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler"),
        (SCHEDULER, dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "flow matching"),
        (SCHEDULER, dict(prediction_type="sample"), "'sample' is not supported"),
        (SCHEDULER, dict(beta_schedule="unheard of"), "describes no noise schedule"),
        (UNET, dict(in_channels=9), "9 in_channels"),
        (UNET, dict(out_channels=8), "8 out_channels"),
        (UNET, dict(addition_embed_type=None), "it is not SDXL's"),
        (UNET, dict(time_cond_proj_dim=256), "time_cond_proj_dim"),
        (UNET, dict(cross_attention_dim=768), "cross_attention_dim 768"),
        (UNET, dict(transformer_layers_per_block=[1, 1, 1]), "does not belong"),
        (VAE, dict(latent_channels=16), "16 channels"),
        (VAE, dict(_class_name="AutoencoderTiny"), "AutoencoderTiny"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line_before_a_folder_is_made(
    altered, train, tmp_path, capsys, file, changes, said
):
    folder = altered(file, **changes)
    with pytest.raises(UserError, match=said) as caught:
        train("--pretrained_model_name_or_path", folder, into=tmp_path / "run")
    assert (
        "\n" not in str(caught.value) and not (tmp_path / "run").exists() and "latents:" not in capsys.readouterr().out
    )


# ---------------------------------------------------------------- marks and flags

V, EPS = model_kind.V_PREDICTION, model_kind.EPSILON
MARKED = {
    "NoobAI's keys": (["v_pred", "ztsnr"], {}, (V, True)),
    "its key alone": (["v_pred"], {}, (V, False)),
    "modelspec": ([], {"modelspec.prediction_type": "v"}, (V, False)),
    "modelspec of epsilon": ([], {"modelspec.prediction_type": "epsilon"}, (EPS, False)),
    "kohya": ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (V, True)),
    "kohya's default": ([], {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, (EPS, False)),
    "nothing": ([], {}, (EPS, False)),
}


def marked(tmp_path, keys=(), metadata=None):
    """The marks of a file with these keys and this metadata, beside those of a default scheduler."""
    save_file(
        {"weight": torch.zeros(1), **{key: torch.tensor([]) for key in keys}}, tmp_path / "m.safetensors", metadata
    )
    return model_kind.marks_in_file(tmp_path / "m.safetensors", "m")


@pytest.mark.parametrize("name", MARKED)
def test_marks_say_what_the_model_is(tmp_path, name):
    keys, metadata, expected = MARKED[name]
    assert model_kind.decide("m", marked(tmp_path, keys, metadata))[:2] == expected


def test_a_flag_speaks_where_the_files_are_silent_and_may_not_contradict_them(tmp_path):
    silent, spoken = marked(tmp_path), marked(tmp_path, ["v_pred", "ztsnr"])
    assert model_kind.decide("m", silent, prediction_type=V, zero_terminal_snr=True)[:2] == (V, True)
    assert model_kind.decide("m", spoken, prediction_type=V, zero_terminal_snr=True)[:2] == (V, True)
    # trainers write epsilon when nobody told them anything
    assert (
        model_kind.decide("m", marked(tmp_path, [], {"modelspec.prediction_type": "epsilon"}), prediction_type=V)[0]
        == V
    )
    with pytest.raises(UserError, match="--prediction_type epsilon: contradicts its key v_pred"):
        model_kind.decide("m", spoken, prediction_type=EPS)
    with pytest.raises(UserError, match="--zero_terminal_snr False: contradicts its key ztsnr"):
        model_kind.decide("m", spoken, zero_terminal_snr=False)
    both = marked(tmp_path, ["v_pred"], {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(UserError, match="decide with --prediction_type"):
        model_kind.decide("m", both)
    assert [model_kind.decide("m", both, prediction_type=kind)[0] for kind in (V, EPS)] == [V, EPS]
    with pytest.raises(UserError, match="'sample' is not supported"):
        marked(tmp_path, [], {"modelspec.prediction_type": "sample"})


def test_zero_terminal_snr_is_the_papers_schedule_and_divides_by_nothing(demo):
    """arXiv 2305.08891, algorithm 1, in numpy's precision; the weight of snr = 0 is a number."""
    config = json.loads((demo.model / SCHEDULER).read_text())
    kind = model_kind.Kind(V, True, "a flag")
    rescaled = model_kind.alphas_cumprod(model_kind.scheduler_of(config, kind))
    root = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert rescaled[-1] == 0 and torch.allclose(rescaled.double(), expected, atol=1e-5)
    schedule, last = noise.NoiseSchedule(rescaled, V), torch.tensor([999])
    z, eps = torch.randn(2, 1, 4, 8, 8).unbind(0)
    x_t, target = schedule.noise(z, eps, last)
    assert torch.equal(x_t, eps) and torch.equal(target, -z)
    for prediction_type in (V, EPS):
        assert noise.NoiseSchedule(rescaled, prediction_type).min_snr_weight(last, 5.0).isfinite().all()


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_every_sampler_starts_a_zero_terminal_model_at_pure_noise(demo, name):
    config = json.loads((demo.model / SCHEDULER).read_text())
    sampler = schedulers.make_scheduler(name, model_kind.scheduler_of(config, model_kind.Kind(V, True, "")))
    sampler.set_timesteps(4)
    assert int(sampler.timesteps[0]) == 999 and sampler.config.prediction_type == V
    assert sampler.alphas_cumprod[-1] < 1e-6


# ---------------------------------------------------------------- measured


@pytest.fixture(scope="module")
def parts(assemble):
    return assemble("--max_train_steps", 1)


def predicting(engine, kind, share=0.7):
    """A UNet that knows `share` of z and predicts `kind`, in place of the real one: what check() has to tell apart."""

    def predict(fields):
        z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
        a = engine.schedule.alphas_cumprod[fields["t"]].view(-1, 1, 1, 1)
        x_t = a.sqrt() * z + (1 - a).sqrt() * fields["eps"]
        eps = (x_t - a.sqrt() * share * z) / (1 - a).sqrt()
        return {EPS: eps, V: a.sqrt() * eps - (1 - a).sqrt() * share * z, "nothing": 0 * z}[kind], None

    return predict


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_unet_that_predicts_the_other_target_stops_the_run_and_others_pass(parts, monkeypatch, capsys, share):
    engine = parts.engine

    def checked(does, read, said_by="its scheduler configuration"):
        monkeypatch.setattr(engine, "predict", predicting(engine, does, share))
        data = SimpleNamespace(
            model=SimpleNamespace(name="m", kind=model_kind.Kind(read, False, said_by)), examples=parts.data.examples
        )
        prediction.check(engine, data)

    for kind in (EPS, V):
        checked(kind, kind)
        checked("nothing", kind)
    with pytest.raises(UserError, match="use --prediction_type v_prediction"):
        checked(V, EPS)
    with pytest.raises(UserError, match="use --prediction_type epsilon"):
        checked(EPS, V, "--prediction_type")
    assert "warning" not in capsys.readouterr().out
    checked(EPS, V, "its key v_pred")
    assert "warning: --pretrained_model_name_or_path m: is said to predict v_prediction" in capsys.readouterr().out


def test_measuring_takes_four_passes_and_no_random_numbers(parts):
    """An untrained UNet has an error of 1 and more for both targets; the generators stand where they stood."""
    engine, before, passes = parts.engine, torch.get_rng_state(), []
    hook = engine.unet.register_forward_hook(lambda *_: passes.append(1))
    errors = prediction.relative_errors(engine, parts.data.examples)
    hook.remove()
    assert len(passes) == 4 and min(errors.values()) > prediction.PREDICTED
    assert torch.equal(torch.get_rng_state(), before) and engine.unet.training


def test_the_pretrained_demo_model_predicts_epsilon(root, train, tmp_path):
    """The trained model that comes with the suite, not the tests' random one."""
    assets = root / "demo/assets/model"
    flags = ["--pretrained_model_name_or_path", assets, "--max_train_steps", 1, "--max_train_samples", 4]
    with pytest.raises(UserError, match=r"its error is 0\.\d\d for epsilon and 1\.\d\d for v_prediction"):
        train(*flags, "--prediction_type", "v_prediction", into=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(*flags, into=tmp_path / "run").rows
