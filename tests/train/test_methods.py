"""LoRA, QLoRA, DoRA and the text encoders: what is trained and what is not, and the fused layers against PEFT and plain formulas."""

import difflib
import importlib.util
import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import train_qlora
from benchmarks import full_size
from common.cli.flags import ATTENTION_PROJECTIONS
from common.errors import UserError
from common.fast import adapter_layers
from common.fast.operations import seeded_dropout
from common.model import adapters, tiny

METHODS = {
    "LoRA": ("train_sdxl", []),
    "QLoRA aggressive": ("train_qlora", []),
    "QLoRA normal": ("train_qlora", ["--strategy", "normal"]),
    "DoRA": ("train_dora", []),
    "QDoRA": ("train_dora", ["--quantize", "nf4"]),
    "text encoders": ("train_sdxl", ["--train_text_encoder"]),
}
NO_DROPOUT = ["--lora_dropout", 0]

# ---------------------------------------------------------------- what is trained, on the real architecture


@pytest.fixture(scope="module")
def sdxl():
    """SDXL base without memory, everything frozen."""
    pipeline = tiny.sdxl(full_size.FULL, full_size.PHOTOS.values(), "meta")
    for name, expected in full_size.PARAMETERS.items():
        assert adapters.count(getattr(pipeline, name).requires_grad_(False)) == expected
    return pipeline


@pytest.mark.parametrize(
    ("strategy", "use_dora", "layers", "expected"),
    [("aggressive", False, 700, 83_722_240), ("normal", False, 560, 23_224_320), ("normal", True, 560, 23_889_920)],
)
def test_trainable_parameters_of_the_unet(sdxl, strategy, use_dora, layers, expected):
    """DoRA's documented rank and layers are those of the normal strategy."""
    options = train_qlora.STRATEGIES[strategy]
    adapters.add_lora(
        sdxl.unet, options["lora_target_modules"], options["lora_rank"], options["lora_alpha"], 0.1, use_dora
    )
    try:
        trained = adapters.trainable(sdxl.unet)
        assert sum(p.numel() for _, p in trained) == expected
        assert len(trained) == layers * (3 if use_dora else 2) and {p.dtype for _, p in trained} == {torch.float32}
        assert adapters.count(sdxl.unet) == full_size.PARAMETERS["unet"] + expected
    finally:
        sdxl.unet.delete_adapters("default")


def test_trainable_parameters_of_the_text_encoders(sdxl):
    encoders = [sdxl.text_encoder, sdxl.text_encoder_2]
    adapters.add_text_lora(encoders, 16, 16)
    counts = [sum(p.numel() for _, p in adapters.trainable(encoder)) for encoder in encoders]
    assert counts == [1_179_648, 5_242_880] and sum(counts) == 6_422_528


def test_the_defaults_are_the_strategies_and_what_is_typed_still_wins(assemble):
    def adapted(*flags, script="train_qlora"):
        engine = assemble(*flags, script=script).engine
        config = engine.unet.peft_config["default"]
        return config.r, config.lora_alpha, set(config.target_modules), config.use_dora

    attention, feed_forward = set(ATTENTION_PROJECTIONS), {"ff.net.0.proj", "ff.net.2"}
    assert adapted() == (32, 32, attention | feed_forward, False)
    assert adapted("--strategy", "normal") == (16, 32, attention, False)
    assert adapted("--lora_rank", 4, "--lora_target_modules", "to_q") == (4, 32, {"to_q"}, False)
    assert adapted(script="train_dora") == (16, 32, attention, True)


# ---------------------------------------------------------------- what is not


