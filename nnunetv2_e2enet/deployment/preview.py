"""A picture of one segmentation to look at before anything is done with it: contours in three planes of the scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray

from nnunetv2_e2enet.deployment.volumes import count_values, millilitres
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.overlay import (
    DOTS_PER_INCH,
    LINE_STYLES,
    OKABE_ITO,
    PLANES,
    LineStyle,
    Plane,
    best_slice,
    cut,
    draw_slice,
    label_style,
    legend_columns,
    outlined,
    read_on_grid_of,
    read_volume,
    save_figure,
)

Window = tuple[float, float]
SOFT_TISSUE: Window = (-160.0, 240.0)
"""What a CT shows from black to white, in Hounsfield units: radiology's window of width 400 at level 40."""

EDGES = {"Axial": "RLAP", "Coronal": "RLHF", "Sagittal": "APHF"}
"""Where the left, right, upper and lower edge of a plane lie in the patient; DICOM's letters (H for head, F for feet)."""
POSITIVE, NEGATIVE = "HPL", "FAR"
"""Letters of the three axes of a volume (depth, height, width), in the directions of growing and falling coordinates."""

WIDTH_INCHES, MOST_INCHES, MARGIN_INCHES, HEADING_INCHES = 10.0, 20.0, 0.08, 0.36
FONT_SIZE, SMALL = 10.0, 8.0
FONT_SIZES = (FONT_SIZE, SMALL, 6.5)
MOST_STYLES = len(OKABE_ITO) * len(LINE_STYLES)
PAPER, INK, QUIET = "black", "#E8E8E8", "#9A9A9A"
LINE_WIDTH = 1.3
HALO: list[AbstractPathEffect] = [withStroke(linewidth=LINE_WIDTH + 1.5, foreground=(0, 0, 0, 0.6))]
"""Around lines and letters, for those on bright tissue."""


@dataclass(frozen=True)
class Scan:
    """What is drawn.

    Attributes:
        image: in the orientation of ``Plane``, ``(depth, height, width)``.
        segmentation: label map of the same shape.
        spacing: mm in the same order.
        grid: where the voxels lie in the patient.
        window: intensities that are black and white.
    """

    image: NDArray[np.floating]
    segmentation: NDArray[np.integer]
    spacing: tuple[float, float, float]
    grid: sitk.Image
    window: Window

    @property
    def size(self) -> tuple[float, float, float]:
        """Millimetres along depth, height and width."""
        depth, height, width = (n * mm for n, mm in zip(self.image.shape, self.spacing, strict=True))
        return depth, height, width

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        return count_values(self.segmentation)

    def volume(self, values: Sequence[int]) -> float:
        """Millilitres of all voxels with one of these values."""
        return millilitres(self._counts, values, self.spacing)

    @cached_property
    def places(self) -> list[int]:
        """The slice that each plane shows."""
        values = [int(value) for value in np.unique(self.segmentation) if value]
        return [best_slice([self.segmentation], values or [1], plane.axis) for plane in PLANES]


def write_preview(path: Path, image: Path, segmentation: Path, labels: Mapping[str, Sequence[int]], ct: bool = False) -> None:
    """Write a PNG with the contours of one segmentation in an axial, a coronal and a sagittal plane, whole or not at all.

    Each plane lies where the labels have their largest extent (``best_slice``). All three are drawn to the same scale, in the
    radiological convention: the patient's right is on the left. The legend has the volume of each label.

    Args:
        path: the PNG to write or to replace, in a folder that exists.
        image: a 3D image file that SimpleITK reads.
        segmentation: its label map.
        labels: name to the values that belong to it: one, or those of a region; at least one name.
        ct: whether the image is in Hounsfield units, which are shown in the window of soft tissue. Of another image, 0.5 % of
            the voxels are black and as many white.

    Raises:
        E2ENetError: an unreadable file, not 3D, grids that differ, no label, or a PNG that cannot be written.
    """
    if not labels:
        raise E2ENetError("a preview without labels: expected at least one")
    volume = read_volume(image)
    voxels = read_on_grid_of(volume, segmentation, image)
    array = sitk.GetArrayFromImage(volume)
    depth, height, width = volume.GetSpacing()[::-1]
    low, high = SOFT_TISSUE if ct else np.percentile(array, [0.5, 99.5])
    scan = Scan(array, voxels, (depth, height, width), volume, (float(low), float(high)))
    save_figure(_draw(scan, path.stem, labels), path)


