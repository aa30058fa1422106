"""Kernels prove themselves at the start: a small launch of each, forward and backward, against its plain form in fp32.

Triton no longer supports every card that PyTorch does, and some machines have no C compiler or no Triton. A kernel that
cannot be compiled or launched, or is wrong on this card, costs speed and not the run: its operation stays plain.
"""

from collections.abc import Callable, Sequence

import torch

from common.errors import ran_out
from common.fast import operations
from common.fast.operations import Operation

# Largest error of an element, as a share of the largest element: some roundings of the dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def adopt_kernels(
    wanted: Sequence[Operation], device: torch.device, *, dtype: torch.dtype, rank: int = 16, say: Callable = print
) -> None:
    """Let operations compute by their kernels on a GPU, where these work; a line names those that do not, and why.

    On a CPU it does nothing.

    Args:
        wanted: the operations of the layers that will compute. What this process tried before is not tried again.
        dtype: of the frozen weights.
        rank: of the adapter.
    """
    if device.type == "cuda":
        try_kernels(wanted, device, dtype=dtype, rank=rank, say=say)


def try_kernels(
    wanted: Sequence[Operation], device: torch.device, *, dtype: torch.dtype, rank: int = 16, say: Callable = print
) -> None:
    """`adopt_kernels` on any device: Triton's interpreter runs kernels on a CPU."""
    tried = (str(device), dtype, rank)
    untried = [operation for operation in wanted if tried not in operation.faults]
    if untried:
        say(f"GPU kernels: compiling and checking {len(untried)}; up to a minute the first time, seconds later on")
    names_by_fault = {}
    for operation in untried:
        fault = operation.faults[tried] = _fault(operation, device, dtype, rank)
        names_by_fault.setdefault(fault, []).append(operation.__name__)
    for fault, names in names_by_fault.items():
        if fault is not None:
            say(f"GPU kernels: plain PyTorch, which is slower, in place of {', '.join(names)}: {fault}")
    for operation in wanted:
        operation.on_gpu = operation.plain if operation.faults[tried] else kernel_of(operation)


def refused() -> list[str]:
    """Names of the operations with a fault: with their plain forms a pass takes other time and memory."""
    return [operation.__name__ for operation in operations.EVERY_OPERATION if any(operation.faults.values())]


def kernel_of(operation: Operation) -> Callable:
    """The GPU's form of an operation.

    Raises:
        ImportError: there is no Triton.
    """
    from common.fast import group_norm_kernels, kernels, residual_kernels

    modules = kernels, group_norm_kernels, residual_kernels
    return next(vars(module)[operation.__name__] for module in modules if operation.__name__ in vars(module))


def _fault(operation, device, dtype, rank):
    """Why an operation's kernels cannot be used, or None."""
    attempt = ATTEMPTS[operation]
    try:
        found = attempt(kernel_of(operation), _Inputs(device, dtype), rank)
        expected = attempt(operation.plain, _Inputs(device, dtype, exact=True), rank)
        error = torch.stack([_error(*pair) for pair in zip(found, expected, strict=True)]).max().item()  # NaN stays NaN
    except Exception as fault:  # a compiler's, a driver's, a library's: each has classes of its own
        if ran_out(fault):
            raise
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
    return None if error <= TOLERANCES[dtype] else f"wrong numbers, an error of {error:.2g}"


def _error(found, expected):
    """Largest difference as a share of the largest expected element."""
    return (found.double() - expected.double()).abs().max() / expected.double().abs().max()


class _Inputs:
    """Random tensors, always the same: in `dtype` for kernels, the same numbers in fp32 for the exact result."""

    def __init__(self, device, dtype, exact=False):
        self.device, self.dtype, self.exact = device, dtype, exact
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return values.to(self.device, torch.float32 if self.exact else values.dtype)

    def weights_of(self, norm):
        """`norm` with random frozen weights."""
        for name in ("weight", "bias"):
            setattr(norm, name, torch.nn.Parameter(self(*getattr(norm, name).shape), requires_grad=False))
        return norm


# One small launch of each, of shapes that SDXL has too: (form, source of inputs, rank) -> what is compared.


def _attempt_dropout(form, new, rank):
    x = new(64, 640)
    y = new(64, 640)
    seed = torch.tensor(7, device=x.device)
    return form(x, 0.1, seed, 3), form(x, 0.1, seed, 3, add_to=y, alpha=0.5)


def _attempt_geglu(form, new, rank):
    h = new(64, 2 * 2560).requires_grad_()
    y = form(h)
    y.backward(new(*y.shape))
    return y, h.grad


def _attempt_gain_backward(form, new, rank):
    dy, y, bias = new(512, 640), new(512, 640), new(640)
    gain, m, dm = (new(640, dtype=torch.float32) for _ in range(3))
    per_column = dict(gain=gain, m=m, dm=dm)
    return form(dy, y, bias=bias, **per_column), form(dy, y, bias=None, **per_column), dm


def _attempt_scale_rows(form, new, rank):
    return [form(new(64, 640), new(64, dtype=torch.float32))]


def _attempt_update_gain(form, new, rank):
    w, b = new(640, 640), new(640, rank)
    A, B, m, gain = (new(*shape, dtype=torch.float32) for shape in ((rank, 640), (640, rank), (640,), (640,)))
    form(w, A, B, m=m, scale=0.5, gain=gain, b=b)
    return gain, b


def _attempt_group_norm(form, new, rank):
    x, shift = new(2, 320, 32, 32).requires_grad_(), new(2, 320).requires_grad_()
    norm = new.weights_of(torch.nn.GroupNorm(32, 320))
    y, z = form(x, norm, silu=True, shift=shift), form(x, norm)
    torch.autograd.backward([y, z], [new(*x.shape), new(*x.shape)])
    return y, z, x.grad, shift.grad


def _attempt_add_norm(form, new, rank):
    h, a = new(64, 640).requires_grad_(), new(64, 640).requires_grad_()
    norm = new.weights_of(torch.nn.LayerNorm(640))
    outputs = [*form(h, a, norm), *form(h, None, norm)]
    torch.autograd.backward(outputs, [new(64, 640) for _ in outputs])
    return *outputs, h.grad, a.grad


def _attempt_add_bias(form, new, rank):
    x, h, bias = new(2, 320, 32, 32).requires_grad_(), new(2, 320, 32, 32).requires_grad_(), new(320)
    y = form(x, h, bias)
    y.backward(new(*y.shape))
    return y, x.grad, h.grad


ATTEMPTS = {
    operations.seeded_dropout: _attempt_dropout,
    operations.geglu: _attempt_geglu,
    operations.gain_backward: _attempt_gain_backward,
    operations.scale_rows: _attempt_scale_rows,
    operations.update_gain: _attempt_update_gain,
    operations.group_norm: _attempt_group_norm,
    operations.add_norm: _attempt_add_norm,
    operations.add_bias: _attempt_add_bias,
}
