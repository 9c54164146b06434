"""The picture of a segmentation: to scale, the right way round, with contours where the labels are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.image import imread
from support import Project, untrained_model

from nnunetv2_e2enet.deployment import PackedModel, preview
from nnunetv2_e2enet.deployment.preview import write_preview
from nnunetv2_e2enet.deployment.previews import check_previews
from nnunetv2_e2enet.deployment.volumes import check_volumes
from nnunetv2_e2enet.errors import E2ENetError

SHAPE, SPACING = (12, 30, 40), (4.0, 1.5, 1.0)
LABELS = {"organ": [1], "lesion": [2], "bladder": [3]}
ORGAN = (slice(2, 10), slice(6, 20), slice(24, 36))
"""On the patient's left: towards the end of the last axis."""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An image and its segmentation."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[ORGAN] = 1
    voxels[6, 8:12, 28:32] = 2
    image = (100 * voxels + np.random.default_rng(0).normal(0, 5, SHAPE)).astype(np.float32)
    paths = tmp_path / "image.nii.gz", tmp_path / "segmentation.nii.gz"
    for path, values in zip(paths, (image, voxels), strict=True):
        volume = SimpleITK.GetImageFromArray(values)
        volume.SetSpacing(SPACING[::-1])
        volume.SetOrigin((-20.0, -22.0, -100.0))
        SimpleITK.WriteImage(volume, path)
    return paths


def drawn(
    path: Path,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    labels: dict[str, list[int]] | None = None,
    ct: bool = False,
) -> Figure:
    """What was written to ``path``."""
    figures: list[Figure] = []
    save = preview.save_figure

    def keep(figure: Figure, target: Path) -> None:
        figures.append(figure)
        save(figure, target)

    monkeypatch.setattr(preview, "save_figure", keep)
    write_preview(path, *files, labels or LABELS, ct)
    (figure,) = figures
    return figure


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def contours(axes: Axes) -> list[np.ndarray]:
    """Vertices of the contours of each label, in mm."""
    return [np.concatenate([p.vertices for p in c.get_paths()]) for c in axes.collections if isinstance(c, QuadContourSet)]


