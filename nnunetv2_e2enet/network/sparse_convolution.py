"""Convolutions by the GPU kernels over the input maps of each block alone, which are neither joined nor gathered in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.network._raw_map import (
    FeatureMap,
    RawMap,
    Slopes,
    flatten,
    gradients_of_tensors,
    regroup,
    values_of,
)
from nnunetv2_e2enet.network.acceleration import convolutions_for
from nnunetv2_e2enet.network.connections import MaskableLayer

LARGEST_BLOCK = 64
"""Output maps of a block that a program has registers and shared memory for."""


def can_compute(layer: MaskableLayer, x: Tensor) -> bool:
    """Whether the kernels take the convolution, or transposed convolution, of a layer that stores active weights alone."""
    fits = layer.block_size <= LARGEST_BLOCK and x.dim() > 2 and convolutions_for(x) is not None
    return fits and (_is_plain(layer) if isinstance(layer, (nn.Conv2d, nn.Conv3d)) else _is_plain_transposed(layer))


def _is_plain(layer: nn.Conv2d | nn.Conv3d) -> bool:
    sizes, padding = layer.kernel_size, layer.padding
    half = not isinstance(padding, str) and all(p == k // 2 and k % 2 for p, k in zip(padding, sizes, strict=True))
    return half and layer.padding_mode == "zeros" and all(d == 1 for d in layer.dilation)


def _is_plain_transposed(layer: Any) -> bool:
    apart = layer.kernel_size == layer.stride and not any(layer.padding) and not any(layer.output_padding)
    return apart and all(d == 1 for d in layer.dilation)


def sparse_convolution(
    maps: Sequence[FeatureMap],
    shift_size: int,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    stride: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """The convolution of a layer that ``can_compute``, over ``depth_shift(maps, shift_size)``.

    Args:
        maps: ``(batch, channels, *space)`` each, equal but for the channels.
        shift_size: number of groups of the depth shift; 1 moves nothing.
        weight: ``(outputs, inputs of a block, *kernel)``.
        bias: ``(outputs,)`` or None.
        inputs: ``(blocks, inputs of a block)``, the input maps of each block of consecutive output maps.
        stride: of the convolution.
        transposed: whether it is a transposed convolution, whose kernel is its stride.
    """
    values = [values_of(m) for m in maps]
    dtype, device = reduce(torch.promote_types, (v.dtype for v in values)), values[0].device.type
    if torch.is_autocast_enabled(device):  # as PyTorch casts what its own convolutions take
        dtype = torch.get_autocast_dtype(device)
        weight = weight.to(dtype)
    tensors, slopes = flatten([_cast(m, dtype) for m in maps])
    options = _Options(slopes, shift_size, list(stride), transposed)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *tensors)):
        place = _Kept.apply(options, weight, inputs, *tensors)  # type: ignore[no-untyped-call]
        given = [t.detach() for t in (weight, inputs, *tensors)]
        out: Tensor = _Computed.apply(place, options, *given)  # type: ignore[no-untyped-call]
    else:
        out = _compute(options, weight, inputs, *tensors)
    return out if bias is None else out + bias.to(out.dtype).reshape(-1, *[1] * (out.dim() - 2))


def result_shape(x: Tensor, outputs: int, stride: Sequence[int], transposed: bool) -> list[int]:
    """The shape ``(batch, outputs, *space)`` of the result of ``sparse_convolution``."""
    sizes = zip(x.shape[2:], stride, strict=True)
    return [x.shape[0], outputs, *(size * s if transposed else (size - 1) // s + 1 for size, s in sizes)]


def _cast(feature_map: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    """Its values, of a raw map those before the norm, which stays as exact as it is."""
    return feature_map._replace(raw=feature_map.raw.to(dtype)) if isinstance(feature_map, RawMap) else feature_map.to(dtype)


class _Options(NamedTuple):
    """Arguments of ``sparse_convolution`` that are not tensors, and the slopes of its maps."""

    slopes: Slopes
    shift_size: int
    stride: list[int]
    transposed: bool


def _compute(options: _Options, weight: Tensor, inputs: Tensor, *tensors: Tensor) -> Tensor:
    slopes, shift_size, stride, transposed = options
    out: Tensor = convolutions_for(weight).convolve(tensors, slopes, shift_size, weight, inputs, stride, transposed)
    return out


class _Kept(torch.autograd.Function):
    """Keeps what the backward pass needs, before anything is computed, and has the gradients.

    PyTorch notes what a function like this one saves when its forward pass is over. A checkpoint, whose recomputation stops
    when it has all that was saved, would compute the convolution again if ``_Computed`` saved it. What stands for the
    result meanwhile is shaped like it and has no memory.
    """

    @staticmethod
    def forward(ctx: Any, options: _Options, weight: Tensor, inputs: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(weight, inputs, *tensors)
        ctx.options = options
        x = tensors[0]
        return x.new_empty(()).expand(result_shape(x, weight.shape[0], options.stride, options.transposed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, inputs, *tensors = ctx.saved_tensors
        slopes, shift_size, stride, transposed = ctx.options
        kernels, maps = convolutions_for(grad), [values_of(m) for m in regroup(tensors, slopes)]
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        if any(ctx.needs_input_grad[3:]):
            found = kernels.input_gradient(grad, weight, inputs, maps, shift_size, stride, transposed)
            of_tensors = gradients_of_tensors(found, slopes)
        kernel = list(weight.shape[2:])
        of_weight = kernels.weight_gradient(grad, tensors, slopes, shift_size, inputs, kernel, stride, transposed)
        return None, of_weight.to(weight.dtype), None, *of_tensors


class _Computed(torch.autograd.Function):
    """The result in the place of what ``_Kept`` returned, which gets its gradient."""

    @staticmethod
    def forward(ctx: Any, _place: Tensor, options: _Options, weight: Tensor, inputs: Tensor, *tensors: Tensor) -> Tensor:
        ctx.others = 3 + len(tensors)
        return _compute(options, weight, inputs, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.others
