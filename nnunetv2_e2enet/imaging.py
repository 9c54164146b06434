"""Images and their headers from files, with SimpleITK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import SimpleITK

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.machine import is_out_of_memory


@contextmanager
def readable(what: object) -> Iterator[None]:
    """An error of SimpleITK, or of another reader of nnU-Net's, becomes an E2ENetError that says what could not be read."""
    try:
        yield
    except Exception as error:  # each of the libraries that read images has errors of its own
        if isinstance(error, E2ENetError) or is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        raise E2ENetError(
            f"{what} cannot be read as an image ({reason}): expected a whole image file; check the path"
        ) from error


def read_image(file: Path) -> SimpleITK.Image:
    """Raises E2ENetError where it cannot be read."""
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
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    with readable(called or file):
        reader.ReadImageInformation()
    return reader
