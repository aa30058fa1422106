"""Triton kernels of GroupNorm with frozen weights, with what comes before and after it, in two passes over memory.

It reads channels-last images, adds the time embedding before and applies SiLU after. The backward pass gives the
gradient of the input only, and keeps nothing but the input. All sums are in fp32 over deviations from the mean, never
differences of large squares.

`group_norm` below the kernels is the GPU's form of that in operations.py. Of a batch of images, pixels are cut into
tiles of ROWS. In all kernels u = x + centre, z = u scale + bias is y before SiLU, and dx = dz scale - offset - slope u.
SIZE is the number of a group's channels. Source: arXiv 1803.08494, eq. 1 and 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

COLUMNS = 64
TILES = 32


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
    """Of this program's group, in what is kept per tile: tiles [TILES, 1], offsets [TILES, WIDTH], mask."""
    tile = start + tl.arange(0, TILES)[:, None]
    in_group = tl.arange(0, WIDTH)[None, :]
    offsets = (tl.program_id(1) * tiles + tile) * channels + tl.program_id(0) * SIZE + in_group
    return tile, offsets, (tile < tiles) & (in_group < SIZE)


@triton.jit
def _moments_kernel(
    x, shift, mean, deviation, pixels, channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of every tile and channel of x + shift: mean, and deviation = the sum of squared deviations from it.

    x: [images, pixels, channels]; shift: [images, channels]; mean, deviation: fp32 [images, tiles, channels].
    """
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
    """Of every group: inverse = 1 / standard deviation; of its channels: scale = inverse weight, centre = shift - mean.

    mean, deviation: fp32 [images, tiles, channels]; weight: [channels]; shift: [images, channels].
    scale, centre: fp32 [images, channels]; inverse: fp32 [images, groups].
    """
    # mean of the group
    total = pixels * SIZE
    sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile, offsets, mask = _group_tiles(start, tiles, channels, SIZE=SIZE, TILES=TILES, WIDTH=WIDTH)
        sums += tl.load(mean + offsets, mask=mask, other=0.0) * tl.minimum(ROWS, pixels - tile * ROWS)
    average = tl.sum(tl.sum(sums, axis=1), axis=0) / total

    # inverse of its standard deviation
    sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile, offsets, mask = _group_tiles(start, tiles, channels, SIZE=SIZE, TILES=TILES, WIDTH=WIDTH)
        residual = tl.where(mask, tl.load(mean + offsets, mask=mask, other=0.0) - average, 0.0)
        count = tl.minimum(ROWS, pixels - tile * ROWS)
        sums += tl.load(deviation + offsets, mask=mask, other=0.0) + residual * residual * count
    r = tl.rsqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / total + eps)
    tl.store(inverse + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), r)

    # what its channels are multiplied by and moved by
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
    """y = (x + centre) scale + bias, through SiLU if asked for.

    x, y: [images, pixels, channels]; scale, centre: fp32 [images, channels]; bias: [channels].
    """
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    of_image = tl.program_id(2) * channels + channel
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    u = value + tl.load(centre + of_image, mask=channel_mask, other=0.0)
    k = tl.load(scale + of_image, mask=channel_mask, other=0.0)
    z = u * k + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z, mask=mask)


@triton.jit
def _group_gradient(
    x, dy, scale, centre, bias, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of this program's tile: offsets, channels and masks as in `_tile`; in fp32 u = x + centre, dL/dz and scale.

    The derivative of SiLU is s (1 + z (1 - s)) with s = sigmoid(z).
    x, dy: [images, pixels, channels]; scale, centre: fp32 [images, channels]; bias: [channels].
    """
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    of_image = tl.program_id(2) * channels + channel
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    u = value + tl.load(centre + of_image, mask=channel_mask, other=0.0)
    k = tl.load(scale + of_image, mask=channel_mask, other=0.0)
    dz = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = u * k + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    return offsets, channel, mask, channel_mask, u, dz, k


@triton.jit
def _gradient_sums_kernel(
    x, dy, scale, centre, bias, sum_dz, sum_dz_u, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of every tile and channel: sum_dz = the sum of dz scale, sum_dz_u = that of dz scale u.

    x, dy, scale, centre, bias: as of `_group_gradient`; sum_dz, sum_dz_u: fp32 [images, tiles, channels].
    """
    _, channel, mask, channel_mask, u, dz, k = _group_gradient(
        x, dy, scale=scale, centre=centre, bias=bias, pixels=pixels, channels=channels,
        SILU=SILU, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    dz = tl.where(mask, dz * k, 0.0)
    tl.store(sum_dz + out, tl.sum(dz, axis=0)[None, :], mask=channel_mask)
    tl.store(sum_dz_u + out, tl.sum(dz * u, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _merge_gradient_kernel(
    sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of every group: offset = mean of dz scale, slope = inverse^2 times the mean of dz scale u.

    sum_dz, sum_dz_u: fp32 [images, tiles, channels]; inverse, offset, slope: fp32 [images, groups].
    """
    first = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    second = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        _, offsets, mask = _group_tiles(start, tiles, channels, SIZE=SIZE, TILES=TILES, WIDTH=WIDTH)
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
    """dx = dz scale - offset - slope u.

    x, dy, scale, centre, bias: as of `_group_gradient`; offset, slope: fp32 [images, groups].
    dx: [images, pixels, channels].
    """
    offsets, channel, mask, channel_mask, u, dz, k = _group_gradient(
        x, dy, scale=scale, centre=centre, bias=bias, pixels=pixels, channels=channels,
        SILU=SILU, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    group = tl.program_id(2) * (channels // SIZE) + channel // SIZE
    a = tl.load(offset + group, mask=channel_mask, other=0.0)
    b = tl.load(slope + group, mask=channel_mask, other=0.0)
    tl.store(dx + offsets, dz * k - a - b * u, mask=mask)


class _Tiling(NamedTuple):
    """How a batch of images is cut: [images, pixels, channels] into tiles [rows, COLUMNS], and channels into groups."""

    images: int
    pixels: int
    channels: int
    groups: int
    rows: int

    @classmethod
    def of(cls, x: torch.Tensor, groups: int) -> "_Tiling":
        """For x [images, channels, height, width]: few tiles for large images, many for small ones."""
        images, channels, height, width = x.shape
        pixels = height * width
        return cls(images, pixels, channels, groups, max(32, triton.next_power_of_2(triton.cdiv(pixels, 256))))

    @property
    def tiles(self):
        """Tiles of one image, from top to bottom."""
        return triton.cdiv(self.pixels, self.rows)

    @property
    def size(self):
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def grid(self):
        """A program for every tile."""
        return self.tiles, triton.cdiv(self.channels, COLUMNS), self.images

    @property
    def image(self):
        """Arguments of the kernels that work on tiles."""
        return dict(pixels=self.pixels, channels=self.channels, ROWS=self.rows, COLUMNS=COLUMNS)

    @property
    def group(self):
        """Arguments of the kernels that merge the tiles of a group."""
        sizes = dict(tiles=self.tiles, pixels=self.pixels, channels=self.channels, SIZE=self.size)
        return dict(**sizes, TILES=TILES, WIDTH=triton.next_power_of_2(self.size))


class _GroupNorm(torch.autograd.Function):
    """Keeps x, and the few numbers of its groups, for the backward pass."""

    @staticmethod
    def forward(ctx, x, norm, silu, shift):
        x = x.contiguous(memory_format=torch.channels_last)
        shift_or_any = x if shift is None else shift.contiguous()
        tiling = _Tiling.of(x, norm.num_groups)
        images, channels = x.shape[:2]
        new = lambda *shape: torch.empty(shape, device=x.device, dtype=torch.float32)  # noqa: E731

        # moments of every tile, then of every group
        mean, deviation = new(images, tiling.tiles, channels), new(images, tiling.tiles, channels)
        scale, centre, inverse = new(images, channels), new(images, channels), new(images, norm.num_groups)
        moments = dict(mean=mean, deviation=deviation, SHIFT=shift is not None)
        _moments_kernel[tiling.grid](x, shift_or_any, **moments, **tiling.image)
        _merge_moments_kernel[(norm.num_groups, images)](
            **moments, weight=norm.weight, shift=shift_or_any, scale=scale, centre=centre, inverse=inverse,
            eps=norm.eps, ROWS=tiling.rows, **tiling.group,
        )  # fmt: skip

        # y
        y = torch.empty_like(x)
        _group_norm_kernel[tiling.grid](x, scale, centre, norm.bias, y, SILU=silu, **tiling.image)
        ctx.save_for_backward(x, scale, centre, inverse)
        ctx.norm, ctx.silu, ctx.tiling = norm, silu, tiling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, centre, inverse = ctx.saved_tensors
        tiling, norm = ctx.tiling, ctx.norm
        dy = dy.contiguous(memory_format=torch.channels_last)
        given = dict(x=x, dy=dy, scale=scale, centre=centre, bias=norm.bias, SILU=ctx.silu)

        # sums of every tile, then means of every group
        sum_dz = torch.empty(len(x), tiling.tiles, x.shape[1], device=x.device, dtype=torch.float32)
        sum_dz_u = torch.empty_like(sum_dz)
        offset, slope = torch.empty_like(inverse), torch.empty_like(inverse)
        _gradient_sums_kernel[tiling.grid](**given, sum_dz=sum_dz, sum_dz_u=sum_dz_u, **tiling.image)
        _merge_gradient_kernel[(norm.num_groups, len(x))](
            sum_dz, sum_dz_u, inverse=inverse, offset=offset, slope=slope, **tiling.group
        )

        # dx
        dx = torch.empty_like(x)
        _group_norm_backward_kernel[tiling.grid](
            **given, offset=offset, slope=slope, dx=dx, SIZE=tiling.size, **tiling.image
        )
        dshift = dx.sum((2, 3)) if ctx.needs_input_grad[3] else None
        return dx, None, None, dshift


def group_norm(
    x: torch.Tensor, norm: torch.nn.GroupNorm, *, silu: bool = False, shift: torch.Tensor | None = None
) -> torch.Tensor:
    return _GroupNorm.apply(x, norm, silu, shift)
