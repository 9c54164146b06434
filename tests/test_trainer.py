"""The trainers, through nnU-Net's commands and as objects in this process."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support import Project, architecture, assert_dice_is_that_of_the_files, batch, make, run_python, train_epochs, weights
from torch import nn

from nnunetv2_e2enet import trainers
from nnunetv2_e2enet.dsff import CosineSchedule, GradientGrowth, KernelL1Norm, RandomGrowth
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, e2enet_features, maskable_layers
from nnunetv2_e2enet.trainers import e2enet_combined_trainers
from nnunetv2_e2enet.trainers.e2enet_demo_trainers import nnUNetTrainerE2ENet_smoke
from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet, nnUNetTrainerE2ENet_S90
from nnunetv2_e2enet.training.architecture import e2enet_architecture
from nnunetv2_e2enet.training.variants import variant

DSFF_LINE = re.compile(r"DSFF sparsity ([\d.]+), prune fraction ([\d.]+), connections changed (\d+), explored ([\d.]+)")


# --- through the console commands ---------------------------------------------------------------------------------------


def test_training_log_says_what_dsff_did(trained: Path) -> None:
    log = next((trained / "fold_0").glob("training_log_*.txt")).read_text()
    lines = [[float(value) for value in match.groups()] for match in DSFF_LINE.finditer(log)]
    assert [line[0] for line in lines] == pytest.approx([0.8] * 3, abs=1e-3)  # each layer rounds to whole connections
    assert [line[1] for line in lines] == [0.5, 0.25, 0.0]
    assert [line[2] > 0 for line in lines] == [False, True, False]  # none before the first epoch, none before the last
    assert lines[0][3] == pytest.approx(0.2, abs=1e-2)
    assert lines[0][3] < lines[1][3] == lines[2][3]


def test_checkpoint_carries_a_topology_of_exactly_that_sparsity(trained: Path) -> None:
    state = weights(trained)
    masks = {key: value for key, value in state.items() if key.endswith(".mask")}
    assert masks
    for key, mask in masks.items():
        assert int(mask.sum()) == round(0.2 * mask.numel())
        assert state[key.replace(".mask", ".weight")][~mask].abs().sum() == 0
    other = weights(trained, fold=1)
    assert any(not torch.equal(mask, other[key]) for key, mask in masks.items())


def test_model_folder_describes_the_network(trained: Path) -> None:
    plans = load_json(str(trained / "plans.json"))
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"] == "nnunetv2_e2enet.network.E2ENet"
    assert architecture["arch_kwargs"]["features_per_stage"][:3] == [8, 16, 32]
    assert architecture["arch_kwargs"]["feature_sparsity"] == 0.8
    assert architecture["arch_kwargs"]["shift_size"] == 3
    assert "PlainConvUNet" in plans["configurations"]["2d"]["architecture"]["network_class_name"]  # others are left alone


def test_prediction_and_evaluation(project: Project, trained: Path, tmp_path: Path) -> None:
    model = ["-d", "993", "-c", "3d_fullres", "-tr", "nnUNetTrainerE2ENet_smoke", "-device", "cpu", "-npp", "1", "-nps", "1"]
    images, labels = project.raw / "imagesTs", project.raw / "labelsTs"
    project.run("nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path), *model, "-f", "0")
    for image in images.glob("*.nii.gz"):
        scan = sitk.ReadImage(str(image))
        prediction = sitk.ReadImage(str(tmp_path / image.name.replace("_0000", "")))
        assert prediction.GetSize() == scan.GetSize()
        assert prediction.GetSpacing() == pytest.approx(scan.GetSpacing())
        assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= set(range(5))
    description = ["-djfile", str(trained / "dataset.json"), "-pfile", str(trained / "plans.json")]
    project.run("nnUNetv2_evaluate_folder", str(labels), str(tmp_path), *description)
    summary = load_json(str(tmp_path / "summary.json"))
    assert len(summary["metric_per_case"]) == len(list(labels.glob("*.nii.gz"))) > 0
    assert_dice_is_that_of_the_files(summary)


def test_stock_trainer_trains_the_dense_network_of_e2enet_plans(project: Project) -> None:
    project.run("e2enet", "plan", "-d", "993")
    plans = project.plans("nnUNetE2ENetPlans")
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [min(4 * 2**level, 16) for level in range(arguments["n_stages"])]
    project.write_plans("nnUNetE2ENetPlans_narrow", plans)
    project.train("nnUNetTrainer_smoke", "-p", "nnUNetE2ENetPlans_narrow")
    state = weights(project.model("nnUNetTrainer_smoke", "nnUNetE2ENetPlans_narrow"))
    masks = [value for key, value in state.items() if key.endswith(".mask")]
    assert masks
    assert all(mask.all() for mask in masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": [24, 64, 60]}, "the patch [24, 64, 60] cannot be divided by the network's strides"),
        ({"strides": [[1, 1, 1]]}, "the plans have 1 level(s), but E2ENet fuses at least 2"),
    ],
)
def test_bad_plans_end_the_command_with_one_line(project: Project, change: dict[str, Any], message: str) -> None:
    plans = project.plans()
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = change.get("patch_size", configuration["patch_size"])
    if "strides" in change:
        configuration["architecture"]["arch_kwargs"]["strides"] = change["strides"]
    project.write_plans("nnUNetBadPlans", plans)
    result = project.train("nnUNetTrainerE2ENet_smoke", "-p", "nnUNetBadPlans", check=False)
    model = project.model("nnUNetTrainerE2ENet_smoke", "nnUNetBadPlans")
    assert result.returncode == 1
    assert result.stdout.strip().splitlines()[-1].startswith(f"E2ENet: {message}")
    assert "Traceback" not in result.stdout
    assert {p.suffix for p in model.rglob("*") if p.is_file()} == {".txt"}  # nnU-Net's log
    shutil.rmtree(model)


# --- plans --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", ["nnUNetPlannerResEncM", "ResEncUNetPlanner"])
def test_resenc_plans_give_their_strides_and_e2enet_its_own_channels(in_process: Project, planner: str) -> None:
    name = f"plans_of_{planner}"
    in_process.run("nnUNetv2_plan_experiment", "-d", "993", "-pl", planner, "-overwrite_plans_name", name)
    plans = in_process.plans(name)
    given = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    trainer = make(nnUNetTrainerE2ENet, in_process, plans)
    trainer.initialize()
    network = trainer.network
    assert isinstance(network, E2ENet)
    assert network.encoder.strides == given["strides"]
    assert network.encoder.output_channels == e2enet_features(given["n_stages"])


@pytest.mark.parametrize(
    ("conv_op", "dimension"), [("torch.nn.Conv2d", 2), ("torch.nn.modules.conv.Conv3d", 3), (nn.Conv2d, 2), (nn.Conv3d, 3)]
)
def test_plans_name_the_dimension(conv_op: Any, dimension: int) -> None:
    planned = architecture([4, 8], [[1] * dimension, [2] * dimension], conv_op=conv_op)
    assert e2enet_architecture(planned)["arch_kwargs"]["conv_op"] == f"torch.nn.modules.conv.Conv{dimension}d"


@pytest.mark.parametrize("conv_op", ["torch.nn.Conv1d", "torch.nn.ConvTranspose3d", "mine.Convolution", nn.Conv1d, None, 3])
def test_plans_of_another_dimension_are_refused(conv_op: Any) -> None:
    with pytest.raises(E2ENetError, match=re.escape(f"conv_op is {conv_op!r}, but E2ENet is built of torch.nn.Conv3d or")):
        e2enet_architecture(architecture([4, 8], [[1, 1, 1], [2, 2, 2]], conv_op=conv_op))


@pytest.mark.parametrize("missing", ["strides", "conv_op"])
def test_plans_without_strides_or_dimension_are_refused(missing: str) -> None:
    planned = architecture([4, 8], [[1, 1, 1], [2, 2, 2]])
    del planned["arch_kwargs"][missing]
    with pytest.raises(E2ENetError, match=rf"^the plans' network .*PlainConvUNet has no {missing}: take plans of a U-Net"):
        e2enet_architecture(planned)


def test_two_dimensional_configuration(in_process: Project) -> None:
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process, configuration="2d")
    trainer.initialize()
    outputs = trainer.network(torch.randn(1, 1, 64, 64))
    assert outputs[0].shape == (1, 5, 64, 64)


def test_channels_of_e2enet_plans_are_kept_and_settings_are_the_trainers(in_process: Project) -> None:
    in_process.run("e2enet", "plan", "-d", "993")
    plans = in_process.plans("nnUNetE2ENetPlans")
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [5] * arguments["n_stages"]
    trainer = make(variant(nnUNetTrainerE2ENet_S90, "wide", shift_size=5, base_num_features=58), in_process, plans)
    trainer.initialize()
    log = Path(trainer.log_file).read_text()
    assert "Channels [5, 5" in log
    assert "shift_size is 5, that of nnUNetTrainerE2ENet_S90_wide; the plans have 3" in log
    assert set(trainer.network.encoder.output_channels) == {5}
    assert trainer.network.shift_size == 5
    layers = dict(maskable_layers(trainer.network))
    assert all(layer.n_active == round((1 - 0.9) * layer.n_connections) for layer in layers.values())


def test_subclasses_of_variants_override_their_settings(in_process: Project) -> None:
    class Mine(nnUNetTrainerE2ENet_S90):
        feature_sparsity = 0.85

    trainer = make(Mine, in_process)
    trainer.initialize()
    assert trainer.network.feature_sparsity == 0.85
    assert all(layer.n_active == round(0.15 * layer.n_connections) for _, layer in maskable_layers(trainer.network))


def test_a_wrong_setting_is_one_line_where_nnunet_builds_the_network() -> None:
    """As nnUNetv2_predict does, before anything else of this package runs."""
    entry = architecture([8, 16], [[1, 1, 1], [2, 2, 2]])
    code = f"""
