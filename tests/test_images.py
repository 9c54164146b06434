"""What e2enet predict takes: an image, a folder, a DICOM series; the segmentation lies where the scan lies."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from scans import DIRECTION, assert_same_place, make_scan, write_dicom
from support import Project, copy_with_random_heads, full_disk, untrained_model

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.deployment import PackedModel, Segmenter, read_packed, write_packed
from nnunetv2_e2enet.deployment.dicom import Series, choose_series, read_series
from nnunetv2_e2enet.deployment.images import case_name, check_channels, check_replaceable, folder_of_images
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.imaging import check_whole, read_header, read_image
from nnunetv2_e2enet.machine import out_of_memory_in_one_line
from nnunetv2_e2enet.prediction.writing import write_segmentation


@pytest.fixture
def model(project: Project) -> PackedModel:
    return untrained_model(project)[0]


# ---- DICOM ---------------------------------------------------------------------------------------------------------------


def test_a_series_is_the_volume_that_was_written(tmp_path: Path) -> None:
    scan = make_scan()
    write_dicom(scan, tmp_path)
    (tmp_path / "README.txt").write_text("no slice")
    series = choose_series(tmp_path)
    assert series is not None
    image = read_series(series)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(scan))
    assert_same_place(image, scan, 1e-9)


@pytest.mark.parametrize(
    ("slopes", "intercepts"),
    [
        ([1] * 6, [-1024] * 6),
        ([2] * 6, [-1000] * 6),
        ([0.5] * 6, [10] * 6),
        ([1, 0.5, 0.25, 2, 3, 0.125], [0] * 6),  # as in PET; the first slice alone would be read as whole numbers
        ([1] * 6, [0, -1, 40000, 3, 4, 5]),
    ],
)
def test_stored_numbers_are_rescaled_slice_by_slice(tmp_path: Path, slopes: list[float], intercepts: list[float]) -> None:
    scan = make_scan()
    files = write_dicom(scan, tmp_path, slopes=slopes, intercepts=intercepts)
    series = choose_series(files[0])
    assert series is not None
    stored = SimpleITK.GetArrayFromImage(scan).astype(float)
    expected = stored * np.reshape(slopes, (-1, 1, 1)) + np.reshape(intercepts, (-1, 1, 1))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read_series(series)), expected)


def test_a_series_of_one_slice_is_rescaled(tmp_path: Path) -> None:
    scan = make_scan((1, 20, 24))
    (file,) = write_dicom(scan, tmp_path, slopes=[0.5], intercepts=[10])
    series = choose_series(file)
    assert series is not None
    expected = 0.5 * SimpleITK.GetArrayFromImage(scan) + 10
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read_series(series)), expected)


def test_folders_below_are_not_read(tmp_path: Path) -> None:
    write_dicom(make_scan((4, 20, 24), seed=1), tmp_path / "below", number=2)
    assert choose_series(tmp_path) is None
    files = write_dicom(make_scan(), tmp_path)
    series = choose_series(tmp_path)
    assert series is not None
    assert sorted(series.files) == sorted(files)


def test_of_several_series_one_has_to_be_chosen(tmp_path: Path) -> None:
    first, second = make_scan(), make_scan((4, 20, 24), seed=1)
    write_dicom(first, tmp_path)
    files = write_dicom(second, tmp_path, number=2)
    with pytest.raises(E2ENetError) as error:
        choose_series(tmp_path)
    lines = str(error.value).splitlines()
    assert "holds 2 DICOM series: choose one, and name a file of it instead" in lines[0]
    assert sorted(line.split(" (")[1] for line in lines[1:]) == ["CT, Abdomen 1, 6 slices)", "CT, Abdomen 2, 4 slices)"]
    named = Path(lines[1].split(" (")[0].strip())
    for file in (named, files[2]):
        series = choose_series(file)
        assert series is not None
        expected = second if file in files else first
        image = read_series(series)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(expected))


@pytest.mark.parametrize("damaged", [0, 2, 5])
def test_a_damaged_slice_is_not_left_out(tmp_path: Path, damaged: int) -> None:
    """GDCM leaves out what it cannot parse, also at the ends, where no gap tells. Files of other series are none of it."""
    files = write_dicom(make_scan(), tmp_path)
    others = write_dicom(make_scan(), tmp_path, number=12)  # whose UIDs begin as those of the first
    for file in (files[damaged], others[0]):
        file.write_bytes(file.read_bytes()[:-300])
    message = rf"^{files[damaged]} cannot be read as a slice of this series: .* copy it again"
    with pytest.raises(E2ENetError, match=message):
        choose_series(files[3])
    for file in others:
        file.unlink()
    with pytest.raises(E2ENetError, match=message):
        choose_series(tmp_path)


def test_a_damaged_slice_of_another_series_is_left_alone(tmp_path: Path) -> None:
    files = write_dicom(make_scan(), tmp_path)
    others = write_dicom(make_scan(), tmp_path, number=12)
    others[0].write_bytes(others[0].read_bytes()[:-300])
    (tmp_path / "below").mkdir()
    series = choose_series(files[3])
    assert series is not None
    assert sorted(series.files) == sorted(files)


def test_no_dicom_is_no_series(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("no slice")
    SimpleITK.WriteImage(make_scan(), tmp_path / "scan.nrrd")
    assert [choose_series(path) for path in (tmp_path, tmp_path / "README.txt", tmp_path / "scan.nrrd")] == [None] * 3
    assert choose_series(tmp_path / "nowhere") is None


def test_slices_that_make_no_volume(tmp_path: Path) -> None:
    scan = make_scan()
    write_dicom(scan, tmp_path / "missing", slices=[0, 1, 2, 4, 5])
    for names, slices in (("one twice", [3]), ("all twice", range(6))):
        again = write_dicom(scan, tmp_path / names / "again", slices=slices)
        write_dicom(scan, tmp_path / names)
        for file in again:
            file.rename(tmp_path / names / f"{file.name}_again")
    write_dicom(scan, tmp_path / "scout")
    write_dicom(make_scan((1, 30, 24)), tmp_path / "scout", slices=[0])  # of the same series, in the place of the first
    gantry = SimpleITK.Image(scan)
    write_dicom(gantry, tmp_path / "gantry", slices=[0])
    for i in range(1, 6):
        gantry.SetOrigin((-10.5, 20.25 + i, -300.125))
        write_dicom(gantry, tmp_path / "gantry", slices=[i])
    for name, message in (
        ("missing", "slices 2.5 to 5 mm apart: expected the same distance between all"),
        ("one twice", "slices 0 to 2.5 mm apart: .* none is there twice"),
        ("all twice", "slices 0 to 2.5 mm apart: .* none is there twice"),
        ("scout", "slices of several sizes or directions"),
        ("gantry", "was taken with a tilted gantry"),
    ):
        series = choose_series(tmp_path / name)
        assert series is not None
        with pytest.raises(E2ENetError, match=message):
            read_series(series)


def write_moved(scan: SimpleITK.Image, folder: Path, origins: list[tuple[float, float, float]]) -> Series:
    """A series whose slice i has its first pixel at ``origins[i]``, mm."""
    moved = SimpleITK.Image(scan)
    for i, origin in enumerate(origins):
        moved.SetOrigin((0, 0, 0))
        moved.SetOrigin(np.subtract(origin, moved.TransformIndexToPhysicalPoint((0, 0, i))).tolist())
        write_dicom(moved, folder, slices=[i])
    series = choose_series(folder)
    assert series is not None
    return series


def test_slices_that_fit_their_neighbours_alone_make_no_volume(tmp_path: Path) -> None:
    """A little aside each, or a little farther apart in one half; and positions that are there once for each time."""
    scan = make_scan((60, 4, 4))
    scan.SetDirection(np.eye(3).ravel().tolist())
    drifting = [(0.24 * i, 0.0, 5.0 * i) for i in range(60)]
    stretched = [(0.0, 0.0, 2.5 * i + 0.1 * max(0, i - 6)) for i in range(12)]
    dynamic = [(0.0, 0.0, 7.5 * (i % 2)) for i in range(8)]
    for name, origins, message in (
        ("drifting", drifting, "was taken with a tilted gantry, each slice 0.24 mm beside the one before"),
        ("stretched", stretched, "slices 2.5 to 2.6 mm apart: expected the same distance between all"),
        ("dynamic", dynamic, r"slices (-7.5|0) to 7.5 mm apart: .* none is there twice"),
    ):
        with pytest.raises(E2ENetError, match=message):
            read_series(write_moved(scan, tmp_path / name, origins))
    even = write_moved(scan, tmp_path / "even", [(0.0, 0.0, 2.5 * i + 0.05 * (i % 2)) for i in range(12)])
    assert read_series(even).GetSize() == (4, 4, 12)
    pixel = scan.GetSpacing()[0]
    rounded = write_moved(scan, tmp_path / "rounded", [(0.4 * pixel * i / 59, 0.0, 5.0 * i) for i in range(60)])
    assert read_series(rounded).GetSize() == (4, 4, 60)


def test_a_file_of_several_frames_is_refused(tmp_path: Path) -> None:
    """Places and slopes of its frames would be left aside."""
    scan = make_scan()
    scan.SetMetaData("0008|0060", "CT")
    SimpleITK.WriteImage(scan, tmp_path / "enhanced.dcm")
    series = choose_series(tmp_path / "enhanced.dcm")
    assert series is not None
    with pytest.raises(E2ENetError, match=r"enhanced\.dcm holds 6 frames: expected .* convert it to one file a slice"):
        read_series(series)


def write_element(file: Path, group: int, element: int, value: bytes) -> None:
    """Changes the value of an element with an implicit type; of any length."""
    content, tag = file.read_bytes(), group.to_bytes(2, "little") + element.to_bytes(2, "little")
    assert content.count(tag) == 1
    start = content.index(tag) + 8
    end = start + int.from_bytes(content[start - 4 : start], "little")
    file.write_bytes(content[: start - 4] + len(value).to_bytes(4, "little") + value + content[end:])


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("inverted", [0, -1])
def test_inverted_slices_are_refused(tmp_path: Path, depth: int, inverted: int) -> None:
    """SimpleITK would read the stored numbers of MONOCHROME1 from the largest to the smallest, Hounsfield's as well."""
    files = write_dicom(make_scan((depth, 20, 24)), tmp_path)
    write_element(files[inverted], 0x28, 0x0004, b"MONOCHROME1 ")
    series = choose_series(tmp_path)
    assert series is not None
    message = rf"^{files[inverted]} is MONOCHROME1, .*: expected MONOCHROME2"
    with pytest.raises(E2ENetError, match=message):
        read_series(series)


