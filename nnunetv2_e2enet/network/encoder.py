"""Backbone: a pyramid of feature maps, finest level first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnunetv2_e2enet.network._raw_map import FeatureMap
from nnunetv2_e2enet.network.blocks import BlockStyle, ShiftBlock, chain


class Encoder(nn.Module):
    """Shift blocks per level, the first of each with the stride into that level.

    ``stages``, ``output_channels`` and ``strides`` are named as in ``dynamic_network_architectures``.

    Args:
        input_channels: channels of the image.
        features_per_stage: channels of each level.
        strides: stride into each level, one number an axis.
        n_conv_per_stage: shift blocks in each level.
        style: settings of all blocks.
    """

    def __init__(
        self,
        input_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        n_conv_per_stage: Sequence[int],
        style: BlockStyle,
    ) -> None:
        super().__init__()
        self.output_channels = list(features_per_stage)
        self.strides = [list(s) for s in strides]
        levels = []
        channels = input_channels
        for features, stride, n_conv in zip(features_per_stage, strides, n_conv_per_stage, strict=True):
            blocks = [ShiftBlock(channels, features, style, stride)]
            blocks += [ShiftBlock(features, features, style) for _ in range(n_conv - 1)]
            levels.append(nn.Sequential(*blocks))
            channels = features
        self.stages = nn.Sequential(*levels)

    def forward(self, x: Tensor) -> list[FeatureMap]:
        """``(batch, channels, *patch)`` to one feature map a level, finest first."""
        maps: list[FeatureMap] = []
        for level in self.stages:
            maps.append(chain(level.children(), maps[-1] if maps else x))
        return maps
