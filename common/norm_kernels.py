"""Normalisations of frozen layers on a GPU, in one or two passes over memory, with what comes before and after them.

GroupNorm reads channels-last images, adds the time embedding before and applies SiLU after; LayerNorm adds the residual before.
Their weights are frozen, so the backward pass gives the input's gradient only and keeps nothing but the input.
All sums are in fp32 over deviations from the mean, never differences of large squares.
"""

import torch
import torch.nn.functional as F

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    import triton
    import triton.language as tl

    @triton.jit
    def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Offsets in one image, channel numbers and mask of the tile of this program."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        at = tl.program_id(2).to(tl.int64) * pixels * channels + row * channels + column
        return at, column, (row < pixels) & (column < channels)

    @triton.jit
    def _moments_kernel(x, shift, mean, deviation, pixels, channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Of every tile and channel: mean, and sum of squared deviations from it."""
        at, column, inside = _tile(pixels, channels, ROWS, COLUMNS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            value += tl.load(shift + tl.program_id(2) * channels + column, mask=column < channels, other=0.0).to(tl.float32)
        count = tl.minimum(ROWS, pixels - tl.program_id(0) * ROWS)
        average = tl.sum(tl.where(inside, value, 0.0), axis=0)[None, :] / count
        apart = tl.where(inside, value - average, 0.0)
        to = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + column
        tl.store(mean + to, average, mask=column < channels)
        tl.store(deviation + to, tl.sum(apart * apart, axis=0)[None, :], mask=column < channels)

    @triton.jit
    def _group_tile(start, tiles, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr):
        """Tile numbers, offsets in per-tile sums and mask: the channels of this program's group."""
        tile = start + tl.arange(0, TILES)[:, None]
        inside_group = tl.arange(0, WIDTH)[None, :]
        at = (tl.program_id(1) * tiles + tile) * channels + tl.program_id(0) * SIZE + inside_group
        return tile, at, (tile < tiles) & (inside_group < SIZE)

    @triton.jit
    def _merge_moments_kernel(
        mean, deviation, weight, shift, scale, centre, inverse, tiles, pixels, channels, SIZE, eps,
        SHIFT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Of every group: 1 / standard deviation; of every channel: y = (x + centre) scale + bias."""
        total = pixels * SIZE
        sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            tile, at, inside = _group_tile(start, tiles, channels, SIZE, TILES, WIDTH)
            sums += tl.load(mean + at, mask=inside, other=0.0) * tl.minimum(ROWS, pixels - tile * ROWS)
        average = tl.sum(tl.sum(sums, axis=1), axis=0) / total
        sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            tile, at, inside = _group_tile(start, tiles, channels, SIZE, TILES, WIDTH)
            apart = tl.where(inside, tl.load(mean + at, mask=inside, other=0.0) - average, 0.0)
            sums += tl.load(deviation + at, mask=inside, other=0.0) + apart * apart * tl.minimum(ROWS, pixels - tile * ROWS)
        r = tl.rsqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / total + eps)
        tl.store(inverse + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), r)
        channel, inside = tl.program_id(0) * SIZE + tl.arange(0, WIDTH), tl.arange(0, WIDTH) < SIZE
        to = tl.program_id(1) * channels + channel
        tl.store(scale + to, r * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32), mask=inside)
        added = tl.load(shift + to, mask=inside, other=0.0).to(tl.float32) if SHIFT else tl.zeros((WIDTH,), dtype=tl.float32)
        tl.store(centre + to, added - average, mask=inside)

    @triton.jit
    def _group_norm_kernel(x, scale, centre, bias, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        at, column, inside = _tile(pixels, channels, ROWS, COLUMNS)
        of_channel, known = tl.program_id(2) * channels + column, column < channels
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(centre + of_channel, mask=known, other=0.0)
        z = u * tl.load(scale + of_channel, mask=known, other=0.0) + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + at, z, mask=inside)

    @triton.jit
    def _group_gradient(x, dy, scale, centre, bias, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Of this program's tile: offsets, channels, mask, deviation u from the group's mean, dL/dz, scale."""
        at, column, inside = _tile(pixels, channels, ROWS, COLUMNS)
        of_channel, known = tl.program_id(2) * channels + column, column < channels
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(centre + of_channel, mask=known, other=0.0)
        k, dz = tl.load(scale + of_channel, mask=known, other=0.0), tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            z = u * k + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            dz = dz * s * (1 + z * (1 - s))
        return at, column, inside, u, dz, k

    @triton.jit
    def _gradient_sums_kernel(
        x, dy, scale, centre, bias, sum_dz, sum_dz_u, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """Of every tile and channel: sums of dz scale and of dz scale u."""
        _, column, inside, u, dz, k = _group_gradient(x, dy, scale, centre, bias, pixels, channels, SILU, ROWS, COLUMNS)
        to = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + column
        dz = tl.where(inside, dz * k, 0.0)
        tl.store(sum_dz + to, tl.sum(dz, axis=0)[None, :], mask=column < channels)
        tl.store(sum_dz_u + to, tl.sum(dz * u, axis=0)[None, :], mask=column < channels)

    @triton.jit
    def _merge_gradient_kernel(
        sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr
    ):
        """Of every group: dx = dz scale - offset - slope u."""
        first, second = tl.zeros((TILES, WIDTH), dtype=tl.float32), tl.zeros((TILES, WIDTH), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            _, at, inside = _group_tile(start, tiles, channels, SIZE, TILES, WIDTH)
            first += tl.load(sum_dz + at, mask=inside, other=0.0)
            second += tl.load(sum_dz_u + at, mask=inside, other=0.0)
        to, total = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), pixels * SIZE
        r = tl.load(inverse + to)
        tl.store(offset + to, tl.sum(tl.sum(first, axis=1), axis=0) / total)
        tl.store(slope + to, tl.sum(tl.sum(second, axis=1), axis=0) / total * r * r)

    @triton.jit
    def _group_norm_backward_kernel(
        x, dy, scale, centre, bias, offset, slope, dx, pixels, channels, SIZE,
        SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        at, column, inside, u, dz, k = _group_gradient(x, dy, scale, centre, bias, pixels, channels, SILU, ROWS, COLUMNS)
        group, known = tl.program_id(2) * (channels // SIZE) + column // SIZE, column < channels
        a, b = tl.load(offset + group, mask=known, other=0.0), tl.load(slope + group, mask=known, other=0.0)
        tl.store(dx + at, dz * k - a - b * u, mask=inside)

    @triton.jit
    def _add_norm_kernel(h, a, weight, bias, total, y, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at, inside = tl.program_id(0).to(tl.int64) * width + i, i < width
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + at, value, mask=inside)
            value = value.to(total.dtype.element_ty).to(tl.float32)  # what is stored is what the backward pass will see
        apart = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
        r = tl.rsqrt(tl.sum(apart * apart, axis=0) / width + eps)
        w, b = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32), tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, apart * r * w + b, mask=inside)

    @triton.jit
    def _add_norm_backward_kernel(total, dy, dtotal, weight, dx, width, eps, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at, inside = tl.program_id(0).to(tl.int64) * width + i, i < width
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
        r = tl.rsqrt(tl.sum(apart * apart, axis=0) / width + eps)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        g = r * (g - tl.sum(g, axis=0) / width - apart * r * r * tl.sum(g * apart, axis=0) / width)
        tl.store(dx + at, g + tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32), mask=inside)

    @triton.jit
    def _add_bias_kernel(x, h, bias, y, channels, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n).to(tl.float32) + tl.load(h + i, mask=i < n).to(tl.float32)
        tl.store(y + i, value + tl.load(bias + i % channels, mask=i < n).to(tl.float32), mask=i < n)


COLUMNS, TILES, BLOCK = 64, 32, 1024


def _rows(pixels):
    """Pixels of a tile: few tiles for large images, many for small ones."""
    return max(32, triton.next_power_of_2(triton.cdiv(pixels, 256)))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, norm, silu):
        x = x.contiguous(memory_format=torch.channels_last)
        (images, channels, height, width), size = x.shape, norm.num_channels // norm.num_groups
        pixels, rows = height * width, _rows(height * width)
        tiles = triton.cdiv(pixels, rows)
        new = lambda *shape: torch.empty(shape, device=x.device, dtype=torch.float32)  # noqa: E731
        mean, deviation = new(images, tiles, channels), new(images, tiles, channels)
        scale, centre, inverse = new(images, channels), new(images, channels), new(images, norm.num_groups)
        grid, shifted = (tiles, triton.cdiv(channels, COLUMNS), images), shift is not None
        shift_or_any = shift.contiguous() if shifted else x
        _moments_kernel[grid](x, shift_or_any, mean, deviation, pixels, channels, SHIFT=shifted, ROWS=rows, COLUMNS=COLUMNS)
        _merge_moments_kernel[(norm.num_groups, images)](
            mean, deviation, norm.weight, shift_or_any, scale, centre, inverse, tiles, pixels, channels, size, norm.eps,
            SHIFT=shifted, ROWS=rows, TILES=TILES, WIDTH=triton.next_power_of_2(size),
        )  # fmt: skip
        y = torch.empty_like(x)
        _group_norm_kernel[grid](x, scale, centre, norm.bias, y, pixels, channels, SILU=silu, ROWS=rows, COLUMNS=COLUMNS)
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
            sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, size, TILES=TILES, WIDTH=triton.next_power_of_2(size)
        )
        dx = torch.empty_like(x)
        _group_norm_backward_kernel[grid](*given, offset, slope, dx, pixels, channels, size, **how)
        dshift = dx.sum((2, 3)) if ctx.needs_input_grad[1] else None
        return dx, dshift, None, None


def group_norm(x, norm, silu=False, shift=None):
    """silu(GroupNorm(x + shift)), with silu and shift as asked for.

    Args:
        x: [B, C, H, W]; channels-last on a GPU.
        norm: torch.nn.GroupNorm whose parameters need no gradient.
        shift: [B, C] or None.
    """
    if x.is_cuda:
        return _GroupNorm.apply(x, shift, norm, silu)
    x = x if shift is None else x + shift[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, a, norm):
        h, width = h.contiguous(), h.shape[-1]
        total, y = h if a is None else torch.empty_like(h), torch.empty_like(h)
        a_or_any = h if a is None else a.contiguous()
        _add_norm_kernel[(h.numel() // width,)](
            h, a_or_any, norm.weight, norm.bias, total, y, width, norm.eps, ADD=a is not None, BLOCK=triton.next_power_of_2(width)
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


def add_norm(h, a, norm):
    """(h + a, LayerNorm(h + a)), or (h, LayerNorm(h)) when a is None; both [..., C]. The parameters of `norm` need no gradient."""
    if h.is_cuda:
        return _AddNorm.apply(h, a, norm)
    total = h if a is None else a + h
    return total, norm(total)


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


def add_bias(x, h, bias):
    """x + h + bias: [B, C, H, W], the same, and [C], which needs no gradient."""
    return _AddBias.apply(x, h, bias) if x.is_cuda else x + (h + bias[:, None, None])
