"""`e2enet profile`: counts against the published network, measurements that are plausible, the command."""

from __future__ import annotations

import json
import math
import resource
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from support import AMOS_STRIDES, Project, architecture
from torch import nn
from training_memory import LiveBytes, forward_backward

from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.deployment.packed import serialized
from nnunetv2_e2enet.evaluation import memory, profile
from nnunetv2_e2enet.evaluation.costs import breakdown, count_costs
from nnunetv2_e2enet.evaluation.memory import peak_bytes
from nnunetv2_e2enet.evaluation.networks import Design, e2enet_variant, residual_encoder_variant
from nnunetv2_e2enet.evaluation.profile import ProfileSettings, time_in_turns
from nnunetv2_e2enet.settings import override

AMOS_PATCH = [64, 160, 160]


def plans_of(strides: list[list[int]], patch: list[int], base: int = 32) -> dict[str, Any]:
    """Plans as nnU-Net writes them, with what building a network needs."""
    entry = architecture([min(base * 2**i, 320) for i in range(len(strides))], strides)
    configuration = {"patch_size": patch, "batch_size": 2, "architecture": entry}
    return {"plans_name": "nnUNetPlans", "label_manager": "LabelManager", "configurations": {"3d_fullres": configuration}}


def dataset_of(classes: int) -> dict[str, Any]:
    labels = {"background": 0, **{f"organ {i}": i for i in range(1, classes)}}
    return {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}


@pytest.fixture(scope="module")
def small() -> Design:
    return Design("nnU-Net", "test", plans_of(AMOS_STRIDES[1:4], [8, 16, 16], base=8), dataset_of(3), "3d_fullres")


def test_counts_are_the_published_ones() -> None:
    stock = Design("nnU-Net", "AMOS", plans_of(AMOS_STRIDES, AMOS_PATCH), dataset_of(16), "3d_fullres")
    with torch.device("meta"):
        nnunet, resenc = stock.build(), residual_encoder_variant(stock).build()
    for network, parameters, macs in ((nnunet, 31_124_368, 438.60e9), (resenc, 102_278_544, 813.87e9)):
        costs = count_costs(network, stock.input_shape())
        assert costs.parameters_stored == costs.parameters_active == parameters
        assert costs.macs_dense == costs.macs_active == costs.macs_executed == pytest.approx(macs, rel=2e-5)
    for sparsity, parameters, macs in ((0, 23.807e6, 1134.41e9), (0.7, 11.224e6, 427.3e9), (0.9, 7.629e6, 225.3e9)):
        # those of E2ENet were counted with the outputs of deep supervision
        costs = count_costs(e2enet_variant(stock, sparsity).build(deep_supervision=True), stock.input_shape())
        assert costs.parameters_stored == 23_806_928
        assert costs.parameters_active == pytest.approx(parameters, rel=1e-4)
        assert costs.macs_active == pytest.approx(macs, rel=1e-3)
        assert costs.macs_dense == costs.macs_executed == pytest.approx(1134.41e9, rel=1e-5)


def test_levels_and_flows_add_up(small: Design) -> None:
    for design in (small, e2enet_variant(small, 0.8), residual_encoder_variant(small)):
        network = design.build()
        costs, shares = count_costs(network, design.input_shape()), breakdown(network, design.input_shape())
        assert set(shares["level"]) == {0, 1, 2}
        for field in ("parameters_stored", "parameters_active", "macs_dense", "macs_active"):
            assert shares[field].sum() == getattr(costs, field)
    flows = breakdown(e2enet_variant(small, 0.8).build(), small.input_shape())["flow"]
    assert set(flows) == {"encoder", "forward", "upward", "downward", "second block", "head", "norm, bias"}


def test_counting_leaves_the_network_as_it_was(small: Design) -> None:
    for design in (small, residual_encoder_variant(small)):
        network = design.build()
        count_costs(network, design.input_shape())
        assert not any(p.is_meta for p in network.parameters())
        network(torch.zeros(small.input_shape()))


def test_networks_are_timed_in_turns() -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(f"{self.name}{len(x.shape)}")
            return x

    shapes = {"a": (1, 1, 4), "b": (1, 4)}
    seconds = time_in_turns({name: Named(name) for name in shapes}, shapes, ProfileSettings(rounds=3))
    assert calls == ["a3", "b2"] * 4
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


