"""The compiled core's functions for whole scans: sums of windows in half precision, and labels of resampled logits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunetv2_e2enet.engine import jobs
from nnunetv2_e2enet.engine.core import load_library


@dataclass(frozen=True)
class Axis:
    """The position of each voxel of the result on one axis of the logits: between two neighbours, or on one of them.

    Attributes:
        lower, upper: places of the neighbours, int32.
        lower_weight, upper_weight: their weights, float64.
    """

    lower: NDArray[np.int32]
    upper: NDArray[np.int32]
    lower_weight: NDArray[np.float64]
    upper_weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.lower)


@dataclass(frozen=True)
class Rule:
    """The rule by which logits become labels.

    Attributes:
        labels: of each class, uint16; with ``regions`` one more, the first, where no region is.
        regions: whether each class is a region, of which the last counts whose logit exceeds ``threshold``; otherwise the
            class of the largest logit counts, the first of several.
    """

    labels: NDArray[np.uint16]
    regions: bool = False
    threshold: float = 0.0

    @property
    def classes(self) -> int:
        """Classes of the logits."""
        return len(self.labels) - self.regions


class ScanCore:
    """The functions, once the library is loaded. Tensors are float16 on the CPU unless stated otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def add_window(self, slices: Sequence[Tensor], values: Tensor, weights: Tensor) -> None:
        """``slices += values * weights``, the product rounded to float32 and the sum to float16.

        Args:
            slices: one for each slice of the window, ``(classes, height, width)``; views with one stride for all of them.
            values: float32, ``(classes, depth, height, width)``.
            weights: ``(depth, height, width)``.
        """
        classes, depth, height, width = values.shape
        assert len(slices) == depth > 0
        first = slices[0]
        assert all(t.dtype == torch.float16 for t in (*slices, weights))
        assert all(s.shape == (classes, height, width) and s.stride() == first.stride() for s in slices)
        assert first.stride(2) == 1
        assert values.dtype == torch.float32
        assert weights.shape == (depth, height, width)
        values, weights = values.contiguous(), weights.contiguous()
        addresses = (c_void_p * depth)(*(s.data_ptr() for s in slices))
        strides = (first.stride(0), first.stride(1))
        sizes = (classes, depth, height, width)
        self._library.e2e_add_window(
            addresses, *strides, values.data_ptr(), weights.data_ptr(), *sizes, torch.get_num_threads()
        )

    def add_mirrored(self, sums: Tensor, values: Tensor, axes: Iterable[int], scale: float = 1.0) -> None:
        """``sums = (sums + values.flip(axes)) * scale``, each operation rounded to float32.

        Args:
            sums: float32, contiguous, ``(classes, depth, height, width)``.
            values: as ``sums``.
            axes: 1 to 3.
            scale: of the sums, once the values were added.
        """
        assert sums.shape == values.shape
        assert sums.dtype == values.dtype == torch.float32
        assert sums.is_contiguous()
        assert values.is_contiguous()
        mirrors = sum(1 << (axis - 1) for axis in axes)
        sizes = (*sums.shape, torch.get_num_threads())
        self._library.e2e_add_mirrored(sums.data_ptr(), values.data_ptr(), mirrors, scale, *sizes)

    def divide(self, sums: Tensor, counts: Tensor) -> bool:
        """``sums /= counts``, of one slice each; whether a quotient is infinite.

        Args:
            sums: contiguous, ``(classes, height, width)``.
            counts: contiguous, ``(height, width)``.
        """
        assert sums.shape[1:] == counts.shape
        assert sums.dtype == counts.dtype == torch.float16
        assert sums.is_contiguous()
        assert counts.is_contiguous()
        sizes = (sums.shape[0], counts.numel())
        return bool(self._library.e2e_divide_slice(sums.data_ptr(), counts.data_ptr(), *sizes, torch.get_num_threads()))

    def labeler(
        self, axes: tuple[Axis, Axis, Axis], rule: Rule, strides: tuple[int, int], width: int, out: NDArray[np.generic]
    ) -> Labeler:
        """An object that turns finished slices of logits into labels.

        Args:
            axes: where the voxels of the result lie among the logits, slices first.
            rule: which label the logits of a voxel have.
            strides: of classes and of rows in a slice of logits, in elements.
            width: of a row of logits.
            out: uint8 or uint16, as large as the axes; rows are contiguous.
        """
        return Labeler(self._library, axes, rule, strides, width, out)


class Labeler:
    """Labels of a scan, slice by slice. See ``ScanCore.labeler``."""

    def __init__(
        self,
        library: ctypes.CDLL,
        axes: tuple[Axis, Axis, Axis],
        rule: Rule,
        strides: tuple[int, int],
        width: int,
        out: NDArray[np.generic],
    ) -> None:
        assert out.shape == tuple(map(len, axes))
        assert all(min(axis.lower.min(initial=0), axis.upper.min(initial=0)) >= 0 for axis in axes)  # -1: of no voxels
        assert out.dtype in (np.uint8, np.uint16)
        assert out.strides[2] == out.itemsize
        self._library = library
        self._arrays = [*axes, rule.labels, out]
        self._strides = (*strides, 1)
        self._upper = axes[0].upper
        self._slices = (c_void_p * (int(axes[0].upper.max(initial=0)) + 1))()
        self._done = 0
        job = jobs.LabelJob(
            slices=ctypes.addressof(self._slices),
            classes=rule.classes,
            class_stride=strides[0],
            row_stride=strides[1],
            width=width,
            regions=rule.regions,
            threshold=rule.threshold,
            label_bytes=out.itemsize,
            labels=rule.labels.ctypes.data,
            out=out.ctypes.data,
            out_slice=out.strides[0] // out.itemsize,
            out_row=out.strides[1] // out.itemsize,
        )
        for i, axis in enumerate(axes):
            arrays = (axis.lower, axis.upper, axis.lower_weight, axis.upper_weight)
            job.axes[i] = jobs.Axis(*(array.ctypes.data for array in arrays), len(axis))
        self._job = job

    def take(self, first: int, slices: Sequence[Tensor]) -> None:
        """Labels of all that lies between the slices of logits so far.

        Args:
            first: place of the first of ``slices`` on the first axis, which follows the last of the call before.
            slices: float16, ``(classes, height, width)``. The last one is read again in the next call, and must stay.
        """
        for place, logits in enumerate(slices, first):
            assert logits.dtype == torch.float16
            assert logits.stride() == self._strides
            if place < len(self._slices):
                self._slices[place] = logits.data_ptr()
        end = int(np.searchsorted(self._upper, first + len(slices)))
        threads = torch.get_num_threads()
        scratch = np.empty(self._library.e2e_label_scratch(ctypes.byref(self._job), threads), np.uint8)
        self._library.e2e_label_slices(ctypes.byref(self._job), self._done, end, scratch.ctypes.data, threads)
        self._done = max(self._done, end)


@lru_cache(maxsize=1)
def load_scan_core() -> ScanCore | str:
    """The functions, or a sentence that says why they cannot be used."""
    library = load_library()
    return library if isinstance(library, str) else ScanCore(library)
