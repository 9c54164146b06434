"""What must be true of the files that a step has written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from integration.cell import Cell
from integration.commands import StepError
from nnunetv2_e2enet.training.checkpoints import read_checkpoint

DENSITY = 0.2
N_EPOCHS = 3
BLIND = 0.01


def expect(condition: bool, message: str) -> None:
    """Raises StepError with the message unless the condition holds."""
    if not condition:
        raise StepError(message)


def expect_files(*files: Path) -> None:
    """Raises StepError unless all of them are there and not empty."""
    missing = [file for file in files if not file.is_file() or not file.stat().st_size]
    expect(not missing, f"{len(missing)} files are missing, such as {missing[0]}" if missing else "")


def masks(fold: Path, checkpoint: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    """The topology in a checkpoint, by name of the mask."""
    weights = read_checkpoint(fold / checkpoint)["network_weights"]
    return {name: value for name, value in weights.items() if name.endswith(".mask")}


def expect_trained(fold: Path) -> None:
    """Raises StepError unless an E2ENet training has come to its end: every epoch once, exact sparsity, all its files."""
    expect_files(*(fold / name for name in ("checkpoint_final.pth", "progress.png", "validation/summary.json")))
    checkpoint = read_checkpoint(fold / "checkpoint_final.pth")
    n_epochs = len(checkpoint["logging"]["train_losses"])
    expect(checkpoint["current_epoch"] == n_epochs == N_EPOCHS, f"{n_epochs} epochs are logged, not {N_EPOCHS}")
    weights = checkpoint["network_weights"]
    topology = masks(fold)
    expect(bool(topology), "there are no masks in the checkpoint")
    for name, mask in topology.items():
        n_active, n_expected = int(mask.sum()), round(DENSITY * mask.numel())
        expect(n_active == n_expected, f"{name} has {n_active} active connections, not {n_expected}")
        inactive = weights[name.replace(".mask", ".weight")][~mask]
        expect(not inactive.any(), f"inactive weights of {name} are not zero")


def training_log(fold: Path) -> str:
    """All that the trainings of a fold have logged; nnU-Net names a log after the second in which the training began."""
    return "".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))


def epochs_in(log: str) -> list[int]:
    """The numbers of the epochs that a training log speaks of."""
    return [int(number) for number in re.findall(r"Epoch (\d+) *$", log, re.MULTILINE)]


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def probabilities(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path)["probabilities"] for path in sorted(folder.glob("*.npz"))}


def expect_predictions(cell: Cell, folder: Path) -> None:
    """Raises StepError unless there is a segmentation for each test image, of its size."""
    images = {path.name.replace("_0000", ""): path for path in (cell.raw / "imagesTs").glob("*.nii.gz")}
    found = segmentations(folder)
    expect(found.keys() == images.keys(), f"{len(images)} segmentations were expected in {folder}, not {sorted(found)}")
    for name, segmentation in found.items():
        size = sitk.ReadImage(str(images[name])).GetSize()
        expect(segmentation.shape == size[::-1], f"{folder / name} has not the size of its image")


def expect_same(first: Path, second: Path) -> None:
    """Raises StepError unless two folders have the same segmentations and the same probabilities.

    Segmentations alone would not do: after so short a training, a network may see background everywhere.
    """
    for read in (segmentations, probabilities):
        a, b = read(first), read(second)
        expect(bool(a) and a.keys() == b.keys(), f"{first} and {second} have {read.__name__} of different cases, or none")
        different = [name for name in a if not np.array_equal(a[name], b[name])]
        expect(not different, f"{first} and {second} differ in {', '.join(different)}")


def expect_different(first: Path, second: Path) -> None:
    """Raises StepError if two folders have the same probabilities, in any case where these vary within the image.

    They may not: pruned again and again in so short a training, a network of few maps can end blind. It is an error as well if
    that is so in all cases, and all have the same probabilities.
    """
    p, q = probabilities(first), probabilities(second)
    expect(bool(p) and p.keys() == q.keys(), f"{first} and {second} have probabilities of different cases, or none")
    same = [name for name in p if np.array_equal(p[name], q[name])]
    telling = [name for name in same if np.ptp(p[name][0]) > BLIND]
    expect(not telling, f"{first} and {second} have the same probabilities for {', '.join(telling)}")
    expect(len(same) < len(p), f"{first} and {second} cannot be told apart: their probabilities vary nowhere")
