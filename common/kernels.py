"""Small GPU kernels where PyTorch would pass over memory several times: dropout from a seed, GEGLU, DoRA's backward pass.

Each has a plain PyTorch form too: the same formula on a CPU, and what the kernels are tested against.
"""

import torch

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    import triton
    import triton.language as tl

    @triton.jit
    def _dropout_kernel(x, add_to, out, seed, salt, n, p, alpha, ADD: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        bits = i.to(tl.uint32) * 0x9E3779B9 + tl.load(seed).to(tl.uint32) + salt
        bits = (bits ^ (bits >> 16)) * 0x21F0AAAD  # the integer hash of https://github.com/skeeto/hash-prospector
        bits = (bits ^ (bits >> 15)) * 0xD35A2D97
        keep = ((bits ^ (bits >> 15)) >> 8).to(tl.float32) / 16777216.0 >= p
        result = tl.where(keep, tl.load(x + i, mask=i < n).to(tl.float32) * (alpha / (1 - p)), 0.0)
        if ADD:
            result += tl.load(add_to + i, mask=i < n).to(tl.float32)
        tl.store(out + i, result, mask=i < n)

    @triton.jit
    def _geglu_kernel(h, out, width, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = i // width * 2 * width + i % width
        value = tl.load(h + at, mask=i < n).to(tl.float32)
        gate = tl.load(h + at + width, mask=i < n).to(tl.float32)
        tl.store(out + i, value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)), mask=i < n)

    @triton.jit
    def _geglu_backward_kernel(dy, h, dh, width, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = i // width * 2 * width + i % width
        value = tl.load(h + at, mask=i < n).to(tl.float32)
        gate = tl.load(h + at + width, mask=i < n).to(tl.float32)
        d = tl.load(dy + i, mask=i < n).to(tl.float32)
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        tl.store(dh + at, d * gate * cdf, mask=i < n)
        tl.store(dh + at + width, d * value * (cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327), mask=i < n)

    @triton.jit
    def _gain_backward_kernel(dy, y, gain, bias, du, partial, rows, columns, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        at = row * columns + column
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            u -= tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(du + at, d * tl.load(gain + column, mask=column < columns, other=0.0).to(tl.float32), mask=inside)
        sums = tl.sum(d * u, axis=0)[None, :]
        tl.store(partial + tl.program_id(0) * columns + column, sums, mask=column < columns)


BLOCK, ROWS, COLUMNS = 1024, 32, 128


def seeded_dropout(x, p, seed, salt, add_to=None, alpha=1.0):
    """d(x): each element zeroed with probability p, the others divided by 1 - p. A linear function of x and its own transpose.

    Nothing is stored for the backward pass, and a replayed CUDA graph or a recomputed block makes the same mask again.

    Args:
        x: tensor of any shape.
        seed: int64 scalar tensor on x's device, read when the kernel runs.
        salt: integer that differs between layers.
        add_to: when given, it becomes add_to + alpha d(x), in place.
    """
    if not x.is_cuda:
        generator = torch.Generator().manual_seed(int(seed) + salt)
        dropped = x * (torch.rand(x.shape, generator=generator) >= p).to(x.dtype) / (1 - p)
        return dropped if add_to is None else add_to.add_(dropped, alpha=alpha)
    x, salt = x.contiguous(), salt * 0x5EBCA6B % 2**31
    out, n = torch.empty_like(x) if add_to is None else add_to, x.numel()
    _dropout_kernel[(triton.cdiv(n, BLOCK),)](x, out, out, seed, salt, n, p, alpha, ADD=add_to is not None, BLOCK=BLOCK)
    return out


class Geglu(torch.autograd.Function):
    """h [..., 2D] -> value * gelu(gate) [..., D] (arXiv 2002.05202), keeping only h for the backward pass."""

    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        ctx.save_for_backward(h)
        out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
        _geglu_kernel[(triton.cdiv(out.numel(), BLOCK),)](h, out, out.shape[-1], out.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        dy, dh = dy.contiguous(), torch.empty_like(h)
        _geglu_backward_kernel[(triton.cdiv(dy.numel(), BLOCK),)](dy, h, dh, dy.shape[-1], dy.numel(), BLOCK=BLOCK)
        return dh


def gain_backward(dy, y, gain, bias):
    """Backward pass of y = gain u + bias: (du = gain dy, sum over rows of dy (y - bias) in fp32). [M, N], [M, N], [N], [N] or None."""
    if not dy.is_cuda:
        return dy * gain, (dy * (y if bias is None else y - bias)).sum(0, dtype=torch.float32)
    (rows, columns), du = dy.shape, torch.empty_like(dy)
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    partial = torch.empty(grid[0], columns, device=dy.device, dtype=torch.float32)
    bias_or_any = gain if bias is None else bias
    _gain_backward_kernel[grid](dy, y, gain, bias_or_any, du, partial, rows, columns, BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS)
    return du, partial.sum(0)
