"""ONNX files give PyTorch's logits in another runtime."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Project, untrained_model

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.cli.main import main
from nnunetv2_e2enet.deployment import pack_model
from nnunetv2_e2enet.deployment.onnx import write_onnx

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def largest_difference(file: Path, network: torch.nn.Module, shape: list[int]) -> tuple[float, float]:
    """Between onnxruntime and PyTorch, and between PyTorch's float32 and float64; relative to the largest logit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), engine.disabled():
        expected = network(x).numpy()
        exact = copy.deepcopy(network).double()(x.double()).numpy()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": x.numpy()})
    assert logits.shape == expected.shape
    largest = np.abs(exact).max()
    return float(np.abs(logits - expected).max() / largest), float(np.abs(expected - exact).max() / largest)


@pytest.mark.parametrize(
    ("configuration", "settings"),
    [("3d_fullres", {"shift_size": 5, "previous_stage": "3d_lowres"}), ("2d", {})],
    ids=["3d, second stage", "2d"],
)
def test_logits_are_pytorchs(project: Project, tmp_path: Path, configuration: str, settings: dict[str, Any]) -> None:
    model, network = untrained_model(project, configuration, **settings)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    write_onnx(tmp_path / "onnx", model)
    file = tmp_path / "onnx" / "fold_0.onnx"
    facts = json.loads((tmp_path / "onnx" / "model.json").read_text())["input"]
    assert facts.get("previous_stage") == settings.get("previous_stage")
    assert facts.get("masks_of_labels", []) == ([1, 2, 3, 4] if "previous_stage" in settings else [])
    channels = len(facts["channel_names"]) + len(facts.get("masks_of_labels", []))
    for batch in (1, 2):
        difference, rounding = largest_difference(file, network, [batch, channels, *facts["patch_size"]])
        assert difference < max(1e-4, 10 * rounding)  # norms of a few voxels multiply what float32 rounds
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    operations = {node.op_type for node in onnx.load(file).graph.node}
    plain = {"Concat", "Conv", "ConvTranspose", "InstanceNormalization", "LeakyRelu", "MaxPool", "Pad", "ReduceMean", "Slice"}
    assert operations <= plain | {"Expand", "Shape", "Split", "Sub"}


def test_export_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "onnx"
    arguments = ["export", str(trained), str(folder), "--onnx", "-f", "1"]
    assert main(arguments) == 0
    assert {path.name for path in folder.iterdir()} == {"fold_1.onnx", "model.json"}
    facts = json.loads((folder / "model.json").read_text())
    assert facts["input"]["patch_size"] == [24, 64, 64]
    assert facts["output"]["labels"]["lesion"] == 4
    assert facts["preprocessing"]["normalization_schemes"] == ["ZScoreNormalization"]
    model = pack_model(trained, ["1"])
    network = model.description.network().to_empty(device="cpu")
    network.load_state_dict(next(model.states()))
    difference, _ = largest_difference(folder / facts["files"]["1"], network, [1, 1, 24, 64, 64])
    assert difference < 1e-4
    capsys.readouterr()
    assert main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