@pytest.mark.parametrize("depth", [1, 6])
def test_slices_without_a_spacing_are_refused(tmp_path: Path, depth: int) -> None:
    """Pixels would count as 1 x 1 mm. Those that are of this size are read."""
    files = write_dicom(make_scan((depth, 20, 24)), tmp_path)
    series = choose_series(tmp_path)
    assert series is not None
    for value in (b"1\\1 ", b"1.0\\1.0 ", b"1.00\\1.000"):
        for file in files:
            write_element(file, 0x28, 0x0030, value)
        assert read_series(series).GetSpacing()[:2] == (1, 1)
    for file in files:
        write_element(file, 0x28, 0x0030, b"")
    message = rf"^{tmp_path}/IM.* has no PixelSpacing \(0028\|0030\) .* 1 x 1 mm: expected"
    with pytest.raises(E2ENetError, match=message):
        read_series(series)


@pytest.mark.parametrize(("element", "name"), [(0x0032, "ImagePositionPatient"), (0x0037, "ImageOrientationPatient")])
@pytest.mark.parametrize("without", [[3], range(6)], ids=["one", "all"])
def test_what_slices_lack_is_named(tmp_path: Path, element: int, name: str, without: Sequence[int]) -> None:
    files = write_dicom(make_scan(), tmp_path)
    series = choose_series(tmp_path)
    assert series is not None
    for i in without:
        write_element(files[i], 0x20, element, b"")
    with pytest.raises(E2ENetError, match=rf"^{files[without[0]]} has no {name} \(0020\|00..\), .*: expected"):
        read_series(series)


