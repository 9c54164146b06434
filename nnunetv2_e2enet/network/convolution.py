"""Convolutions of shift blocks: with their bias or without it, and over slices where a kernel has no depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_e2enet.network.memory_format import is_channels_last
from nnunetv2_e2enet.settings import settings


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that leaves its bias out when asked to."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """``(batch, in, height, width)`` to ``(batch, out, height, width)``."""
        return conv2d(self, x, self.weight, self.bias if with_bias else None, self.groups)


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` that leaves its bias out when asked to, see also ``over_slices``."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """``(batch, in, depth, height, width)`` to ``(batch, out, depth, height, width)``."""
        return conv3d(self, x, self.weight, self.bias if with_bias else None, self.groups)


CONV: dict[int, Callable[..., nn.Module]] = {2: Conv2d, 3: Conv3d}
"""The convolutions that can leave their bias out, by the number of spatial axes."""


def conv2d(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """As ``conv3d``, of maps ``(batch, channels, height, width)``."""
    if layer.padding_mode != "zeros":
        out: Tensor = layer._conv_forward(x, weight, bias)
        return out
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def conv3d(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The convolution of a layer with other weights.

    Args:
        layer: says stride, padding and dilation.
        x: ``(batch, channels, depth, height, width)``.
        weight: ``(out, in / groups, *kernel)``.
        bias: ``(out,)``, or None.
        groups: of the convolution.
    """
    if layer.padding_mode != "zeros":
        out: Tensor = layer._conv_forward(x, weight, bias)
        return out
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    flat = weight.shape[2] == 1 and stride[0] == 1 and not isinstance(padding, str) and padding[0] == 0
    if flat and settings().plane_convolutions == "on" and is_channels_last(x):
        return over_slices(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


def over_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution whose kernel has no depth, as one in 2D over all slices, which are a view of a channels-last map."""
    batch, _, depth, _, _ = x.shape
    slices = x.movedim(2, 1).flatten(0, 1)
    out = F.conv2d(slices, weight[:, :, 0], bias, stride[1:], padding[1:], dilation[1:], groups)
    volumes: Tensor = out.unflatten(0, (batch, depth)).movedim(1, 2)
    return volumes
