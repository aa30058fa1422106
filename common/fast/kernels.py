"""Triton kernels of the adapter layers and of the gated activation; imported only where there is a GPU and Triton.

The functions below the kernels are the GPU's forms of the operations of the same names in operations.py, which says
what they compute and of what shapes. Every program works on one block or tile; what lies outside of a tensor is
masked.
"""

import functools

import torch
import triton
import triton.language as tl

from common.fast.operations import spread_salt

BLOCK = 1024


@triton.jit
def _dropout_kernel(x, add_to, out, seed, salt, n, p, alpha, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out = alpha / (1 - p) x where a hash of seed, salt and place says keep, else 0; plus add_to.

    x, add_to, out: [n]; seed: int64 scalar; salt, n, p, alpha: numbers.
    The integer hash is one of https://github.com/skeeto/hash-prospector.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    bits = offsets.to(tl.uint32) * 0x9E3779B9 + tl.load(seed).to(tl.uint32) + salt
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    uniform = ((bits ^ (bits >> 15)) >> 8).to(tl.float32) / 16777216.0
    result = tl.where(uniform >= p, tl.load(x + offsets, mask=mask).to(tl.float32) * (alpha / (1 - p)), 0.0)
    if ADD:
        result += tl.load(add_to + offsets, mask=mask).to(tl.float32)
    tl.store(out + offsets, result, mask=mask)


@triton.jit
def _load_halves(h, width, BLOCK: tl.constexpr):
    """Of this program's part of a row: column offsets, mask, value and gate in fp32.

    h: [rows, 2 width].
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    start = h + tl.program_id(0).to(tl.int64) * 2 * width
    value = tl.load(start + column, mask=mask).to(tl.float32)
    gate = tl.load(start + width + column, mask=mask).to(tl.float32)
    return column, mask, value, gate


@triton.jit
def _geglu_kernel(h, out, width, BLOCK: tl.constexpr):
    """out = value gelu(gate), with gelu(x) = x cdf(x) of the normal distribution (arXiv 1606.08415, eq. 1).

    h = [value, gate]: [rows, 2 width]; out: [rows, width].
    """
    column, mask, value, gate = _load_halves(h, width, BLOCK)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + tl.program_id(0).to(tl.int64) * width + column, value * gate * cdf, mask=mask)


@triton.jit
def _geglu_backward_kernel(dy, h, dh, width, BLOCK: tl.constexpr):
    """dh = dy [gelu(gate), value gelu'(gate)], with gelu'(x) = cdf(x) + x density(x).

    dy: [rows, width]; h, dh: [rows, 2 width].
    """
    column, mask, value, gate = _load_halves(h, width, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    d = tl.load(dy + row * width + column, mask=mask).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    start = dh + row * 2 * width
    tl.store(start + column, d * gate * cdf, mask=mask)
    tl.store(start + width + column, d * value * (cdf + gate * density), mask=mask)


@triton.jit
def _gain_backward_kernel(
    dy, y, bias, gain, m, scaled, partial, arrived, dm, rows, columns,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """scaled = dy gain; dm += the sum over the rows of dy (y - bias) / m (arXiv 2402.09353, section 4.3).

    dy, y, scaled: [rows, columns]; bias: [columns]; gain, m, dm: fp32 [columns].
    partial: fp32 [tiles of rows, columns], the sums of every tile.
    arrived: int32 [tiles of columns], 0 before and after.
    """
    # one tile
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < columns
    offsets = row * columns + column[None, :]
    mask = (row < rows) & column_mask[None, :]
    d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        u -= tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    g = tl.load(gain + column, mask=column_mask, other=0.0)
    tl.store(scaled + offsets, d * g[None, :], mask=mask)
    tl.store(partial + tl.program_id(0) * columns + column, tl.sum(d * u, axis=0), mask=column_mask)

    # The atomic addition publishes what every thread of the program has stored.
    # The last program for these columns adds up all tiles.
    tl.debug_barrier()
    if tl.atomic_add(arrived + tl.program_id(1), 1) == tl.num_programs(0) - 1:
        sums = tl.zeros((PARTS, COLUMNS), dtype=tl.float32)
        for start in range(0, tl.num_programs(0), PARTS):
            part = start + tl.arange(0, PARTS)[:, None]
            part_mask = (part < tl.num_programs(0)) & column_mask[None, :]
            sums += tl.load(partial + part * columns + column[None, :], mask=part_mask, other=0.0)
        total = tl.sum(sums, axis=0) / tl.load(m + column, mask=column_mask, other=1.0)
        tl.store(dm + column, tl.load(dm + column, mask=column_mask, other=0.0) + total, mask=column_mask)
        tl.store(arrived + tl.program_id(1), 0)


@triton.jit
def _scale_rows_kernel(w, gain, out, columns, BLOCK: tl.constexpr):
    """out = diag(gain) w, one row a program.

    w, out: [rows, columns]; gain: fp32 [rows].
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    value = tl.load(w + row * columns + column, mask=mask).to(tl.float32) * tl.load(gain + row)
    tl.store(out + row * columns + column, value, mask=mask)


@triton.jit
def _gain_kernel(
    w, A, B, m, gain, b, scale, rows, columns, rank, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """gain = m / the norms of the rows of w + scale B A; b = diag(gain) B. A group of rows a program, tile by tile.

    w: [rows, columns]; A: fp32 [rank, columns]; B: fp32 [rows, rank].
    m, gain: fp32 [rows]; b: [rows, rank]. DoRA's m / n: arXiv 2402.09353, eq. 5.
    """
    # B, of all columns of this program's rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    j = tl.arange(0, RANK)
    j_mask = j < rank
    b_offsets = row[:, None] * rank + j[None, :]
    b_mask = row_mask[:, None] & j_mask[None, :]
    of_b = tl.load(B + b_offsets, mask=b_mask, other=0.0)

    # squares of w + scale B A; tf32x3 is as exact as fp32, and before sm_80 it is fp32
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < columns
        a_mask = j_mask[:, None] & column_mask[None, :]
        w_mask = row_mask[:, None] & column_mask[None, :]
        of_a = tl.load(A + j[:, None] * columns + column[None, :], mask=a_mask, other=0.0)
        of_w = tl.load(w + row[:, None] * columns + column[None, :], mask=w_mask, other=0.0).to(tl.float32)
        value = of_w + scale * tl.dot(of_b, of_a, input_precision="tf32x3")
        squares += value * value

    # the gain, and B with it
    g = tl.load(m + row, mask=row_mask, other=0.0) / tl.sqrt(tl.sum(squares, axis=1))
    tl.store(gain + row, g, mask=row_mask)
    tl.store(b + b_offsets, of_b * g[:, None], mask=b_mask)


def seeded_dropout(
    x: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    salt: int,
    *,
    add_to: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    x = x.contiguous()
    n = x.numel()
    out = torch.empty_like(x) if add_to is None else add_to
    grid = (triton.cdiv(n, BLOCK),)
    _dropout_kernel[grid](
        x, out, out, seed, spread_salt(salt), n=n, p=p, alpha=alpha, ADD=add_to is not None, BLOCK=BLOCK
    )
    return out


class _Geglu(torch.autograd.Function):
    """Keeps only h for the backward pass."""

    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        ctx.save_for_backward(h)
        width = h.shape[-1] // 2
        out = h.new_empty(*h.shape[:-1], width)
        _geglu_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](h, out, width, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        dy = dy.contiguous()
        dh = torch.empty_like(h)
        width = dy.shape[-1]
        _geglu_backward_kernel[(dy.numel() // width, triton.cdiv(width, BLOCK))](dy, h, dh, width, BLOCK=BLOCK)
        return dh


geglu = _Geglu.apply


def gain_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gain: torch.Tensor,
    m: torch.Tensor,
    dm: torch.Tensor,
) -> torch.Tensor:
    rows, columns = dy.shape
    scaled = torch.empty_like(dy)
    grid = triton.cdiv(rows, 128), triton.cdiv(columns, 64)
    partial = torch.empty(grid[0], columns, device=dy.device, dtype=torch.float32)
    sums = dict(partial=partial, arrived=_arrivals(dy.device), dm=dm)
    sizes = dict(rows=rows, columns=columns, BIAS=bias is not None, ROWS=128, COLUMNS=64, PARTS=128)
    bias_or_any = dy if bias is None else bias
    _gain_backward_kernel[grid](dy, y, bias=bias_or_any, gain=gain, m=m, scaled=scaled, **sums, **sizes)
    return scaled


@functools.lru_cache
def _arrivals(device):
    """Counters that are 0 between kernels; more of them than any layer has groups of 64 columns."""
    return torch.zeros(4096, device=device, dtype=torch.int32)


def scale_rows(w: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(w)
    _scale_rows_kernel[(len(w),)](w, gain, out, w.shape[1], BLOCK=triton.next_power_of_2(w.shape[1]))
    return out


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
    rows, columns = w.shape
    padded = max(16, triton.next_power_of_2(len(A)))
    sizes = dict(rows=rows, columns=columns, rank=len(A))
    tile = dict(RANK=padded, ROWS=16, COLUMNS=max(16, 4096 // padded))  # of A it fits the shared memory of any card
    _gain_kernel[(triton.cdiv(rows, 16),)](w, A, B, m=m, gain=gain, b=b, scale=scale, **sizes, **tile, num_warps=4)