def test_a_description_in_latin_1_can_be_printed(tmp_path: Path) -> None:
    for file in write_dicom(make_scan(), tmp_path):
        file.write_bytes(file.read_bytes().replace(b"Abdomen 1", "Schädel 1".encode("latin-1")))
    series = choose_series(tmp_path)
    assert str(series).encode().endswith(b" (CT, Sch?del 1, 6 slices)")


def test_of_a_named_file_no_other_series_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        files = write_dicom(make_scan(), tmp_path, number=number)
    asked: list[Any] = []
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return names(*arguments)

    monkeypatch.setattr(SimpleITK.ImageSeriesReader, "GetGDCMSeriesFileNames", counted)
    series = choose_series(files[0])
    assert series is not None
    assert sorted(series.files) == sorted(files)
    assert len(asked) == 1


def test_slices_in_colour_are_refused(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    image = SimpleITK.GetImageFromArray(colours, isVector=True)
    image.SetMetaData("0008|0060", "SC")
    SimpleITK.WriteImage(image, tmp_path / "capture.dcm")
    series = choose_series(tmp_path / "capture.dcm")
    assert series is not None
    with pytest.raises(E2ENetError, match=r"capture\.dcm .* is in colour: expected a scan of one channel"):
        read_series(series)


# ---- as a folder of images -----------------------------------------------------------------------------------------------


def test_a_folder_named_as_nnunet_wants_it_is_given_back(project: Project, model: PackedModel) -> None:
    with folder_of_images([project.raw / "imagesTs"], model) as folder:
        assert folder == project.raw / "imagesTs"


def test_an_image_of_any_kind_becomes_a_folder(tmp_path: Path, model: PackedModel) -> None:
    scan = make_scan()
    write_dicom(scan, tmp_path / "Patient 7")
    for name in ("scan.nii.gz", "scan_0000.nii.gz", "scan.v2.mha", "scan.nrrd"):
        SimpleITK.WriteImage(scan, tmp_path / name)
    cases = {}
    for path in ("scan.nii.gz", "scan_0000.nii.gz", "scan.v2.mha", "scan.nrrd", "Patient 7", "Patient 7/IM1007"):
        with folder_of_images([tmp_path / path], model) as folder:
            (file,) = folder.iterdir()
            cases[path] = file.name
            image = SimpleITK.ReadImage(file)
            np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(scan))
            assert_same_place(image, scan)
        assert not folder.exists()
    assert cases == {
        "scan.nii.gz": "scan_0000.nii.gz",
        "scan_0000.nii.gz": "scan_0000.nii.gz",
        "scan.v2.mha": "scan.v2_0000.nii.gz",
        "scan.nrrd": "scan_0000.nii.gz",
        "Patient 7": "Patient 7_0000.nii.gz",
        "Patient 7/IM1007": "IM1007_0000.nii.gz",
    }


def test_names_of_cases(tmp_path: Path) -> None:
    names = {"a.nii.gz": "a", "a_0000.nii.gz": "a", "1.2.840.10": "1.2.840.10", "1.2.840.dcm": "1.2.840", "IM_0001": "IM_0001"}
    assert {name: case_name(tmp_path / name) for name in names} == names
    target = tmp_path / "MD5E-s12--abcdef.nii.gz"  # as in a data set of git-annex
    target.touch()
    (tmp_path / "sub-01_T1w.nii.gz").symlink_to(target)
    assert case_name(tmp_path / "sub-01_T1w.nii.gz") == "sub-01_T1w"
    (tmp_path / "below").mkdir()
    assert case_name(tmp_path / "below" / "..") == tmp_path.name
    (tmp_path / "b.nii").mkdir()
    assert case_name(tmp_path / "b.nii") == "b.nii"


def with_channels(model: PackedModel, *names: str) -> PackedModel:
    dataset = {**model.description.dataset, "channel_names": {str(i): name for i, name in enumerate(names)}}
    return PackedModel(replace(model.description, dataset=dataset), model.folds)


