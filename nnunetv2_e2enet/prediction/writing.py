"""Segmentations that appear whole or not at all. Nothing of nnU-Net is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import check_name, check_whole, is_nifti, readable
from nnunetv2_e2enet.machine import is_out_of_memory

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter


def write_segmentation(
    file: Path, segmentation: NDArray[Any], properties: Mapping[str, Any], writer: BaseReaderWriter
) -> None:
    """A file as nnU-Net writes it, which appears whole or not at all.

    Args:
        file: to write or to replace.
        segmentation: labels, ``(depth, height, width)``.
        properties: of the image, as nnU-Net's reader gives them.
        writer: of nnU-Net's, for the format of the file.

    Raises:
        E2ENetError: the file cannot be written, or its name is no UTF-8; what was there before is left.
    """
    check_name(file)
    try:
        with TemporaryDirectory(prefix=".writing_", dir=file.parent) as folder:  # not a hidden file, which commands would find
            written = Path(folder) / file.name
            writer.write_seg(segmentation, str(written), properties)
            try:
                check_written(written, writer)
            except E2ENetError as error:
                raise OSError("only a part of it is on the disk") from error
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == file.name):  # the segmentation last
                with path.open("r+b") as content:  # Windows syncs no file that is open for reading
                    os.fsync(content.fileno())
                path.replace(file.parent / path.name)
    except (OSError, RuntimeError) as error:  # SimpleITK raises the latter
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise E2ENetError(f"cannot write {file} ({reason}): expected a folder with room and write permission") from error


def check_written(file: Path, reader: BaseReaderWriter) -> None:
    """Raises E2ENetError where a segmentation is not whole: on a full disk SimpleITK stops writing, and says nothing."""
    check_whole(file)
    if not is_nifti(file):
        with readable(file):
            reader.read_seg(str(file))
