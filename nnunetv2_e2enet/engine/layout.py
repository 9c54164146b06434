"""Where feature maps lie: planes cut into tiles of 4 x 4 pixels, one phase plane for each position in the tile."""

from __future__ import annotations

from ctypes import c_float

import numpy as np
from numpy.typing import NDArray

from nnunetv2_e2enet.engine.core import Grid, Map

TILE = 4
PHASES = TILE * TILE
LINE = 16  # floats in a cache line

Floats = NDArray[np.float32]


def make_grid(depth: int, height: int, width: int) -> Grid:
    """The tiles of a map. Phase planes are an odd number of cache lines apart, out of each other's cache sets."""
    tiles_y, tiles_x = -(-height // TILE), -(-width // TILE)
    in_slice = tiles_y * tiles_x
    lines = -(-depth * in_slice // LINE)
    return Grid(depth, height, width, tiles_y, tiles_x, in_slice, depth * in_slice, (lines | 1) * LINE)


def aligned(floats: int) -> Floats:
    """Uninitialised memory that starts at a cache line."""
    raw = np.empty(floats + LINE, np.float32)
    first = -raw.ctypes.data % (LINE * raw.itemsize) // raw.itemsize
    return raw[first : first + floats]


class Buffer:
    """Memory of a map, with room around it: kernels read whole vectors and neighbouring tiles, then mask them."""

    def __init__(self, channels: int, grid: Grid) -> None:
        guard = -(-(grid.tiles_x + 2 * LINE) // LINE) * LINE
        self.channels = channels
        self.grid = grid
        self._floats = aligned(channels * PHASES * grid.pitch + 2 * guard)
        self._first = guard

    @property
    def n_bytes(self) -> int:
        return self._floats.nbytes

    def stored(self, norm: StoredNorm | None = None) -> StoredMap:
        return StoredMap(self, norm)

    @property
    def address(self) -> int:
        return self._floats.ctypes.data + self._first * self._floats.itemsize


class StoredNorm:
    """The norm that a stored map still needs: written by the conv that stores the map, read by those that load it."""

    def __init__(self, channels: int, slope: float) -> None:
        self.scale = np.empty(channels, np.float32)
        self.offset = np.empty(channels, np.float32)
        self.slope = slope


class StoredMap:
    """A feature map of the network in a buffer, before its norm and activation if ``norm`` is given."""

    def __init__(self, buffer: Buffer, norm: StoredNorm | None, channels: int | None = None) -> None:
        self.buffer = buffer
        self.norm = norm
        self.channels = buffer.channels if channels is None else channels

    @property
    def grid(self) -> Grid:
        return self.buffer.grid

    def struct(self) -> Map:
        norm = self.norm
        return Map(
            self.buffer.address,
            self.channels,
            self.grid,
            norm.scale.ctypes.data if norm else None,
            norm.offset.ctypes.data if norm else None,
            c_float(norm.slope if norm else 1.0),
        )
