"""Small GPU kernels where PyTorch would pass over memory several times: dropout from a seed, GEGLU, DoRA's norms and gradients.

Each has a plain PyTorch form too: the same formula on a CPU, and what the kernels are tested against.
"""

import functools

import torch
import torch.nn.functional as F

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    import triton
    import triton.language as tl

    @triton.jit
    def _dropout_kernel(x, add_to, out, seed, salt, n, p, alpha, ADD: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        bits = i.to(tl.uint32) * 0x9E3779B9 + tl.load(seed).to(tl.uint32) + salt
        bits = (bits ^ (bits >> 16)) * 0x21F0AAAD  # the integer hash of https://github.com/skeeto/hash-prospector
        bits = (bits ^ (bits >> 15)) * 0xD35A2D97
        keep = ((bits ^ (bits >> 15)) >> 8).to(tl.float32) / 16777216.0 >= p
        result = tl.where(keep, tl.load(x + i, mask=i < n).to(tl.float32) * (alpha / (1 - p)), 0.0)
        if ADD:
            result += tl.load(add_to + i, mask=i < n).to(tl.float32)
        tl.store(out + i, result, mask=i < n)

    @triton.jit
    def _geglu_kernel(h, out, width, BLOCK: tl.constexpr):
        row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at, inside = row * 2 * width + i, i < width
        value = tl.load(h + at, mask=inside).to(tl.float32)
        gate = tl.load(h + at + width, mask=inside).to(tl.float32)
        tl.store(out + row * width + i, value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)), mask=inside)

    @triton.jit
    def _geglu_backward_kernel(dy, h, dh, width, BLOCK: tl.constexpr):
        row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at, inside = row * 2 * width + i, i < width
        value = tl.load(h + at, mask=inside).to(tl.float32)
        gate = tl.load(h + at + width, mask=inside).to(tl.float32)
        d = tl.load(dy + row * width + i, mask=inside).to(tl.float32)
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        tl.store(dh + at, d * gate * cdf, mask=inside)
        tl.store(dh + at + width, d * value * (cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327), mask=inside)

    @triton.jit
    def _gain_backward_kernel(
        dy, y, bias, gain, m, scaled, partial, arrived, dm, rows, columns,
        BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        known, at = column < columns, row * columns + column[None, :]
        inside = (row < rows) & known[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            u -= tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
        tl.store(scaled + at, d * tl.load(gain + column, mask=known, other=0.0)[None, :], mask=inside)
        tl.store(partial + tl.program_id(0) * columns + column, tl.sum(d * u, axis=0), mask=known)
        tl.debug_barrier()  # the atomic addition publishes what every thread of the program has stored
        if tl.atomic_add(arrived + tl.program_id(1), 1) == tl.num_programs(0) - 1:  # the last program for these columns adds all up
            sums = tl.zeros((PARTS, COLUMNS), dtype=tl.float32)
            for start in range(0, tl.num_programs(0), PARTS):
                part = start + tl.arange(0, PARTS)[:, None]
                there = (part < tl.num_programs(0)) & known[None, :]
                sums += tl.load(partial + part * columns + column[None, :], mask=there, other=0.0)
            total = tl.sum(sums, axis=0) / tl.load(m + column, mask=known, other=1.0)
            tl.store(dm + column, tl.load(dm + column, mask=known, other=0.0) + total, mask=known)
            tl.store(arrived + tl.program_id(1), 0)

    @triton.jit
    def _scale_rows_kernel(w, gain, out, columns, BLOCK: tl.constexpr):
        row, i = tl.program_id(0), tl.arange(0, BLOCK)
        value = tl.load(w + row * columns + i, mask=i < columns).to(tl.float32) * tl.load(gain + row)
        tl.store(out + row * columns + i, value, mask=i < columns)

    @triton.jit
    def _gain_kernel(w, A, B, m, gain, b, scale, rows, columns, rank, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
        squares, known = tl.zeros((ROWS, COLUMNS), dtype=tl.float32), row < rows
        in_b = row[:, None] * rank + j[None, :], known[:, None] & (j < rank)[None, :]
        of_b = tl.load(B + in_b[0], mask=in_b[1], other=0.0)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (column < columns)[None, :]
            of_a = tl.load(A + j[:, None] * columns + column[None, :], mask=(j < rank)[:, None] & inside, other=0.0)
            of_w = tl.load(w + row[:, None] * columns + column[None, :], mask=known[:, None] & inside, other=0.0).to(tl.float32)
            value = of_w + scale * tl.dot(of_b, of_a, input_precision="tf32x3")  # as exact as fp32; before sm_80 it is fp32
            squares += value * value
        g = tl.load(m + row, mask=known, other=0.0) / tl.sqrt(tl.sum(squares, axis=1))
        tl.store(gain + row, g, mask=known)
        tl.store(b + in_b[0], of_b * g[:, None], mask=in_b[1])


BLOCK = 1024


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
        out = h.new_empty(*h.shape[:-1], width := h.shape[-1] // 2)
        _geglu_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](h, out, width, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        dy, dh, width = dy.contiguous(), torch.empty_like(h), dy.shape[-1]
        _geglu_backward_kernel[(dy.numel() // width, triton.cdiv(width, BLOCK))](dy, h, dh, width, BLOCK=BLOCK)
        return dh


def geglu(h):
    """value * gelu(gate) of h = [value, gate] along the last dimension: [..., 2D] -> [..., D]."""
    if h.is_cuda:
        return Geglu.apply(h)
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gain_backward(dy, y, bias, gain, m, dm):
    """diag(gain) dy in dy's dtype, the gradient before the gain; and dm += sum over rows of dy (y - bias) / m, that of the magnitude.

    One call at a time: on a GPU all of them count in the same place.

    Args:
        dy, y: [M, N]; bias: [N] or None; gain, m, dm: fp32 [N].
    """
    if not dy.is_cuda:
        dm.addcdiv_((dy * (y if bias is None else y - bias)).sum(0, dtype=torch.float32), m)
        return (dy * gain).to(dy.dtype)
    (rows, columns), bias_or_any, scaled = dy.shape, dy if bias is None else bias, torch.empty_like(dy)
    grid = triton.cdiv(rows, 128), triton.cdiv(columns, 64)
    partial, arrived = torch.empty(grid[0], columns, device=dy.device, dtype=torch.float32), _arrivals(dy.device)
    sizes = dict(BIAS=bias is not None, ROWS=128, COLUMNS=64, PARTS=128)
    _gain_backward_kernel[grid](dy, y, bias_or_any, gain, m, scaled, partial, arrived, dm, rows, columns, **sizes)
    return scaled


@functools.lru_cache
def _arrivals(device):
    """Counters that are 0 between kernels; more of them than any layer has groups of 64 columns."""
    return torch.zeros(4096, device=device, dtype=torch.int32)


def scale_rows(w, gain):
    """diag(gain) w in w's dtype, rounded once: [N, K], fp32 [N] -> [N, K]."""
    if not w.is_cuda:
        return (w * gain[:, None]).to(w.dtype)
    out = torch.empty_like(w)
    _scale_rows_kernel[(len(w),)](w, gain, out, w.shape[1], BLOCK=triton.next_power_of_2(w.shape[1]))
    return out


def row_norms(w, A, B, scale):
    """n: the norms of the rows of w + scale B A, in fp32. [N, K], fp32 [r, K], fp32 [N, r] -> [N].

    By the identity n^2 = ||w||^2 + 2 s rowsum((w A^T) o B) + s^2 rowsum((B A A^T) o B), which needs no second matrix like w.
    """
    w = w.float()
    return (w.square().sum(1) + 2 * scale * ((w @ A.t()) * B).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)).sqrt()


def update_gain(w, A, B, m, scale, gain, b):
    """gain = m / n and b = diag(gain) B, in place; n as in `row_norms`, on a GPU by one pass over w, tile by tile."""
    if not w.is_cuda:
        torch.div(m, row_norms(w, A, B, scale), out=gain)
        b.copy_(B * gain[:, None])
    else:
        rank = max(16, triton.next_power_of_2(len(A)))
        options = dict(RANK=rank, ROWS=16, COLUMNS=max(16, 4096 // rank), num_warps=4)  # a tile of A fits the shared memory of any card
        _gain_kernel[(triton.cdiv(len(w), 16),)](w, A, B, m, gain, b, scale, *w.shape, len(A), **options)