from types import SimpleNamespace
from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet
settings = SimpleNamespace(configuration={{"architecture": {entry!r}}})
nnUNetTrainerE2ENet.build_network_architecture(None, settings, 1, 2, False)
"""
    result = run_python(code, {"nnUNet_e2enet_predictor": "foo"})
    assert result.returncode == 1
    assert result.stderr == "E2ENet: nnUNet_e2enet_predictor is 'foo': use one of on, off\n"


def test_two_levels_train_without_deep_supervision(in_process: Project) -> None:
    """nnU-Net's deep supervision would give the only output no weight, which makes its loss NaN."""
    plans = in_process.plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"] = [[1, 1, 1], [2, 2, 2]]
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process, plans)
    trainer.initialize()
    output = trainer.network(torch.randn(1, 1, 4, 8, 8))
    loss = trainer.loss(output, torch.ones(1, 1, 4, 8, 8))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_heads_are_those_that_nnunets_loss_weighs(in_process: Project, levels: int) -> None:
    """nnU-Net halves the weight from one output to the next, gives the last one none, and has a target for each."""
    plans = in_process.plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"] = [[1, 1, 1], *[[1, 2, 2]] * (levels - 1)]
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process, plans)
    trainer.initialize()
    halved = [0.5**i for i in range(levels - 2)]
    expected = [value / sum(halved) for value in halved]
    assert list(trainer.loss.weight_factors) == pytest.approx([*expected, 0])
    patch = trainer.configuration_manager.patch_size
    outputs = trainer.network(torch.randn(1, 1, *patch))
    assert len(outputs) == len(expected)
    scales = trainer._get_deep_supervision_scales()
    sizes = [[round(n * share) for n, share in zip(patch, scale, strict=True)] for scale in scales]
    targets = [torch.randint(0, 5, (1, 1, *size)).float() for size in sizes]
    each = [trainer.loss.loss(output, target) for output, target in zip(outputs, targets, strict=False)]
    assert trainer.loss(outputs, targets).item() == pytest.approx(
        sum(w * e.item() for w, e in zip(expected, each, strict=True))
    )