def test_channels_are_given_one_by_one(tmp_path: Path, model: PackedModel) -> None:
    scans = {"t1": make_scan(), "t2": make_scan(seed=1), "small": make_scan((6, 20, 23))}
    for name, scan in scans.items():
        write_dicom(scan, tmp_path / name)
    SimpleITK.WriteImage(scans["t2"], tmp_path / "other.nii.gz")
    two = with_channels(model, "T1", "T2")
    for second in ("t2", "other.nii.gz"):
        with folder_of_images([tmp_path / "t1", tmp_path / second], two) as folder:
            files = sorted(folder.iterdir())
            assert [file.name for file in files] == ["t1_0000.nii.gz", "t1_0001.nii.gz"]
            for file, name in zip(files, ("t1", "t2"), strict=True):
                voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file))
                np.testing.assert_array_equal(voxels, SimpleITK.GetArrayFromImage(scans[name]))
    with (
        pytest.raises(E2ENetError, match="resample the channels to one grid"),
        folder_of_images([tmp_path / "t1", tmp_path / "small"], two),
    ):
        pass
    for change in (SimpleITK.Image.SetOrigin, SimpleITK.Image.SetDirection):
        moved = make_scan(seed=1)
        change(moved, (9, 9, 9) if change is SimpleITK.Image.SetOrigin else (1, 0, 0, 0, -1, 0, 0, 0, -1))
        SimpleITK.WriteImage(moved, tmp_path / "moved.nii.gz")
        with (
            pytest.raises(
                E2ENetError, match=r"moved\.nii\.gz has (origin|axes that point) .*: resample the channels to one grid"
            ),
            folder_of_images([tmp_path / "t1", tmp_path / "moved.nii.gz"], two),
        ):
            pass
    with (
        pytest.raises(E2ENetError, match="1 images are given with -i, but the model has the channels T1, T2"),
        folder_of_images([tmp_path / "t1"], two),
    ):
        pass


def test_channels_have_the_order_of_their_numbers(tmp_path: Path, model: PackedModel) -> None:
    """In which image files are numbered, whatever the order in ``dataset.json``."""

    def numbered(names: Any) -> PackedModel:
        dataset = {**model.description.dataset, "channel_names": names}
        return replace(model, description=replace(model.description, dataset=dataset))

    names = {str(number): f"contrast {number}" for number in (1, 10, 11, *range(2, 10), 0)}
    assert numbered(names).channels == [f"contrast {number}" for number in range(12)]
    assert list(numbered(names).description.channel_names) == [str(number) for number in range(12)]
    numbered({"0": "T1"}).description.check()
    for wrong in ({"1": "T1"}, {"first": "T1"}, ["T1"]):
        write_packed(tmp_path / "model.e2enet", numbered(wrong))
        with pytest.raises(E2ENetError, match=r"model\.e2enet cannot be read as a packed model"):
            read_packed(tmp_path / "model.e2enet")


def test_what_is_no_image(tmp_path: Path, model: PackedModel) -> None:
    for name in ("broken.nii.gz", "notes.txt"):
        (tmp_path / name).write_text("no image")
    for name in ("broken.nii.gz", "notes.txt"):
        with pytest.raises(E2ENetError, match="cannot be read as an image"), folder_of_images([tmp_path / name], model):
            pass
    for name, message in (
        ("nowhere", "nowhere does not exist"),
        (".", r"holds no \*_0000\.nii\.gz and no DICOM slices.*; broken\.nii\.gz has to be called broken_0000\.nii\.gz$"),
    ):
        with pytest.raises(E2ENetError, match=message), folder_of_images([tmp_path / name], model):
            pass
    SimpleITK.WriteImage(make_scan(), tmp_path / "scan.nrrd")
    pictures = PackedModel(
        replace(model.description, dataset={**model.description.dataset, "file_ending": ".png"}), model.folds
    )
    with pytest.raises(E2ENetError, match=r"is no \*\.png"), folder_of_images([tmp_path / "scan.nrrd"], pictures):
        pass


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch, *functions: str) -> None:
    """These functions of ``os`` fail for a path as they do without permission, whoever runs the tests."""

    def denied(call: Callable[..., Any], given: Any, *others: Any, **named: Any) -> Any:
        if given in (path, str(path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return call(given, *others, **named)

    for name in functions:
        monkeypatch.setattr(os, name, partial(denied, getattr(os, name)))


@pytest.mark.parametrize("functions", [("listdir", "scandir"), ("stat",)], ids=["not listed", "not entered"])
def test_a_folder_that_may_not_be_read(
    tmp_path: Path, model: PackedModel, monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...]
) -> None:
    """It is not empty: nobody can tell. Of a path in a folder that may not be entered nothing is known."""
    folder = tmp_path / "images"
    folder.mkdir()
    SimpleITK.WriteImage(make_scan(), folder / "a_0000.nii.gz")
    segmenter = Segmenter(model)
    forbid(folder, monkeypatch, *functions)
    message = rf"^cannot read {folder} \(Permission denied\): expected .* that you may read"
    for given in (model, with_channels(model, "T1", "T2")):
        with pytest.raises(E2ENetError, match=message), folder_of_images([folder], given):
            pass
    for call in (choose_series, segmenter):
        with pytest.raises(E2ENetError, match=message):
            call(folder)


def test_one_file_may_hold_all_channels(tmp_path: Path, model: PackedModel) -> None:
    """As a picture in colours does, alone or in a folder."""
    description = model.description
    plans = {**description.plans, "image_reader_writer": "NaturalImage2DIO"}
    channels = {"0": "R", "1": "G", "2": "B"}
    dataset = {**description.dataset, "file_ending": ".png", "channel_names": channels}
    pictures = PackedModel(replace(description, plans=plans, dataset=dataset), model.folds)
    colours = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colours, isVector=True), tmp_path / "a_0000.png")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colours[..., 0]), tmp_path / "grey.png")
    with folder_of_images([tmp_path / "a_0000.png"], pictures) as folder:
        assert [file.name for file in folder.iterdir()] == ["a_0000.png"]
        check_channels([folder / "a_0000.png"], pictures)
    with pytest.raises(E2ENetError, match="1 images are given"), folder_of_images([tmp_path / "grey.png"], pictures):
        pass
    (tmp_path / "grey.png").rename(tmp_path / "b_0000.png")
    with pytest.raises(E2ENetError, match=r"b_0001\.png is missing: expected an image for each of the channels R, G, B of b"):
        check_channels([tmp_path / "a_0000.png", tmp_path / "b_0000.png"], pictures)


