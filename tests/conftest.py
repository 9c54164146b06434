"""Fixtures: data that lies beside the repository where it is present, and a registered nnU-Net."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import hypothesis
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait for others must not take their cores
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent)  # also of the commands; before anything imports matplotlib
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests/test_kernels.py; before anything imports Triton, which reads it then

import setting_fixture
from integration.commands import ForkingRunner, Runner
from support import Project

from nnunetv2_e2enet.network.acceleration import prepare_kernels
from nnunetv2_e2enet.registration import find_nnunet, has_experiments, is_registered, register, unregister

ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ  # processes that run tests
REGISTRATION = pytest.StashKey[ExitStack]()
setting = setting_fixture.setting
SHARED = Path(__file__).resolve().parents[2] / "shared"

# A busy machine makes single examples slow, so there is no deadline
hypothesis.settings.register_profile("same-examples", derandomize=True, deadline=None)
hypothesis.settings.register_profile("new-examples", derandomize=False, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same-examples"))  # before the tests are imported


@pytest.fixture
def fused_kernels(setting: Callable[..., None]) -> Iterator[None]:
    """Networks that are made or moved in a test compute with the Triton kernels; without a GPU in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting(kernels="on")
    prepare_kernels(device)
    yield
    setting(kernels="auto")
    prepare_kernels(device)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own convolutions are as exact on a GPU as ours, which do not round to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference outputs and real scans, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs reference outputs and scans in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(autouse=ONE_OF_SEVERAL)
def one_thread() -> None:
    """Each of several processes has one thread, whatever nnU-Net's commands set in the test before."""
    torch.set_num_threads(1)


@contextmanager
def all_classes_registered() -> Iterator[None]:
    """nnU-Net finds all our classes, and afterwards those that it found before."""
    nnunet = find_nnunet()
    before, experiments = is_registered(nnunet), has_experiments(nnunet)
    try:
        register(nnunet, experiments=True)
        yield
    finally:
        if before:
            register(nnunet, experiments)
        else:
            unregister(nnunet)


def pytest_configure(config: pytest.Config) -> None:
    """With several processes (``-n``), the one that starts the others registers, before and until all of them run tests."""
    if config.getoption("numprocesses", None):
        config.stash[REGISTRATION] = ExitStack()
        config.stash[REGISTRATION].enter_context(all_classes_registered())


def pytest_unconfigure(config: pytest.Config) -> None:
    if REGISTRATION in config.stash:
        config.stash[REGISTRATION].close()


@pytest.fixture(scope="session")
def registered() -> Iterator[None]:
    """nnU-Net finds all our classes while the tests run."""
    with nullcontext() if ONE_OF_SEVERAL else all_classes_registered():
        yield


@pytest.fixture(scope="session")
def runner(registered: None) -> Iterator[Runner]:  # noqa: ARG001
    """Runs nnU-Net's commands without their imports, in one process and one thread each."""
    with ForkingRunner() as runner:
        yield runner


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Project:
    project = Project(tmp_path_factory.mktemp("nnunet"), runner=runner)
    # Cases are a little smaller than the patch that nnU-Net plans for them, so one tile covers each. A test case is larger, so
    # that prediction joins tiles. Voxels of test cases are multiples of 128: threads of PyTorch then divide them without a
    # remainder, which would be rounded otherwise, and segmentations can be compared bit by bit.
    project.run("e2enet", "phantom", "993", "--cases", "6", "--test-cases", "2", "--size", "22", "60", "60")
    for name, change, width in (("000", sitk.Crop, (6, 6, 3)), ("001", sitk.ZeroFluxNeumannPad, (2, 2, 2))):
        for file in project.raw.glob(f"*Ts/phantom_test_{name}*"):
            sitk.WriteImage(change(sitk.ReadImage(str(file)), width, width), str(file))
    project.run("nnUNetv2_plan_and_preprocess", "-d", "993", "-c", "2d", "3d_fullres", "-np", "1", "-npfp", "1")
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


@pytest.fixture
def in_process(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    """nnU-Net's folders for trainers made in this process; their results go to a folder of their own."""
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return project
