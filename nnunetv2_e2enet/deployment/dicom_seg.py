"""A segmentation as a DICOM SEG object of the series that was segmented, with highdicom (an extra of the package)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from nnunetv2_e2enet import __version__
from nnunetv2_e2enet.deployment.dicom import Series, choose_series
from nnunetv2_e2enet.deployment.packed import PackedModel
from nnunetv2_e2enet.errors import E2ENetError, check_extra
from nnunetv2_e2enet.files import write
from nnunetv2_e2enet.imaging import read_image

SCHEME = "99E2ENET"
"""Designator of the codes of labels: DICOM keeps 99 for private schemes. A data set names its labels, but gives no codes."""

SERIES_NUMBER = 900
LONGEST_NAME = 64  # characters of a segment's label (VR LO)
APART = 1e-2
"""The most by which a slice of the segmentation may lie beside that of the series, in millimetres."""


def series_to_refer_to(paths: Sequence[Path]) -> Series:
    """The series of the first channel.

    Args:
        paths: what ``folder_of_images`` takes.

    Raises:
        E2ENetError: it is no DICOM series with a file for each slice, or highdicom is not installed.
    """
    check_extra("--dicom_seg", "dicom", "highdicom", "pydicom")
    series = choose_series(paths[0])
    if series is None:
        raise E2ENetError(f"--dicom_seg: {paths[0]} is no DICOM series, which DICOM SEG refers to; leave it out")
    return series


def write_dicom_seg(file: Path, segmentation: Path, series: Series, model: PackedModel) -> None:
    """Write or replace a DICOM SEG object: a binary segment for each label or region that the model knows.

    Args:
        file: to write.
        segmentation: an image of labels on the voxels of ``series``, as ``e2enet predict`` writes it.
        series: the scan, to whose slices, patient and study the object refers.
        model: names the labels.

    Raises:
        E2ENetError: the segmentation does not lie on the slices, the series lacks what DICOM wants of it, or the file
            cannot be written.
    """
    import highdicom
    import pydicom

    image = read_image(segmentation)
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in series.files]
    _check_places(image, slices, series)
    labels = SimpleITK.GetArrayFromImage(image).astype(np.uint16)
    for each in slices:  # in memory: a thickness may be unknown, and highdicom wants one
        if not each.get("SliceThickness"):
            each.SliceThickness = f"{image.GetSpacing()[2]:.6g}"
    try:
        content = highdicom.seg.Segmentation(
            source_images=slices,
            pixel_array=_segments(labels, model.foreground),
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
            series_description=f"Segmentation, {_name(model)}"[:LONGEST_NAME],
        )
    except (AttributeError, KeyError, ValueError) as error:  # what pydicom and highdicom raise about the source's elements
        raise E2ENetError(
            f"no DICOM SEG can be made for {series}: {error}; expected a series with the elements that DICOM demands of it"
        ) from error
    written = BytesIO()
    content.save_as(written)
    write(file, written.getvalue())


def _name(model: PackedModel) -> str:
    return str(model.description.plans["dataset_name"])


def _check_places(image: SimpleITK.Image, slices: Sequence[Any], series: Series) -> None:
    """Raises E2ENetError unless voxel (0, 0, i) is the first pixel of slice i."""
    if image.GetDepth() != len(slices):
        raise E2ENetError(
            f"no DICOM SEG can be made for {series}: the segmentation has {image.GetDepth()} slices, expected one for each of "
            f"{len(slices)} files; leave --dicom_seg out"
        )
    for i, each in enumerate(slices):
        here = np.array(image.TransformIndexToPhysicalPoint((0, 0, i)))
        there = np.array(each.ImagePositionPatient, float)
        if np.abs(here - there).max() > APART:
            raise E2ENetError(
                f"no DICOM SEG can be made for {series}: slice {i} of the segmentation lies at {here.round(3).tolist()} mm, "
                f"that of the series at {there.round(3).tolist()} mm; leave --dicom_seg out"
            )


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
        name=f"E2ENet, {_name(model)}", version=__version__, family=codes.cid7162.ArtificialIntelligence
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:LONGEST_NAME],
            segmented_property_category=codes.cid7150.AnatomicalStructure,
            segmented_property_type=highdicom.sr.CodedConcept(str(number), SCHEME, name[:LONGEST_NAME]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(model.foreground, start=1)
    ]
