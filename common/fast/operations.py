"""Operations that kernels compute in fewer passes over memory: seeded dropout, GEGLU, DoRA's gains, normalisations.

Every operation has two forms. The plain one below computes anywhere. The kernels of the same name in kernels.py,
group_norm_kernels.py and residual_kernels.py take its place on a GPU, once kernel_check.py has found that they
compute the same there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class Operation:
    """A function whose first argument says where it computes.

    Attributes:
        plain: its form in PyTorch. On a GPU it neither waits nor draws random numbers: a CUDA graph can hold it.
        on_gpu: the form that a GPU computes, `plain` until kernels are found to work.
        faults: {what was tried, see kernel_check: why its kernels cannot be used there, or None}.
    """

    def __init__(self, plain: Callable) -> None:
        functools.update_wrapper(self, plain)
        self.plain = self.on_gpu = plain
        self.faults = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.on_gpu if x.is_cuda else self.plain)(x, *args, **kwargs)


@Operation
def seeded_dropout(
    x: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    salt: int,
    *,
    add_to: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """d(x): each element zeroed with probability p, the others divided by 1 - p.

    d is a linear function of x and its own transpose.
    Nothing is stored for the backward pass, and a replayed CUDA graph or a recomputed block makes the same mask again.

    Args:
        x: tensor of any shape.
        seed: int64 scalar tensor on x's device, read when the GPU computes.
        salt: integer that differs between layers.
        add_to: when given, it becomes add_to + alpha d(x), in place.
    """
    keep = _uniform(x.numel(), seed, salt).view(x.shape) >= p
    dropped = torch.where(keep, x.float() * (alpha / (1 - p)), 0.0)
    return dropped.to(x.dtype) if add_to is None else add_to.add_(dropped)


def _uniform(count, seed, salt):
    """fp32 [count] in [0, 1): a hash of seed, salt and position, see https://github.com/skeeto/hash-prospector.

    The hash is one of unsigned 32-bit integers, for which PyTorch has few operations: these are the low bits of int64.
    """
    bits_32 = 0xFFFFFFFF
    bits = torch.arange(count, device=seed.device) * 0x9E3779B9 + (seed & bits_32) + spread_salt(salt) & bits_32
    bits = (bits ^ bits >> 16) * 0x21F0AAAD & bits_32
    bits = (bits ^ bits >> 15) * 0xD35A2D97 & bits_32
    return ((bits ^ bits >> 15) >> 8).float() / 2**24


def spread_salt(salt: int) -> int:
    """31 bits that differ widely between neighbouring layers."""
    return salt * 0x5EBCA6B % 2**31


@Operation
def geglu(h: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate) of h = [value, gate] along the last dimension: [..., 2D] -> [..., D] (arXiv 2002.05202)."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


@Operation
def gain_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gain: torch.Tensor,
    m: torch.Tensor,
    dm: torch.Tensor,
) -> torch.Tensor:
    """diag(gain) dy in dy's dtype, the gradient before the gain; dm += sum over rows of dy (y - bias) / m, in place.

    dm is the gradient of the magnitude m (arXiv 2402.09353, section 4.3).
    One call at a time: the kernels of all calls share their counters.

    Args:
        dy, y: [M, N]; bias: [N] or None; gain, m, dm: fp32 [N].
    """
    u = y.float() if bias is None else y.float() - bias
    dm.addcdiv_((dy * u).sum(0), m)
    return (dy * gain).to(dy.dtype)


@Operation
def scale_rows(w: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """diag(gain) w in w's dtype, rounded once: [N, K], fp32 [N] -> [N, K]."""
    return (w * gain[:, None]).to(w.dtype)


def row_norms(w: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """n: the norms of the rows of w + scale B A, in fp32. [N, K], fp32 [r, K], fp32 [N, r] -> [N].

    By n^2 = ||w||^2 + 2 s rowsum((w A^T) o B) + s^2 rowsum((B A A^T) o B), which needs no second matrix like w.
    """
    w = w.float()
    return (w.square().sum(1) + 2 * scale * ((w @ A.t()) * B).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)).sqrt()


@Operation
def update_gain(
    w: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    m: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """gain = m / n and b = diag(gain) B, in place; n as in `row_norms` (arXiv 2402.09353, eq. 5).

    Args:
        w: [N, K]; A: fp32 [r, K]; B: fp32 [N, r]; m, gain: fp32 [N]; b: [N, r] in w's dtype.
    """
    torch.div(m, row_norms(w, A, B, scale), out=gain)
    b.copy_(B * gain[:, None])


@Operation
def group_norm(
    x: torch.Tensor, norm: torch.nn.GroupNorm, *, silu: bool = False, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(GroupNorm(x + shift)), with silu and shift as asked for.

    Args:
        x: [B, C, H, W]; channels-last on a GPU.
        norm: torch.nn.GroupNorm whose parameters need no gradient.
        shift: [B, C] or None.
    """
    x = x if shift is None else x + shift[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


@Operation
def add_norm(h: torch.Tensor, a: torch.Tensor | None, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + a, LayerNorm(h + a)), or (h, LayerNorm(h)) when a is None; both [..., C].

    The parameters of `norm` need no gradient.
    """
    total = h if a is None else a + h
    return total, norm(total)


@Operation
def add_bias(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + h + bias: [B, C, H, W], the same, and [C], which needs no gradient."""
    return x + (h + bias[:, None, None])


OF_DORA = (gain_backward, scale_rows, update_gain)
OF_THE_UNET = (geglu, group_norm, add_norm, add_bias)
EVERY_OPERATION = (seeded_dropout, *OF_DORA, *OF_THE_UNET)