def frozen_bits(module):
    """{name: values} of all that must not change, with the scales of 4-bit weights."""
    bits = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            bits[name] = parameter.data.clone()
        if state := getattr(parameter, "quant_state", None):
            scales = dict(
                absmax=state.absmax,
                offset=state.offset,
                code=state.code,
                absmax2=state.state2.absmax,
                code2=state.state2.code,
            )
            bits |= {f"{name}.{key}": values.clone() for key, values in scales.items()}
    return bits


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_bit_equal_after_training(train, demo, method):
    """Validation on the way included: layers may do other things in eval mode."""
    script, flags = METHODS[method]
    seen = {}

    def remember(engine, data):
        encoders = data.text.encoders if method == "text encoders" else ()
        seen["modules"] = [engine.unet, *encoders]
        seen["before"] = [frozen_bits(module) for module in seen["modules"]]

    budget = ["--max_train_steps", 3, "--lr_warmup_steps", 0, "--validation_split", 0.1, "--validation_steps", 2]
    run = train(*flags, *budget, script=script, prepare=remember)
    for module, before in zip(seen["modules"], seen["before"], strict=True):
        after = frozen_bits(module)
        assert after.keys() == before.keys() and len(after) > 30
        assert [
            name
            for name in after
            if after[name].dtype != before[name].dtype or not torch.equal(after[name], before[name])
        ] == []
    untouched = [name for name, values in run.weights().items() if not values.any()]
    # every tensor of the adapter has moved off zero; SDXL reads CLIP-L before its last layer, of the demo's two layers the second
    assert all(name.startswith("text_encoder.text_model.encoder.layers.1.") for name in untouched)
    assert len(untouched) == (4 if method == "text encoders" else 0)
    is_4bit = any(name.endswith(".absmax") for name in seen["before"][0])
    assert is_4bit == method.startswith("Q")
    assert len(seen["modules"]) == (3 if method == "text encoders" else 1)


def test_the_4bit_base_is_what_bitsandbytes_makes_of_the_file(assemble, demo):
    """Every linear layer but the time and size embeddings; nothing is lost or rounded twice on the way."""
    from bitsandbytes.functional import quantize_4bit
    from diffusers import UNet2DConditionModel

    unet = assemble(script="train_qlora").engine.unet
    whole = UNet2DConditionModel.from_pretrained(demo.model, subfolder="unet")
    quantized = {name.replace(".base_layer", ""): p for name, p in unet.named_parameters() if p.dtype == torch.uint8}
    linear = {f"{name}.weight" for name, module in whole.named_modules() if type(module) is torch.nn.Linear}
    assert quantized.keys() == {name for name in linear if "_embedding" not in name}
    for name, parameter in quantized.items():
        packed, state = quantize_4bit(whole.get_parameter(name).data, compress_statistics=True, quant_type="nf4")
        assert torch.equal(parameter.data, packed) and torch.equal(parameter.quant_state.absmax, state.absmax)


# ---------------------------------------------------------------- they learn


def gain(train, method):
    """Fall of the held-out loss, at fixed noise, in 16 steps of 8 images."""
    script, flags = METHODS[method]
    seen = {}

    def validate(engine, data):
        seen["start"] = engine.validate(data.held_out.validation_batches, 8)

    budget = [
        "--max_train_steps",
        16,
        "--train_batch_size",
        8,
        "--gradient_accumulation_steps",
        1,
        "--learning_rate",
        5e-3,
    ]
    run = train(*flags, *budget, "--validation_split", 0.25, "--validation_steps", 100, script=script, prepare=validate)
    return seen["start"] - run.rows[-1]["val_loss"]


def test_qlora_lowers_the_validation_loss_as_lora_does(train):
    reference = gain(train, "LoRA")
    assert reference > 0.02
    for method in ("QLoRA aggressive", "QLoRA normal"):
        assert gain(train, method) > 0.7 * reference, method


# ---------------------------------------------------------------- the fused layers


