"""Triton kernels of what is added to a residual stream: LayerNorm with the sum before it, and a sum with a bias.

The weights are frozen, so the backward pass gives the gradient of the input only. LayerNorm keeps nothing but its
input; its sums are in fp32 over deviations from the mean. The functions below the kernels are the GPU's forms of the
operations of the same names in operations.py.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _add_norm_kernel(h, a, weight, bias, total, y, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total = h + a, y = LayerNorm(total) (arXiv 1607.06450, eq. 3), one row a program.

    h, a, total, y: [rows, width]; weight, bias: [width].
    """
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(a + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + offsets, value, mask=mask)
        # what is stored is what the backward pass will see
        value = value.to(total.dtype.element_ty).to(tl.float32)
    residual = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    r = tl.rsqrt(tl.sum(residual * residual, axis=0) / width + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, residual * r * w + b, mask=mask)


@triton.jit
def _add_norm_backward_kernel(total, dy, dtotal, weight, dx, width, eps, BLOCK: tl.constexpr):
    """dx = dtotal + the gradient through LayerNorm(total), one row a program.

    total, dy, dtotal, dx: [rows, width]; weight: [width].
    """
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(total + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    r = tl.rsqrt(tl.sum(residual * residual, axis=0) / width + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32) * w
    g = r * (g - tl.sum(g, axis=0) / width - residual * r * r * tl.sum(g * residual, axis=0) / width)
    tl.store(dx + offsets, g + tl.load(dtotal + offsets, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def _add_bias_kernel(x, h, bias, y, channels, n, BLOCK: tl.constexpr):
    """y = x + h + bias, one block a program.

    x, h, y: [n], channels last; bias: [channels].
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x + offsets, mask=mask).to(tl.float32) + tl.load(h + offsets, mask=mask).to(tl.float32)
    tl.store(y + offsets, value + tl.load(bias + offsets % channels, mask=mask).to(tl.float32), mask=mask)


class _AddNorm(torch.autograd.Function):
    """Keeps only the sum for the backward pass."""

    @staticmethod
    def forward(ctx, h, a, norm):
        h = h.contiguous()
        a_or_any = h if a is None else a.contiguous()
        total = h if a is None else torch.empty_like(h)
        y = torch.empty_like(h)
        width = h.shape[-1]
        sizes = dict(width=width, eps=norm.eps, ADD=a is not None, BLOCK=triton.next_power_of_2(width))
        _add_norm_kernel[(h.numel() // width,)](
            h, a_or_any, weight=norm.weight, bias=norm.bias, total=total, y=y, **sizes
        )
        ctx.save_for_backward(total)
        ctx.norm, ctx.added = norm, a is not None
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        (total,) = ctx.saved_tensors
        width = dy.shape[-1]
        dx = torch.empty_like(total)
        sizes = dict(width=width, eps=ctx.norm.eps, BLOCK=triton.next_power_of_2(width))
        _add_norm_backward_kernel[(total.numel() // width,)](
            total, dy.contiguous(), dtotal=dtotal.contiguous(), weight=ctx.norm.weight, dx=dx, **sizes
        )
        return dx, dx if ctx.added else None, None


add_norm = _AddNorm.apply


class _AddBias(torch.autograd.Function):
    """Keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x, h, bias):
        x = x.contiguous(memory_format=torch.channels_last)
        h = h.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        n = x.numel()
        _add_bias_kernel[(triton.cdiv(n, BLOCK),)](x, h, bias, y, channels=x.shape[1], n=n, BLOCK=BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None


add_bias = _AddBias.apply
