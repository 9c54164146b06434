"""Order of feature maps in memory: channel after channel, or channels last, with all channels of a voxel side by side.

The device decides which order is faster; results do not depend on it. After
``network.to(memory_format=CHANNELS_LAST[dimension])`` convolutions write maps in the format of their weights, and readers keep
the format of their maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
"""PyTorch's format of channels-last maps, by the number of spatial axes."""


def is_channels_last(x: Tensor) -> bool:
    """Whether a map is contiguous with its channels last, and not in the ordinary way too (as one of a single channel is)."""
    last = CHANNELS_LAST.get(x.dim() - 2)
    return last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format for results that are computed from a map; the ordinary one if the map is not contiguous at all."""
    return CHANNELS_LAST[x.dim() - 2] if is_channels_last(x) else torch.contiguous_format


def empty_like(x: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map with so many channels, otherwise like ``x``, in the same format."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))