def test_channels_in_a_folder_are_whole_and_on_one_grid(tmp_path: Path, model: PackedModel) -> None:
    """Whatever predicts them: nnU-Net's readers take either."""
    two = with_channels(model, "T1", "T2")
    first, second = (tmp_path / f"a_000{i}.nii.gz" for i in range(2))
    for file in (first, second):
        SimpleITK.WriteImage(make_scan(), file)
    check_channels([first], two)
    second.write_bytes(second.read_bytes()[:2000])
    with pytest.raises(E2ENetError, match=r"a_0001\.nii\.gz ends after .* bytes"):
        check_channels([first], two)
    moved, finer = make_scan(), make_scan()
    moved.SetOrigin((50, 0, 0))
    finer.SetSpacing([0.9995 * spacing for spacing in finer.GetSpacing()])  # which nnU-Net's readers do not accept
    for other, difference in ((moved, "origin"), (finer, "spacing")):
        SimpleITK.WriteImage(other, second)
        with pytest.raises(E2ENetError, match=rf"a_0001\.nii\.gz has {difference} .*, .*a_0000\.nii\.gz has .*: resample"):
            check_channels([first], two)


def test_images_and_values_that_no_channel_has(tmp_path: Path, model: PackedModel) -> None:
    first, second = (tmp_path / f"a_000{i}.nii.gz" for i in range(2))
    for file in (first, second):
        SimpleITK.WriteImage(make_scan(), file)
    with pytest.raises(E2ENetError, match=r"a_0001\.nii\.gz is one image too many: expected one for each of the channels .*"):
        check_channels([first], model)
    second.unlink()
    SimpleITK.WriteImage(SimpleITK.Compose(make_scan(), make_scan()), first)
    message = r"a_0000\.nii\.gz has 2 values a voxel: expected an image of one channel"
    with pytest.raises(E2ENetError, match=message):
        check_channels([first], model)
    first.rename(tmp_path / "colours.nii.gz")  # a single image is named, and not its copy
    message = f"^{tmp_path}/colours.nii.gz has 2 values a voxel"
    with pytest.raises(E2ENetError, match=message), folder_of_images([tmp_path / "colours.nii.gz"], model):
        pass


def read_by(model: PackedModel, reader: str, ending: str = ".nii.gz") -> PackedModel:
    """The same model, trained on files of this ending with this reader of nnU-Net's."""
    plans = {**model.description.plans, "image_reader_writer": reader}
    dataset = {**model.description.dataset, "file_ending": ending}
    return PackedModel(replace(model.description, plans=plans, dataset=dataset), model.folds)


def test_names_that_are_no_utf_8(tmp_path: Path, model: PackedModel, capsys: pytest.CaptureFixture[str]) -> None:
    """As umlauts in an old archive; SimpleITK would end the process. Names in UTF-8 are read."""
    write_packed(tmp_path / "model.e2enet", model)
    file, folder = (tmp_path / os.fsdecode(name) for name in (b"M\xfcller_0000.nii.gz", b"M\xfcller"))
    SimpleITK.WriteImage(make_scan(), tmp_path / "Müller_0000.nii.gz")
    assert read_image(tmp_path / "Müller_0000.nii.gz").GetSize() == make_scan().GetSize()
    (tmp_path / "Müller_0000.nii.gz").rename(file)
    folder.mkdir()
    message = r"M\\xfcller.* is no UTF-8, .*: rename"
    for call in (choose_series, read_header, read_image, check_whole, Segmenter(model)):
        with pytest.raises(E2ENetError, match=message):
            call(file)
    with pytest.raises(E2ENetError, match=message):
        choose_series(folder)
    with pytest.raises(E2ENetError, match=message):
        write_segmentation(folder / "a.nii.gz", np.zeros((2, 3, 4), np.uint8), {}, SimpleITKIO())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a_0000.nii.gz").symlink_to(file)
    command = ["predict", "-m", str(tmp_path / "model.e2enet"), "-device", "cpu"]
    for images, out in ((tmp_path, tmp_path / "out"), (file, tmp_path / "out"), (tmp_path / "images", folder)):
        assert main([*command, "-i", str(images), "-o", str(out)]) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(f"e2enet predict: .*{message}.*\n", error)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_axes_that_are_not_at_right_angles(tmp_path: Path, model: PackedModel, reader: str) -> None:
    """The file is whole, but SimpleITK reads none with a sheared affine."""
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[1, 2] = 0.3
    file, other = tmp_path / "a_0000.nii.gz", read_by(model, reader)
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 20, 6), np.int16), affine), file)
    message = rf"^{file} has axes that are not at right angles \(a sheared affine\).*: expected .*; resample it"
    with pytest.raises(E2ENetError, match=message):
        check_channels([file], other)
    with pytest.raises(E2ENetError, match=message), folder_of_images([file], other):
        pass
    with pytest.raises(E2ENetError, match=message):
        Segmenter(other)(file)


