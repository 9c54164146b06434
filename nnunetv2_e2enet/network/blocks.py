"""The only conv block of E2ENet: depth shift -> conv -> instance norm -> leaky ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnunetv2_e2enet.network._raw_map import FeatureMap, can_stay_raw, raw_map, values_of
from nnunetv2_e2enet.network.acceleration import kernels_for
from nnunetv2_e2enet.network.compact import CompactLayer
from nnunetv2_e2enet.network.connections import MASKED_CONV
from nnunetv2_e2enet.network.convolution import CONV as BLOCK_CONV
from nnunetv2_e2enet.network.depth_shift import activated, depth_shift, shift_groups
from nnunetv2_e2enet.network.learned_shift import LearnedDepthShift
from nnunetv2_e2enet.network.memory_format import is_channels_last
from nnunetv2_e2enet.network.recomputation import RECOMPUTE, convolved

CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORM: dict[int, Callable[..., nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
"""PyTorch's max-pooling, by the number of spatial axes."""

KERNEL_SIZE = (1, 3, 3)


@dataclass(frozen=True)
class BlockStyle:
    """Settings of all shift blocks of a network, named as in nnU-Net's plans.

    Attributes:
        dimension: 2 or 3. In 2D there is no depth and nothing is shifted.
        shift_size: number of channel groups of the depth shift.
        kernel_size: of the convolutions, depth first; in 2D the last two count. 3 x 3 in the plane unless given: the depth
            shift takes the place of the kernel's depth.
        learned_shift: whether each channel learns how far it moves.
    """

    dimension: int
    shift_size: int = 3
    conv_bias: bool = True
    norm_op: type[nn.Module] | None = None
    norm_op_kwargs: dict[str, Any] = field(default_factory=lambda: {"eps": 1e-5, "affine": True})
    dropout_op: type[nn.Module] | None = None
    dropout_op_kwargs: dict[str, Any] = field(default_factory=dict)
    nonlin: type[nn.Module] = nn.LeakyReLU
    nonlin_kwargs: dict[str, Any] = field(default_factory=lambda: {"inplace": True})
    kernel_size: tuple[int, ...] = KERNEL_SIZE
    learned_shift: bool = False


def as_given(*maps: FeatureMap) -> Sequence[FeatureMap]:
    """The maps, read as they are."""
    return maps


class ShiftBlock(nn.Module):
    """Depth shift, conv, norm, activation over the concatenation of one or more feature maps.

    Args:
        in_channels: channels of the concatenation.
        out_channels: channels of the result.
        style: settings of all blocks.
        stride: of the convolution; the shift comes before it.
        maskable: whether DSFF may switch connections of the convolution off.

    Attributes:
        recompute: one of RECOMPUTE, the maps of this block that autograd keeps; results do not depend on it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        stride: Sequence[int] | int = 1,
        maskable: bool = False,
    ) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = (MASKED_CONV if maskable else BLOCK_CONV)[style.dimension]
        kernel_size = style.kernel_size[-style.dimension :]
        self.recompute = RECOMPUTE[0]
        self.shift_size = style.shift_size if style.dimension == 3 else 1
        learned = style.learned_shift and style.dimension == 3
        self.shift = LearnedDepthShift(in_channels, style.shift_size) if learned else None
        self.conv = conv(
            in_channels,
            out_channels,
            kernel_size,
            stride if isinstance(stride, int) else tuple(stride),
            padding=tuple(k // 2 for k in kernel_size),
            bias=style.conv_bias,
        )
        norm = style.norm_op or INSTANCE_NORM[style.dimension]
        self.dropout = style.dropout_op(**style.dropout_op_kwargs) if style.dropout_op is not None else None
        self.norm = norm(out_channels, **style.norm_op_kwargs)
        self.nonlin = style.nonlin(**style.nonlin_kwargs)

    def offsets(self) -> list[int]:
        """Slices by which each input map is moved, in prediction."""
        if self.shift is not None:
            return self.shift.whole_offsets()
        groups = shift_groups(cast(int, self.conv.in_channels), self.shift_size)
        return [offset for group, offset in groups for _ in range(group.start, group.stop)]

    def forward(self, *maps: FeatureMap, flows: Callable[..., Sequence[FeatureMap]] = as_given) -> FeatureMap:
        """The block over ``flows(*maps)``. The backward pass computes ``flows`` again where ``recompute`` asks for it."""
        recompute = self.recompute != "none" and self.training and torch.is_grad_enabled()
        reads_maps = self.shift is None and isinstance(self.conv, CompactLayer) and self.conv.reads_maps(maps[0])

        def read(*maps: FeatureMap) -> Tensor | Sequence[FeatureMap]:
            if self.shift is not None:
                shifted: Tensor = self.shift([activated(m) for m in flows(*maps)])
                return shifted
            return flows(*maps) if reads_maps else depth_shift(flows(*maps), self.shift_size)

        fused = kernels_for(values_of(maps[0])) is not None and not torch.is_grad_enabled()  # readers normalise in passing
        stays_raw = (recompute or fused) and can_stay_raw(self.norm, self.nonlin)
        aside = stays_raw and self.dropout is None  # the norm takes away what a bias adds: a pass over the map less
        options: dict[str, Any] = {"with_bias": False} if aside else {}
        options |= {"shift_size": self.shift_size} if reads_maps else {}
        again = recompute and not (reads_maps and flows is as_given)  # what the convolution keeps are the maps themselves
        x = convolved(partial(self.conv, **options), read, maps, again, random=self.dropout is not None)
        if self.dropout is not None:
            x = self.dropout(x)
        # PyTorch's instance norm writes channel after channel, whatever it reads
        if stays_raw or (is_channels_last(x) and can_stay_raw(self.norm, self.nonlin)):
            return raw_map(x, self.norm, self.nonlin, cast(Tensor | None, self.conv.bias) if aside else None)
        return cast(Tensor, self.nonlin(self.norm(x)))


def chain(blocks: Iterable[nn.Module], *maps: FeatureMap, flows: Callable[..., Sequence[FeatureMap]] = as_given) -> FeatureMap:
    """One shift block after the other; their ``recompute`` decides which maps autograd keeps."""
    *others, last = cast(Iterable[ShiftBlock], blocks)
    if not others:
        return cast(FeatureMap, last(*maps, flows=flows))

    def before(*maps: FeatureMap) -> Sequence[FeatureMap]:
        return (chain(others, *maps, flows=flows),)

    out: FeatureMap = last(*maps, flows=before) if last.recompute == "nodes" else last(*before(*maps))
    return out
