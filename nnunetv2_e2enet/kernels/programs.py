"""The Triton programs. A *row* is one channel of one sample: its voxels lie one after the other, slice by slice.

A move along the first spatial axis is then a distance in the row, and what comes from outside of the row is zero.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def sums_around_first(x, sums, squares, elements, chunk, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # noqa: N803
    """Sums of ``x - x[0]`` and of its square over each chunk of a row. Large means do not cancel around the first value."""
    row, part = tl.program_id(0), tl.program_id(1)
    x += row.to(tl.int64) * elements
    first = tl.load(x).to(WIDE)
    total, total_squared = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    stop = tl.minimum((part + 1) * chunk, elements)
    for start in range(part * chunk, stop, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < stop
        value = tl.where(inside, tl.load(x + index, inside, other=0).to(WIDE) - first, 0)
        total += value
        total_squared += value * value
    place = row * tl.num_programs(1) + part
    tl.store(sums + place, tl.sum(total))
    tl.store(squares + place, tl.sum(total_squared))


@triton.jit
def slices_moved(channel, group_size, larger, middle):
    """How far a channel of the concatenation moves: groups as ``torch.tensor_split`` makes them, the larger ones first."""
    boundary = larger * (group_size + 1)
    in_larger = channel // (group_size + 1)
    in_smaller = larger + (channel - boundary) // group_size
    return tl.where(channel < boundary, in_larger, in_smaller) - middle


@triton.jit
def move_rows(
    single,
    joined,
    scale,
    offset,
    channels,
    first_channel,
    joined_channels,
    plane,
    elements,
    group_size,
    larger,
    middle,
    SLOPE: tl.constexpr,  # noqa: N803
    BACK: tl.constexpr,  # noqa: N803
    NORM: tl.constexpr,  # noqa: N803
    MOVE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    """One map's rows into the concatenation of maps, moved, and normalised and activated on the way; or back, moved back."""
    row = tl.program_id(0)
    channel = first_channel + row % channels
    single += row.to(tl.int64) * elements
    joined += ((row // channels).to(tl.int64) * joined_channels + channel) * elements
    to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    distance = 0
    if MOVE:
        distance = slices_moved(channel, group_size, larger, middle) * plane
    if BACK:
        source, target, at = joined, single, to + distance
    else:
        source, target, at = single, joined, to - distance
    inside = (to < elements) & (at >= 0) & (at < elements)
    value = tl.load(source + at, inside, other=0).to(WIDE)
    if NORM:
        value = value * tl.load(scale + row) + tl.load(offset + row)
        value = tl.where(inside, tl.where(value > 0, value, value * SLOPE), 0)
    tl.store(target + to, value.to(target.dtype.element_ty), to < elements)


@triton.jit
def through_activation(grad, x, scale, offset, SLOPE: tl.constexpr):  # noqa: N803
    """The gradient before the leaky ReLU, whose sign is that of the norm's output."""
    return tl.where(x * scale + offset > 0, grad, grad * SLOPE)


@triton.jit
def gradient_sums(
    grad,
    x,
    mean,
    rstd,
    scale,
    offset,
    sums,
    products,
    elements,
    chunk,
    SLOPE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    """Of the gradient before the activation, and of its product with the normalised map, over each chunk of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    grad += row.to(tl.int64) * elements
    x += row.to(tl.int64) * elements
    row_mean, row_rstd = tl.load(mean + row), tl.load(rstd + row)
    row_scale, row_offset = tl.load(scale + row), tl.load(offset + row)
    total, total_product = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    stop = tl.minimum((part + 1) * chunk, elements)
    for start in range(part * chunk, stop, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < stop
        value = tl.load(x + index, inside, other=0).to(WIDE)
        incoming = tl.load(grad + index, inside, other=0).to(WIDE)
        before = through_activation(incoming, value, row_scale, row_offset, SLOPE)
        total += before
        total_product += before * (value - row_mean) * row_rstd
    place = row * tl.num_programs(1) + part
    tl.store(sums + place, tl.sum(total))
    tl.store(products + place, tl.sum(total_product))


@triton.jit
def gradient_of_norm(
    grad,
    x,
    mean,
    rstd,
    scale,
    offset,
    sums,
    products,
    out,
    elements,
    SLOPE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):
    """``scale * (g - mean(g) - normalised * mean(g * normalised))``, with ``g`` before the activation."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * elements
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    value = tl.load(x + start + index, inside, other=0).to(WIDE)
    incoming = tl.load(grad + start + index, inside, other=0).to(WIDE)
    row_scale = tl.load(scale + row)
    before = through_activation(incoming, value, row_scale, tl.load(offset + row), SLOPE)
    normalised = (value - tl.load(mean + row)) * tl.load(rstd + row)
    result = row_scale * (before - tl.load(sums + row) / elements - normalised * (tl.load(products + row) / elements))
    tl.store(out + start + index, result.to(out.dtype.element_ty), inside)
