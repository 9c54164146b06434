"""Trained models in one file: the segmentations of nnU-Net's own command, from a file as small as its active weights."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import SimpleITK
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from scans import make_scan, write_dicom
from support import Project, copy_with_random_heads, full_disk, program, run_command, untrained_model

from nnunetv2_e2enet.cli import termination
from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.deployment import PackedModel, Segmenter, pack_model, preview, read_packed, volumes, write_packed
from nnunetv2_e2enet.deployment.images import check_replaceable
from nnunetv2_e2enet.deployment.segmenter import failures_in_one_line
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import accounts, maskable_layers
from nnunetv2_e2enet.prediction.writing import write_segmentation
from nnunetv2_e2enet.settings import STORAGE_16_BIT, override, settings

SEQUENTIAL = ["-device", "cpu", "-npp", "0", "-nps", "0"]
NNUNET_NAMES = ["-d", "993", "-c", "3d_fullres", "-tr", "nnUNetTrainerE2ENet_smoke"]


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_random_heads(trained, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``e2enet export`` makes of both folds."""
    file = tmp_path_factory.mktemp("packed") / "phantom.e2enet"
    assert main(["export", str(model), str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def by_nnunet(model: Path, project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segmentations and probabilities of nnUNetv2_predict, with mirroring, both folds and the CPU engine."""
    folder = tmp_path_factory.mktemp("by_nnunet")
    files = ["-i", str(project.raw / "imagesTs"), "-o", str(folder)]
    options = [*SEQUENTIAL, *NNUNET_NAMES, "-f", "0", "1", "--save_probabilities"]
    folders = {**project.environment, "nnUNet_results": str(model.parents[1])}
    run_command("nnUNetv2_predict", *files, *options, env={**folders, "nnUNet_e2enet_engine": "on"})
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, setting: Callable[..., None]) -> Iterator[None]:
    """The engine and threads of ``by_nnunet``; nnU-Net finds no trainers and none of its folders."""

    def not_found(name: str) -> None:
        raise AssertionError(f"asked for the trainer {name}")

    setting(engine="on")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name", not_found)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))


def same_file(ours: Path, theirs: Path) -> bool:
    a, b = SimpleITK.ReadImage(ours), SimpleITK.ReadImage(theirs)
    same_grid = (a.GetSpacing(), a.GetOrigin(), a.GetDirection()) == (b.GetSpacing(), b.GetOrigin(), b.GetDirection())
    return same_grid and np.array_equal(SimpleITK.GetArrayFromImage(a), SimpleITK.GetArrayFromImage(b))


def images(project: Project) -> dict[str, Path]:
    return {path.name.replace("_0000", ""): path for path in sorted((project.raw / "imagesTs").iterdir())}


def single_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("e2enet ")
    assert error.count("\n") == 1
    return error


# ---- the same segmentations ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_predict_is_nnunets_voxel_by_voxel(packed: Path, by_nnunet: Path, project: Project, tmp_path: Path) -> None:
    files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path)]
    assert main(["predict", *files, *SEQUENTIAL, "--save_probabilities"]) == 0
    for name in images(project):
        assert same_file(tmp_path / name, by_nnunet / name)
        assert len(np.unique(read(tmp_path / name))) > 1
        ours, theirs = (np.load(folder / name.replace(".nii.gz", ".npz"))["probabilities"] for folder in (tmp_path, by_nnunet))
        np.testing.assert_array_equal(ours, theirs)
    assert json.loads((tmp_path / "plans.json").read_text()) == json.loads((by_nnunet / "plans.json").read_text())
    first = tmp_path / min(images(project))
    stamp = first.stat().st_mtime_ns
    (tmp_path / max(images(project))).unlink()
    assert main(["predict", *files, *SEQUENTIAL, "--save_probabilities", "--c"]) == 0
    assert same_file(tmp_path / max(images(project)), by_nnunet / max(images(project)))
    assert first.stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("alone")
def test_volumes_and_previews(packed: Path, by_nnunet: Path, project: Project, tmp_path: Path) -> None:
    files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path)]
    assert main(["predict", *files, "-device", "cpu", "--volumes", "--preview"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {name.replace(".nii.gz", ".png") for name in images(project)}
    with (tmp_path / "volumes.csv").open(newline="") as file:
        rows = {(row["case"], row["label"]): float(row["millilitres"]) for row in csv.DictReader(file)}
    labels = read_packed(packed).description.dataset["labels"]
    assert len(rows) == len(images(project)) * (len(labels) - 1)
    for name in images(project):
        assert same_file(tmp_path / name, by_nnunet / name)
        voxel = np.prod(SimpleITK.ReadImage(by_nnunet / name).GetSpacing()) / 1000
        for label, number in labels.items():
            if label != "background":
                volume = float((read(by_nnunet / name) == number).sum()) * voxel
                assert rows[name.removesuffix(".nii.gz"), label] == pytest.approx(volume, abs=1e-3)


@pytest.mark.usefixtures("alone")
def test_parts_write_volumes_of_their_own_cases(packed: Path, project: Project, tmp_path: Path) -> None:
    """No part reads what another one is about to write."""
    (tmp_path / max(images(project))).write_text("half a segmentation of part 1")
    files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path)]
    assert main(["predict", *files, "-device", "cpu", "--volumes", "-num_parts", "2", "-part_id", "0"]) == 0
    with (tmp_path / "volumes_0_of_2.csv").open(newline="") as file:
        assert {f"{row['case']}.nii.gz" for row in csv.DictReader(file)} == {min(images(project))}


@pytest.mark.usefixtures("alone")
def test_segmenter_takes_paths_images_and_arrays(packed: Path, by_nnunet: Path, project: Project) -> None:
    segmenter = Segmenter.load(packed)
    name, path = next(iter(images(project).items()))
    expected = read(by_nnunet / name)
    np.testing.assert_array_equal(segmenter(path), expected)
    image = SimpleITK.ReadImage(path)
    segmentation = segmenter([image])
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(segmentation), expected)
    assert segmentation.GetOrigin() == image.GetOrigin()
    assert segmentation.GetDirection() == image.GetDirection()
    assert segmenter.labels["lesion"] == 4
    fast = Segmenter.load(packed, mirroring=False, step_size=1)
    properties = {"spacing": list(image.GetSpacing())[::-1]}
    np.testing.assert_array_equal(fast((SimpleITK.GetArrayFromImage(image)[None], properties)), fast(path))
    assert list(properties) == ["spacing"]


@pytest.mark.usefixtures("alone")
def test_segmenter_takes_a_dicom_series(packed: Path, tmp_path: Path) -> None:
    scan = make_scan((20, 60, 64))
    write_dicom(scan, tmp_path)
    segmenter = Segmenter.load(packed, mirroring=False, step_size=1)
    expected = SimpleITK.GetArrayFromImage(segmenter(scan))
    for path in (tmp_path, next(tmp_path.iterdir())):
        np.testing.assert_array_equal(segmenter(path), expected)
    model = read_packed(packed)
    plans = {**model.description.plans, "image_reader_writer": "NibabelIO"}
    by_nibabel = Segmenter(PackedModel(replace(model.description, plans=plans), model.folds), mirroring=False, step_size=1)
    assert by_nibabel(tmp_path).shape == expected.shape


@pytest.mark.usefixtures("alone")
def test_some_folds_can_be_chosen(packed: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, path = next(iter(images(project).items()))
    options = ["-m", str(packed), "-i", str(path), "-device", "cpu", "--disable_tta"]
    found = {}
    for folds in ([], ["0"], ["1"], ["0", "1"]):
        output = tmp_path / f"folds_{'_'.join(folds)}"
        assert main(["predict", *options, "-o", str(output), *(["-f", *folds] if folds else [])]) == 0
        found[tuple(folds)] = read(output / name)
        by_segmenter = Segmenter.load(packed, mirroring=False, folds=folds or None)(path)
        np.testing.assert_array_equal(by_segmenter, found[tuple(folds)])
    np.testing.assert_array_equal(found["0", "1"], found[()])
    assert not np.array_equal(found[("0",)], found[("1",)])
    capsys.readouterr()
    assert main(["predict", *options, "-o", str(tmp_path / "out"), "-f", "0", "3"]) == 1
    assert "the model has the folds 0, 1, not 3" in single_line(capsys)


def test_postprocessing_is_of_the_folds_that_it_was_found_for(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = read_packed(packed)
    model = PackedModel(replace(model.description, postprocessing=[[1, 2]]), model.folds)
    assert model.with_folds([1, 0]).description.postprocessing == [[1, 2]]
    assert model.with_folds("1").description.postprocessing == model.with_folds(1).description.postprocessing == []
    write_packed(tmp_path / "model.e2enet", model)
    with pytest.raises(E2ENetError, match="holds postprocessing for all of its folds together"):
        Segmenter.load(tmp_path / "model.e2enet", folds=0, postprocess=True)
    options = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path), "-o", str(tmp_path / "out"), "-device", "cpu"]
    assert main(["predict", *options, "-f", "0", "--postprocess"]) == 1
    assert "holds no postprocessing of these folds alone: run nnUNetv2_find_best_configuration" in single_line(capsys)


def test_memory_that_runs_out_is_one_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nnU-Net predicts in its own way, as on a GPU."""

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    segmenter = Segmenter.load(packed)
    monkeypatch.setattr(segmenter._predictor, "predict_single_npy_array", no_memory)
    with pytest.raises(E2ENetError, match="out of memory: close other programs, or use a machine with more"):
        segmenter(make_scan((20, 60, 64)))


@pytest.mark.usefixtures("alone")
def test_fast_is_without_mirroring_with_larger_steps_and_maps_in_16_bits(
    packed: Path, by_nnunet: Path, project: Project, tmp_path: Path
) -> None:
    files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path)]
    assert main(["predict", *files, "-device", "cpu", "--fast"]) == 0
    assert settings().engine_storage == "float32"
    with override(engine_storage=STORAGE_16_BIT):
        segmenter = Segmenter.load(packed, mirroring=False, step_size=0.75)
        for name, path in images(project).items():
            np.testing.assert_array_equal(read(tmp_path / name), segmenter(path))
    assert not all(same_file(tmp_path / name, by_nnunet / name) for name in images(project))


@pytest.mark.usefixtures("alone")
def test_a_step_size_overrides_that_of_fast(packed: Path, project: Project, tmp_path: Path) -> None:
    """On a scan of three windows with steps of 0.5 and two with those of ``--fast``."""
    scan = SimpleITK.ReadImage(max(images(project).values()))
    scan = SimpleITK.ZeroFluxNeumannPad(scan, (0, 0, 7), (0, 0, 7))
    SimpleITK.WriteImage(scan, tmp_path / "scan.nii.gz")
    files = ["-m", str(packed), "-i", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out")]
    assert main(["predict", *files, *SEQUENTIAL, "-f", "0", "--fast", "-step_size", "0.5"]) == 0
    found = read(tmp_path / "out" / "scan.nii.gz")
    with override(engine_storage=STORAGE_16_BIT):
        expected, faster = (
            Segmenter.load(packed, mirroring=False, folds=0, step_size=step)(tmp_path / "scan.nii.gz") for step in (0.5, 0.75)
        )
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, faster)


@pytest.mark.usefixtures("alone")
def test_a_2d_image_is_the_same_as_image_and_as_file(project: Project, tmp_path: Path) -> None:
    """Its pixels are four times as long as wide, and resampled."""
    model, _ = untrained_model(project, "2d")
    write_packed(tmp_path / "model.e2enet", model)
    image = SimpleITK.ReadImage(min(images(project).values()))[:, :, 8]
    image.SetSpacing((0.7, 2.8))
    SimpleITK.WriteImage(image, tmp_path / "slice.nii.gz")
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "slice.nii.gz"), "-o", str(tmp_path / "out")]
    assert main(["predict", *files, *SEQUENTIAL]) == 0
    expected = read(tmp_path / "out" / "slice.nii.gz")
    assert len(np.unique(expected)) > 1
    segmenter = Segmenter.load(tmp_path / "model.e2enet")
    np.testing.assert_array_equal(segmenter(tmp_path / "slice.nii.gz"), expected[None])
    segmentation = segmenter(image)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(segmentation), expected)
    assert segmentation.GetSpacing() == image.GetSpacing()


