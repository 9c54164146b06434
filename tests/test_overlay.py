"""The overlay picture: a readable image that shows what differs."""

from pathlib import Path
from typing import IO

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.overlay import best_slice, overlay, save_figure, write_overlay

SHAPE = (10, 20, 16)
SPACING = (3.0, 1.0, 1.0)
LABELS = {0: "background", 1: "organ", 2: "lesion"}


def write_volume(file: Path, voxels: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> Path:
    volume = sitk.GetImageFromArray(voxels)
    volume.SetSpacing(spacing[::-1])
    sitk.WriteImage(volume, str(file))
    return file


@pytest.fixture
def segmentation() -> np.ndarray:
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[2:8, 3:15, 0:9] = 1
    voxels[4:6, 6:9, 4:7] = 2
    return voxels


@pytest.fixture
def image(tmp_path: Path, segmentation: np.ndarray) -> Path:
    noise = np.random.default_rng(0).normal(0, 0.1, SHAPE)
    return write_volume(tmp_path / "image.nii.gz", (segmentation + noise).astype(np.float32))


@pytest.fixture
def reference(tmp_path: Path, segmentation: np.ndarray) -> Path:
    return write_volume(tmp_path / "reference.nii.gz", segmentation)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(imread(path))


def test_one_column_per_segmentation_in_a_png_of_sensible_size(tmp_path: Path, image: Path, reference: Path) -> None:
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    write_overlay(one, image, {"Reference": reference}, LABELS)
    write_overlay(three, image, {"Reference": reference, "E2ENet": reference, "nnU-Net": reference}, LABELS)
    for path in (one, three):
        assert path.read_bytes().startswith(b"\x89PNG")
        height, width, _ = pixels(path).shape
        assert 300 < width < 2000
        assert 300 < height < 3000
        assert pixels(path)[..., :3].std() > 0.1
    assert pixels(three).shape[1] > 2.5 * pixels(one).shape[1]
    assert {file.name for file in tmp_path.iterdir()} == {"image.nii.gz", "reference.nii.gz", "one.png", "three.png"}


def test_same_input_same_picture_and_a_missed_label_shows(
    tmp_path: Path, image: Path, reference: Path, segmentation: np.ndarray
) -> None:
    missed = write_volume(tmp_path / "missed.nii.gz", np.where(segmentation == 2, 1, segmentation))
    pictures = []
    for second in (reference, reference, missed):
        write_overlay(tmp_path / "overlay.png", image, {"Reference": reference, "Model": second}, LABELS)
        pictures.append(pixels(tmp_path / "overlay.png"))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    differs = (pictures[0] != pictures[2]).any(axis=(0, 2))
    middle = differs.size // 2
    assert not differs[:middle].any()
    assert differs[middle:].any()


def test_empty_segmentation_can_be_shown(tmp_path: Path, image: Path) -> None:
    empty = write_volume(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    write_overlay(tmp_path / "overlay.png", image, {"Model": empty}, LABELS)
    assert pixels(tmp_path / "overlay.png").size


def test_more_labels_than_colours(tmp_path: Path, image: Path) -> None:
    """Each of them is drawn: the picture is another one without it. Its slices are the same, as all labels lie in them."""
    generator, voxels, pictures = np.random.default_rng(0), np.zeros(SHAPE, np.uint8), []
    for axis, n in enumerate(SHAPE):
        plane = np.moveaxis(voxels, axis, 0)[n // 2]
        plane[:] = generator.integers(0, 23, plane.shape)
    for missing in (None, 1, 11, 22):
        shown = write_volume(tmp_path / "many.nii.gz", np.where(voxels == missing, 0, voxels).astype(np.uint8))
        write_overlay(tmp_path / "overlay.png", image, {"Model": shown}, {i: f"label {i}" for i in range(23)})
        pictures.append(pixels(tmp_path / "overlay.png"))
    for i, picture in enumerate(pictures):
        assert not any(np.array_equal(picture, other) for other in pictures[:i])


def test_picture_keeps_the_physical_aspect_ratio(tmp_path: Path, segmentation: np.ndarray) -> None:
    heights = {}
    for depth_spacing in (1.0, 2.0, 3.0):
        spacing = (depth_spacing, 1.0, 1.0)
        volume = write_volume(tmp_path / "volume.nii.gz", segmentation, spacing)
        write_overlay(tmp_path / "overlay.png", volume, {"Model": volume}, LABELS)
        heights[depth_spacing] = pixels(tmp_path / "overlay.png").shape[0]
    assert heights[2.0] - heights[1.0] == pytest.approx(heights[3.0] - heights[2.0], abs=2)
    assert heights[2.0] - heights[1.0] > 100


def test_picture_does_not_depend_on_the_storage_order(tmp_path: Path, image: Path, reference: Path) -> None:
    write_overlay(tmp_path / "lps.png", image, {"Model": reference}, LABELS)
    stored_otherwise = []
    for file in (image, reference):
        other = tmp_path / f"rsa_{file.name}"
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), "RSA"), str(other))
        stored_otherwise.append(other)
    write_overlay(tmp_path / "rsa.png", stored_otherwise[0], {"Model": stored_otherwise[1]}, LABELS)
    np.testing.assert_array_equal(pixels(tmp_path / "lps.png"), pixels(tmp_path / "rsa.png"))


