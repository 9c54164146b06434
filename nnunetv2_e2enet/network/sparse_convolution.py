"""Convolutions by the GPU kernels over the input maps of each block alone, without gathering them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.network.acceleration import convolutions_for
from nnunetv2_e2enet.network.connections import (
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)

LARGEST_BLOCK = 64
"""Output maps of a block that a program has registers and shared memory for."""


def can_compute(layer: MaskedConv2d | MaskedConv3d, x: Tensor) -> bool:
    """Whether the kernels take the convolution of a layer that stores active weights alone."""
    kernel = layer.kernel_size
    half = not isinstance(layer.padding, str) and all(
        p == k // 2 and k % 2 for p, k in zip(layer.padding, kernel, strict=True)
    )
    plain = half and layer.padding_mode == "zeros" and all(d == 1 for d in layer.dilation)
    return plain and layer.block_size <= LARGEST_BLOCK and x.dim() > 2 and convolutions_for(x) is not None


def can_upsample(layer: MaskedConvTranspose2d | MaskedConvTranspose3d, x: Tensor) -> bool:
    """Whether the kernels take the transposed convolution of a layer that stores active weights alone."""
    apart = layer.kernel_size == layer.stride and not any(layer.padding) and not any(layer.output_padding)
    plain = apart and all(d == 1 for d in layer.dilation)
    return plain and layer.block_size <= LARGEST_BLOCK and x.dim() > 2 and convolutions_for(x) is not None


def sparse_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    stride: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """The convolution of a layer that ``can_compute`` or ``can_upsample``.

    Args:
        x: ``(batch, channels, *space)``.
        weight: ``(outputs, inputs of a block, *kernel)``.
        bias: ``(outputs,)`` or None.
        inputs: ``(blocks, inputs of a block)``, the input maps of each block of consecutive output maps.
        stride: of the convolution.
        transposed: whether it is a transposed convolution, whose kernel is its stride.
    """
    if torch.is_autocast_enabled(x.device.type):  # as PyTorch casts what its own convolutions take
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    arguments = weight, inputs, list(stride), transposed
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        place = _Kept.apply(x, *arguments)  # type: ignore[no-untyped-call]
        out: Tensor = _Computed.apply(place, x.detach(), weight.detach(), *arguments[1:])  # type: ignore[no-untyped-call]
    else:
        out = convolutions_for(x).convolve(x, *arguments)
    return out if bias is None else out + bias.to(out.dtype).reshape(-1, *[1] * (out.dim() - 2))


def result_shape(x: Tensor, outputs: int, stride: Sequence[int], transposed: bool) -> list[int]:
    """The shape ``(batch, outputs, *space)`` of the result of ``sparse_convolution``."""
    sizes = zip(x.shape[2:], stride, strict=True)
    return [x.shape[0], outputs, *(size * s if transposed else (size - 1) // s + 1 for size, s in sizes)]


class _Kept(torch.autograd.Function):
    """Keeps what the backward pass needs, before anything is computed, and has the gradients.

    PyTorch notes what a function like this one saves when its forward pass is over. A checkpoint, whose recomputation stops
    when it has all that was saved, would compute the convolution again if ``_Computed`` saved it. What stands for the
    result meanwhile is shaped like it and has no memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inputs: Tensor, stride: list[int], transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight, inputs)
        ctx.options = stride, transposed
        return x.new_empty(()).expand(result_shape(x, weight.shape[0], stride, transposed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inputs = ctx.saved_tensors
        kernels = convolutions_for(x)
        of_x = kernels.input_gradient(grad, weight, inputs, x, *ctx.options) if ctx.needs_input_grad[0] else None
        of_weight = kernels.weight_gradient(grad, x, inputs, list(weight.shape[2:]), *ctx.options)
        return of_x, of_weight.to(weight.dtype), None, None, None


class _Computed(torch.autograd.Function):
    """The result in the place of what ``_Kept`` returned, which gets its gradient."""

    @staticmethod
    def forward(
        _ctx: Any, _place: Tensor, x: Tensor, weight: Tensor, inputs: Tensor, stride: list[int], transposed: bool
    ) -> Tensor:
        out: Tensor = convolutions_for(x).convolve(x, weight, inputs, stride, transposed)
        return out

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None