@pytest.mark.slow
def test_console_command_with_worker_processes(packed: Path, by_nnunet: Path, project: Project, tmp_path: Path) -> None:
    files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path)]
    run_command("e2enet", "predict", *files, "-device", "cpu", env={"nnUNet_e2enet_engine": "on"})
    assert all(same_file(tmp_path / name, by_nnunet / name) for name in images(project))


def test_export_by_nnunets_names(
    packed: Path, trained: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the weights of the named checkpoint of the named fold, which are those of no other file."""
    folder = Path(shutil.copytree(trained, tmp_path / "results" / project.dataset / trained.name))
    path = folder / "fold_1" / "checkpoint_best.pth"
    content = torch.load(path, weights_only=False)
    for name, value in content["network_weights"].items():
        if "seg_layers" in name:
            value *= 2
    torch.save(content, path)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    best = tmp_path / "best.e2enet"
    assert main(["export", str(best), *NNUNET_NAMES, "-f", "1", "-chk", "checkpoint_best.pth"]) == 0
    model, both = read_packed(best), read_packed(packed)
    assert model.description.folds == ["1"]
    assert both.description.folds == ["0", "1"]
    assert (model.description.checkpoint, both.description.checkpoint) == ("checkpoint_best.pth", "checkpoint_final.pth")
    assert model.description.plans == json.loads((trained / "plans.json").read_text())
    assert model.description.plans["dataset_name"] == project.dataset
    (state,) = model.states()
    assert state
    for name, value in state.items():
        if not name.endswith(".explored"):  # which the file does not hold
            assert torch.equal(value, content["network_weights"][name]), name


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feature_sparsity": 0.0, "shift_size": 5, "conv_bias": False},
        {"learned_shift": True, "kernel_size": [3, 3, 3]},
        {"norm_op": "torch.nn.modules.batchnorm.BatchNorm{}d", "dropout_op": "torch.nn.Dropout{}d", "dropout_op_kwargs": {}},
    ],
    ids=["default", "dense", "learned shift", "batch norm"],
)
def test_every_network_survives_the_file(
    project: Project, tmp_path: Path, configuration: str, settings: dict[str, Any]
) -> None:
    dimension = 2 if configuration == "2d" else 3
    filled = {name: value.format(dimension) if isinstance(value, str) else value for name, value in settings.items()}
    model, network = untrained_model(project, configuration, **filled)
    write_packed(tmp_path / "model.e2enet", model)
    back = read_packed(tmp_path / "model.e2enet")
    assert back.description == model.description
    other = back.description.network().to_empty(device="cpu")
    other.load_state_dict(next(back.states()))
    x = torch.randn(1, 1, *model.description.managers()[1].patch_size)
    with torch.inference_mode():
        assert torch.equal(other(x), network(x))
    for (_, ours), (_, theirs) in zip(maskable_layers(other), maskable_layers(network), strict=True):
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.explored, ours.mask)


# ---- as small as its active weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.9])
def test_file_is_as_small_as_its_active_weights(project: Project, tmp_path: Path, sparsity: float) -> None:
    model, network = untrained_model(project, base=32, maximum=320, feature_sparsity=sparsity)
    size = write_packed(tmp_path / "model.e2enet", model)
    assert size == (tmp_path / "model.e2enet").stat().st_size
    active = accounts.parameter_counts(network).active
    assert model.active_weights == active
    masks = sum(layer.n_connections for _, layer in maskable_layers(network)) / 8
    assert 4 * active < size < 4 * active + masks + 60_000
    assert size < 1.05 * 4 * active


def test_the_same_model_is_the_same_file(packed: Path, model: Path, tmp_path: Path) -> None:
    write_packed(tmp_path / "again.e2enet", pack_model(model))
    assert (tmp_path / "again.e2enet").read_bytes() == packed.read_bytes()


def test_a_file_that_cannot_be_opened_is_no_damaged_one(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(E2ENetError, match=rf"^cannot read {packed} \(Permission denied\): check its permissions"):
        read_packed(packed)


def test_a_model_that_memory_cannot_hold_is_no_damaged_one(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError("Cannot allocate memory (os error 12)"), OSError(12, "Cannot allocate memory")):
        monkeypatch.setattr("nnunetv2_e2enet.deployment.packed.safe_open", Mock(side_effect=error))
        with pytest.raises(E2ENetError, match=r"^out of memory"):
            read_packed(packed)


def test_the_end_of_nnunets_processes_is_one_line() -> None:
    for words in ("Background workers died. Look for the error message", "Segmentation export worker died. Look for"):
        with (
            pytest.raises(E2ENetError, match="a process of nnU-Net for preprocessing or export has ended"),
            failures_in_one_line(),
        ):
            raise RuntimeError(words)


def test_full_disk_leaves_the_former_file(packed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(packed, tmp_path / "model.e2enet"))
    model, former = read_packed(path), path.read_bytes()
    with full_disk(len(former) // 2), pytest.raises(E2ENetError, match="cannot write"):
        write_packed(path, model)
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]


def test_info_says_what_a_file_holds(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(packed)]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "nnUNetTrainerE2ENet_smoke",
        "3d_fullres",
        "Dataset993_Phantom",
        "0, 1",
        "4 lesion",
        "[24, 64, 64]",
        "S = 0.8",
    ):
        assert fact in shown
    assert main(["info", str(packed), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"] == str(packed)
    assert facts["bytes"] == packed.stat().st_size
    assert facts["patch_size"] == [24, 64, 64]
    assert facts["labels"]["lesion"] == 4
    assert facts["folds"] == ["0", "1"]
    assert facts["feature_sparsity"] == 0.8
    assert f"{facts['parameters']} parameters, {facts['active_parameters']} active" in shown


# ---- postprocessing ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_postprocessing_found_by_nnunet_travels(
    model: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [[1, 2, 3, 4], 1, 2, 3, 4]
    found = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * len(steps),
        "postprocessing_kwargs": [{"labels_or_regions": step} for step in steps],
    }
    model = Path(shutil.copytree(model, tmp_path / "model"))
    (model / "crossval_results_folds_0_1").mkdir()
    (model / "crossval_results_folds_0_1" / "postprocessing.json").write_text(json.dumps(found))
    file = tmp_path / "model.e2enet"
    assert main(["export", str(model), str(file), "-f", "0", "1"]) == 0
    out = tmp_path / "out"
    arguments = ["predict", "-m", str(file), "-i", str(project.raw / "imagesTs"), "-o", str(out), *SEQUENTIAL]
    assert main([*arguments, "--postprocess"]) == 0
    segmented = Segmenter.load(file, postprocess=True)(max(images(project).values()))
    changed = []
    for name in images(project):
        expected = read(out / name)
        for step in steps:
            expected = remove_all_but_largest_component_from_segmentation(expected, step)
        assert np.array_equal(read(out / "postprocessed" / name), expected)
        changed.append(not np.array_equal(read(out / name), expected))
    assert any(changed)
    np.testing.assert_array_equal(segmented, expected)
    assert main(["export", str(model), str(file), "-f", "0"]) == 0  # nothing was found for this fold alone
    capsys.readouterr()
    assert main([*arguments, "--postprocess"]) == 1
    assert "holds no postprocessing" in single_line(capsys)


def segmented_by_hand(project: Project, folder: Path) -> tuple[str, int, int]:
    """A case of a block of label 1 and a small one of its own, which ``--continue_prediction`` leaves; voxels of both."""
    path = min(images(project).values())
    image = SimpleITK.ReadImage(path)
    labels = np.zeros(image.GetSize()[::-1], np.uint8)
    labels[4:10, 10:20, 10:20] = labels[4:6, 30:32, 30:32] = 1
    segmentation = SimpleITK.GetImageFromArray(labels)
    segmentation.CopyInformation(image)
    (folder / "images").mkdir(parents=True)
    shutil.copy(path, folder / "images")
    (folder / "out").mkdir()
    SimpleITK.WriteImage(segmentation, folder / "out" / path.name.replace("_0000", ""))
    return path.name.removesuffix("_0000.nii.gz"), 600, 8


PREDICTOR = {
    "tile_step_size": 0.5,
    "use_mirroring": True,
    "perform_everything_on_device": True,
    "verbose": False,
    "verbose_preprocessing": False,
    "allow_tqdm": True,
}
"""Attributes of the predictor that ``nnUNetv2_predict`` makes without options, on a GPU."""


CHANGES: dict[str, dict[str, Any]] = {
    "--continue_prediction": {},
    "-step_size 0.25": {"tile_step_size": 0.25},
    "--disable_tta": {"use_mirroring": False},
    "--not_on_device": {"perform_everything_on_device": False},
    "--verbose": {"verbose": True, "verbose_preprocessing": True},
    "--disable_progress_bar": {"allow_tqdm": False},
    "--fast": {"tile_step_size": 0.75, "use_mirroring": False},
}
"""What options change of it."""


@pytest.mark.parametrize("options", CHANGES)
def test_nnunets_predictor_is_made_as_asked_for(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """For a GPU, where all options mean something, and with as many threads as ``nnUNetv2_predict``: cores on a CPU."""
    model, _ = untrained_model(project)
    write_packed(tmp_path / "model.e2enet", model)
    segmented_by_hand(project, tmp_path)
    made: list[tuple[nnUNetPredictor, int]] = []
    monkeypatch.setattr(
        "nnunetv2_e2enet.cli.predict._predict",
        lambda _args, predictor, _images: made.append((predictor, torch.get_num_threads())),
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    threads = torch.get_num_threads()
    try:
        for device in ("cpu", "cuda"):
            torch.set_num_threads(2)  # as OMP_NUM_THREADS would
            assert main(["predict", *files, "--continue_prediction", "-device", device, *options.split()]) == 0
    finally:
        torch.set_num_threads(threads)
    (_, on_cpu), (predictor, on_gpu) = made
    assert (on_cpu, on_gpu) == (3, 1)
    assert {name: getattr(predictor, name) for name in PREDICTOR} == PREDICTOR | CHANGES[options]


def test_a_part_of_a_segmentation_does_not_count(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left there by a full disk, or written now by nnU-Net's own export."""
    model, _ = untrained_model(project)
    write_packed(tmp_path / "model.e2enet", model)
    case, *_ = segmented_by_hand(project, tmp_path)
    file = tmp_path / "out" / f"{case}.nii.gz"
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    whole = file.read_bytes()
    for command in (["--continue_prediction", "--volumes"], []):
        file.write_bytes(whole[: len(whole) // 2])
        monkeypatch.setattr("nnunetv2_e2enet.cli.predict._predict", lambda *_: None)
        assert main(["predict", *files, *SEQUENTIAL, *command]) == 1
        assert f"{file} holds only a part of a segmentation: remove it" in single_line(capsys)
        assert not (tmp_path / "out" / "volumes.csv").exists()


def test_what_was_made_of_a_former_segmentation_is_named(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = untrained_model(project)
    write_packed(tmp_path / "model.e2enet", model)
    case, *_ = segmented_by_hand(project, tmp_path)
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    made = [tmp_path / "out" / name for name in (f"{case}.png", "volumes.csv")]
    for file in made:
        file.touch()
    message = "made of former segmentations. Make them again, or take them away"
    assert main(["predict", *files, *SEQUENTIAL, "--continue_prediction"]) == 0
    assert message not in capsys.readouterr().out
    assert main(["predict", *files, *SEQUENTIAL, "--disable_tta"]) == 0
    assert f"{case}.png, volumes.csv: {message}" in capsys.readouterr().out
    assert main(["predict", *files, *SEQUENTIAL, "--disable_tta", "--preview", "--volumes"]) == 0
    assert message not in capsys.readouterr().out


def test_tables_and_probabilities_of_a_former_segmentation_are_named(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all parts of a former command; but not what another part of this one writes."""
    write_packed(tmp_path / "model.e2enet", untrained_model(project)[0])
    case, *_ = segmented_by_hand(project, tmp_path)
    out = tmp_path / "out"
    names = [f"{case}.npz", f"{case}.pkl", "volumes_0_of_2.csv"]
    for name in (*names, "volumes_1_of_3.csv"):
        (out / name).touch()
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(out), "-device", "cpu"]
    monkeypatch.setattr("nnunetv2_e2enet.cli.predict._predict", lambda *_: (out / f"{case}.nii.gz").touch())
    assert main(["predict", *files, "-num_parts", "3"]) == 0
    assert f"{', '.join(names)}: made of former segmentations" in capsys.readouterr().out


def test_a_full_disk_leaves_what_was_postprocessed_before(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = untrained_model(project)
    write_packed(tmp_path / "model.e2enet", replace(model, description=replace(model.description, postprocessing=[[1]])))
    case, *_ = segmented_by_hand(project, tmp_path)
    segmentation, post = tmp_path / "out" / f"{case}.nii.gz", tmp_path / "out" / "postprocessed"
    image = SimpleITK.ReadImage(segmentation)
    noise = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 2, image.GetSize()[::-1], np.uint8))
    noise.CopyInformation(image)
    SimpleITK.WriteImage(noise, segmentation)
    monkeypatch.setattr("nnunetv2_e2enet.cli.predict._predict", lambda *_: None)
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    command = ["predict", *files, *SEQUENTIAL, "--continue_prediction", "--postprocess", "--disable_progress_bar"]
    assert main(command) == 0
    former = (post / segmentation.name).read_bytes()
    with full_disk(len(former) // 2):
        assert main(command) == 1
    assert f"cannot write {post / segmentation.name} (" in single_line(capsys)
    assert [path.read_bytes() for path in post.iterdir()] == [former]


def test_volumes_and_previews_of_what_postprocessing_leaves(project: Project, tmp_path: Path) -> None:
    model, _ = untrained_model(project)
    write_packed(tmp_path / "model.e2enet", replace(model, description=replace(model.description, postprocessing=[[1]])))
    case, large, small = segmented_by_hand(project, tmp_path)
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    options = ["--continue_prediction", "--postprocess", "--volumes", "--preview"]
    assert main(["predict", *files, *SEQUENTIAL, *options]) == 0
    voxel = np.prod(SimpleITK.ReadImage(tmp_path / "out" / f"{case}.nii.gz").GetSpacing()) / 1000
    (name,) = (name for name, value in model.description.dataset["labels"].items() if value == 1)
    for folder, voxels in ((tmp_path / "out", large + small), (tmp_path / "out" / "postprocessed", large)):
        with (folder / "volumes.csv").open(newline="") as file:
            rows = {(row["case"], row["label"]): float(row["millilitres"]) for row in csv.DictReader(file)}
        assert rows[case, name] == pytest.approx(voxels * voxel, abs=1e-3)
        assert sum(rows.values()) == rows[case, name]
    pictures = [imread(folder / f"{case}.png") for folder in (tmp_path / "out", tmp_path / "out" / "postprocessed")]
    assert pictures[0].shape == pictures[1].shape
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("written", [str, float])
def test_labels_that_nnunet_converts(project: Project, tmp_path: Path, written: type) -> None:
    """nnU-Net takes "1" and 1.0 for 1."""
    model, _ = untrained_model(project)
    labels = {name: written(value) for name, value in model.description.dataset["labels"].items()}
    other = replace(model, description=replace(model.description, dataset={**model.description.dataset, "labels": labels}))
    write_packed(tmp_path / "model.e2enet", other)
    case, large, small = segmented_by_hand(project, tmp_path)
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    assert main(["predict", *files, *SEQUENTIAL, "--continue_prediction", "--volumes", "--preview"]) == 0
    segmentation = tmp_path / "out" / f"{case}.nii.gz"
    voxel = np.prod(SimpleITK.ReadImage(segmentation).GetSpacing()) / 1000
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        volumes = [float(row["millilitres"]) for row in csv.DictReader(file)]
    assert volumes == pytest.approx([(large + small) * voxel, *[0] * (len(labels) - 2)], abs=1e-3)
    check_replaceable(segmentation, tmp_path / "images" / f"{case}_0000.nii.gz", other)


@pytest.mark.parametrize(("channel", "window"), [("ct", "window -160 to 240 HU"), ("T1", "grey values ")])
def test_a_ct_is_shown_in_the_window_of_soft_tissue(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channel: str, window: str
) -> None:
    model, _ = untrained_model(project)
    dataset = {**model.description.dataset, "channel_names": {"0": channel}}
    write_packed(tmp_path / "model.e2enet", replace(model, description=replace(model.description, dataset=dataset)))
    segmented_by_hand(project, tmp_path)
    figures: list[Figure] = []
    monkeypatch.setattr(preview, "save_figure", lambda figure, _: figures.append(figure))
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    assert main(["predict", *files, *SEQUENTIAL, "--continue_prediction", "--preview"]) == 0
    (figure,) = figures
    assert figure.texts[1].get_text().startswith(window)


# ---- cascades ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_the_second_stage_is_given_the_first(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Voxel by voxel what nnU-Net's predictor makes of the same network, and of another first stage something else."""
    model, network = untrained_model(project, previous_stage="3d_lowres")
    write_packed(tmp_path / "model.e2enet", model)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    dataset, trainer = model.description.dataset, model.description.trainer
    predictor.manual_initialization(network, *model.description.managers(), [network.state_dict()], dataset, trainer, None)
    scan = min((project.raw / "imagesTs").iterdir())
    case = scan.name.replace("_0000", "")
    image = SimpleITK.ReadImage(scan)
    blocks = np.zeros(image.GetSize()[::-1], np.uint8)
    blocks[:8, 10:30, 10:30], blocks[8:, 20:40, 20:40] = 1, 4
    found = {}
    for name, labels in (("blocks", blocks), ("turned", np.flip(blocks).copy())):
        first = SimpleITK.GetImageFromArray(labels)
        first.CopyInformation(image)
        (tmp_path / name).mkdir()
        SimpleITK.WriteImage(first, tmp_path / name / case)
        files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(scan), "-o", str(tmp_path / "out")]
        options = [*SEQUENTIAL, "--disable_tta", "-prev_stage_predictions", str(tmp_path / name)]
        assert main(["predict", *files, *options]) == 0
        found[name] = read(tmp_path / "out" / case)
        voxels, spacing = SimpleITK.GetArrayFromImage(image)[None], list(image.GetSpacing())[::-1]
        expected = predictor.predict_single_npy_array(voxels, {"spacing": spacing}, labels[None].astype(np.int16))
        np.testing.assert_array_equal(found[name], expected)
        assert len(np.unique(expected)) > 1
    assert not np.array_equal(found["blocks"], found["turned"])
    (tmp_path / "blocks" / case).unlink()
    capsys.readouterr()
    assert main(["predict", *files, *SEQUENTIAL, "-prev_stage_predictions", str(tmp_path / "blocks")]) == 1
    assert f"{tmp_path / 'blocks' / case} is missing: expected the first stage's segmentation of " in single_line(capsys)
    SimpleITK.WriteImage(first[:, :, 1:], tmp_path / "blocks" / case)
    assert main(["predict", *files, *SEQUENTIAL, "-prev_stage_predictions", str(tmp_path / "blocks")]) == 1
    assert f"{tmp_path / 'blocks' / case} has " in (message := single_line(capsys))
    assert f"expected {image.GetSize()}, the size of " in message
    whole = (tmp_path / "turned" / case).read_bytes()
    (tmp_path / "blocks" / case).write_bytes(whole[: len(whole) // 2])
    assert main(["predict", *files, *SEQUENTIAL, "-prev_stage_predictions", str(tmp_path / "blocks")]) == 1
    assert "expected a whole image file" in single_line(capsys)


# ---- what is refused -----------------------------------------------------------------------------------------------------


def spoil_plans(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    plans = json.loads((model / "plans.json").read_text())
    change(plans["configurations"]["3d_fullres"])
    (model / "plans.json").write_text(json.dumps(plans))


def spoil_dataset(model: Path, **changes: Any) -> None:
    path = model / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_checkpoint(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = model / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def spoil_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    spoil_checkpoint(model, lambda content: change(content["network_weights"]))


def trained_architecture(content: dict[str, Any]) -> dict[str, Any]:
    architecture: dict[str, Any] = content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]
    return architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: (m / "plans.json").unlink(), "no nnU-Net model folder"),
        (lambda m: shutil.rmtree(m / "fold_1"), "no checkpoint_final.pth of fold 1, found those of 0"),
        (lambda m: (m / "fold_1" / "checkpoint_final.pth").write_bytes(b"PK"), "or it is truncated: train that fold again"),
        (lambda m: (m / "dataset.json").unlink(), "dataset.json is missing in "),
        (
            lambda m: spoil_dataset(m, channel_names={"1": "synthetic"}),
            "dataset.json numbers its channels 1: expected 0, as image files are numbered; ",
        ),
        (
            lambda m: spoil_plans(m, lambda c: c["architecture"].update(network_class_name="PlainConvUNet")),
            "trained PlainConvUNet",
        ),
        (
            lambda m: spoil_plans(m, lambda c: c["architecture"]["arch_kwargs"].update(shift_size=5)),
            "was trained with shift_size = 3, but plans.json has 5: train that fold again, or leave it out with -f",
        ),
        (lambda m: spoil_plans(m, lambda c: c["architecture"]["arch_kwargs"]["strides"].pop()), "strides is"),
        (lambda m: spoil_plans(m, lambda c: c.update(patch_size=[23, 64, 64])), "cannot be divided by"),
        (lambda m: spoil_weights(m, lambda w: w.popitem()), "is missing in the weights"),
        (lambda m: spoil_weights(m, lambda w: w["encoder.stages.0.0.conv.weight"].fill_(float("nan"))), "not finite"),
        (
            lambda m: spoil_checkpoint(m, lambda c: trained_architecture(c).update(network_class_name="PlainConvUNet")),
            "is of PlainConvUNet (nnUNetTrainerE2ENet_smoke), not of nnunetv2_e2enet.network.E2ENet: train that fold again",
        ),
        (
            lambda m: spoil_checkpoint(m, lambda c: trained_architecture(c)["arch_kwargs"].update(features_per_stage=[24])),
            "was trained with features_per_stage = [24], but plans.json has [",
        ),
    ],
    ids=[
        *(
            "folder",
            "fold",
            "checkpoint",
            "data set",
            "channels",
            "foreign",
            "shift size",
            "strides",
            "patch",
            "missing",
            "nan",
        ),
        *("foreign checkpoint", "width"),
    ],
)
def test_models_that_cannot_be_exported(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Any],
    message: str,
) -> None:
    ignored = shutil.ignore_patterns("validation", "*best*", "*.png", "*.txt")
    model = Path(shutil.copytree(trained, tmp_path / "model", ignore=ignored))
    change(model)
    assert main(["export", str(model), str(tmp_path / "out.e2enet"), "-f", "0", "1"]) == 1
    assert message in single_line(capsys)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-i", "nowhere"], "nowhere does not exist"),
        (["-m", "."], ". is a folder: export it first (e2enet export . FILE)"),
        (["-m", "nowhere"], "is not a file"),
        (["-step_size", "0"], "the step size is 0.0"),
        (["-npp", "0"], "0 for both"),
        (["-part_id", "1"], "counted from 0"),
        (["-npp", "0", "-nps", "0", "-num_parts", "2"], "-npp 0 -nps 0 predicts all parts in one process"),
        (["-prev_stage_predictions", "somewhere"], "no cascade's second stage"),
        (["-device", "cuda"], "PyTorch finds no CUDA device here: use -device cpu"),
        (["-device", "mps"], "PyTorch finds no MPS device here: use -device cpu"),
    ],
)
def test_predictions_that_cannot_be_made(
    packed: Path,
    project: Project,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path / "out")]
    assert main(["predict", *files, "-device", "cpu", *options]) == 1
    assert message in single_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_is_no_fault_of_the_file(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nnunetv2_e2enet.settings._current", None)
    monkeypatch.setenv("nnUNet_e2enet_engine_storage", "float15")
    assert main(["predict", "-m", str(packed), "-i", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert single_line(capsys).startswith("e2enet predict: nnUNet_e2enet_engine_storage is 'float15': use one of")


def test_models_that_cannot_be_named(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    results = f"nnUNet_results={project.environment['nnUNet_results']}"
    for arguments, message in (
        (["model"], "model: expected two paths, MODEL_FOLDER and OUT"),
        (["out", "-d", "4", "-c", "3d_fullres"], f"{results}: check the number and these folders"),
        (["out", "-d", "Liver", "-c", "3d_fullres"], "data set Liver: expected a number, or a name"),
        (["out", "-d", "993"], "-d 993 without -c: name the configuration of the model too, such as -c 3d_fullres"),
        (["model", "out", "-c", "2d"], "-c 2d without -d: name the data set of the model too"),
        (["model", "out", "-d", "993", "-c", "2d"], "model out: expected one path, OUT, as -d and -c name the model"),
    ):
        assert main(["export", *arguments]) == 1
        assert message in single_line(capsys)


def test_what_lies_where_a_model_is_written(
    packed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model may be replaced; a folder or another file may not, and nothing is read before that is known."""
    monkeypatch.chdir(tmp_path)
    Path("dataset.json").write_text("{}")
    Path("torn.e2enet").write_bytes(packed.read_bytes()[:100])
    for out, message in (
        (".", "cannot write .: it is a folder; name a file"),
        ("nowhere/m.e2enet", "cannot write nowhere/m.e2enet: the folder nowhere is missing"),
        ("dataset.json", "dataset.json is there, and no packed model: name another file, or remove it"),
        ("torn.e2enet", "torn.e2enet is there, and no packed model"),
    ):
        assert main(["export", "no_model", out, "-f", "0"]) == 1
        assert message in single_line(capsys)
    assert Path("dataset.json").read_text() == "{}"
    shutil.copy(packed, "m.e2enet")
    assert main(["export", str(model), "m.e2enet", "-f", "1"]) == 0
    assert read_packed(Path("m.e2enet")).description.folds == ["1"]


def test_what_is_taken_for_a_model_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m.e2enet")
    assert main(["export", str(model / "fold_0"), out]) == 1
    assert f"fold_0 is a fold of the model folder {model}: name that one, and the fold with -f" in single_line(capsys)
    assert main(["export", str(model), out, "-chk", "checkpoint_bst.pth"]) == 1
    message = single_line(capsys)
    assert "no checkpoint_bst.pth in any fold, found checkpoint_" in message
    assert ", checkpoint_final.pth: choose a checkpoint with -chk" in message


def test_an_image_is_not_replaced(
    packed: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = Path(shutil.copy(min((project.raw / "imagesTs").glob("*_0000.nii.gz")), tmp_path / "scan.nii.gz"))
    given = scan.read_bytes()
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path)):
        assert main(["predict", "-m", str(packed), "-i", "scan.nii.gz", "-o", folder, "-device", "cpu"]) == 1
        assert "scan.nii.gz would replace an image of that name: name another folder with -o" in single_line(capsys)
    assert scan.read_bytes() == given


def test_an_image_behind_a_link_is_not_replaced(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = untrained_model(project)
    write_packed(tmp_path / "model.e2enet", replace(model, description=replace(model.description, postprocessing=[[1]])))
    source = min((project.raw / "imagesTs").glob("*_0000.nii.gz"))
    for place in ("scans", "scans/postprocessed"):
        (tmp_path / place).mkdir()
        scan = Path(shutil.copy(source, tmp_path / place / "pat.nii.gz"))
        given, folder = scan.read_bytes(), tmp_path / place.replace("/", "_") / "imagesTs"
        folder.mkdir(parents=True)
        (folder / "pat_0000.nii.gz").symlink_to(scan)
        files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(folder), "-o", str(tmp_path / "scans")]
        assert main(["predict", *files, "-device", "cpu", "--disable_tta", "--postprocess"]) == 1
        assert f"{scan} would replace an image of that name: name another folder with -o" in single_line(capsys)
        assert scan.read_bytes() == given
        scan.unlink()


def test_segmentations_cannot_be_written(
    packed: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        files = ["-m", str(packed), "-i", str(project.raw / "imagesTs"), "-o", str(out)]
        assert main(["predict", *files, "-device", "cpu"]) == 1
        assert f"cannot write into {out} (" in single_line(capsys)
    assert (tmp_path / "out").read_text() == "a file"


def test_other_files_of_a_folder_are_left_alone(
    packed: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A segmentation may lie beside its image, and images of other cases, but not in a folder of images for nnU-Net."""
    for image in (project.raw / "imagesTs").iterdir():
        shutil.copy(image, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first = min(before)
    options = ["-m", str(packed), "-o", str(tmp_path), "-device", "cpu", "--disable_tta", "--volumes"]
    for again in ([], ["--continue_prediction"]):
        assert main(["predict", *options, "-i", str(tmp_path / first), *again]) == 0
    with (tmp_path / "volumes.csv").open(newline="") as file:
        assert {f"{row['case']}_0000.nii.gz" for row in csv.DictReader(file)} == {first}
    capsys.readouterr()
    assert main(["predict", *options, "-i", str(tmp_path)]) == 1
    assert "nnU-Net would take segmentations there for images: name another folder with -o" in single_line(capsys)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_scan_that_ends_early_is_not_predicted(
    packed: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = next(iter(images(project).values()))
    (tmp_path / "scan.nii.gz").write_bytes(scan.read_bytes()[:20000])
    options = ["-m", str(packed), "-o", str(tmp_path / "out"), "-device", "cpu", "--disable_tta"]
    assert main(["predict", *options, "-i", str(tmp_path / "scan.nii.gz")]) == 1
    assert "expected a whole image file" in single_line(capsys)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_volumes_of_one_scan_after_the_other(packed: Path, project: Project, tmp_path: Path) -> None:
    options = ["-m", str(packed), "-o", str(tmp_path), "-device", "cpu", "--disable_tta", "--volumes"]
    for scan in images(project).values():
        assert main(["predict", *options, "-i", str(scan)]) == 0
    with (tmp_path / "volumes.csv").open(newline="") as file:
        assert {f"{row['case']}.nii.gz" for row in csv.DictReader(file)} == set(images(project))
    first, second = images(project)
    (tmp_path / first).unlink()
    assert main(["predict", *options, "-i", str(images(project)[second])]) == 0
    with (tmp_path / "volumes.csv").open(newline="") as file:
        assert {f"{row['case']}.nii.gz" for row in csv.DictReader(file)} == {second}


def labelled(folder: Path, *cases: str) -> list[Path]:
    """Segmentations of one voxel with label 1 each."""
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1, 2, 3] = 1
    files = [folder / f"{case}.nii.gz" for case in cases]
    for file in files:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), file)
    return files


def test_commands_that_end_at_once_keep_each_others_volumes(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They measure at the same time, and each takes a while between reading the table and writing it."""
    model, _ = untrained_model(project)
    both, count, write = threading.Barrier(2), volumes.count_values, volumes.write

    def measured(segmentation: np.ndarray) -> np.ndarray:
        both.wait(60)
        return count(segmentation)

    def written_late(path: Path, content: str) -> None:
        time.sleep(0.3)
        write(path, content)

    monkeypatch.setattr(volumes, "count_values", measured)
    monkeypatch.setattr(volumes, "write", written_late)
    table, files = tmp_path / "volumes.csv", labelled(tmp_path, "a", "b")
    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(volumes.write_volumes, table, [file], model) for file in files]:
            ended.result()
    with table.open(newline="") as rows:
        assert {row["case"] for row in csv.DictReader(rows)} == {"a", "b"}


def test_volumes_on_a_file_system_without_locks(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another command could be lost."""

    def no_locks(_: Any) -> None:  # as filelock raises it in new versions
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    with pytest.raises(E2ENetError, match=r"cannot lock .*volumes\.csv\.lock .*No locks available"):
        volumes.write_volumes(tmp_path / "volumes.csv", labelled(tmp_path, "a"), untrained_model(project)[0])


def test_a_converted_scan_beside_its_slices_is_not_replaced(
    packed: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = SimpleITK.ReadImage(next(iter(images(project).values())))
    SimpleITK.WriteImage(scan, tmp_path / "CT.nii.gz")
    SimpleITK.WriteImage(scan, tmp_path / "CT.nrrd")
    before = (tmp_path / "CT.nii.gz").read_bytes()
    assert main(["predict", "-m", str(packed), "-i", str(tmp_path / "CT.nrrd"), "-o", str(tmp_path), "-device", "cpu"]) == 1
    assert "CT.nii.gz is there already, and no segmentation of this image" in single_line(capsys)
    assert (tmp_path / "CT.nii.gz").read_bytes() == before


def test_the_first_stage_is_not_replaced(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is named through a link, or lies where postprocessing writes; and it is no segmentation to go on from."""
    model, _ = untrained_model(project, previous_stage="3d_lowres")
    write_packed(tmp_path / "model.e2enet", replace(model, description=replace(model.description, postprocessing=[[1]])))
    case, *_ = segmented_by_hand(project, tmp_path)
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    shutil.copytree(out, tmp_path / "all" / "postprocessed")
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), *SEQUENTIAL]
    for first, target, *options in (
        (out, out),
        (tmp_path / "link", out),
        (out, out, "--continue_prediction"),
        (tmp_path / "all" / "postprocessed", tmp_path / "all", "--postprocess"),
    ):
        before = (first / f"{case}.nii.gz").read_bytes()
        assert main(["predict", *files, "-o", str(target), "-prev_stage_predictions", str(first), *map(str, options)]) == 1
        message = f"{case}.nii.gz would replace the first stage's (-prev_stage_predictions): name another folder with -o"
        assert message in single_line(capsys)
        assert (first / f"{case}.nii.gz").read_bytes() == before


def test_cascades_need_the_first_stage(packed: Path) -> None:
    model = read_packed(packed)
    plans = json.loads(json.dumps(model.description.plans))
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    with pytest.raises(E2ENetError, match="needs the segmentations of 3d_lowres"):
        Segmenter(PackedModel(replace(model.description, plans=plans), model.folds))


def test_infinite_logits_are_one_line(project: Project) -> None:
    """nnU-Net, which adds them in float16, raises a RuntimeError."""
    model, _ = untrained_model(project, base=2, maximum=4)
    large = {name: array * np.float32(1e6 if "seg_layers" in name else 1) for name, array in model.folds["0"].items()}
    large = {name: array.astype(model.folds["0"][name].dtype) for name, array in large.items()}
    with pytest.raises(E2ENetError, match=r"logits are too large for float16.*: check "):
        Segmenter(PackedModel(model.description, {"0": large}), mirroring=False)(make_scan((20, 60, 64)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.nii.gz", "is not a file"),
        (__file__, "cannot be read"),
        (SimpleITK.Image([4, 4, 4], SimpleITK.sitkVectorFloat32, 2), "several components"),
        ([SimpleITK.Image(4, 4, 4, SimpleITK.sitkFloat32)] * 2, "(channels, depth, height, width) with the channels"),
        ((np.zeros((4, 4, 4)), {"spacing": [1, 1, 1]}), "has the shape [4, 4, 4]"),
        ((np.zeros((1, 4, 4, 4)), {"spacing": [1, 1, 0]}), "spacing"),
        (5, "expected a path, a SimpleITK image, or"),
    ],
    ids=["missing", "text", "components", "channels", "axes", "spacing", "number"],
)
def test_images_that_cannot_be_segmented(packed: Path, image: Any, message: str) -> None:
    with pytest.raises(E2ENetError) as error:
        Segmenter.load(packed)(image)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_cannot_be_segmented(packed: Path, project: Project, tmp_path: Path) -> None:
    scan = next(iter(images(project).values()))
    (tmp_path / "half.nii.gz").write_bytes(scan.read_bytes()[:20000])
    with pytest.raises(E2ENetError, match=r"half\.nii\.gz ends after .* bytes: expected a whole image file"):
        Segmenter.load(packed)(tmp_path / "half.nii.gz")
    moved = SimpleITK.ReadImage(scan)
    moved.SetOrigin((50, 0, 0))
    SimpleITK.WriteImage(moved, tmp_path / "moved.nii.gz")
    images_of_both = [scan, tmp_path / "moved.nii.gz"]
    for both in (images_of_both, [SimpleITK.ReadImage(file) for file in images_of_both]):
        with pytest.raises(E2ENetError, match=r"has origin \(50, 0, 0\) mm, .*: resample the channels to one grid"):
            Segmenter.load(packed)(both)


# ---- SIGTERM: docker stop, a time limit of SLURM, timeout ----------------------------------------------------------------


needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")


@needs_signals
def test_a_terminated_command_leaves_nothing_behind(project: Project, tmp_path: Path) -> None:
    """Terminated twice, as by ``timeout``, while it predicts a scan that was copied into a temporary folder."""
    write_packed(tmp_path / "model.e2enet", untrained_model(project)[0])
    SimpleITK.WriteImage(make_scan((100, 200, 200)), tmp_path / "scan.nrrd")
    (tmp_path / "temporary").mkdir()
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "scan.nrrd"), "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        [program("e2enet"), "predict", *files, "-device", "cpu", "--disable_progress_bar"],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any("Predicting scan" in line for line in process.stdout)
        assert len(list((tmp_path / "temporary").glob("e2enet_*"))) == 1
        process.terminate()
        process.terminate()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "temporary").glob("e2enet_*"))
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json"}  # as nnU-Net writes them before the first scan


@needs_signals
def test_a_segmentation_is_not_left_half_written_when_the_command_is_terminated(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread, and where the process has a way of its own, SIGTERM stays as it is."""
    write_packed(tmp_path / "model.e2enet", untrained_model(project)[0])
    case, *_ = segmented_by_hand(project, tmp_path)
    out = tmp_path / "out"
    before = (out / f"{case}.nii.gz").read_bytes()
    handlers: list[Any] = []

    class Terminated(SimpleITKIO):
        """A writer that SIGTERM meets when half of a file is written, and once more while that is cleaned up."""

        def write_seg(self, _segmentation: np.ndarray, path: str, _properties: dict[str, Any]) -> None:
            Path(path).write_bytes(before[:100])
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)

    def write(*_: Any) -> None:
        write_segmentation(out / f"{case}.nii.gz", np.zeros((2, 3, 4), np.uint8), {}, Terminated())

    monkeypatch.setattr("nnunetv2_e2enet.cli.predict._predict", write)
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(tmp_path / "images"), "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(["predict", *files, *SEQUENTIAL])
    assert ended.value.code == 143
    assert [path.read_bytes() for path in out.iterdir()] == [before]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr("nnunetv2_e2enet.cli.predict._predict", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["predict", *files, *SEQUENTIAL]).result() == 0
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert main(["predict", *files, *SEQUENTIAL]) == 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert handlers == [signal.SIG_DFL, signal.SIG_IGN]


@needs_signals
@pytest.mark.parametrize("options", [SEQUENTIAL, ["-device", "cpu", "-num_parts", "2", "-part_id", "0"]])
def test_no_pool_is_forked(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    """nnU-Net forks one to list a folder, and ends it by SIGTERM."""
    write_packed(tmp_path / "model.e2enet", untrained_model(project)[0])
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    files = ["-m", str(tmp_path / "model.e2enet"), "-i", str(project.raw / "imagesTs"), "-o", str(tmp_path / "out")]
    assert main(["predict", *files, *options, "--disable_tta"]) == 0
    expected = [*images(project)][: 1 if "-num_parts" in options else None]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == expected


@needs_signals
def test_a_forked_process_ends_as_ever(tmp_path: Path) -> None:
    """At once, without what its parent would clean up."""
    code = """
import os, signal, sys, time
from nnunetv2_e2enet.cli.termination import cleaned_up_when_terminated
with cleaned_up_when_terminated():
    child = os.fork()
    if child == 0:
        try:
            open(sys.argv[1], "w").close()
            time.sleep(600)
        finally:
            os._exit(3)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "forked")], check=True, timeout=60)


@needs_signals
def test_a_terminated_command_waits_for_no_lock_of_a_dead_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pool of nnU-Net's does where SIGTERM went to its processes as well."""
    monkeypatch.setattr(termination, "PATIENCE", 1)
    context = multiprocessing.get_context("spawn")
    held = context.Lock()
    held.acquire()
    another = context.Process(target=time.sleep, args=(600,))
    another.start()

    def wait() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            held.acquire()

    try:
        with pytest.raises(SystemExit) as ended, termination.cleaned_up_when_terminated():
            wait()
    finally:
        another.kill()
        another.join()
    assert ended.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == [signal.SIG_DFL] * 2
