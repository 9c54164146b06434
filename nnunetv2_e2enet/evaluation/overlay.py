"""A picture of one case: its segmentations side by side, over the image, in three planes."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import SimpleITK as sitk  # noqa: N813
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import write
from nnunetv2_e2enet.imaging import Geometry, read_image

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")
"""Colours that the colour-blind can tell apart (Okabe and Ito, 2008), but for black and grey, which images use."""

LineStyle = Literal["solid", "dashed", "dotted"]
LINE_STYLES: tuple[LineStyle, ...] = ("solid", "dashed", "dotted")
FILL_OPACITY = 0.4
COLUMN_WIDTH_INCHES = 3.2
DOTS_PER_INCH = 150
FONT_SIZE = 14


Voxel = TypeVar("Voxel", bound=np.generic)


@dataclass(frozen=True)
class Plane:
    """A way to cut a volume of axes (inferior to superior, anterior to posterior, right to left)."""

    name: str
    axis: int
    superior_is_last_row: bool


PLANES = (Plane("Axial", 0, False), Plane("Coronal", 1, True), Plane("Sagittal", 2, True))


def write_overlay(path: Path, image: Path, segmentations: Mapping[str, Path], labels: Mapping[int, str]) -> None:
    """Write ``overlay`` as a PNG, whole or not at all; ``path`` is a file to write or to replace, in a folder that exists.

    Raises:
        E2ENetError: as ``overlay``, or the file cannot be written.
    """
    save_figure(overlay(image, segmentations, labels), path)


def overlay(image: Path | None, segmentations: Mapping[str, Path], labels: Mapping[int, str]) -> Figure:
    """The picture of one case, a row for each plane and a column for each segmentation.

    The slice of a plane is the one on which the segmentations together show the largest extent of their labels. The image is
    shown at its physical aspect ratio in the radiological convention (the patient's right is on the left).

    Args:
        image: a 3D image file that SimpleITK reads; None for a black background.
        segmentations: title of each column to its label map, on the voxel grid of the image; at least one.
        labels: label value to name, for the legend; 0 is background and not drawn.

    Raises:
        E2ENetError: no segmentation, no label, an unreadable file, not 3D, or grids that differ.
    """
    foreground = {value: name for value, name in labels.items() if value != 0}
    if not segmentations or not foreground:
        raise E2ENetError(
            f"overlay of {len(segmentations)} segmentations with {len(foreground)} labels: expected at least one of each"
        )
    given = image or next(iter(segmentations.values()))
    volume = read_volume(given)
    columns = {title: read_on_grid_of(volume, file, given) for title, file in segmentations.items()}
    voxels = sitk.GetArrayFromImage(volume)
    return _draw(voxels if image else np.zeros_like(voxels), columns, foreground, volume.GetSpacing()[::-1])


def best_slice(segmentations: Sequence[NDArray[np.integer]], labels: Sequence[int], axis: int) -> int:
    """The slice across ``axis`` on which the segmentations show the largest extent of their labels.

    Each label counts with its area on the slice, relative to the largest that it has on any: all labels count the same, and a
    few stray voxels hardly.

    Args:
        segmentations: label maps, all of one shape (depth, height, width).
        labels: the values that count.
        axis: 0, 1 or 2.

    Returns:
        The index along ``axis``; the middle where no label is shown anywhere.
    """
    areas = np.array([_areas(segmentation, labels, axis) for segmentation in segmentations], dtype=float)
    if not areas.any():
        return int(segmentations[0].shape[axis]) // 2
    share_of_largest = areas / np.maximum(areas.max(axis=2, keepdims=True), 1)
    return int(np.argmax(share_of_largest.sum(axis=(0, 1))))


def _areas(segmentation: NDArray[np.integer], labels: Sequence[int], axis: int) -> NDArray[np.integer]:
    """Voxels of each label on each slice, ``(labels, slices)``."""
    slices = (np.maximum(pixels, 0).astype(np.int64).ravel() for pixels in np.moveaxis(segmentation, axis, 0))
    return np.array([np.bincount(pixels, minlength=max(labels) + 1)[list(labels)] for pixels in slices]).T


def read_volume(file: Path) -> sitk.Image:
    """The volume in the orientation that ``Plane`` expects."""
    volume = read_image(file)
    if volume.GetDimension() != 3 or volume.GetNumberOfComponentsPerPixel() != 1:
        raise E2ENetError(f"{file} is not a 3D image of one channel: expected one; overlays are made of 3D scans only")
    return sitk.DICOMOrient(volume, "LPS")


def read_on_grid_of(volume: sitk.Image, file: Path, image: Path) -> NDArray[np.integer]:
    """The voxels of a segmentation, ``(depth, height, width)``, of a volume that was read from the file ``image``."""
    segmentation = read_volume(file)
    difference = Geometry.of(segmentation).difference(Geometry.of(volume), image)
    if difference is not None:
        raise E2ENetError(f"{file} has {difference}: expected the same grid; give the segmentation of this image")
    voxels: NDArray[np.integer] = sitk.GetArrayFromImage(segmentation)
    return voxels


@rc_context({"text.parse_math": False})  # names may hold $
def _draw(
    image: NDArray[np.floating],
    columns: Mapping[str, NDArray[np.integer]],
    labels: Mapping[int, str],
    spacing: tuple[float, float, float],
) -> Figure:
    """The figure; arrays have the shape (depth, height, width), the spacing is in mm in this order."""
    heights = _row_heights(image.shape, spacing)
    width = COLUMN_WIDTH_INCHES * len(columns) + 0.4
    columns_of_legend = legend_columns(width, list(labels.values()), FONT_SIZE)
    legend_rows = math.ceil(len(labels) / columns_of_legend)
    inches = (width, sum(heights) + 0.6 + 0.35 * legend_rows)
    figure = Figure(figsize=inches, dpi=DOTS_PER_INCH, layout="constrained")
    rows = figure.subplots(len(PLANES), len(columns), squeeze=False, height_ratios=heights)
    low, high = np.percentile(image, [0.5, 99.5])
    for plane, row in zip(PLANES, rows, strict=True):
        index = best_slice(list(columns.values()), list(labels), plane.axis)
        for segmentation, cell in zip(columns.values(), row, strict=True):
            draw_slice(cell, cut(image, plane, index), plane, spacing, (low, high), "nearest")
            labelled = cut(segmentation, plane, index)
            for rank, label in enumerate(labels):
                x, y, mask = outlined(labelled == label, plane, spacing)
                if mask.any():
                    colour, line_style = label_style(rank)
                    cell.contourf(x, y, mask, levels=[0.5, 1.5], colors=[colour], alpha=FILL_OPACITY)
                    cell.contour(x, y, mask, levels=[0.5], colors=[colour], linewidths=1.8, linestyles=line_style)
        row[0].set_ylabel(plane.name, fontsize=FONT_SIZE)
    for title, cell in zip(columns, rows[0], strict=True):
        cell.set_title(title, fontsize=FONT_SIZE + 2)
    legend = [_legend_entry(rank, name) for rank, name in enumerate(labels.values())]
    figure.legend(handles=legend, loc="outside lower center", ncols=columns_of_legend, fontsize=FONT_SIZE, frameon=False)
    return figure


def cut(volume: NDArray[Voxel], plane: Plane, index: int) -> NDArray[Voxel]:
    """One slice, its rows and columns in the order of the axes that are left."""
    pixels: NDArray[Voxel] = np.moveaxis(volume, plane.axis, 0)[index]
    return pixels


def draw_slice(
    cell: Axes,
    pixels: NDArray[np.floating],
    plane: Plane,
    spacing: Sequence[float],
    window: tuple[float, float],
    interpolation: str,
) -> None:
    """One slice of a volume of this spacing; coordinates are mm from its corner."""
    tall, wide = np.multiply(pixels.shape, np.delete(spacing, plane.axis))
    origin: Literal["lower", "upper"] = "lower" if plane.superior_is_last_row else "upper"
    extent = (0, wide, 0, tall) if plane.superior_is_last_row else (0, wide, tall, 0)
    low, high = window
    cell.imshow(pixels, cmap="gray", vmin=low, vmax=high, extent=extent, origin=origin, interpolation=interpolation)
    cell.set_autoscale_on(False)
    cell.set(xticks=[], yticks=[])


def outlined(
    mask: NDArray[np.bool_], plane: Plane, spacing: Sequence[float]
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
    """Columns and rows in mm and values of a mask, for contours upon ``draw_slice``.

    A border of background closes the outline of what touches the edge of the picture.
    """
    padded = np.pad(mask, 1).astype(float)
    rows, columns = ((np.arange(n) - 0.5) * mm for n, mm in zip(padded.shape, np.delete(spacing, plane.axis), strict=True))
    return columns, rows, padded


def _row_heights(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> list[float]:
    """Inches of each plane's row; one inch is the same number of millimetres in all of them."""
    depth, height, width = (n * mm for n, mm in zip(shape, spacing, strict=True))
    inches_per_mm = COLUMN_WIDTH_INCHES / max(height, width)
    return [inches_per_mm * mm for mm in (height, depth, depth)]


def legend_columns(inches: float, names: Collection[str], font_size: float) -> int:
    """How many entries as wide as the longest name stand side by side."""
    widest = (0.62 * max(map(len, names)) + 4.5) * font_size / 72
    return max(1, min(len(names), int(inches / widest)))


def _legend_entry(rank: int, name: str) -> Patch:
    colour, line_style = label_style(rank)
    return Patch(label=name, facecolor=to_rgba(colour, FILL_OPACITY), edgecolor=colour, linestyle=line_style, linewidth=1.8)


def label_style(rank: int) -> tuple[str, LineStyle]:
    """Colour and line style of a label by its place in the legend; all differ for up to 21 labels."""
    repetition, index = divmod(rank, len(OKABE_ITO))
    return OKABE_ITO[index], LINE_STYLES[repetition % len(LINE_STYLES)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write or replace a PNG, whole or not at all.

    Raises:
        E2ENetError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write(path, buffer.getvalue())