class Greedy(nn.Module):
    """A network that takes more memory than there is from its second pass on."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes > 1:
            raise self.error
        return x


def test_a_network_that_does_not_fit_leaves_the_others_their_turns() -> None:
    greedy = Greedy(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    networks = {"a": nn.Identity(), "greedy": greedy, "b": nn.Identity()}
    seconds = time_in_turns(networks, dict.fromkeys(networks, (1, 4)), ProfileSettings(rounds=3))
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}
    assert greedy.passes == 2
    with pytest.raises(RuntimeError, match="no kernel"):
        time_in_turns({"other": Greedy(RuntimeError("no kernel"))}, {"other": (1, 4)}, ProfileSettings(rounds=3))


def test_what_does_not_fit_into_memory_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image of 2^48 voxels, which no machine holds; what was counted is kept."""
    monkeypatch.setattr(profile, "free_bytes", lambda: math.inf)
    plans = tmp_path / "nnUNetPlans.json"
    plans.write_text(json.dumps(plans_of(AMOS_STRIDES[1:4], [2**16] * 3, base=8)))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_of(3)))
    output = tmp_path / "out.json"
    command = ["profile", str(plans), "--beside", "nnunet", "--rounds", "1", "--threads", "1", "--json", str(output)]
    assert main(command) == 0
    (found,) = json.loads(output.read_text())["profiles"]
    ended = "ran out of memory, or was ended from outside"
    assert found["note"] == f"a training step {ended}; a prediction {ended}; a timed pass ran out of memory"
    assert (found["training_bytes"], found["prediction_bytes"], found["seconds"]) == (None, None, [])
    assert found["costs"]["macs_active"] > 0
    assert f"nnU-Net: {found['note']}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("regions", [False, True])
def test_loss_is_that_of_nnunet(small: Design, regions: bool) -> None:
    dataset = dataset_of(3)
    if regions:
        dataset |= {"labels": {"background": 0, "both": [1, 2], "organ 2": [2]}, "regions_class_order": [1, 2]}
    design = replace(small, dataset=dataset)
    trainer = SimpleNamespace(
        label_manager=SimpleNamespace(has_regions=regions, ignore_label=None),
        configuration_manager=SimpleNamespace(batch_dice=True),
        is_ddp=False,
        enable_deep_supervision=True,
        _do_i_compile=lambda: False,
        _get_deep_supervision_scales=lambda: [[1, 1, 1], [1, 0.5, 0.5]],
    )
    ours, theirs = memory.nnunet_loss(design), nnUNetTrainer._build_loss(trainer)
    outputs = [torch.randn(2, design.outputs, 2, size, size) for size in (8, 4)]
    targets = [torch.randint(2, (2, 2 if regions else 1, 2, size, size)).float() for size in (8, 4)]
    assert ours(outputs, targets) == theirs(outputs, targets) == theirs(outputs[:1], targets[:1])
    memory._training_step(design, 1, "cpu")()


