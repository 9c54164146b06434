"""What the tests call: nnU-Net's console commands, its folders, and trainers in this process."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from integration.commands import Runner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunetv2_e2enet.deployment import Description, PackedModel
from nnunetv2_e2enet.deployment.packing import pack
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.training.architecture import e2enet_architecture

AMOS_STRIDES = [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 4

STOCK_NETWORK = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def architecture(
    features: Sequence[int], strides: Sequence[Sequence[int]], network: str = STOCK_NETWORK, **arguments: Any
) -> dict[str, Any]:
    """The entry of 3D plans for a network, as nnU-Net's planner writes it for slices that lie far apart."""
    n = len(strides)
    layers = "n_blocks_per_stage" if "n_blocks_per_stage" in arguments else "n_conv_per_stage"  # of residual networks
    return {
        "network_class_name": network,
        "arch_kwargs": {
            "n_stages": n,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * (n - 1)],
            "strides": [list(stride) for stride in strides],
            layers: [2] * n,
            "n_conv_per_stage_decoder": [2] * (n - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
            **arguments,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def run_command(*command: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A console command of this environment; its output is in the message if it fails."""
    result = subprocess.run(
        [program(command[0]), *command[1:]],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return _checked(result, command) if check else result


def run_forked(
    runner: Runner, *command: str, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As ``run_command``, without the time that imports take; for what is not about a process and its workers."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        code = runner.exit_code(log, *command, environment=env or {})
        result = subprocess.CompletedProcess(command, code, log.read_text())
    return _checked(result, command) if check else result


def _checked(result: subprocess.CompletedProcess[str], command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    if result.returncode:
        pytest.fail(f"{' '.join(command)} ended with exit code {result.returncode}:\n{result.stdout[-6000:]}")
    return result


def run_python(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, away from the repository, so that it sees the installed package."""
    command = [sys.executable, "-c", code]
    folder = Path(sys.prefix)
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of a file stands for the disk: writing fails after ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Hostile:
    """Makes a file, at ``path``, when it is unpickled by a reader that executes what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def nnunet_environment(folder: Path) -> dict[str, str]:
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return {**folders, "nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "2"}


@dataclass(frozen=True)
class Project:
    """nnU-Net's three folders with one small phantom data set, preprocessed, and what runs commands on it."""

    folder: Path
    dataset: str = "Dataset993_Phantom"
    runner: Runner | None = None

    @property
    def environment(self) -> dict[str, str]:
        return nnunet_environment(self.folder)

    @property
    def raw(self) -> Path:
        return self.folder / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / self.dataset

    def plans(self, name: str = "nnUNetPlans") -> dict[str, Any]:
        return json.loads((self.preprocessed / f"{name}.json").read_text())

    def tiny_plans(self) -> dict[str, Any]:
        """Plans whose 3d_fullres has three levels, few channels and a patch of 8 by 16 by 16."""
        plans = self.plans()
        settings = plans["configurations"]["3d_fullres"]
        settings.update(patch_size=[8, 16, 16], batch_size=2)
        settings["architecture"]["arch_kwargs"].update(
            n_stages=3,
            features_per_stage=[4, 8, 8],
            kernel_sizes=[[3, 3, 3]] * 3,
            strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
            n_conv_per_stage=[2] * 3,
            n_conv_per_stage_decoder=[2] * 2,
        )
        return plans

    def write_plans(self, name: str, plans: dict[str, Any]) -> None:
        (self.preprocessed / f"{name}.json").write_text(json.dumps({**plans, "plans_name": name}))

    def model(self, trainer: str, plans: str = "nnUNetPlans", configuration: str = "3d_fullres") -> Path:
        return self.folder / "nnUNet_results" / self.dataset / f"{trainer}__{plans}__{configuration}"

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A console command, see ``run_forked``."""
        assert self.runner is not None
        return run_forked(self.runner, *command, env={**self.environment, **(env or {})}, check=check)

    def train(
        self,
        trainer: str,
        *options: str,
        fold: str = "0",
        configuration: str = "3d_fullres",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        command = ["nnUNetv2_train", self.dataset, configuration, fold, "-tr", trainer, "-device", "cpu"]
        return self.run(*command, *options, env={"nnUNet_n_proc_DA": "0"}, check=check)


def make(cls: Any, project: Project, plans: dict[str, Any] | None = None, configuration: str = "3d_fullres") -> Any:
    dataset_json = load_json(str(project.raw / "dataset.json"))
    given = {**deepcopy(plans or project.plans()), "continue_training": False}
    return cls(given, configuration, 0, dataset_json, torch.device("cpu"))


def weights(model: Path, fold: int = 0) -> dict[str, torch.Tensor]:
    file = model / f"fold_{fold}" / "checkpoint_final.pth"
    return torch.load(file, map_location="cpu", weights_only=False)["network_weights"]


def assert_dice_is_that_of_the_files(summary: dict[str, Any]) -> None:
    """nnU-Net's summary of an evaluation says of each case and label what its segmentations overlap, counted here again."""
    for case in summary["metric_per_case"]:
        predicted, reference = (
            sitk.GetArrayFromImage(sitk.ReadImage(case[key])) for key in ("prediction_file", "reference_file")
        )
        assert predicted.shape == reference.shape
        for label, metrics in case["metrics"].items():
            ours, theirs = predicted == int(label), reference == int(label)
            size = int(ours.sum()) + int(theirs.sum())
            expected = 2 * int((ours & theirs).sum()) / size if size else np.nan
            np.testing.assert_allclose(metrics["Dice"], expected, rtol=1e-9)
    dice = [metrics["Dice"] for case in summary["metric_per_case"] for metrics in case["metrics"].values()]
    labels = summary["metric_per_case"][0]["metrics"]
    by_label = np.nanmean(np.reshape(dice, (-1, len(labels))), axis=0)
    np.testing.assert_allclose(summary["foreground_mean"]["Dice"], np.mean(by_label), rtol=1e-9)


def train_epochs(
    trainer: Any,
    n_epochs: int,
    training: Iterable[dict[str, Any]] | None = None,
    validation: Iterable[dict[str, Any]] | None = None,
) -> None:
    """nnU-Net's loop over epochs, on noise unless batches are given; two iterations an epoch and one for validation."""
    batches, held_out = (iter(batch, None) if given is None else iter(given) for given in (training, validation))
    if training is None:
        trainer.dataloader_train = batches
    for _ in range(n_epochs):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(next(batches)) for _ in range(2)])
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(held_out))])
        trainer.on_epoch_end()


