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
MAX_VOXELS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Metric:
    """Name, unit and direction of a metric."""

    key: str
    title: str
    unit: str
    higher_is_better: bool
    digits: int


METRICS = (
    Metric("dice", "Dice", "", True, 4),
    Metric("nsd", "Surface Dice", "", True, 4),
    Metric("hd95", "HD95", "mm", False, 2),
    Metric("volume_error", "Volume error", "ml", False, 3),
)


class ClassMetrics(NamedTuple):
    """One class of one case. NaN where a number is not defined: nothing there, neither in reference nor prediction.

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
    counts = _joint_counts(reference, prediction, labels)
    boxes = _boxes(reference, prediction, labels)
    ml = prod(spacing) / 1000
    diagonal = sqrt(sum((n * mm) ** 2 for n, mm in zip(reference.shape, spacing, strict=True)))
    results = []
    for members, tolerance in zip(labels.classes.values(), tolerances, strict=True):
        rows = [labels.known.index(v) for v in members]
        in_reference = int(counts[rows].sum())
        in_prediction = int(counts[:, rows].sum())
        both = int(counts[np.ix_(rows, rows)].sum())
        volumes = in_reference * ml, in_prediction * ml
        if in_reference + in_prediction == 0:
            results.append(ClassMetrics(nan, nan, nan, nan, *volumes))
            continue
        dice = 2 * both / (in_reference + in_prediction)
        if in_reference and in_prediction:
            nsd, hd95 = _surface_metrics(reference, prediction, spacing, members, labels.ignore, boxes, tolerance, diagonal)
        else:
            nsd, hd95 = 0.0, diagonal
        results.append(ClassMetrics(dice, nsd, hd95, abs(volumes[1] - volumes[0]), *volumes))
    return results


def _joint_counts(reference: NDArray[np.integer], prediction: NDArray[np.integer], labels: Labels) -> NDArray[np.int64]:
    """Voxels by (reference value, prediction value), in the order of ``labels.known``; one more of each for other values.

    Ignored voxels are left out. Done in pieces, so that memory does not grow with the image.
    """
    values = labels.known
    n = len(values) + 1
    counts = np.zeros(n * n, np.int64)
    flat_reference, flat_prediction = reference.reshape(-1), prediction.reshape(-1)
    for start in range(0, flat_reference.size, MAX_VOXELS_AT_ONCE):
        piece = slice(start, start + MAX_VOXELS_AT_ONCE)
        r, p = flat_reference[piece], flat_prediction[piece]
        if labels.ignore is not None:
            valid = r != labels.ignore
            r, p = r[valid], p[valid]
        counts += np.bincount(_ranks(r, values) * n + _ranks(p, values), minlength=n * n)
    return counts.reshape(n, n)


def _ranks(voxels: NDArray[np.integer], values: Sequence[int]) -> NDArray[np.intp]:
    """Place of each voxel's value among ``values``; their number for all others."""
    largest = int(max(max(values), voxels.max(initial=0)))
    table = np.full(largest + 1, len(values), np.intp)
    table[list(values)] = range(len(values))
    ranks: NDArray[np.intp] = table[voxels]
    return ranks


def _boxes(
    reference: NDArray[np.integer], prediction: NDArray[np.integer], labels: Labels
) -> dict[int, list[tuple[slice, ...]]]:
    """Bounding boxes of each label value, of the reference and of the prediction where they have it."""
    boxes: dict[int, list[tuple[slice, ...]]] = {}
    for voxels in (reference, prediction):
        for index, box in enumerate(find_objects(voxels, max_label=max(labels.known))):
            if box is not None:
                boxes.setdefault(index + 1, []).append(box)
    return boxes


def _surface_metrics(
    reference: NDArray[np.integer],
    prediction: NDArray[np.integer],
    spacing: Sequence[float],
    members: Sequence[int],
    ignore: int | None,
    boxes: dict[int, list[tuple[slice, ...]]],
    tolerance: float,
    diagonal: float,
) -> tuple[float, float]:
    """NSD and HD95 of a class that reference and prediction both have.

    A voxel whose neighbours are all in the mask or ignored is not on the surface.
    """
    import torch

    window = _union([b for v in members for b in boxes.get(v, [])], reference.shape)
    r, p = reference[window], prediction[window]
    masks = [torch.from_numpy(np.isin(p, members)), torch.from_numpy(np.isin(r, members))]
    valid = torch.ones(masks[0].shape, dtype=torch.bool)
    if ignore is not None:
        valid = torch.from_numpy(r != ignore)
        masks = [mask | ~valid for mask in masks]
    both = _surface_distances(masks[0], masks[1], valid, spacing)
    if not all(d.size for d in both):
        return (0.0, diagonal) if any(d.size for d in both) else (nan, nan)
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


def _union(boxes: Sequence[tuple[slice, ...]], shape: Sequence[int]) -> tuple[slice, ...]:
    """The smallest box around all of them, one voxel wider on each side where the image goes on."""
    return tuple(
        slice(max(0, min(b[axis].start for b in boxes) - 1), min(size, max(b[axis].stop for b in boxes) + 1))
        for axis, size in enumerate(shape)
    )
