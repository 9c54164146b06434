"""Metrics of one case: overlap, surfaces, volume.

Overlap is counted as nnU-Net's evaluation counts it. Surfaces and the distances between them are MONAI's: the surface of a
mask is its voxels with a neighbour (sharing a face) outside it, and a distance is in mm between voxel centres.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from nnunetv2_e2enet.evaluation.labels import Labels

if TYPE_CHECKING:
    from torch import Tensor

PERCENTILE = 95
DISTANCE_SLACK = 1e-5
"""Relative; spacings are stored as float32, so 10 voxels of 0.1 mm may measure a little over 1 mm."""


@dataclass(frozen=True)
class Metric:
    """Name, unit and direction of a metric."""

    key: str
    title: str
    unit: str
    higher_is_better: bool
    digits: int

    @property
    def perfect(self) -> float:
        """Value of a segmentation that is the reference."""
        return float(self.higher_is_better)


METRICS = (
    Metric("dice", "Dice", "", True, 4),
    Metric("nsd", "Surface Dice", "", True, 4),
    Metric("hd95", "HD95", "mm", False, 2),
    Metric("volume_error", "Volume error", "ml", False, 3),
)


class ClassMetrics(NamedTuple):
    """One class of one case. NaN where a number is not defined: nothing there, neither in reference nor prediction.

    The surface metrics are not defined either where the reference has the class but no surface of it, since all voxels around
    are ignored.

    Attributes:
        dice: 2 TP / (2 TP + FP + FN).
        nsd: share of both surfaces that is within the tolerance of the other one.
        hd95: larger of the two directed 95 % surface distances in mm; the image's diagonal if one of the two is empty.
        volume_error: absolute difference of the volumes in ml.
        reference_ml, prediction_ml: volumes in ml, without ignored voxels; 2D images count as 1 mm thick.
    """

    dice: float
    nsd: float
    hd95: float
    volume_error: float
    reference_ml: float
    prediction_ml: float


def case_metrics(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    spacing: Sequence[float],
    labels: Labels,
    tolerances: Sequence[float],
) -> list[ClassMetrics]:
    """All classes of one case.

    Args:
        reference: label map in 2D or 3D.
        prediction: label map of the same shape.
        spacing: mm between voxels, in the order of the axes.
        labels: the classes; voxels that are ``labels.ignore`` in the reference count for nothing.
        tolerances: of the surface Dice in mm, one for each class.

    Returns:
        One entry for each class, in their order.
    """
    boxes = [find_objects(voxels, max_label=max(labels.known)) for voxels in (reference, prediction)]
    ml = prod(spacing) / 1000
    diagonal = sqrt(sum((n * mm) ** 2 for n, mm in zip(reference.shape, spacing, strict=True)))
    results = []
    for members, tolerance in zip(labels.classes.values(), tolerances, strict=True):
        window = _window(boxes, members, reference.shape)
        valid = np.ones_like(reference[window], bool) if labels.ignore is None else reference[window] != labels.ignore
        r, p = (np.isin(voxels[window], members) & valid for voxels in (reference, prediction))
        in_reference, in_prediction, both = (int(np.count_nonzero(mask)) for mask in (r, p, r & p))
        volumes = in_reference * ml, in_prediction * ml
        if in_reference + in_prediction == 0:
            results.append(ClassMetrics(nan, nan, nan, nan, *volumes))
            continue
        dice = 2 * both / (in_reference + in_prediction)
        if in_reference:
            nsd, hd95 = _surface_metrics(r, p, valid, spacing, tolerance, diagonal)
        else:  # the class is invented
            nsd, hd95 = 0.0, diagonal
        results.append(ClassMetrics(dice, nsd, hd95, abs(volumes[1] - volumes[0]), *volumes))
    return results


def _window(
    boxes: Sequence[Sequence[tuple[slice, ...] | None]], members: Sequence[int], shape: Sequence[int]
) -> tuple[slice, ...]:
    """The smallest box around some label values, one voxel wider on each side where the image goes on.

    Args:
        boxes: of each map, the bounding boxes of the values from 1 on. The background has none: with it, all is in the window.
        members: the values.
        shape: of the image.
    """
    if 0 in members:
        return (slice(None),) * len(shape)
    found = [box for of_values in boxes for value in members if (box := of_values[value - 1]) is not None]
    if not found:
        return (slice(0, 0),) * len(shape)
    return tuple(
        slice(max(0, min(b[axis].start for b in found) - 1), min(size, max(b[axis].stop for b in found) + 1))
        for axis, size in enumerate(shape)
    )


def _surface_metrics(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance: float,
    diagonal: float,
) -> tuple[float, float]:
    """NSD and HD95 of a class that the reference has, from the masks.

    A voxel whose neighbours are all in the mask or not valid is not on the surface. A slice that is stored in 3D has no
    surface along its third axis. NaN where the reference has no surface.
    """
    import torch

    flat = tuple(axis for axis, size in enumerate(reference.shape) if size == 1)[: reference.ndim - 2]
    masks = (np.squeeze(mask, flat) for mask in (prediction | ~valid, reference | ~valid, valid))
    p, r, known = (torch.from_numpy(mask) for mask in masks)
    both = _surface_distances(p, r, known, np.delete(spacing, flat).tolist())
    of_prediction, of_reference = (d.size > 0 for d in both)
    if not of_reference:
        return nan, nan
    if not of_prediction:
        return 0.0, diagonal
    close = sum(int((d <= tolerance * (1 + DISTANCE_SLACK)).sum()) for d in both)
    return close / sum(d.size for d in both), max(float(np.percentile(d, PERCENTILE)) for d in both)


def _surface_distances(
    prediction: Tensor, reference: Tensor, valid: Tensor, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Millimetres from each surface voxel of the prediction to the reference's surface, and back; NaN to an empty surface."""
    from monai.metrics.utils import get_edge_surface_distance

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        edges, distances, _ = get_edge_surface_distance(
            prediction, reference, spacing=list(spacing), symmetric=True, mask=valid, warn_empty=False
        )
    counts = [int(surface.sum()) for surface in edges]
    if 0 in counts:  # there are no distances
        return np.full(counts[0], nan), np.full(counts[1], nan)
    to_reference, to_prediction = (d.numpy().astype(float) for d in distances)
    return to_reference, to_prediction
