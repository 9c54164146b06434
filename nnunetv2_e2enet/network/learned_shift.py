"""Depth shift whose offsets are learned, an open question of the paper.

Each channel has an offset of its own, a real number of slices, which starts at that of the restricted depth shift. In training
a channel is interpolated linearly between the two slices nearest to ``d - offset``, so the loss has a gradient with respect to
the offset. In evaluation mode offsets are rounded to whole slices, so prediction moves slices and interpolates nothing. Zeros
move in from outside and nothing wraps, as in the restricted depth shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nnunetv2_e2enet.network.depth_shift import DEPTH_AXIS, move, shift_groups


class LearnedDepthShift(nn.Module):
    """Concatenate feature maps along the channels and move each channel by its own learned offset.

    Args:
        channels: of the concatenation.
        shift_size: groups of the restricted depth shift at which the offsets start.

    Attributes:
        offsets: ``(channels,)``, in slices; in the state dict, as every parameter.
        whole: in training, use the offsets rounded and let them have no gradient.
    """

    def __init__(self, channels: int, shift_size: int) -> None:
        super().__init__()
        offsets = torch.zeros(channels)
        for group, offset in shift_groups(channels, shift_size):
            offsets[group] = offset
        self.offsets = nn.Parameter(offsets)
        self.whole = False

    def whole_offsets(self) -> list[int]:
        """The slices by which each channel moves in prediction."""
        return [int(offset) for offset in self.offsets.detach().round().tolist()]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The concatenation of the maps, ``(batch, channels, depth, height, width)``, each channel moved by its offset."""
        x = maps[0] if len(maps) == 1 else torch.cat(tuple(maps), dim=1)
        if not self.training and not torch.compiler.is_compiling():  # a graph has no place for the values of parameters
            return torch.empty_like(x) if x.is_meta else _whole_shift(x, self.whole_offsets())
        # rounding has the gradient zero everywhere, which DistributedDataParallel can reduce and None it cannot
        return interpolated_shift(x, self.offsets if self.training and not self.whole else self.offsets.round())


def interpolated_shift(x: Tensor, offsets: Tensor) -> Tensor:
    """``out[:, c, d] = (1 - f) in[:, c, d - k] + f in[:, c, d - k - 1]``, where ``k + f`` is ``offsets[c]`` and ``k`` whole.

    A product with one ``depth x depth`` matrix a channel, differentiable in both arguments.

    Args:
        x: ``(batch, channels, depth, height, width)``.
        offsets: ``(channels,)``, in slices.
    """
    depth = torch.arange(x.shape[DEPTH_AXIS], device=x.device, dtype=offsets.dtype)
    distance = depth[:, None] - offsets[:, None, None] - depth  # of (channel, out slice, in slice), from where it reads
    weight = (1 - distance.abs()).clamp(min=0).to(x.dtype)
    return torch.matmul(weight, x.flatten(3)).reshape(x.shape)


def _whole_shift(x: Tensor, offsets: Sequence[int]) -> Tensor:
    out = torch.empty_like(x)
    for offset in set(offsets):
        channels = torch.tensor([c for c, o in enumerate(offsets) if o == offset], device=x.device)
        part = x.index_select(1, channels)
        moved = torch.empty_like(part)
        move(part, moved, offset)
        out.index_copy_(1, channels, moved)
    return out


def learned_shifts(network: nn.Module) -> Iterator[LearnedDepthShift]:
    """All learned shifts of a network."""
    for module in network.modules():
        if isinstance(module, LearnedDepthShift):
            yield module


@torch.no_grad()
def hold_whole_offsets(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Round all offsets and hold them there, so that the weights can adapt to what prediction will compute."""
    for shift in learned_shifts(network):
        shift.whole = True
        shift.offsets.round_()
        for value in optimizer.state.get(shift.offsets, {}).values():
            if isinstance(value, Tensor) and value.shape == shift.offsets.shape:
                value.zero_()
