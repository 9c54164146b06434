"""E2ENets of random weights, of given or drawn shapes, for the tests of the engine: their logits both ways, their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet, maskable_layers
from nnunetv2_e2enet.network.connections import MaskableLayer

KERNELS = [name for name in engine.KERNELS if not isinstance(engine.load_core(name), str)]
needs_core = pytest.mark.skipif(not KERNELS, reason="the compiled core was not built")


def layers_of(network: nn.Module) -> list[MaskableLayer]:
    return [layer for _, layer in maskable_layers(network)]


def change_eps(network: E2ENet) -> None:
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            module.eps = 0.5


def random_network(
    strides: list[list[int]] | None = None,
    features: list[int] | None = None,
    seed: int = 0,
    biases: bool = False,
    **arguments: object,
) -> E2ENet:
    """A network of three levels unless given, with norms of either sign, and with ``biases`` of its convolutions."""
    strides = strides or [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    features = features or [5 + 3 * level for level in range(len(strides))]
    torch.manual_seed(seed)
    arguments = {"input_channels": 1, "num_classes": 3, **arguments}
    conv_op = nn.Conv3d if len(strides[0]) == 3 else nn.Conv2d
    network = E2ENet(n_stages=len(strides), features_per_stage=features, conv_op=conv_op, strides=strides, **arguments)
    for module in network.modules():
        if isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)) and module.weight is not None:
            nn.init.normal_(module.weight)  # either sign: the pooled flow has to know
            nn.init.normal_(module.bias)
        if biases and isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.bias is not None:
            nn.init.normal_(module.bias)
    return network


def drawn_network(draw: st.DrawFn, axis_strides: Sequence[int], biases: bool) -> tuple[E2ENet, list[int]]:
    """A network of any shape, and the numbers by which its patches are divisible, one an axis."""
    dimension = draw(st.sampled_from([2, 3, 3]))
    levels = draw(st.integers(2, 4))
    of_level = st.lists(st.sampled_from(axis_strides), min_size=dimension, max_size=dimension)
    strides = [[1] * dimension, *(draw(of_level) for _ in range(levels - 1))]
    network = random_network(
        strides,
        [draw(st.integers(1, 21)) for _ in range(levels)],
        seed=draw(st.integers(0, 9)),
        biases=biases,
        input_channels=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(2, 7)),
        n_conv_per_stage=draw(st.integers(1, 3)),
        feature_sparsity=draw(st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.9])),
        shift_size=draw(st.sampled_from([1, 3, 5])),
        deep_supervision=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
    )
    divisor = [1] * dimension
    for stride in strides:
        divisor = [d * s for d, s in zip(divisor, stride, strict=True)]
    return network, divisor


def make_network(*shape: Any, **settings: Any) -> E2ENet:
    return random_network(*shape, biases=True, **settings).eval()


def both_ways(network: E2ENet, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the engine and of PyTorch; fails where the engine did not run."""
    with torch.inference_mode():
        ours = network(x)
        assert engine.why_pytorch(network) is None
        with engine.disabled():
            theirs = network(x)
    return (ours, theirs) if isinstance(ours, list) else ([ours], [theirs])


def assert_same_logits(network: E2ENet, x: Tensor) -> None:
    ours, theirs = both_ways(network, x)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def uses_engine(network: E2ENet, x: Tensor) -> bool:
    with torch.inference_mode():
        network(x)
    return engine.why_pytorch(network) is None
