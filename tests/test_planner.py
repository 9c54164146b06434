"""Planning needs a data set's fingerprint alone, so these data sets have large images on paper and small ones on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from integration.commands import Runner
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support import nnunet_environment, run_forked
from torch import nn

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.datasets import write_phantom_dataset
from nnunetv2_e2enet.network import E2ENet, accounts, e2enet_features, maskable_layers
from nnunetv2_e2enet.training.planner import STOCK_BYTES_PER_ELEMENT

DATASET = "Dataset991_Abdomen"


def with_fingerprint(folder: Path, shape: list[int]) -> Path:
    """nnU-Net's folders with a data set whose fingerprint has five images of a shape."""
    write_phantom_dataset(folder / "nnUNet_raw" / DATASET, n_train=5, n_test=0)
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    preprocessed.mkdir(parents=True)
    statistics = {
        "max": 1.0,
        "mean": 0.5,
        "median": 0.5,
        "min": 0.0,
        "percentile_00_5": 0.0,
        "percentile_99_5": 1.0,
        "std": 0.2,
    }
    fingerprint = {
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
        "shapes_after_crop": [shape] * 5,
        "spacings": [[2.5, 1.0, 1.0]] * 5,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_fingerprint(tmp_path_factory.mktemp("project"), [120, 400, 400])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that one patch holds, which are planned fast: there is no 3d_lowres."""
    return with_fingerprint(tmp_path_factory.mktemp("small"), [32, 64, 64])


def plans(project: Path, name: str) -> dict[str, Any]:
    return json.loads((project / "nnUNet_preprocessed" / DATASET / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def planned(project: Path, runner: Runner) -> Path:
    environment = nnunet_environment(project)
    run_forked(runner, "nnUNetv2_plan_experiment", "-d", "991", env=environment)
    run_forked(runner, "e2enet", "plan", "-d", "991", env=environment)
    large = ["-gpu_memory_target", "40", "-overwrite_plans_name", "nnUNetE2ENetPlans_40G"]
    run_forked(runner, "e2enet", "plan", "-d", "991", *large, env=environment)
    return project


def built(configuration: dict[str, Any]) -> E2ENet:
    manager = PlansManager({"configurations": {"c": configuration}})
    configuration_manager = manager.get_configuration("c")
    network = nnUNetTrainer.build_network_architecture(manager, configuration_manager, 1, 5, True)
    assert isinstance(network, E2ENet)
    return network


def test_stock_trainers_build_a_dense_e2enet_from_the_plans(planned: Path) -> None:
    e2enet_plans = plans(planned, "nnUNetE2ENetPlans")
    assert e2enet_plans["plans_name"] == "nnUNetE2ENetPlans"
    assert e2enet_plans["experiment_planner_used"] == "nnUNetPlannerE2ENet"
    for name in ("2d", "3d_fullres", "3d_lowres"):
        configuration = e2enet_plans["configurations"][name]
        network = built(configuration)
        assert all(layer.mask.all() for _, layer in maskable_layers(network))
        n_stages = configuration["architecture"]["arch_kwargs"]["n_stages"]
        assert network.encoder.output_channels == e2enet_features(n_stages)
        network.check_patch_size(configuration["patch_size"])


def test_patch_fits_the_memory_target_by_the_bytes_that_e2enet_keeps(planned: Path) -> None:
    """8 GB stand for nnU-Net's reference: 560 million elements of feature maps for a patch of a batch of two."""
    sizes = {}
    for name, gigabytes in (("nnUNetE2ENetPlans", 8), ("nnUNetE2ENetPlans_40G", 40)):
        configuration = plans(planned, name)["configurations"]["3d_fullres"]
        network, target = built(configuration), 560e6 * STOCK_BYTES_PER_ELEMENT * gigabytes / 8
        assert network.saved_bytes(configuration["patch_size"]) <= target
        network.recompute = "none"
        assert network.saved_bytes(configuration["patch_size"]) > target  # the patch is as large as it is by recomputation
        sizes[name] = torch.tensor(configuration["patch_size"]).prod().item()
        assert configuration["batch_size"] >= 2
    stock = plans(planned, "nnUNetPlans")["configurations"]["3d_fullres"]["patch_size"]
    assert sizes["nnUNetE2ENetPlans"] <= torch.tensor(stock).prod().item() <= sizes["nnUNetE2ENetPlans_40G"]


def test_preprocessed_data_are_shared_with_stock_plans(planned: Path) -> None:
    stock, ours = plans(planned, "nnUNetPlans"), plans(planned, "nnUNetE2ENetPlans")
    for name in ("2d", "3d_fullres"):
        a, b = (p["configurations"][name] for p in (stock, ours))
        for key in ("data_identifier", "spacing", "normalization_schemes", "resampling_fn_data_kwargs"):
            assert a[key] == b[key]
    assert ours["configurations"]["3d_lowres"]["data_identifier"] == "nnUNetE2ENetPlans_3d_lowres"  # another spacing


def test_data_of_stock_plans_at_another_spacing_are_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nnUNetPlans were planned by hand, or before cases were added."""
    folder = with_fingerprint(tmp_path, [32, 64, 64])
    for name, value in nnunet_environment(folder).items():
        monkeypatch.setenv(name, value)

    def identifiers(name: str) -> dict[str, str]:
        assert main(["plan", "-d", "991", "-overwrite_plans_name", name]) == 0
        configurations = plans(folder, name)["configurations"]
        return {key: configurations[key]["data_identifier"] for key in ("2d", "3d_fullres")}

    shared = {"2d": "nnUNetPlans_2d", "3d_fullres": "nnUNetPlans_3d_fullres"}
    assert identifiers("A") == shared
    stock = folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    shutil.copyfile(stock.with_name("A.json"), stock)
    assert identifiers("B") == shared
    for at, key, value in (
        (("configurations", "3d_fullres"), "spacing", [2.5, 1.0, 1.5]),
        (("configurations", "2d"), "spacing", [2.0, 1.0]),
        (("configurations", "2d"), "preprocessor_name", "Other"),
        ((), "transpose_forward", [0, 2, 1]),
    ):
        others = plans(folder, "A")
        place = others
        for step in at:
            place = place[step]
        place[key] = value
        stock.write_text(json.dumps(others))
        assert identifiers("C") == {"2d": "C_2d", "3d_fullres": "C_3d_fullres"}, key


@pytest.mark.parametrize(
    "options", [["-overwrite_target_spacing", "3", "2", "2"], ["-preprocessor_name", "Other"]], ids=["spacing", "preprocessor"]
)
def test_data_that_are_preprocessed_otherwise_are_not_shared(
    small: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net's preprocessing replaces the folder that the plans name, which may be that of nnUNetPlans."""
    monkeypatch.setattr(default_preprocessor, "Other", DefaultPreprocessor, raising=False)
    for name, value in nnunet_environment(small).items():
        monkeypatch.setenv(name, value)
    assert main(["plan", "-d", "991", *options, "-overwrite_plans_name", "X"]) == 0
    for name in ("2d", "3d_fullres"):
        assert plans(small, "X")["configurations"][name]["data_identifier"] == f"X_{name}"


def test_registered_planner_gives_the_same_plans(small: Path, runner: Runner) -> None:
    run_forked(runner, "e2enet", "plan", "-d", "991", env=nnunet_environment(small))
    before = plans(small, "nnUNetE2ENetPlans")
    command = ["nnUNetv2_plan_experiment", "-d", "991", "-pl", "nnUNetPlannerE2ENet", "-overwrite_plans_name", "Again"]
    run_forked(runner, *command, env=nnunet_environment(small))
    again = plans(small, "Again")
    for configuration in (before["configurations"]["3d_fullres"], again["configurations"]["3d_fullres"]):
        assert configuration["architecture"]["network_class_name"] == "nnunetv2_e2enet.network.E2ENet"
    assert again["configurations"]["2d"] == before["configurations"]["2d"]
    assert again["configurations"]["3d_fullres"] == before["configurations"]["3d_fullres"]


@pytest.mark.parametrize(
    ("dimension", "strides", "patch"),
    [
        (3, [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 4, (64, 160, 160)),
        (3, [[1, 1, 1]] + [[2, 2, 2]] * 5, (128, 128, 128)),
        (3, [[1, 1, 1]] + [[2, 2, 2]] * 3, (40, 56, 40)),
        (2, [[1, 1]] + [[2, 2]] * 7, (512, 512)),
    ],
)
def test_bytes_that_stock_nnunet_keeps_per_element_of_its_estimate(
    dimension: int, strides: list[list[int]], patch: tuple[int, ...]
) -> None:
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dimension == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    features = [min(32 * 2**i, 320) for i in range(len(strides))]
    with torch.device("meta"):
        stock = PlainConvUNet(
            *(1, len(strides), features, conv, 3, strides, 2, 5, 2, True, norm, {"eps": 1e-5, "affine": True}),
            *(None, None, nn.LeakyReLU, {"inplace": True}),
            deep_supervision=True,
        )
    kept = accounts.saved_bytes(stock, (1, 1, *patch))
    assert kept / stock.compute_conv_feature_map_size(patch) == pytest.approx(STOCK_BYTES_PER_ELEMENT, rel=0.03)


def test_planning_without_a_fingerprint_or_folders_says_so_in_one_line(project: Path, runner: Runner) -> None:
    missing = run_forked(runner, "e2enet", "plan", "-d", "992", env=nnunet_environment(project), check=False)
    assert missing.returncode == 1
    assert missing.stdout.splitlines()[-1].startswith("e2enet plan: no data set 992 in nnUNet_raw=")
    assert "Traceback" not in missing.stdout
    unset = run_forked(runner, "e2enet", "plan", "-d", "991", env={"nnUNet_raw": ""}, check=False)
    assert unset.returncode == 1
    assert "nnUNet_preprocessed is not set" in unset.stdout or "nnUNet_raw is not set" in unset.stdout


def test_what_cannot_be_planned_is_said_in_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "project"))
    for name, value in nnunet_environment(copy).items():
        monkeypatch.setenv(name, value)
    preprocessed = copy / "nnUNet_preprocessed" / DATASET

    def message(*options: str) -> str:
        assert main(["plan", "-d", "991", *options]) == 1
        return capsys.readouterr().err

    for target in ("-3", "0", "nan"):
        assert message("-gpu_memory_target", target) == f"e2enet plan: -gpu_memory_target {target}: expected GB above 0\n"
    assert message("-overwrite_target_spacing", "0", "1", "1") == (
        "e2enet plan: -overwrite_target_spacing 0 1 1: expected mm above 0\n"
    )
    assert message("-preprocessor_name", "Other").startswith("e2enet plan: -preprocessor_name Other: nnU-Net has no such")
    for name in ("../Plans", "a\\b", ""):
        assert f"-overwrite_plans_name {name}: expected a name without a folder" in message("-overwrite_plans_name", name)
    stock = preprocessed / "nnUNetPlans.json"
    stock.write_text('{"experiment_planner_used": "ExperimentPlanner"}')
    assert f"{stock} has the plans of ExperimentPlanner" in (said := message("-overwrite_plans_name", "nnUNetPlans"))
    assert said.count("\n") == 1
    (preprocessed / "Plans.json").mkdir()  # stands for a file that cannot be written
    assert "data set 991 cannot be planned: " in (said := message("-overwrite_plans_name", "Plans"))
    assert said.count("\n") == 1
    (preprocessed / "dataset_fingerprint.json").write_text("{")
    assert f"cannot read {preprocessed / 'dataset_fingerprint.json'} as JSON" in (said := message())
    assert len(said.splitlines()) == 1
    (preprocessed / "dataset_fingerprint.json").write_text('{"spacings": []}')
    assert "dataset_fingerprint.json lacks shapes_after_crop, median_relative" in (said := message())
    assert said.count("\n") == 1
    (preprocessed / "dataset_fingerprint.json").unlink()
    assert "data set 991 cannot be planned: " in (said := message())
    assert "ingerprint" in said
    (copy / "nnUNet_raw" / "Dataset991_Other").mkdir()
    assert "data set 991 is Dataset991_Abdomen and Dataset991_Other in nnUNet_raw=" in message()
