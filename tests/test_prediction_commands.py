"""nnUNetv2_predict on a CPU: the files that nnU-Net writes, whole or not at all, in each of its ways to run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from support import Project, copy_with_random_heads, program

from nnunetv2_e2enet.engine.scan import load_scan_core

pytestmark = pytest.mark.skipif(isinstance(load_scan_core(), str), reason="the compiled core was not built")


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_random_heads(trained, tmp_path_factory.mktemp("results"))


@dataclass(frozen=True)
class Command:
    """``nnUNetv2_predict`` on the test images of the project."""

    project: Project
    model: Path
    images: Path | None = None

    def arguments(self, output: Path, *options: str) -> list[str]:
        files = [
            "-i",
            str(self.images or self.project.raw / "imagesTs"),
            "-o",
            str(output),
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
        ]
        names = ["-d", "993", "-c", "3d_fullres", "-tr", "nnUNetTrainerE2ENet_smoke"]
        return ["nnUNetv2_predict", *files, *names, "--disable_tta", *options]

    def environment(self, predictor: str) -> dict[str, str]:
        return {"nnUNet_results": str(self.model.parents[1]), "nnUNet_e2enet_predictor": predictor}

    def __call__(self, output: Path, *options: str, predictor: str = "on") -> subprocess.CompletedProcess[str]:
        return self.project.run(*self.arguments(output, *options), env=self.environment(predictor))


@pytest.fixture
def command(project: Project, model: Path) -> Command:
    return Command(project, model)


def segmentations(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Voxels and grids of all files, hidden ones as well."""
    found = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        image = SimpleITK.ReadImage(path)
        grid = (image.GetSpacing(), image.GetOrigin(), image.GetDirection(), image.GetPixelIDTypeAsString())
        found[str(path.relative_to(folder))] = (grid, SimpleITK.GetArrayFromImage(image).tolist())
    return found


def test_nnunets_command(command: Command, tmp_path: Path) -> None:
    """Several folds, parts, and going on where another command stopped."""
    theirs, ours, parts = (tmp_path / name for name in ("theirs", "ours", "parts"))
    assert "sending off prediction to background worker" in command(theirs, "-f", "0", "1", predictor="off").stdout
    expected = segmentations(theirs)
    assert len(expected) == 2
    assert "background worker" not in command(ours, "-f", "0", "1").stdout
    assert segmentations(ours) == expected
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for part in ("0", "1"):
        command(parts, "-f", "0", "1", "-num_parts", "2", "-part_id", part)
    assert segmentations(parts) == expected
    kept, removed = (ours / name for name in expected)
    stamp = kept.stat().st_mtime_ns
    removed.unlink()
    command(ours, "-f", "0", "1", "--continue_prediction")
    assert segmentations(ours) == expected
    assert kept.stat().st_mtime_ns == stamp


def test_nnunets_command_with_probabilities(command: Command, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    command(theirs, "-f", "0", "--save_probabilities", predictor="off")
    command(ours, "-f", "0", "--save_probabilities")
    assert segmentations(ours) == segmentations(theirs)
    for path in sorted(theirs.glob("*.npz")):
        np.testing.assert_array_equal(np.load(ours / path.name)["probabilities"], np.load(path)["probabilities"])


@pytest.mark.slow
def test_a_command_that_is_killed_at_any_time_can_be_continued(command: Command, tmp_path: Path) -> None:
    """Whatever a killed command left behind is whole, and the same command with --continue_prediction does the rest."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        for path in sorted((command.project.raw / "imagesTs").iterdir()):
            shutil.copy(path, images / f"{i}_{path.name}")
    command = replace(command, images=images)
    command(whole, "-f", "0")
    expected = segmentations(whole)
    assert len(expected) == 8
    name, *arguments = command.arguments(killed, "-f", "0", "--continue_prediction")
    environment = {**os.environ, **command.project.environment, **command.environment("on")}
    for files in (1, 3, 6):
        with subprocess.Popen(
            [program(name), *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and len(list(killed.glob("*.nii.gz"))) < files:
                time.sleep(0.001)
            process.kill()
        for leftover in killed.glob(".writing_*"):
            shutil.rmtree(leftover)
        found = segmentations(killed)
        assert files <= len(found) < 8
        assert {case: expected[case] for case in found} == found
    command(killed, "-f", "0", "--continue_prediction")
    assert segmentations(killed) == expected


def test_nnunets_command_without_processes(command: Command, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    options = ["-f", "0", "-npp", "0", "-nps", "0"]
    command(theirs, *options, predictor="off")
    output = command(ours, *options).stdout
    assert "Predicting phantom_test_000:" in output
    assert "background worker" not in output
    assert segmentations(ours) == segmentations(theirs)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


def test_a_killed_command_leaves_no_half_written_file(tmp_path: Path) -> None:
    """Killed while a segmentation is written: the folder that nnU-Net's commands list holds no file with its name."""
    code = f"""
import os, signal
from pathlib import Path
import numpy as np
import SimpleITK
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2_e2enet.prediction import scans

class Predictor:
    dataset_json = {{"file_ending": ".nii.gz"}}
    class plans_manager:
        class image_reader_writer_class(SimpleITKIO):
            def write_seg(self, seg, path, properties):
                super().write_seg(seg, path, properties)
                Path(path).write_bytes(Path(path).read_bytes()[:100])
                os.kill(os.getpid(), signal.SIGKILL)

grid = {{"sitk_stuff": {{"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}}}}
scans.write(Predictor(), np.zeros((20, 20, 20), np.uint8), {str(tmp_path / "case")!r}, grid)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.is_dir()
