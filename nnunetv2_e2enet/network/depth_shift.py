"""Restricted depth shift (paper, section 3.3).

The channels are split into ``shift_size`` near-equal consecutive groups that move along the first spatial axis by
``-(shift_size // 2) … +(shift_size // 2)`` slices. Zeros move in and nothing wraps.

Feature maps arrive as a sequence and leave as one tensor: concatenation and shift are the same single pass, in which every
voxel of the result is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.errors import E2ENetError

DEPTH_AXIS = 2


def check_shift_size(shift_size: int) -> None:
    """Raises E2ENetError unless ``shift_size`` is an odd whole number of at least 1."""
    if isinstance(shift_size, bool) or not isinstance(shift_size, int) or shift_size < 1 or shift_size % 2 == 0:
        raise E2ENetError(
            f"shift_size is {shift_size!r}, but the depth shift is symmetric: use an odd number (1 = no shift, 3, 5, ...)"
        )


def shift_groups(channels: int, shift_size: int) -> list[tuple[slice, int]]:
    """The groups of channels that move together, each with its offset in slices.

    As ``torch.tensor_split``: the first ``channels % shift_size`` groups have one channel more. A tensor with fewer channels
    than groups is one group that stays where it is.
    """
    if channels < shift_size:
        return [(slice(0, channels), 0)]
    size, larger = divmod(channels, shift_size)
    groups, start = [], 0
    for index in range(shift_size):
        stop = start + size + (index < larger)
        groups.append((slice(start, stop), index - shift_size // 2))
        start = stop
    return groups


def depth_shift(maps: Tensor | Sequence[Tensor], shift_size: int) -> Tensor:
    """Concatenate feature maps along the channels and move their channel groups along the depth axis.

    Args:
        maps: one tensor or several, each ``(batch, channels, depth, height, width)``, equal but for the channels.
        shift_size: number of groups, odd; 1 moves nothing.

    Returns:
        ``(batch, sum of channels, depth, height, width)``, with ``out[:, :, d] = in[:, :, d - offset]`` for each group.
    """
    tensors = (maps,) if isinstance(maps, Tensor) else tuple(maps)
    if shift_size == 1 or sum(t.shape[1] for t in tensors) < shift_size:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _DepthShift.apply(shift_size, *tensors)
    return _shift_into_one(shift_size, tensors)


def _pieces(widths: Sequence[int], shift_size: int) -> Iterator[tuple[int, slice, slice, int]]:
    """Index of the map, its channels, the same channels in the concatenation, and their offset."""
    groups = shift_groups(sum(widths), shift_size)
    first = 0
    for index, width in enumerate(widths):
        for group, offset in groups:
            start, stop = max(group.start, first), min(group.stop, first + width)
            if start < stop:
                yield index, slice(start - first, stop - first), slice(start, stop), offset
        first += width


def move(source: Tensor, target: Tensor, offset: int) -> None:
    """Write ``source``, moved by ``offset`` slices, into ``target``, with zeros where nothing comes from."""
    depth = source.shape[DEPTH_AXIS]
    kept = max(depth - abs(offset), 0)
    read, write = max(-offset, 0), max(offset, 0)
    if kept:
        target.narrow(DEPTH_AXIS, write, kept).copy_(source.narrow(DEPTH_AXIS, read, kept))
    if kept < depth:
        target.narrow(DEPTH_AXIS, 0 if offset > 0 else kept, depth - kept).zero_()


def _shift_into_one(shift_size: int, maps: Sequence[Tensor]) -> Tensor:
    widths = [m.shape[1] for m in maps]
    dtype = reduce(torch.promote_types, (m.dtype for m in maps))
    first = maps[0]
    out = first.new_empty((first.shape[0], sum(widths), *first.shape[2:]), dtype=dtype)
    for index, channels, out_channels, offset in _pieces(widths, shift_size):
        move(maps[index][:, channels], out[:, out_channels], offset)
    return out


class _DepthShift(torch.autograd.Function):
    """The adjoint of a shift by ``t`` is the shift by ``-t``: backward is one pass as well."""

    @staticmethod
    def forward(ctx: Any, shift_size: int, *maps: Tensor) -> Tensor:
        ctx.shift_size = shift_size
        ctx.maps = [(m.shape, m.dtype) for m in maps]
        return _shift_into_one(shift_size, maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        grads = [
            grad.new_empty(shape, dtype=dtype) if need else None for (shape, dtype), need in zip(ctx.maps, wanted, strict=True)
        ]
        for index, channels, out_channels, offset in _pieces([shape[1] for shape, _ in ctx.maps], ctx.shift_size):
            target = grads[index]
            if target is not None:
                move(grad[:, out_channels], target[:, channels], -offset)
        return (None, *grads)
