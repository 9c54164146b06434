"""nnU-Net's sliding window, whose finished slices are handed on: no more logits are held than windows still add to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from nnunetv2_e2enet.engine.scan import ScanCore

Slicer = tuple[slice | int, ...]
Window = tuple[int, tuple[slice, slice], int]  # first slice, rows and columns, number of slices


def as_window(slicer: Slicer) -> Window:
    """The place of one of nnU-Net's slicers; of a 2D configuration that is one slice."""
    depth, rows, columns = slicer[1:]
    assert isinstance(rows, slice)
    assert isinstance(columns, slice)
    if isinstance(depth, slice):
        return depth.start, (rows, columns), depth.stop - depth.start
    return depth, (rows, columns), 1


class SlidingSums:
    """Weighted sums of windows, as nnU-Net's ``_internal_predict_sliding_window_return_logits`` has them.

    Slices lie in a ring, each with all classes: ``(classes, height, width)``.
    """

    def __init__(self, core: ScanCore, classes: int, size: Sequence[int], windows: Sequence[Window]) -> None:
        """Make room for the slices of the first windows.

        Args:
            core: the compiled functions.
            classes: of the logits.
            size: of the padded image, ``(depth, height, width)``.
            windows: in the order in which they will be added, first slices first.
        """
        firsts = [first for first, _, _ in windows]
        assert firsts == sorted(firsts)
        shape = self.shape(classes, size, windows)
        self._core = core
        self._upcoming = [*firsts, size[0]]
        self._sums = torch.zeros(shape, dtype=torch.half)
        self._counts = torch.zeros((shape[0], 1, *shape[2:]), dtype=torch.half)
        self._added = 0
        self._kept = 0
        self.finished = 0

    @staticmethod
    def shape(classes: int, size: Sequence[int], windows: Sequence[Window]) -> tuple[int, int, int, int]:
        """Of the sums: slices at a time, classes, rows and columns.

        A window's slices, and the last finished one, because what lies between it and the next is not yet resampled.
        """
        depth, height, width = size
        return min(depth, 1 + windows[0][2]), classes, height, width

    def slice(self, place: int) -> Tensor:
        """Sums of a slice, or logits once it is finished."""
        return self._sums[place % len(self._sums)]

    def add(self, window: Window, logits: Tensor, weights: Tensor) -> None:
        """Adds ``logits * weights``.

        Args:
            window: where the logits lie in the scan.
            logits: float32, ``(classes, depth, height, width)``.
            weights: float16, ``(depth, height, width)``.
        """
        first, (rows, columns), n = window
        places = [place % len(self._sums) for place in range(first, first + n)]
        self._core.add_window([self._sums[i, :, rows, columns] for i in places], logits, weights)
        ones = torch.ones((1, *weights.shape))
        self._core.add_window([self._counts[i, :, rows, columns] for i in places], ones, weights)
        self._added += 1

    def finish(self) -> list[Tensor]:
        """Logits of the slices from ``finished`` on that no window will be added to any more; valid until ``recycle``.

        Raises:
            RuntimeError: a logit is infinite.
        """
        places = range(self.finished, self._upcoming[self._added])
        for place in places:
            if self._core.divide(self.slice(place), self._counts[place % len(self._counts), 0]):
                raise RuntimeError(
                    "Encountered inf in predicted array. Aborting... The network's logits are too large for float16, in which "
                    "nnU-Net sums them"
                )
        self.finished = places.stop
        return [self.slice(place) for place in places]

    def recycle(self) -> None:
        """Makes room where slices were finished; the last of them stays."""
        for place in range(self._kept, self.finished - 1):
            self.slice(place).zero_()
            self._counts[place % len(self._counts)].zero_()
        self._kept = max(0, self.finished - 1)


def predict_mirrored(core: ScanCore, network: Callable[[Tensor], Tensor], patch: Tensor, axes: Sequence[int] | None) -> Tensor:
    """The mean over a patch and its mirror images, as nnU-Net's ``_internal_maybe_mirror_and_predict`` has it.

    The sums are nnU-Net's in its order, so the mean is the same to the bit. Logits are mirrored while they are added.

    Args:
        core: adds the logits.
        network: gives float32 logits that may be overwritten.
        patch: ``(1, channels, *size)``.
        axes: of the patch's size, that may be mirrored; None for none.
    """
    mean = network(patch).contiguous()
    if axes is None:
        return mean
    spatial = patch.dim() - 2
    ways = [chosen for n in range(len(axes)) for chosen in combinations(axes, n + 1)]
    volume = (mean.shape[1], *[1] * (3 - spatial), *mean.shape[2:])  # of a 2D patch one slice
    for i, chosen in enumerate(ways, 1):
        logits = network(torch.flip(patch, [2 + axis for axis in chosen])).contiguous()
        scale = 1 / (1 + len(ways)) if i == len(ways) else 1  # a power of two, by which products are as exact as quotients
        mirrored = [4 - spatial + axis for axis in chosen]
        core.add_mirrored(mean.view(volume), logits.view(volume), mirrored, scale)
    return mean


def slide(
    sums: SlidingSums,
    data: Tensor,
    slicers: Sequence[Slicer],
    predict: Callable[[Tensor], Tensor],
    weights: Tensor,
    take: Callable[[int, Sequence[Tensor]], None],
    progress: Callable[[], object],
) -> None:
    """Predicts all windows and hands on slices as they are finished.

    Args:
        sums: of the whole scan, empty.
        data: the padded image, ``(channels, depth, height, width)``.
        slicers: the windows, as nnU-Net lists them.
        predict: logits of one patch, a batch of one.
        weights: of the voxels of a patch.
        take: gets the place of the first of some consecutive slices, and the slices.
        progress: called after each window.
    """
    weights = weights.reshape((1,) * (3 - weights.dim()) + tuple(weights.shape))
    for slicer in slicers:
        patch = torch.clone(data[slicer][None], memory_format=torch.contiguous_format)
        logits = predict(patch)[0]
        sums.add(as_window(slicer), logits.reshape(logits.shape[0], *weights.shape), weights)
        first = sums.finished
        finished = sums.finish()
        if finished:
            take(first, finished)
            sums.recycle()
        progress()