def test_the_patients_right_is_on_the_left(tmp_path: Path) -> None:
    """A block near the left, anterior, superior corner of the patient, and brighter voxels around it: where they are drawn."""
    voxels, bright = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.float32)
    voxels[7:9, 3:7, 10:14] = 1
    bright[6:, 2:8, 9:15] = 1
    block = write_volume(tmp_path / "block.nii.gz", voxels)
    figure = overlay(write_volume(tmp_path / "image.nii.gz", bright), {"Model": block}, LABELS)
    save_figure(figure, tmp_path / "overlay.png")
    picture = pixels(tmp_path / "overlay.png")[::-1, :, :3]  # rows from below
    for axes, right_of_the_middle in zip(figure.axes, (True, True, False), strict=True):  # anterior is on the left
        left, below, right, above = axes.get_window_extent().padded(-3).extents.astype(int)  # without the frame
        inside = picture[below:above, left:right]
        coloured = np.ptp(inside, axis=2) > 0.1
        for shown in (coloured, (inside.min(axis=2) > 0.8) & ~coloured):
            up, across = np.argwhere(shown).mean(axis=0) / shown.shape
            assert (across > 0.6) if right_of_the_middle else (across < 0.4)
            assert up > 0.6


def test_best_slice_shows_the_largest_extent_of_the_labels() -> None:
    voxels = np.zeros((6, 4, 4), np.uint8)
    voxels[1] = 1
    voxels[3, 0, 0], voxels[3, 2, 2] = 1, 2
    voxels[4, 0, 0], voxels[4, 2:, 2:] = 1, 2
    assert best_slice([voxels], [1, 2], axis=0) == 4
    assert best_slice([voxels], [1], axis=0) == 1
    assert best_slice([np.zeros_like(voxels), voxels], [1, 2], axis=0) == 4
    assert best_slice([voxels], [5], axis=0) == 3
    stray = np.zeros((6, 8, 8), np.uint8)
    stray[1, :6, :6], stray[1, 7, 7] = 1, 2
    stray[4, 0, 0], stray[4, 1, 1], stray[4, 2, 2] = 1, 2, 3  # one voxel of each
    stray[5, :6, :6] = 3
    assert best_slice([stray], [1, 2, 3], axis=0) == 1


def test_bad_input_is_refused_and_nothing_written(tmp_path: Path, image: Path, reference: Path) -> None:
    other_grid = write_volume(tmp_path / "grid.nii.gz", np.zeros((10, 20, 15), np.uint8))
    other_spacing = write_volume(tmp_path / "spacing.nii.gz", np.zeros(SHAPE, np.uint8), (2.0, 1.0, 1.0))
    flat = tmp_path / "flat.nii.gz"
    sitk.WriteImage(sitk.Image(16, 20, sitk.sitkUInt8), str(flat))
    target = tmp_path / "overlay.png"
    for file, message in (
        (other_grid, "give the segmentation of this image"),
        (other_spacing, "give the segmentation of this image"),
        (flat, "not a 3D image"),
        (tmp_path / "absent.nii.gz", "cannot be read"),
    ):
        with pytest.raises(E2ENetError, match=message):
            write_overlay(target, image, {"Model": file}, LABELS)
    with pytest.raises(E2ENetError, match="at least one"):
        write_overlay(target, image, {}, LABELS)
    with pytest.raises(E2ENetError, match="at least one"):
        write_overlay(target, image, {"Model": reference}, {0: "background"})
    with pytest.raises(E2ENetError, match="cannot write"):
        write_overlay(tmp_path / "absent" / "overlay.png", image, {"Model": reference}, LABELS)
    assert not target.exists()


def test_crash_keeps_the_former_picture(tmp_path: Path, image: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "overlay.png"
    write_overlay(target, image, {"Model": reference}, LABELS)
    former = target.read_bytes()

    def crash(_figure: Figure, file: IO[bytes], **_options: object) -> None:
        file.write(b"half a picture")
        raise RuntimeError("crash")

    monkeypatch.setattr(Figure, "savefig", crash)
    with pytest.raises(RuntimeError, match="crash"):
        write_overlay(target, image, {"Model": reference}, LABELS)
    assert target.read_bytes() == former
    assert {file.name for file in tmp_path.iterdir()} == {"image.nii.gz", "reference.nii.gz", "overlay.png"}
