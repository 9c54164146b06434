"""A segmentation as a DICOM SEG object of the series that was segmented, with highdicom (an extra of the package)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from nnunetv2_e2enet import __version__
from nnunetv2_e2enet.deployment.dicom import Series, choose_series, misplaced
from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.errors import E2ENetError, check_extra
from nnunetv2_e2enet.files import write
from nnunetv2_e2enet.imaging import read_image

SCHEME = "99E2ENET"
"""Designator of the codes of labels: DICOM keeps 99 for private schemes. A data set names its labels, but gives no codes."""

SERIES_NUMBER = 900
LONGEST_NAME = 64  # characters of a segment's label (VR LO)
RAISED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""By pydicom and highdicom, about elements of a series that are missing, empty or wrong."""
UTF_8 = "ISO_IR 192"  # of labels, and of the patient's name, whatever the series is written in


def series_to_refer_to(paths: Sequence[Path], out: Path) -> Series:
    """The series of the first channel.

    Args:
        paths: what ``folder_of_images`` takes.
        out: the folder that objects are written to.

    Raises:
        E2ENetError: there is no DICOM series, ``out`` is its folder, or highdicom is not installed.
    """
    check_extra("--dicom_seg", "dicom", "highdicom", "pydicom")
    series = choose_series(paths[0])
    if series is None:
        raise E2ENetError(f"--dicom_seg: {paths[0]} is no DICOM series, which DICOM SEG refers to; leave it out")
    if out.resolve() == series.files[0].resolve().parent:
        raise E2ENetError(f"--dicom_seg: {out} holds the slices of the series; expected another folder for results, with -o")
    return series


def check_dicom_seg(image: Path, series: Series, model: PackedModel) -> None:
    """Raises E2ENetError unless an object can be made of a segmentation on the voxels of ``image``, the series' scan."""
    scan = read_image(image)
    segmentation = SimpleITK.Image(scan.GetSize(), SimpleITK.sitkUInt16)
    segmentation.CopyInformation(scan)
    for values in model.foreground.values():
        segmentation[(0,) * scan.GetDimension()] = values[
            0
        ]  # highdicom has something to say about segmentations without a label
    _content(segmentation, series, model)


def write_dicom_seg(file: Path, segmentation: Path, series: Series, model: PackedModel, postprocessed: bool = False) -> None:
    """Write or replace a DICOM SEG object: a binary segment for each label or region that the model knows.

    Args:
        file: to write.
        segmentation: an image of labels on the voxels of ``series``, as ``e2enet predict`` writes it.
        series: the scan, to whose slices, patient and study the object refers.
        model: names the labels. Segments have the order of its data set.
        postprocessed: whether the description of the object says so.

    Raises:
        E2ENetError: the segmentation does not lie on the slices, the series lacks what DICOM wants of it, or the file
            cannot be written.
    """
    write(file, _content(read_image(segmentation), series, model, ", postprocessed" if postprocessed else ""))


def _content(image: SimpleITK.Image, series: Series, model: PackedModel, remark: str = "") -> bytes:
    """The object as a file holds it."""
    import highdicom
    import pydicom

    try:
        slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in series.files]
        _check_places(image, slices)
        for each in slices:  # in memory: a thickness may be unknown, and highdicom wants one
            if not each.get("SliceThickness"):
                each.SliceThickness = f"{image.GetSpacing()[2]:.6g}"
        made = highdicom.seg.Segmentation(
            source_images=slices,
            pixel_array=_segments(SimpleITK.GetArrayFromImage(image).astype(np.uint16), model.foreground),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(model),
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="nnunetv2-e2enet",
            manufacturer_model_name="E2ENet",
            software_versions=__version__,
            device_serial_number="none",
            series_description=f"{_name(model)[: LONGEST_NAME - 32]}, segmentation{remark}",
            specific_character_set=UTF_8,
        )
        written = BytesIO()
        made.save_as(written)
    except (*RAISED, pydicom.errors.InvalidDicomError) as error:
        reason = str(error).rstrip(".")
        raise E2ENetError(
            f"no DICOM SEG can be made for {series}: {reason}; expected a series with all that DICOM demands of it, or leave "
            "--dicom_seg out"
        ) from error
    return written.getvalue()


def _name(model: PackedModel) -> str:
    return str(model.description.plans["dataset_name"])


def _check_places(image: SimpleITK.Image, slices: Sequence[Any]) -> None:
    """Raises ValueError unless voxel (0, 0, i) is the first pixel of slice i, as far as distances may be uneven."""
    if image.GetDimension() != 3 or image.GetDepth() != len(slices):
        raise ValueError(f"the segmentation has the size {image.GetSize()}, but there are {len(slices)} files of a slice each")
    origins = [[float(mm) for mm in each.ImagePositionPatient] for each in slices]
    wrong = misplaced(image, origins)
    if wrong is not None:
        here = np.round(image.TransformIndexToPhysicalPoint((0, 0, wrong)), 3).tolist()
        raise ValueError(f"slice {wrong} of the segmentation lies at {here} mm, its file at {origins[wrong]} mm")


def _segments(labels: NDArray[np.uint16], foreground: Mapping[str, Sequence[int]]) -> NDArray[Any]:
    """As highdicom takes them, slices first: numbers of segments; or where regions overlap, a last axis for segments."""
    values = list(foreground.values())
    if len({v for region in values for v in region}) < sum(map(len, values)):
        return np.stack([np.isin(labels, region) for region in values], axis=-1).astype(np.uint8)
    numbers = np.zeros(np.iinfo(np.uint16).max + 1, np.uint8 if len(values) < 256 else np.uint16)
    for number, region in enumerate(values, start=1):
        numbers[list(region)] = number
    return numbers[labels]


def _descriptions(model: PackedModel) -> list[Any]:
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"E2ENet, {_name(model)}"[:LONGEST_NAME], version=__version__, family=codes.cid7162.ArtificialIntelligence
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:LONGEST_NAME],
            segmented_property_category=codes.cid7150.AnatomicalStructure,
            segmented_property_type=highdicom.sr.CodedConcept(_code(name), SCHEME, name[:LONGEST_NAME]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(model.foreground, start=1)
    ]


def _code(label: str) -> str:
    """The same for labels of the same name, whatever the model."""
    return sha256(label.encode()).hexdigest()[:12].upper()
