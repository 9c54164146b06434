"""Structured connections: blocks of output maps that share their input maps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import layers_of
from torch import nn

from nnunetv2_e2enet.dsff import CosineSchedule, ErdosRenyiKernel, GradientGrowth, RandomGrowth, TopologyUpdater, Uniform
from nnunetv2_e2enet.dsff import random_topology as start_from_random_topology
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import (
    MaskableLayer,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)


def blocks(layer: MaskableLayer) -> list[list[list[bool]]]:
    """The mask as Python lists: block, output map within it, input map."""
    rows = layer.mask.T.tolist() if isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)) else layer.mask.tolist()
    return [rows[i : i + layer.block_size] for i in range(0, len(rows), layer.block_size)]


@pytest.mark.parametrize(
    ("outputs", "wanted", "got"), [(48, 8, 8), (48, 16, 16), (48, 32, 24), (320, 32, 32), (7, 4, 1), (12, 8, 6), (4, 16, 4)]
)
def test_all_blocks_of_a_layer_are_of_the_same_size(outputs: int, wanted: int, got: int) -> None:
    for layer in (MaskedConv2d(3, outputs, 1), MaskedConvTranspose2d(3, outputs, 2, 2)):
        layer.share_inputs(wanted)
        assert layer.block_size == got


@pytest.mark.parametrize("size", [0, -8, 2.0, True, "8"])
def test_other_sizes_are_refused(size: object) -> None:
    with pytest.raises(E2ENetError, match="block_size is"):
        MaskedConv2d(3, 8, 1).share_inputs(size)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 24)] * 3),
    st.integers(1, 9),
    st.floats(0.0, 0.95),
    st.booleans(),
    st.integers(0, 99),
)
def test_blocks_are_pruned_and_grown_as_connections_are(
    widths: tuple[int, int, int], block_size: int, feature_sparsity: float, by_gradient: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    a, b, c = widths
    network = nn.Sequential(MaskedConv3d(a, b, (1, 3, 3), padding=(0, 1, 1)), MaskedConvTranspose3d(b, c, 2, 2, bias=False))
    for layer in layers_of(network):
        layer.share_inputs(block_size)
    start_from_random_topology(network, feature_sparsity, Uniform(), seed)
    growth = GradientGrowth() if by_gradient else RandomGrowth()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    updater = TopologyUpdater(network, CosineSchedule(6, 1, 0.5), growth=growth, seed=seed)
    for epoch in range(6):
        optimizer.zero_grad()
        network(torch.randn(1, a, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with updater.observation():
            network(torch.randn(1, a, 2, 4, 4)).square().mean().backward()
        before = [(blocks(layer), layer.weight.detach().flatten(2).abs().sum(2)) for layer in layers_of(network)]
        update = updater.update(epoch + 1, optimizer)
        for layer, (was, norms) in zip(layers_of(network), before, strict=True):
            size, n_blocks = layer.block_size, layer.n_connections // layer.block_size
            now = blocks(layer)
            assert all(rows.count(rows[0]) == size for rows in now)  # maps of a block share their inputs
            assert layer.n_active == round((1 - feature_sparsity) * n_blocks) * size
            assert layer.shared_block_size() % size == 0
            if update is None:
                assert now == was
                continue
            by_output = norms.T if layer.output_axis else norms
            sums = by_output.reshape(-1, size, by_output.shape[1]).sum(1)
            was_active, is_active = (torch.tensor([rows[0] for rows in state]) for state in (was, now))
            pruned, kept = was_active & ~is_active, was_active & is_active
            active, inactive = int(was_active.sum()), int((~was_active).sum())
            if inactive >= math.ceil(update.prune_fraction * active):
                assert int(pruned.sum()) == math.ceil(update.prune_fraction * active)
                if pruned.any() and kept.any():
                    assert sums[pruned].max() <= sums[kept].min() + 1e-6
            assert layer.weight[layer.over_kernel(~layer.mask).expand_as(layer.weight)].abs().sum() == 0


def test_single_maps_evolve_as_without_blocks() -> None:
    """A block size of 1 changes nothing: the same start and the same topologies."""
    masks = []
    for block_size in (None, 1):
        torch.manual_seed(0)
        network = nn.Sequential(MaskedConv2d(9, 12, 3))
        layer = layers_of(network)[0]
        if block_size is not None:
            layer.share_inputs(block_size)
        start_from_random_topology(network, 0.7, Uniform(), seed=5)
        updater = TopologyUpdater(network, CosineSchedule(9, 1), seed=5)
        for epoch in range(4):
            updater.update(epoch + 1, torch.optim.SGD(network.parameters(), 0.1))
        masks.append(layer.mask.clone())
    assert torch.equal(*masks)


def test_erdos_renyi_gives_whole_blocks() -> None:
    layers: dict[str, MaskableLayer] = {str(i): MaskedConv2d(a, b, 3) for i, (a, b) in enumerate([(8, 16), (64, 48), (9, 20)])}
    for layer in layers.values():
        layer.share_inputs(8)
    active = ErdosRenyiKernel().active(0.8, layers)
    assert [layers[name].block_size for name in layers] == [8, 8, 5]
    assert all(active[name] % layer.block_size == 0 for name, layer in layers.items())


def test_blocks_are_read_from_the_mask_alone() -> None:
    conv, up = MaskedConv2d(10, 12, 1), MaskedConvTranspose2d(10, 12, 2, 2)
    for layer in (conv, up):
        layer.share_inputs(4)
        layer.set_random_topology(layer.connections_at(0.3), torch.Generator().manual_seed(3))
        loaded = type(layer)(10, 12, layer.kernel_size, layer.stride)
        loaded.load_state_dict(layer.state_dict())
        assert loaded.block_size == 1
        assert loaded.shared_block_size() % 4 == 0
