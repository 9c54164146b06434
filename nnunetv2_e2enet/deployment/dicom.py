"""DICOM series as one image: found in a folder, checked, and read with SimpleITK (GDCM)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import read_header, read_image, readable

MODALITY, DESCRIPTION = "0008|0060", "0008|103e"
EVEN = 0.05
"""The most by which distances between slices may differ, relative to the usual one."""


@dataclass(frozen=True)
class Series:
    """Files of one DICOM series.

    Attributes:
        files: in the order of slices.
    """

    files: tuple[Path, ...]

    def __str__(self) -> str:
        tags = read_header(self.files[0])
        facts = [tags.GetMetaData(tag).strip() for tag in (MODALITY, DESCRIPTION) if tags.HasMetaDataKey(tag)]
        return f"{self.files[0]} ({', '.join([*filter(None, facts), f'{len(self.files)} slices'])})"


def is_dicom(file: Path) -> bool:
    """Whether a file that exists is read as DICOM."""
    return bool(SimpleITK.ImageFileReader.GetImageIOFromFileName(str(file)) == "GDCMImageIO")


def find_series(folder: Path) -> list[Series]:
    """All series whose files lie in a folder, without those in folders below."""
    reader = SimpleITK.ImageSeriesReader
    with _no_warnings():  # of a folder without any
        names = [reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))]
    return [Series(tuple(map(Path, files))) for files in names if files]


def choose_series(path: Path) -> Series | None:
    """The only series of a folder, or that to which a DICOM file belongs; None where there is no DICOM.

    Raises:
        E2ENetError: the folder holds several.
    """
    if path.is_dir():
        found = find_series(path)
        if len(found) > 1:
            listed = "\n".join(f"  {series}" for series in found)
            raise E2ENetError(f"{path} holds {len(found)} DICOM series: choose one, and name a file of it instead\n{listed}")
        return found[0] if found else None
    if not path.is_file() or not is_dicom(path):
        return None
    return next((s for s in find_series(path.parent) if any(path.samefile(file) for file in s.files)), Series((path,)))


def read_series(series: Series) -> SimpleITK.Image:
    """One image of all slices, with their spacing, origin and directions, in the units of the modality (Hounsfield's for CT).

    Raises:
        E2ENetError: slices are missing, lie at uneven distances or askew, differ in size, or cannot be read.
    """
    slices = [read_header(file) for file in series.files]
    if slices[0].GetNumberOfComponents() != 1:
        raise E2ENetError(f"{series} is in colour: expected a scan of one channel")
    if len(slices) == 1:
        return read_image(series.files[0])
    _check(series, slices)
    reader = SimpleITK.ImageSeriesReader()
    if len({s.GetPixelID() for s in slices}) > 1:  # each slice has a slope of its own, as in PET
        reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    reader.SetFileNames([str(file) for file in series.files])
    with readable(series):
        return reader.Execute()


def _check(series: Series, slices: Sequence[SimpleITK.ImageFileReader]) -> None:
    first = slices[0]
    alike = all(s.GetSize() == first.GetSize() and np.allclose(s.GetSpacing()[:2], first.GetSpacing()[:2]) for s in slices)
    if not alike or not all(np.allclose(s.GetDirection(), first.GetDirection(), atol=1e-3) for s in slices):
        raise E2ENetError(f"{series} has slices of several sizes or directions: expected one volume; is a scout part of it?")
    steps: NDArray[np.float64] = np.diff([s.GetOrigin() for s in slices], axis=0)
    normal = np.reshape(first.GetDirection(), (3, 3))[:, 2]
    along = np.abs(steps @ normal)
    usual = float(np.median(along))
    if usual == 0 or np.abs(along - usual).max() > EVEN * usual:
        raise E2ENetError(
            f"{series} has slices {along.min():.4g} to {along.max():.4g} mm apart: expected the same distance between all, so "
            "that none is missing and none is there twice; export the series again"
        )
    aside = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max()
    if aside > EVEN * usual:
        raise E2ENetError(
            f"{series} was taken with a tilted gantry, each slice {aside:.4g} mm beside the one before: expected slices "
            "that lie straight above each other; resample it first"
        )


@contextmanager
def _no_warnings() -> Iterator[None]:
    shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)
