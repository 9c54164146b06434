"""Convolutions that compute active connections alone, as PyTorch operators: forward pass, gradients of maps and of weights.

For blocks of output maps with equally many input maps each, as ``network.compact.store_active_only`` stores their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from nnunetv2_e2enet.kernels import sparse_programs as programs
from nnunetv2_e2enet.kernels.operators import triton_dtype, wide_dtype
from nnunetv2_e2enet.network.memory_format import empty_like, is_channels_last, memory_format
from nnunetv2_e2enet.network.sparse_convolution import result_shape

VOXELS = 64  # of a tile
WARPS = 8  # of a program: with fewer, a thread has not enough registers for its addresses
CHUNK = 16 * 1024  # voxels of each sample over which one program sums weight gradients


def convolve(x: Tensor, weight: Tensor, inputs: Tensor, stride: Sequence[int], transposed: bool = False) -> Tensor:
    """The convolution, without bias.

    Args:
        x: ``(batch, channels, *space)``.
        weight: ``(outputs, inputs of a block, *kernel)``, the kernel of odd sizes, padded by half of it; or, of a transposed
            convolution, of the sizes of the stride, not padded.
        inputs: ``(blocks, inputs of a block)``, the input maps of each block of consecutive output maps.
        stride: of the convolution.
        transposed: whether it is a transposed convolution, whose kernel is its stride.
    """
    out: Tensor = _convolve(x, weight, inputs, list(stride), transposed)
    return out


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    inputs: Tensor,
    x: Tensor,
    stride: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """The gradient of ``x``, of which shape and memory format are looked at, from that of the result of ``convolve``."""
    out: Tensor = _input_gradient(grad, weight, inputs, x, list(stride), transposed)
    return out


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """The gradient of the weights, at least float32, from that of the result of ``convolve``."""
    out: Tensor = _weight_gradient(grad, x, inputs, list(kernel), list(stride), transposed)
    return out


@custom_op("e2enet::sparse_convolution", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, inputs: Tensor, stride: list[int], transposed: bool) -> Tensor:
    x, weight = x.contiguous(memory_format=memory_format(x)), weight.contiguous()
    out = _result(x, weight.shape[0], stride, transposed)
    shapes = _Shapes(x, out, inputs, weight.shape[2:], stride, transposed)
    grid = (triton.cdiv(shapes.places, VOXELS), inputs.shape[0] * shapes.parts, x.shape[0])
    with torch.cuda.device_of(x):
        programs.convolve_blocks[grid](x, weight, inputs.contiguous(), out, *shapes.sizes, **shapes.constants)
    return out


@_convolve.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    inputs: Tensor,  # noqa: ARG001
    stride: list[int],
    transposed: bool,
) -> Tensor:
    return _result(x, weight.shape[0], stride, transposed)


@custom_op("e2enet::sparse_input_gradient", mutates_args=())
def _input_gradient(grad: Tensor, weight: Tensor, inputs: Tensor, x: Tensor, stride: list[int], transposed: bool) -> Tensor:
    grad, weight = grad.contiguous(memory_format=memory_format(x)), weight.contiguous()
    sums = empty_like(x, x.shape[1], wide_dtype(x.dtype)).zero_()
    shapes = _Shapes(sums, grad, inputs, weight.shape[2:], stride, transposed)
    grid = (triton.cdiv(prod(x.shape[2:]), VOXELS), x.shape[0])
    with torch.cuda.device_of(x):
        programs.gradient_of_inputs[grid](
            grad, weight, inputs.contiguous(), sums, *shapes.sizes, inputs.shape[0], **shapes.constants
        )
    return sums.to(x.dtype, copy=False)


@_input_gradient.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    inputs: Tensor,  # noqa: ARG001
    x: Tensor,
    stride: list[int],  # noqa: ARG001
    transposed: bool,  # noqa: ARG001
) -> Tensor:
    return empty_like(x, x.shape[1])


@custom_op("e2enet::sparse_weight_gradient", mutates_args=())
def _weight_gradient(
    grad: Tensor, x: Tensor, inputs: Tensor, kernel: list[int], stride: list[int], transposed: bool
) -> Tensor:
    x = x.contiguous(memory_format=memory_format(x))
    grad = grad.contiguous(memory_format=memory_format(x))
    shapes = _Shapes(x, grad, inputs, kernel, stride, transposed)
    parts = triton.cdiv(shapes.places, CHUNK)
    sums = grad.new_empty((parts, grad.shape[1], inputs.shape[1], *kernel), dtype=wide_dtype(x.dtype))
    grid = (parts, inputs.shape[0] * prod(kernel), triton.cdiv(inputs.shape[1], shapes.constants["BLOCK_K"]))
    with torch.cuda.device_of(x):
        programs.gradient_of_weights[grid](
            grad, x, inputs.contiguous(), sums, *shapes.sizes, x.shape[0], CHUNK, **shapes.constants
        )
    return sums.sum(0)


@_weight_gradient.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    inputs: Tensor,
    kernel: list[int],
    stride: list[int],  # noqa: ARG001
    transposed: bool,  # noqa: ARG001
) -> Tensor:
    return grad.new_empty((grad.shape[1], inputs.shape[1], *kernel), dtype=wide_dtype(x.dtype))


def _result(x: Tensor, outputs: int, stride: Sequence[int], transposed: bool) -> Tensor:
    shape = result_shape(x, outputs, stride, transposed)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


class _Shapes:
    """Sizes and constants as the programs take them; a map in 2D is one slice.

    Args:
        x, out: the convolution's input and result, or tensors of their shape and memory format.
        inputs, kernel, stride, transposed: as ``convolve`` takes them.

    Attributes:
        places: of a channel of the result.
        parts: voxels that a place becomes.
    """

    def __init__(
        self,
        x: Tensor,
        out: Tensor,
        inputs: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        transposed: bool,
    ) -> None:
        channels, outputs = x.shape[1], out.shape[1]
        block_size = outputs // inputs.shape[0]
        last = is_channels_last(x)
        size, out_size, kernel, stride = ([1] * (5 - x.dim()) + list(s) for s in (x.shape[2:], out.shape[2:], kernel, stride))
        one = [1, 1, 1]
        step, kernel, up = (one, one, stride) if transposed else (stride, kernel, one)
        grid = [o // u for o, u in zip(out_size, up, strict=True)]
        self.places, self.parts = prod(grid), prod(up)
        strides = [(t.shape[1], 1) if last else (1, prod(t.shape[2:])) for t in (x, out)]
        self.sizes = [inputs.shape[1], channels, outputs, *size, *grid, *strides[0], *strides[1], block_size]
        names = ("SD", "SH", "SW", "KD", "KH", "KW", "UD", "UH", "UW")
        self.constants: dict[str, Any] = {
            **dict(zip(names, (*step, *kernel, *up), strict=True)),
            "BLOCK_V": VOXELS,
            "BLOCK_N": max(16, triton.next_power_of_2(block_size)),
            "BLOCK_K": 32 if inputs.shape[1] > 16 else 16,
            "WIDE": triton_dtype(wide_dtype(x.dtype)),
            "num_warps": WARPS,
        }
