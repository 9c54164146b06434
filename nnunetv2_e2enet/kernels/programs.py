"""The Triton programs. A map is its samples one after the other, each of voxels and channels with a stride for either.

Programs work on tiles of ``BLOCK_V`` voxels and ``BLOCK_C`` channels: one channel where its voxels are neighbours in memory,
several where the channels of a voxel are (channels last). Programs are numbered by part of the voxels, group of channels, and
sample. A move along the first spatial axis is a distance in voxels, and what comes from outside of the map is zero.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def channels_of_tile(channels, BLOCK_C: tl.constexpr):
    """The channels, ``(1, BLOCK_C)``; whether there are such; and where they lie in a tensor ``(batch, channels)``."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return channel, channel < channels, tl.program_id(2) * channels + channel


@triton.jit
def voxels_of_tile(start, BLOCK_V: tl.constexpr):
    """Indices of the ``BLOCK_V`` voxels from ``start`` on, as a column."""
    return start + tl.arange(0, BLOCK_V)[:, None]


@triton.jit
def first_voxels(x, channel, channels, elements, channel_stride):
    """Where these channels of the program's sample begin."""
    return x + tl.program_id(2).to(tl.int64) * channels * elements + channel.to(tl.int64) * channel_stride


@triton.jit
def sums_around_first(
    x, sums, squares, channels, elements, voxel_stride, channel_stride, chunk,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of ``x - x[0]`` and of its square over each chunk of voxels. Large means do not cancel around the first value."""
    channel, exists, row = channels_of_tile(channels, BLOCK_C)
    x = first_voxels(x, channel, channels, elements, channel_stride)
    first = tl.load(x, exists, other=0).to(WIDE)
    total, total_squared = tl.zeros([BLOCK_V, BLOCK_C], WIDE), tl.zeros([BLOCK_V, BLOCK_C], WIDE)
    part = tl.program_id(0)
    stop = tl.minimum((part + 1) * chunk, elements)
    for start in range(part * chunk, stop, BLOCK_V):
        voxel = voxels_of_tile(start, BLOCK_V)
        inside = (voxel < stop) & exists
        value = tl.load(x + voxel.to(tl.int64) * voxel_stride, inside, other=0).to(WIDE)
        value = tl.where(inside, value - first, 0)
        total += value
        total_squared += value * value
    place = row * tl.num_programs(0) + part
    tl.store(sums + place, tl.sum(total, 0)[None, :], exists)
    tl.store(squares + place, tl.sum(total_squared, 0)[None, :], exists)


@triton.jit
def sum_of_parts(parts, count, BLOCK: tl.constexpr):
    """Of the program's row, in float64."""
    part = tl.arange(0, BLOCK)
    parts += tl.program_id(0).to(tl.int64) * count
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(parts + start + part, start + part < count, other=0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def finish_statistics(x, sums, squares, mean, rstd, channels, elements, channel_stride, count, eps, BLOCK: tl.constexpr):
    """Mean and ``1 / sqrt(variance + eps)`` of a row from what ``sums_around_first`` found in its parts."""
    row = tl.program_id(0)
    distance = sum_of_parts(sums, count, BLOCK) / elements
    square = sum_of_parts(squares, count, BLOCK) / elements
    variance = tl.maximum(square - distance * distance, 0.0)
    x += (row // channels).to(tl.int64) * channels * elements + (row % channels).to(tl.int64) * channel_stride
    tl.store(mean + row, (tl.load(x).to(tl.float64) + distance).to(mean.dtype.element_ty))
    tl.store(rstd + row, (1 / tl.sqrt(variance + eps)).to(rstd.dtype.element_ty))


@triton.jit
def finish_sums(first_parts, second_parts, first, second, count, BLOCK: tl.constexpr):
    """Two sums of a row over its parts."""
    row = tl.program_id(0)
    tl.store(first + row, sum_of_parts(first_parts, count, BLOCK).to(first.dtype.element_ty))
    tl.store(second + row, sum_of_parts(second_parts, count, BLOCK).to(second.dtype.element_ty))


@triton.jit
def slices_moved(channel, group_size, larger, middle):
    """How far a channel of the concatenation moves: groups as ``torch.tensor_split`` makes them, the larger ones first."""
    boundary = larger * (group_size + 1)
    in_larger = channel // (group_size + 1)
    in_smaller = larger + (channel - boundary) // group_size
    return tl.where(channel < boundary, in_larger, in_smaller) - middle


@triton.jit
def move_tiles(
    single, joined, scale, offset, channels, first_channel, joined_channels, plane, elements, single_voxel_stride,
    joined_voxel_stride, channel_stride, group_size, larger, middle,
    SLOPE: tl.constexpr, BACK: tl.constexpr, NORM: tl.constexpr, MOVE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One map into the concatenation of maps, moved, and normalised and activated on the way; or back, moved back."""
    channel, exists, row = channels_of_tile(channels, BLOCK_C)
    single = first_voxels(single, channel, channels, elements, channel_stride)
    channel += first_channel
    joined = first_voxels(joined, channel, joined_channels, elements, channel_stride)
    to = voxels_of_tile(tl.program_id(0) * BLOCK_V, BLOCK_V)
    distance = 0
    if MOVE:
        distance = slices_moved(channel, group_size, larger, middle) * plane
    if BACK:
        source, source_stride, target, target_stride, at = (
            joined,
            joined_voxel_stride,
            single,
            single_voxel_stride,
            to + distance,
        )
    else:
        source, source_stride, target, target_stride, at = (
            single,
            single_voxel_stride,
            joined,
            joined_voxel_stride,
            to - distance,
        )
    inside = (to < elements) & (at >= 0) & (at < elements) & exists
    value = tl.load(source + at.to(tl.int64) * source_stride, inside, other=0).to(WIDE)
    if NORM:
        value = value * tl.load(scale + row, exists, other=0) + tl.load(offset + row, exists, other=0)
        value = tl.where(inside, tl.where(value > 0, value, value * SLOPE), 0)
    tl.store(target + to.to(tl.int64) * target_stride, value.to(target.dtype.element_ty), (to < elements) & exists)


@triton.jit
def through_activation(grad, x, scale, offset, SLOPE: tl.constexpr):
    """The gradient before the leaky ReLU, whose sign is that of the norm's output."""
    return tl.where(x * scale + offset > 0, grad, grad * SLOPE)


@triton.jit
def gradient_sums(
    grad, x, mean, rstd, scale, offset, sums, products, channels, elements, voxel_stride, channel_stride, chunk,
    SLOPE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of the gradient before the activation, and of its product with the normalised map, over each chunk of voxels."""
    channel, exists, row = channels_of_tile(channels, BLOCK_C)
    grad = first_voxels(grad, channel, channels, elements, channel_stride)
    x = first_voxels(x, channel, channels, elements, channel_stride)
    row_mean, row_rstd = tl.load(mean + row, exists, other=0), tl.load(rstd + row, exists, other=0)
    row_scale, row_offset = tl.load(scale + row, exists, other=0), tl.load(offset + row, exists, other=0)
    total, total_product = tl.zeros([BLOCK_V, BLOCK_C], WIDE), tl.zeros([BLOCK_V, BLOCK_C], WIDE)
    part = tl.program_id(0)
    stop = tl.minimum((part + 1) * chunk, elements)
    for start in range(part * chunk, stop, BLOCK_V):
        voxel = voxels_of_tile(start, BLOCK_V)
        inside = (voxel < stop) & exists
        at = voxel.to(tl.int64) * voxel_stride
        value = tl.load(x + at, inside, other=0).to(WIDE)
        incoming = tl.load(grad + at, inside, other=0).to(WIDE)
        before = through_activation(incoming, value, row_scale, row_offset, SLOPE)
        total += before
        total_product += before * (value - row_mean) * row_rstd
    place = row * tl.num_programs(0) + part
    tl.store(sums + place, tl.sum(total, 0)[None, :], exists)
    tl.store(products + place, tl.sum(total_product, 0)[None, :], exists)


@triton.jit
def gradient_of_norm(
    grad, x, mean, rstd, scale, offset, sums, products, out, channels, elements, voxel_stride, channel_stride,
    SLOPE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``scale * (g - mean(g) - normalised * mean(g * normalised))``, with ``g`` before the activation."""
    channel, exists, row = channels_of_tile(channels, BLOCK_C)
    voxel = voxels_of_tile(tl.program_id(0) * BLOCK_V, BLOCK_V)
    inside = (voxel < elements) & exists
    at = voxel.to(tl.int64) * voxel_stride
    value = tl.load(first_voxels(x, channel, channels, elements, channel_stride) + at, inside, other=0).to(WIDE)
    incoming = tl.load(first_voxels(grad, channel, channels, elements, channel_stride) + at, inside, other=0).to(WIDE)
    row_scale = tl.load(scale + row, exists, other=0)
    before = through_activation(incoming, value, row_scale, tl.load(offset + row, exists, other=0), SLOPE)
    normalised = (value - tl.load(mean + row, exists, other=0)) * tl.load(rstd + row, exists, other=0)
    mean_product = tl.load(products + row, exists, other=0) / elements
    result = row_scale * (before - tl.load(sums + row, exists, other=0) / elements - normalised * mean_product)
    out = first_voxels(out, channel, channels, elements, channel_stride)
    tl.store(out + at, result.to(out.dtype.element_ty), inside)
