"""Where feature maps lie: planes cut into tiles of 4 x 4 pixels, and chunks of 64 tiles, channel after channel."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_float

import numpy as np
from numpy.typing import NDArray

from nnunetv2_e2enet.engine.jobs import Grid, Map

TILE = 4
LINE = 16  # floats in a cache line
CHUNK = 64  # tiles
CHANNEL_PIXELS = CHUNK * TILE * TILE  # in a chunk
HALVED_PIXELS = CHUNK * 4  # the same of a map whose tiles were pooled to 2 x 2 pixels

# Bytes after each map. What is read and what is written would else lie a multiple of 64 KiB from each other, in the same sets
# of the caches; a patch then took 5 % longer.
STAGGER = 9 * 4096 + 5 * 64

HUGE_PAGE = 2 << 20

Floats = NDArray[np.float32]


def make_grid(depth: int, height: int, width: int, channel_pixels: int) -> Grid:
    """The tiles of a map whose channels have so many pixels in a chunk, all together."""
    tiles_y, tiles_x = -(-height // TILE), -(-width // TILE)
    in_slice = tiles_y * tiles_x
    return Grid(depth, height, width, tiles_y, tiles_x, in_slice, depth * in_slice, channel_pixels)


def pages(floats: int) -> Floats:
    """Memory that starts at a page, huge ones if there are, and goes back to the system with the last reference to it.

    From an allocator that keeps what was freed, patches of many sizes would leave pieces that fit none of them.

    Raises:
        OSError: the system has none left (ENOMEM).
    """
    n_bytes = max(1, floats) * np.float32().itemsize
    # Memory that processes share, the default, gets no huge pages, and a forked child would write into it
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, n_bytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32, floats)


def empty(memory: Floats, first: int, last: int) -> None:
    """Give bytes ``first`` to ``last`` of what ``pages`` returned back to the system until they are written again.

    The whole huge pages among them go; their content is lost.
    """
    first, last = -(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE
    if first >= last or not hasattr(mmap, "MADV_DONTNEED"):
        return
    assert isinstance(memory.base, memoryview)
    assert isinstance(memory.base.obj, mmap.mmap)
    memory.base.obj.madvise(mmap.MADV_DONTNEED, first, last - first)


class Buffer:
    """Room for a map, and around it: kernels read whole vectors and neighbouring tiles, then mask them.

    Attributes:
        n_bytes: that it takes.
        address: of the map itself, once the room was given by ``place_at``.
    """

    def __init__(self, channels: int, size: Sequence[int], pixel_bytes: int, halved: bool = False) -> None:
        depth, height, width = size
        self.channels = channels
        self.grid = make_grid(depth, height, width, channels * (HALVED_PIXELS if halved else CHANNEL_PIXELS))
        guard = -(-(self.grid.tiles_x + 2 * LINE) // CHUNK)
        chunks = -(-self.grid.tiles // CHUNK)
        chunk_bytes = self.grid.chunk * pixel_bytes
        self.n_bytes = (chunks + 2 * guard) * chunk_bytes + STAGGER
        self.address = 0
        self._first = guard * chunk_bytes

    def place_at(self, address: int) -> None:
        """Set the address of the first pixel in memory that begins at ``address``."""
        self.address = address + self._first


class StoredNorm:
    """The norm that a stored map still needs: written by the conv that stores the map, read by those that load it."""

    def __init__(self, channels: int, slope: float) -> None:
        self.scale = np.empty(channels, np.float32)
        self.offset = np.empty(channels, np.float32)
        self.mean = np.empty(channels, np.float32)
        self.rstd = np.empty(channels, np.float32)
        self.slope = slope


class StoredMap:
    """A feature map of the network in a buffer, before its norm and activation if ``norm`` is given."""

    def __init__(self, buffer: Buffer, norm: StoredNorm | None, channels: int | None = None) -> None:
        self.buffer = buffer
        self.norm = norm
        self.halved: Buffer | None = None  # the same with its tiles pooled to 2 x 2 pixels
        self.channels = buffer.channels if channels is None else channels

    @property
    def grid(self) -> Grid:
        """Tiles of the map."""
        return self.buffer.grid

    def struct(self) -> Map:
        """The map as the kernels take it."""
        norm = self.norm
        return Map(
            self.buffer.address,
            self.channels,
            self.grid,
            norm.scale.ctypes.data if norm else None,
            norm.offset.ctypes.data if norm else None,
            c_float(norm.slope if norm else 1.0),
        )
