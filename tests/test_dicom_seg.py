"""``e2enet predict --dicom_seg``: segments of a DICOM series, read back with pydicom and judged by dciodvfy."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scans import make_scan, write_dicom
from support import Project, copy_with_random_heads, untrained_model

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.deployment import PackedModel, write_packed
from nnunetv2_e2enet.deployment.dicom import Series, choose_series
from nnunetv2_e2enet.deployment.dicom_seg import check_dicom_seg, write_dicom_seg
from nnunetv2_e2enet.errors import E2ENetError

highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")


@pytest.fixture
def model(project: Project) -> PackedModel:
    return untrained_model(project)[0]


def with_labels(model: PackedModel, **labels: int | list[int]) -> PackedModel:
    dataset = {**model.description.dataset, "labels": {"background": 0, **labels}}
    return replace(model, description=replace(model.description, dataset=dataset))


def scan_and_labels(folder: Path, values: int) -> tuple[Series, Path, np.ndarray]:
    """A series, a file of random labels on its voxels, and these labels; the first slice is all background."""
    scan = make_scan()
    write_dicom(scan, folder / "dicom")
    labels = np.random.default_rng(1).integers(0, values, scan.GetSize()[::-1]).astype(np.uint8)
    labels[0] = 0
    image = SimpleITK.GetImageFromArray(labels)
    image.CopyInformation(scan)
    SimpleITK.WriteImage(image, folder / "labels.nii.gz")
    series = choose_series(folder / "dicom")
    assert series is not None
    return series, folder / "labels.nii.gz", labels


def segments_of(file: Path, series: Series) -> dict[str, np.ndarray]:
    """Name and voxels of each segment, found by the slices that its frames refer to."""
    read = highdicom.seg.segread(file)
    uids = [pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in series.files]
    voxels = read.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    return {read.get_segment_description(n).segment_label: voxels[..., n - 1] for n in read.segment_numbers}


def test_segments_lie_on_the_slices_of_the_series(model: PackedModel, tmp_path: Path) -> None:
    series, file, labels = scan_and_labels(tmp_path, 4)
    write_dicom_seg(tmp_path / "seg.dcm", file, series, with_labels(model, spleen=2, leber=1, 脾=3))
    found = segments_of(tmp_path / "seg.dcm", series)
    assert list(found) == ["spleen", "leber", "脾"]
    for number, voxels in zip((2, 1, 3), found.values(), strict=True):
        np.testing.assert_array_equal(voxels, labels == number)
    written, source = pydicom.dcmread(tmp_path / "seg.dcm"), pydicom.dcmread(series.files[0])
    assert written.SOPClassUID == pydicom.uid.SegmentationStorage
    assert written.StudyInstanceUID == source.StudyInstanceUID
    assert written.SeriesInstanceUID != source.SeriesInstanceUID
    assert written.FrameOfReferenceUID == source.FrameOfReferenceUID
    places = {tuple(frame.PlanePositionSequence[0].ImagePositionPatient) for frame in written.PerFrameFunctionalGroupsSequence}
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in series.files]
    assert places == {tuple(each.ImagePositionPatient) for each in slices[1:]}
    (orientation,) = written.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    assert orientation.ImageOrientationPatient == source.ImageOrientationPatient


def codes_of(file: Path) -> dict[str, tuple[str, str, str]]:
    """Value, scheme and meaning of the code of each segment, by its name; all are anatomical structures."""
    codes = {}
    for segment in pydicom.dcmread(file).SegmentSequence:
        (category,), (code,) = segment.SegmentedPropertyCategoryCodeSequence, segment.SegmentedPropertyTypeCodeSequence
        found = (category.CodeValue, category.CodingSchemeDesignator, category.CodeMeaning)
        assert found == ("91723000", "SCT", "Anatomical Structure")
        codes[segment.SegmentLabel] = code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning
    return codes


def test_codes_are_those_of_the_names(model: PackedModel, tmp_path: Path) -> None:
    """Of the same name in every model, whatever its number, and of other names others."""
    series, file, _ = scan_and_labels(tmp_path, 4)
    write_dicom_seg(tmp_path / "one.dcm", file, series, with_labels(model, spleen=1, liver=2, 脾=3))
    write_dicom_seg(tmp_path / "other.dcm", file, series, with_labels(model, organs=[1, 2, 3], 脾=[2, 3], spleen=3))
    one, other = codes_of(tmp_path / "one.dcm"), codes_of(tmp_path / "other.dcm")
    assert list(one) == ["spleen", "liver", "脾"]
    for name, (value, scheme, meaning) in {**one, **other}.items():
        assert (scheme, meaning) == ("99E2ENET", name)
        assert 0 < len(value) <= 16  # as DICOM wants it
    assert len({value for value, _, _ in {**one, **other}.values()}) == 4
    assert {name: one[name] for name in ("spleen", "脾")} == {name: other[name] for name in ("spleen", "脾")}
    assert one["spleen"][0] == "9D486670CFFB"  # of former versions, too


def test_what_was_postprocessed_says_so(model: PackedModel, tmp_path: Path) -> None:
    series, file, _ = scan_and_labels(tmp_path, 1)
    image = SimpleITK.ReadImage(file)
    labels = np.zeros(image.GetSize()[::-1], np.uint8)
    labels[1:5, 2:10, 2:10] = 1
    large = labels == 1
    labels[1, 15:18, 15:18] = 1
    segmentation = SimpleITK.GetImageFromArray(labels)
    segmentation.CopyInformation(image)
    out = tmp_path / "out"
    out.mkdir()
    SimpleITK.WriteImage(segmentation, out / "dicom.nii.gz")  # the command leaves it
    write_packed(tmp_path / "model.e2enet", replace(model, description=replace(model.description, postprocessing=[[1]])))
    given = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "dicom"), "-o", str(out), "-device", "cpu"]
    assert main(["predict", *given, "--continue_prediction", "--postprocess", "--dicom_seg"]) == 0
    for folder, remark, expected in ((out, "", labels == 1), (out / "postprocessed", ", postprocessed", large)):
        description = pydicom.dcmread(folder / "dicom.dcm").SeriesDescription
        assert description == f"Dataset993_Phantom, segmentation{remark}"
        np.testing.assert_array_equal(next(iter(segments_of(folder / "dicom.dcm", series).values())), expected)


def test_regions_may_overlap(model: PackedModel, tmp_path: Path) -> None:
    series, file, labels = scan_and_labels(tmp_path, 4)
    write_dicom_seg(tmp_path / "seg.dcm", file, series, with_labels(model, whole=[1, 2, 3], core=[2, 3], enhancing=3))
    found = segments_of(tmp_path / "seg.dcm", series)
    for name, least in (("whole", 1), ("core", 2), ("enhancing", 3)):
        np.testing.assert_array_equal(found[name], labels >= least)


def test_a_scan_without_any_label_has_an_object_too(model: PackedModel, tmp_path: Path) -> None:
    series, file, _ = scan_and_labels(tmp_path, 1)
    write_dicom_seg(tmp_path / "seg.dcm", file, series, with_labels(model, spleen=1, liver=2))
    assert [voxels.any() for voxels in segments_of(tmp_path / "seg.dcm", series).values()] == [False, False]


def test_a_segmentation_of_another_place_is_refused(model: PackedModel, tmp_path: Path) -> None:
    series, file, _ = scan_and_labels(tmp_path, 2)
    image = SimpleITK.ReadImage(file)
    moved = SimpleITK.Image(image)
    moved.SetOrigin((-10.5, 21.0, -300.125))
    for other, message in (
        (moved, "slice 0 of the segmentation lies at"),
        (image[:, :, :5], r"has the size \(24, 20, 5\), but there are 6 files"),
    ):
        SimpleITK.WriteImage(other, tmp_path / "other.nii.gz")
        with pytest.raises(E2ENetError, match=message):
            write_dicom_seg(tmp_path / "seg.dcm", tmp_path / "other.nii.gz", series, model)
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.parametrize(
    ("element", "value"),
    [
        ("PatientID", None),
        ("FrameOfReferenceUID", None),
        ("ImagePositionPatient", None),
        ("ImagePositionPatient", ""),
        ("PixelSpacing", ""),
    ],
)
def test_a_series_that_lacks_something_is_refused(model: PackedModel, tmp_path: Path, element: str, value: str | None) -> None:
    series, file, _ = scan_and_labels(tmp_path, 2)
    for path in series.files:
        dataset = pydicom.dcmread(path)
        if value is None:
            delattr(dataset, element)
        else:
            setattr(dataset, element, value)
        dataset.save_as(path)
    with pytest.raises(E2ENetError, match=r"no DICOM SEG can be made for .*; expected a series with all"):
        write_dicom_seg(tmp_path / "seg.dcm", file, series, model)
    assert not (tmp_path / "seg.dcm").exists()
    scan = tmp_path / "scan.nii.gz"
    SimpleITK.WriteImage(SimpleITK.ReadImage(file), scan)
    with pytest.raises(E2ENetError, match="no DICOM SEG can be made for"):
        check_dicom_seg(scan, series, model)


def test_the_command_needs_a_series(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "model.e2enet"
    assert main(["export", str(trained), str(packed), "-f", "0"]) == 0
    SimpleITK.WriteImage(make_scan(), tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    arguments = [
        "predict",
        "-m",
        str(packed),
        "-i",
        str(tmp_path / "scan.nii.gz"),
        "-o",
        str(out),
        "-device",
        "cpu",
        "--dicom_seg",
    ]
    assert main(arguments) != 0
    assert "is no DICOM series, which DICOM SEG refers to; leave it out" in capsys.readouterr().err
    assert not out.exists()


def test_results_do_not_go_into_the_folder_of_the_series(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, folder = tmp_path / "model.e2enet", tmp_path / "dicom"
    assert main(["export", str(trained), str(packed), "-f", "0"]) == 0
    files = write_dicom(make_scan(), folder)
    before = [file.read_bytes() for file in files]
    arguments = ["predict", "-m", str(packed), "-i", str(files[0]), "-o", str(folder), "-device", "cpu", "--dicom_seg"]
    assert main(arguments) != 0
    assert "holds the slices of the series; expected another folder" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before
    assert len(list(folder.iterdir())) == len(files)


@pytest.fixture
def predicted(trained: Path, tmp_path: Path) -> tuple[Path, Series]:
    """The object that the command wrote, and its series."""
    packed, series = tmp_path / "model.e2enet", tmp_path / "Patient 7"
    assert main(["export", str(copy_with_random_heads(trained, tmp_path / "results")), str(packed), "-f", "0"]) == 0
    write_dicom(make_scan((16, 40, 40)), series)
    options = ["-device", "cpu", "--disable_tta", "--dicom_seg"]
    assert main(["predict", "-m", str(packed), "-i", str(series), "-o", str(tmp_path / "out"), *options]) == 0
    found = choose_series(series)
    assert found is not None
    return tmp_path / "out" / "Patient 7.dcm", found


def test_the_command_writes_what_it_segmented(predicted: tuple[Path, Series]) -> None:
    file, series = predicted
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file.with_name("Patient 7.nii.gz")))
    assert len(np.unique(labels)) > 1
    for number, voxels in enumerate(segments_of(file, series).values(), start=1):
        np.testing.assert_array_equal(voxels, labels == number)


def test_a_part_without_a_case_writes_nothing(predicted: tuple[Path, Series], tmp_path: Path) -> None:
    given = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "Patient 7"), "-o", str(tmp_path / "part")]
    parts = ["-num_parts", "2", "-part_id", "1", "-device", "cpu", "--dicom_seg"]
    assert main(["predict", *given, *parts]) == 0
    assert predicted[0].is_file()
    assert not list((tmp_path / "part").glob("*.dcm"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dicom3tools")
def test_dciodvfy_finds_no_error(predicted: tuple[Path, Series]) -> None:
    done = subprocess.run(["dciodvfy", str(predicted[0])], capture_output=True, text=True, check=False)
    assert "Segmentation" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
