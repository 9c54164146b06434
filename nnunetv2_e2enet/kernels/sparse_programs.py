"""Triton programs of convolutions that compute active connections alone: implicit matrix products over gathered input maps.

A layer's output maps are blocks, each of which reads its own ``n_inputs`` input maps, whose numbers lie in ``inputs``
``(blocks, n_inputs)``. What a product reads is gathered in its addresses.
No program writes what another one writes, so that results do not depend on an order.

The kernel is ``KD x KH x KW``, half of it padding. In a transposed convolution, whose kernel is its stride, each place becomes
``UD x UH x UW`` voxels, its parts, each with weights of its own; otherwise a place is a voxel. Sizes of results, ``out_depth``
and so on, count places. The weights of a connection lie part after part, tap after tap.

Maps have a stride for voxels and one for channels. Offsets within a map are of 64 bits.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def gathered(block, first, inputs, n_inputs, BLOCK_K: tl.constexpr):
    """Numbers of a block's input maps from ``first`` on, and whether there are so many."""
    place = first + tl.arange(0, BLOCK_K)
    exists = place < n_inputs
    return tl.load(inputs + block * n_inputs + place, exists, other=0), exists


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
def gather_tile(x, d, h, w, inside, channel, exists, depth, height, width, voxel_stride, channel_stride):
    """``(voxels, channels)`` of a sample at these positions, zero outside of the map."""
    row = (inside & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
    # were depth looked at in the row as well, gradient_of_weights would spill registers
    valid = row & exists[None, :] & ((d >= 0) & (d < depth))[:, None]
    voxel = ((d.to(tl.int64) * height + h) * width + w)[:, None]
    return tl.load(x + voxel * voxel_stride + channel.to(tl.int64)[None, :] * channel_stride, valid, other=0)


@triton.jit
def convolve_blocks(
    x, weight, inputs, out, n_inputs, n_channels, n_outputs, depth, height, width, out_depth, out_height, out_width,
    voxel_stride, channel_stride, out_voxel_stride, out_channel_stride, block_size,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The output maps of one block at one part of a tile of places."""
    block, part = tl.program_id(1) // (UD * UH * UW), tl.program_id(1) % (UD * UH * UW)
    sample = tl.program_id(2).to(tl.int64)
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = voxel < out_depth * out_height * out_width
    d, h, w = position(voxel, out_height, out_width)
    x += sample * n_channels * depth * height * width
    n = tl.arange(0, BLOCK_N)
    in_block = n < block_size
    output = block * block_size + n
    total = tl.zeros([BLOCK_V, BLOCK_N], WIDE)
    for first in range(0, n_inputs, BLOCK_K):
        channel, exists = gathered(block, first, inputs, n_inputs, BLOCK_K)
        place = first + tl.arange(0, BLOCK_K)
        rows = output[None, :].to(tl.int64) * n_inputs + place[:, None]
        rows = weight + (rows * (UD * UH * UW) + part) * (KD * KH * KW)
        for tap in range(KD * KH * KW):  # not unrolled, which would spill registers
            at_d = d * SD + tap // (KH * KW) - KD // 2
            at_h = h * SH + tap // KW % KH - KH // 2
            at_w = w * SW + tap % KW - KW // 2
            values = gather_tile(
                x, at_d, at_h, at_w, inside, channel, exists, depth, height, width, voxel_stride, channel_stride
            )
            weights = tl.load(rows + tap, exists[:, None] & in_block[None, :], other=0)
            total = tl.dot(values, weights, total, input_precision="ieee", out_dtype=WIDE)
    out += sample * n_outputs * out_depth * out_height * out_width * (UD * UH * UW)
    to = voxel_of_part(d, h, w, part, out_height, out_width, UD, UH, UW)
    out += to[:, None] * out_voxel_stride + output.to(tl.int64)[None, :] * out_channel_stride
    tl.store(out, total.to(out.dtype.element_ty), inside[:, None] & in_block[None, :])


@triton.jit
def gradient_of_inputs(
    grad, weight, inputs, out, n_inputs, n_channels, n_outputs, depth, height, width, out_depth, out_height, out_width,
    voxel_stride, channel_stride, out_voxel_stride, out_channel_stride, block_size, n_blocks,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What all blocks add to a tile of voxels of their inputs, block after block, in ``out``, which is zero before.

    ``depth`` and so on are of the input, ``out_depth`` and so on of the places of the result, whose gradient ``grad`` is.
    """
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = voxel < depth * height * width
    d, h, w = position(voxel, height, width)
    grad += sample * n_outputs * out_depth * out_height * out_width * (UD * UH * UW)
    out += sample * n_channels * depth * height * width
    n = tl.arange(0, BLOCK_N)
    in_block = n < block_size
    for block in range(n_blocks):
        output = block * block_size + n
        for first in range(0, n_inputs, BLOCK_K):
            channel, exists = gathered(block, first, inputs, n_inputs, BLOCK_K)
            place = first + tl.arange(0, BLOCK_K)
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
                    grad, at_d, at_h, at_w, meets, output, in_block,
                    out_depth * UD, out_height * UH, out_width * UW, out_voxel_stride, out_channel_stride,
                )  # fmt: skip
                weights = tl.load(rows + each, in_block[:, None] & exists[None, :], other=0)
                total = tl.dot(values, weights, total, input_precision="ieee", out_dtype=WIDE)
            valid = inside[:, None] & exists[None, :]
            target = out + voxel.to(tl.int64)[:, None] * voxel_stride + channel.to(tl.int64)[None, :] * channel_stride
            tl.store(target, tl.load(target, valid, other=0) + total, valid)
        tl.debug_barrier()  # the next block may add to the same maps


@triton.jit
def gradient_of_weights(
    grad, x, inputs, parts, n_inputs, n_channels, n_outputs, depth, height, width, out_depth, out_height, out_width,
    voxel_stride, channel_stride, out_voxel_stride, out_channel_stride, block_size, batch, chunk,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of one block's weights at one tap of a part, summed over a chunk of the places of each sample."""
    taps: tl.constexpr = UD * UH * UW * KD * KH * KW
    share, block, each = tl.program_id(0), tl.program_id(1) // taps, tl.program_id(1) % taps
    part, tap = each // (KD * KH * KW), each % (KD * KH * KW)
    first = tl.program_id(2) * BLOCK_K
    elements = out_depth * out_height * out_width
    channel, exists = gathered(block, first, inputs, n_inputs, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    in_block = n < block_size
    output = block * block_size + n
    total = tl.zeros([BLOCK_N, BLOCK_K], WIDE)
    zero = tl.program_id(0).to(tl.int64) * 0
    stop = tl.minimum((share + 1) * chunk, elements)
    for sample in range(batch):
        of_x = x + (zero + sample) * n_channels * depth * height * width
        of_grad = grad + (zero + sample) * n_outputs * elements * (UD * UH * UW)
        for start in range(share * chunk, stop, BLOCK_V):
            voxel = start + tl.arange(0, BLOCK_V)
            inside = voxel < stop
            d, h, w = position(voxel, out_height, out_width)
            at_d = d * SD + tap // (KH * KW) - KD // 2
            at_h = h * SH + tap // KW % KH - KH // 2
            at_w = w * SW + tap % KW - KW // 2
            values = gather_tile(
                of_x, at_d, at_h, at_w, inside, channel, exists, depth, height, width, voxel_stride, channel_stride
            )
            at = voxel_of_part(d, h, w, part, out_height, out_width, UD, UH, UW)
            gradients = tl.load(
                of_grad + at[None, :] * out_voxel_stride + output.to(tl.int64)[:, None] * out_channel_stride,
                inside[None, :] & in_block[:, None],
                other=0,
            )
            total = tl.dot(gradients, values, total, input_precision="ieee", out_dtype=WIDE)
    place = first + tl.arange(0, BLOCK_K)
    row = (share.to(tl.int64) * n_outputs + output)[:, None] * n_inputs + place[None, :]
    tl.store(parts + row * taps + each, total, in_block[:, None] & exists[None, :])
