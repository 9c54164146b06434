"""Triton programs of convolutions that compute active connections alone: implicit matrix products over gathered input maps.

A layer's output maps are blocks, each of which reads its own ``n_inputs`` input maps, whose numbers lie in ``inputs``
``(blocks, n_inputs)``. What a product reads is gathered in its addresses.
No program writes what another one writes, so that results do not depend on an order.

Input maps are the channels of a concatenation of ``maps`` of so many ``widths`` each. It is never made: the depth shift is a
distance in the addresses of a channel, and norm and leaky ReLU are computed before a product, of maps that have a slope in
``SLOPES``. The norms are ``scales`` and ``offsets``, ``(batch, width)``.

The kernel is ``KD x KH x KW``, half of it padding. In a transposed convolution, whose kernel is its stride, each place becomes
``UD x UH x UW`` voxels, its parts, each with weights of its own; otherwise a place is a voxel. Sizes of results, ``out_depth``
and so on, count places, and ``out_voxels`` voxels. The weights of a connection lie part after part, tap after tap.

Where channels come ``LAST``, those of a voxel are neighbours in memory, otherwise the voxels of a channel. Offsets within a
map are of 64 bits.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from nnunetv2_e2enet.kernels.programs import slices_moved


@triton.jit
def gathered(block, first, inputs, n_inputs, BLOCK_K: tl.constexpr):
    """Numbers of a block's input maps from ``first`` on, and whether there are so many."""
    place = first + tl.arange(0, BLOCK_K)
    exists = place < n_inputs
    return tl.load(inputs + block * n_inputs + place, exists, other=0).to(tl.int32), exists


@triton.jit
def position(voxel, height, width):
    """Depth, row and column of a voxel's index."""
    return voxel // (height * width), voxel // width % height, voxel % width