@pytest.mark.parametrize(
    ("trainer_class", "sparsity", "epochs"),
    [
        (trainers.nnUNetTrainerE2ENet, 0.8, 1000),
        (trainers.nnUNetTrainerE2ENet_S70, 0.7, 1000),
        (trainers.nnUNetTrainerE2ENet_S90, 0.9, 1000),
        (trainers.nnUNetTrainerE2ENet_100epochs, 0.8, 100),
        (trainers.nnUNetTrainerE2ENet_S90_250epochs, 0.9, 250),
    ],
)
def test_the_main_trainers_train_as_published(in_process: Project, trainer_class: Any, sparsity: float, epochs: int) -> None:
    trainer = make(trainer_class, in_process)
    trainer.initialize()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.feature_sparsity) == (epochs, 250, sparsity)
    updater = trainer.topology_updater
    assert updater.schedule == CosineSchedule(epochs, 5, 0.5)
    assert (updater.importance, updater.growth) == (KernelL1Norm(), RandomGrowth())
    assert all(layer.n_active == round((1 - sparsity) * layer.n_connections) for layer in updater.layers.values())
    assert trainer.network.shift_size == 3
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    settings = {"lr": 0.01, "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}
    assert settings.items() <= trainer.optimizer.param_groups[0].items()


def test_prediction_needs_no_settings(in_process: Project) -> None:
    """The plans that a training leaves behind are enough to build its network, whatever the trainer's attributes were."""
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "odd", shift_size=5, feature_sparsity=0.5), in_process)
    trainer.initialize()
    manager = PlansManager(trainer.plans_manager.plans)
    for cls in (nnUNetTrainerE2ENet, nnUNetTrainer):
        network = cls.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 5, False)
        network.load_state_dict(trainer.network.state_dict())
        trainer.set_deep_supervision_enabled(False)
        x = torch.randn(1, 1, 24, 64, 64)
        with torch.no_grad():
            assert torch.equal(network(x), trainer.network(x))


