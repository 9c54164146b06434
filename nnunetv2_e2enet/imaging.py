"""Images and their headers from files, with SimpleITK."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path
from struct import unpack_from
from typing import IO, Any, cast

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import read_json
from nnunetv2_e2enet.machine import is_out_of_memory

GZIP = b"\x1f\x8b"
"""First bytes of a compressed file, whatever it is called."""
LONGEST_HEADER = 540
"""Bytes of the header of NIfTI-2; those of NIfTI-1 and Analyze have 348, that of GIPL has 256."""
GIPL_BITS = {1: 8, 7: 8, 8: 8, 15: 16, 16: 16, 31: 32, 32: 32, 64: 32, 65: 64}
"""Bits of a voxel, by GIPL's numbers for types."""

SHEARED = "orthonormal direction cosines"
"""Words of SimpleITK's error about a NIfTI file whose axes are not at right angles."""

WITHOUT_SPACING = (".tif", ".tiff", ".png", ".bmp")
"""Formats whose own spacings nnU-Net's readers leave aside."""
SAME_PLACE = 0.1
"""Voxels by which the origins of two images on one grid may differ."""
SAME_SPACING = 1e-5
"""Relative difference of the spacings of two channels that nnU-Net's readers accept."""


@dataclass(frozen=True)
class Geometry:
    """Places of the voxels of an image: voxels and mm per axis, mm of the first voxel, direction cosines."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: SimpleITK.Image | SimpleITK.ImageFileReader) -> Geometry:
        """The geometry of an image, or of a header from ``read_header``."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def difference(self, other: Geometry, called: object, spacing: float = 1e-3) -> str | None:
        """The difference to another geometry in words; None where both are the same grid.

        Args:
            other: to compare with.
            called: its name in these words.
            spacing: relative difference of spacings that counts as none.
        """
        if self.size != other.size:
            return f"{times(self.size)} voxels, {called} has {times(other.size)}"
        if not np.allclose(self.spacing, other.spacing, rtol=spacing):
            return f"spacing {times(self.spacing)} mm, {called} has {times(other.spacing)}"
        if not np.allclose(self.direction, other.direction, atol=1e-3):
            return f"axes that point elsewhere than those of {called}"
        if not np.allclose(self.origin, other.origin, atol=SAME_PLACE * min(self.spacing)):
            return f"origin {_listed(self.origin)} mm, {called} has {_listed(other.origin)}"
        return None


def times(values: Iterable[float]) -> str:
    """Sizes along axes in words, such as ``20 x 30 x 31``."""
    return " x ".join(f"{value:g}" for value in values)


