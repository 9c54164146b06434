"""Networks of all shapes, trained and applied by nnU-Net's commands on thin images of four channels."""

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from integration.cell import PLANNING, Workspace
from integration.checks import expect_trained
from integration.commands import Runner
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.datasets import LABELS, phantom_case
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.training.checkpoints import read_checkpoint

DATASET, TRAINER = "Dataset994_Thin", "nnUNetTrainerE2ENet_smoke"
N_CASES, N_SLICES, N_CHANNELS = 5, 8, 4
SPACING = (4.0, 1.0, 1.0)
FLAT = [1, 2, 2]
PATCH = [N_SLICES, 64, 64]


@dataclass(frozen=True)
class Thin:
    """nnU-Net's folders with preprocessed images of eight slices, and what runs its commands."""

    folder: Path
    runner: Runner

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / DATASET

    @property
    def images(self) -> Path:
        return self.folder / "nnUNet_raw" / DATASET / "imagesTs"

    def run(self, *command: str | Path, **environment: str) -> None:
        folders = Workspace(self.folder).environment()
        self.runner.run(self.folder / "commands.log", *command, environment={**folders, **environment})

    def plans(self) -> dict[str, Any]:
        return json.loads((self.preprocessed / "nnUNetPlans.json").read_text())


def write_case(folder: Path, number: int) -> None:
    """The middle slices of a phantom, in four contrasts."""
    rng = np.random.default_rng(number)
    image, segmentation = phantom_case(rng, (16, 64, 64), SPACING)
    middle = slice(8 - N_SLICES // 2, 8 + N_SLICES // 2)
    volumes = {f"imagesTr/case_{number}_{c:04d}": image[middle] ** (0.5 + c / 4) for c in range(N_CHANNELS)}
    for name, voxels in {**volumes, f"labelsTr/case_{number}": segmentation[middle]}.items():
        volume = sitk.GetImageFromArray(voxels)
        volume.SetSpacing(SPACING[::-1])
        sitk.WriteImage(volume, str(folder / f"{name}.nii.gz"))


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Thin:
    folder = tmp_path_factory.mktemp("thin")
    raw = folder / "nnUNet_raw" / DATASET
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / name).mkdir(parents=True)
    for number in range(N_CASES):
        write_case(raw, number)
    for image in (raw / "imagesTr").glob("case_0_*"):
        shutil.copy(image, raw / "imagesTs")
    description = {
        "channel_names": {str(c): f"contrast {c}" for c in range(N_CHANNELS)},
        "labels": dict(LABELS),
        "numTraining": N_CASES,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    result = Thin(folder, runner)
    prepare = ("nnUNetv2_plan_and_preprocess", "-d", "994", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    result.run(*prepare, **PLANNING)
    return result


def test_nnunet_plans_anisotropic_networks_for_these_images(thin: Thin) -> None:
    """Otherwise this module would not test them."""
    configuration = thin.plans()["configurations"]["3d_fullres"]
    assert configuration["patch_size"][0] <= N_SLICES
    assert FLAT in configuration["architecture"]["arch_kwargs"]["strides"]


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        (None, None),
        ([4, 64, 64], [FLAT] * 6),
        (PATCH, [FLAT, [2, 2, 2]]),
        (PATCH, [[2, 2, 2]]),
    ],
    ids=["as planned", "4 slices, 7 levels", "3 levels", "2 levels"],
)
def test_train_and_predict(
    thin: Thin, patch: list[int] | None, strides: list[list[int]] | None, request: pytest.FixtureRequest
) -> None:
    plans = thin.plans()
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    if patch and strides:
        configuration["patch_size"] = patch
        configuration["architecture"]["arch_kwargs"]["strides"] = [[1, 1, 1], *strides]
    expected = deepcopy(configuration["architecture"]["arch_kwargs"]["strides"])
    name = f"plans_{request.node.callspec.id}".replace(",", "").replace(" ", "_")
    (thin.preprocessed / f"{name}.json").write_text(json.dumps({**plans, "plans_name": name}))

    model = ("-tr", TRAINER, "-p", name, "-device", "cpu")
    thin.run("nnUNetv2_train", "994", "3d_fullres", "0", *model)
    fold = thin.folder / "nnUNet_results" / DATASET / f"{TRAINER}__{name}__3d_fullres" / "fold_0"
    expect_trained(fold)
    checkpoint = read_checkpoint(fold / "checkpoint_final.pth")
    trained = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert trained["strides"] == expected
    assert checkpoint["network_weights"]["encoder.stages.0.0.conv.weight"].shape[1] == N_CHANNELS

    output = thin.folder / "predictions" / name
    folders = ("-i", thin.images, "-o", output)
    options = ("-npp", "1", "-nps", "1", "--save_probabilities")
    thin.run("nnUNetv2_predict", "-d", "994", "-c", "3d_fullres", "-f", "0", *model, *folders, *options)
    with np.load(output / "case_0.npz") as file:
        found = file["probabilities"]
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "case_0.nii.gz")))
    assert segmentation.shape == found.shape[1:] == tuple(PATCH)
    assert np.array_equal(segmentation, found.argmax(axis=0))
    expected = probabilities(thin, fold.parent, checkpoint)
    assert np.ptp(expected, axis=(1, 2, 3)).max() > 0.01  # not blind
    assert np.abs(found - expected).mean() < 0.005  # nnU-Net sums logits in half precision; single voxels differ more


def probabilities(thin: Thin, model: Path, checkpoint: dict[str, Any]) -> np.ndarray:
    """What the trained network says of the test image, mirrored in all ways, without nnU-Net's prediction and the engine.

    The images have the spacing of the plans and no border to crop, so preprocessing normalizes each channel and nothing else;
    the windows of a thinner patch are averaged with nnU-Net's weights.
    """
    plans = PlansManager(load_json(str(model / "plans.json")))
    configuration = plans.get_configuration("3d_fullres")
    names = sorted(thin.images.glob("case_0_*.nii.gz"))
    channels = [sitk.GetArrayFromImage(sitk.ReadImage(str(name))).astype(np.float64) for name in names]
    image = torch.from_numpy(np.stack([(c - c.mean()) / c.std() for c in channels])).float()[None]
    network = nnUNetTrainerE2ENet_smoke.build_network_architecture(plans, configuration, N_CHANNELS, len(LABELS), False)
    network.load_state_dict(checkpoint["network_weights"])
    network.eval()
    patch = configuration.patch_size
    weight = compute_gaussian(tuple(patch), value_scaling_factor=10, device=torch.device("cpu")).double()
    total, weights = torch.zeros(len(LABELS), *PATCH).double(), torch.zeros(PATCH).double()
    step = max(1, patch[0] // 2)
    axes = [axes for n in range(4) for axes in combinations((2, 3, 4), n)]
    with torch.inference_mode(), engine.disabled():
        for begin in range(0, N_SLICES - patch[0] + 1, step):
            window = slice(begin, begin + patch[0])
            logits = sum(network(image[:, :, window].flip(a)).flip(a)[0] for a in axes) / len(axes)
            total[:, window] += weight * logits
            weights[window] += weight
    return torch.softmax(total / weights, dim=0).numpy()
