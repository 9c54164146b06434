"""DICOM series as one image: found in a folder, checked, and read with SimpleITK (GDCM)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import check_readable
from nnunetv2_e2enet.imaging import check_name, read_header, read_image, readable

MODALITY, DESCRIPTION, SERIES = "0008|0060", "0008|103e", "0020|000e"
PHOTOMETRIC, PIXEL_SPACING = "0028|0004", "0028|0030"
PLACE = {"0020|0032": "ImagePositionPatient", "0020|0037": "ImageOrientationPatient"}
"""What each of several slices has to have."""
EVEN = 0.05
"""The most by which a slice may lie above or below its place in an image, relative to the distance between slices."""
ASIDE = 0.5
"""The most by which a slice may lie beside its place, in pixels; directions are often rounded."""
_MARK, _MARK_AT = b"DICM", 128
"""Bytes of a DICOM file before its elements, and their place."""
_SOP_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([\d.]+)", re.DOTALL)
"""An element of the meta header: the kind of object that a file holds."""
_HEAD = 2**16
"""Bytes in which a file names its series."""
_SILENT = threading.RLock()
"""Held while SimpleITK's warnings are off, which is a switch of the process."""


@dataclass(frozen=True)
class Series:
    """Files of one DICOM series.

    Attributes:
        files: in the order of slices.
    """

    files: tuple[Path, ...]

    def __str__(self) -> str:
        tags = read_header(self.files[0])
        facts = [_value(tags, tag) for tag in (MODALITY, DESCRIPTION)]
        text = f"{self.files[0]} ({', '.join([*filter(None, facts), f'{len(self.files)} slices'])})"
        return text.encode(errors="replace").decode()  # descriptions may be in any encoding


def _value(tags: SimpleITK.ImageFileReader, tag: str) -> str:
    return str(tags.GetMetaData(tag)).strip() if tags.HasMetaDataKey(tag) else ""


def is_dicom(file: Path) -> bool:
    """Whether a file that exists is read as DICOM.

    Raises:
        E2ENetError: its name is no UTF-8.
    """
    check_name(file)
    return bool(SimpleITK.ImageFileReader.GetImageIOFromFileName(str(file)) == "GDCMImageIO")


def find_series(folder: Path) -> list[Series]:
    """All series whose files lie in a folder, without those in folders below.

    Raises:
        E2ENetError: the folder's name is no UTF-8.
    """
    check_name(folder)
    with _no_warnings():  # of a folder without any
        uids = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    return [Series(files) for files in (_files(folder, uid) for uid in uids) if files]


def _files(folder: Path, uid: str) -> tuple[Path, ...]:
    """The files of a series, in the order of slices."""
    with _no_warnings():
        return tuple(map(Path, SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)))


def choose_series(path: Path) -> Series | None:
    """The only series of a folder, or that to which a DICOM file belongs; None where there is no DICOM.

    Raises:
        E2ENetError: the folder holds several, or may not be read, or a slice in it is damaged, or a name is no UTF-8.
    """
    check_readable(path)
    if path.is_dir():
        found = find_series(path)
        if len(found) > 1:
            listed = "\n".join(f"  {series}" for series in found)
            raise E2ENetError(f"{path} holds {len(found)} DICOM series: choose one, and name a file of it instead\n{listed}")
        return _undamaged(found[0]) if found else None
    if not path.is_file() or not is_dicom(path):
        return None
    uid = _value(read_header(path), SERIES)
    files = _files(path.parent, uid) if uid else ()
    return _undamaged(Series(files if any(path.samefile(file) for file in files) else (path,)))


def _undamaged(series: Series) -> Series:
    """The series; raises E2ENetError where a file beside it is one of its slices that GDCM cannot read, and leaves out."""
    first = series.files[0]
    uid, kind = _value(read_header(first), SERIES), _SOP_CLASS.search(_head(first))
    if not uid or kind is None:
        return series
    named = re.compile(rb"(?<![\d.])" + re.escape(uid.encode()) + rb"(?![\d.])")
    names = {file.name for file in series.files}
    for file in sorted(first.parent.iterdir()):
        if file.name in names or not file.is_file():
            continue
        head = _head(file)
        other = _SOP_CLASS.search(head) if head[_MARK_AT:].startswith(_MARK) else None
        if other is not None and other[1] == kind[1] and named.search(head) and not is_dicom(file):
            raise E2ENetError(
                f"{file} cannot be read as a slice of this series: expected a whole DICOM file; copy it again, or take it away"
            )
    return series


def _head(file: Path) -> bytes:
    with readable(file), file.open("rb") as content:
        return content.read(_HEAD)


