"""Volumes of segmented labels, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from filelock import BaseFileLock, FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import write
from nnunetv2_e2enet.imaging import check_whole, readable

_THICKNESS_OF_2D = 999
"""In pixels: what nnU-Net's readers give 2D images, so that nothing is resampled along it."""
HEADER = ("case", "label", "millilitres")


def check_volumes(images: Sequence[Path], model: PackedModel) -> None:
    """Raises E2ENetError unless these images, each the first channel of a case, have voxels with a volume."""
    reader = model.description.managers()[0].image_reader_writer_class()
    for image in images[:1]:
        with readable(image):
            thickness, *in_plane = reader.read_images([str(image)])[1]["spacing"]
        if thickness >= _THICKNESS_OF_2D * max(in_plane):
            raise E2ENetError(f"--volumes: {image} is a 2D image, whose pixels have no volume; leave it out")


def write_volumes(file: Path, segmentations: Sequence[Path], model: PackedModel, progress: bool = False) -> None:
    """Writes a CSV file: a row for each segmentation and each label or region but the background.

    Rows of other cases that the file had stay where their segmentations lie beside it still. A lock, the hidden file
    ``.NAME.lock`` beside it, makes commands that end at the same time wait for each other.

    Args:
        file: to write.
        segmentations: of the model, with the file ending of its data set. Their names are those of the cases.
        model: a packed model, whose labels are counted.
        progress: show a bar.

    Raises:
        E2ENetError: the file cannot be locked or written, or a segmentation ends too early.
    """
    reader = model.description.managers()[0].image_reader_writer_class()
    ending = model.description.dataset["file_ending"]
    measured: list[list[str]] = []
    for path in tqdm(segmentations, desc="Volumes", disable=not progress):
        check_whole(path)
        segmentation, properties = reader.read_seg(str(path))
        counts = count_values(segmentation[0])
        for name, values in model.foreground.items():
            volume = millilitres(counts, values, properties["spacing"])
            measured.append([path.name.removesuffix(ending), name, f"{volume:.3f}"])
    cases = {path.name.removesuffix(ending) for path in segmentations}
    with _locked(file):
        others = [row for row in _rows_of(file) if row[0] not in cases and (file.parent / f"{row[0]}{ending}").is_file()]
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([HEADER, *sorted(others + measured, key=lambda row: row[0])])
        write(file, text.getvalue())


def _locked(file: Path) -> AbstractContextManager[BaseFileLock]:
    """The lock of a table, released at the end of its context."""
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        return lock.acquire()
    except (OSError, NotImplementedError) as error:  # of a network's file system
        raise E2ENetError(
            f"cannot lock {lock.lock_file} ({error}): expected a file that you may write, on a file system with locks, so "
            "that commands keep each other's rows; name another folder with -o, or leave out --volumes"
        ) from error


def count_values(segmentation: NDArray[Any]) -> NDArray[np.int64]:
    """Voxels of each value from 0 on, slice by slice; lower values count as 0. ``segmentation`` is ``(depth, ...)``."""
    counts = np.zeros(max(int(segmentation.max()), 0) + 1, np.int64)
    for pixels in segmentation:
        counts += np.bincount(np.maximum(pixels, 0).astype(np.int64).ravel(), minlength=len(counts))
    return counts


def millilitres(counts: NDArray[np.int64], values: Sequence[int], spacing: Sequence[float]) -> float:
    """The volume of all voxels of these values, of the counts of ``count_values``; ``spacing`` in mm."""
    return prod(spacing) / 1000 * sum(int(counts[value]) for value in values if value < len(counts))


def _rows_of(file: Path) -> list[list[str]]:
    """Of an earlier file; none where there is no such file or it is no table of volumes."""
    if not file.is_file():
        return []
    header, *rows = [*csv.reader(StringIO(file.read_text(encoding="utf-8", errors="replace")))] or [[]]
    return [row for row in rows if len(row) == len(HEADER)] if tuple(header) == HEADER else []