def _draw(scan: Scan, title: str, labels: Mapping[str, Sequence[int]]) -> Figure:
    """Axial above coronal, the sagittal plane beside it, and the legend in the corner that is left."""
    depth, height, width = scan.size
    per_mm = min((WIDTH_INCHES - 3 * MARGIN_INCHES) / (width + height), MOST_INCHES / (height + depth))
    left, right, upper, lower = (mm * per_mm for mm in (width, height, height, depth))
    inches = (left + right + 3 * MARGIN_INCHES, upper + lower + 2 * MARGIN_INCHES + HEADING_INCHES)
    figure = Figure(figsize=inches, dpi=DOTS_PER_INCH, facecolor=PAPER)

    def axes(x: float, y: float, across: float, up: float) -> Axes:
        """Places in inches from the lower left corner."""
        return figure.add_axes((x / inches[0], y / inches[1], across / inches[0], up / inches[1]), facecolor=PAPER)

    second, above = left + 2 * MARGIN_INCHES, lower + 2 * MARGIN_INCHES
    cells = (
        axes(MARGIN_INCHES, above, left, upper),
        axes(MARGIN_INCHES, MARGIN_INCHES, left, lower),
        axes(second, MARGIN_INCHES, right, lower),
    )
    for plane, cell in zip(PLANES, cells, strict=True):
        _draw_plane(cell, scan, plane, labels)
    _draw_scale(cells[0], width)
    low, high = scan.window
    figure.text(
        MARGIN_INCHES / inches[0],
        1 - 0.24 / inches[1],
        title,
        color=INK,
        fontsize=FONT_SIZE + 1,
        weight="bold",
        parse_math=False,
    )
    shown = f"window {low:.0f} to {high:.0f} HU" if scan.window == SOFT_TISSUE else f"grey values {low:.3g} to {high:.3g}"
    figure.text(1 - MARGIN_INCHES / inches[0], 1 - 0.24 / inches[1], shown, color=QUIET, ha="right", size=SMALL)
    _draw_legend(axes(second, above, right, upper), scan, labels, (right, upper))
    return figure


def _draw_plane(cell: Axes, scan: Scan, plane: Plane, labels: Mapping[str, Sequence[int]]) -> None:
    index = scan.places[PLANES.index(plane)]
    draw_slice(cell, cut(scan.image, plane, index), plane, scan.spacing, scan.window, "bilinear")
    cell.set_axis_off()
    labelled = cut(scan.segmentation, plane, index)
    for name, rank in _ranks(scan, labels).items():
        x, y, mask = outlined(np.isin(labelled, list(labels[name])), plane, scan.spacing)
        if mask.any():
            colour, line_style = _style(rank)
            lines = cell.contour(x, y, mask, levels=[0.5], colors=[colour], linewidths=LINE_WIDTH, linestyles=line_style)
            lines.set_path_effects(HALO)
    _mark_other_planes(cell, scan, plane)
    _write_on(cell, scan, plane, index)


