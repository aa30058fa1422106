"""Triton kernels of frozen normalisations, in one or two passes over memory, with what comes before and after them.

GroupNorm reads channels-last images, adds the time embedding before and applies SiLU after; LayerNorm adds the residual before.
Their weights are frozen, so the backward pass gives the input's gradient only and keeps nothing but the input.
All sums are in fp32 over deviations from the mean, never differences of large squares.

The functions below the kernels are the GPU's forms of the operations of the same names in operations.py. GroupNorm's kernels share
these arguments, of a batch of images whose pixels are cut into tiles of ROWS:
    x, y, dy, dx: [images, pixels, channels]; shift: [images, channels]; weight, bias: [channels].
    mean, deviation, sum_dz, sum_dz_u: fp32 [images, tiles, channels], of one tile each.
    scale, centre: fp32 [images, channels], with u = x + centre and y = u scale + bias.
    inverse, offset, slope: fp32 [images, groups], with dx = dz scale - offset - slope u. SIZE: channels of a group.
"""

import torch
import triton
import triton.language as tl

COLUMNS, TILES, BLOCK = 64, 32, 1024


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile of an image: offsets [ROWS, COLUMNS], channels [1, COLUMNS], and the masks of both."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    offsets = tl.program_id(2).to(tl.int64) * pixels * channels + row * channels + channel
    channel_mask = channel < channels
    return offsets, channel, (row < pixels) & channel_mask, channel_mask


