"""Training on the CPU engine with maps in float16: gradients close to PyTorch's, at any scale of weights, in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import random_network
from torch import Tensor, nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine import training_weights
from nnunetv2_e2enet.engine.training import training_session_of
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.settings import override

STORAGE = "float16"
KERNELS = [name for name in engine.KERNELS if not isinstance(engine.load_core(name, STORAGE), str)]
pytestmark = pytest.mark.skipif(not KERNELS, reason="the compiled core was not built")


@pytest.fixture(scope="module", autouse=True)
def on_small_networks_too() -> Iterator[None]:
    with override(engine="on", engine_storage=STORAGE):
        yield


def make_network(*shape: Any, **options: Any) -> E2ENet:
    return random_network(*shape, **{"deep_supervision": True, "features": [12, 24, 40], **options}).train()


def image(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(1))


def away_from_kinks(network: E2ENet) -> E2ENet:
    """Activations are far from zero, where rounding would make the gradient of a pixel jump."""
    for module in network.modules():
        if isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
            nn.init.uniform_(module.weight, 0.1, 0.3)
            nn.init.uniform_(module.bias, 1.5, 2.5)
    return network


def gradients(network: E2ENet, x: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of all logits."""
    network.zero_grad()
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros(())
    for level in network(x):
        loss = loss + (level * torch.randn(level.shape, generator=generator)).sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def pytorchs(network: E2ENet, x: Tensor) -> dict[str, Tensor]:
    with engine.disabled():
        return gradients(network, x)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters: the norm of the difference, as a share of the norm."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if not name.endswith("conv.bias")]  # which the norm removes again
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in names)


def error_of(network: E2ENet, x: Tensor) -> float:
    found = gradients(network, x)
    assert engine.why_pytorch(network) is None
    return largest_error(found, pytorchs(network, x))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_gradients_are_near_pytorchs(kernels: str, sparsity: float) -> None:
    network = away_from_kinks(make_network(feature_sparsity=sparsity))
    with override(engine_kernels=kernels):
        assert 1e-4 < error_of(network, image(8, 32, 32, batch=2)) < 3e-2


def test_gradients_are_no_further_off_than_those_of_autocast() -> None:
    """In float16, as nnU-Net trains on GPUs: near kinks, rounding is felt in both."""
    network, x = make_network(), image(8, 32, 32, batch=2)
    expected = pytorchs(network, x)
    with torch.autocast("cpu", torch.float16):
        autocast = largest_error(pytorchs(network, x), expected)
    assert largest_error(gradients(network, x), expected) < 1.1 * autocast


@pytest.mark.parametrize("strides", [[[1, 1, 1], [2, 2, 2], [2, 2, 2]], [[1, 1], [2, 2], [2, 2]]])
def test_odd_sizes_strides_in_depth_and_planes(strides: list[list[int]]) -> None:
    network = away_from_kinks(make_network(strides))
    assert error_of(network, image(*[12, 20, 36][-len(strides[0]) :])) < 1e-2


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_units_keep_maps_in_range(scale: float) -> None:
    """Whatever the size of weights and images, which the norms remove again."""
    network = away_from_kinks(make_network())
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            module.eps = 1e-20
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 2 and "seg_layers" not in name:
                parameter.mul_(scale)
    assert error_of(network, scale * image(8, 32, 32)) < 1e-2


def test_a_shared_weight_stays_with_pytorch() -> None:
    network = make_network(features=[8, 8, 8])
    first, second = (network.encoder.stages[level][1].conv for level in (0, 1))
    second.weight = first.weight
    assert "share a weight" in str(engine.why_not_trained(network, (1, 1, 8, 32, 32)))
    network(image(8, 32, 32))
    assert "share a weight" in str(engine.why_pytorch(network))
    with override(engine_storage="float32"):
        network(image(8, 32, 32))
    assert engine.why_pytorch(network) is None


@pytest.mark.parametrize("blocks", [1, 3])
def test_images_of_any_scale_in_a_batch_norms_without_weights_and_graphs_that_wait(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_weights, "PASSES", 1)
    torch.manual_seed(0)
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    options = {"n_conv_per_stage": blocks, "norm_op_kwargs": {"eps": 1e-5, "affine": False}, "deep_supervision": True}
    network = E2ENet(1, 3, 3, [8, 12, 16], nn.Conv3d, strides, **options).train()
    x = image(8, 32, 32, batch=2)
    batches = [x * torch.tensor([1.0, 300.0]).reshape(2, 1, 1, 1, 1), x.flip(-1)]

    def losses() -> Tensor:
        both = [network(batch)[0] for batch in batches]  # two forward passes, then their backward passes
        return sum((logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum() for logits in both)

    losses().backward()
    assert engine.why_pytorch(network) is None
    ours = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    with engine.disabled():
        losses().backward()
    theirs = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    with engine.disabled(), torch.autocast("cpu", torch.float16):
        network.zero_grad()
        losses().backward()
    autocast = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert largest_error(ours, theirs) < 1.1 * largest_error(autocast, theirs)


def test_memory_of_maps_is_halved() -> None:
    network = make_network()
    x = image(16, 64, 64)
    n_bytes = []
    for storage in ("float32", STORAGE):
        with override(engine_storage=storage):
            gradients(network, x)
            (program,) = training_session_of(network).idle_programs()
        n_bytes.append(program.n_bytes)
    assert n_bytes[1] < 0.75 * n_bytes[0]


def test_units_follow_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_weights, "PASSES", 2)
    network = away_from_kinks(make_network(features=[8, 12, 16]))
    x = image(8, 16, 16)
    for _ in range(12):
        assert error_of(network, x) < 1e-2
        with torch.no_grad():
            network.encoder.stages[0][0].conv.weight.mul_(4)  # 2^24 at last: out of float16's range in the first unit


def test_a_training_ends_as_with_maps_in_float32() -> None:
    def losses() -> list[float]:
        network = make_network(features=[8, 16, 24], feature_sparsity=0.7, deep_supervision=False)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=3e-5)
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(60):
            x = torch.randn(2, 1, 8, 16, 16, generator=generator)
            target = (x[:, 0] > 0.5).long() + (x[:, 0].roll(1, 1) > 0.5)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), target)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    halves = losses()
    with override(engine_storage="float32"):
        floats = losses()
    assert floats[-1] < 0.9 * floats[0]
    assert sum(halves[-20:]) == pytest.approx(sum(floats[-20:]), rel=0.02)