def test_peak_memory_is_measured() -> None:
    larger = Design("nnU-Net", "test", plans_of(AMOS_STRIDES[1:4], [32, 64, 64]), dataset_of(3), "3d_fullres")
    with torch.device("meta"):
        network, x = larger.build(deep_supervision=True).to("meta"), torch.empty(larger.input_shape(4))
    with LiveBytes() as live:
        forward_backward(network, x)
    # of what is not counted, momentum, the loss and the workspaces of convolutions are less than all maps and gradients
    assert live.peak < peak_bytes(larger, True, 4, "cpu", 1) < 2 * live.peak


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        ([900, 1500], 1100.0),  # above the 400 that the process holds now, not above the 900 of its imports
        ([900, 900], math.nan),  # the network took up to 500, and nobody knows how much
        ([400, 400], 0.0),
    ],
)
def test_peak_on_macos_is_above_what_the_process_holds(
    peaks: list[int], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the peak is that of the whole life of the process, in bytes, and ``ps`` knows what it holds now, in KiB."""
    commands = []

    def ps(command: list[str], **_: Any) -> Any:
        commands.append(command[0])
        return SimpleNamespace(stdout="  400\n")

    lifetime = iter(1024 * peak for peak in peaks)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "nowhere")
    monkeypatch.setattr(subprocess, "run", ps)
    monkeypatch.setattr(resource, "getrusage", lambda _who: SimpleNamespace(ru_maxrss=next(lifetime)))
    assert memory.peak_above_now(lambda: None) == pytest.approx(1024 * expected, nan_ok=True)
    assert commands == ["ps"]


def test_the_command_on_a_plans_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plans = tmp_path / "nnUNetPlans.json"
    plans.write_text(json.dumps(plans_of(AMOS_STRIDES[1:4], [8, 16, 16], base=8)))
    command = ["profile", str(plans), "--no-memory", "--rounds", "2", "--sparsity", "0.5", "--threads", "1"]
    assert main(command) == 1
    assert "--dataset-json" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_of(3)))
    assert main([*command, "--flows", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in content["profiles"]] == ["E2ENet S=0.5", "nnU-Net", "ResEnc M/L"]
    ours = content["profiles"][0]
    assert ours["costs"]["macs_active"] < ours["costs"]["macs_dense"] == ours["costs"]["macs_executed"]
    assert len(ours["seconds"]) == 2
    assert ours["latency_seconds"]["median"] > 0
    assert ours["training_bytes"] is None
    assert ours["shares"]
    assert content["settings"]["threads"] == 1
    assert main([*command, "--levels", "--no-time"]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    shown = " ".join(printed.split())
    assert "PyTorch multiplies masked weights like any others" in shown
    assert "costs by level" in shown
    assert "E2ENet S=0.5: prediction and training in PyTorch: the network is small" in shown
    with override(engine="on"):
        assert main([*command, "--no-time"]) == 0
    assert "in PyTorch:" not in capsys.readouterr().out
    with override(engine="on"):
        assert main([*command, "--no-time", "--dtype", "bfloat16"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "E2ENet S=0.5: prediction in PyTorch: the engine computes in float32 on a CPU, not in bfloat16 on cpu." in shown


def test_the_command_measures_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training step of the batch that is asked for, and a prediction; no training step that the memory would not hold."""
    plans = tmp_path / "nnUNetPlans.json"
    plans.write_text(json.dumps(plans_of(AMOS_STRIDES[1:4], [16, 64, 64])))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_of(3)))
    command = ["profile", str(plans), "--beside", "e2enet", "--sparsity", "0.8", "--batch-size", "1"]
    command += ["--no-time", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    (measured,) = json.loads(capsys.readouterr().out)["profiles"]
    assert (measured["batch_size"], measured["note"], measured["seconds"]) == (1, "", [])
    assert measured["kept_bytes"] < measured["training_bytes"]
    assert 0 < measured["prediction_bytes"] < measured["training_bytes"]

    asked = []

    def peak(_design: Design, training: bool, batch_size: int, *_: Any) -> float:
        asked.append((training, batch_size))
        return 3.0 * 2**30

    monkeypatch.setattr(memory, "peak_bytes", peak)
    monkeypatch.setattr(profile, "free_bytes", lambda: 1.0)
    output = tmp_path / "out.json"
    assert main([*command, "--json", str(output)]) == 0
    (refused,) = json.loads(output.read_text())["profiles"]
    assert asked == [(False, 1)]
    assert (refused["training_bytes"], refused["prediction_bytes"]) == (None, 3 * 2**30)
    needed = measured["kept_bytes"] + memory.BYTES_PER_PARAMETER * measured["costs"]["parameters_stored"]
    note = f"a training step needs {needed / 2**30:.1f} GiB or more, 0.0 GiB are free: not run"
    assert refused["note"] == note
    assert note in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none_such"], "is no model folder"),
        (["PLANS", "-c", "2d"], "no configuration 2d"),
        (["PLANS", "--trainer", "nnUNetTrainerNone"], "nnU-Net finds no trainer nnUNetTrainerNone"),
        (["PLANS", "--rounds", "0"], "at least 1"),
        (["PLANS", "--sparsity", "1"], "feature_sparsity is 1"),
        (["PLANS", "--sparsity", "0.5", "--beside", "nnunet"], "--sparsity is of E2ENets that are built from plans"),
        (
            ["PLANS", "--trainer", "nnUNetTrainer", "--beside", "nnunet"],
            "--trainer nnUNetTrainer and --beside nnunet both say",
        ),
        (["MODEL", "-c", "2d"], "-c 2d is for plans files and data sets, and here are model folders alone"),
        (["MODEL", "--trainer", "nnUNetTrainer"], "--trainer nnUNetTrainer is for plans files"),
        (["MODEL", "--dataset-json", "dataset.json"], "--dataset-json dataset.json is for plans files"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = tmp_path / "nnUNetPlans.json"
    plans.write_text(json.dumps(plans_of(AMOS_STRIDES[1:4], [8, 16, 16], base=8)))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_of(3)))
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(plans.read_text())
    subjects = {"PLANS": str(plans), "MODEL": str(model)}
    assert main(["profile", *(subjects.get(a, a) for a in arguments), "--no-memory", "--no-time"]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_data_set_and_model_folder(
    trained: Path, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**project.environment, "nnUNet_n_proc_DA": "0"}.items():
        monkeypatch.setenv(name, value)
    counts_alone = ["--no-memory", "--no-time", "--json", "--sparsity", "0.8"]
    before = sorted(project.preprocessed.iterdir())
    assert main(["profile", "993", str(trained), *counts_alone]) == 0
    profiles = {p["name"]: p for p in json.loads(capsys.readouterr().out)["profiles"]}
    assert list(profiles) == ["E2ENet S=0.8", "nnU-Net", "ResEnc M", "ResEnc L", "E2ENet_smoke"]
    assert profiles["E2ENet_smoke"]["architecture"] == "E2ENet"
    assert profiles["ResEnc L"]["architecture"] == "ResidualEncoderUNet"
    assert sorted(project.preprocessed.iterdir()) == before
    assert main(["profile", "993", str(trained), *counts_alone[:3], "--beside", "nnunet"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)["profiles"]] == ["nnU-Net", "E2ENet_smoke"]


def test_networks_of_two_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plans of one name: all networks are listed, by their data set. Plans that nothing tells apart are refused."""
    files = []
    for number, patch in ((1, [8, 16, 16]), (2, [16, 32, 32])):
        folder = tmp_path / f"Dataset00{number}_x"
        folder.mkdir()
        files.append(folder / "nnUNetPlans.json")
        plans = {**plans_of(AMOS_STRIDES[1:4], patch, base=8), "dataset_name": folder.name}
        files[-1].write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset_of(3)))
    options = ["--no-memory", "--no-time", "--json", "--beside", "nnunet"]
    assert main(["profile", *map(str, [*files, files[0]]), *options]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert {p["name"]: p["patch_size"] for p in profiles} == {
        "nnU-Net (Dataset001_x, nnUNetPlans, 3d_fullres)": [8, 16, 16],
        "nnU-Net (Dataset002_x, nnUNetPlans, 3d_fullres)": [16, 32, 32],
    }
    files[1].write_text(files[1].read_text().replace("Dataset002_x", "Dataset001_x"))
    assert main(["profile", *map(str, files), *options]) == 1
    assert "two networks are nnU-Net (Dataset001_x, nnUNetPlans, 3d_fullres)" in capsys.readouterr().err


def test_what_a_model_folder_does_not_tell(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that would change nothing are refused; E2ENet in other sparsities is built from its plans."""
    command = ["profile", str(trained), "--no-memory", "--no-time"]
    origin = f"{trained.parent.name}, {trained.name}, fold_0"
    for options, message in (
        (
            ["--beside", "nnunet"],
            f"--beside nnunet: the plans of {origin} describe E2ENet alone; leave it out, or name",
        ),
        (["--beside", "e2enet", "resenc"], f"--beside resenc: the plans of {origin} describe"),
        (["--sparsity", "0.5"], "and here is none: add --beside e2enet without --trainer"),
    ):
        assert main([*command, *options]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main([*command, "--beside", "e2enet", "--sparsity", "0.5"]) == 0
    assert "E2ENet S=0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--beside"])
    assert "--beside: expected at least one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda plans, _: plans["configurations"]["3d_fullres"].update(patch_size=[8, 18, 16]), "nnU-Net cannot be built"),
        (lambda plans, _: plans["configurations"]["3d_fullres"].pop("patch_size"), "nnU-Net cannot be built"),
        (lambda plans, _: plans["configurations"]["3d_fullres"].update(inherits_from="none"), "plans cannot be described"),
        (lambda _, dataset: dataset.pop("labels"), "nnU-Net cannot be built"),
        (lambda _, dataset: dataset.pop("channel_names"), "nnU-Net cannot be built"),
        (
            lambda plans, _: plans["configurations"]["3d_fullres"]["architecture"].update(network_class_name="none.Such"),
            "nnU-Net cannot be built",
        ),
    ],
)
def test_networks_that_cannot_be_built_are_one_line(
    edit: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans, dataset = plans_of(AMOS_STRIDES[1:4], [8, 16, 16], base=8), dataset_of(3)
    edit(plans, dataset)
    file = tmp_path / "nnUNetPlans.json"
    file.write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    assert main(["profile", str(file), "--beside", "nnunet", "--no-memory", "--no-time"]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_packed_model_is_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.e2enet"
    file.write_bytes(serialized({}, {}))
    assert main(["profile", str(file)]) == 1
    assert capsys.readouterr().err == (
        f"e2enet profile: {file} is a packed model: give the model folder that it was made of, or its plans.json\n"
    )


def test_executed_by_the_engine_is_what_its_winograd_convolutions_multiply() -> None:
    """On sizes that tiles divide, convolutions at stride 1 take a quarter of their active multiply-accumulates."""
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    small = Design("nnU-Net", "test", plans_of(strides, [4, 32, 32], base=8), dataset_of(3), "3d_fullres")
    network = e2enet_variant(small, 0.8).build()
    voxels = [4 * 32 * 32, 4 * 16 * 16, 2 * 8 * 8]
    encoder = [(level, block.conv) for level, stage in enumerate(network.encoder.stages) for block in stage]
    fusion = [
        (level, block.conv) for nodes in network.decoder.stages for level, node in enumerate(nodes) for block in node.blocks
    ]
    at_stride_1 = sum(
        int(conv.weight.count_nonzero()) * voxels[level] for level, conv in encoder + fusion if max(conv.stride) == 1
    )
    costs = count_costs(network, small.input_shape(), by_engine=True)
    assert costs.macs_executed == costs.macs_active - at_stride_1 * 3 // 4
    assert count_costs(network, small.input_shape()).macs_executed == costs.macs_dense
