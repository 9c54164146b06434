"""Restricted depth shift (paper, section 3.3).

The channels are split into ``shift_size`` near-equal consecutive groups that move along the first spatial axis by
``-(shift_size // 2) … +(shift_size // 2)`` slices. Zeros move in and nothing wraps.

Feature maps arrive as a sequence and leave as one tensor: concatenation and shift are the same single pass, in which every
voxel of the result is written once. Maps that are still raw get their norm and activation on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network._raw_map import (
    FeatureMap,
    RawMap,
    Slopes,
    activate,
    flatten,
    gradients_of_tensors,
    regroup,
    some_channels,
    values_of,
)
from nnunetv2_e2enet.network.acceleration import kernels_for
from nnunetv2_e2enet.network.memory_format import empty_like

DEPTH_AXIS = 2


def check_shift_size(shift_size: int) -> None:
    """Raises E2ENetError unless ``shift_size`` is an odd whole number of at least 1."""
    if isinstance(shift_size, bool) or not isinstance(shift_size, int) or shift_size < 1 or shift_size % 2 == 0:
        raise E2ENetError(
            f"shift_size is {shift_size!r}, but the depth shift is symmetric: use an odd number (1 = no shift, 3, 5, ...)"
        )


def check_trained_shift_size(state: Tensor, shift_size: int) -> None:
    """Raises E2ENetError unless weights, with whose state dict ``state`` was saved, were trained with this shift size."""
    if int(state) != shift_size:
        raise E2ENetError(
            f"the weights were trained with shift_size {int(state)}, but the network has {shift_size}: build the network with "
            "the shift size of the weights"
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


def depth_shift(maps: FeatureMap | Sequence[FeatureMap], shift_size: int) -> Tensor:
    """Concatenate feature maps along the channels and move their channel groups along the depth axis.

    Args:
        maps: one map or several, each ``(batch, channels, depth, height, width)``, equal but for the channels.
        shift_size: number of groups, odd; 1 moves nothing.

    Returns:
        ``(batch, sum of channels, depth, height, width)``, with ``out[:, :, d] = in[:, :, d - offset]`` for each group.
    """
    sources: list[FeatureMap] = [maps] if isinstance(maps, (Tensor, RawMap)) else list(maps)
    tensors, slopes = flatten(sources)
    if len(tensors) == len(sources) and (shift_size == 1 or sum(t.shape[1] for t in tensors) < shift_size):
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out: Tensor = _DepthShift.apply(shift_size, slopes, *tensors)  # type: ignore[no-untyped-call]
        return out
    return _joined(sources, shift_size)


def activated(feature_map: FeatureMap) -> Tensor:
    """A feature map as an ordinary tensor, ``(batch, channels, *space)``.

    Blocks hand on maps whose norm and activation are still to be computed; only this function and ``depth_shift`` compute them
    with the right gradients.
    """
    return depth_shift(feature_map, 1)


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


def move(source: FeatureMap, target: Tensor, offset: int) -> None:
    """Write ``source``, moved by ``offset`` slices, into ``target``, with zeros where nothing comes from."""
    depth = target.shape[DEPTH_AXIS]
    kept = max(depth - abs(offset), 0)
    read, write = max(-offset, 0), max(offset, 0)
    if kept:
        part = target.narrow(DEPTH_AXIS, write, kept)
        if isinstance(source, RawMap):
            activate(source._replace(raw=source.raw.narrow(DEPTH_AXIS, read, kept)), part)
        else:
            part.copy_(source.narrow(DEPTH_AXIS, read, kept))
    if kept < depth:
        target.narrow(DEPTH_AXIS, 0 if offset > 0 else kept, depth - kept).zero_()


def join(maps: Sequence[FeatureMap], shift_size: int) -> Tensor:
    """Shift and concatenation in PyTorch, whatever the maps are; in the memory format of the first."""
    values = [values_of(m) for m in maps]
    widths = [v.shape[1] for v in values]
    dtype = reduce(torch.promote_types, (v.dtype for v in values))
    out = empty_like(values[0], sum(widths), dtype)
    for index, channels, out_channels, offset in _pieces(widths, shift_size):
        move(some_channels(maps[index], channels), out[:, out_channels], offset)
    return out


def separate(grad: Tensor, widths: Sequence[int], shift_size: int) -> list[Tensor]:
    """The adjoint of ``join``: the adjoint of a move by ``t`` slices is a move by ``-t``.

    Args:
        grad: of the concatenation.
        widths: channels of each map.
        shift_size: number of channel groups, odd.
    """
    grads = [empty_like(grad, width) for width in widths]
    for index, channels, out_channels, offset in _pieces(widths, shift_size):
        move(grad[:, out_channels], grads[index][:, channels], -offset)
    return grads


def _joined(maps: Sequence[FeatureMap], shift_size: int) -> Tensor:
    kernels = kernels_for(values_of(maps[0]))
    return join(maps, shift_size) if kernels is None else kernels.join(*flatten(maps), shift_size)


def _separated(grad: Tensor, widths: list[int], shift_size: int) -> Sequence[Tensor]:
    if len(shift_groups(sum(widths), shift_size)) == 1:  # nothing was moved
        return torch.split(grad, widths, dim=1)
    kernels = kernels_for(grad)
    parts: list[Tensor] = (separate if kernels is None else kernels.separate)(grad, widths, shift_size)
    return parts


class _DepthShift(torch.autograd.Function):
    """Keeps no tensor: the gradient of a raw map is that of its activation (see RawMap), as for ordinary maps."""

    @staticmethod
    def forward(ctx: Any, shift_size: int, slopes: Slopes, *tensors: Tensor) -> Tensor:
        maps = regroup(tensors, slopes)
        ctx.shift_size, ctx.slopes = shift_size, slopes
        ctx.widths, ctx.dtypes = [values_of(m).shape[1] for m in maps], [values_of(m).dtype for m in maps]
        return _joined(maps, shift_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = _separated(grad, ctx.widths, ctx.shift_size)
        grads = [part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)]
        return (None, None, *gradients_of_tensors(grads, ctx.slopes))
