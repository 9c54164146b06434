"""Metrics once more, from their definitions, voxel by voxel: what the package's metrics are held against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Voxel = tuple[int, ...]


def brute_force(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    values: Sequence[int],
    tolerance: float,
    ignore: int | None,
) -> dict[str, float]:
    """Every metric of one class. Slow, and shares no code and no library function with the package."""
    voxels = list(itertools.product(*(range(n) for n in reference.shape)))
    known = {v for v in voxels if ignore is None or reference[v] != ignore}
    r = {v for v in known if reference[v] in values}
    p = {v for v in known if prediction[v] in values}
    ml = math.prod(spacing) / 1000
    result = {"reference_ml": len(r) * ml, "prediction_ml": len(p) * ml}
    if not r and not p:
        return {**result, **dict.fromkeys(("dice", "nsd", "hd95", "volume_error"), math.nan)}
    result["dice"] = 2 * len(r & p) / (len(r) + len(p))
    result["volume_error"] = abs(len(p) - len(r)) * ml
    surfaces = [_surface(mask, known, reference.shape) for mask in (r, p)]
    diagonal = math.sqrt(sum((n * mm) ** 2 for n, mm in zip(reference.shape, spacing, strict=True)))
    if r and not surfaces[0]:
        return {**result, "nsd": math.nan, "hd95": math.nan}
    if not all(surfaces):
        return {**result, "nsd": 0.0, "hd95": diagonal}
    distances = [[min(_distance(v, w, spacing) for w in other) for v in own] for own, other in (surfaces, surfaces[::-1])]
    close = sum(d <= tolerance + 1e-4 for part in distances for d in part)
    result["nsd"] = close / sum(len(part) for part in distances)
    result["hd95"] = max(_percentile(part, 0.95) for part in distances)
    return result


def _surface(mask: set[Voxel], known: set[Voxel], shape: Sequence[int]) -> list[Voxel]:
    """Voxels of the mask with a face towards the edge of the image or towards what is known not to be in the mask.

    A slice that is stored in 3D is a 2D image.
    """
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    while len(axes) < 2:
        axes.append(next(axis for axis in reversed(range(len(shape))) if axis not in axes))
    found = []
    for voxel in mask:
        for axis, step in itertools.product(axes, (-1, 1)):
            other = tuple(n + step * (i == axis) for i, n in enumerate(voxel))
            inside = all(0 <= n < size for n, size in zip(other, shape, strict=True))
            if not inside or (other in known and other not in mask):
                found.append(voxel)
                break
    return found


def _distance(a: Voxel, b: Voxel, spacing: Sequence[float]) -> float:
    return math.sqrt(sum(((m - n) * mm) ** 2 for m, n, mm in zip(a, b, spacing, strict=True)))


def _percentile(numbers: list[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted numbers."""
    ordered = sorted(numbers)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