def _listed(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def read_grid(file: Path, called: Path | None = None) -> Geometry:
    """The geometry of an image file, with the spacing that nnU-Net's reader of the format takes.

    Pixels of pictures count as 1 mm. The spacing of a 3D TIFF file is in a JSON file beside it, in the order of numpy's axes.

    Args:
        file: of an image.
        called: what an error names instead of the file.

    Raises:
        E2ENetError: one of the files cannot be read, or the JSON file holds no spacing of these axes.
    """
    geometry = Geometry.of(read_header(file, called))
    if file.suffix.lower() not in WITHOUT_SPACING:
        return geometry
    axes = len(geometry.size)
    beside = file.with_suffix(".json")
    if axes < 3 or not beside.is_file():
        return replace(geometry, spacing=(1.0,) * axes)
    spacing: Any = read_json(beside).get("spacing")
    of_numbers = isinstance(spacing, list) and all(isinstance(mm, (int, float)) and 0 < mm < inf for mm in spacing)
    if not of_numbers or len(spacing) != axes:
        raise E2ENetError(f"{beside} has the spacing {spacing}: expected {axes} lengths in mm, as nnU-Net's reader does")
    return replace(geometry, spacing=tuple(float(mm) for mm in reversed(spacing)))


def check_one_grid(files: Sequence[Path], called: Sequence[Path] | None = None) -> None:
    """Raises E2ENetError unless the voxels of all images lie in the same places.

    Args:
        files: of the images.
        called: what an error names instead of them.
    """
    names = files if called is None else called
    first, *others = (read_grid(file, called=name) for file, name in zip(files, names, strict=True))
    for geometry, name in zip(others, names[1:], strict=True):
        difference = geometry.difference(first, names[0], spacing=SAME_SPACING)
        if difference is not None:
            raise E2ENetError(f"{name} has {difference}: resample the channels to one grid")


def check_name(path: Path) -> None:
    """Raises E2ENetError where a path is no UTF-8, as names in an old archive; SimpleITK would end the process.

    Args:
        path: of a file or a folder, to be called before SimpleITK, or a reader that may use it, sees the path.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise E2ENetError(f"{shown} is no UTF-8, as SimpleITK expects names to be: rename the file, or its folder") from error


@contextmanager
def readable(what: object) -> Iterator[None]:
    """An error of SimpleITK, or of another reader of nnU-Net's, becomes an E2ENetError that says what could not be read."""
    try:
        yield
    except Exception as error:  # each of the libraries that read images has errors of its own
        if isinstance(error, E2ENetError) or is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[-200:]
        if SHEARED in text:
            raise E2ENetError(
                f"{what} has axes that are not at right angles (a sheared affine), which SimpleITK does not read: expected "
                "axes at right angles; resample it to such a grid"
            ) from error
        reason = f"{type(error).__name__}: {text}" if text else "its reader's reason is above"
        raise E2ENetError(
            f"{what} cannot be read as an image ({reason}): expected a whole image file; check the path"
        ) from error


def check_finite(voxels: NDArray[Any], called: object) -> None:
    """Raises E2ENetError where voxels are infinite or no numbers: networks spread these over a patch or a whole image.

    Args:
        voxels: of an image.
        called: its name in an error.
    """
    wrong = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if wrong:
        raise E2ENetError(
            f"{called} has {wrong:,} voxels that are not finite (NaN or infinite): expected numbers; replace them"
        )


def is_nifti(file: Path) -> bool:
    """Whether the name of a file says so."""
    return file.name.endswith((".nii", ".nii.gz"))


def is_gipl(file: Path) -> bool:
    """Whether the name of a file says so."""
    return file.name.endswith((".gipl", ".gipl.gz"))


def check_whole(file: Path) -> None:
    """Raises E2ENetError where a NIfTI, Analyze or GIPL file ends too early; SimpleITK reads other voxels, and says nothing.

    Also where the name of a file of any format is no UTF-8. MetaImage, NRRD, MINC and HDF5 files have errors of their own
    about their ends. VTK and TIFF files have none, and are not checked. The last four bytes of a compressed file tell its
    size; where they do not fit, the file is decompressed to its end.
    """
    check_name(file)
    parts = _parts(file)
    if parts is None:
        return
    header, voxels = parts
    with readable(file):
        with _content(header) as content:
            shape, bits, offset = (_sizes_of_gipl if is_gipl(file) else _sizes)(content.read(LONGEST_HEADER))
        expected = offset + prod(shape) * bits // 8
        found = _bytes_within(voxels, expected)
    if found < expected:
        raise E2ENetError(
            f"{voxels} ends after {found:,} of {expected:,} bytes: expected a whole image file; copy it again or write it anew"
        )


def _parts(file: Path) -> tuple[Path, Path] | None:
    """Files of the header and of the voxels, the same or a pair; None of a format that is not checked."""
    if is_nifti(file) or is_gipl(file):
        return file, file
    named = re.fullmatch(r"(.+)\.(hdr|img)(\.gz)?", file.name)
    if named is None:
        return None
    header, voxels = (
        next(filter(Path.is_file, (file.with_name(f"{named[1]}{end}{gz}") for gz in ("", ".gz"))), None)
        for end in (".hdr", ".img")
    )
    return None if header is None or voxels is None else (header, voxels)


def _content(file: Path) -> IO[bytes]:
    """The decompressed bytes of a file, whatever it is called."""
    with file.open("rb") as stored:
        compressed = stored.read(2) == GZIP
    return cast(IO[bytes], gzip.open(file)) if compressed else file.open("rb")


def _sizes(header: bytes) -> tuple[tuple[int, ...], int, int]:
    """Voxels along each axis, bits of a voxel, and bytes before the first voxel, from the header of NIfTI or Analyze."""
    for order in "<>":
        length, *_ = unpack_from(f"{order}i", header)
        if length == 348:
            dims, bits = unpack_from(f"{order}8h", header, 40), unpack_from(f"{order}h", header, 72)
            return dims[1 : 1 + dims[0]], bits[0], int(*unpack_from(f"{order}f", header, 108))
        if length == LONGEST_HEADER:
            dims, bits = unpack_from(f"{order}8q", header, 16), unpack_from(f"{order}h", header, 14)
            return dims[1 : 1 + dims[0]], bits[0], *unpack_from(f"{order}q", header, 168)
    raise ValueError("the header is none of NIfTI")


def _sizes_of_gipl(header: bytes) -> tuple[tuple[int, ...], int, int]:
    """The same from the header of GIPL."""
    *shape, kind = unpack_from(">5H", header)
    return tuple(max(1, n) for n in shape), GIPL_BITS[kind], 256


def _bytes_within(file: Path, expected: int) -> int:
    """Bytes that a file holds, compressed or not, or ``expected`` where the last bytes say that these are all."""
    with file.open("rb") as stored:
        if stored.read(2) != GZIP:
            return file.stat().st_size
        stored.seek(-4, os.SEEK_END)
        if int.from_bytes(stored.read(), "little") == expected % 2**32:
            return expected
    found = 0
    with _content(file) as content:
        try:
            while block := content.read1(2**16):  # type: ignore[attr-defined]
                found += len(block)
        except (EOFError, OSError, zlib.error):  # it ends early, if only without its checksum
            found = min(found, expected - 1)
    return found


def read_image(file: Path) -> SimpleITK.Image:
    """Raises E2ENetError where it cannot be read."""
    check_whole(file)
    with readable(file):
        return SimpleITK.ReadImage(str(file))


def read_header(file: Path, called: Path | None = None) -> SimpleITK.ImageFileReader:
    """Size, spacing and the like without the voxels.

    Args:
        file: of an image.
        called: what an error names instead of the file.

    Raises:
        E2ENetError: it cannot be read.
    """
    check_name(file)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    with readable(called or file):
        reader.ReadImageInformation()
    return reader
