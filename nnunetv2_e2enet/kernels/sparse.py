"""Convolutions that compute active connections alone, as PyTorch operators: forward pass, gradients of maps and of weights.

For blocks of output maps with equally many input maps each, as ``network.compact.store_active_only`` stores their weights. The
input maps are those of a concatenation, which is never made: the programs read maps before their norm, activation and shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, prod
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from nnunetv2_e2enet.kernels import sparse_programs as programs
from nnunetv2_e2enet.kernels.operators import divide_up, next_power_of_2, regroup, triton_dtype, wide_dtype
from nnunetv2_e2enet.network.memory_format import empty_like, is_channels_last, memory_format
from nnunetv2_e2enet.network.sparse_convolution import result_shape

VOXELS = 64  # of a tile; half of it where numbers are too wide for the registers
WARPS = 8  # of a program: with fewer, a thread has not enough registers for its addresses
CHUNK = 16 * 1024  # voxels of each sample over which one program sums weight gradients


def convolve(
    tensors: Sequence[Tensor],
    slopes: Sequence[float | None],
    shift_size: int,
    weight: Tensor,
    inputs: Tensor,
    stride: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """The convolution, without bias.

    Args:
        tensors: those of each input map, as ``operators.join`` takes them; values of one dtype.
        slopes: of each map's leaky ReLU, None where it has no norm and activation.
        shift_size: groups of the depth shift.
        weight: ``(outputs, inputs of a block, *kernel)``, the kernel of odd sizes, padded by half of it; or, of a transposed
            convolution, of the sizes of the stride, not padded.
        inputs: ``(blocks, inputs of a block)``, the input maps of each block of consecutive output maps.
        stride: of the convolution.
        transposed: whether it is a transposed convolution, whose kernel is its stride.
    """
    out: Tensor = _convolve(list(tensors), _numbers(slopes), shift_size, weight, inputs, list(stride), transposed)
    return out


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    inputs: Tensor,
    maps: Sequence[Tensor],
    shift_size: int,
    stride: Sequence[int],
    transposed: bool = False,
) -> list[Tensor]:
    """The gradients of the maps' activations from that of the result of ``convolve``.

    Of ``maps`` the shapes, the dtypes and the memory format of the first are looked at. The other arguments are as
    ``convolve`` takes them.
    """
    found: list[Tensor] = _input_gradient(grad, weight, inputs, list(maps), shift_size, list(stride), transposed)
    return found


def weight_gradient(
    grad: Tensor,
    tensors: Sequence[Tensor],
    slopes: Sequence[float | None],
    shift_size: int,
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """The gradient of the weights, at least float32, from that of the result of ``convolve``."""
    out: Tensor = _weight_gradient(
        grad, list(tensors), _numbers(slopes), shift_size, inputs, list(kernel), list(stride), transposed
    )
    return out


@custom_op(
    "e2enet::sparse_convolution",
    mutates_args=(),
    schema="(Tensor[] tensors, float[] slopes, int shift_size, Tensor weight, Tensor inputs, int[] stride, bool transposed)"
    " -> Tensor",
)
def _convolve(
    tensors: Sequence[Tensor],
    slopes: Sequence[float],
    shift_size: int,
    weight: Tensor,
    inputs: Tensor,
    stride: Sequence[int],
    transposed: bool,
) -> Tensor:
    weight, maps = weight.contiguous(), _Maps(tensors, slopes)
    out = _result(maps.values[0], weight.shape[0], stride, transposed)
    shapes = _Shapes(maps.values, out, inputs, weight.shape[2:], shift_size, stride, transposed)
    grid = (divide_up(shapes.places, shapes.constants["BLOCK_V"]), inputs.shape[0] * shapes.parts, out.shape[0])
    with torch.cuda.device_of(out):
        programs.convolve_blocks[grid](
            *maps.given, shapes.widths, weight, inputs.contiguous(), out, *shapes.sizes, **shapes.constants, **maps.constants
        )
    return out


@_convolve.register_fake
def _(
    tensors: Sequence[Tensor],
    _slopes: Sequence[float],
    _shift_size: int,
    weight: Tensor,
    _inputs: Tensor,
    stride: Sequence[int],
    transposed: bool,
) -> Tensor:
    return _result(tensors[0], weight.shape[0], stride, transposed)


@custom_op(
    "e2enet::sparse_input_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor inputs, Tensor[] maps, int shift_size, int[] stride, bool transposed)"
    " -> Tensor[]",
)
def _input_gradient(
    grad: Tensor,
    weight: Tensor,
    inputs: Tensor,
    maps: Sequence[Tensor],
    shift_size: int,
    stride: Sequence[int],
    transposed: bool,
) -> list[Tensor]:
    form = memory_format(maps[0])
    grad, weight = grad.contiguous(memory_format=form), weight.contiguous()
    sums = [empty_like(maps[0], x.shape[1], wide_dtype(x.dtype)).zero_() for x in maps]
    shapes = _Shapes(sums, grad, inputs, weight.shape[2:], shift_size, stride, transposed)
    grid = (divide_up(prod(maps[0].shape[2:]), shapes.constants["BLOCK_V"]), grad.shape[0])
    with torch.cuda.device_of(grad):
        programs.gradient_of_inputs[grid](
            grad, weight, inputs.contiguous(), tuple(sums), shapes.widths, *shapes.sizes, inputs.shape[0], **shapes.constants
        )
    gradients = []
    for x in maps:  # each of the wide sums is freed as soon as it is narrowed
        gradients.append(sums.pop(0).to(x.dtype, copy=False))
    return gradients


@_input_gradient.register_fake
def _(_grad: Tensor, _weight: Tensor, _inputs: Tensor, maps: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [empty_like(maps[0], x.shape[1], x.dtype) for x in maps]


@custom_op(
    "e2enet::sparse_weight_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] tensors, float[] slopes, int shift_size, Tensor inputs, int[] kernel, int[] stride,"
    " bool transposed) -> Tensor",
)
def _weight_gradient(
    grad: Tensor,
    tensors: Sequence[Tensor],
    slopes: Sequence[float],
    shift_size: int,
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    transposed: bool,
) -> Tensor:
    maps = _Maps(tensors, slopes)
    grad = grad.contiguous(memory_format=memory_format(maps.values[0]))
    shapes = _Shapes(maps.values, grad, inputs, kernel, shift_size, stride, transposed)
    parts = divide_up(shapes.places, CHUNK)
    sums = grad.new_empty((parts, grad.shape[1], inputs.shape[1], *kernel), dtype=wide_dtype(grad.dtype))
    grid = (parts, inputs.shape[0] * prod(kernel), divide_up(inputs.shape[1], shapes.constants["BLOCK_K"]))
    with torch.cuda.device_of(grad):
        programs.gradient_of_weights[grid](
            grad, *maps.given, shapes.widths, inputs.contiguous(), sums, *shapes.sizes, grad.shape[0], CHUNK,
            **shapes.constants, **maps.constants,
        )  # fmt: skip
    return sums.sum(0)


@_weight_gradient.register_fake
def _(
    grad: Tensor,
    _tensors: Sequence[Tensor],
    _slopes: Sequence[float],
    _shift_size: int,
    inputs: Tensor,
    kernel: Sequence[int],
    *_: object,
) -> Tensor:
    return grad.new_empty((grad.shape[1], inputs.shape[1], *kernel), dtype=wide_dtype(grad.dtype))


def tile_voxels(dtype: torch.dtype) -> int:
    """Of a tile of maps of this dtype."""
    return VOXELS // 2 if dtype.itemsize > 2 else VOXELS


def _numbers(slopes: Sequence[float | None]) -> list[float]:
    return [nan if slope is None else slope for slope in slopes]


def _result(x: Tensor, outputs: int, stride: Sequence[int], transposed: bool) -> Tensor:
    shape = result_shape(x, outputs, stride, transposed)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


class _Maps:
    """Input maps as the programs take them.

    Attributes:
        values: in the memory format of the first.
        given: values, scales and offsets; those of a map without a norm are not read.
        constants: the slopes.
    """

    def __init__(self, tensors: Sequence[Tensor], slopes: Sequence[float]) -> None:
        maps = regroup(tensors, slopes)
        form = memory_format(maps[0].values)
        self.values = [m.values.contiguous(memory_format=form) for m in maps]
        norms = [m.norm or (value, value, None) for m, value in zip(maps, self.values, strict=True)]
        scales, offsets, known = (tuple(each) for each in zip(*norms, strict=True))
        self.given = tuple(self.values), scales, offsets
        self.constants: dict[str, Any] = {"SLOPES": known, "NORM": any(slope is not None for slope in known)}


class _Shapes:
    """Sizes and constants as the programs take them; a map in 2D is one slice.

    Args:
        maps, out: the convolution's input maps and result, or tensors of their shapes and memory format.
        inputs, kernel, shift_size, stride, transposed: as ``convolve`` takes them.

    Attributes:
        widths: channels of each map.
        places: of a channel of the result.
        parts: voxels that a place becomes.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        out: Tensor,
        inputs: Tensor,
        kernel: Sequence[int],
        shift_size: int,
        stride: Sequence[int],
        transposed: bool,
    ) -> None:
        x, outputs = maps[0], out.shape[1]
        self.widths = tuple(m.shape[1] for m in maps)
        group_size, larger = divmod(sum(self.widths), shift_size)
        block_size = outputs // inputs.shape[0]
        size, out_size, kernel, stride = ([1] * (5 - x.dim()) + list(s) for s in (x.shape[2:], out.shape[2:], kernel, stride))
        one = [1, 1, 1]
        step, kernel, up = (one, one, stride) if transposed else (stride, kernel, one)
        grid = [o // u for o, u in zip(out_size, up, strict=True)]
        self.places, self.parts = prod(grid), prod(up)
        self.sizes = [inputs.shape[1], outputs, *size, *grid, prod(out_size), group_size, larger, shift_size // 2, block_size]
        names = ("SD", "SH", "SW", "KD", "KH", "KW", "UD", "UH", "UW")
        self.constants: dict[str, Any] = {
            **dict(zip(names, (*step, *kernel, *up), strict=True)),
            "BLOCK_V": tile_voxels(out.dtype),
            "BLOCK_N": max(16, next_power_of_2(block_size)),
            "BLOCK_K": 32 if inputs.shape[1] > 16 else 16,
            "MOVE": sum(self.widths) >= shift_size > 1,
            "LAST": is_channels_last(x),
            "WIDE": triton_dtype(wide_dtype(x.dtype)),
            "num_warps": WARPS,
        }
