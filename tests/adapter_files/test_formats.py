"""Adapter files: what we write means the same elsewhere, what others write means the same here, and nothing loads in part or in silence."""

import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.adapter_files import diffusers_format, into_pipeline, kohya, peft_format, reading
from common.adapter_files.names import COMPONENTS, kohya_key
from common.errors import UserError
from common.model import adapters

ATTENTION, FEED_FORWARD = ["to_q", "to_k", "to_v", "to_out.0"], ["ff.net.0.proj", "ff.net.2"]
RESIDUAL = ["conv_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "0.conv", "proj_in", "proj_out"]
# The numbering of https://github.com/Stability-AI/generative-models (sgm/modules/diffusionmodules/openaimodel.py) for SDXL's attention blocks.
ORIGINAL = {
    "input_blocks_4_1": "down_blocks.1.attentions.0",
    "input_blocks_5_1": "down_blocks.1.attentions.1",
    "input_blocks_7_1": "down_blocks.2.attentions.0",
    "input_blocks_8_1": "down_blocks.2.attentions.1",
    "middle_block_1": "mid_block.attentions.0",
    "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_1_1": "up_blocks.0.attentions.1",
    "output_blocks_2_1": "up_blocks.0.attentions.2",
    "output_blocks_3_1": "up_blocks.1.attentions.0",
    "output_blocks_4_1": "up_blocks.1.attentions.1",
    "output_blocks_5_1": "up_blocks.1.attentions.2",
}


@pytest.fixture
def tuned(fresh):
    """tuned(targets, ...): a pipeline whose UNet has an adapter with random weights, rank 4 and alpha 8."""

    def tuned(targets=ATTENTION, use_dora=False):
        pipeline = fresh()
        adapters.add_lora(pipeline.unet, targets, rank=4, alpha=8, use_dora=use_dora)
        shake(pipeline.unet)
        return pipeline

    return tuned


def shake(module, seed=1):
    """Give the adapter in `module` weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def drawn(pipeline):
    """An image [64, 64, 3] in 0..1."""
    options = dict(
        height=64, width=64, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return torch.from_numpy(pipeline("a smiling cat with blue eyes", **options).images[0])


def loaded(pipeline, place):
    into_pipeline.load_adapter(pipeline, reading.find_adapter(place), "adapter00")
    return pipeline


def gap(image, other):
    return (image - other).abs().max().item()


def written_kohya(pipeline, folder):
    file = folder / "kohya.safetensors"
    kohya.save_kohya(file, pipeline.unet, {})
    return file


def patched(pipeline, changes):
    """The pipeline with new weights in the UNet layers of {name: weight}."""
    for layer, weight in changes.items():
        pipeline.unet.get_submodule(layer).weight.data = weight
    return pipeline


# ---------------------------------------------------------------- what we write, read by others


@pytest.mark.parametrize(
    "targets", [ATTENTION + FEED_FORWARD, ATTENTION + RESIDUAL], ids=["attention and ff", "convolutions too"]
)
def test_our_kohya_file_draws_the_same_in_plain_diffusers_though_alpha_is_not_the_rank(tuned, fresh, tmp_path, targets):
    trained, other = tuned(targets), fresh()
    other.load_lora_weights(written_kohya(trained, tmp_path))
    assert gap(drawn(trained), drawn(other)) < 1e-3 < gap(drawn(fresh()), drawn(other))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_our_kohya_file_draws_the_same_by_comfyuis_formulas(tuned, fresh, tmp_path, use_dora):
    trained, other = tuned(ATTENTION + FEED_FORWARD, use_dora), fresh()
    tensors = load_file(written_kohya(trained, tmp_path))
    changes = {}
    for name in {key.partition(".")[0] for key in tensors}:
        block = next(block for block in ORIGINAL if name.startswith(f"lora_unet_{block}_"))
        inside = name.removeprefix(f"lora_unet_{block}_")
        layer = next(
            n
            for n, _ in other.unet.named_modules()
            if n.startswith(ORIGINAL[block]) and n.replace(".", "_").endswith(inside)
        )
        up, down, alpha = (
            tensors[f"{name}.{kind}"].float() for kind in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        changes[layer] = comfyui(
            other.unet.get_submodule(layer).weight.data, up @ down, alpha / len(down), tensors.get(f"{name}.dora_scale")
        )
    assert len(changes) == len(tensors) / (4 if use_dora else 3)
    assert gap(drawn(trained), drawn(patched(other, changes))) < 1e-3 < gap(drawn(fresh()), drawn(trained))


def comfyui(weight, diff, scale, dora_scale):
    """W + alpha / rank * up @ down, and what comfy/weight_adapter/base.py makes of a dora_scale [out, 1]: times dora_scale / ||W||."""
    merged = weight + scale * diff
    return merged if dora_scale is None else merged * (dora_scale / weight.norm(dim=1, keepdim=True))


def test_a_kohya_file_tells_rank_alpha_and_model_to_its_readers(tuned, tmp_path):
    with safe_open(written_kohya(tuned(), tmp_path), "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + FEED_FORWARD + RESIDUAL], ids=["attention", "everything"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_our_diffusers_file_draws_exactly_the_same_in_plain_diffusers(tuned, fresh, tmp_path, targets, use_dora):
    trained, other = tuned(targets, use_dora), fresh()
    diffusers_format.save_adapter(tmp_path / diffusers_format.WEIGHTS, trained.unet, {})
    other.load_lora_weights(tmp_path)
    assert gap(drawn(trained), drawn(other)) == 0


def test_text_encoder_adapters_travel_with_the_unets(tuned, fresh, tmp_path):
    trained = tuned()
    encoders = [trained.text_encoder, trained.text_encoder_2]
    adapters.add_text_lora(encoders, rank=2, alpha=4)
    unet_alone = drawn(trained)
    for encoder in encoders:
        shake(encoder)
        encoder.eval()
    diffusers_format.save_adapter(tmp_path / diffusers_format.WEIGHTS, trained.unet, {}, encoders)
    kohya.save_kohya(tmp_path / "kohya.safetensors", trained.unet, {}, encoders)
    other = fresh()
    other.load_lora_weights(tmp_path)
    assert gap(drawn(trained), drawn(other)) == gap(drawn(trained), drawn(loaded(fresh(), tmp_path))) == 0
    by_kohya = drawn(loaded(fresh(), tmp_path / "kohya.safetensors"))
    assert gap(drawn(trained), by_kohya) < 1e-3 < gap(unet_alone, by_kohya)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_our_peft_folder_draws_the_same_by_peft_itself_and_by_us(tuned, fresh, tmp_path, use_dora):
    trained, other = tuned(use_dora=use_dora), fresh()
    peft_format.save_peft(tmp_path, trained.unet, {"base_model": "some/sdxl"})
    PeftModel.from_pretrained(other.unet, tmp_path)  # puts its layers into the UNet that it is given
    assert gap(drawn(trained), drawn(other)) < 1e-3 < gap(drawn(fresh()), drawn(other))
    assert gap(drawn(trained), drawn(loaded(fresh(), tmp_path))) < 1e-3


def test_a_run_writes_on_request_what_peft_reads_for_each_part_of_the_model(train, fresh):
    run = train(
        "--max_train_steps", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--train_text_encoder", "--save_peft"
    )
    by_diffusers, by_peft = fresh(), fresh()
    by_diffusers.load_lora_weights(run.dir)
    for component, folder in zip(COMPONENTS, ("", "text_encoder", "text_encoder_2")):
        peft = PeftModel.from_pretrained(getattr(by_peft, component), run.dir / "peft" / folder)
        assert (
            peft.active_peft_config.base_model_name_or_path
            == json.loads((run.dir / "config.json").read_text())["base_model"]
        )
    assert gap(drawn(by_diffusers), drawn(by_peft)) < 1e-3 < gap(drawn(fresh()), drawn(by_peft))
    assert gap(drawn(by_diffusers), drawn(loaded(fresh(), run.dir / "peft"))) < 1e-3
    alone = loaded(fresh(), run.dir / "peft" / "text_encoder_2")
    assert [component for component in COMPONENTS if hasattr(getattr(alone, component), "peft_config")] == [
        "text_encoder_2"
    ]


# ---------------------------------------------------------------- what load_adapter reads


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_every_format_loads_to_the_same_image(tuned, fresh, tmp_path, use_dora):
    trained = tuned(use_dora=use_dora)
    expected = drawn(trained)
    diffusers_format.save_adapter(tmp_path / "run" / diffusers_format.WEIGHTS, trained.unet, {})
    assert gap(expected, drawn(loaded(fresh(), tmp_path / "run"))) == 0
    assert gap(expected, drawn(loaded(fresh(), tmp_path / "run" / diffusers_format.WEIGHTS))) == 0
    assert gap(expected, drawn(loaded(fresh(), written_kohya(trained, tmp_path)))) < 1e-3
    assert gap(expected, drawn(loaded(fresh(), peft_folder(trained, tmp_path / "peft")))) == 0


def peft_folder(pipeline, folder):
    """What save_pretrained of a PeftModel writes: names under base_model.model, and adapter_config.json."""
    weights = get_peft_model_state_dict(pipeline.unet)
    folder.mkdir()
    save_file(
        {f"base_model.model.{key}": tensor.contiguous() for key, tensor in weights.items()},
        folder / "adapter_model.safetensors",
    )
    pipeline.unet.peft_config["default"].save_pretrained(folder)
    return folder


def test_plain_diffusers_ignores_a_peft_folder_and_we_do_not(tuned, fresh, tmp_path):
    folder = peft_folder(tuned(), tmp_path / "peft")
    other = fresh()
    other.load_lora_weights(folder, weight_name="adapter_model.safetensors")
    assert gap(drawn(fresh()), drawn(other)) == 0  # the reason for a reader of our own
    assert gap(drawn(fresh()), drawn(loaded(fresh(), folder))) > 1e-3


def test_loading_a_peft_folder_does_not_ask_the_hub_about_its_base_model(tuned, fresh, tmp_path, monkeypatch):
    peft_format.save_peft(tmp_path, tuned().unet, {"base_model": "some/sdxl"})
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked the hub"))
    assert loaded(fresh(), tmp_path).get_list_adapters() == {"unet": ["adapter00"]}


def test_a_runs_folder_means_its_final_weights_and_not_those_of_a_step(tuned, tmp_path):
    pipeline = tuned()
    for name in (
        diffusers_format.WEIGHTS,
        "pytorch_lora_weights_000450.safetensors",
        "pytorch_lora_weights_000900.safetensors",
    ):
        diffusers_format.save_adapter(tmp_path / name, pipeline.unet, {})
    assert reading.find_adapter(tmp_path) == tmp_path / diffusers_format.WEIGHTS
    (tmp_path / diffusers_format.WEIGHTS).unlink()
    with pytest.raises(UserError, match="name one of its files, e.g. pytorch_lora_weights_000900.safetensors"):
        reading.find_adapter(tmp_path)


def test_a_file_without_alpha_counts_as_alpha_equal_to_rank(tuned, fresh, tmp_path):
    diffusers_format.save_adapter(tmp_path / diffusers_format.WEIGHTS, tuned().unet, {})
    save_file(load_file(tmp_path / diffusers_format.WEIGHTS), tmp_path / "bare.safetensors")
    other = fresh()
    other.load_lora_weights(tmp_path / "bare.safetensors")
    assert gap(drawn(other), drawn(loaded(fresh(), tmp_path / "bare.safetensors"))) == 0


def test_a_strangers_kohya_file_counts_with_the_rank_and_alpha_of_each_layer(fresh, tmp_path):
    """diffusers' block names, mixed ranks and alphas, one layer without alpha, and both text encoders."""
    pipeline, generator = fresh(), torch.Generator().manual_seed(2)
    unet, up_block = pipeline.unet, "up_blocks.1.attentions.2.transformer_blocks.0"
    layers = {  # kohya's name -> (module, its own name, rank, alpha)
        "lora_unet_down_blocks_1_attentions_0_proj_in": (unet, "down_blocks.1.attentions.0.proj_in", 2, 1.0),
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k": (
            unet,
            "mid_block.attentions.0.transformer_blocks.1.attn2.to_k",
            4,
            None,
        ),
        "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_2": (unet, f"{up_block}.ff.net.2", 2, 6.0),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            pipeline.text_encoder,
            "encoder.layers.0.self_attn.q_proj",
            2,
            1.0,
        ),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (pipeline.text_encoder, "encoder.layers.0.mlp.fc1", 4, 4.0),
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj": (
            pipeline.text_encoder_2,
            "encoder.layers.1.self_attn.out_proj",
            2,
            8.0,
        ),
    }
    tensors, changes = {}, []
    for key, (module, name, rank, alpha) in layers.items():
        layer = next(layer for full, layer in module.named_modules() if full.removeprefix("text_model.") == name)
        up, down = (
            torch.randn(shape, generator=generator)
            for shape in ((len(layer.weight), rank), (rank, layer.weight.shape[1]))
        )
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        tensors |= {f"{key}.alpha": torch.tensor(alpha)} if alpha else {}
        changes.append((layer, layer.weight.data + (alpha or rank) / rank * up @ down))
    save_file(tensors, tmp_path / "stranger.safetensors")
    ours = drawn(loaded(fresh(), tmp_path / "stranger.safetensors"))
    for layer, weight in changes:
        layer.weight.data = weight
    assert gap(ours, drawn(pipeline)) < 1e-3 < gap(ours, drawn(fresh()))


