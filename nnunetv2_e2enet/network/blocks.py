"""The only conv block of E2ENet: depth shift -> conv -> instance norm -> leaky ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nnunetv2_e2enet.network.connections import MASKED_CONV
from nnunetv2_e2enet.network.depth_shift import depth_shift
from nnunetv2_e2enet.network.learned_shift import LearnedDepthShift

CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORM: dict[int, Callable[..., nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

KERNEL_SIZE = (1, 3, 3)


@dataclass(frozen=True)
class BlockStyle:
    """What all shift blocks of a network have in common; the names are those of nnU-Net's plans.

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


class ShiftBlock(nn.Module):
    """Depth shift, conv, norm, activation over the concatenation of one or more feature maps.

    Args:
        in_channels: channels of the concatenation.
        out_channels: channels of the result.
        style: what the blocks of the network have in common.
        stride: of the convolution; the shift comes before it.
        maskable: whether DSFF may switch connections of the convolution off.
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
        conv: Callable[..., nn.Module] = MASKED_CONV[style.dimension] if maskable else CONV[style.dimension]
        kernel_size = style.kernel_size[-style.dimension :]
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

    def forward(self, *maps: Tensor) -> Tensor:
        x = self.conv(depth_shift(maps, self.shift_size) if self.shift is None else self.shift(maps))
        if self.dropout is not None:
            x = self.dropout(x)
        return self.nonlin(self.norm(x))
