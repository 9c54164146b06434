"""The Triton programs as PyTorch operators: shapes, dtypes, memory formats, launches.

Results lie in memory as the maps that they are made from, as the first of them where these differ; others are converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import isnan, nan, prod
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from triton.runtime.interpreter import InterpretedFunction

from nnunetv2_e2enet.kernels import programs
from nnunetv2_e2enet.network.memory_format import empty_like, is_channels_last, memory_format

DEVICES = ("cuda", "cpu") if isinstance(programs.move_tiles, InterpretedFunction) else ("cuda",)
"""Where the programs run: Triton's interpreter (TRITON_INTERPRET=1) computes with tensors on the CPU too."""
TILE = 1024  # voxels of a channel that a program handles at once
TILE_LAST = 64, 64  # voxels and channels where the latter come last; what is read of each channel serves all of these voxels
CHUNK = 32 * 1024  # values over which one program sums


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` over space, ``(batch, channels)``, at least float32; x is read once."""
    mean, rstd = _statistics(x, eps)
    return mean, rstd


def norm_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of norm and leaky ReLU: the gradient of x, and a channel's sums for those of the norm's weight and bias."""
    grad_x, products, sums = _norm_gradient(grad, x, mean, rstd, scale, offset, slope)
    return grad_x, products, sums


def join(tensors: Sequence[Tensor], slopes: Sequence[float | None], shift_size: int) -> Tensor:
    """Norm, activation, shift and concatenation: each map is read once, each voxel of the result written once.

    Args:
        tensors: those of each map: three where it has a norm, values, scale and offset; otherwise one, values.
        slopes: of each map's leaky ReLU, None where it has no norm and activation.
        shift_size: groups of the depth shift.
    """
    out: Tensor = _join(list(tensors), [nan if slope is None else slope for slope in slopes], shift_size)
    return out


def separate(grad: Tensor, widths: Sequence[int], shift_size: int) -> list[Tensor]:
    """The adjoint of shift and concatenation: one gradient a map, of so many channels each."""
    parts: list[Tensor] = _separate(grad, list(widths), shift_size)
    return parts


@custom_op("e2enet::statistics", mutates_args=(), schema="(Tensor x, float eps) -> (Tensor, Tensor)")
def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=memory_format(x))
    tiles, wide = Tiles(x, is_channels_last(x)), wide_dtype(x.dtype)
    sums, squares = (x.new_empty((*x.shape[:2], tiles.chunks), dtype=wide) for _ in range(2))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        programs.sums_around_first[tiles.grid(tiles.chunks)](
            x, sums, squares, *tiles.sizes, *tiles.strides, tiles.chunk, **tiles.blocks, WIDE=triton_dtype(wide)
        )
        mean, rstd = (x.new_empty(x.shape[:2], dtype=wide) for _ in range(2))
        rows, channel_stride = mean.numel(), tiles.strides[1]
        programs.finish_statistics[rows,](
            x, sums, squares, mean, rstd, *tiles.sizes, channel_stride, tiles.chunks, eps, BLOCK=_block_of(tiles.chunks)
        )
    return mean, rstd


@_statistics.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape, wide = x.shape[:2], wide_dtype(x.dtype)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


@custom_op(
    "e2enet::norm_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor offset, float slope)"
    " -> (Tensor, Tensor, Tensor)",
)
def _norm_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = (t.contiguous(memory_format=memory_format(x)) for t in (grad, x))
    out, tiles = empty_like(x, x.shape[1]), Tiles(x, is_channels_last(x))
    sums, products = (x.new_empty((*x.shape[:2], tiles.chunks), dtype=mean.dtype) for _ in range(2))
    given = (grad, x, *(t.contiguous() for t in (mean, rstd, scale, offset)))
    constants = {"SLOPE": slope, **tiles.blocks, "WIDE": triton_dtype(mean.dtype)}
    with torch.cuda.device_of(x):
        programs.gradient_sums[tiles.grid(tiles.chunks)](
            *given, sums, products, *tiles.sizes, *tiles.strides, tiles.chunk, **constants
        )
        parts = sums, products
        sums, products = (x.new_empty(x.shape[:2], dtype=mean.dtype) for _ in range(2))
        programs.finish_sums[sums.numel(),](*parts, sums, products, tiles.chunks, BLOCK=_block_of(tiles.chunks))
        programs.gradient_of_norm[tiles.grid()](*given, sums, products, out, *tiles.sizes, *tiles.strides, **constants)
    return out, products, sums


@_norm_gradient.register_fake
def _(_grad: Tensor, x: Tensor, mean: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(x, x.shape[1]), torch.empty_like(mean), torch.empty_like(mean)


@custom_op("e2enet::join", mutates_args=(), schema="(Tensor[] tensors, float[] slopes, int shift_size) -> Tensor")
def _join(tensors: Sequence[Tensor], slopes: Sequence[float], shift_size: int) -> Tensor:
    maps = regroup(tensors, slopes)
    out = _joined(tensors, slopes)
    form = memory_format(maps[0].values)
    first = 0
    for values, norm in maps:
        _launch(values.contiguous(memory_format=form), out, first, shift_size, norm)
        first += values.shape[1]
    return out


@_join.register_fake
def _(tensors: Sequence[Tensor], slopes: Sequence[float], *_: object) -> Tensor:
    return _joined(tensors, slopes)


@custom_op("e2enet::separate", mutates_args=(), schema="(Tensor grad, int[] widths, int shift_size) -> Tensor[]")
def _separate(grad: Tensor, widths: Sequence[int], shift_size: int) -> list[Tensor]:
    grad = grad.contiguous(memory_format=memory_format(grad))
    parts = _parts(grad, widths)
    first = 0
    for part in parts:
        _launch(part, grad, first, shift_size, back=True)
        first += part.shape[1]
    return parts


@_separate.register_fake
def _(grad: Tensor, widths: Sequence[int], *_: object) -> list[Tensor]:
    return _parts(grad, widths)


def _launch(
    single: Tensor,
    joined: Tensor,
    first: int,
    shift_size: int,
    norm: tuple[Tensor, Tensor, float] | None = None,
    back: bool = False,
) -> None:
    channels, joined_channels, depth = single.shape[1], joined.shape[1], single.shape[2]
    group_size, larger = divmod(joined_channels, shift_size)
    last = is_channels_last(joined)  # a map of a single channel lies as any
    tiles = Tiles(single, last)
    voxel_stride, channel_stride = tiles.strides
    joined_voxel_stride = joined_channels if last else voxel_stride
    scale, offset, slope = norm or (single, single, 1.0)  # without a norm nothing is read there
    with torch.cuda.device_of(single):
        programs.move_tiles[tiles.grid()](
            *(single, joined, scale, offset, channels, first, joined_channels, tiles.elements // depth, tiles.elements),
            *(voxel_stride, joined_voxel_stride, channel_stride, group_size, larger, shift_size // 2),
            SLOPE=slope,
            BACK=back,
            NORM=norm is not None,
            MOVE=joined_channels >= shift_size > 1,
            **tiles.blocks,
            WIDE=triton_dtype(wide_dtype(single.dtype)),
        )


def divide_up(a: int, b: int) -> int:
    """The quotient, rounded up: ``triton.cdiv`` takes microseconds of the host's time."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``, from 1 on."""
    return 1 << (n - 1).bit_length()


class Tiles:
    """How programs share a map; see ``programs``.

    Attributes:
        elements: voxels of a channel.
        chunk, chunks: voxels over which one program sums, and how many such.
        sizes, strides, blocks: as the programs take them.
    """

    def __init__(self, x: Tensor, channels_last: bool) -> None:
        self.batch, self.channels, self.elements = x.shape[0], x.shape[1], prod(x.shape[2:])
        voxels, channels = TILE_LAST if channels_last else (TILE, 1)
        block_c = min(channels, next_power_of_2(self.channels))
        block_v = voxels * channels // block_c
        self.blocks = {"BLOCK_V": block_v, "BLOCK_C": block_c}
        self.sizes = (self.channels, self.elements)
        self.strides = (self.channels, 1) if channels_last else (1, self.elements)
        self.chunk = CHUNK // block_c
        self.chunks = divide_up(self.elements, self.chunk)

    def grid(self, parts: int | None = None) -> tuple[int, int, int]:
        """Programs for so many parts of the voxels; for each tile unless given."""
        parts = divide_up(self.elements, self.blocks["BLOCK_V"]) if parts is None else parts
        return parts, divide_up(self.channels, self.blocks["BLOCK_C"]), self.batch


class _Map(NamedTuple):
    values: Tensor
    norm: tuple[Tensor, Tensor, float] | None
    """Scale, offset and slope."""


def regroup(tensors: Sequence[Tensor], slopes: Sequence[float]) -> list[_Map]:
    """The maps of a flat list of tensors; a slope of NaN says that a map has no norm."""
    rest = iter(tensors)
    return [
        _Map(next(rest), None if isnan(slope) else (next(rest).contiguous(), next(rest).contiguous(), slope))
        for slope in slopes
    ]


def _joined(tensors: Sequence[Tensor], slopes: Sequence[float]) -> Tensor:
    values = [m.values for m in regroup(tensors, slopes)]
    dtype = reduce(torch.promote_types, (v.dtype for v in values))
    return empty_like(values[0], sum(v.shape[1] for v in values), dtype)


def _parts(grad: Tensor, widths: Sequence[int]) -> list[Tensor]:
    return [empty_like(grad, width) for width in widths]


def _block_of(parts: int) -> int:
    return min(1024, next_power_of_2(parts))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of this dtype are summed and normalised."""
    return torch.promote_types(dtype, torch.float32)


def triton_dtype(dtype: torch.dtype) -> Any:
    """The dtype in which kernels compute: float64 for float64, otherwise float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