@triton.jit
def voxel_of_part(d, h, w, part, height, width, UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr):
    """Of a place in a map that is ``UD x UH x UW`` times as large as the places."""
    row = (d.to(tl.int64) * UD + part // (UH * UW)) * (height * UH) + h * UH + part // UW % UH
    return row * (width * UW) + w * UW + part % UW


@triton.jit
def begin(x, channel, channels, sample, elements, LAST: tl.constexpr):
    """Where these channels of a sample of a map begin, and the distance of their voxels."""
    voxel_stride, channel_stride = channels, 1
    if not LAST:
        voxel_stride, channel_stride = 1, elements
    return x + sample * channels * elements + channel.to(tl.int64) * channel_stride, voxel_stride


@triton.jit
def begin_moved(
    maps, widths, channel, sample, depth, height, width, group_size, larger, middle, MOVE: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """The same for channels of the moved concatenation of the maps, and how many slices they move."""
    elements = depth * height * width
    first, stride = begin(maps[0], channel, widths[0], sample, elements, LAST)
    start = widths[0]
    for i in tl.static_range(1, len(maps)):
        own_first, own_stride = begin(maps[i], channel - start, widths[i], sample, elements, LAST)
        first = tl.where(channel < start, first, own_first)
        if LAST:
            stride = tl.where(channel < start, stride, own_stride)
        start += widths[i]
    slices = channel * 0
    if MOVE:
        slices = slices_moved(channel, group_size, larger, middle)
        first -= slices.to(tl.int64) * (height * width) * stride
    return first, stride, slices


@triton.jit
def norm_of(scales, offsets, widths, channel, sample, exists, SLOPES: tl.constexpr, WIDE: tl.constexpr):
    """Scale, offset and slope of channels of the concatenation; of maps without a norm such that values stay as they are."""
    scale, offset, slope = tl.full(channel.shape, 1, WIDE), tl.zeros(channel.shape, WIDE), tl.full(channel.shape, 1, WIDE)
    start = 0
    for i in tl.static_range(len(widths)):
        if SLOPES[i] is not None:
            own = exists & (channel >= start) & (channel < start + widths[i])
            at = sample * widths[i] + channel - start
            scale = tl.where(own, tl.load(scales[i] + at, own, other=0), scale)
            offset = tl.where(own, tl.load(offsets[i] + at, own, other=0), offset)
            slope = tl.where(own, SLOPES[i], slope)
        start += widths[i]
    return scale, offset, slope


@triton.jit
def within(x, size):
    """Whether ``0 <= x < size``, in one comparison: with two of them, programs spill registers."""
    return x.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def depth_in_map(d, slices, exists, depth, MOVE: tl.constexpr):
    """``(voxels, channels)``: whether a depth of the moved concatenation is in it, and is not moved in from outside."""
    if MOVE:
        least = tl.maximum(slices, 0)
        count = tl.where(exists, tl.maximum(depth - tl.abs(slices), 0), 0)
        valid = within(d[:, None] - least[None, :], count[None, :])
    else:
        valid = exists[None, :] & within(d, depth)[:, None]
    return valid


@triton.jit
def gather_tile(
    first, stride, slices, norm, d, h, w, inside, exists, depth, height, width,
    MOVE: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``(voxels, channels)`` at these positions, normalised and activated, zero outside of the map."""
    row = (inside & within(h, height) & within(w, width))[:, None]
    valid = row & depth_in_map(d, slices, exists, depth, MOVE)
    voxel = ((d.to(tl.int64) * height + h) * width + w)[:, None]
    values = tl.load(first[None, :] + voxel * stride, valid, other=0)
    if NORM:
        scale, offset, slope = norm
        wide = values.to(WIDE) * scale[None, :] + offset[None, :]
        wide = tl.where(wide > 0, wide, wide * slope[None, :])
        values = tl.where(valid, wide, 0).to(values.dtype)
    return values


@triton.jit(do_not_specialize=["group_size", "larger"])
def convolve_blocks(
    maps, scales, offsets, widths, weight, inputs, out, n_inputs, n_outputs, depth, height, width,
    out_depth, out_height, out_width, out_voxels, group_size, larger, middle, block_size,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLOPES: tl.constexpr, NORM: tl.constexpr, MOVE: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The output maps of one block at one part of a tile of places."""
    block, part = tl.program_id(1) // (UD * UH * UW), tl.program_id(1) % (UD * UH * UW)
    sample = tl.program_id(2).to(tl.int64)
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = voxel < out_depth * out_height * out_width
    d, h, w = position(voxel, out_height, out_width)
    n = tl.arange(0, BLOCK_N)
    in_block = n < block_size
    output = block * block_size + n
    total = tl.zeros([BLOCK_V, BLOCK_N], WIDE)
    for start in range(0, n_inputs, BLOCK_K):
        channel, exists = gathered(block, start, inputs, n_inputs, BLOCK_K)
        first, stride, slices = begin_moved(
            maps, widths, channel, sample, depth, height, width, group_size, larger, middle, MOVE, LAST
        )
        norm = norm_of(scales, offsets, widths, channel, sample, exists, SLOPES, WIDE)
        place = start + tl.arange(0, BLOCK_K)
        rows = output[None, :].to(tl.int64) * n_inputs + place[:, None]
        rows = weight + (rows * (UD * UH * UW) + part) * (KD * KH * KW)
        for tap in range(KD * KH * KW):  # not unrolled, which would spill registers
            at_d = d * SD + tap // (KH * KW) - KD // 2
            at_h = h * SH + tap // KW % KH - KH // 2
            at_w = w * SW + tap % KW - KW // 2
            values = gather_tile(
                first, stride, slices, norm, at_d, at_h, at_w, inside, exists, depth, height, width, MOVE, NORM, WIDE
            )
            weights = tl.load(rows + tap, exists[:, None] & in_block[None, :], other=0)
            total = tl.dot(values, weights, total, input_precision="ieee", out_dtype=WIDE)
    to = voxel_of_part(d, h, w, part, out_height, out_width, UD, UH, UW)
    out, stride = begin(out, output, n_outputs, sample, out_voxels, LAST)
    tl.store(out[None, :] + to[:, None] * stride, total.to(out.dtype.element_ty), inside[:, None] & in_block[None, :])


@triton.jit(do_not_specialize=["group_size", "larger"])
def gradient_of_inputs(
    grad, weight, inputs, sums, widths, n_inputs, n_outputs, depth, height, width,
    out_depth, out_height, out_width, out_voxels, group_size, larger, middle, block_size, n_blocks,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, MOVE: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What all blocks add to a tile of voxels of the concatenation, block after block, in ``sums`` of each map, zero before.

    ``depth`` and so on are of the maps, ``out_depth`` and so on of the places of the result, whose gradient ``grad`` is. The
    gradients are those of activations.
    """
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = voxel < depth * height * width
    d, h, w = position(voxel, height, width)
    n = tl.arange(0, BLOCK_N)
    in_block = n < block_size
    for block in range(n_blocks):
        output = block * block_size + n
        of_grad, grad_stride = begin(grad, output, n_outputs, sample, out_voxels, LAST)
        for start in range(0, n_inputs, BLOCK_K):
            channel, exists = gathered(block, start, inputs, n_inputs, BLOCK_K)
            place = start + tl.arange(0, BLOCK_K)
            rows = output[:, None].to(tl.int64) * n_inputs + place[None, :]
            rows = weight + rows * (UD * UH * UW * KD * KH * KW)
            total = tl.zeros([BLOCK_V, BLOCK_K], WIDE)
            for each in range(UD * UH * UW * KD * KH * KW):  # not unrolled, which would spill registers
                part, tap = each // (KD * KH * KW), each % (KD * KH * KW)
                at_d = d + KD // 2 - tap // (KH * KW)
                at_h = h + KH // 2 - tap // KW % KH
                at_w = w + KW // 2 - tap % KW
                meets = inside & (at_d >= 0) & (at_h >= 0) & (at_w >= 0)
                meets = meets & (at_d % SD == 0) & (at_h % SH == 0) & (at_w % SW == 0)
                at_d = at_d // SD * UD + part // (UH * UW)
                at_h = at_h // SH * UH + part // UW % UH
                at_w = at_w // SW * UW + part % UW
                values = gather_tile(
                    of_grad, grad_stride, 0, 0, at_d, at_h, at_w, meets, in_block,
                    out_depth * UD, out_height * UH, out_width * UW, False, False, WIDE,
                )  # fmt: skip
                weights = tl.load(rows + each, in_block[:, None] & exists[None, :], other=0)
                total = tl.dot(values, weights, total, input_precision="ieee", out_dtype=WIDE)
            first, stride, slices = begin_moved(
                sums, widths, channel, sample, depth, height, width, group_size, larger, middle, MOVE, LAST
            )
            valid = inside[:, None] & depth_in_map(d, slices, exists, depth, MOVE)
            target = first[None, :] + voxel.to(tl.int64)[:, None] * stride
            tl.store(target, tl.load(target, valid, other=0) + total, valid)
        tl.debug_barrier()  # the next block may add to the same maps


@triton.jit(do_not_specialize=["group_size", "larger"])
def gradient_of_weights(
    grad, maps, scales, offsets, widths, inputs, parts, n_inputs, n_outputs, depth, height, width,
    out_depth, out_height, out_width, out_voxels, group_size, larger, middle, block_size, batch, chunk,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLOPES: tl.constexpr, NORM: tl.constexpr, MOVE: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of one block's weights at one tap of a part, summed over a chunk of the places of each sample."""
    taps: tl.constexpr = UD * UH * UW * KD * KH * KW
    share, block, each = tl.program_id(0), tl.program_id(1) // taps, tl.program_id(1) % taps
    part, tap = each // (KD * KH * KW), each % (KD * KH * KW)
    start = tl.program_id(2) * BLOCK_K
    channel, exists = gathered(block, start, inputs, n_inputs, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    in_block = n < block_size
    output = block * block_size + n
    total = tl.zeros([BLOCK_N, BLOCK_K], WIDE)
    zero = tl.program_id(0).to(tl.int64) * 0
    stop = tl.minimum((share + 1) * chunk, out_depth * out_height * out_width)
    for number in range(batch):
        sample = zero + number
        first, stride, slices = begin_moved(
            maps, widths, channel, sample, depth, height, width, group_size, larger, middle, MOVE, LAST
        )
        norm = norm_of(scales, offsets, widths, channel, sample, exists, SLOPES, WIDE)
        of_grad, grad_stride = begin(grad, output, n_outputs, sample, out_voxels, LAST)
        for tile in range(share * chunk, stop, BLOCK_V):
            voxel = tile + tl.arange(0, BLOCK_V)
            inside = voxel < stop
            d, h, w = position(voxel, out_height, out_width)
            at_d = d * SD + tap // (KH * KW) - KD // 2
            at_h = h * SH + tap // KW % KH - KH // 2
            at_w = w * SW + tap % KW - KW // 2
            values = gather_tile(
                first, stride, slices, norm, at_d, at_h, at_w, inside, exists, depth, height, width, MOVE, NORM, WIDE
            )
            at = voxel_of_part(d, h, w, part, out_height, out_width, UD, UH, UW)
            gradients = tl.load(of_grad[:, None] + at[None, :] * grad_stride, inside[None, :] & in_block[:, None], other=0)
            total = tl.dot(gradients, values, total, input_precision="ieee", out_dtype=WIDE)
    place = start + tl.arange(0, BLOCK_K)
    row = (share.to(tl.int64) * n_outputs + output)[:, None] * n_inputs + place[None, :]
    tl.store(parts + row * taps + each, total, in_block[:, None] & exists[None, :])