def batch(patch: Sequence[int] = (24, 64, 64), heads: int = 4) -> dict[str, Any]:
    """Noise and what is to be found in it, for a network of so many heads with the strides of the phantoms' plans."""
    data = torch.randn(1, 1, *patch)
    steps = [(1, 1), (1, 2), (2, 4), (4, 8)][:heads]
    target = [(data > i / 10).float()[:, :, ::z, ::xy, ::xy] for i, (z, xy) in enumerate(steps)]
    return {"data": data, "target": target}


def untrained_model(
    project: Project,
    configuration: str = "3d_fullres",
    base: int = 8,
    maximum: int = 32,
    previous_stage: str | None = None,
    **settings: Any,
) -> tuple[PackedModel, E2ENet]:
    """A model of random weights for plans of the project, packed, and its network in evaluation mode."""
    plans = project.plans()
    entry = plans["configurations"][configuration]
    if previous_stage is not None:
        entry["previous_stage"] = previous_stage
    settings = {"feature_sparsity": 0.8, "shift_size": 3, **settings}
    entry["architecture"] = e2enet_architecture(entry["architecture"], base, maximum, **settings)
    description = Description(
        plans=plans,
        dataset=load_json(str(project.raw / "dataset.json")),
        configuration=configuration,
        trainer="nnUNetTrainerE2ENet",
        folds=["0"],
        checkpoint="checkpoint_final.pth",
        mirroring_axes=[0, 1],
    )
    torch.manual_seed(0)
    plans_manager, settings_manager = description.managers()
    outputs = len(description.dataset["labels"])
    inputs = determine_num_input_channels(plans_manager, settings_manager, description.dataset)
    network = nnUNetTrainer.build_network_architecture(plans_manager, settings_manager, inputs, outputs, False).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:  # scales, offsets and biases are ones and zeros at the start
            torch.nn.init.uniform_(parameter, 0.5 if name.endswith("norm.weight") else -1.5, 1.5)
    return PackedModel(description, {"0": pack(network.state_dict(), network)}), network


def copy_with_random_heads(trained: Path, results: Path) -> Path:
    """A copy of a model's folder in results of its own: whatever was trained, labels 1 and 3 have many components.

    The norms are those of the start, so that all feature maps count alike, and the heads are random.
    """
    folder = results / trained.parent.name / trained.name
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("validation"))
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.glob("fold_*/checkpoint_final.pth")):
        content = torch.load(path, weights_only=False)
        for name, value in content["network_weights"].items():
            if name.endswith("norm.weight"):
                value.fill_(1)
            elif name.endswith("norm.bias"):
                value.zero_()
            elif "seg_layers" in name:
                value.normal_(generator=generator)
                value -= value.mean(1, keepdim=True)  # or the label with the largest sum wins: activations are positive
        torch.save(content, path)
    return folder
