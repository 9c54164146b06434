"""What ``e2enet predict`` takes, as a folder of images that nnU-Net takes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK

from nnunetv2_e2enet.deployment.dicom import choose_series, read_series
from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.files import check_readable
from nnunetv2_e2enet.imaging import (
    WITHOUT_SPACING,
    Geometry,
    check_finite,
    check_name,
    check_one_grid,
    check_whole,
    is_gipl,
    read_header,
    read_image,
    readable,
)
from nnunetv2_e2enet.machine import is_out_of_memory
from nnunetv2_e2enet.prediction.writing import check_written

WRITTEN = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
"""Endings of files with a geometry, which SimpleITK writes and nnU-Net's readers read."""

THREE_AXES = 3


@contextmanager
def folder_of_images(paths: Sequence[Path], model: PackedModel) -> Iterator[Path]:
    """A folder of images, named as nnU-Net wants them.

    Args:
        paths: such a folder alone, which is given back; or one image, a path for each channel of the model: a file that
            SimpleITK reads, a folder of DICOM slices, or one of the slices; or one file in the model's format that holds all
            channels. The case is called as the first of them.
        model: says which channels and which file ending are expected.

    Raises:
        E2ENetError: there is no such image, it cannot be read, not as many channels are given as the model has, or there is
            no temporary folder with room.
    """
    ending = model.description.dataset["file_ending"]
    for path in paths:
        check_readable(path)
        if not path.exists():
            raise E2ENetError(f"{path} does not exist: expected a folder of images, a DICOM series, or an image")
    if len(paths) == 1 and any(paths[0].glob(f"*_0000{ending}")):
        yield paths[0]
        return
    if len(paths) != len(model.channels) and not (len(paths) == 1 and _holds_all_channels(paths[0], model)):
        raise E2ENetError(
            f"{len(paths)} images are given with -i, but the model has the channels {', '.join(model.channels)}: expected an "
            f"image for each, in this order, or a folder of images named as nnU-Net wants them (*_0000{ending})"
        )
    with temporary_folder() as temporary:
        folder, case = Path(temporary), case_name(paths[0])
        files = [folder / f"{case}_{i:04d}{ending}" for i in range(len(paths))]
        for path, file in zip(paths, files, strict=True):
            _put(path, file, ending)
        spacing = paths[0].with_name(f"{case}.json")  # where nnU-Net's reader of 3D TIFF files looks for it
        if ending in WITHOUT_SPACING and spacing.is_file():
            _link(spacing, folder / spacing.name)
        if ending in WRITTEN:
            check_one_grid(files, paths)
        yield folder


def temporary_folder() -> TemporaryDirectory[str]:
    """A new folder, which is gone after its context; raises E2ENetError where none can be made."""
    try:
        return TemporaryDirectory(prefix="e2enet_")
    except OSError as error:
        raise E2ENetError(
            f"no temporary folder can be made ({error}): expected a folder with room and write permission; make room there, "
            "or name another one with the variable TMPDIR"
        ) from error


def check_channels(images: Sequence[Path], model: PackedModel) -> None:
    """Raises E2ENetError where a case lacks a channel, or its channels are not on one grid.

    Also where it has one too many, where an image ends too early, has four axes or several values a voxel, or where a file
    that nnU-Net would take for an image is named otherwise.

    Args:
        images: the first channel of each case, named as nnU-Net wants it; one file may hold all channels.
        model: says which channels are expected.
    """
    ending = model.description.dataset["file_ending"]
    present = {folder: channels_by_case(folder, ending) for folder in {image.parent for image in images}}
    for image in images:
        case = image.name.removesuffix(f"_0000{ending}")
        files = [image.with_name(f"{case}_{i:04d}{ending}") for i in range(len(model.channels))]
        others = sorted({*present[image.parent][case]} - {*files})
        if others:
            raise E2ENetError(
                f"{others[0]} is one image too many: expected one for each of the channels {', '.join(model.channels)} of "
                f"{case}; take it away"
            )
        _check_axes(image, ending)
        missing = [file for file in files if not file.is_file()]
        if not missing:
            check_images(files)
        elif not _holds_all_channels(image, model):
            raise E2ENetError(
                f"{missing[0]} is missing: expected an image for each of the channels {', '.join(model.channels)} of {case}"
            )


def check_images(channels: Sequence[Path]) -> None:
    """Raises E2ENetError where the file of a channel ends too early or holds several, or a case's are not on one grid."""
    for file in channels:
        check_whole(file)
    if all(file.name.endswith(WRITTEN) for file in channels):
        for file in channels:
            values = read_header(file).GetNumberOfComponents()
            if values != 1:
                raise E2ENetError(f"{file} has {values} values a voxel: expected an image of one channel; split it")
        check_one_grid(channels)


def channels_by_case(folder: Path, ending: str) -> dict[str, list[Path]]:
    """The channels of each case in a folder. nnU-Net takes every file with the ending for one, whatever it is called.

    Raises:
        E2ENetError: a file is named otherwise, or a case has no first channel.
    """
    cases: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        named = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", path.name)
        if named is None:
            raise E2ENetError(f"{path} is named like no channel of a case, CASE_0000{ending}: rename it or take it away")
        cases.setdefault(named[1], []).append(path)
    for case, channels in cases.items():
        first = folder / f"{case}_0000{ending}"
        if first not in channels:
            raise E2ENetError(f"{channels[0]} has no first channel, {first.name}, beside it: add it")
    return cases