def read_series(series: Series) -> SimpleITK.Image:
    """One image of all slices, with their spacing, origin and directions, in the units of the modality (Hounsfield's for CT).

    Raises:
        E2ENetError: slices are missing, lie at uneven distances or askew, differ in size, or cannot be read; or a file holds
            several frames, each of which may have a place and a slope of its own, inverted numbers, no spacing, or no place.
    """
    slices = [read_header(file) for file in series.files]
    if slices[0].GetNumberOfComponents() != 1:
        raise E2ENetError(f"{series} is in colour: expected a scan of one channel")
    for file, each in zip(series.files, slices, strict=True):
        _check_slice(file, each)
    if len(slices) == 1:
        return read_image(series.files[0])
    for file, each in zip(series.files, slices, strict=True):
        for tag, name in PLACE.items():
            if not _value(each, tag):
                raise E2ENetError(
                    f"{file} has no {name} ({tag}), so that nobody can tell where it lies: expected the place of each slice; "
                    "export the series again"
                )
    first = slices[0]
    alike = all(s.GetSize() == first.GetSize() and np.allclose(s.GetSpacing()[:2], first.GetSpacing()[:2]) for s in slices)
    if not alike or not all(np.allclose(s.GetDirection(), first.GetDirection(), atol=1e-3) for s in slices):
        raise E2ENetError(f"{series} has slices of several sizes or directions: expected one volume; is a scout part of it?")
    reader = SimpleITK.ImageSeriesReader()
    if len({s.GetPixelID() for s in slices}) > 1:  # each slice has a slope of its own, as in PET
        reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    reader.SetFileNames([str(file) for file in series.files])
    with readable(series), _no_warnings():  # of uneven distances
        image = reader.Execute()
    origins = [s.GetOrigin() for s in slices]
    if misplaced(image, origins) is not None:
        raise E2ENetError(f"{series} {_why_no_volume(image, origins)}")
    return image


def _check_slice(file: Path, tags: SimpleITK.ImageFileReader) -> None:
    """Raises E2ENetError where SimpleITK would read something else than the file says, or what it does not say."""
    frames = prod(tags.GetSize()[2:])
    if frames > 1:
        raise E2ENetError(
            f"{file} holds {frames} frames: expected a file for each slice; convert it to one file a slice, or to NIfTI"
        )
    if _value(tags, PHOTOMETRIC) == "MONOCHROME1":
        raise E2ENetError(
            f"{file} is MONOCHROME1, whose numbers are inverted when they are read: expected MONOCHROME2; export the series "
            "as such"
        )
    if tags.GetSpacing()[:2] == (1, 1) and not re.fullmatch(r"(1(\.0*)?\s*\\?\s*){2}", _value(tags, PIXEL_SPACING)):
        raise E2ENetError(
            f"{file} has no PixelSpacing ({PIXEL_SPACING}) that is read, so that its pixels would count as 1 x 1 mm: expected "
            "the distances of pixels in mm; export the series again, or convert it to NIfTI with the right spacing"
        )


def misplaced(image: SimpleITK.Image, origins: Sequence[Sequence[float]]) -> int | None:
    """Number of the first slice of a 3D image that lies elsewhere than its file; None where all lie in their places.

    Args:
        image: of as many slices as there are files.
        origins: of the first pixel of each file, mm.
    """
    along, aside = _apart(image, np.array(origins, float) - _places(image))
    *pixel, distance = image.GetSpacing()
    wrong = np.flatnonzero(~((np.abs(along) <= EVEN * distance) & (aside <= ASIDE * min(pixel))))  # NaN, too
    return int(wrong[0]) if len(wrong) else None


def _places(image: SimpleITK.Image) -> NDArray[np.float64]:
    """Places of the first pixel of each slice, mm: ``(depth, 3)``."""
    return np.array([image.TransformIndexToPhysicalPoint((0, 0, i)) for i in range(image.GetDepth())])


def _apart(image: SimpleITK.Image, vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Components of vectors ``(n, 3)``: along the normal of the slices, with its sign, and the length of the rest."""
    normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
    along = vectors @ normal
    return along, np.linalg.norm(vectors - np.outer(along, normal), axis=1)


def _why_no_volume(image: SimpleITK.Image, origins: Sequence[Sequence[float]]) -> str:
    """What is wrong with the places of the slices, and what to do, as the end of a message."""
    along, aside = _apart(image, np.diff(origins, axis=0))
    in_all_along, in_all_aside = _apart(image, np.array(origins, float) - _places(image))
    if in_all_aside.max() > np.abs(in_all_along).max():
        return (
            f"was taken with a tilted gantry, each slice {aside.max():.4g} mm beside the one before: expected slices "
            "that lie straight above each other; resample it first"
        )
    return (
        f"has slices {along.min():.4g} to {along.max():.4g} mm apart: expected the same distance between all, so that none is "
        "missing and none is there twice; export the series again"
    )


@contextmanager
def _no_warnings() -> Iterator[None]:
    with _SILENT:
        shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)
