"""Claims about the GPU: `make test-gpu`. The last recorded run is in docs/log.md."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make test-gpu")

METHODS = [
    ("train_sdxl", []),
    ("train_sdxl", ["--train_text_encoder"]),
    ("train_qlora", ["--lora_dropout", "0"]),
    ("train_dora", ["--lora_dropout", "0"]),
    ("train_dora", ["--lora_dropout", "0", "--quantize", "nf4"]),
]


def names(value):
    return " ".join(value) if isinstance(value, list) else value


def gradient(parts, number=0):
    """(loss, flat gradient over the loss scale) of the first effective batch, weights moved off their start."""
    engine = parts.engine
    generator = torch.Generator("cpu").manual_seed(1)
    engine.flat.data.add_(0.02 * torch.randn(len(engine.flat), generator=generator).to(engine.flat.data))
    engine.flat.publish()
    batches = parts.data.examples.effective_batch(number, 4, 4)
    total = sum(engine.run_pass(batch.tensors) for batch in batches)
    return total[0].item(), engine.flat.grad / engine.loss_scale.value


@pytest.mark.parametrize(("script", "flags"), METHODS, ids=names)
def test_fused_layers_compute_what_peft_computes_in_fp16(assemble, script, flags):
    results = {}
    for backend in ("fused", "peft"):
        results[backend] = gradient(assemble(*flags, "--lora_backend", backend, "--no_cuda_graph", script=script))
    (loss, grad), (expected_loss, expected_grad) = results["fused"], results["peft"]
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert (grad - expected_grad).norm() < 2e-2 * expected_grad.norm()  # two ways of rounding, over 80 layers


@pytest.mark.parametrize(("script", "flags"), [*METHODS, ("train_dora", []), ("train_qlora", ["--gradient_checkpointing"])], ids=names)
def test_a_replayed_pass_is_the_launched_pass(assemble, script, flags):
    """Dropout and checkpointing included: masks are a function of the seed that is read when the graph runs."""
    losses = {}
    for graph in ("--cuda_graph", "--no_cuda_graph"):
        engine, data = (parts := assemble(*flags, graph, script=script)).engine, parts.data
        results = [engine.step(n + 1, data.examples.effective_batch(n, 4, 2)) for n in range(5)]
        losses[graph] = [(result.loss, result.grad_norm) for result in results]
        assert bool(engine.run_pass._graphs) == (graph == "--cuda_graph")
    for replayed, launched in zip(*losses.values(), strict=True):
        assert replayed == pytest.approx(launched, rel=2e-3)


@pytest.mark.parametrize("graph", ["--cuda_graph", "--no_cuda_graph"])
def test_an_overflow_moves_nothing_but_the_scale(assemble, graph):
    engine, data = (parts := assemble("--lr_warmup_steps", "0", graph)).engine, parts.data
    for n in range(3):
        engine.step(n + 1, data.examples.effective_batch(n, 8, 4))
    before, average = engine.flat.data.clone(), engine.ema.average.clone()
    engine.loss_scale.value.fill_(2.0**40)
    result = engine.step(4, data.examples.effective_batch(3, 8, 4))
    assert not result.applied and engine.loss_scale.value.item() == 2.0**39
    assert torch.equal(engine.flat.data, before) and torch.equal(engine.ema.average, average) and not engine.flat.grad.any()
    engine.loss_scale.value.fill_(2.0**12)
    assert engine.step(4, data.examples.effective_batch(3, 8, 4)).applied


def test_a_pass_never_waits_for_the_gpu(assemble):
    engine, data = (parts := assemble()).engine, parts.data
    batches = [data.examples.effective_batch(n, 8, 4) for n in range(3)]
    for batch in batches:
        engine.step(1, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[0] * 3:
            engine.run_pass(batch.tensors)
        engine.publish({})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_is_a_function_of_seed_and_layer():
    from common.kernels import seeded_dropout

    x, seed = torch.ones(1000, 640, device="cuda", dtype=torch.float16), torch.tensor(7, device="cuda")
    once, again = seeded_dropout(x, 0.1, seed, 3), seeded_dropout(x, 0.1, seed, 3)
    assert torch.equal(once, again) and not torch.equal(once, seeded_dropout(x, 0.1, seed, 4))
    assert not torch.equal(once, seeded_dropout(x, 0.1, seed + 1, 3))
    assert (once == 0).float().mean().item() == pytest.approx(0.1, abs=0.002)
    assert once.float().mean().item() == pytest.approx(1.0, abs=0.003)


def test_the_plan_steps_down_when_memory_runs_out_and_the_step_is_repeated(train, monkeypatch):
    from common import engine

    original, failures = engine.Engine.forward_backward, []

    def too_large(self, fields):
        if len(fields["t"]) > 2:
            failures.append(len(fields["t"]))
            raise torch.OutOfMemoryError("out of memory")
        return original(self, fields)

    flags = ["--max_train_steps", 3, "--no_auto_fit", "--gradient_checkpointing", "--lr_warmup_steps", 0]
    expected = train(*flags)
    monkeypatch.setattr(engine.Engine, "forward_backward", too_large)
    run = train(*flags)
    assert failures == [4] and run.losses == pytest.approx(expected.losses, rel=2e-3)


def test_losses_are_those_of_the_documented_micro_batch(train):
    flags = ["--max_train_steps", 6, "--lr_warmup_steps", 0]
    planned = train(*flags, "--auto_fit")
    plain = train(*flags, "--no_auto_fit", "--no_cuda_graph", "--lora_backend", "peft")
    assert planned.losses == pytest.approx(plain.losses, rel=2e-3)


def test_the_gated_activation_is_pytorchs_with_its_gradient():
    from common.kernels import Geglu

    h = torch.randn(3, 70, 2 * 1280, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).half()
    dy = torch.randn(3, 70, 1280, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).half()
    exact = h.double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    (expected := value * torch.nn.functional.gelu(gate)).backward(dy.double())
    h.requires_grad_()
    (y := Geglu.apply(h)).backward(dy)
    for got, reference in ((y, expected), (h.grad, exact.grad)):
        assert (got.double() - reference).norm() < 5e-4 * reference.norm()


@pytest.mark.parametrize("rows", [1, 77, 4096])
@pytest.mark.parametrize("with_bias", [False, True])
def test_doras_backward_kernel_is_its_formula(rows, with_bias):
    from common.kernels import gain_backward

    generator = torch.Generator("cuda").manual_seed(0)
    dy, y = (torch.randn(rows, 640, device="cuda", generator=generator).half() for _ in range(2))
    gain, bias = (torch.randn(640, device="cuda", generator=generator).half() for _ in range(2))
    du, sums = gain_backward(dy, y, gain, bias if with_bias else None)
    u = y.double() - (bias.double() if with_bias else 0)
    assert (du.double() - dy.double() * gain.double()).norm() < 5e-4 * du.double().norm()
    assert (sums.double() - (dy.double() * u).sum(0)).norm() < 1e-5 * sums.double().norm()


@pytest.mark.parametrize("quantize", ["fp16", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_fused_layer_is_its_formula_in_fp16(use_dora, quantize, p):
    """Outputs and gradients against the formula in fp64, and at p = 0 no further from it than PEFT's own forward pass."""
    model, layer, flat, seed = adapted_layer(use_dora, quantize, p)
    generator = torch.Generator("cuda").manual_seed(2)
    x, dy = (torch.randn(1024, n, device="cuda", generator=generator).half() for n in (640, 1280))
    W, A, B = (t.double() for t in (layer.forward.weight(), layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()))
    mask = seeded(torch.ones_like(x), p, seed, layer).double() if p else torch.ones_like(x).double()
    leaves = [x.double().requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    y = leaves[0] @ W.T + 2 * (leaves[0] * mask) @ A.T @ B.T
    if use_dora:
        gain = layer.lora_magnitude_vector.default.weight.double() / (W + 2 * B @ A).norm(dim=1)
        y = y * gain.detach()
    (y + layer.base_layer.bias.double()).backward(dy.double())
    exact = [(y + layer.base_layer.bias.double()).detach(), *(leaf.grad for leaf in leaves)]
    for got, reference in zip(outputs_and_gradients(layer.forward, layer, flat, x, dy), exact, strict=True):
        assert (got.double() - reference).norm() < 1e-3 * reference.norm()
    if not p:
        for got, reference in zip(outputs_and_gradients(layer.forward.peft_forward, layer, flat, x, dy), exact, strict=True):
            assert (got.double() - reference).norm() < 5e-3 * reference.norm()


def seeded(x, p, seed, layer):
    from common.kernels import seeded_dropout

    return seeded_dropout(x, p, seed, layer.forward.salt)


def adapted_layer(use_dora, quantize, p):
    """(model, its PEFT layer with a fused forward pass, flat parameters, dropout seed): 640 -> 1280, rank 16, alpha 32."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    from common import adapters, fused

    torch.manual_seed(0)
    base = torch.nn.Linear(640, 1280).half()
    model = torch.nn.Sequential(base)
    if quantize == "nf4":
        model[0] = bitsandbytes.nn.Linear4bit(640, 1280, compute_dtype=torch.float16, quant_type="nf4")
        model[0].half().load_state_dict(base.state_dict())
        model.is_loaded_in_4bit = True
    model = model.cuda().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules=["0"], use_dora=use_dora), model)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data = parameter.data.float().cuda()
    flat, seed = adapters.FlatParameters([(adapters.trainable(model), {})], torch.float16), torch.tensor(3, device="cuda")
    fused.fuse([model], flat, seed)
    generator = torch.Generator("cuda").manual_seed(1)
    flat.data.add_(0.02 * torch.randn(len(flat), device="cuda", generator=generator))
    flat.publish()
    return model, model[0], flat, seed


def outputs_and_gradients(forward, layer, flat, x, dy):
    """[y, dx, dA, dB] of one forward and backward pass."""
    flat.grad.zero_()
    x = x.clone().requires_grad_()
    (y := forward(x)).backward(dy)
    return [y.detach(), x.grad, layer.lora_A.default.weight.grad.clone(), layer.lora_B.default.weight.grad.clone()]