def test_planes_are_to_scale(tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(tmp_path / "case.png", files, monkeypatch)
    depth, height, width = (n * mm for n, mm in zip(SHAPE, SPACING, strict=True))
    inches = [axes.get_position().size * figure.get_size_inches() for axes in figure.axes[:3]]
    scale = inches[0][0] / width
    np.testing.assert_allclose(inches, np.multiply([(width, height), (width, depth), (height, depth)], scale), rtol=1e-6)
    for axes, size in zip(figure.axes, ((width, height), (width, depth), (height, depth)), strict=False):
        assert (abs(np.diff(axes.get_xlim())[0]), abs(np.diff(axes.get_ylim())[0])) == size
    rows, columns, _ = imread(tmp_path / "case.png").shape
    assert (columns, rows) == tuple((figure.get_size_inches() * figure.dpi).astype(int))


def test_contours_lie_around_the_labels_in_planes_through_them(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn(tmp_path / "case.png", files, monkeypatch)
    for axes, (down, across) in zip(figure.axes, ((1, 2), (0, 2), (0, 1)), strict=False):
        organ, lesion = contours(axes)
        bounds = [(ORGAN[axis].start * SPACING[axis], ORGAN[axis].stop * SPACING[axis]) for axis in (across, down)]
        np.testing.assert_allclose([organ.min(0), organ.max(0)], np.transpose(bounds), atol=1e-6)
        assert (lesion.min(0) > organ.min(0)).all()
        assert (lesion.max(0) < organ.max(0)).all()
    axial, coronal, _ = figure.axes[:3]
    assert axial.yaxis_inverted()  # the first row, anterior, is above
    assert not coronal.yaxis_inverted()  # the first slice, inferior, is below
    assert set("RLAP") < set(texts(axial))
    # slice 6, row 8 and column 28, where the lesion is as well
    assert [texts(axes)[0] for axes in figure.axes[:3]] == ["Axial\nF 76 mm", "Coronal\nA 10 mm", "Sagittal\nL 8 mm"]


def test_the_patient_lies_as_the_letters_say(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the screen. The lesion is on the patient's left, in front of the middle and above it."""
    figure = drawn(tmp_path / "case.png", files, monkeypatch)
    picture = imread(tmp_path / "case.png")
    for axes, edges in zip(figure.axes, ("RLAP", "RLHF", "APHF"), strict=False):
        middle = axes.transAxes.transform((0.5, 0.5))
        at = {text.get_text(): text.get_window_extent().get_points().mean(0) - middle for text in axes.texts}
        offset = axes.transData.transform(contours(axes)[1]).mean(0) - middle
        for letter, axis, sign in zip(edges, (0, 0, 1, 1), (-1, 1, 1, -1), strict=True):
            assert sign * at[letter][axis] > 0.3 * axes.bbox.size[axis]
            assert abs(at[letter][1 - axis]) < 1
        assert np.sign(offset).tolist() == [-1 if edges[0] == "A" else 1, 1]
        x, y = (middle + offset).astype(int)
        mirrored = int(2 * middle[0]) - x
        assert picture[-y, x, :3].mean() > 0.9  # the lesion is white
        assert picture[-y, mirrored, :3].mean() < 0.5


def test_the_legend_has_volumes(tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(tmp_path / "case.png", files, monkeypatch)
    legend = figure.axes[3].get_legend()
    assert legend is not None
    lesion, organ = (n * 6e-3 for n in (16, 8 * 14 * 12 - 16))
    expected = [f"organ, {organ:.1f} ml", "lesion, less than 0.1 ml", "bladder, not found"]
    assert lesion < 0.1
    assert [text.get_text() for text in legend.get_texts()] == expected
    assert figure.texts[0].get_text() == "case"


def test_windows(tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ct = drawn(tmp_path / "ct.png", files, monkeypatch, ct=True)
    assert ct.texts[1].get_text() == "window -160 to 240 HU"
    assert ct.axes[0].images[0].get_clim() == (-160, 240)
    monkeypatch.undo()
    other = drawn(tmp_path / "other.png", files, monkeypatch)
    low, high = other.axes[0].images[0].get_clim()
    assert -20 < low < 0
    assert 100 < high < 220


def test_the_picture_does_not_depend_on_how_the_scan_is_stored(tmp_path: Path, files: tuple[Path, Path]) -> None:
    write_preview(tmp_path / "lps.png", *files, LABELS)
    expected = imread(tmp_path / "lps.png")
    turned = []
    for file in files:
        turned.append(tmp_path / f"rsa_{file.name}")
        SimpleITK.WriteImage(SimpleITK.DICOMOrient(SimpleITK.ReadImage(file), "RSA"), turned[-1])
    (tmp_path / "turned").mkdir()
    write_preview(tmp_path / "turned" / "lps.png", *turned, LABELS)
    np.testing.assert_array_equal(imread(tmp_path / "turned" / "lps.png"), expected)


def test_nothing_found_and_more_labels_than_room(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.nii.gz"
    SimpleITK.WriteImage(SimpleITK.ReadImage(files[1]) * 0, empty)
    figure = drawn(tmp_path / "empty.png", (files[0], empty), monkeypatch)
    assert not any(contours(axes) for axes in figure.axes)
    monkeypatch.undo()
    many = {f"a label with a rather long name {i}": [i] for i in range(1, 118)}
    figure = drawn(tmp_path / "many.png", files, monkeypatch, many)
    legend = figure.axes[3].get_legend()
    assert legend is not None
    *named, last = (text.get_text() for text in legend.get_texts())
    assert [text for text in named if not text.endswith("not found")] == [
        "a label with a rather long name 1, 8.0 ml",
        "a label with a rather long name 2, less than 0.1 ml",
    ]
    assert last == f"and {117 - len(named)} others, not found"


def test_names_are_no_formulas(tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(tmp_path / "cost $^$.png", files, monkeypatch, {"organ $_$": [1]})
    assert figure.texts[0].get_text() == "cost $^$"


def test_what_cannot_be_drawn(tmp_path: Path, files: tuple[Path, Path]) -> None:
    flat = tmp_path / "flat.nii.gz"
    SimpleITK.WriteImage(SimpleITK.Image(16, 20, SimpleITK.sitkUInt8), flat)
    for image, segmentation, message in (
        (flat, files[1], "not a 3D image"),
        (files[0], flat, "not a 3D image"),
        (tmp_path / "absent.nii.gz", files[1], "cannot be read"),
    ):
        with pytest.raises(E2ENetError, match=message):
            write_preview(tmp_path / "case.png", image, segmentation, LABELS)
    with pytest.raises(E2ENetError, match="at least one"):
        write_preview(tmp_path / "case.png", *files, {})
    assert not (tmp_path / "case.png").exists()


def test_images_without_pictures_or_volumes_are_refused_before_prediction(
    project: Project, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    model, _ = untrained_model(project)
    check_previews([files[0]], model)
    flat = tmp_path / "flat.nii.gz"
    SimpleITK.WriteImage(SimpleITK.Image(16, 20, SimpleITK.sitkUInt8), flat)
    with pytest.raises(E2ENetError, match="is not a 3D image of one channel"):
        check_previews([flat], model)
    check_volumes([files[0]], model)
    with pytest.raises(E2ENetError, match=r"flat\.nii\.gz is a 2D image, whose pixels have no volume"):
        check_volumes([flat], model)
    (tmp_path / "broken.nii.gz").write_text("no image")
    with pytest.raises(E2ENetError, match=r"broken\.nii\.gz cannot be read as an image"):
        check_volumes([tmp_path / "broken.nii.gz"], model)
    pictures = replace(model.description, dataset={**model.description.dataset, "file_ending": ".png"})
    with pytest.raises(E2ENetError, match=r"images are \*\.png"):
        check_previews([files[0]], PackedModel(pictures, model.folds))
