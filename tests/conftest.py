"""Fixtures: data that lies beside the repository where it is present, and a registered nnU-Net."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import nnunet_environment, run_command

from nnunetv2_e2enet.registration import find_nnunet, is_registered, register, unregister

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference outputs and real scans, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs reference outputs and scans in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def registered() -> Iterator[None]:
    """nnU-Net finds our classes while the tests run, and afterwards only if it did before."""
    nnunet = find_nnunet()
    before = is_registered(nnunet)
    register(nnunet)
    yield
    if not before:
        unregister(nnunet)


@dataclass(frozen=True)
class Project:
    """nnU-Net's three folders with one small phantom data set, preprocessed."""

    folder: Path
    dataset: str = "Dataset993_Phantom"

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

    def write_plans(self, name: str, plans: dict[str, Any]) -> None:
        (self.preprocessed / f"{name}.json").write_text(json.dumps({**plans, "plans_name": name}))

    def model(self, trainer: str, plans: str = "nnUNetPlans", configuration: str = "3d_fullres") -> Path:
        return self.folder / "nnUNet_results" / self.dataset / f"{trainer}__{plans}__{configuration}"

    def train(
        self,
        trainer: str,
        *options: str,
        fold: str = "0",
        configuration: str = "3d_fullres",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        command = ["nnUNetv2_train", "993", configuration, fold, "-tr", trainer, "-device", "cpu"]
        return run_command(*command, *options, env=self.environment, check=check)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, registered: None) -> Project:  # noqa: ARG001
    project = Project(tmp_path_factory.mktemp("nnunet"))
    environment = project.environment
    run_command("e2enet", "phantom", "993", "--cases", "6", "--test-cases", "2", env=environment)
    cores = ["-np", "2", "-npfp", "2"]
    run_command("nnUNetv2_plan_and_preprocess", "-d", "993", "-c", "2d", "3d_fullres", *cores, env=environment)
    # fewer slices a batch than nnU-Net would take, for the sake of two cores
    plans = project.plans()
    plans["configurations"]["2d"]["batch_size"] = 4
    project.write_plans("nnUNetPlans", plans)
    return project


@pytest.fixture(scope="session")
def trained(project: Project) -> Path:
    """Model folder with folds 0 and 1 of a short E2ENet training."""
    for fold in ("0", "1"):
        project.train("nnUNetTrainerE2ENet_smoke", fold=fold)
    return project.model("nnUNetTrainerE2ENet_smoke")