# --- topology -----------------------------------------------------------------------------------------------------------


def test_start_is_the_same_for_the_same_seed(in_process: Project) -> None:
    first, second, third = (
        make(cls, in_process)
        for cls in (nnUNetTrainerE2ENet_smoke,) * 2 + (variant(nnUNetTrainerE2ENet_smoke, "seed1", topology_seed=1),)
    )
    masks = []
    for trainer in (first, second, third):
        trainer.initialize()
        masks.append(torch.cat([layer.mask.flatten() for _, layer in maskable_layers(trainer.network)]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_interrupted_training_resumes_with_its_topology_and_schedule(in_process: Project) -> None:
    cls = variant(nnUNetTrainerE2ENet_smoke, "saved", num_epochs=6, save_every=1)

    def start() -> Any:
        trainer = make(cls, in_process)
        trainer.initialize()
        return trainer

    interrupted = start()
    train_epochs(interrupted, 2)
    saved = {key: value.clone() for key, value in interrupted.network.state_dict().items()}
    resumed = start()
    resumed.load_checkpoint(str(Path(interrupted.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 2
    assert all(torch.equal(value, saved[key]) for key, value in resumed.network.state_dict().items())
    assert resumed.topology_updater.schedule == interrupted.topology_updater.schedule
    train_epochs(resumed, 1)
    layers = dict(maskable_layers(resumed.network))
    assert all(layer.n_active == round(0.2 * layer.n_connections) for layer in layers.values())
    assert any(not torch.equal(layer.mask, saved[f"{name}.mask"]) for name, layer in layers.items())


@pytest.mark.parametrize("mode", ["off", "on"])
def test_layers_without_a_connection(in_process: Project, setting: Callable[..., None], mode: str) -> None:
    """Where rounding leaves none, none is pruned or grown, with PyTorch and with the engine."""
    setting(engine=mode)
    cls = variant(nnUNetTrainerE2ENet_smoke, "sparsest", num_epochs=4, save_every=1, feature_sparsity=0.999)
    trainer = make(cls, in_process, in_process.tiny_plans())
    trainer.initialize()
    noise = iter(lambda: batch((8, 16, 16), heads=1), None)
    train_epochs(trainer, 2, noise, noise)
    layers = dict(maskable_layers(trainer.network))
    active = {name: layer.n_active for name, layer in layers.items()}
    assert active == {name: round(0.001 * layer.n_connections) for name, layer in layers.items()}
    assert min(active.values()) == 0 < max(active.values())
    assert all(torch.isfinite(value).all() for value in trainer.network.state_dict().values())
    resumed = make(cls, in_process, in_process.tiny_plans())
    resumed.initialize()
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    train_epochs(resumed, 1, noise, noise)
    assert {name: layer.n_active for name, layer in maskable_layers(resumed.network)} == active


def finish_dataloaders(trainer: Any) -> None:
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        loader._finish()


def test_pretrained_weights_bring_their_topology(in_process: Project, trained: Path) -> None:
    checkpoint = str(trained / "fold_1" / "checkpoint_final.pth")
    trainer = make(nnUNetTrainerE2ENet_smoke, in_process)
    trainer.initialize()
    load_pretrained_weights(trainer.network, checkpoint)
    trainer.on_train_start()
    for name, layer in maskable_layers(trainer.network):
        assert torch.equal(layer.mask, weights(trained, 1)[f"{name}.mask"])
        assert torch.equal(layer.explored, layer.mask)
    finish_dataloaders(trainer)


def test_pretrained_weights_of_another_sparsity_are_refused(in_process: Project, trained: Path) -> None:
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "S60", feature_sparsity=0.6), in_process)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(trained / "fold_0" / "checkpoint_final.pth"))
    with pytest.raises(SystemExit, match=r"sparsity of 0\.800, but nnUNetTrainerE2ENet_smoke_S60 trains with 0\.6"):
        trainer.on_train_start()
    assert not list(Path(trainer.output_folder).glob("*.pth"))
    assert not (Path(trainer.output_folder_base) / "plans.json").exists()  # by which e2enet crossval would know a training


def test_every_fold_of_an_ensemble_predicts_with_its_own_topology(trained: Path) -> None:
    x = torch.randn(1, 24, 64, 64)

    def logits(*folds: int) -> torch.Tensor:
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(trained), folds)
        return predictor.predict_logits_from_preprocessed_data(x).float()

    zero, one, both = logits(0), logits(1), logits(0, 1)
    assert not torch.allclose(zero, one)
    torch.testing.assert_close(both, (zero + one) / 2, atol=2e-2, rtol=1e-2)  # nnU-Net sums in half precision


SWITCHES = ("learned_shift", "channels_last", "compute_active_only")
NUMBERS = {"initial_gain": 1.0, "topology_update_period": 5, "initial_prune_fraction": 0.5, "base_num_features": 48}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_sparsity": 1.5}, "feature_sparsity is 1.5"),
        ({"shift_size": 2}, "shift_size is 2"),
        ({"kernel_size": [1, 3]}, "kernel_size is [1, 3]"),
        ({"kernel_size": [2, 3, 3]}, "kernel_size is [2, 3, 3]"),
        ({"block_size": 0}, "block_size is 0"),
        ({"topology_update_period": 0}, "topology_update_period is 0, but it is a number of epochs"),
        ({"initial_prune_fraction": 1.2}, "initial_prune_fraction is 1.2"),
        ({"initial_prune_fraction": "half"}, "initial_prune_fraction is 'half'"),
        ({"topology_update_period": "5"}, "topology_update_period is '5'"),
        ({"topology_update_period": 2.5}, "topology_update_period is 2.5"),
        ({"initial_gain": "1"}, "initial_gain is '1'"),
        ({"initial_gain": math.nan}, "initial_gain is nan"),
        *(({name: "no"}, f"{name} is 'no', but it is a switch: use True or False") for name in SWITCHES),
        ({"channels_last": 1}, "channels_last is 1, but it is a switch: use True or False"),
        *(
            ({name: True}, f"{name} is True, but it is no switch: use a value such as {like}")
            for name, like in NUMBERS.items()
        ),
        ({"base_num_features": "48"}, "base_num_features is '48'"),
        ({"kernel_size": 3}, "kernel_size is 3"),
        ({"encoder_class": "Encoder"}, "encoder_class is 'Encoder'"),
        ({"growth": "gradient"}, "growth is 'gradient', but an object with score(layer, generator) is needed"),
        (
            {"growth": GradientGrowth},
            "growth is the class GradientGrowth, but an object with score(layer, generator) is needed: write G",
        ),
        ({"growth": KernelL1Norm()}, "growth is KernelL1Norm(), but an object with score(layer, generator) is needed"),
        ({"importance": "magnitude"}, "importance is 'magnitude', but an object with score(layer) is needed"),
        ({"schedule": "cosine"}, "schedule is 'cosine', but an object with is_update(epoch), prune_fraction(epoch) is needed"),
        ({"distribution": None}, "distribution is None, but an object with active(sparsity, layers) is needed"),
    ],
)
def test_bad_settings_end_with_one_line(in_process: Project, settings: dict[str, Any], message: str) -> None:
    trainer = make(variant(nnUNetTrainerE2ENet_smoke, "bad", **settings), in_process)
    with pytest.raises(SystemExit, match=re.escape(message)) as stop:
        trainer.initialize()
    assert str(stop.value).startswith("E2ENet: ")
    assert "\n" not in str(stop.value)


