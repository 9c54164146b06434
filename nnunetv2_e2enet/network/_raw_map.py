"""Feature maps that are kept before their norm and activation, which their readers apply.

A shift block ends with instance norm and leaky ReLU. Both are cheap, and both follow from the convolution's output and two
numbers a channel. So the convolution's output is the only map of a block that autograd has to keep, once for the norm's
backward pass and for all readers (compare in-place activated batch norm, Rota Bulò et al. 2018, which keeps the activation
and inverts it; nothing has to be inverted here, so any scale and slope will do).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.network.acceleration import kernels_for
from nnunetv2_e2enet.network.memory_format import is_channels_last, memory_format

INSTANCE_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


class RawMap(NamedTuple):
    """A feature map ``leaky_relu(raw * scale + offset)`` that has not been computed.

    Attributes:
        raw: ``(batch, channels, *space)``, a convolution's output. In autograd's graph it stands for the activation: readers
            return d loss / d activation, and ``instance_norm`` converts their sum to d loss / d raw once.
        scale, offset: ``(batch, channels, 1, ...)``, the norm as an affine map; at least float32, without gradient.
        slope: of the leaky ReLU.
    """

    raw: Tensor
    scale: Tensor
    offset: Tensor
    slope: float


FeatureMap = Tensor | RawMap


def values_of(feature_map: FeatureMap) -> Tensor:
    """A tensor with the shape, dtype and device of the map."""
    return feature_map.raw if isinstance(feature_map, RawMap) else feature_map


def some_channels(feature_map: FeatureMap, channels: slice) -> FeatureMap:
    if isinstance(feature_map, RawMap):
        raw, scale, offset, slope = feature_map
        return RawMap(raw[:, channels], scale[:, channels], offset[:, channels], slope)
    return feature_map[:, channels]


Slopes = tuple[float | None, ...]


def flatten(maps: Sequence[FeatureMap]) -> tuple[list[Tensor], Slopes]:
    """The tensors of feature maps, for functions that take tensors alone, and the slopes that ``regroup`` needs."""
    tensors = [t for m in maps for t in ((m.raw, m.scale, m.offset) if isinstance(m, RawMap) else (m,))]
    return tensors, tuple(m.slope if isinstance(m, RawMap) else None for m in maps)


def regroup(tensors: Sequence[Tensor], slopes: Slopes) -> list[FeatureMap]:
    """The reverse of ``flatten``."""
    rest = iter(tensors)
    return [next(rest) if slope is None else RawMap(next(rest), next(rest), next(rest), slope) for slope in slopes]


def gradients_of_tensors(grads: Sequence[Tensor], slopes: Slopes) -> list[Tensor | None]:
    """Gradients of maps in the order of the tensors that ``flatten`` gave; scales and offsets have none."""
    return [g for grad, slope in zip(grads, slopes, strict=True) for g in ((grad,) if slope is None else (grad, None, None))]


def raw_map(x: Tensor, norm: nn.Module, nonlin: nn.Module, conv_bias: Tensor | None) -> RawMap:
    """``nonlin(norm(x))`` for a pair that ``can_stay_raw``; see ``instance_norm``."""
    assert isinstance(norm, INSTANCE_NORMS)
    assert isinstance(nonlin, nn.LeakyReLU)
    if prod(x.shape[2:]) == 1:
        norm(x)  # raises what it has to say of a single voxel
    return instance_norm(x, norm.weight, norm.bias, norm.eps, nonlin.negative_slope, conv_bias)


def can_stay_raw(norm: nn.Module, nonlin: nn.Module) -> bool:
    """Whether a norm is an instance norm without running statistics, and an activation a leaky ReLU."""
    return type(norm) in INSTANCE_NORMS and not norm.track_running_stats and type(nonlin) is nn.LeakyReLU


def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float, conv_bias: Tensor | None = None
) -> RawMap:
    """``leaky_relu(instance_norm(x, weight, bias, eps), slope)``, of which only the statistics are computed here.

    Args:
        x: ``(batch, channels, ...)``.
        weight: scale of each channel; None: 1.
        bias: offset of each channel; None: 0.
        eps: added to the variance.
        slope: of the leaky ReLU below zero.
        conv_bias: of the convolution that made ``x`` without it. The norm would remove it from ``x``, so its gradient is zero.
    """
    raw, scale, offset = _InstanceNorm.apply(x, weight, bias, eps, slope, conv_bias)  # type: ignore[no-untyped-call]
    return RawMap(raw, scale, offset, slope)


def activate(source: RawMap, target: Tensor) -> None:
    """Write the activation into ``target``."""
    raw, scale, offset, slope = source
    if torch.compiler.is_compiling():  # which fuses the three, and knows no results in parts of a tensor
        target.copy_(nn.functional.leaky_relu(torch.addcmul(offset, raw, scale), slope))
    else:
        torch.addcmul(offset, raw, scale, out=target)
        nn.functional.leaky_relu_(target, slope)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` over space, ``(batch, channels)``, at least float32."""
    parts = _in_parts(x)
    if x.device.type == "meta":  # where one part needs as much memory as any, and hundreds take seconds of shape arithmetic
        some, _ = _moments(*parts[0])
        return some.new_empty(x.shape[:2]), some.new_empty(x.shape[:2])
    moments = [_moments(*part) for part in parts]
    mean, variance = (torch.cat(m).reshape(x.shape[:2]) for m in zip(*moments, strict=True))
    return mean, (variance + eps).rsqrt()


