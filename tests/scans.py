"""A CT scan of noise, and the DICOM series that it came as."""

from __future__ import annotations

import locale
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK

TILT = 0.2
DIRECTION = (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT), 0, np.sin(TILT), np.cos(TILT))
"""Of a scan that is turned around the axis from right to left."""


def make_scan(shape: tuple[int, int, int] = (6, 20, 24), seed: int = 0) -> SimpleITK.Image:
    """Hounsfield units, ``(depth, height, width)``."""
    values = np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)
    scan = SimpleITK.GetImageFromArray(values)
    scan.SetSpacing((0.7, 0.8, 2.5))
    scan.SetOrigin((-10.5, 20.25, -300.125))
    scan.SetDirection(DIRECTION)
    return scan


def write_dicom(
    scan: SimpleITK.Image,
    folder: Path,
    number: int = 1,
    slices: Sequence[int] | None = None,
    slopes: Sequence[float] | None = None,
    intercepts: Sequence[float] | None = None,
) -> list[Path]:
    """A CT series of one file a slice. The files are named in another order than the slices lie in.

    The voxels of ``scan`` are the numbers that are stored. A number stands for ``slope * number + intercept``; each file has a
    slope and an intercept of its own, 1 and 0 unless given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    d = scan.GetDirection()
    uid = f"1.2.826.0.1.3680043.2.1125.{number}"
    tags = {
        "0008|0060": "CT",
        "0008|103e": f"Abdomen {number}",
        "0020|000d": "1.2.826.0.1.3680043.2.1125",
        "0020|000e": uid,
        "0020|0011": str(number),
        "0020|0052": "1.2.826.0.1.3680043.2.1125.0",
        "0020|0037": "\\".join(f"{x:.12g}" for x in (d[0], d[3], d[6], d[1], d[4], d[7])),
        "0028|1052": "0",
        "0028|1053": "1",
    }
    files = []
    chosen = range(scan.GetDepth()) if slices is None else slices
    for i, slope, intercept in zip(chosen, slopes or [1] * len(chosen), intercepts or [0] * len(chosen), strict=True):
        position = scan.TransformIndexToPhysicalPoint((0, 0, i))
        own = {"0020|0032": "\\".join(f"{x:.12g}" for x in position), "0008|0018": f"{uid}.{i + 1}", "0020|0013": str(i + 1)}
        image = scan[:, :, i]
        for tag, value in {**tags, **own}.items():
            image.SetMetaData(tag, value)
        files.append(folder / f"IM{number}{(7 * i) % 100:03d}")
        writer.SetFileName(f"{files[-1]}.dcm")
        with same_locale():
            writer.Execute(image)
        Path(f"{files[-1]}.dcm").rename(files[-1])  # as on many discs, without an ending
        _rescale(files[-1], slope, intercept)
    return files


@contextmanager
def same_locale() -> Iterator[None]:
    """SimpleITK's writer of DICOM leaves its process in the locale C, where Python reads and writes files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _rescale(file: Path, slope: float, intercept: float) -> None:
    """Changes the elements alone; SimpleITK's writer would divide the voxels by the slope."""
    content = file.read_bytes()
    for element, before, after in ((0x1052, "0", intercept), (0x1053, "1", slope)):
        former, new = (_decimal_string(element, text) for text in (before, f"{after:.12g}"))
        assert content.count(former) == 1
        content = content.replace(former, new)
    file.write_bytes(content)


def _decimal_string(element: int, text: str) -> bytes:
    """An element of group 0028, with an implicit type: group, element, length, value of an even length."""
    value = (text + " " * (len(text) % 2)).encode()
    return b"".join(number.to_bytes(size, "little") for number, size in ((0x28, 2), (element, 2), (len(value), 4))) + value


def assert_same_place(image: SimpleITK.Image, other: SimpleITK.Image, tolerance: float = 1e-5) -> None:
    assert image.GetSize() == other.GetSize()
    for ours, theirs in ((image.GetSpacing(), other.GetSpacing()), (image.GetOrigin(), other.GetOrigin())):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    np.testing.assert_allclose(image.GetDirection(), other.GetDirection(), atol=tolerance)
