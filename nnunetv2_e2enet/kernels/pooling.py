"""Norm, activation and max-pooling in one pass, and its adjoint, a look-up; an index is one byte."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from nnunetv2_e2enet.kernels.operators import Tiles, regroup, triton_dtype, wide_dtype
from nnunetv2_e2enet.kernels.programs import channels_of_tile, first_voxels, voxels_of_tile
from nnunetv2_e2enet.network.memory_format import is_channels_last, memory_format

WARPS, WARPS_LAST = 4, 8  # of a program; where channels come last, with fewer, a thread has not enough registers


@triton.jit
def pool_tiles(
    whole, pooled, index, scale, offset, channels, depth, height, width, pooled_depth, pooled_height, pooled_width,
    voxel_stride, whole_channel_stride, pooled_channel_stride,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SLOPE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The maximum of side-by-side voxels of a map that is normalised and activated on the way, and which voxel it is from."""
    channel, exists, row = channels_of_tile(channels, BLOCK_C)
    elements = pooled_depth * pooled_height * pooled_width
    voxel = voxels_of_tile(tl.program_id(0) * BLOCK_V, BLOCK_V)
    inside = (voxel < elements) & exists
    d = voxel // (pooled_width * pooled_height) * KERNEL_D
    h = voxel // pooled_width % pooled_height * KERNEL_H
    w = voxel % pooled_width * KERNEL_W
    whole = first_voxels(whole, channel, channels, depth * height * width, whole_channel_stride)
    if NORM:
        row_scale, row_offset = tl.load(scale + row, exists, other=0), tl.load(offset + row, exists, other=0)
    largest = tl.full([BLOCK_V, BLOCK_C], float("-inf"), WIDE)
    place = tl.zeros([BLOCK_V, BLOCK_C], tl.int32)
    for step in tl.static_range(KERNEL_D * KERNEL_H * KERNEL_W):
        at = (d + step // (KERNEL_H * KERNEL_W)) * height + h + step // KERNEL_W % KERNEL_H
        at = at.to(tl.int64) * width + w + step % KERNEL_W
        value = tl.load(whole + at * voxel_stride, inside, other=0).to(WIDE)
        if NORM:
            value = value * row_scale + row_offset
            value = tl.where(value > 0, value, value * SLOPE).to(pooled.dtype.element_ty).to(WIDE)
        larger = (value > largest) | (value != value)
        largest, place = tl.where(larger, value, largest), tl.where(larger, step, place)
    to = voxel.to(tl.int64) * voxel_stride
    pooled = first_voxels(pooled, channel, channels, elements, pooled_channel_stride) + to
    index = first_voxels(index, channel, channels, elements, pooled_channel_stride) + to
    tl.store(pooled, largest.to(pooled.dtype.element_ty), inside)
    tl.store(index, place.to(tl.uint8), inside)


@triton.jit
def unpool_tiles(
    whole, pooled, index, channels, depth, height, width, pooled_depth, pooled_height, pooled_width, voxel_stride,
    whole_channel_stride, pooled_channel_stride,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each voxel of the whole map gets the gradient of its pooled voxel if that is from it, and zero otherwise."""
    channel, exists, _row = channels_of_tile(channels, BLOCK_C)
    elements = depth * height * width
    voxel = voxels_of_tile(tl.program_id(0) * BLOCK_V, BLOCK_V)
    d, h, w = voxel // (width * height), voxel // width % height, voxel % width
    place = (d % KERNEL_D * KERNEL_H + h % KERNEL_H) * KERNEL_W + w % KERNEL_W
    d, h, w = d // KERNEL_D, h // KERNEL_H, w // KERNEL_W
    inside = (voxel < elements) & exists
    covered = inside & (d < pooled_depth) & (h < pooled_height) & (w < pooled_width)
    at = ((d * pooled_height + h).to(tl.int64) * pooled_width + w) * voxel_stride
    pooled_elements = pooled_depth * pooled_height * pooled_width
    index = first_voxels(index, channel, channels, pooled_elements, pooled_channel_stride) + at
    pooled = first_voxels(pooled, channel, channels, pooled_elements, pooled_channel_stride) + at
    from_here = tl.load(index, covered, other=255).to(tl.int32) == place
    gradient = tl.load(pooled, covered & from_here, other=0)
    to = first_voxels(whole, channel, channels, elements, whole_channel_stride) + voxel.to(tl.int64) * voxel_stride
    tl.store(to, gradient, inside)


def pool(tensors: Sequence[Tensor], slope: float | None, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Norm, activation and max-pooling: the map is read once, its activation is not written.

    Args:
        tensors: values, scale and offset of a map; values alone where it has no norm.
        slope: of its leaky ReLU, None where it has no norm and activation.
        stride: of the pooling, and its kernel; at most 255 voxels.

    Returns:
        The pooled map, and for each of its voxels, as uint8, which voxel of the kernel it is from.
    """
    out, index = _pool(list(tensors), nan if slope is None else slope, list(stride))
    return out, index


def pool_gradient(grad: Tensor, index: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The adjoint of ``pool``: each voxel of the map, of this size, looks up whether it was the largest."""
    result: Tensor = _pool_gradient(grad, index, list(size), list(stride))
    return result


@custom_op("e2enet::pool", mutates_args=(), schema="(Tensor[] tensors, float slope, int[] stride) -> (Tensor, Tensor)")
def _pool(tensors: Sequence[Tensor], slope: float, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    ((values, norm),) = regroup(tensors, [slope])
    values = values.contiguous(memory_format=memory_format(values))
    out, index = _empty_pooled(values, stride)
    scale, offset, slope = norm or (values, values, 1.0)  # without a norm nothing is read there
    tiles = Tiles(out, is_channels_last(values))
    constants = {"SLOPE": slope, "NORM": norm is not None, "WIDE": triton_dtype(wide_dtype(values.dtype))}
    with torch.cuda.device_of(values):
        pool_tiles[tiles.grid()](
            *(values, out, index, scale, offset, *_sizes(values, out, stride)),
            **constants,
            **tiles.blocks,
            num_warps=_warps(values),
        )
    return out, index


@_pool.register_fake
def _(tensors: Sequence[Tensor], _slope: float, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _empty_pooled(tensors[0], stride)


@custom_op("e2enet::pool_gradient", mutates_args=(), schema="(Tensor grad, Tensor index, int[] size, int[] stride) -> Tensor")
def _pool_gradient(grad: Tensor, index: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    out = _empty_whole(grad, index, size)
    grad, index = (t.contiguous(memory_format=memory_format(out)) for t in (grad, index))
    tiles = Tiles(out, is_channels_last(out))
    with torch.cuda.device_of(out):
        unpool_tiles[tiles.grid()](out, grad, index, *_sizes(out, grad, stride), **tiles.blocks, num_warps=_warps(out))
    return out


@_pool_gradient.register_fake
def _(grad: Tensor, index: Tensor, size: Sequence[int], *_: object) -> Tensor:
    return _empty_whole(grad, index, size)


def _empty_pooled(values: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = [*values.shape[:2], *(size // s for size, s in zip(values.shape[2:], stride, strict=True))]
    form = memory_format(values)
    return tuple(  # type: ignore[return-value]
        torch.empty(shape, dtype=dtype, device=values.device, memory_format=form) for dtype in (values.dtype, torch.uint8)
    )


def _empty_whole(grad: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    shape = [*grad.shape[:2], *size]
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(index))


def _warps(x: Tensor) -> int:
    return WARPS_LAST if is_channels_last(x) else WARPS


def _sizes(whole: Tensor, pooled: Tensor, stride: Sequence[int]) -> list[Any]:
    """Channels, spatial sizes, strides and kernel as the programs take them; a map in 2D is one slice."""
    last = is_channels_last(whole)
    channels = whole.shape[1]
    in_3d = [[1] * (5 - t.dim()) + list(t.shape[2:]) for t in (whole, pooled)]
    strides = [channels, 1, 1] if last else [1, whole.shape[2:].numel(), pooled.shape[2:].numel()]
    return [channels, *in_3d[0], *in_3d[1], *strides, *[1] * (3 - len(stride)), *stride]