def check_replaceable(segmentation: Path, image: Path, model: PackedModel) -> None:
    """Raises E2ENetError where a segmentation would replace anything but an earlier one of the same image.

    Label maps of the same labels that somebody drew cannot be told from it.
    """
    dataset = model.description.dataset
    if not segmentation.exists() or dataset["file_ending"] not in WRITTEN:
        return
    try:
        found = read_image(segmentation)
    except E2ENetError as error:
        raise E2ENetError(
            f"{segmentation} is there already, and cannot be read: name another folder with -o, or remove it"
        ) from error
    of_labels = (SimpleITK.sitkUInt8, SimpleITK.sitkUInt16)  # as nnU-Net writes them
    values = [*map(int, dataset.get("regions_class_order") or []), *(v for label in model.foreground.values() for v in label)]
    elsewhere = Geometry.of(found).difference(Geometry.of(read_header(image)), image)
    if (
        found.GetPixelID() not in of_labels
        or elsewhere
        or SimpleITK.GetArrayViewFromImage(found).max() > max(values, default=0)
    ):
        raise E2ENetError(
            f"{segmentation} is there already, and no segmentation of this image: its voxels are of another kind or in other "
            "places. Name another folder with -o"
        )


def check_segmentations(files: Sequence[Path], model: PackedModel) -> None:
    """Raises E2ENetError where one of these files, if it is there, ends too early, as on a full disk.

    Args:
        files: segmentations of the model.
        model: says how they are read.
    """
    reader = model.description.managers()[0].image_reader_writer_class()
    for file in filter(Path.exists, files):
        try:
            check_written(file, reader)
        except E2ENetError as error:
            raise E2ENetError(
                f"{file} holds only a part of a segmentation: remove it, make room on the disk, and repeat the command "
                "with --continue_prediction"
            ) from error


def _check_axes(image: Path, ending: str) -> None:
    if ending in WRITTEN and len(read_header(image).GetSize()) > THREE_AXES:
        raise E2ENetError(
            f"{image} has the size {read_header(image).GetSize()}: expected a 3D image for each channel; split it"
        )


def _holds_all_channels(path: Path, model: PackedModel) -> bool:
    """Whether a file in the model's own format is an image with all of its channels, such as one in colours.

    Raises:
        E2ENetError: it cannot be read.
    """
    ending = model.description.dataset["file_ending"]
    if not path.is_file() or not path.name.endswith(ending):
        return False
    _check_axes(path, ending)
    check_whole(path)
    reader = model.description.managers()[0].image_reader_writer_class()
    with readable(path):
        array, _ = reader.read_images([str(path)])
    return len(array) == len(model.channels)


def case_name(path: Path) -> str:
    """Name of a case from that of its file or folder, without ending and nnU-Net's channel number."""
    name = Path(os.path.abspath(path)).name  # noqa: PTH100 - what a link is called, not the file behind it
    return name if path.is_dir() else re.sub(r"(_0000)?(\.nii\.gz|\.[A-Za-z]\w*)?$", "", name)


def _put(path: Path, target: Path, ending: str) -> None:
    """Makes ``target`` the image at ``path``."""
    series = choose_series(path)
    if series is None and not path.is_file():
        raise E2ENetError(
            f"{path} holds no *_0000{ending} and no DICOM slices: expected a folder of images named as nnU-Net wants them, a "
            f"DICOM series, or an image{_misnamed(path, ending)}"
        )
    if series is None and path.name.endswith(ending):
        _check_axes(path, ending)
        check_images([path])
        _link(path, target)
        return
    if ending not in WRITTEN:
        raise E2ENetError(f"{path} is no *{ending}, of which the model's training images were: convert it first")
    if series is not None:
        print(f"Reading {series}")
    image = read_image(path) if series is None else read_series(series)
    if is_gipl(target) and not np.allclose(image.GetDirection(), np.eye(image.GetDimension()).ravel(), atol=1e-3):
        raise E2ENetError(
            f"{path} has axes that point elsewhere than the patient's, which *{ending} does not store: expected axes to the "
            "left, the back and the head, as the model's training images have; resample it to such a grid"
        )
    check_finite(SimpleITK.GetArrayViewFromImage(image), path)
    check_name(target)
    try:
        SimpleITK.WriteImage(image, str(target), useCompression=False)
        check_whole(target)
    except (E2ENetError, RuntimeError) as error:  # the latter from SimpleITK, which on a full disk may say nothing
        if is_out_of_memory(error):
            raise
        raise _not_copied(path, target, error) from error


def _link(path: Path, target: Path) -> None:
    with suppress(OSError):  # of a system without links
        target.symlink_to(path.resolve())
        return
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise _not_copied(path, target, error) from error


def _not_copied(path: Path, target: Path, error: Exception) -> E2ENetError:
    return E2ENetError(
        f"{path} cannot be copied into {target.parent} ({' '.join(str(error).split())}): expected a folder with room; "
        "make room there, or name another one with the variable TMPDIR"
    )


def _misnamed(folder: Path, ending: str) -> str:
    """What nnU-Net wants an image in a folder to be called, as the end of a message; empty where none is there."""
    found = min(folder.glob(f"*{ending}"), default=None)
    return "" if found is None else f"; {found.name} has to be called {found.name.removesuffix(ending)}_0000{ending}"
