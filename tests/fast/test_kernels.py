"""What is left of a run when a kernel does not work: everything but speed. Real kernels are tested in test_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

from common.fast import kernel_check, operations

CPU = torch.device("cpu")
WORKING = {"dtype": torch.float32, "rank": 4}


@pytest.fixture
def unproven(monkeypatch):
    """Operations as they are before anything was tried."""
    for operation in operations.EVERY_OPERATION:
        monkeypatch.setattr(operation, "faults", {})
        monkeypatch.setattr(operation, "on_gpu", operation.plain)


@pytest.fixture
def adopted(unproven, monkeypatch):
    """adopted(kernel) -> (what GEGLU computes by on a GPU, the lines) when `kernel` is its GPU form."""

    def adopted(kernel, **options):
        lines = []
        monkeypatch.setattr(kernel_check, "kernel_of", lambda operation: kernel)
        kernel_check.try_kernels([operations.geglu], CPU, **{**WORKING, **options}, say=lines.append)
        return operations.geglu.on_gpu, lines

    return adopted


def right(h):
    return operations.geglu.plain(h)


def does_not_compile(h):
    raise RuntimeError("PassManager::run failed\nsm_75 is not supported")


def a_little_wrong(h):
    y = operations.geglu.plain(h)
    y[-1, -1] += 1  # one element of 164,000
    return y


def not_finite(h):
    return operations.geglu.plain(h) * torch.tensor(float("nan"))


class GradientOfTheGateForgotten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return operations.geglu.plain(h)

    @staticmethod
    def backward(ctx, dy):
        gate = ctx.saved_tensors[0].chunk(2, dim=-1)[1]
        return torch.cat([dy * torch.nn.functional.gelu(gate), torch.zeros_like(gate)], dim=-1)


def test_a_kernel_that_computes_what_its_plain_form_computes_is_used(adopted):
    form, lines = adopted(right)
    assert form is right and len(lines) == 1 and not kernel_check.refused()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (does_not_compile, "RuntimeError: PassManager::run failed sm_75 is not supported"),
        (a_little_wrong, "wrong numbers, an error of 0."),
        (not_finite, "wrong numbers, an error of nan"),
        (GradientOfTheGateForgotten.apply, "wrong numbers, an error of 1"),
    ],
)
def test_a_kernel_that_does_not_work_costs_a_line(adopted, kernel, reason):
    form, (_, line) = adopted(kernel)
    assert form is operations.geglu.plain and kernel_check.refused() == ["geglu"]
    assert "geglu" in line and reason in line and "\n" not in line


def test_without_triton_one_line_names_all(unproven, monkeypatch):
    def no_triton(operation):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(kernel_check, "kernel_of", no_triton)
    lines = []
    kernel_check.try_kernels(operations.EVERY_OPERATION, CPU, **WORKING, say=lines.append)
    assert len(lines) == 2 and "No module named 'triton'" in lines[1]
    for operation in operations.EVERY_OPERATION:
        assert operation.__name__ in lines[1] and operation.on_gpu is operation.plain


def test_what_was_tried_is_not_tried_again_and_another_dtype_is(adopted):
    adopted(does_not_compile)
    form, lines = adopted(right)
    assert form is operations.geglu.plain and not lines
    assert adopted(right, dtype=torch.float16)[0] is right
    assert adopted(right)[0] is operations.geglu.plain


def test_memory_that_runs_out_is_not_held_against_a_kernel(adopted):
    def out_of_memory(h):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        adopted(out_of_memory)
    assert not kernel_check.refused()


@pytest.mark.parametrize("operation", operations.EVERY_OPERATION, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("dtype", kernel_check.TOLERANCES, ids=str)
def test_every_plain_form_passes_its_own_check_in_every_dtype(unproven, monkeypatch, operation, dtype):
    """Rounding to the dtype is within the tolerance."""
    monkeypatch.setattr(kernel_check, "kernel_of", lambda operation: operation.plain)
    kernel_check.try_kernels([operation], CPU, dtype=dtype, say=lambda line: None)
    assert kernel_check.refused() == []


def test_a_gpu_computes_by_what_was_adopted_and_a_cpu_plainly(unproven, monkeypatch):
    monkeypatch.setattr(operations.geglu, "on_gpu", lambda x: "kernel")
    assert operations.geglu(SimpleNamespace(is_cuda=True)) == "kernel"
    assert torch.equal(operations.geglu(torch.ones(4)), operations.geglu.plain(torch.ones(4)))


# ---------------------------------------------------------------- plain forms that a GPU may have to use


def hashed(i, seed, salt):
    """The mask's number of one element with Python's integers: the formula of kernels._dropout_kernel."""
    bits = (i * 0x9E3779B9 + seed + salt * 0x5EBCA6B % 2**31) % 2**32
    bits = (bits ^ bits >> 16) * 0x21F0AAAD % 2**32
    bits = (bits ^ bits >> 15) * 0xD35A2D97 % 2**32
    return ((bits ^ bits >> 15) >> 8) / 2**24


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345])
def test_the_mask_is_the_kernels_function_of_seed_layer_and_place(seed):
    mask = operations.seeded_dropout(torch.ones(20, 50), 0.3, torch.tensor(seed), 700).flatten()
    assert [value > 0 for value in mask.tolist()] == [hashed(i, seed, 700) >= 0.3 for i in range(1000)]
    assert mask[mask > 0].unique().tolist() == pytest.approx([1 / 0.7])


def test_a_mask_follows_the_seed_that_lies_on_the_device():
    """As in a replayed CUDA graph: the seed is written in place, and nothing was read from it on the host."""
    seed, x = torch.tensor(1), torch.ones(1000)
    first = operations.seeded_dropout(x, 0.5, seed, 3)
    seed.fill_(2)
    assert not torch.equal(operations.seeded_dropout(x, 0.5, seed, 3), first)
    seed.fill_(1)
    assert torch.equal(operations.seeded_dropout(x, 0.5, seed, 3), first)


def test_the_gradient_of_a_magnitude_does_not_overflow_in_fp16():
    """300 * 300 is more than fp16 holds; the loss scale makes such gradients."""
    dy, gain, m, dm = torch.full((2, 3), 300.0).half(), torch.ones(3), torch.full((3,), 2.0), torch.zeros(3)
    operations.gain_backward(dy, dy, bias=None, gain=gain, m=m, dm=dm)
    assert dm.tolist() == [90_000.0] * 3
