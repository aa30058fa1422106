"""Adapters of other tools: what their formulas say is what is drawn and merged, alone, scaled and together."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_formats import ATTENTION, drawn, gap, loaded, peft_folder, shake

import infer
from common.adapter_files import diffusers_format, into_pipeline, merging, names
from common.model import adapters

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
Q, FF, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.0.proj", "down_blocks.0.resnets.0.conv1"
KOHYA_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(demo):
    """The UNet's weights."""
    return load_file(demo.model / UNET)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "foreign.safetensors"


def random(*shape, seed):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kohya(layer):
    return names.kohya_key("unet", layer, layers_per_block=2)


def merged_weights(pipeline, file, scale=1.0):
    """The UNet's weights after --merge would have fused `file` into it."""
    into_pipeline.load_adapter(pipeline, file, "adapter00")
    merging._fuse(pipeline, [("adapter00", scale)])
    return pipeline.unet.state_dict()


# ---------------------------------------------------------------- the formulas of https://github.com/KohakuBlueleaf/LyCORIS


def tucker(core, a, b):
    """a [R, N], b [R, channels] around a core [R, R, height, width]."""
    return torch.einsum("ijhw,ip,jr->prhw", core, a, b).contiguous()


def lora_mid(n, k, height, width):
    t = {"lora_up.weight": random(n, 4, 1, 1, seed=1), "lora_mid.weight": random(4, 4, height, width, seed=2)}
    t |= {"lora_down.weight": random(4, k, 1, 1, seed=3)}
    return t, tucker(t["lora_mid.weight"], t["lora_up.weight"].view(n, 4).t(), t["lora_down.weight"].view(4, k)) * 6 / 4


def loha(n, k, *kernel):
    area = kernel[0] * kernel[1] if kernel else 1
    t = {f"hada_w{i}_a": random(n, 3, seed=i) for i in (1, 2)} | {
        f"hada_w{i}_b": random(3, k * area, seed=i + 2) for i in (1, 2)
    }
    product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return t, product.view(n, k, *kernel) * 6 / 3