def gradients(parts, seed=5):
    """(loss, flat gradient) of one batch, with numbers in A and B alike and magnitudes off their start."""
    engine, (batch,) = parts.engine, parts.data.examples.effective_batch(3, 8, 8)
    generator, start = torch.Generator().manual_seed(seed), 0
    for name, shape in engine.flat.layout:
        values = engine.flat.data[start : (start := start + math.prod(shape))].view(shape)
        noise = torch.randn(shape, generator=generator)
        values.copy_(values * (1 + 0.1 * noise) if "magnitude" in name else 0.05 * noise)
    engine.flat.publish()
    engine.dropout_seed.fill_(seed)
    loss = engine.forward_backward(batch.tensors)[0]
    return loss, engine.flat.grad


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


FUSED = {
    "LoRA": ("train_sdxl", NO_DROPOUT),
    "LoRA with feed-forward": (
        "train_sdxl",
        ["--lora_target_modules", *ATTENTION_PROJECTIONS, "ff.net.0.proj", "ff.net.2"],
    ),
    "DoRA": ("train_dora", NO_DROPOUT),
    "NF4 LoRA": ("train_qlora", NO_DROPOUT),
    "NF4 DoRA": ("train_dora", ["--quantize", "nf4", *NO_DROPOUT]),
    "text encoders": ("train_sdxl", ["--train_text_encoder"]),
}


