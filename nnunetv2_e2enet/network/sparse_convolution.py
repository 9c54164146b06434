"""Convolutions by the GPU kernels over the input maps of each block alone, without gathering them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.network.acceleration import convolutions_for


def can_compute(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Whether the kernels take the convolution of a layer that stores active weights alone."""
    kernel = layer.kernel_size
    half = not isinstance(layer.padding, str) and all(
        p == k // 2 and k % 2 for p, k in zip(layer.padding, kernel, strict=True)
    )
    plain = half and layer.padding_mode == "zeros" and all(d == 1 for d in layer.dilation)
    return plain and x.dim() > 2 and convolutions_for(x) is not None


def can_upsample(layer: nn.ConvTranspose2d | nn.ConvTranspose3d, x: Tensor) -> bool:
    """Whether the kernels take the transposed convolution of a layer that stores active weights alone."""
    apart = layer.kernel_size == layer.stride and not any(layer.padding) and not any(layer.output_padding)
    return apart and all(d == 1 for d in layer.dilation) and x.dim() > 2 and convolutions_for(x) is not None


def sparse_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    stride: Sequence[int],
    shift_size: int = 1,
    transposed: bool = False,
) -> Tensor:
    """The convolution of a layer that ``can_compute`` or ``can_upsample``, of a map after its depth shift.

    Args:
        x: ``(batch, channels, *space)``.
        weight: ``(outputs, inputs of a block, *kernel)``.
        bias: ``(outputs,)`` or None.
        inputs: ``(blocks, inputs of a block)``, the input maps of each block of consecutive output maps.
        stride: of the convolution.
        shift_size: groups of the depth shift; 1 moves nothing.
        transposed: whether it is a transposed convolution, whose kernel is its stride.
    """
    if torch.is_autocast_enabled(x.device.type):  # as PyTorch casts what its own convolutions take
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    out: Tensor = _SparseConvolution.apply(x, weight, inputs, list(stride), shift_size, transposed)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias.to(out.dtype).reshape(-1, *[1] * (out.dim() - 2))


class _SparseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, inputs: Tensor, stride: list[int], shift_size: int, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, inputs)
        ctx.options = stride, shift_size, transposed
        out: Tensor = convolutions_for(x).convolve(x, weight, inputs, *ctx.options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inputs = ctx.saved_tensors
        kernels = convolutions_for(x)
        of_x = kernels.input_gradient(grad, weight, inputs, x, *ctx.options) if ctx.needs_input_grad[0] else None
        of_weight = kernels.weight_gradient(grad, x, inputs, list(weight.shape[2:]), *ctx.options)
        return of_x, of_weight.to(weight.dtype), None, None, None, None
