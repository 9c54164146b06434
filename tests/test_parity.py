"""The network and the engine compute what an independent implementation in NumPy does, on cases that lie in ``parity/``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from parity.reference import CASES, FOLDER, Case, arrays_of, e2enet, random_weights
from torch import nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet, accounts, maskable_layers
from nnunetv2_e2enet.network.reference import load_reference_weights
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


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_network_is_that_of_the_reference(data: st.DataObject) -> None:
    """In float64, two samples at a time: any levels, widths, strides, shifts and topologies."""
    dimension, levels = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(2, 5))
    stride = st.lists(st.sampled_from([1, 2]), min_size=dimension, max_size=dimension)
    strides = [[1] * dimension, *(data.draw(stride) for _ in range(levels - 1))]
    coarsest = data.draw(st.sampled_from([[1, 1, 2], [1, 3, 1], [2, 2, 1]]))[-dimension:]  # not of one voxel
    case = Case(
        input_channels=data.draw(st.integers(1, 6)),
        classes=data.draw(st.integers(2, 3)),
        features=data.draw(st.lists(st.integers(1, 8), min_size=levels, max_size=levels)),
        strides=strides,
        shift_size=data.draw(st.sampled_from([1, 3, 5, 7])),
        patch_size=[int(n) for n in np.prod([*strides, coarsest], axis=0)],
        density=data.draw(st.sampled_from([1.0, 0.5, 0.1])),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = random_weights(case, rng)
    network = network_of(case, dict(weights)).double()
    x = rng.normal(0, 1, (2, case.input_channels, *case.patch_size))
    with torch.inference_mode():
        found = network(torch.from_numpy(x))
    assert len(found) == case.heads
    for sample, image in enumerate(x):
        for logits, expected in zip(found, e2enet(image, weights, case), strict=True):
            np.testing.assert_allclose(logits[sample], expected, rtol=0, atol=1e-6 * (1 + np.abs(expected).max()))


@pytest.fixture(params=["off", "on"])
def published(request: pytest.FixtureRequest, shared: Path) -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Configurations and arrays of the released network, which are not part of the repository; with the engine and without."""
    files = sorted((shared / "parity").glob("*.json"))
    assert files
    with override(engine=request.param):
        if request.param == "on" and not engine.status().used:
            pytest.skip(engine.status().reason)
        yield [(json.loads(file.read_text()), dict(np.load(file.with_suffix(".npz")))) for file in files]


def case_of(configuration: dict[str, Any]) -> Case:
    names = ("input_channels", "strides", "shift_size", "patch_size")
    given = {name: configuration[name] for name in names}
    return Case(**given, classes=configuration["num_classes"], features=configuration["features_per_stage"], density=1.0)


def test_logits_are_those_of_the_published_network(published: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for configuration, arrays in published:
        network = network_of(case_of(configuration), arrays)
        counts = accounts.parameter_counts(network)
        assert (counts.total, counts.maskable) == (configuration["total_parameters"], configuration["maskable_parameters"])
        for sample, x in enumerate(arrays["x"]):
            for level, logits in enumerate(logits_of(network, x)):
                expected = arrays[f"logits.level{level}"][sample]
                np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_the_reference_computes_what_the_published_network_does(shared: Path) -> None:
    files = sorted((shared / "parity").glob("*.json"))
    assert files
    for file in files:
        case, arrays = case_of(json.loads(file.read_text())), np.load(file.with_suffix(".npz"))
        weights = {key: arrays[key].astype(np.float64) for key in arrays if key.endswith((".weight", ".bias"))}
        for sample, x in enumerate(arrays["x"]):
            for level, logits in enumerate(e2enet(x.astype(np.float64), weights, case)):
                np.testing.assert_allclose(logits, arrays[f"logits.level{level}"][sample], rtol=0, atol=TOLERANCE)