def _ranks(scan: Scan, labels: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """What colours and lines go by: the place of a label among all, or among those found where all are too many to differ."""
    names = list(labels) if len(labels) <= MOST_STYLES else [name for name in labels if scan.volume(labels[name])]
    return {name: rank for rank, name in enumerate(names)}


def _style(rank: int) -> tuple[tuple[float, float, float], LineStyle]:
    """As in other pictures, a little lighter for the black background."""
    colour, line_style = label_style(rank)
    red, green, blue = (0.8 * part + 0.2 for part in to_rgb(colour))
    return (red, green, blue), line_style


def _mark_other_planes(cell: Axes, scan: Scan, plane: Plane) -> None:
    """Ticks at the edges, where the other two planes cut this one."""
    down, across = ((scan.places[axis] + 0.5) * scan.spacing[axis] for axis in range(3) if axis != plane.axis)
    for start, end in ((0.0, 0.04), (0.96, 1.0)):
        for line in (cell.axhline(down, start, end), cell.axvline(across, start, end)):
            line.set(color=QUIET, linewidth=0.8, path_effects=HALO)


def _write_on(cell: Axes, scan: Scan, plane: Plane, index: int) -> None:
    """The name of the plane, its place in the patient, and where the edges lie."""
    middle = [(n - 1) / 2 for n in scan.grid.GetSize()]
    middle[2 - plane.axis] = index
    place = scan.grid.TransformContinuousIndexToPhysicalPoint(middle)[2 - plane.axis]
    letter = (POSITIVE if place >= 0 else NEGATIVE)[plane.axis]
    style: dict[str, Any] = {"transform": cell.transAxes, "color": INK, "size": FONT_SIZE, "path_effects": HALO}
    cell.text(0.02, 0.98, f"{plane.name}\n{letter} {abs(place):.0f} mm", ha="left", va="top", **style)
    left, right, upper, lower = tuple(EDGES[plane.name])
    cell.text(0.02, 0.5, left, ha="left", va="center", **style)
    cell.text(0.98, 0.5, right, ha="right", va="center", **style)
    cell.text(0.5, 0.98, upper, ha="center", va="top", **style)
    cell.text(0.5, 0.02, lower, ha="center", va="bottom", **style)


def _draw_scale(cell: Axes, width: float) -> None:
    """A bar of a round number of millimetres, for all planes."""
    mm = max((n for n in (5, 10, 20, 50, 100) if n <= width / 4), default=1)
    start = 1 - 0.03 - mm / width
    style: dict[str, Any] = {"color": INK, "transform": cell.transAxes, "path_effects": HALO}
    cell.plot([start, 0.97], [0.03, 0.03], linewidth=2, **style)
    text = f"{mm // 10} cm" if mm >= 10 else f"{mm} mm"
    cell.text(start + mm / width / 2, 0.04, text, size=SMALL, ha="center", va="bottom", **style)


def _draw_legend(cell: Axes, scan: Scan, labels: Mapping[str, Sequence[int]], inches: tuple[float, float]) -> None:
    """Names and volumes of the labels that were found, then names of the others; as many as there is room for."""
    cell.set_axis_off()
    ranks = _ranks(scan, labels)
    found = [
        (Line2D([], [], color=colour, linestyle=line_style, linewidth=2), f"{name}, {_millilitres(scan.volume(labels[name]))}")
        for name, (colour, line_style) in ((name, _style(rank)) for name, rank in ranks.items())
        if scan.volume(labels[name])
    ]
    nothing = Line2D([], [], color="none")
    entries = found + [(nothing, f"{name}, not found") for name in labels if not scan.volume(labels[name])]
    width, height = inches
    for size in FONT_SIZES:
        columns, rows = legend_columns(width, [text for _, text in entries], size), max(1, int(72 * height / (1.5 * size)))
        if len(entries) <= rows * columns:
            break
    else:
        left_out = len(entries) - rows * columns + 1
        others = "others, not found" if left_out <= len(entries) - len(found) else "more"
        entries = [*entries[:-left_out], (nothing, f"and {left_out} {others}")]
    handles, texts = zip(*entries, strict=True)
    columns = ceil(len(entries) / rows)
    legend = cell.legend(handles, texts, loc="center", ncols=columns, fontsize=size, frameon=False, labelspacing=0.3)
    for written, text in zip(legend.get_texts(), texts, strict=True):
        written.set_color(QUIET if text.endswith("not found") else INK)
        written.set_parse_math(False)


def _millilitres(volume: float) -> str:
    if volume < 0.1:
        return "less than 0.1 ml"
    return f"{volume:,.0f} ml" if volume >= 10 else f"{volume:.1f} ml"