@triton.jit
def _group_tiles(start, tiles, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Of this program's group, in what is kept per tile: tile numbers [TILES, 1], offsets [TILES, WIDTH] and their mask."""
    tile = start + tl.arange(0, TILES)[:, None]
    in_group = tl.arange(0, WIDTH)[None, :]
    offsets = (tl.program_id(1) * tiles + tile) * channels + tl.program_id(0) * SIZE + in_group
    return tile, offsets, (tile < tiles) & (in_group < SIZE)


@triton.jit
def _moments_kernel(
    x, shift, mean, deviation, pixels, channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of every tile and channel of x + shift: mean, and the sum of squared deviations from it."""
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + tl.program_id(2) * channels + channel, mask=channel_mask, other=0.0).to(tl.float32)
    count = tl.minimum(ROWS, pixels - tl.program_id(0) * ROWS)
    average = tl.sum(tl.where(mask, value, 0.0), axis=0)[None, :] / count
    residual = tl.where(mask, value - average, 0.0)
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(mean + out, average, mask=channel_mask)
    tl.store(deviation + out, tl.sum(residual * residual, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _merge_moments_kernel(
    mean, deviation, weight, shift, scale, centre, inverse, tiles, pixels, channels, SIZE, eps,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of every group: inverse = 1 / standard deviation; of its channels: scale = inverse weight, centre = shift - mean."""
    total = pixels * SIZE
    sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile, offsets, mask = _group_tiles(start, tiles, channels, SIZE, TILES, WIDTH)
        sums += tl.load(mean + offsets, mask=mask, other=0.0) * tl.minimum(ROWS, pixels - tile * ROWS)
    average = tl.sum(tl.sum(sums, axis=1), axis=0) / total

    sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile, offsets, mask = _group_tiles(start, tiles, channels, SIZE, TILES, WIDTH)
        residual = tl.where(mask, tl.load(mean + offsets, mask=mask, other=0.0) - average, 0.0)
        count = tl.minimum(ROWS, pixels - tile * ROWS)
        sums += tl.load(deviation + offsets, mask=mask, other=0.0) + residual * residual * count
    r = tl.rsqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / total + eps)
    tl.store(inverse + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), r)

    channel = tl.program_id(0) * SIZE + tl.arange(0, WIDTH)
    mask = tl.arange(0, WIDTH) < SIZE
    out = tl.program_id(1) * channels + channel
    tl.store(scale + out, r * tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32), mask=mask)
    added = tl.zeros((WIDTH,), dtype=tl.float32)
    if SHIFT:
        added += tl.load(shift + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(centre + out, added - average, mask=mask)


@triton.jit
def _group_norm_kernel(
    x, scale, centre, bias, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y = (x + centre) scale + bias, through SiLU if asked for."""
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    of_image = tl.program_id(2) * channels + channel
    u = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + tl.load(
        centre + of_image, mask=channel_mask, other=0.0
    )
    k = tl.load(scale + of_image, mask=channel_mask, other=0.0)
    z = u * k + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z, mask=mask)


@triton.jit
def _group_gradient(
    x, dy, scale, centre, bias, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of this program's tile: offsets, channels and their masks as in `_tile`; u = x + centre, dL/dz and scale in fp32."""
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    of_image = tl.program_id(2) * channels + channel
    u = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + tl.load(
        centre + of_image, mask=channel_mask, other=0.0
    )
    k = tl.load(scale + of_image, mask=channel_mask, other=0.0)
    dz = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = u * k + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    return offsets, channel, mask, channel_mask, u, dz, k


@triton.jit
def _gradient_sums_kernel(
    x, dy, scale, centre, bias, sum_dz, sum_dz_u, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Of every tile and channel: the sums of dz scale and of dz scale u."""
    _, channel, mask, channel_mask, u, dz, k = _group_gradient(
        x, dy, scale, centre, bias, pixels, channels, SILU, ROWS, COLUMNS
    )
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    dz = tl.where(mask, dz * k, 0.0)
    tl.store(sum_dz + out, tl.sum(dz, axis=0)[None, :], mask=channel_mask)
    tl.store(sum_dz_u + out, tl.sum(dz * u, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _merge_gradient_kernel(
    sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of every group: offset = mean of dz scale, slope = inverse^2 times the mean of dz scale u."""
    first = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    second = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        _, offsets, mask = _group_tiles(start, tiles, channels, SIZE, TILES, WIDTH)
        first += tl.load(sum_dz + offsets, mask=mask, other=0.0)
        second += tl.load(sum_dz_u + offsets, mask=mask, other=0.0)
    group = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    total = pixels * SIZE
    r = tl.load(inverse + group)
    tl.store(offset + group, tl.sum(tl.sum(first, axis=1), axis=0) / total)
    tl.store(slope + group, tl.sum(tl.sum(second, axis=1), axis=0) / total * r * r)


@triton.jit
def _group_norm_backward_kernel(
    x, dy, scale, centre, bias, offset, slope, dx, pixels, channels, SIZE,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = dz scale - offset - slope u."""
    offsets, channel, mask, channel_mask, u, dz, k = _group_gradient(
        x, dy, scale, centre, bias, pixels, channels, SILU, ROWS, COLUMNS
    )  # fmt: skip
    group = tl.program_id(2) * (channels // SIZE) + channel // SIZE
    a = tl.load(offset + group, mask=channel_mask, other=0.0)
    b = tl.load(slope + group, mask=channel_mask, other=0.0)
    tl.store(dx + offsets, dz * k - a - b * u, mask=mask)


@triton.jit
def _add_norm_kernel(h, a, weight, bias, total, y, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total = h + a, y = LayerNorm(total), one row a program. h, a, total, y: [rows, width]; weight, bias: [width]."""
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(a + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + offsets, value, mask=mask)
        value = value.to(total.dtype.element_ty).to(tl.float32)  # what is stored is what the backward pass will see
    residual = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    r = tl.rsqrt(tl.sum(residual * residual, axis=0) / width + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, residual * r * w + b, mask=mask)


@triton.jit
def _add_norm_backward_kernel(total, dy, dtotal, weight, dx, width, eps, BLOCK: tl.constexpr):
    """dx = dtotal + the gradient through LayerNorm(total). total, dy, dtotal, dx: [rows, width]; weight: [width]."""
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
    """y = x + h + bias. x, h, y: [n], channels last; bias: [channels]."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x + offsets, mask=mask).to(tl.float32) + tl.load(h + offsets, mask=mask).to(tl.float32)
    tl.store(y + offsets, value + tl.load(bias + offsets % channels, mask=mask).to(tl.float32), mask=mask)


def _rows(pixels):
    """Pixels of a tile: few tiles for large images, many for small ones."""
    return max(32, triton.next_power_of_2(triton.cdiv(pixels, 256)))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, silu, shift):
        x = x.contiguous(memory_format=torch.channels_last)
        (images, channels, height, width), size = x.shape, norm.num_channels // norm.num_groups
        pixels, rows = height * width, _rows(height * width)
        tiles = triton.cdiv(pixels, rows)
        new = lambda *shape: torch.empty(shape, device=x.device, dtype=torch.float32)  # noqa: E731
        mean, deviation = new(images, tiles, channels), new(images, tiles, channels)
        scale, centre, inverse = new(images, channels), new(images, channels), new(images, norm.num_groups)
        grid, shifted = (tiles, triton.cdiv(channels, COLUMNS), images), shift is not None
        shift_or_any = shift.contiguous() if shifted else x
        _moments_kernel[grid](
            x, shift_or_any, mean, deviation, pixels, channels, SHIFT=shifted, ROWS=rows, COLUMNS=COLUMNS
        )
        _merge_moments_kernel[(norm.num_groups, images)](
            mean, deviation, norm.weight, shift_or_any, scale, centre, inverse, tiles, pixels, channels, size, norm.eps,
            SHIFT=shifted, ROWS=rows, TILES=TILES, WIDTH=triton.next_power_of_2(size),
        )  # fmt: skip
        y = torch.empty_like(x)
        _group_norm_kernel[grid](
            x, scale, centre, norm.bias, y, pixels, channels, SILU=silu, ROWS=rows, COLUMNS=COLUMNS
        )
        ctx.save_for_backward(x, scale, centre, inverse)
        ctx.norm, ctx.silu, ctx.tiling = norm, silu, (grid, rows, tiles, pixels, size)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, scale, centre, inverse), norm, (grid, rows, tiles, pixels, size) = ctx.saved_tensors, ctx.norm, ctx.tiling
        (images, channels), dy = scale.shape, dy.contiguous(memory_format=torch.channels_last)
        sum_dz = torch.empty(images, tiles, channels, device=x.device, dtype=torch.float32)
        sum_dz_u, offset, slope = torch.empty_like(sum_dz), torch.empty_like(inverse), torch.empty_like(inverse)
        given, how = (x, dy, scale, centre, norm.bias), dict(SILU=ctx.silu, ROWS=rows, COLUMNS=COLUMNS)
        _gradient_sums_kernel[grid](*given, sum_dz, sum_dz_u, pixels, channels, **how)
        _merge_gradient_kernel[(norm.num_groups, images)](
            sum_dz,
            sum_dz_u,
            inverse,
            offset,
            slope,
            tiles,
            pixels,
            channels,
            size,
            TILES=TILES,
            WIDTH=triton.next_power_of_2(size),
        )
        dx = torch.empty_like(x)
        _group_norm_backward_kernel[grid](*given, offset, slope, dx, pixels, channels, size, **how)
        dshift = dx.sum((2, 3)) if ctx.needs_input_grad[3] else None
        return dx, None, None, dshift


def group_norm(x, norm, silu=False, shift=None):
    return _GroupNorm.apply(x, norm, silu, shift)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, a, norm):
        h, width = h.contiguous(), h.shape[-1]
        total, y = h if a is None else torch.empty_like(h), torch.empty_like(h)
        a_or_any = h if a is None else a.contiguous()
        _add_norm_kernel[(h.numel() // width,)](
            h,
            a_or_any,
            norm.weight,
            norm.bias,
            total,
            y,
            width,
            norm.eps,
            ADD=a is not None,
            BLOCK=triton.next_power_of_2(width),
        )
        ctx.save_for_backward(total)
        ctx.norm, ctx.added = norm, a is not None
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        ((total,), norm, width) = ctx.saved_tensors, ctx.norm, dy.shape[-1]
        dx, block = torch.empty_like(total), triton.next_power_of_2(width)
        _add_norm_backward_kernel[(total.numel() // width,)](
            total, dy.contiguous(), dtotal.contiguous(), norm.weight, dx, width, norm.eps, BLOCK=block
        )
        return dx, dx if ctx.added else None, None


add_norm = _AddNorm.apply


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, bias):
        x, h = (image.contiguous(memory_format=torch.channels_last) for image in (x, h))
        y = torch.empty_like(x)
        _add_bias_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, h, bias, y, x.shape[1], x.numel(), BLOCK=BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None


add_bias = _AddBias.apply