@pytest.mark.parametrize("method", FUSED)
def test_fused_layers_compute_what_peft_computes(assemble, method):
    script, flags = FUSED[method]
    parts = [assemble(*flags, "--lora_backend", backend, script=script) for backend in ("fused", "peft")]
    assert parts[0].engine.flat.layout == parts[1].engine.flat.layout
    (loss, gradient), (expected_loss, expected_gradient) = map(gradients, parts)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert expected_gradient.any() and relative_error(gradient, expected_gradient) < 1e-5
    with torch.no_grad():
        (batch,) = parts[0].data.examples.effective_batch(4, 8, 8)
        predictions = [part.engine.predict(batch.tensors)[0] for part in parts]
    assert relative_error(*predictions) < 1e-5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_layer_is_its_formula(use_dora, bias, p):
    """y = g (x W^T + s d(x) A^T B^T) + bias with g = m / n: the mask acts on the adapter's branch only, n is a constant."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, lora_dropout=p, target_modules=["0"], use_dora=use_dora), model
    )
    layer, seed, s = model[0], torch.tensor(11), 6 / 4
    flat = adapters.FlatParameters([(adapters.trainable(model), {})])
    adapter_layers.fuse([model], flat, seed)
    flat.data.add_(0.1 * torch.randn(len(flat)))
    flat.publish()
    W, b, A, B = (
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A.default.weight,
        layer.lora_B.default.weight,
    )
    x, dy = torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 7, 40)
    model(x).backward(dy)
    found = [model(x).detach(), x.grad.clone(), flat.grad.clone()]

    x.grad, flat.grad[:] = None, 0
    mask = seeded_dropout(torch.ones(14, 24), p, seed, layer.forward.salt).view(2, 7, 24) if p else torch.ones(2, 7, 24)
    y = x @ W.T + s * (x * mask) @ A.T @ B.T
    if use_dora:
        y = y * (layer.lora_magnitude_vector.default.weight / (W + s * B @ A).norm(dim=1).detach())
    y = y if b is None else y + b
    y.backward(dy)
    for got, expected in zip(found, [y.detach(), x.grad, flat.grad], strict=True):
        assert relative_error(got, expected) < 1e-6
    model.eval()
    assert p == 0 or not torch.equal(model(x), found[0])


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_dora_starts_as_the_frozen_model(assemble, quantize):
    dora, lora = (
        assemble("--quantize", quantize, *NO_DROPOUT, script=script) for script in ("train_dora", "train_sdxl")
    )
    (batch,) = dora.data.examples.effective_batch(0, 8, 8)
    with torch.no_grad():
        start, expected = dora.engine.predict(batch.tensors)[0], lora.engine.predict(batch.tensors)[0]
        lora.engine.unet.disable_adapters()
        assert torch.equal(lora.engine.predict(batch.tensors)[0], expected)
    assert torch.equal(start, expected)


@pytest.mark.parametrize("method", ["DoRA", "QLoRA aggressive"])
def test_recomputed_blocks_drop_the_same_elements(assemble, method):
    """Without storing a mask or rewinding a generator."""
    script, flags = METHODS[method]
    dropped = [*flags, "--lora_dropout", 0.3]
    stored, recomputed = (
        assemble(*dropped, switch, script=script)
        for switch in ("--no_gradient_checkpointing", "--gradient_checkpointing")
    )
    (loss, gradient), (expected_loss, expected_gradient) = gradients(recomputed), gradients(stored)
    assert loss == expected_loss and relative_error(gradient, expected_gradient) < 1e-6
    _, without = gradients(assemble(*flags, *NO_DROPOUT, script=script))
    assert relative_error(without, expected_gradient) > 0.1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_share_and_mean_and_is_linear(p):
    x, y = torch.randn(2, 400, 500, generator=torch.Generator().manual_seed(1)) + 1
    seed = torch.tensor(7)
    d = lambda values, seed=seed, salt=3: seeded_dropout(values, p, seed, salt)  # noqa: E731
    kept = d(torch.ones_like(x)) != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.005)  # 4 standard deviations
    assert d(x).mean().item() == pytest.approx(x.mean().item(), abs=0.04)
    torch.testing.assert_close(d(x), torch.where(kept, x / (1 - p), 0))  # 1 / (1 - p) is rounded before it multiplies
    torch.testing.assert_close(d(2 * x - 3 * y), 2 * d(x) - 3 * d(y))
    torch.testing.assert_close(
        (d(x) * y).sum(), (x * d(y)).sum()
    )  # its own transpose: the backward pass is the same mask
    assert (
        torch.equal(d(x), d(x))
        and not torch.equal(d(x), d(x, salt=4))
        and not torch.equal(d(x), d(x, seed=torch.tensor(8)))
    )
    torch.testing.assert_close(seeded_dropout(x, p, seed, 3, add_to=y.clone(), alpha=0.5), y + 0.5 * d(x))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("script", "line", "missing", "named"),
    [
        ("train_qlora", "--strategy agressive", None, ["--strategy", "agressive", "aggressive", "normal"]),
        ("train_dora", "--quantize int8", None, ["--quantize", "int8", "none", "nf4"]),
        ("train_sdxl", "--quantize nf4", "bitsandbytes", ["--quantize nf4", "pip install bitsandbytes"]),
        ("train_qlora", "--no_use_8bit_adam", "bitsandbytes", ["--quantize nf4", "pip install bitsandbytes"]),
        (
            "train_sdxl",
            "--enable_xformers_memory_efficient_attention",
            "xformers",
            ["--enable_xformers_memory_efficient_attention", "pip install xformers"],
        ),
        ("train_dora", "--lora_target_modules", None, ["--lora_target_modules"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch, script, line, missing, named):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else original(name, *rest)
    )
    with pytest.raises(UserError) as caught:
        __import__(script).main(["--demo", "--output_dir", str(tmp_path / "out"), *line.split()])
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in named)
    assert not (tmp_path / "out").exists()


def test_layers_that_sdxl_does_not_have_are_mentioned_once_and_do_not_fail(assemble, capsys):
    assemble(script="train_qlora")
    assert capsys.readouterr().out.count("add_k_proj and add_v_proj") == 1
    assemble("--strategy", "normal", script="train_qlora")
    assert "add_k_proj" not in capsys.readouterr().out


# ---------------------------------------------------------------- the scripts side by side


@pytest.mark.parametrize("other", ["train_qlora.py", "train_dora.py", "train_opt.py"])
def test_a_diff_of_two_trainers_is_the_difference_of_the_methods(root, other):
    texts = [(root / name).read_text().splitlines() for name in ("train_sdxl.py", other)]
    changed = [line for line in difflib.unified_diff(*texts, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) < 60
