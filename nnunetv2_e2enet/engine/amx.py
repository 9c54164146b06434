"""Dense weights for AMX (``native/kernels_amx.cpp``): each float as two bfloat16s, in the order of the tile registers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16  # outputs in a register
DEPTH = 32  # inputs in a register
LINE = 64  # bytes


def split_bfloat16(weight: Tensor) -> NDArray[np.float32]:
    """``(..., out, in)`` to ``[..., group of 16 outputs][32 inputs][first, second][16][32]``, zeros where they are not full.

    The first bfloat16 is the weight, rounded, and the second what rounding left; both fill as many bytes as floats.
    """
    padded = pad(weight.float(), (0, -weight.shape[-1] % DEPTH, 0, -weight.shape[-2] % ROWS))
    tiles = padded.unflatten(-1, (-1, DEPTH)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)
    first = tiles.bfloat16()
    both = torch.stack([first, (tiles - first).bfloat16()], -3).contiguous()
    return _aligned(both.view(torch.int16).numpy().reshape(-1).view(np.float32))


def _aligned(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy that starts with a cache line: rows of registers would else lie in two."""
    room = np.empty(len(array) + LINE // array.itemsize, array.dtype)
    first = -room.ctypes.data % LINE // array.itemsize
    copy = room[first : first + len(array)]
    copy[:] = array
    return copy