def test_unknown_settings_are_refused(in_process: Project) -> None:
    with pytest.raises(AttributeError, match="no setting featur_sparsity"):
        make(variant(nnUNetTrainerE2ENet, "typo", featur_sparsity=0.5), in_process)


def test_misspelt_settings_are_named(in_process: Project, capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(nnUNetTrainerE2ENet_smoke):
        feature_sparcity = 0.9
        base_num_features = 4
        growth_rate = 2  # of the user's own

    make(Mine, in_process).initialize()
    shown = capsys.readouterr().out
    assert "Mine has feature_sparcity, which is no setting of E2ENet: is feature_sparsity meant?" in shown
    assert shown.count("no setting") == 1
    assert "set by __init__" not in shown


def test_settings_of_nnunet_that_its_init_overwrites_are_named(
    in_process: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mine(nnUNetTrainerE2ENet_smoke):
        feature_sparsity = 0.85
        base_num_features = 4
        initial_lr = 1e-3
        save_every = 50  # as nnU-Net
        growth_rate = 2  # of the user's own

    class Later(Mine):
        feature_sparsity = 0.9
        growth_rate = 3

    make(Later, in_process).initialize()
    shown = capsys.readouterr().out
    assert "initial_lr is 0.01, set by __init__, not the 0.001 of Mine: set it in __init__" in shown
    assert shown.count("set by __init__") == 1


@pytest.mark.parametrize("name", e2enet_combined_trainers.__all__)
def test_combinations_with_nnunets_variants(in_process: Project, name: str) -> None:
    """Pruned and grown connections are clean after real epochs, whatever the optimizer keeps of them."""
    combined = getattr(e2enet_combined_trainers, name)
    small = {"base_num_features": 4, "max_num_features": 8, "topology_update_period": 1}
    trainer = make(variant(combined, "small", **small), in_process)
    trainer.initialize()
    train_epochs(trainer, 2)
    for layer in trainer.topology_updater.layers.values():
        assert layer.n_active == round(0.2 * layer.n_connections)
        assert (layer.explored & ~layer.mask).any()
        states = [v for v in trainer.optimizer.state[layer.weight].values() if v.shape == layer.weight.shape]
        assert states
        assert all(value[~layer.mask].abs().sum() == 0 for value in states)


def names_of(transforms: Any) -> set[str]:
    """Of all transforms in a pipeline of nnU-Net's data augmentation, nested ones too."""
    parts = [*getattr(transforms, "transforms", getattr(transforms, "list_of_transforms", []))]
    parts += [transforms.transform] if hasattr(transforms, "transform") else []
    return {type(transforms).__name__}.union(*map(names_of, parts))


def mirroring(trainer: Any) -> tuple[Any, Any]:
    """Axes in training and in prediction."""
    in_training = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1]
    return in_training, trainer.inference_allowed_mirroring_axes


def augmentation(trainer: Any) -> set[str]:
    patch, scales = trainer.configuration_manager.patch_size, trainer._get_deep_supervision_scales()
    return names_of(trainer.get_training_transforms(patch, (-0.5, 0.5), scales, (0, 1, 2), False))


# What each variant is about, as nnU-Net documents it; of stock nnU-Net, which all others have to leave as it is.
STOCK_MIRRORING = ((0, 1, 2), (0, 1, 2))
OF_DA5 = {"Rot90Transform", "MedianFilterTransform", "LocalGammaTransform", "SharpeningTransform", "BlankRectangleTransform"}
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "_NoMirroring": {"mirroring": (None, None)},
    "_onlyMirror01": {"mirroring": ((0, 1), (0, 1))},
    "_DA5": {"strong augmentation": True},
    "_CELoss": {"loss": RobustCrossEntropyLoss},
    "_DiceLoss": {"loss": MemoryEfficientSoftDiceLoss},
    "_Adam3en4": {"optimizer": (torch.optim.AdamW, 3e-4)},
}


