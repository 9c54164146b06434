"""DSFF and the depth shift inside the networks of dynamic_network_architectures."""

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from support import architecture
from torch import nn

from nnunetv2_e2enet.dsff import CosineSchedule, TopologyUpdater
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, accounts, maskable_layers
from nnunetv2_e2enet.network.conversion import DepthShift, converted_network, make_maskable, put_depth_shift
from nnunetv2_e2enet.training.architecture import converted_architecture

BLOCKS: dict[type[nn.Module], dict[str, Any]] = {
    PlainConvUNet: {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2},
    ResidualEncoderUNet: {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": 1},
    ResidualUNet: {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": 1},
}
NETWORKS = sorted(BLOCKS, key=lambda cls: cls.__name__)


def stock(cls: type[nn.Module], dimension: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return cls(
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 6, 8],
        conv_op=nn.Conv3d if dimension == 3 else nn.Conv2d,
        kernel_sizes=[[1, 3, 3][-dimension:], [3] * dimension, [3] * dimension],
        strides=[[1] * dimension, [1, 2, 2][-dimension:], [2] * dimension],
        num_classes=3,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if dimension == 3 else nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **BLOCKS[cls],
    )


def convolutions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)]


@pytest.mark.parametrize("cls", NETWORKS)
@pytest.mark.parametrize("dimension", [2, 3])
def test_the_decoder_becomes_maskable_and_computes_what_it_did(cls: type[nn.Module], dimension: int) -> None:
    network = stock(cls, dimension)
    x = torch.randn(1, 1, *[8, 16, 16][-dimension:])
    before, state = network(x), network.state_dict()
    assert make_maskable(network) is network
    assert all(torch.equal(a, b) for a, b in zip(network(x), before, strict=True))
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert {key.rsplit(".", 1)[1] for key in after.keys() - state.keys()} == {"mask", "explored"}
    layers = {layer for _, layer in maskable_layers(network)}
    fused = set(convolutions(network.decoder.stages)) | set(convolutions(network.decoder.transpconvs))
    assert layers == fused
    assert not layers & {*convolutions(network.encoder), *convolutions(network.decoder.seg_layers)}


@pytest.mark.parametrize("cls", NETWORKS)
def test_what_is_off_has_no_effect_wherever_the_network_holds_it(cls: type[nn.Module]) -> None:
    network = make_maskable(stock(cls))
    for _, layer in maskable_layers(network):
        layer.set_random_topology(layer.connections_at(0.5))
    x = torch.randn(1, 1, 8, 16, 16)
    expected = network(x)
    for _, layer in maskable_layers(network):
        layer.weight.data[~layer.mask] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(network(x), expected, strict=True))


def test_topology_is_updated() -> None:
    network = make_maskable(stock(PlainConvUNet))
    for _, layer in maskable_layers(network):
        layer.set_random_topology(layer.connections_at(0.3))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.randn(1, 1, 8, 16, 16))[0].square().mean().backward()
    optimizer.step()
    update = TopologyUpdater(network, CosineSchedule(5, 1)).update(1, optimizer)
    assert update is not None
    assert update.replaced > 0
    assert all(layer.n_active == layer.connections_at(0.3) for _, layer in maskable_layers(network))


def test_counts_are_of_active_connections() -> None:
    """A third of the decoder's arithmetic, by hand: (voxels) x (weights a connection) x (active connections)."""
    network = make_maskable(stock(PlainConvUNet))
    dense = accounts.multiply_accumulates(network, (1, 1, 8, 16, 16))
    for _, layer in maskable_layers(network):
        layer.set_random_topology(layer.connections_at(1 / 3))
    sparse = accounts.multiply_accumulates(network, (1, 1, 8, 16, 16))
    voxels = {4: 8 * 16 * 16, 6: 8 * 8 * 8}
    expected = 0
    for _, layer in maskable_layers(network):
        outputs = voxels[layer.n_outputs]
        per_output = layer.weights_per_connection if layer.output_axis == 0 else 1  # kernel = stride: one weight an output
        expected += outputs * per_output * (layer.n_connections - layer.n_active)
    assert dense.active - sparse.active == expected
    assert dense.total == sparse.total == dense.active