def test_voxels_that_are_no_numbers(tmp_path: Path, model: PackedModel) -> None:
    """The mean of an image with one of them is none, and its segmentation would be empty."""
    voxels = np.random.default_rng(0).normal(size=(6, 20, 24)).astype(np.float32)
    voxels[2, 3, 4:6], voxels[1, 1, 1] = np.nan, np.inf
    image = SimpleITK.GetImageFromArray(voxels)
    for ending, reader in ((".mha", "SimpleITKIO"), (".nii.gz", "NibabelIO")):
        file, other = tmp_path / f"a_0000{ending}", read_by(model, reader, ending)
        SimpleITK.WriteImage(image, file)
        message = rf"{file} has 3 voxels that are not finite .*: expected numbers; replace them"
        with pytest.raises(E2ENetError, match=message):
            Segmenter(other)(file)
    with pytest.raises(E2ENetError, match=r"a_0000\.mha has 3 voxels"), folder_of_images([tmp_path / "a_0000.mha"], model):
        pass
    segmenter = Segmenter(model)
    for given in (image, (voxels[None], {"spacing": [1, 1, 1]})):
        with pytest.raises(E2ENetError, match="the image has 3 voxels that are not finite"):
            segmenter(given)


@pytest.mark.parametrize(("name", "case"), [("scan_0000.tif", "scan"), ("scan.tif", "scan"), ("scan_2020.tif", "scan_2020")])
def test_the_spacing_of_a_3d_tiff_lies_beside_it(tmp_path: Path, model: PackedModel, name: str, case: str) -> None:
    """nnU-Net's reader looks for it under the name of the case, and takes 1 mm where it finds none."""
    voxels = np.random.default_rng(0).normal(size=(6, 20, 24)).astype(np.float32)
    tifffile.imwrite(tmp_path / name, voxels)
    spacing = [5.0, 0.7, 0.8]
    (tmp_path / f"{case}.json").write_text(json.dumps({"spacing": spacing}))
    tiff = read_by(model, "Tiff3DIO", ".tif")
    with folder_of_images([tmp_path / name], tiff) as folder:
        (file,) = folder.glob("*.tif")
        check_channels([file], tiff)
        assert Tiff3DIO().read_images([str(file)])[1]["spacing"] == spacing
    segmenter = Segmenter(tiff)
    expected = segmenter((voxels[None], {"spacing": spacing}))
    np.testing.assert_array_equal(segmenter(tmp_path / name), expected)
    assert not np.array_equal(segmenter((voxels[None], {"spacing": [1, 1, 1]})), expected)


TURNED = (0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
"""Directions of an image whose axes point backwards, down and to the left."""


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_the_segmentation_of_a_path_has_the_axes_of_the_file(tmp_path: Path, model: PackedModel, reader: str) -> None:
    """As the command writes it, whatever axes the model's reader turns images to."""
    other = read_by(model, reader)
    other.description.plans["configurations"]["3d_fullres"]["patch_size"] = [8, 32, 32]
    write_packed(tmp_path / "model.e2enet", other)
    segmenter = Segmenter(other, mirroring=False)
    scan = SimpleITK.SmoothingRecursiveGaussian(SimpleITK.Cast(make_scan((8, 28, 32)), SimpleITK.sitkFloat32), 2.0)
    for name, direction in (("straight", np.eye(3).ravel().tolist()), ("turned", TURNED)):
        scan.SetDirection(direction)
        file = tmp_path / f"{name}.nii.gz"
        SimpleITK.WriteImage(scan, file)
        options = ["-o", str(tmp_path / "out"), "-device", "cpu", "--disable_tta"]
        assert main(["predict", "-m", str(tmp_path / "model.e2enet"), "-i", str(file), *options]) == 0
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / "out" / file.name))
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(segmenter(file), expected)


def test_a_folder_without_room_is_not_the_fault_of_the_image(tmp_path: Path, model: PackedModel) -> None:
    for ending in (".nii.gz", ".mha"):
        SimpleITK.WriteImage(make_scan((20, 64, 64)), tmp_path / f"scan{ending}")
    for file, ending in ((tmp_path / "scan.mha", ".nii.gz"), (tmp_path / "scan.nii.gz", ".mha")):
        other = read_by(model, "SimpleITKIO", ending)
        with full_disk(20_000), pytest.raises(E2ENetError) as error, folder_of_images([file], other):
            pass
        assert str(error.value).startswith(f"{file} cannot be copied into ")
        assert "make room there, or name another one with the variable TMPDIR" in str(error.value)


def test_no_temporary_folder_is_one_line(tmp_path: Path, model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """None that may be written to, one that is gone, and one on a full disk of a system without links."""
    file, other = tmp_path / "scan.nii.gz", tmp_path / "scan.nrrd"
    for path in (file, other):
        SimpleITK.WriteImage(make_scan(), path)

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    named = r"expected a folder with room.*; .*with the variable TMPDIR"
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.gettempdir", none)
        message = rf"^no temporary folder can be made \(.*No usable temporary directory found.*\): {named}"
        with pytest.raises(E2ENetError, match=message), folder_of_images([file], model):
            pass
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(E2ENetError, match=rf"^no temporary folder .*{tmp_path / 'gone'}.*: {named}"):
        Segmenter(model)(other)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "symlink_to", no_links)
    message = rf"^{file} cannot be copied into {tmp_path}/e2enet_.*: {named}"
    with full_disk(1000), pytest.raises(E2ENetError, match=message), folder_of_images([file], model):
        pass


