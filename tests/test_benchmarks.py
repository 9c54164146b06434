"""The benchmarks of training and prediction run, in tiny form on the CPU, and say that this tells nothing of a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import ablations
import active_costs
import contestants
import gpu_inference
import gpu_training
import hippocampus
import numpy as np
import pytest
import starts
import torch
import training_memory
from plans import HIPPOCAMPUS
from support import AMOS_STRIDES, Project, make

from nnunetv2_e2enet.trainers.e2enet_trainers import nnUNetTrainerE2ENet_S90
from nnunetv2_e2enet.training.trainer import E2ENetMixin

DEMO = "nnunetv2_e2enet.trainers.e2enet_demo_trainers"
PLANS = "tinyPlans"
CONTESTANTS = contestants.CONTESTANTS
ITERATIONS = ["--iterations", "1", "--validation-iterations", "1"]


@pytest.fixture
def tiny(in_process: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    trainers = {contestants.BASELINE: f"{DEMO}.nnUNetTrainer_smoke", "E2ENet": f"{DEMO}.nnUNetTrainerE2ENet_smoke"}
    monkeypatch.setattr(contestants, "CONTESTANTS", trainers)
    in_process.write_plans(PLANS, in_process.tiny_plans())
    return in_process


def test_all_contestants_exist() -> None:
    classes = {name: contestants.trainer_class(name) for name in contestants.CONTESTANTS}
    assert [cls.__name__ for cls in classes.values()] == [path.split(".")[-1] for path in contestants.CONTESTANTS.values()]


def test_ablations_differ_from_what_they_are_compared_with(tiny: Project) -> None:  # noqa: ARG001
    plans, dataset = contestants.load_plans("993", PLANS)
    trainers = [
        cls({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
        for cls in (nnUNetTrainerE2ENet_S90, ablations.S90UpdateEachEpoch, ablations.S90HalfGain)
    ]
    assert [trainer.feature_sparsity for trainer in trainers] == [0.9, 0.9, 0.9]
    assert [trainer.topology_update_period for trainer in trainers] == [5, 1, 5]
    assert [trainer.initial_gain for trainer in trainers] == [1.0, 1.0, 0.5]


def test_in_bfloat16_the_loss_stays_float32(tiny: Project) -> None:
    """CPU autocast would compute its softmax in bfloat16, to nnU-Net's disadvantage."""
    trainer = make(hippocampus.in_bfloat16(contestants.trainer_class(contestants.BASELINE)), tiny, tiny.tiny_plans())
    trainer.initialize()
    maps, logits = [], []
    trainer.network.encoder.stages[0].register_forward_hook(lambda _module, _inputs, y: maps.append(y.dtype))
    loss = trainer.loss

    def seen(output: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
        logits.extend(level.dtype for level in output)
        assert not torch.is_autocast_enabled("cpu")
        return loss(output, target)  # type: ignore[no-any-return]

    trainer.loss = seen
    image = torch.randn(2, 1, 8, 16, 16)
    trainer.train_step({"data": image, "target": [torch.zeros(2, 1, 8, 16, 16), torch.zeros(2, 1, 8, 8, 8)]})
    trainer.network.eval()
    with torch.no_grad():
        trainer.network(image)
    assert maps == [torch.bfloat16, torch.float32]
    assert set(logits) == {torch.float32}


@pytest.mark.usefixtures("tiny")
def test_starts_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # in processes nnU-Net augments without a seed
    variants = [starts.METHOD, "grown connections with weights", "an update every 1,200 iterations"]
    output = tmp_path / "starts.json"
    sizes = ["--base", "8", "--maximum", "16", "--epochs", "4", "--period", "1", *ITERATIONS]
    starts.main(["993", "--plans", PLANS, "--seeds", "0", *sizes, "--output", str(output), "--variants", *variants])
    results = json.loads(output.read_text())["results"]
    assert list(results) == [f"{name} | seed 0" for name in variants]
    losses = [result["losses"] for result in results.values()]
    assert losses[0][0] == losses[1][0] == losses[2][0]  # the first update comes after the first epoch
    assert len({run[-1] for run in losses}) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert [name for name in variants if name not in printed] == []


def test_grown_connections_get_weights_of_the_start(tiny: Project) -> None:
    trainer = make(starts.StartTrainer, tiny, tiny.tiny_plans())
    trainer.initialize()
    layers = trainer.topology_updater.layers
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    update = trainer.topology_updater.update(trainer.topology_update_period, trainer.optimizer)
    starts.give_weights_to_grown(trainer)
    for change in update.layers:
        layer, before = layers[change.name], weights[change.name]
        kept = layer.mask & ~change.grown
        after = layer.weight.flatten(2).abs().sum(2)
        assert change.grown.any()
        assert torch.equal(layer.weight[kept], before[kept])
        assert torch.equal(after > 0, layer.mask)
        assert 0.3 < float(layer.weight.detach()[change.grown].std() / before.detach()[kept].std()) < 3


@pytest.mark.slow
def test_training(tiny: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    output = tmp_path / "out.json"
    command = ["-d", "993", "-p", PLANS, "--device", "cpu", "--epochs", "2", *ITERATIONS]
    command += ["--loading", "without", "--output", str(output)]
    gpu_training.main([*command, "--profile"])
    content = json.loads(output.read_text())
    assert content["machine"]["warning"] == contestants.WITHOUT_GPU
    assert contestants.WITHOUT_GPU in " ".join(capsys.readouterr().out.split())
    assert set(content["results"]) == {"nnU-Net | without", "E2ENet | without"}
    for result in content["results"].values():
        assert result["fastest_epoch_seconds"] == min(result["epoch_seconds"]) > 0
        assert len(result["epoch_seconds"]) == 2
        assert "peak_bytes_allocated" not in result
        assert any("convolution" in row["operation"] for row in result["profile"])
    before = output.read_text()
    gpu_training.main([*command, "--profile"])  # all is there
    assert output.read_text() == before
    with pytest.raises(SystemExit, match="measured with another settings"):
        gpu_training.main([*command, "--epochs", "3"])


@pytest.mark.parametrize("volume", [[], ["--volume", "8", "20", "16"]])
def test_prediction(tiny: Project, tmp_path: Path, volume: list[str]) -> None:  # noqa: ARG001
    output = tmp_path / "out.json"
    gpu_inference.main(["-d", "993", "-p", PLANS, "--device", "cpu", "--rounds", "2", "--output", str(output), *volume])
    content = json.loads(output.read_text())
    assert content["machine"]["warning"] == contestants.WITHOUT_GPU
    assert {name: len(result["seconds"]) for name, result in content["results"].items()} == {"nnU-Net": 2, "E2ENet": 2}


def test_a_profile_on_a_gpu_counts_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations and named ranges have the time of their kernels once more."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(key=key, device_type=kind, is_user_annotation=named, count=6, self_device_time_total=time)
        for key, kind, named, time in (
            ("convolution", cuda, False, 30),
            ("norm", cuda, False, 90),
            ("aten::conv3d", cpu, False, 30),
            ("Optimizer.step", cuda, True, 120),
        )
    ]

    class Profiler:
        def __init__(self, activities: list[torch.profiler.ProfilerActivity]) -> None:
            assert torch.profiler.ProfilerActivity.CUDA in activities

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def key_averages(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    trainer = MagicMock(device=torch.device("cuda"))
    assert gpu_training.profile_step(trainer) == [
        {"operation": "norm", "calls": 2, "share": 0.75},
        {"operation": "convolution", "calls": 2, "share": 0.25},
    ]
    assert trainer.train_step.call_count == 4


def test_contestants_with_channels_last(tiny: Project, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(contestants, "CONTESTANTS", CONTESTANTS)
    plans, dataset = contestants.load_plans("993", PLANS)
    assert set(contestants.SAME_RESULTS) == {name for name in CONTESTANTS if "channels last" in name}
    for name in contestants.SAME_RESULTS:
        _, network, patch = gpu_inference.build(name, plans, dataset, "3d_fullres", "cpu")
        weights = [p for p in network.parameters() if p.dim() == 5 and p.shape[1] > 1 and p[0, 0].numel() > 1]
        assert len(weights) > 5
        assert all(p.is_contiguous(memory_format=torch.channels_last_3d) and not p.is_contiguous() for p in weights)
        gpu_inference.predict(network, patch)


def test_the_amos_plan_is_nnunets(tiny: Project) -> None:
    plans = contestants.as_amos(tiny.plans(), "3d_fullres")
    settings = plans["configurations"]["3d_fullres"]
    assert settings["architecture"]["arch_kwargs"]["strides"] == AMOS_STRIDES
    assert settings["patch_size"] == [64, 160, 160]
    assert tiny.plans()["configurations"]["3d_fullres"]["patch_size"] != settings["patch_size"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_refuse(tmp_path: Path) -> None:
    for program in (gpu_training, gpu_inference):
        with pytest.raises(SystemExit, match="no CUDA device"):
            program.main(["-d", "993"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        hippocampus.main(["--folder", str(tmp_path), "--device", "cuda"])


class Killed(BaseException):
    """Nothing catches it, so that files are what a process that is killed leaves behind."""


def killed_at(epoch: int, start: Callable[[Any], None]) -> Callable[[Any], None]:
    def killed(self: Any) -> None:
        if self.current_epoch == epoch:
            raise Killed
        start(self)

    return killed


def killed_while_it_writes(_checkpoint: object, file: str) -> None:
    Path(file).write_bytes(b"a part of it")
    raise Killed


@pytest.mark.slow
def test_hippocampus_in_slices(tiny: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On phantoms in the place of the scans: a training stops in time and another is killed, then both come to an end."""
    monkeypatch.setattr(hippocampus, "HIPPOCAMPUS", tiny.dataset)
    monkeypatch.setattr(hippocampus, "PLANS", PLANS)
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        (tmp_path / name).symlink_to(tiny.folder / name)
    (tiny.preprocessed / "prepared").touch()
    command = ["--folder", str(tmp_path), "--device", "cpu", "--folds", "0", "--epochs", "2", *ITERATIONS]
    fold = tmp_path / "nnUNet_results" / tiny.dataset / f"nnUNetTrainer_smoke__{PLANS}__3d_fullres" / "fold_0"
    record = tmp_path / "hippocampus.json"

    hippocampus.main([*command, "--minutes", "0"])
    stopped = torch.load(fold / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
    assert stopped["current_epoch"] == 1
    assert not (fold / "checkpoint_final.pth").exists()
    with pytest.raises(SystemExit, match=r"hippocampus.json was measured with another settings: .* or another --folder"):
        hippocampus.main([*command, "--minutes", "0", "--seed", "1"])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed_while_it_writes)
        with pytest.raises(Killed):
            hippocampus.main([*command, "--minutes", "0"])
    hippocampus.main([*command, "--minutes", "0"])
    assert set(json.loads(record.read_text())["results"]) == {"nnU-Net | fold 0"}

    with monkeypatch.context() as patch:
        patch.setattr(E2ENetMixin, "on_train_epoch_start", killed_at(1, E2ENetMixin.on_train_epoch_start))
        with pytest.raises(Killed):
            hippocampus.main([*command, "--minutes", "30"])

    hippocampus.main([*command, "--minutes", "30"])
    results = json.loads(record.read_text())["results"]
    assert set(results) == {"nnU-Net | fold 0", "E2ENet | fold 0"}
    calls = {name: result["calls"] for name, result in results.items()}
    assert {name: [call["epoch"] for call in of] for name, of in calls.items()} == {
        "nnU-Net | fold 0": [0, 1, 1],
        "E2ENet | fold 0": [0, 1],
    }
    assert all(call["machine"]["warning"] and call["commit"] for of_fold in calls.values() for call in of_fold)
    for result in results.values():
        assert result["machine"] == result["calls"][-1]["machine"]
        assert result["epochs"] == 2
        assert np.mean(list(result["case_dice"].values())) == pytest.approx(result["dice"])
    ours, stock = results["E2ENet | fold 0"]["costs"], results["nnU-Net | fold 0"]["costs"]
    assert 0 < ours["parameters_active"] < ours["parameters_stored"]
    assert stock["parameters_active"] == stock["parameters_stored"]
    compared = json.loads((tmp_path / "comparison.json").read_text())
    assert set(compared["means"]["dice"]) == {"nnU-Net", "E2ENet"}
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.slow
def test_phantoms_with_little_and_more_data(tiny: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(hippocampus, "TRAINED_WITH", (2, 3))
    monkeypatch.setattr(hippocampus, "VALIDATED_ON", 1)
    small = ["--phantoms", "--width", "0.1", "--batch-size", "2", "--epochs", "1", *ITERATIONS, "--minutes", "30"]
    hippocampus.main(["--folder", str(tmp_path), "--device", "cpu", *small])
    record = json.loads((tmp_path / "phantoms.json").read_text())
    assert record["settings"]["phantoms"]
    assert set(record["results"]) == {f"{name} | fold {fold}" for name in ("nnU-Net", "E2ENet") for fold in (0, 1)}
    assert {tuple(result["case_dice"]) for result in record["results"].values()} == {("phantom_000.nii.gz",)}
    assert all(len(set(result["structures"])) == 15 for result in record["results"].values())
    assert all(len(dice) == 15 for result in record["results"].values() for dice in result["case_dice"].values())
    splits = json.loads((tmp_path / "nnUNet_preprocessed" / hippocampus.PHANTOMS / "splits_final.json").read_text())
    assert [len(split["train"]) for split in splits] == [2, 3]


def test_counts_become_tables() -> None:
    kept, alive, macs, state = training_memory.count(["Hippocampus"])
    stock = training_memory.Candidate(training_memory.STOCK, "Hippocampus", HIPPOCAMPUS.patch)
    assert kept.values["nnU-Net"] == [stock.kept(1) / 2**30]
    assert [table.unit for table in (kept, alive, macs, state)] == ["GiB", "GiB", "G", "GiB"]
    assert kept.bases == ["nnU-Net"]
    assert alive.rows()[1][2] == "1.00"
    assert macs.values["E2ENet, recompute nodes"] > macs.values["E2ENet, recompute none"]


def test_active_costs_follow_the_sparsity() -> None:
    parameters, forward, fusion, dense = active_costs.count((0.0, 0.9))
    assert parameters.rows()[1:] == [
        ["nnU-Net", "31.12", "1.00"],
        ["E2ENet, S = 0", "23.81", "0.76"],
        ["E2ENet, S = 0.9", "7.629", "0.25"],
    ]
    for name in ("E2ENet, S = 0", "E2ENet, S = 0.9"):
        assert fusion.values[name][0] + dense.values[name][0] == pytest.approx(forward.values[name][0])
    (all_of_it,), (tenth,) = fusion.values.values()
    assert tenth == pytest.approx(0.1 * all_of_it, rel=1e-2)
