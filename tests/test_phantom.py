"""The phantom data set: what it promises to nnU-Net and to whoever repeats an experiment."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunetv2_e2enet.cli import phantom as command
from nnunetv2_e2enet.datasets import LABELS, MANY_LABELS, phantom, phantom_case, write_phantom_dataset
from nnunetv2_e2enet.errors import E2ENetError

SIZE = (24, 64, 64)
SPACING = (2.5, 1.0, 1.0)
SMALL_SIZE = (20, 56, 56)
SEEDS = st.integers(0, 2**32)


def volumes(segmentation: np.ndarray) -> np.ndarray:
    """Voxels of each foreground label, in the order of ``LABELS``."""
    return np.bincount(segmentation.ravel(), minlength=len(LABELS))[1:]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All volumes below a folder by their relative path."""
    files = sorted(folder.rglob("*.nii.gz"))
    return {str(file.relative_to(folder)): sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "Dataset300_Phantom"
    write_phantom_dataset(folder, n_train=3, n_test=2, seed=5, size=SMALL_SIZE)
    return folder


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_every_case_shows_all_labels_in_descending_order_of_volume(seed: int) -> None:
    image, segmentation = phantom_case(np.random.default_rng(seed), SIZE, SPACING)
    assert (image.shape, image.dtype) == (SIZE, np.float32)
    assert (segmentation.shape, segmentation.dtype) == (SIZE, np.uint8)
    assert np.isfinite(image).all()
    assert image.min() >= 0
    assert set(np.unique(segmentation)) == set(LABELS.values())
    assert (np.diff(volumes(segmentation)) < 0).all()


@given(seed=SEEDS, field_of_view=st.sampled_from([((16, 16, 16), (1.0, 1.0, 1.0)), ((16, 40, 40), (2.5, 1.0, 1.0))]))
@settings(max_examples=40, deadline=None)
def test_all_labels_show_in_the_coarsest_field_of_view(
    seed: int, field_of_view: tuple[tuple[int, int, int], tuple[float, float, float]]
) -> None:
    _, segmentation = phantom_case(np.random.default_rng(seed), *field_of_view)
    assert (volumes(segmentation) > 0).all()


@given(seed=SEEDS, field_of_view=st.sampled_from([(SIZE, SPACING), ((20, 20, 20), (1.0, 1.0, 1.0))]))
@settings(max_examples=40, deadline=None)
def test_of_many_structures_every_case_shows_all(
    seed: int, field_of_view: tuple[tuple[int, int, int], tuple[float, float, float]]
) -> None:
    _, segmentation = phantom_case(np.random.default_rng(seed), *field_of_view, many=True)
    assert set(np.unique(segmentation)) == set(MANY_LABELS.values())
    if field_of_view[0] == SIZE:
        voxels = np.bincount(segmentation.ravel())[1:]
        assert voxels.max() > 100 * voxels.min()


def test_many_structures_need_a_finer_field_of_view() -> None:
    with pytest.raises(E2ENetError, match="20 times the largest voxel side"):
        phantom_case(np.random.default_rng(0), (16, 16, 16), (1.0, 1.0, 1.0), many=True)


@pytest.mark.parametrize(
    ("size", "spacing", "message"),
    [
        ((15, 40, 40), tuple(np.array([2.5678, 0.95, 0.95])), "phantom of 15 x 40 x 40 voxels of 2.57 x 0.95 x 0.95 mm: too"),
        ((24, 24, 24), SPACING, "too coarse"),
        ((24, 0, 24), SPACING, "positive"),
        (SIZE, (2.5, 1.0, -1.0), "positive"),
    ],
)
def test_impossible_field_of_view_is_refused(
    size: tuple[int, int, int], spacing: tuple[float, float, float], message: str
) -> None:
    with pytest.raises(E2ENetError, match=message):
        phantom_case(np.random.default_rng(0), size, spacing)


def test_same_seed_same_case_other_seed_other_case() -> None:
    first, again, other = (phantom_case(np.random.default_rng(seed), SIZE, SPACING) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.tobytes() == b.tobytes()
        assert a.tobytes() != c.tobytes()


def test_organs_differ_in_contrast_yet_no_threshold_finds_them() -> None:
    image, segmentation = phantom_case(np.random.default_rng(3), SIZE, SPACING)
    means = [image[segmentation == label].mean() for label in LABELS.values() if label]
    assert np.diff(sorted(means)).min() > 10
    for label in (label for label in LABELS.values() if label):
        organ = segmentation == label
        low, high = np.percentile(image[organ], [2.5, 97.5])
        inside_window = (image >= low) & (image <= high)
        dice = 2 * (inside_window & organ).sum() / (inside_window.sum() + organ.sum())
        assert dice < 0.85


def test_a_case_depends_on_seed_split_and_number_alone(dataset: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "smaller"
    write_phantom_dataset(smaller, n_train=1, n_test=1, seed=5, size=SMALL_SIZE)
    other_seed = tmp_path / "other_seed"
    write_phantom_dataset(other_seed, n_train=1, n_test=1, seed=6, size=SMALL_SIZE)
    expected = arrays(dataset)
    found, different = arrays(smaller), arrays(other_seed)
    assert len(found) == len(different) == 4
    for name, voxels in found.items():
        np.testing.assert_array_equal(voxels, expected[name])
        assert not np.array_equal(voxels, different[name])
    assert not np.array_equal(found["labelsTr/phantom_000.nii.gz"], found["labelsTs/phantom_test_000.nii.gz"])


def test_nnunet_accepts_the_data_set(dataset: Path) -> None:
    verify_dataset_integrity(str(dataset), num_processes=1)
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["labels"] == LABELS
    assert description["numTraining"] == 3
    assert sorted(arrays(dataset)) == [
        *(f"imagesTr/phantom_{i:03d}_0000.nii.gz" for i in range(3)),
        *(f"imagesTs/phantom_test_{i:03d}_0000.nii.gz" for i in range(2)),
        *(f"labelsTr/phantom_{i:03d}.nii.gz" for i in range(3)),
        *(f"labelsTs/phantom_test_{i:03d}.nii.gz" for i in range(2)),
    ]


def test_spacing_is_anisotropic_and_varies(dataset: Path) -> None:
    spacings = []
    for image_file in sorted(dataset.glob("images*/*.nii.gz")):
        image = sitk.ReadImage(str(image_file))
        label_folder = image_file.parent.name.replace("images", "labels")
        label_name = image_file.name.replace("_0000", "")
        assert sitk.ReadImage(str(dataset / label_folder / label_name)).GetSpacing() == image.GetSpacing()
        assert image.GetSize() == SMALL_SIZE[::-1]
        spacings.append(image.GetSpacing())
    width, height, depth = np.array(spacings).T
    np.testing.assert_array_equal(width, height)
    assert (np.abs(width - 1) <= 0.1).all()
    assert (np.abs(depth / 2.5 - 1) <= 0.1).all()
    assert len(set(spacings)) == len(spacings)


def test_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset300_Phantom"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(E2ENetError, match=r"not empty \(found thesis\.txt\).*remove it or choose another name"):
        write_phantom_dataset(folder, 1, 0, size=SMALL_SIZE)
    assert [entry.name for entry in tmp_path.rglob("*")] == [folder.name, "thesis.txt"]
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_empty_folder_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset300_Phantom"
    folder.mkdir()
    write_phantom_dataset(folder, 1, 0, size=SMALL_SIZE)
    assert len(arrays(folder)) == 2
    assert list(tmp_path.iterdir()) == [folder]


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(E2ENetError, match="is not a folder"):
        write_phantom_dataset(file, 1, 0, size=SMALL_SIZE)
    with pytest.raises(E2ENetError, match="cannot write into"):
        write_phantom_dataset(file / "Dataset300_Phantom", 1, 0, size=SMALL_SIZE)
    assert file.read_text() == "kept"


@pytest.mark.parametrize(("n_train", "n_test", "seed"), [(0, 1, 0), (1, -1, 0), (1, 1, -1)])
def test_numbers_out_of_range_are_refused(tmp_path: Path, n_train: int, n_test: int, seed: int) -> None:
    with pytest.raises(E2ENetError, match="expected"):
        write_phantom_dataset(tmp_path / "new", n_train, n_test, seed)
    assert list(tmp_path.iterdir()) == []


def test_crash_in_the_middle_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write_until_the_disk_is_full(volume: sitk.Image, file: str, **_options: object) -> None:
        if len(written) == 3:
            raise RuntimeError("disk full")
        Path(file).write_bytes(bytes(volume.GetNumberOfPixels()))
        written.append(file)

    monkeypatch.setattr(phantom.sitk, "WriteImage", write_until_the_disk_is_full)
    with pytest.raises(RuntimeError, match="disk full"):
        write_phantom_dataset(tmp_path / "Dataset300_Phantom", 2, 1, size=SMALL_SIZE)
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "raw"


def test_command_writes_into_the_raw_folder(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parsed("7", "--name", "Toy", "--cases", "2", "--test-cases", "1", "--seed", "3")) == 0
    folder = raw / "Dataset007_Toy"
    assert len(arrays(folder)) == 6
    assert json.loads((folder / "dataset.json").read_text())["name"] == "Toy"
    assert capsys.readouterr().out == f"Wrote 2 training and 1 held-out cases to {folder}\n"


def test_command_writes_many_structures(raw: Path) -> None:
    assert command.run(parsed("7", "--cases", "1", "--test-cases", "0", "--many")) == 0
    folder = raw / "Dataset007_Phantom"
    assert json.loads((folder / "dataset.json").read_text())["labels"] == MANY_LABELS
    assert set(np.unique(arrays(folder)["labelsTr/phantom_000.nii.gz"])) == set(MANY_LABELS.values())


def test_command_needs_the_raw_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(E2ENetError, match="nnUNet_raw is not set"):
        command.run(parsed("7"))


def test_command_refuses_a_number_in_use(raw: Path) -> None:
    (raw / "Dataset007_Liver").mkdir(parents=True)
    with pytest.raises(E2ENetError, match="Dataset007_Liver"):
        command.run(parsed("7"))
    assert [entry.name for entry in raw.iterdir()] == ["Dataset007_Liver"]


@pytest.mark.parametrize("arguments", [("0",), ("1000",), ("7", "--name", "../escape"), ("7", "--name", "")])
def test_command_refuses_numbers_and_names_that_nnunet_cannot_use(raw: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(E2ENetError, match="data set n"):
        command.run(parsed(*arguments))
    assert not raw.exists()