def test_a_scan_that_memory_cannot_hold_is_no_broken_file(tmp_path: Path) -> None:
    """A whole file of 4 GB, most of which is not on the disk, in a process with less memory."""
    file = tmp_path / "large.nii"
    nibabel.Nifti1Image(np.zeros((1, 1, 1), np.float32), np.eye(4)).to_filename(file)
    header = nibabel.Nifti1Header(file.read_bytes()[:348])
    header.set_data_shape((1024, 1024, 1024))
    with file.open("r+b") as content:
        content.write(header.binaryblock)
        content.truncate(352 + 4 * 2**30)
    check_whole(file)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, hard))
    try:
        with pytest.raises(E2ENetError, match=r"^out of memory: close other programs"), out_of_memory_in_one_line():
            read_image(file)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIO"])
def test_images_are_checked_whatever_reads_them(tmp_path: Path, model: PackedModel, reader: str) -> None:
    segmenter = Segmenter(read_by(model, reader))
    files = [tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz"]
    moved = make_scan()
    moved.SetOrigin((50, 0, 0))
    for file, scan in zip(files, (make_scan(), moved), strict=True):
        SimpleITK.WriteImage(scan, file)
    with pytest.raises(E2ENetError, match=r"t2\.nii\.gz has origin .*: resample the channels to one grid"):
        segmenter(files)
    files[1].write_bytes(files[0].read_bytes()[:2000])
    with pytest.raises(E2ENetError, match=r"t2\.nii\.gz ends after .* bytes"):
        segmenter(files)


def test_other_formats_than_the_models_are_converted(tmp_path: Path, model: PackedModel) -> None:
    """As the command does, also where the model's reader cannot read them."""
    segmenter = Segmenter(read_by(model, "NibabelIO"), mirroring=False, step_size=1)
    for ending in (".nii.gz", ".mha"):
        SimpleITK.WriteImage(make_scan((16, 40, 40)), tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(segmenter(tmp_path / "scan.mha"), segmenter(tmp_path / "scan.nii.gz"))


def test_directions_that_a_format_does_not_store(tmp_path: Path, model: PackedModel) -> None:
    """A GIPL file has none: the model would see another scan, and its labels would lie elsewhere."""
    write_dicom(make_scan(), tmp_path / "turned")
    scan = make_scan()
    scan.SetDirection(np.eye(3).ravel().tolist())
    SimpleITK.WriteImage(scan, tmp_path / "straight.nii.gz")
    other = read_by(model, "SimpleITKIO", ".gipl")
    with folder_of_images([tmp_path / "straight.nii.gz"], other) as folder:
        assert_same_place(SimpleITK.ReadImage(folder / "straight_0000.gipl"), scan)
    message = rf"^{tmp_path}/turned has axes that point .*, which \*\.gipl does not store: expected"
    with pytest.raises(E2ENetError, match=message), folder_of_images([tmp_path / "turned"], other):
        pass


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".gipl", ".gipl.gz", ".hdr", ".img"])
def test_a_file_that_ends_early_is_no_image(tmp_path: Path, ending: str) -> None:
    """SimpleITK reads what is missing as zeros, or as what lies in its memory."""
    noise = np.random.default_rng(0).normal(size=(20, 64, 64)).astype(np.float32)
    file = tmp_path / f"scan{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise), file)
    voxels = file.with_suffix(".img") if ending == ".hdr" else file
    whole = voxels.read_bytes()
    assert read_image(file).GetSize() == (64, 64, 20)
    for size in (len(whole) // 2, len(whole) - 5):
        voxels.write_bytes(whole[:size])
        with pytest.raises(E2ENetError, match=r"ends after [\d,]+ of [\d,]+ bytes: expected a whole image file") as error:
            read_image(file)
        found, of = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+(?= of| bytes)", str(error.value)))
        assert 0.9 * size / len(whole) < found / of < 1


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sizes_are_read_from_any_header(tmp_path: Path, kind: Any, order: str, ending: str) -> None:
    """Also where the axes are not at right angles, which SimpleITK does not read and other readers of nnU-Net's do."""
    sheared = np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    file = tmp_path / f"scan{ending}"
    nibabel.save(kind(np.arange(4000, dtype=np.int16).reshape(20, 20, 10), sheared, header), file)
    check_whole(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(E2ENetError, match=r"ends after [\d,]+ of [\d,]+ bytes"):
        check_whole(file)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.AnalyzeImage])