def test_a_lycoris_dora_scale_goes_with_the_norm_of_the_merged_weight(tuned, fresh, tmp_path):
    """https://github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/locon.py with wd_on_output: the paper's formula."""
    trained = tuned(use_dora=True)
    magnitudes = {key: tensor for key, tensor in get_peft_model_state_dict(trained.unet).items() if "magnitude" in key}
    tensors = load_file(written_kohya(trained, tmp_path))
    for key, magnitude in magnitudes.items():
        name = kohya_key("unet", key.removesuffix(".lora_magnitude_vector"), layers_per_block=2)
        tensors[f"{name}.dora_scale"] = magnitude.view(-1, 1)
    save_file(tensors, tmp_path / "lycoris.safetensors")
    assert gap(drawn(trained), drawn(loaded(fresh(), tmp_path / "lycoris.safetensors"))) < 1e-3


# ---------------------------------------------------------------- what is refused


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("the pickle was opened",)

    for name in ("lora.bin", "lora.pt", "folder/adapter_model.bin"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=f"{file.name}: only .safetensors files are read"):
            reading.find_adapter(file.parent if "/" in name else file)


def test_damaged_and_missing_files_are_named(tuned, tmp_path):
    file = tmp_path / "lora.safetensors"
    diffusers_format.save_adapter(file, tuned().unet, {})
    for keep in (file.stat().st_size - 1, 100, 0):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(UserError, match=f"--lora {file}: damaged"):
            reading.find_adapter(file)
    with pytest.raises(UserError, match="no such file or folder"):
        reading.find_adapter(tmp_path / "absent")