def test_all_combinations_are_looked_at() -> None:
    assert {f"nnUNetTrainerE2ENet{suffix}" for suffix in CHANGES} == {"nnUNetTrainerE2ENet", *e2enet_combined_trainers.__all__}


@pytest.mark.parametrize("suffix", CHANGES)
def test_combinations_keep_what_the_variants_do(in_process: Project, suffix: str) -> None:
    """And change nothing else."""
    base = getattr(trainers, f"nnUNetTrainerE2ENet{suffix}")
    trainer = make(variant(base, "small", base_num_features=4, max_num_features=8), in_process)
    trainer.initialize()
    strong = OF_DA5 & augmentation(trainer)
    assert strong in (set(), OF_DA5)
    found = {
        "mirroring": mirroring(trainer),
        "strong augmentation": bool(strong),
        "loss": type(trainer.loss.loss),
        "optimizer": (type(trainer.optimizer), trainer.optimizer.param_groups[0]["initial_lr"]),
    }
    stock = {
        "mirroring": STOCK_MIRRORING,
        "strong augmentation": False,
        "loss": DC_and_CE_loss,
        "optimizer": (torch.optim.SGD, 1e-2),
    }
    assert found == {**stock, **CHANGES[suffix]}
    assert isinstance(trainer.network, E2ENet)
