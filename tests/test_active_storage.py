"""Blocks with equally many inputs each: training stores and computes active connections alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import layers_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from training_memory import ACTIVE, Candidate, backward_flops

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.deployment.onnx import plain_network
from nnunetv2_e2enet.dsff import CosineSchedule, ErdosRenyiKernel, GradientGrowth, TopologyUpdater, Uniform, random_topology
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, accounts, store_active_only
from nnunetv2_e2enet.network.connections import (
    MASKED_CONV,
    MASKED_CONV_TRANSPOSE,
    MaskableLayer,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    maskable_layers,
)

Network = TypeVar("Network", bound=nn.Module)


def equal_blocks_network(dimension: int) -> nn.Sequential:
    conv, up = (MaskedConv2d, MaskedConvTranspose2d) if dimension == 2 else (MaskedConv3d, MaskedConvTranspose3d)
    network = nn.Sequential(conv(20, 24, 3, stride=2, padding=1), up(24, 16, 2, 2, bias=False), conv(16, 12, 3, padding=1))
    for layer in layers_of(network):
        layer.share_inputs(4, equal_blocks=True)
    random_topology(network, 0.8, Uniform(), 3)
    return network.double()


def e2enet(feature_sparsity: float = 0.75, seed: int = 0) -> E2ENet:
    torch.manual_seed(seed)
    network = E2ENet(1, 2, 3, [8, 16, 16], nn.Conv3d, [1, 2, 2], deep_supervision=True, feature_sparsity=feature_sparsity)
    for layer in layers_of(network):
        layer.share_inputs(4, equal_blocks=True)
    random_topology(network, feature_sparsity, Uniform(), seed)
    return network


def active_only(network: Network) -> Network:
    """The same network, of which only active weights are stored."""
    network = deepcopy(network)
    for layer in layers_of(network):
        store_active_only(layer)
    return network


def assert_same_state(first: nn.Module, second: nn.Module, compare: Callable[[Tensor, Tensor], Any] | None = None) -> None:
    expected, found = first.state_dict(), second.state_dict()
    assert list(expected) == list(found)
    for key, value in expected.items():
        (compare or (lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)))(found[key], value)


# --- one layer ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3]),
    st.booleans(),
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.integers(1, 6),
    st.floats(0.0, 0.95),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.integers(0, 99),
)
def test_a_layer_is_the_same_however_it_is_stored(
    dimension: int, transposed: bool, maps: tuple[int, int], size: int, sparsity: float, conv: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kernel, stride = conv
    make = (MASKED_CONV_TRANSPOSE if transposed else MASKED_CONV)[dimension]
    dense = make(*maps, kernel, stride, padding=kernel // 2).double()
    dense.share_inputs(size, equal_blocks=True)
    dense.set_random_topology(dense.connections_at(1 - sparsity), generator)
    active = active_only(dense)
    assert active.weight.numel() == dense.n_active * dense.weights_per_connection
    assert active.shape == dense.weight.shape
    assert torch.equal(active.masked_weight(), dense.masked_weight())
    assert torch.equal(active.gather(active.spread(active.weight)), active.weight)
    assert_same_state(dense, active)

    x = torch.randn(2, maps[0], *[5] * dimension, dtype=torch.float64, generator=generator)
    for train in (True, False):
        torch.testing.assert_close(active.train(train)(x), dense.train(train)(x))

    other = make(*maps, kernel, stride, padding=kernel // 2).double()
    other.share_inputs(size, equal_blocks=True)
    other.set_random_topology(dense.n_active, generator)
    state = torch.randn(dense.shape, dtype=torch.float64, generator=generator) * dense.over_kernel(dense.mask)
    gathered = active.gather(state)
    restarted = other.mask & (torch.rand(dense.mask.shape, generator=generator) < 0.3)
    for layer, values in ((dense, state), (active, gathered)):
        layer.change_topology(other.mask, restarted | (layer.mask & ~other.mask), [values])
    assert torch.equal(active.spread(gathered), state)
    assert_same_state(dense, active)

    loaded = active.load_state_dict(other.state_dict())
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert_same_state(other, active)
    assert active.weight.shape == gathered.shape


@pytest.mark.parametrize("dimension", [2, 3])
def test_gradients_of_stored_weights(dimension: int) -> None:
    torch.manual_seed(0)
    for layer in layers_of(active_only(equal_blocks_network(dimension)))[:2]:
        x = torch.randn(1, layer.n_inputs, *[3] * dimension, dtype=torch.float64, requires_grad=True)

        def output(x: Tensor, weight: Tensor, layer: nn.Module = layer) -> Tensor:
            result: Tensor = functional_call(layer, {"weight": weight}, (x,))
            return result

        for train in (True, False):
            layer.train(train)
            assert torch.autograd.gradcheck(output, (x, layer.weight), fast_mode=True)


@pytest.mark.parametrize("dimension", [2, 3])
def test_only_active_inputs_are_computed_and_gradients_are_the_same(dimension: int) -> None:
    torch.manual_seed(0)
    whole = equal_blocks_network(dimension)
    network = active_only(whole)
    x = torch.randn(2, 20, *[8] * dimension, dtype=torch.float64, requires_grad=True)
    found = []
    for each in (whole, network):
        with FlopCounterMode(display=False) as counter:
            out = each(x)
        found.append((counter.get_total_flops(), out, *torch.autograd.grad(out.sin().sum(), (x, *each.parameters()))))
    (dense, *expected), (active, *results) = found
    weights = {parameter: layer for layer in layers_of(network) for parameter in [layer.weight]}
    for result, e, parameter in zip(results, expected, (None, None, *network.parameters()), strict=True):
        torch.testing.assert_close(result, weights[parameter].gather(e) if parameter in weights else e)
    densities = {layer.n_active / layer.n_connections for layer in layers_of(network)}
    assert min(densities) <= active / dense <= max(densities) < 0.25


def test_all_blocks_keep_the_same_number_of_inputs() -> None:
    torch.manual_seed(0)
    network = active_only(equal_blocks_network(2))
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    updater = TopologyUpdater(network, CosineSchedule(6, 1, 0.5), seed=1)
    numbers = [round(0.2 * inputs) for inputs in (20, 24, 16)]
    before = [layer.mask.clone() for layer in layers_of(network)]
    for epoch in range(5):
        optimizer.zero_grad()
        network(torch.randn(1, 20, 8, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        updater.update(epoch + 1, optimizer)
        for layer, number in zip(layers_of(network), numbers, strict=True):
            assert layer.fits_blocks()
            assert layer.active_inputs.shape == (layer.n_blocks, number)
    assert all(not torch.equal(layer.mask, was) for layer, was in zip(layers_of(network), before, strict=True))


def test_prediction_and_other_padding_need_the_whole_layer() -> None:
    layer = layers_of(active_only(equal_blocks_network(2)))[0]
    x = torch.randn(1, 20, 8, 8, dtype=torch.float64)
    assert layer.computes_active_only
    expected = layer(x)
    layer.eval()
    assert not layer.computes_active_only
    torch.testing.assert_close(layer(x), expected)
    reflecting = MaskedConv2d(20, 24, 3, padding=1, padding_mode="reflect").double()
    reflecting.share_inputs(4, equal_blocks=True)
    reflecting.set_random_topology(reflecting.connections_at(0.2))
    expected = reflecting(x)
    store_active_only(reflecting)
    assert not reflecting.computes_active_only
    assert torch.equal(reflecting(x), expected)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_topology_with_other_blocks_does_not_fit() -> None:
    layer = layers_of(equal_blocks_network(2))[0]
    assert layer.fits_blocks()
    first, others = layer.by_block(layer.mask).bool().split([1, layer.n_outputs // 4 - 1])
    fewer = first & (first.cumsum(1) > 1)
    mask = layer.from_blocks(torch.cat([fewer, others]))
    assert not layer.fits_blocks(mask)
    active = active_only(layer)
    layer.set_topology(mask)
    assert not layer.fits_blocks()
    with pytest.raises(E2ENetError, match="blocks of 4 output maps do not have equally many input maps"):
        store_active_only(layer)
    state = deepcopy(active.state_dict())
    with pytest.raises(E2ENetError, match="got a topology of other blocks"):
        active.set_topology(mask)
    with pytest.raises(E2ENetError, match="mask has not 4 input maps for each block of 4 output maps"):
        active.load_state_dict(layer.state_dict())
    with pytest.raises(E2ENetError, match="got a topology of other blocks"):
        active.set_random_topology(active.connections_at(0.5))
    with pytest.raises(E2ENetError, match="whose blocks are what they are"):
        active.share_inputs(8)
    for key, value in active.state_dict().items():
        assert torch.equal(value, state[key])
    active.set_random_topology(active.connections_at(0.2))
    assert active.fits_blocks()
    layer.equal_blocks = False
    assert layer.fits_blocks()


def test_weights_of_another_layer_are_refused_as_torch_does() -> None:
    layer = layers_of(active_only(equal_blocks_network(2)))[0]
    state = layer.state_dict()
    with pytest.raises(
        RuntimeError, match=r"size mismatch for weight: .*\[24, 20, 1, 1\].* is torch.Size\(\[24, 20, 3, 3\]\)"
    ):
        layer.load_state_dict({**state, "weight": torch.zeros(24, 20, 1, 1)})
    with pytest.raises(RuntimeError, match="size mismatch for mask"):
        layer.load_state_dict({**state, "mask": torch.ones(24, 21, dtype=torch.bool)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({key: value for key, value in state.items() if key != "weight"})
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])
    layer.load_state_dict(state, assign=True)
    assert_same_state(layer, layers_of(equal_blocks_network(2))[0], lambda a, b: a.shape == b.shape)
    assert layer(torch.randn(1, 20, 8, 8, dtype=torch.float64)).isfinite().all()


def test_a_class_of_somebody_elses_has_no_compact_form() -> None:
    class Own(MaskedConv2d):
        pass

    layer = Own(20, 24, 3)
    layer.share_inputs(4, equal_blocks=True)
    layer.set_random_topology(layer.connections_at(0.2))
    with pytest.raises(E2ENetError, match="Own has no compact form"):
        store_active_only(layer)
    assert type(layer) is Own


def test_compact_layers_are_pickled_as_they_are() -> None:
    layer = layers_of(active_only(equal_blocks_network(2)))[0]
    copy = pickle.loads(pickle.dumps(layer))
    assert type(copy) is type(layer)
    assert copy.stores_active_only
    assert copy.weight.shape == layer.weight.shape
    assert_same_state(copy, layer)


def test_growth_by_gradient_needs_all_weights() -> None:
    network = equal_blocks_network(2)
    with pytest.raises(E2ENetError, match="GradientGrowth needs gradients of all connections, but 0 stores active weights"):
        TopologyUpdater(active_only(network), CosineSchedule(6, 1), growth=GradientGrowth())
    updater = TopologyUpdater(network, CosineSchedule(6, 1), growth=GradientGrowth())
    layer = layers_of(network)[0]
    with updater.observation():
        layer(torch.randn(1, 20, 8, 8, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[~layer.mask].abs().min() > 0
    store_active_only(layer)
    with pytest.raises(E2ENetError, match="no gradients of all connections"), updater.observation():
        pytest.fail("a layer without these gradients was observed")


# --- training ---------------------------------------------------------------------------------------------------------


def bytes_of_training(layers: list[MaskableLayer], optimizer: torch.optim.Optimizer) -> int:
    """Of parameters, gradients and optimizer state."""
    total = 0
    for weight in (layer.weight for layer in layers):
        values = [weight, weight.grad, *optimizer.state[weight].values()]
        total += sum(value.nbytes for value in values if isinstance(value, Tensor) and value.dim())
    return total


@pytest.mark.parametrize("adam", [False, True], ids=["SGD", "AdamW"])
def test_training_is_the_same_however_weights_are_stored(adam: bool) -> None:
    """Fifty steps with four topology updates, weight decay and nnU-Net's clipping of gradients."""
    whole = e2enet(0.75).double()
    losses, found = [], []
    for network in (whole, active_only(whole)):
        parameters = network.parameters()
        sgd = {"momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}
        optimizer = torch.optim.AdamW(parameters, 1e-2) if adam else torch.optim.SGD(parameters, 0.01, **sgd)
        updater = TopologyUpdater(network, CosineSchedule(6, 1, 0.5), seed=1)
        generator = torch.Generator().manual_seed(0)
        values, replaced = [], []
        for step in range(50):
            x = torch.randn(1, 1, 4, 8, 8, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            loss = sum(
                ((out - (x[..., :: 2**i, :: 2**i, :: 2**i] > 0).double()) ** 2).mean() for i, out in enumerate(network(x))
            )
            assert isinstance(loss, Tensor)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
            values += [loss.item(), norm.item()]
            if step % 10 == 9:
                update = updater.update(step // 10 + 1, optimizer)
                replaced.append(0 if update is None else update.replaced)
        assert min(replaced[:4]) > 0
        losses.append(values)
        found.append((network, bytes_of_training(layers_of(network), optimizer)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    (dense, dense_bytes), (active, active_bytes) = found
    # a bias before an instance norm has a gradient of rounding errors alone, which Adam makes the most of
    assert_same_state(dense, active, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 if adam else 1e-12))
    assert active_bytes == 0.25 * dense_bytes  # all layers have a multiple of four inputs


def test_a_gradient_that_is_kept_stays_with_its_connections() -> None:
    """Gradients may be summed over more than one pass, with an update in between."""
    whole = equal_blocks_network(2)
    found = []
    for network in (whole, active_only(whole)):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        updater = TopologyUpdater(network, CosineSchedule(6, 1, 0.5), seed=1)
        for epoch in range(2):
            network(torch.randn(1, 20, 8, 8, dtype=torch.float64)).square().mean().backward()
            updater.update(epoch + 1, optimizer)
        optimizer.step()
        found.append(network)
    assert_same_state(*found, lambda a, b: torch.testing.assert_close(a, b))


def test_updates_of_equal_blocks_compile_nothing() -> None:
    torch._dynamo.reset()
    network = active_only(equal_blocks_network(2)).float()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    updater = TopologyUpdater(network, CosineSchedule(6, 1, 0.5), seed=1)
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    for epoch in range(4):
        optimizer.zero_grad()
        compiled(torch.randn(1, 20, 8, 8)).sum().backward()
        optimizer.step()
        update = updater.update(epoch + 1, optimizer)
        assert update is not None
        assert update.replaced > 0
    assert counter.frame_count == 1
    assert [parameter.data_ptr() for parameter in network.parameters()] == addresses  # all in place


# --- everything else sees all connections -----------------------------------------------------------------------------


def test_copies_and_averages_of_state_dicts() -> None:
    """Also over an update, after which a weight may lie at another place."""
    whole = equal_blocks_network(2)
    averages = []
    for network in (whole, active_only(whole)):
        average = deepcopy(network)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        updater = TopologyUpdater(network, CosineSchedule(6, 1, 0.5), seed=1)
        torch.manual_seed(0)
        for epoch in range(3):
            optimizer.zero_grad()
            network(torch.randn(1, 20, 8, 8, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            updater.update(epoch + 1, optimizer)
            mean = average.state_dict()
            for key, value in network.state_dict().items():
                mean[key] = torch.lerp(mean[key], value, 0.3) if value.is_floating_point() else value
            average.load_state_dict(mean)
            for layer in layers_of(average):
                layer.clear_inactive_weights()  # of all weights, the average holds those that have just been switched off
        averages.append(average)
    for first, second in zip(*map(layers_of, averages), strict=True):
        torch.testing.assert_close(first.masked_weight(), second.masked_weight())


def test_bytes_and_arithmetic_of_a_training_step() -> None:
    """As benchmarks/training_memory.py says them."""
    blocks, active = (Candidate(kind, "Hippocampus", (8, 8, 8)) for kind in ("blocks", ACTIVE))
    counts = accounts.parameter_counts(active.build())
    assert active.state() == 3 * 4 * counts.active
    assert blocks.state() == 3 * 4 * counts.total
    x = torch.randn(1, 12, 4, 4, requires_grad=True)
    counted = []
    for groups, convs in ((3, [nn.Conv2d(12, 6, 3, groups=3)]), (1, [nn.Conv2d(4, 2, 3) for _ in range(3)])):
        parts = x.split(12 // len(convs), dim=1)
        mapping = {torch.ops.aten.convolution_backward: backward_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            torch.cat([conv(part) for conv, part in zip(convs, parts, strict=True)], dim=1).sum().backward()
        assert convs[0].groups == groups
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_costs_prediction_engine_and_export_see_all_connections() -> None:
    whole = e2enet().eval()
    network = active_only(whole)
    x = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        assert all(
            torch.equal(a, b) for a, b in zip(whole(x), network(x), strict=True)
        )  # of the CPU engine, where there is one
        with engine.disabled():
            assert all(torch.equal(a, b) for a, b in zip(whole(x), network(x), strict=True))
        torch.testing.assert_close(plain_network(network)(x), plain_network(whole)(x))
    assert accounts.parameter_counts(network) == accounts.parameter_counts(whole)
    assert accounts.multiply_accumulates(network, (1, 1, 8, 16, 16)) == accounts.multiply_accumulates(whole, (1, 1, 8, 16, 16))
    layers = [dict(maskable_layers(each)) for each in (whole, network)]
    assert ErdosRenyiKernel().active(0.8, layers[0]) == ErdosRenyiKernel().active(0.8, layers[1])
    for each in (whole, network):
        torch.manual_seed(5)
        each.apply(each.initialize)
    assert_same_state(whole, network)