def norm_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of instance norm and leaky ReLU.

    Args:
        grad: of the activation.
        x: input of the norm, ``(batch, channels, ...)``.
        mean: of ``statistics``.
        rstd: of ``statistics``.
        scale: of the RawMap.
        offset: of the RawMap.
        slope: of the leaky ReLU below zero.

    Returns:
        The gradient of ``x``, and the sums over space that make up the gradients of the norm's weight and bias.
    """
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    per_channel = (t.reshape(*x.shape[:2], 1) for t in (mean, rstd, scale, offset))
    sums = [_gradient_of_part(*part, slope=slope) for part in _in_parts(grad_x, grad, x, *per_channel)]
    weight, bias = (torch.cat(s).reshape(x.shape[:2]) for s in zip(*sums, strict=True))
    return grad_x, weight, bias


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():
        variance, mean = torch.var_mean(x, dim=-1, correction=0)
        return mean, variance
    mean = x.mean(-1)
    return mean, (x - mean[..., None]).square_().mean(-1)  # many times as fast as torch.var_mean on the CPU


def _gradient_of_part(
    out: Tensor, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor, *, slope: float
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of ``x`` into ``out`` and returns the two sums."""
    before = torch.where(x * scale + offset > 0, grad, grad * slope)  # the activation
    normalised = (x - mean) * rstd
    products, sums = (before * normalised).sum(-1, keepdim=True), before.sum(-1, keepdim=True, dtype=mean.dtype)
    out.copy_(scale * (before - (sums + normalised * products) / x.shape[-1]))
    return products, sums


def _in_parts(*maps: Tensor) -> list[tuple[Tensor, ...]]:
    """The same channels of each map together, ``(channels, voxels)`` and views of the first map at least.

    Parts are small enough for intermediate results to stay in the cache of a CPU. A compiler chooses its own parts.
    """
    flat = [m.flatten(2) for m in maps]
    if torch.compiler.is_compiling():
        return [tuple(flat)]
    samples = zip(*flat, strict=True) if is_channels_last(maps[0]) else [tuple(m.flatten(0, 1) for m in flat)]
    elements = 2**18 if maps[0].device.type == "cpu" else 2**24
    size = max(1, elements // flat[0].shape[2])
    return [part for sample in samples for part in zip(*(m.split(size) for m in sample), strict=True)]


class _InstanceNorm(torch.autograd.Function):
    """Instance norm as an affine map; the backward pass is that of norm and leaky ReLU together."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float, conv_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = kernels_for(x)
        mean, rstd = (statistics if kernels is None else kernels.statistics)(x, eps)
        scale = rstd if weight is None else rstd * weight
        offset = -mean * scale if bias is None else bias - mean * scale
        shape = [*x.shape[:2], *[1] * (x.dim() - 2)]
        scale, offset = scale.reshape(shape), offset.reshape(shape)
        ctx.slope, ctx.affine, ctx.of_conv = slope, weight is not None, None if conv_bias is None else conv_bias.shape
        ctx.save_for_backward(x, mean, rstd, scale, offset)
        ctx.mark_non_differentiable(scale, offset)
        return x.view_as(x), scale, offset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, offset = ctx.saved_tensors
        kernels = kernels_for(x)
        compute = norm_gradient if kernels is None else kernels.norm_gradient
        grad_x, products, sums = compute(grad, x, mean, rstd, scale, offset, ctx.slope)
        of_conv = None if ctx.of_conv is None else mean.new_zeros(ctx.of_conv)
        of_norm = (products.sum(0), sums.sum(0)) if ctx.affine else (None, None)
        return grad_x, *of_norm, None, None, of_conv
