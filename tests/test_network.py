from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from support import AMOS_STRIDES, architecture
from torch import nn

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, accounts, e2enet_features, maskable_layers
from nnunetv2_e2enet.network.reference import load_reference_weights, reference_modules
from nnunetv2_e2enet.training.architecture import NETWORK_CLASS_NAME


def small(levels: int = 3, dimension: int = 3, **kwargs: Any) -> E2ENet:
    arguments: dict[str, Any] = {
        "input_channels": 1,
        "num_classes": 2,
        "n_stages": levels,
        "features_per_stage": [4 + 2 * level for level in range(levels)],
        "conv_op": nn.Conv3d if dimension == 3 else nn.Conv2d,
        "strides": [[1] * dimension] + [[2] * dimension] * (levels - 1),
    }
    return E2ENet(**{**arguments, **kwargs})


def amos(sparsity: float = 0.0) -> E2ENet:
    return E2ENet(1, 16, 6, e2enet_features(6), nn.Conv3d, AMOS_STRIDES, deep_supervision=True, feature_sparsity=sparsity)


def plain_conv_unet() -> PlainConvUNet:
    return PlainConvUNet(
        *(1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, [[1, 3, 3]] + [[3, 3, 3]] * 5, AMOS_STRIDES, 2, 16, 2, True),
        *(nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}),
        deep_supervision=True,
    )


def test_an_activation_may_come_without_arguments() -> None:
    """Those of the default, leaky ReLU's, are not for another one: GELU has no ``inplace``."""
    assert {type(m.nonlin) for m in small(nonlin=nn.GELU).modules() if hasattr(m, "nonlin")} == {nn.GELU}
    assert {m.nonlin.inplace for m in small().modules() if hasattr(m, "nonlin")} == {True}


# --- the function -------------------------------------------------------------------------------------------------------


def test_published_weights_bring_their_topology() -> None:
    network, sparse = small(feature_sparsity=0.0), small(feature_sparsity=0.7)
    arrays = {
        f"{name}.{key}": p.detach().numpy()
        for name, module in reference_modules(sparse).items()
        for key, p in module.named_parameters(recurse=False)
    }
    load_reference_weights(network, {**arrays, "x": np.zeros(1)})
    for (_, ours), (_, theirs) in zip(maskable_layers(network), maskable_layers(sparse), strict=True):
        assert torch.equal(ours.mask, theirs.mask)
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(network(x), sparse(x))


