"""Claims about the GPU: `make test-gpu`. The last recorded run stands in README.md."""

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


@pytest.mark.parametrize(
    ("script", "flags"), [*METHODS, ("train_dora", []), ("train_qlora", ["--gradient_checkpointing"])], ids=names
)
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
    assert (
        torch.equal(engine.flat.data, before)
        and torch.equal(engine.ema.average, average)
        and not engine.flat.grad.any()
    )
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
    assert engine.flat.grad.any()


def test_dropout_is_a_function_of_seed_and_layer():
    from common.fast.kernels import seeded_dropout

    x, seed = torch.ones(1000, 640, device="cuda", dtype=torch.float16), torch.tensor(7, device="cuda")
    once, again = seeded_dropout(x, 0.1, seed, 3), seeded_dropout(x, 0.1, seed, 3)
    assert torch.equal(once, again) and not torch.equal(once, seeded_dropout(x, 0.1, seed, 4))
    assert not torch.equal(once, seeded_dropout(x, 0.1, seed + 1, 3))
    assert (once == 0).float().mean().item() == pytest.approx(0.1, abs=0.002)
    assert once.float().mean().item() == pytest.approx(1.0, abs=0.003)


def test_the_plan_steps_down_when_memory_runs_out_and_the_step_is_repeated(train, monkeypatch):
    from common.train import engine

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
    from common.fast.kernels import geglu

    h = torch.randn(3, 70, 2 * 1280, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).half()
    dy = torch.randn(3, 70, 1280, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).half()
    exact = h.double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    (expected := value * torch.nn.functional.gelu(gate)).backward(dy.double())
    h.requires_grad_()
    (y := geglu(h)).backward(dy)
    for got, reference in ((y, expected), (h.grad, exact.grad)):
        assert (got.double() - reference).norm() < 5e-4 * reference.norm()


@pytest.fixture
def unproven(monkeypatch):
    """Operations as they are before any kernel was tried."""
    from common.fast import operations

    for operation in operations.EVERY_OPERATION:
        monkeypatch.setattr(operation, "faults", {})
        monkeypatch.setattr(operation, "on_gpu", operation.plain)
    return operations.EVERY_OPERATION


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [4, 16, 128])
def test_every_kernel_passes_the_check_at_the_start(unproven, dtype, rank):
    from common.fast import kernel_check

    lines = []
    kernel_check.adopt_kernels(unproven, torch.device("cuda"), dtype=dtype, rank=rank, say=lines.append)
    assert len(lines) == 1 and kernel_check.refused() == []
    assert all(operation.on_gpu is not operation.plain for operation in unproven)


OPERATIONS = [
    "seeded_dropout",
    "gain_backward",
    "scale_rows",
    "update_gain",
    "geglu",
    "group_norm",
    "add_norm",
    "add_bias",
]
DORA = ["--max_train_steps", 3, "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--lora_dropout", 0.1]


@pytest.fixture(scope="module")
def dora_losses(train):
    """Of a run that launches every kernel."""
    return train(*DORA, script="train_dora").losses


@pytest.mark.parametrize("broken", [*map(lambda name: [name], OPERATIONS), OPERATIONS], ids=names)
def test_kernels_that_do_not_compile_cost_speed_and_not_the_run(
    unproven, train, dora_losses, monkeypatch, capsys, broken
):
    """The same losses, dropout masks included, from passes that are still captured and replayed."""
    from common.fast import kernel_check

    original, engines = kernel_check.kernel_of, []

    def kernel_of(operation):
        if operation.__name__ in broken:
            raise RuntimeError("PassManager::run failed")
        return original(operation)

    monkeypatch.setattr(kernel_check, "kernel_of", kernel_of)
    run = train(*DORA, script="train_dora", prepare=lambda engine, data: engines.append(engine))
    printed = capsys.readouterr().out
    assert run.losses == pytest.approx(dora_losses, rel=2e-3)
    assert set(kernel_check.refused()) == set(broken) and "PassManager::run failed" in printed
    assert engines[0].run_pass.enabled and engines[0].publish.enabled and "no CUDA graph" not in printed