@pytest.mark.parametrize("order", ["<", ">"])
def test_voxels_in_a_file_of_their_own(tmp_path: Path, kind: Any, order: str) -> None:
    """Compressed or not, whichever of the two files is named. Another file of that ending is none of them."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    voxels = np.arange(4000, dtype=np.int16).reshape(20, 20, 10)
    for compressed in ("", ".gz"):
        folder = tmp_path / f"pair{compressed}"
        folder.mkdir()
        files = [folder / f"scan.{ending}{compressed}" for ending in ("hdr", "img")]
        kind(voxels, np.eye(4), header).to_filename(files[1])
        for file in files:
            np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read_image(file)).T, voxels)
        files[1].write_bytes(files[1].read_bytes()[:-9])
        for file in files:
            with pytest.raises(E2ENetError, match=rf"^{files[1]} ends after [\d,]+ of 8,000 bytes"):
                read_image(file)
    (slice_,) = write_dicom(make_scan((1, 20, 24)), tmp_path)
    assert read_image(slice_.rename(tmp_path / "slice.img")).GetSize() == (24, 20, 1)


@pytest.mark.parametrize("kind", [SimpleITK.sitkUInt8, SimpleITK.sitkInt16, SimpleITK.sitkFloat32, SimpleITK.sitkFloat64])
def test_sizes_are_read_from_gipl(tmp_path: Path, kind: int) -> None:
    file = tmp_path / "scan.gipl"
    SimpleITK.WriteImage(SimpleITK.Image([20, 10, 4], kind), file)
    check_whole(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(E2ENetError, match=r"scan\.gipl ends after [\d,]+ of [\d,]+ bytes"):
        check_whole(file)


def test_a_file_compressed_in_parts_is_whole(tmp_path: Path) -> None:
    """As bgzip writes it: the last bytes tell the size of the last part alone."""
    voxels = np.arange(4000, dtype=np.int16).reshape(10, 20, 20)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), tmp_path / "scan.nii")
    content = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content[:3000]) + gzip.compress(content[3000:]))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read_image(tmp_path / "scan.nii.gz")), voxels)


def test_a_whole_file_of_a_wrong_name_is_read(tmp_path: Path) -> None:
    SimpleITK.WriteImage(make_scan(), tmp_path / "scan.nii")
    (tmp_path / "scan.nii").rename(tmp_path / "other.nii.gz")
    assert read_image(tmp_path / "other.nii.gz").GetSize() == make_scan().GetSize()


def test_images_of_four_axes_are_refused(tmp_path: Path, model: PackedModel) -> None:
    file, other = tmp_path / "both_0000.nii.gz", tmp_path / "elsewhere" / "one.nii.gz"
    other.parent.mkdir()
    for path in (file, other):
        SimpleITK.WriteImage(SimpleITK.Image([8, 8, 4, 2], SimpleITK.sitkFloat32), path)
    with pytest.raises(E2ENetError, match=rf"^{other} has the size \(8, 8, 4, 2\)"), folder_of_images([other], model):
        pass
    two = with_channels(model, "T1", "T2")
    message = r"both_0000\.nii\.gz has the size \(8, 8, 4, 2\): expected a 3D image for each channel"
    with pytest.raises(E2ENetError, match=message), folder_of_images([file], two):
        pass
    with pytest.raises(E2ENetError, match=message):
        check_channels([file], two)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.nii.gz", "is named like no channel of a case"),
        ("b_0001.nii.gz", r"has no first channel, b_0000\.nii\.gz, beside it"),
    ],
)
def test_other_files_in_a_folder_of_images_are_named(tmp_path: Path, model: PackedModel, name: str, message: str) -> None:
    for file in ("a_0000.nii.gz", name):
        SimpleITK.WriteImage(make_scan(), tmp_path / file)
    with pytest.raises(E2ENetError, match=message):
        check_channels([tmp_path / "a_0000.nii.gz"], model)


def test_what_a_segmentation_may_replace(tmp_path: Path, model: PackedModel) -> None:
    """An earlier one of the same image: neither a scan of that name nor the segmentation of another patient's."""
    image, target = tmp_path / "CT_0000.nii.gz", tmp_path / "CT.nii.gz"
    scan, other = make_scan(), make_scan((4, 20, 24))
    SimpleITK.WriteImage(scan, image)
    check_replaceable(target, image, model)
    mr = SimpleITK.Cast(scan + 1000, SimpleITK.sitkUInt16)
    for taken in (scan, mr, SimpleITK.Cast(other > 0, SimpleITK.sitkUInt8)):
        SimpleITK.WriteImage(taken, target)
        with pytest.raises(E2ENetError, match=r"CT\.nii\.gz is there already, and no segmentation of this image"):
            check_replaceable(target, image, model)
    whole = target.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])  # of a scan, or of a segmentation on a full disk
    with pytest.raises(E2ENetError, match=r"CT\.nii\.gz is there already, and cannot be read: name another folder with -o"):
        check_replaceable(target, image, model)
    SimpleITK.WriteImage(SimpleITK.Cast(scan > 0, SimpleITK.sitkUInt8), target)
    check_replaceable(target, image, model)


# ---- the command ---------------------------------------------------------------------------------------------------------


def test_a_dicom_series_is_segmented_as_the_same_scan_in_a_folder(trained: Path, project: Project, tmp_path: Path) -> None:
    packed = tmp_path / "model.e2enet"
    assert main(["export", str(copy_with_random_heads(trained, tmp_path / "results")), str(packed), "-f", "0"]) == 0
    source = min((project.raw / "imagesTs").glob("*_0000.nii.gz"))
    scan = SimpleITK.Round(SimpleITK.ReadImage(source))
    scan = SimpleITK.Cast(scan, SimpleITK.sitkInt16)
    scan.SetDirection(DIRECTION)
    write_dicom(scan, tmp_path / "dicom")
    (tmp_path / "images").mkdir()
    SimpleITK.WriteImage(scan, tmp_path / "images" / "case_0000.nii.gz")
    shutil.copy(tmp_path / "images" / "case_0000.nii.gz", tmp_path / "case.nii.gz")
    options = ["-device", "cpu", "--disable_tta"]
    for given in ("images", "case.nii.gz", "dicom"):
        out = tmp_path / "out" / given
        assert main(["predict", "-m", str(packed), "-i", str(tmp_path / given), "-o", str(out), *options]) == 0
    expected = SimpleITK.ReadImage(tmp_path / "out" / "images" / "case.nii.gz")
    voxels = SimpleITK.GetArrayFromImage(expected)
    assert len(np.unique(voxels)) > 1
    for found in ("case.nii.gz/case.nii.gz", "dicom/dicom.nii.gz"):
        segmentation = SimpleITK.ReadImage(tmp_path / "out" / found)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(segmentation), voxels)
        assert_same_place(segmentation, scan)