def test_published_weights_of_another_network_are_refused_and_nothing_changes() -> None:
    network = small()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(E2ENetError, match="missing"):
        load_reference_weights(network, {"encoder.level0.conv0.conv.weight": np.zeros((4, 1, 1, 3, 3), np.float32)})
    wrong = {
        f"{n}.{k}": p.detach().numpy()
        for n, m in reference_modules(network).items()
        for k, p in m.named_parameters(recurse=False)
    }
    wrong["head.level0.weight"] = np.zeros((2, 9, 1, 1, 1), np.float32)
    with pytest.raises(E2ENetError, match="shape"):
        load_reference_weights(network, wrong)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_levels_strides_widths_and_dimension(data: st.DataObject) -> None:
    dimension = data.draw(st.sampled_from([2, 3]))
    levels = data.draw(st.integers(2, 6 if dimension == 2 else 4))
    stride = st.lists(st.sampled_from([1, 2]), min_size=dimension, max_size=dimension)
    strides = [[1] * dimension] + [data.draw(stride) for _ in range(levels - 1)]
    widths = data.draw(st.lists(st.integers(1, 6), min_size=levels, max_size=levels))
    patch = [2 * int(p) for p in np.prod(strides, axis=0)]  # instance norm needs more than one voxel
    network = small(
        levels,
        dimension,
        features_per_stage=widths,
        strides=strides,
        shift_size=data.draw(st.sampled_from([1, 3, 5])),
        feature_sparsity=data.draw(st.sampled_from([0, 0.5, 0.8])),
        deep_supervision=True,
    )
    outputs = network(torch.randn(2, 1, *patch))
    scales = np.cumprod(strides, axis=0)[: max(0, levels - 3) + 1]
    assert [list(o.shape) for o in outputs] == [[2, 2, *(np.array(patch) // s)] for s in scales]
    network.decoder.deep_supervision = False
    assert network(torch.randn(2, 1, *patch)).shape == (2, 2, *patch)


def test_in_two_dimensions_nothing_is_shifted() -> None:
    plain, shifted = small(dimension=2, shift_size=1), small(dimension=2, shift_size=5)
    shifted.load_state_dict(plain.state_dict())
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(plain(x), shifted(x))


# --- topology -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9])
def test_fresh_network_has_a_random_topology_of_that_sparsity(sparsity: float) -> None:
    first, second = small(feature_sparsity=sparsity), small(feature_sparsity=sparsity)
    for (_, a), (_, b) in zip(maskable_layers(first), maskable_layers(second), strict=True):
        assert a.n_active == b.n_active == round((1 - sparsity) * a.mask.numel())
    masks = [torch.cat([layer.mask.flatten() for _, layer in maskable_layers(n)]) for n in (first, second)]
    assert torch.equal(*masks) == (sparsity == 0)


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("dense_gradients", [False, True])
def test_inactive_weights_have_no_effect(value: float, dense_gradients: bool) -> None:
    network = small(feature_sparsity=0.6)
    x = torch.randn(1, 1, 8, 8, 8)
    expected = network(x)
    for _, layer in maskable_layers(network):
        layer.dense_gradients = dense_gradients
        layer.weight.data[~layer.mask] = value
    assert torch.equal(network(x), expected)


def test_gradients_of_inactive_weights_are_zero_unless_asked_for() -> None:
    network = small(feature_sparsity=0.6)
    x = torch.randn(1, 1, 8, 8, 8)
    network(x).square().sum().backward()
    layers = [layer for _, layer in maskable_layers(network)]
    assert all(layer.weight.grad[~layer.mask].abs().sum() == 0 for layer in layers)
    active = [layer.weight.grad[layer.mask].clone() for layer in layers]
    network.zero_grad()
    for layer in layers:
        layer.dense_gradients = True
    network(x).square().sum().backward()
    assert all(layer.weight.grad[~layer.mask].abs().sum() > 0 for layer in layers)
    assert all(torch.allclose(layer.weight.grad[layer.mask], a) for layer, a in zip(layers, active, strict=True))


def test_topology_travels_in_the_state_dict() -> None:
    source, target = small(feature_sparsity=0.8), small(feature_sparsity=0.8)
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(source(x), target(x))
    assert accounts.parameter_counts(source) == accounts.parameter_counts(target)


# --- a good citizen of nnU-Net ------------------------------------------------------------------------------------------


def test_stock_nnunet_builds_it_from_plans_alone() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    entry = architecture([4, 8, 16], strides, NETWORK_CLASS_NAME, feature_sparsity=0.75, shift_size=5)
    network = get_network_from_plans(*entry.values(), 2, 3, deep_supervision=True)
    assert isinstance(network, E2ENet)
    assert network.shift_size == 5
    assert all(layer.n_active == round(0.25 * layer.n_connections) for _, layer in maskable_layers(network))
    assert all(layer.weight[~layer.mask].abs().sum() == 0 for _, layer in maskable_layers(network))
    assert [o.shape for o in network(torch.randn(1, 2, 4, 8, 8))] == [(1, 3, 4, 8, 8)]


def test_attributes_of_dynamic_network_architectures() -> None:
    network = small(levels=5)
    assert network.encoder.output_channels == [4, 6, 8, 10, 12]
    assert network.decoder.seg_layers[-1].in_channels == 4  # finest last, as in nnU-Net's decoder
    assert any(".seg_layers." in key for key in network.state_dict())


def test_initialisation_is_he_normal() -> None:
    """Of all convolutions, heads among them, with the slope of the leaky ReLU; biases are zero."""
    torch.manual_seed(0)
    network = small(features_per_stage=[32, 48, 64], feature_sparsity=0.0, deep_supervision=True)
    convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    assert len(convolutions) == 6 + 3 * 2 + 2 + 1
    for module in convolutions:
        deviation = (2 / (1 + 0.01**2) / module.weight[0].numel()) ** 0.5  # PyTorch's fan in, also of transposed ones
        assert module.weight.std().item() == pytest.approx(deviation, rel=3 / module.weight.numel() ** 0.5)
        assert module.bias is None or not module.bias.any()
        torch.manual_seed(0)
        E2ENet.initialize(module)
        torch.manual_seed(0)
        assert torch.equal(module.weight, nn.init.kaiming_normal_(torch.empty_like(module.weight), a=0.01))


# --- accounts -----------------------------------------------------------------------------------------------------------


def test_dense_counts_of_the_amos_plan() -> None:
    network = amos()
    counts, macs = accounts.parameter_counts(network), accounts.multiply_accumulates(network, (1, 1, 64, 160, 160))
    assert counts == (23_806_928, 17_975_040, 23_806_928)
    assert [round(m / 1e7) for m in macs] == [113441, 101011, 113441]


@pytest.mark.parametrize(
    ("sparsity", "parameters", "macs"),
    [(0.7, 11_224_385, 427_294_873_600), (0.8, 9_426_911, 326_352_742_400), (0.9, 7_629_395, 225_318_809_600)],
)
def test_sparse_counts_of_the_amos_plan(sparsity: float, parameters: int, macs: int) -> None:
    """The paper's 11.224, 9.427 and 7.629 M, and 427.3, 326.3 and 225.3 G, where each layer's active connections are whole."""
    network = amos(sparsity)
    assert accounts.parameter_counts(network).active == parameters
    assert accounts.multiply_accumulates(network, (1, 1, 64, 160, 160)).active == macs


def test_feature_maps_are_counted_as_nnunet_counts_them() -> None:
    stock = plain_conv_unet()
    assert accounts.conv_output_elements(stock, (1, 1, 64, 160, 160)) == stock.compute_conv_feature_map_size((64, 160, 160))
    assert accounts.parameter_counts(stock).total == 31_124_368


def test_saved_bytes_are_those_of_a_real_forward_pass() -> None:
    """On the CPU, with tensors that hold values and a tally of its own."""
    network = small(levels=4, feature_sparsity=0.5, deep_supervision=True)
    own = {p.data_ptr() for p in network.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = network(torch.randn(2, 1, 8, 16, 16))
    expected = sum(t.untyped_storage().nbytes() for pointer, t in seen.items() if pointer not in own)
    # masks are the network's own too, but they are of the size of connections, not of maps
    assert network.saved_bytes((8, 16, 16), batch_size=2) == expected
    assert len(outputs) == 2


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_sparsity": 1.0}, "feature_sparsity is 1.0"),
        ({"feature_sparsity": -0.1}, "feature_sparsity is -0.1"),
        ({"feature_sparsity": "0.8"}, "feature_sparsity is '0.8'"),
        ({"shift_size": 4}, "shift_size is 4"),
        ({"n_stages": 1, "features_per_stage": [4], "strides": [[1, 1, 1]]}, "at least 2"),
        ({"features_per_stage": [4, 8]}, "features_per_stage"),
        ({"strides": [[1, 1, 1], [2, 2], [2, 2, 2]]}, "strides"),
        ({"conv_op": nn.Conv1d}, "conv_op"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(E2ENetError, match=message) as error:
        small(**arguments)
    assert "\n" not in str(error.value)


def test_patches_that_the_strides_do_not_divide_are_refused() -> None:
    with pytest.raises(E2ENetError, match=r"patch \[8, 10, 8\].*\[4, 4, 4\]"):
        small()(torch.randn(1, 1, 8, 10, 8))
    with pytest.raises(E2ENetError, match="2 axes"):
        small().compute_conv_feature_map_size((8, 8))