@pytest.mark.parametrize("flags", [[], ["--no_auto_fit"]], ids=names)
def test_max_vram_gb_always_holds(train, flags):
    train("--max_train_steps", 1, "--max_vram_gb", 2, *flags)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def random(*shape, seed=0, dtype=torch.float16):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("rows", "columns"), [(1, 640), (77, 70), (4096, 640), (20000, 640)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradients_through_a_gain_are_their_formulas(rows, columns, with_bias):
    """Twice: the kernel leaves its counters as it found them."""
    from common.fast.kernels import gain_backward

    dy, y, bias = random(rows, columns), random(rows, columns, seed=1), random(columns, seed=2) if with_bias else None
    m, gain = 1 + random(columns, seed=3, dtype=torch.float32).abs(), random(columns, seed=4, dtype=torch.float32)
    expected = (dy.double() * (y.double() - (bias.double() if with_bias else 0))).sum(0) / m
    dm = torch.ones(columns, device="cuda")
    for times in (1, 2):
        assert torch.equal(gain_backward(dy, y, bias=bias, gain=gain, m=m, dm=dm), (dy.float() * gain).half())
        assert error(dm, 1 + times * expected) < 1e-5


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(640, 640, 16), (1280, 2048, 4), (100, 70, 3), (640, 640, 64), (640, 640, 128)]
)
def test_doras_norms_and_gains_are_their_formulas(rows, columns, rank):
    from common.fast.kernels import scale_rows, update_gain
    from common.fast.operations import row_norms

    w, A, B = (
        random(rows, columns),
        random(rank, columns, seed=1, dtype=torch.float32),
        random(rows, rank, seed=2, dtype=torch.float32),
    )
    expected = (w.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    assert error(row_norms(w, A, B, 0.5), expected) < 1e-6
    m, gain, b = random(rows, seed=3, dtype=torch.float32), torch.empty(rows, device="cuda"), torch.empty_like(B).half()
    update_gain(w, A, B, m=m, scale=0.5, gain=gain, b=b)
    assert error(gain, m.double() / expected) < 1e-6 and torch.equal(b, (B * gain[:, None]).half())
    assert torch.equal(scale_rows(w, gain), (w.float() * gain[:, None]).half())


GROUP_NORMS = [(320, 32, 128, 128), (960, 32, 26, 38), (2560, 32, 16, 16), (48, 8, 5, 7), (320, 32, 200, 160)]


@pytest.mark.parametrize(("channels", "groups", "height", "width"), GROUP_NORMS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_is_pytorchs_with_its_gradient(channels, groups, height, width, silu, shifted):
    """Far from zero too: the mean of the input is ten times its deviation."""
    from common.fast.group_norm_kernels import group_norm

    norm = torch.nn.GroupNorm(groups, channels, eps=1e-5).cuda().requires_grad_(False)
    (
        norm.weight.copy_(1 + random(channels, seed=3, dtype=torch.float32)),
        norm.bias.copy_(random(channels, seed=4, dtype=torch.float32)),
    )
    x, dy, shift = (
        (10 + random(2, channels, height, width)),
        random(2, channels, height, width, seed=1),
        random(2, channels, seed=2),
    )
    exact, exact_shift = x.double().requires_grad_(), shift.double().requires_grad_()
    expected = torch.nn.functional.group_norm(
        exact + exact_shift[:, :, None, None] * shifted, groups, norm.weight.double(), norm.bias.double(), 1e-5
    )
    expected = torch.nn.functional.silu(expected) if silu else expected
    expected.backward(dy.double())
    x, shift = x.requires_grad_(), shift.requires_grad_()
    (y := group_norm(x, norm.half(), silu=silu, shift=shift if shifted else None)).backward(dy)
    assert error(y, expected) < 1e-3 and error(x.grad, exact.grad) < 1e-3
    assert (
        not shifted or error(shift.grad, exact_shift.grad) < 2e-2
    )  # sums that nearly cancel: a group's gradients sum to zero


@pytest.mark.parametrize("width", [640, 1280, 48])
@pytest.mark.parametrize("added", [False, True])
def test_add_and_layer_norm_are_pytorchs_with_their_gradients(width, added):
    from common.fast.residual_kernels import add_norm

    norm = torch.nn.LayerNorm(width).cuda().requires_grad_(False)
    (
        norm.weight.copy_(1 + random(width, seed=3, dtype=torch.float32)),
        norm.bias.copy_(random(width, seed=4, dtype=torch.float32)),
    )
    h, a = (3 + random(2, 77, width)).requires_grad_(), random(2, 77, width, seed=1).requires_grad_()
    dtotal, dy = random(2, 77, width, seed=5), random(2, 77, width, seed=6)
    leaves = [t.detach().double().requires_grad_() for t in (h, a)]
    total = leaves[0] + leaves[1] if added else leaves[0]
    y = torch.nn.functional.layer_norm(total, (width,), norm.weight.double(), norm.bias.double())
    torch.autograd.backward([total, y] if added else [y], [dtotal.double(), dy.double()] if added else [dy.double()])
    got = add_norm(h, a if added else None, norm.half())
    torch.autograd.backward(got if added else got[1:], [dtotal, dy] if added else [dy])
    assert error(got[0], total) < 1e-3 and error(got[1], y) < 2e-3 and error(h.grad, leaves[0].grad) < 2e-3
    assert (a.grad is not None) == added and (not added or torch.equal(a.grad, h.grad))


def test_a_residual_with_a_bias_is_their_sum():
    from common.fast.residual_kernels import add_bias

    x, h, bias = random(2, 48, 5, 7).requires_grad_(), random(2, 48, 5, 7, seed=1).requires_grad_(), random(48, seed=2)
    y = add_bias(x, h, bias)
    assert error(y, x.double() + h.double() + bias.double()[:, None, None]) < 1e-3
    y.backward(dy := random(2, 48, 5, 7, seed=3))
    assert torch.equal(x.grad, dy) and torch.equal(h.grad, dy)


@pytest.mark.parametrize("quantize", ["fp16", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_fused_layer_is_its_formula_in_fp16(use_dora, quantize, p):
    """Outputs and gradients against the formula in fp64, and at p = 0 no further from it than PEFT's own forward pass."""
    model, layer, flat, seed = adapted_layer(use_dora, quantize, p)
    generator = torch.Generator("cuda").manual_seed(2)
    x, dy = (torch.randn(1024, n, device="cuda", generator=generator).half() for n in (640, 1280))
    W, A, B = (
        t.double()
        for t in (layer.forward.weight(), layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach())
    )
    mask = seeded(torch.ones_like(x), p, seed, layer).double() if p else torch.ones_like(x).double()
    leaves = [x.double().requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    leaves += [layer.lora_magnitude_vector.default.weight.detach().double().requires_grad_()] if use_dora else []
    y = leaves[0] @ W.T + 2 * (leaves[0] * mask) @ A.T @ B.T
    if use_dora:
        y = y * (leaves[3] / (W + 2 * B @ A).norm(dim=1).detach())
    (y + layer.base_layer.bias.double()).backward(dy.double())
    exact = [(y + layer.base_layer.bias.double()).detach(), *(leaf.grad for leaf in leaves)]
    for got, reference in zip(outputs_and_gradients(layer.forward, layer, flat, x, dy), exact, strict=True):
        assert (got.double() - reference).norm() < 1e-3 * reference.norm()
    if not p:
        for got, reference in zip(
            outputs_and_gradients(layer.forward.peft_forward, layer, flat, x, dy), exact, strict=True
        ):
            assert (got.double() - reference).norm() < 5e-3 * reference.norm()


def seeded(x, p, seed, layer):
    from common.fast.kernels import seeded_dropout

    return seeded_dropout(x, p, seed, layer.forward.salt)


def adapted_layer(use_dora, quantize, p):
    """(model, its PEFT layer with a fused forward pass, flat parameters, dropout seed): 640 -> 1280, rank 16, alpha 32."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    from common.fast import adapter_layers
    from common.model import adapters

    torch.manual_seed(0)
    base = torch.nn.Linear(640, 1280).half()
    model = torch.nn.Sequential(base)
    if quantize == "nf4":
        model[0] = bitsandbytes.nn.Linear4bit(640, 1280, compute_dtype=torch.float16, quant_type="nf4")
        model[0].half().load_state_dict(base.state_dict())
        model.is_loaded_in_4bit = True
    model = model.cuda().requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules=["0"], use_dora=use_dora), model
    )
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data = parameter.data.float().cuda()
    flat, seed = (
        adapters.FlatParameters([(adapters.trainable(model), {})], torch.float16),
        torch.tensor(3, device="cuda"),
    )
    adapter_layers.fuse([model], flat, seed)
    generator = torch.Generator("cuda").manual_seed(1)
    flat.data.add_(0.02 * torch.randn(len(flat), device="cuda", generator=generator))
    flat.publish()
    return model, model[0], flat, seed


def outputs_and_gradients(forward, layer, flat, x, dy):
    """[y, dx, dA, dB] of one forward and backward pass, and DoRA's dm."""
    flat.grad.zero_()
    x = x.clone().requires_grad_()
    (y := forward(x)).backward(dy)
    magnitudes = [magnitude.weight.grad.clone() for magnitude in layer.lora_magnitude_vector.values()]
    return [
        y.detach(),
        x.grad,
        layer.lora_A.default.weight.grad.clone(),
        layer.lora_B.default.weight.grad.clone(),
        *magnitudes,
    ]


@pytest.mark.parametrize("memory", ["gpu", "offload", "sequential"])
def test_images_are_those_of_plain_diffusers_in_every_memory_tier(demo, train, memory):
    """With fused layers, replayed or launched, and as they were: base, adapter and base again from one loaded model."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from PIL import ImageChops

    from common.model import device, loading
    from common.render import sampling

    run = train("--max_train_steps", 8, "--learning_rate", 1e-2, "--lr_warmup_steps", 0)
    sampler = sampling.Sampler(loading.find_model(str(demo.model)), device.start("fp16"), "euler", memory)
    active = [(sampler.load(run.dir / "pytorch_lora_weights.safetensors"), 1.0)]
    sampler.place()
    settings = sampling.Settings(resolution=64, steps=8)
    drawn = [sampler.render(adapters, "a girl", [3], settings)[0] for adapters in ([], active, [])]
    assert (sampler._graph is not None) == (memory == "gpu")
    plain = StableDiffusionXLPipeline.from_pretrained(demo.model, dtype=torch.float16).to("cuda")
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    options = dict(num_inference_steps=8, guidance_scale=7.5, height=64, width=64)
    expected = [plain("a girl", generator=sampling.generator(3), **options).images[0]]
    plain.load_lora_weights(run.dir)
    expected += [plain("a girl", generator=sampling.generator(3), **options).images[0], expected[0]]
    furthest = [
        max(high for _, high in ImageChops.difference(*pair).getextrema()) for pair in zip(drawn, expected, strict=True)
    ]
    assert max(furthest) <= 4 and drawn[0].tobytes() == drawn[2].tobytes() != drawn[1].tobytes()
