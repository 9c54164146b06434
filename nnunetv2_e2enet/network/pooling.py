"""The downward flow: norm, activation and max-pooling of a map, in one pass where the fused kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.network._raw_map import FeatureMap, Slopes, flatten, gradients_of_tensors, regroup, values_of
from nnunetv2_e2enet.network.acceleration import kernels_for
from nnunetv2_e2enet.network.depth_shift import activated

MOST_VOXELS = 255  # of a pool, whose voxels an index of one byte numbers


def pooled(feature_map: FeatureMap, pool: nn.Module) -> Tensor:
    """A feature map after its norm, its activation and a max-pooling whose kernel is its stride.

    Args:
        feature_map: ``(batch, channels, *space)``.
        pool: ``nn.MaxPool2d`` or ``nn.MaxPool3d``.
    """
    stride = plain_stride(pool)
    kernels = kernels_for(values_of(feature_map))
    if kernels is None or stride is None or prod(stride) > MOST_VOXELS:
        out: Tensor = pool(activated(feature_map))
        return out
    tensors, slopes = flatten([feature_map])
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = _Pool.apply(stride, slopes, *tensors)  # type: ignore[no-untyped-call]
    else:
        out, _ = kernels.pool(tensors, slopes[0], stride)
    return out


def plain_stride(pool: nn.Module) -> list[int] | None:
    """The stride of a max-pooling; None where the module is more than the maximum of voxels side by side."""
    if type(pool) not in (nn.MaxPool2d, nn.MaxPool3d) or pool._forward_pre_hooks or pool._forward_hooks:
        return None
    plain = pool.stride == pool.kernel_size and not pool.ceil_mode and not pool.return_indices
    if not (plain and isinstance(pool.stride, tuple) and pool.padding == 0 and pool.dilation == 1):
        return None
    return list(pool.stride)


class _Pool(torch.autograd.Function):
    """Keeps one byte for each voxel of the result; the gradient of a raw map is that of its activation (see RawMap)."""

    @staticmethod
    def forward(ctx: Any, stride: Sequence[int], slopes: Slopes, *tensors: Tensor) -> Tensor:
        (feature_map,) = regroup(tensors, slopes)
        values = values_of(feature_map)
        out, index = kernels_for(values).pool(list(tensors), slopes[0], stride)
        ctx.save_for_backward(index)
        ctx.stride, ctx.size, ctx.slopes = stride, list(values.shape[2:]), slopes
        pooled_values: Tensor = out
        return pooled_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        of_map = kernels_for(grad).pool_gradient(grad, index, ctx.size, ctx.stride)
        return None, None, *gradients_of_tensors([of_map], ctx.slopes)