@pytest.mark.parametrize("cls", NETWORKS)
def test_depth_shift_takes_the_place_of_depth(cls: type[nn.Module]) -> None:
    before, network = stock(cls), put_depth_shift(stock(cls), 3)
    assert all(conv.kernel_size[0] == 1 for conv in convolutions(network) if type(conv) is nn.Conv3d)
    with_depth = sum(type(conv) is nn.Conv3d and conv.kernel_size[0] == 3 for conv in convolutions(before))
    assert sum(isinstance(m, DepthShift) for m in network.modules()) == with_depth > 0
    x = torch.randn(1, 1, 8, 16, 16)
    assert [out.shape for out in network(x)] == [out.shape for out in before(x)]
    fewer = accounts.parameter_counts(before).total - accounts.parameter_counts(network).total
    assert fewer == sum(
        2 * conv.weight[0, 0, 0].numel() * conv.weight[:, :, 0, 0, 0].numel()
        for conv in convolutions(before)
        if type(conv) is nn.Conv3d and conv.kernel_size[0] == 3
    )


def test_depth_is_seen_through_the_shift_alone() -> None:
    """One slice of the input changes: without a shift, only that slice of the output does."""

    def changed_slices(shift_size: int) -> list[bool]:
        torch.manual_seed(0)
        network = put_depth_shift(nn.Sequential(nn.Conv3d(3, 4, 3, padding=1)), shift_size)
        x = torch.zeros(1, 3, 7, 4, 4)
        y = x.clone()
        y[:, :, 3] = 1
        return (network(x) - network(y)).abs().sum((0, 1, 3, 4)).gt(0).tolist()

    assert changed_slices(1) == [d == 3 for d in range(7)]
    assert changed_slices(3) == [d in (2, 3, 4) for d in range(7)]


def test_weights_of_another_shift_size_are_refused() -> None:
    three, five = (put_depth_shift(stock(PlainConvUNet), size) for size in (3, 5))
    with pytest.raises(E2ENetError, match="trained with shift_size 5, but the network has 3"):
        three.load_state_dict(five.state_dict())
    three.load_state_dict(put_depth_shift(stock(PlainConvUNet), 3).state_dict())


@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
def test_stock_nnunet_builds_it_from_plans_alone(cls: type[nn.Module]) -> None:
    given = architecture([4, 6, 8], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], f"{cls.__module__}.{cls.__name__}", **BLOCKS[cls])
    entry = converted_architecture(given, feature_sparsity=0.75, shift_size=5)
    assert converted_architecture(entry, feature_sparsity=0.75, shift_size=5) == entry  # plans of a model folder
    assert "feature_sparsity" not in given["arch_kwargs"]
    network = get_network_from_plans(*entry.values(), 2, 3, deep_supervision=True)
    assert isinstance(network, cls)
    assert all(layer.n_active == round(0.25 * layer.n_connections) for _, layer in maskable_layers(network))
    assert {m.shift_size for m in network.modules() if isinstance(m, DepthShift)} == {5}
    assert [out.shape for out in network(torch.randn(1, 2, 8, 16, 16))] == [(1, 3, 8, 16, 16), (1, 3, 8, 8, 8)]


def test_networks_without_anything_to_replace_are_refused() -> None:
    with pytest.raises(E2ENetError, match="E2ENet has no dense convolutions in a decoder"):
        make_maskable(E2ENet(1, 2, 2, 4, nn.Conv3d, [[1, 1, 1], [2, 2, 2]]))
    with pytest.raises(E2ENetError, match="Linear has no dense convolutions"):
        make_maskable(nn.Linear(2, 2))
    with pytest.raises(E2ENetError, match="no 3D convolutions with depth"):
        put_depth_shift(stock(PlainConvUNet, dimension=2), 3)
    with pytest.raises(E2ENetError, match="shift_size is 2"):
        put_depth_shift(stock(PlainConvUNet), 2)
    with pytest.raises(E2ENetError, match=r"no\.such\.Network cannot be imported"):
        converted_network("no.such.Network")
