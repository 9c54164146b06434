"""The network and the engine compute what an independent implementation in NumPy does, on cases that lie in ``parity/``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity.reference import CASES, FOLDER, Case, arrays_of, e2enet
from parity.weights import load_reference_weights
from torch import nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet, maskable_layers
from nnunetv2_e2enet.settings import override

TOLERANCE = 1e-4


def stored(name: str) -> tuple[Case, dict[str, NDArray[np.generic]]]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return Case(**json.loads(str(arrays.pop("configuration")))), arrays


def network_of(case: Case, arrays: dict[str, NDArray[np.generic]]) -> E2ENet:
    network = E2ENet(
        case.input_channels,
        case.classes,
        case.levels,
        case.features,
        nn.Conv3d if len(case.patch_size) == 3 else nn.Conv2d,
        case.strides,
        deep_supervision=True,
        shift_size=case.shift_size,
    )
    load_reference_weights(network, arrays)
    return network.eval()


def logits_of(network: E2ENet, x: NDArray[np.generic]) -> list[NDArray[np.float32]]:
    with torch.inference_mode():
        return [level[0].numpy() for level in network(torch.from_numpy(x.astype(np.float32))[None])]


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference(name: str, mode: str) -> None:
    """To 1e-4, with PyTorch and with the CPU engine, where there is one."""
    with override(engine=mode):
        if mode == "on" and not engine.status().used:
            pytest.skip(engine.status().reason)
        case, arrays = stored(name)
        network = network_of(case, arrays)
        logits = logits_of(network, arrays["x"])
        assert (engine.why_pytorch(network) is None) == (mode == "on")
    assert len(logits) == case.heads
    for level, found in enumerate(logits):
        expected = arrays[f"logits.level{level}"]
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_inactive_connections_are_those_of_the_reference(name: str) -> None:
    case, arrays = stored(name)
    masks = [layer.mask for _, layer in maskable_layers(network_of(case, arrays))]
    density = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert density == pytest.approx(case.density, abs=0.1)


@pytest.mark.parametrize("name", CASES)
def test_the_stored_cases_are_what_the_script_writes(name: str) -> None:
    case, arrays = stored(name)
    written = arrays_of(name)
    assert case == CASES[name]
    assert written.keys() - {"configuration"} == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_allclose(value.astype(float), written[key].astype(float), rtol=0, atol=1e-6)


def test_the_stored_cases_are_small() -> None:
    assert sum(file.stat().st_size for file in Path(FOLDER).glob("*.npz")) < 100_000


def test_the_reference_computes_what_the_published_network_does(shared: Path) -> None:
    """The released network's own weights and logits, which are not part of the repository."""
    config = json.loads((shared / "parity" / "forward_a.json").read_text())
    arrays = np.load(shared / "parity" / "forward_a.npz")
    weights = {key: arrays[key].astype(np.float64) for key in arrays if key.endswith((".weight", ".bias"))}
    case = Case(
        config["input_channels"],
        config["num_classes"],
        config["features_per_stage"],
        config["strides"],
        config["shift_size"],
        config["patch_size"],
        density=1.0,
    )
    for level, logits in enumerate(e2enet(arrays["x"][0].astype(np.float64), weights, case)):
        np.testing.assert_allclose(logits, arrays[f"logits.level{level}"][0], rtol=0, atol=TOLERANCE)