def loha_of_high_rank(n, k):
    t = {f"hada_w{i}_a": random(n, 16, seed=i) for i in (1, 2)} | {
        f"hada_w{i}_b": random(16, k, seed=i + 2) for i in (1, 2)
    }
    return t, (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * 6 / 16


def loha_tucker(n, k, height, width):
    t = {f"hada_t{i}": random(3, 3, height, width, seed=i) for i in (1, 2)}
    t |= {f"hada_w{i}_a": random(3, n, seed=i + 2) for i in (1, 2)} | {
        f"hada_w{i}_b": random(3, k, seed=i + 4) for i in (1, 2)
    }
    one, two = (tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in (1, 2))
    return t, one * two * 6 / 3


def lokr_whole(n, k, *kernel):
    t = {"lokr_w1": random(4, 2, seed=1), "lokr_w2": random(n // 4, k // 2, *kernel, seed=2)}
    return t, torch.kron(t["lokr_w1"].view(4, 2, *[1] * len(kernel)), t["lokr_w2"])  # alpha does not count


def lokr_low_rank(n, k, *kernel):
    area = kernel[0] * kernel[1] if kernel else 1
    t = {
        "lokr_w1": random(4, 2, seed=1),
        "lokr_w2_a": random(n // 4, 2, seed=2),
        "lokr_w2_b": random(2, k // 2 * area, seed=3),
    }
    second = (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(n // 4, k // 2, *kernel)
    return t, torch.kron(t["lokr_w1"].view(4, 2, *[1] * len(kernel)), second) * 6 / 2


def lokr_both_low_rank(n, k):
    t = {"lokr_w1_a": random(4, 2, seed=1), "lokr_w1_b": random(2, 2, seed=2)}
    t |= {"lokr_w2_a": random(n // 4, 3, seed=3), "lokr_w2_b": random(3, k // 2, seed=4)}
    return t, torch.kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]) * 6 / 3


def lokr_tucker(n, k, height, width):
    t = {"lokr_w1": random(4, 2, seed=1), "lokr_t2": random(2, 2, height, width, seed=2)}
    t |= {"lokr_w2_a": random(2, n // 4, seed=3), "lokr_w2_b": random(2, k // 2, seed=4)}
    return t, torch.kron(t["lokr_w1"].view(4, 2, 1, 1), tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])) * 6 / 2


FORMULAS = {
    "lora_mid": {CONV: lora_mid},
    "LoHa": {Q: loha, FF: loha, CONV: loha},
    "LoHa of high rank": {Q: loha_of_high_rank},
    "LoHa, Tucker": {CONV: loha_tucker},
    "LoKr": {Q: lokr_whole, FF: lokr_whole, CONV: lokr_whole},
    "LoKr, w2 of low rank": {Q: lokr_low_rank, FF: lokr_low_rank, CONV: lokr_low_rank},
    "LoKr, both of low rank": {Q: lokr_both_low_rank},
    "LoKr, Tucker": {CONV: lokr_tucker},
    "all kinds in one file": {Q: lokr_whole, FF: loha, CONV: lora_mid},
}


def written(file, base, layers, name=kohya):
    """Write `layers` {layer: formula} with alpha 6 -> {weight name: change}."""
    tensors, changes = {}, {}
    for layer, formula in layers.items():
        parts, change = formula(*base[f"{layer}.weight"].shape)
        tensors |= {f"{name(layer)}.{kind}": tensor.contiguous() for kind, tensor in parts.items()}
        tensors[f"{name(layer)}.alpha"] = torch.tensor(6.0)
        changes[f"{layer}.weight"] = change
    save_file(tensors, file)
    return changes


@pytest.mark.parametrize("layers", FORMULAS.values(), ids=FORMULAS)
def test_the_merged_weight_is_what_the_formula_says_at_any_scale(fresh, base, file, layers):
    changes = written(file, base, layers)
    now = merged_weights(fresh(), file, scale=0.5)
    for name, change in changes.items():
        assert torch.allclose(now[name], base[name] + 0.5 * change, atol=1e-6) and change.abs().max() > 1e-4
    assert all(torch.equal(now[name], base[name]) for name in base.keys() - changes.keys())


def test_what_is_drawn_beside_a_lora_is_what_both_formulas_say(fresh, base, file, tmp_path):
    changes = written(file, base, FORMULAS["all kinds in one file"])
    up, down = random(32, 4, seed=8), random(4, 32, seed=9)
    save_file({f"{KOHYA_Q}.lora_up.weight": up, f"{KOHYA_Q}.lora_down.weight": down}, tmp_path / "lora.safetensors")
    pipeline, plain = fresh(), fresh()
    for name, place in (("lora", tmp_path / "lora.safetensors"), ("lokr", file)):
        into_pipeline.load_adapter(pipeline, place, name)
    pipeline.set_adapters(["lora", "lokr"], [0.5, 4.0])
    weights = {name: base[name] + 4 * change for name, change in changes.items()}
    weights[f"{Q}.weight"] += 0.5 * up @ down
    untouched = drawn(plain)
    plain.unet.load_state_dict(weights, strict=False)
    assert gap(drawn(pipeline), drawn(plain)) < 1e-4 < 1e-2 < gap(untouched, drawn(plain))
    pipeline.disable_lora()
    assert gap(untouched, drawn(pipeline)) == 0


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        kohya,
        lambda layer: "lora_unet_" + layer.replace(".", "_"),
        lambda layer: "lycoris_" + layer.replace(".", "_"),
        lambda layer: f"unet.{layer}",
        lambda layer: f"diffusion_model.{names.original_name(layer, 2)}",
    ],
    ids=["kohya", "kohya, diffusers' blocks", "lycoris", "diffusers", "ComfyUI"],
)
def test_a_layer_is_known_by_all_of_its_names(fresh, base, file, name):
    changes = written(file, base, {Q: lokr_low_rank, CONV: lora_mid}, name)
    now = merged_weights(fresh(), file)
    assert all(torch.allclose(now[key], base[key] + change, atol=1e-6) for key, change in changes.items())


PAIRS = [
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]


@pytest.mark.parametrize("kinds", PAIRS, ids=[down for down, _ in PAIRS])
def test_halves_are_known_by_all_of_their_names_in_the_unet_and_in_text_encoders(fresh, base, file, kinds):
    pipeline, name = fresh(), "encoder.layers.0.self_attn.out_proj"
    encoder = next(layer for full, layer in pipeline.text_encoder_2.named_modules() if full.endswith(name))
    side = len(encoder.weight)
    up, down = random(32, 4, seed=8), random(4, 32, seed=9)
    text_up, text_down = random(side, 4, seed=10), random(4, side, seed=11)
    tensors = {f"unet.{Q}.{kind}": half for kind, half in zip(kinds, (down, up))} | {
        f"unet.{Q}.alpha": torch.tensor(8.0)
    }
    tensors |= {f"text_encoder_2.text_model.{name}.{kind}": half for kind, half in zip(kinds, (text_down, text_up))}
    save_file(tensors, file)
    expected = encoder.weight.data + text_up @ text_down
    now = merged_weights(pipeline, file)
    assert torch.allclose(now[f"{Q}.weight"], base[f"{Q}.weight"] + 8 / 4 * up @ down, atol=1e-6)
    assert torch.allclose(encoder.weight.data, expected, atol=1e-6)


def test_diffusers_first_names_of_attention_processors_are_known(fresh, base, file):
    up, down = random(32, 4, seed=8), random(4, 32, seed=9)
    names = [f"unet.{BLOCK}.attn1.processor.{part}_lora" for part in ("to_q", "to_out")]
    save_file(
        {f"{name}.{kind}.weight": half.clone() for name in names for kind, half in (("down", down), ("up", up))}, file
    )
    now = merged_weights(fresh(), file)
    for layer in (Q, f"{BLOCK}.attn1.to_out.0"):
        assert torch.allclose(now[f"{layer}.weight"], base[f"{layer}.weight"] + up @ down, atol=1e-6)


# ---------------------------------------------------------------- DoRA


@pytest.mark.parametrize("layer, axes", [(Q, 2), (FF, 2), (CONV, 4)], ids=["square", "wide", "convolution"])
@pytest.mark.parametrize("algorithm", ["LoRA", "LoKr"])
def test_a_dora_over_columns_is_the_formula_of_lycoris(fresh, base, file, layer, axes, algorithm):
    """(W + d) dora_scale / ||W + d||, norms over columns: wd_on_output off, what LyCORIS wrote first."""
    weight = base[f"{layer}.weight"]
    if algorithm == "LoRA":
        parts = {"lora_up.weight": random(len(weight), 4, *[1] * (axes - 2), seed=1)}
        parts |= {"lora_down.weight": random(4, *weight.shape[1:], seed=2)}
        change = (parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)).view(weight.shape) * 2 / 4
    else:
        parts, change = lokr_whole(*weight.shape)
    scale = 1 + random(1, weight.shape[1], *[1] * (axes - 2), seed=3).abs()
    save_file(
        {f"{kohya(layer)}.{kind}": t for kind, t in {**parts, "dora_scale": scale, "alpha": torch.tensor(2.0)}.items()},
        file,
    )
    norms = (weight + change).transpose(0, 1).flatten(1).norm(dim=1).view(scale.shape)
    expected = (weight + change) * scale / norms
    assert torch.allclose(merged_weights(fresh(), file)[f"{layer}.weight"], expected, atol=1e-5)


def test_a_dora_over_rows_without_alpha_has_alpha_equal_to_rank(fresh, base, file):
    weight, up, down = base[f"{Q}.weight"], random(32, 4, seed=1), random(4, 32, seed=2)
    scale = weight.norm(dim=1, keepdim=True) * 1.3
    save_file(
        {f"{KOHYA_Q}.lora_up.weight": up, f"{KOHYA_Q}.lora_down.weight": down, f"{KOHYA_Q}.dora_scale": scale}, file
    )
    merged = weight + up @ down
    expected = merged * scale / merged.norm(dim=1, keepdim=True)
    assert torch.allclose(merged_weights(fresh(), file)[f"{Q}.weight"], expected, atol=1e-5)


def test_a_dora_of_a_lokr_keeps_both(fresh, base, file):
    weight = base[f"{Q}.weight"]
    parts, change = lokr_low_rank(*weight.shape)
    scale = weight.norm(dim=1, keepdim=True) * 0.8
    save_file(
        {f"{KOHYA_Q}.{kind}": t for kind, t in {**parts, "dora_scale": scale, "alpha": torch.tensor(6.0)}.items()}, file
    )
    merged = weight + change
    expected = merged * scale / merged.norm(dim=1, keepdim=True)
    assert torch.allclose(merged_weights(fresh(), file)[f"{Q}.weight"], expected, atol=1e-5)


def test_a_dora_of_a_text_encoder_is_read(fresh, file):
    """transformers filled its magnitudes with random numbers."""
    name, pipeline = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", fresh()
    layer = next(
        layer
        for name, layer in pipeline.text_encoder.named_modules()
        if name.endswith("encoder.layers.0.self_attn.q_proj")
    )
    up, down, scale = random(32, 4, seed=1), random(4, 32, seed=2), torch.linspace(0.5, 1.5, 32)[:, None]
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.dora_scale": scale}, file)
    merged = layer.weight.data + up @ down
    merged_weights(pipeline, file)
    assert torch.allclose(layer.weight.data, merged * scale / merged.norm(dim=1, keepdim=True), atol=1e-5)


# ---------------------------------------------------------------- values and what lies beside them


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_8_bit_floats_count_as_the_numbers_they_are(fresh, base, file, dtype):
    up, down = random(32, 4, seed=1).to(dtype), random(4, 32, seed=2).to(dtype)
    save_file({f"{KOHYA_Q}.lora_up.weight": up, f"{KOHYA_Q}.lora_down.weight": down}, file)
    expected = base[f"{Q}.weight"] + up.float() @ down.float()
    assert torch.allclose(merged_weights(fresh(), file)[f"{Q}.weight"], expected, atol=1e-6)


def test_layers_are_used_without_the_embeddings_bundled_with_them_and_that_is_said(fresh, base, file, capsys):
    changes = written(file, base, {Q: loha})
    save_file(
        {**load_file(file), "bundle_emb.ink.clip_l": torch.zeros(2, 64), "bundle_emb.ink.clip_g": torch.zeros(2, 64)},
        file,
    )
    now = merged_weights(fresh(), file)
    assert torch.allclose(now[f"{Q}.weight"], base[f"{Q}.weight"] + changes[f"{Q}.weight"], atol=1e-6)
    assert "the text embeddings in it (ink) are left out" in capsys.readouterr().out


def test_merge_takes_every_readable_kind(base, file, tmp_path):
    changes = written(file, base, FORMULAS["all kinds in one file"])
    infer.main(["--demo", "--merge", str(tmp_path / "merged"), "--lora", f"{file}:2"])
    now = load_file(tmp_path / "merged" / UNET)
    assert all(torch.allclose(now[name], base[name] + 2 * change, atol=1e-6) for name, change in changes.items())


def test_peft_rank_stabilised_scaling_is_kept(fresh, tmp_path):
    """alpha / sqrt(rank): only the config knows, so reading the tensors alone would be wrong."""
    trained = fresh()
    trained.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=ATTENTION))
    shake(trained.unet)
    assert gap(drawn(trained), drawn(loaded(fresh(), peft_folder(trained, tmp_path / "peft")))) == 0


def test_dropout_in_what_a_file_says_is_not_drawn(fresh, tmp_path):
    """Neither that of a PEFT folder nor that in diffusers' metadata."""
    pipeline = fresh()
    adapters.add_lora(pipeline.unet, ATTENTION, rank=4, alpha=4, dropout=0.5)
    adapters.add_text_lora([pipeline.text_encoder], rank=4, alpha=4, dropout=0.5)
    for module in (pipeline.unet, pipeline.text_encoder):
        shake(module)
        module.eval()
    described = {f"unet.{name}": value for name, value in pipeline.unet.peft_config["default"].to_dict().items()}
    described = {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
    save_adapter_with(tmp_path / "theirs.safetensors", pipeline.unet, described)
    peft_folder(pipeline, tmp_path / "peft")
    diffusers_format.save_adapter(tmp_path / "ours.safetensors", pipeline.unet, {}, [pipeline.text_encoder])
    for place in ("theirs.safetensors", "peft", "ours.safetensors"):
        reader = loaded(fresh(), tmp_path / place)
        assert gap(drawn(reader), drawn(reader)) == 0
        modules = [*reader.unet.modules(), *reader.text_encoder.modules()]
        assert not any(module.training for module in modules) and "Dropout(p=0.5" not in str(reader.unet)
    plain = fresh()
    plain.load_lora_weights(tmp_path / "ours.safetensors")
    assert gap(drawn(plain), drawn(plain)) == 0 and gap(drawn(plain), drawn(reader)) == 0


def save_adapter_with(file, unet, described):
    """As diffusers writes it, with `described` for metadata."""
    diffusers_format.save_adapter(file, unet, {})
    save_file(load_file(file), file, {"format": "pt", diffusers_format.ADAPTER_METADATA: json.dumps(described)})
