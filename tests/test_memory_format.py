"""Channels-last networks compute what others do, and none of their convolutions has to convert its maps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.deployment.packing import pack
from nnunetv2_e2enet.dsff import CosineSchedule, TopologyUpdater, Uniform, random_topology
from nnunetv2_e2enet.network import E2ENet, convolution, maskable_layers, store_active_only
from nnunetv2_e2enet.network import _raw_map as raw_map
from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.depth_shift import join, separate
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST, empty_like, is_channels_last, memory_format
from nnunetv2_e2enet.settings import override

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def small(dimension: int = 3, active_only: bool = False, **kwargs: Any) -> E2ENet:
    torch.manual_seed(0)
    strides = [stride[-dimension:] for stride in ([1, 1, 1], [1, 2, 2], [2, 2, 2])]
    conv = nn.Conv3d if dimension == 3 else nn.Conv2d
    network = E2ENet(2, 3, 3, [4, 6, 8], conv, strides, deep_supervision=True, feature_sparsity=0.5, **kwargs)
    if active_only:
        for _, layer in maskable_layers(network):
            layer.share_inputs(2, equal_blocks=True)
        random_topology(network, 0.5, Uniform(), 0)
        for _, layer in maskable_layers(network):
            store_active_only(layer)
    return network.to(DEVICE)


def channels_last(network: E2ENet) -> E2ENet:
    return deepcopy(network).to(memory_format=CHANNELS_LAST[network.dimension])


def image(dimension: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 2, *[8] * dimension, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(DEVICE)


class Formats:
    """Notes whether convolutions read channels-last maps, and whether those of blocks get channels-last gradients.

    The first convolution is left out: it reads the image, which nnU-Net lays out as ever.

    Args:
        as_in_half_precision: let all convolutions write channels-last maps and gradients, as cuDNN's of half precision do for
            channels-last weights; those of double precision, and of a CPU in 3D, do not.
    """

    def __init__(self, network: E2ENet, as_in_half_precision: bool) -> None:
        self.last, self.convert = CHANNELS_LAST[network.dimension], as_in_half_precision
        self.inputs: list[bool] = []
        self.gradients: list[bool] = []
        in_blocks = [block.conv for block in network.modules() if isinstance(block, ShiftBlock)]
        for module in network.modules():
            if isinstance(module, CONVOLUTIONS):
                if module is not in_blocks[0]:
                    module.register_forward_pre_hook(self.reads)
                module.register_forward_hook(self.writes_in_block if module in in_blocks else self.writes)

    def converted(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.last) if self.convert else x

    def reads(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        self.inputs.append(is_channels_last(x))
        if x.requires_grad:
            x.register_hook(self.converted)

    def writes(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return self.converted(output)

    def writes_in_block(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = self.converted(output)
        if output.requires_grad:
            output.register_hook(lambda grad: self.gradients.append(is_channels_last(grad)))
        return output

    def check(self) -> None:
        assert len(self.inputs) > 10
        assert all(self.inputs)
        assert all(self.gradients)


def step(network: E2ENet, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = network(x)
    sum((o.square().mean() + o.sin().mean() for o in outputs), x.new_zeros(())).backward()
    return outputs, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("active_only", [False, True])
@pytest.mark.parametrize("recompute", ["none", "blocks", "nodes"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_a_training_step_is_the_same(dimension: int, recompute: str, active_only: bool) -> None:
    network = small(dimension, active_only).double()
    network.recompute = recompute
    last = channels_last(network)
    formats = Formats(last, as_in_half_precision=True)
    x = image(dimension)
    outputs, expected = step(network, x)
    found_outputs, found = step(last, x)
    formats.check()
    assert formats.gradients
    for output, found_output in zip(outputs, found_outputs, strict=True):
        torch.testing.assert_close(found_output, output)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("fused_kernels")
def test_fused_kernels_keep_the_format_as_well() -> None:
    x = image()[:1, :, :4]
    with override(kernels="off"):
        network = small().double()
        outputs, expected = step(network, x)
    last = channels_last(network)
    formats = Formats(last, as_in_half_precision=True)
    found_outputs, found = step(last, x)
    formats.check()
    for output, found_output in zip(outputs, found_outputs, strict=True):
        torch.testing.assert_close(found_output, output)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("active_only", [False, True])
@pytest.mark.parametrize("dimension", [2, 3])
def test_formats_follow_from_the_weights_alone(dimension: int, active_only: bool) -> None:
    """With the device's own convolutions of single precision, in training and in prediction."""
    network = small(dimension, active_only)
    last = channels_last(network)
    formats = Formats(last, as_in_half_precision=False)
    _, expected = step(network, image(dimension, torch.float32))
    _, found = step(last, image(dimension, torch.float32))
    formats.check()
    assert formats.gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * max(1, gradient.abs().max().item()))
    formats.inputs.clear()
    with torch.no_grad(), engine.disabled():
        last.eval()(image(dimension, torch.float32))
    formats.check()


def test_networks_that_are_not_converted_are_as_ever() -> None:
    network = small()
    formats = Formats(network, as_in_half_precision=False)
    step(network, image(3, torch.float32))
    assert not any(formats.inputs + formats.gradients)


@pytest.mark.parametrize(
    "options", [{"learned_shift": True}, {"norm_op": nn.BatchNorm3d}, {"nonlin": nn.SiLU, "nonlin_kwargs": {}}]
)
def test_other_blocks_compute_the_same(options: dict[str, Any]) -> None:
    network = small(**options).double()
    last = channels_last(network)
    Formats(last, as_in_half_precision=True)
    _, expected = step(network, image())
    _, found = step(last, image())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("active_only", [False, True])
def test_weights_stay_channels_last_through_updates_and_checkpoints(active_only: bool) -> None:
    network = small(active_only=active_only)
    last = channels_last(network)
    formats = {name: memory_format(p) for name, p in last.named_parameters()}
    assert CHANNELS_LAST[3] in formats.values()
    state = last.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    optimizer = torch.optim.SGD(last.parameters(), 0.01, momentum=0.9)
    update = TopologyUpdater(last, CosineSchedule(10, 1), seed=0).update(1, optimizer)
    assert update is not None
    assert update.replaced > 0
    network.load_state_dict(last.state_dict())
    again = channels_last(small(active_only=active_only))
    again.load_state_dict(network.state_dict())
    for each in (last, again):
        assert {name: memory_format(p) for name, p in each.named_parameters()} == formats
    arrays, expected = (pack({k: v.cpu() for k, v in each.state_dict().items()}, each) for each in (again, network))
    for name, array in expected.items():
        assert arrays[name].tobytes() == array.tobytes()


# --- convolutions over slices -------------------------------------------------------------------------------------------


def convolved(layer: nn.Conv3d, x: Tensor, with_bias: bool, over_slices: str) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients of map, weight and bias, and how often the path over slices was taken."""
    bias = layer.bias if with_bias else None
    inputs = [x, layer.weight, *([bias] if bias is not None else [])]
    with (
        override(plane_convolutions=over_slices),
        patch.object(convolution, "over_slices", wraps=convolution.over_slices) as path,
    ):
        out = convolution.conv3d(layer, x, layer.weight, bias, layer.groups)
        gradients = torch.autograd.grad((out.sin() + out.square()).sum(), inputs)
    return out, list(gradients), path.call_count


@settings(deadline=None, max_examples=50)
@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.just(0), st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    with_bias=st.booleans(),
)
def test_convolutions_over_slices(
    groups: int,
    channels: tuple[int, int],
    size: tuple[int, int, int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    with_bias: bool,
) -> None:
    """What they compute is what those of volumes do, also at odd sizes and for kernels that are no squares."""
    torch.manual_seed(0)
    inputs, outputs = (groups * n for n in channels)
    layer = nn.Conv3d(inputs, outputs, kernel, stride, padding, dilation, groups, dtype=torch.float64, device=DEVICE)
    batch, *spatial = size
    x = torch.randn(batch, inputs, *spatial, dtype=torch.float64, device=DEVICE)
    last = x.contiguous(memory_format=CHANNELS_LAST[3]).requires_grad_()
    expected_output, expected, of_volumes = convolved(layer, last, with_bias, "off")
    output, gradients, of_slices = convolved(layer, last, with_bias, "on")
    assert (of_volumes, of_slices) == (0, int(inputs > 1))  # a map of one channel is laid out either way
    torch.testing.assert_close(output, expected_output)
    for found, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": (3, 3, 3)},
        {"stride": (2, 1, 1)},
        {"padding": (1, 1, 1)},
        {"padding": "same"},
        {"padding_mode": "circular"},
    ],
)
def test_convolutions_that_are_not_over_slices(options: dict[str, Any]) -> None:
    """Kernels, strides or padding along the depth, other padding, and maps that are not channels-last."""
    torch.manual_seed(0)
    layer = nn.Conv3d(4, 5, **{"kernel_size": (1, 3, 3), "padding": (0, 1, 1), **options}, dtype=torch.float64, device=DEVICE)
    x = image().repeat(1, 2, 1, 1, 1).requires_grad_()
    maps = [x, x.detach().contiguous(memory_format=CHANNELS_LAST[3]).requires_grad_()][: 2 if options else 1]
    for each in maps:
        output, _, of_slices = convolved(layer, each, True, "on")
        assert of_slices == 0
        torch.testing.assert_close(output, layer(each))


def test_blocks_of_channels_last_networks_convolve_over_slices() -> None:
    """All that have a channels-last map and no stride in depth, in a training step that recomputes nothing."""
    network = channels_last(small().double())
    network.recompute = "none"
    Formats(network, as_in_half_precision=True)
    blocks = [module.conv for module in network.modules() if isinstance(module, ShiftBlock)]
    flat = [conv for conv in blocks[1:] if conv.kernel_size[0] == conv.stride[0] == 1]
    assert 5 < len(flat) < len(blocks) - 1
    outputs, expected = step(network, image())
    network.zero_grad()
    with override(plane_convolutions="on"), patch.object(convolution, "over_slices", wraps=convolution.over_slices) as path:
        found_outputs, found = step(network, image())
    assert path.call_count == len(flat)
    for output, found_output in zip(outputs, found_outputs, strict=True):
        torch.testing.assert_close(found_output, output)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# --- what reads maps ----------------------------------------------------------------------------------------------------


def test_what_counts_as_channels_last() -> None:
    x = torch.zeros(2, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    assert is_channels_last(x)
    assert is_channels_last(torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last))
    assert not is_channels_last(x.contiguous())
    assert not is_channels_last(x[:, :2])  # not contiguous at all
    assert not is_channels_last(x[:, :1].contiguous(memory_format=torch.channels_last_3d))  # contiguous either way
    assert not is_channels_last(torch.zeros(3, 2).T)
    assert empty_like(x, 7, torch.float16).is_contiguous(memory_format=torch.channels_last_3d)
    assert empty_like(x[:, :2], 7).is_contiguous()


@pytest.mark.parametrize("dimension", [2, 3])
def test_gathered_inputs_keep_the_format(dimension: int) -> None:
    layer = next(layer for _, layer in maskable_layers(small(dimension, active_only=True)))
    x = torch.randn(2, layer.n_inputs, *[4] * dimension, device=DEVICE, requires_grad=True)
    expected, *_ = layer.grouped(x)
    last = x.contiguous(memory_format=CHANNELS_LAST[dimension])
    found, *_ = layer.grouped(last)
    assert is_channels_last(found)
    assert not is_channels_last(expected)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sin().sum(), last)
    assert is_channels_last(gradient)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sin().sum(), x)[0])


def test_passes_keep_the_format_of_their_map() -> None:
    last = torch.channels_last_3d
    x, other, grad = (torch.randn(2, c, 5, 4, 3, dtype=torch.float64) for c in (5, 4, 9))
    mean, rstd = raw_map.statistics(x, 1e-3)
    scale, offset = (t.reshape(2, 5, 1, 1, 1) for t in (rstd, -mean * rstd))
    maps = [raw_map.RawMap(x, scale, offset, 0.1), other]
    of_norm = (mean, rstd, scale, offset, 0.1)

    for found, expected in zip(raw_map.statistics(x.contiguous(memory_format=last), 1e-3), (mean, rstd), strict=True):
        torch.testing.assert_close(found, expected)
    for gradient in (grad[:, :5], grad[:, :5].contiguous(memory_format=last)):
        results = raw_map.norm_gradient(gradient, x.contiguous(memory_format=last), *of_norm)
        assert is_channels_last(results[0])
        for found, expected in zip(results, raw_map.norm_gradient(grad[:, :5], x, *of_norm), strict=True):
            torch.testing.assert_close(found, expected)
    joined = join([maps[0]._replace(raw=x.contiguous(memory_format=last)), other], 3)
    assert is_channels_last(joined)
    torch.testing.assert_close(joined, join(maps, 3))
    parts = separate(grad.contiguous(memory_format=last), [5, 4], 3)
    assert all(map(is_channels_last, parts))
    for part, expected in zip(parts, separate(grad, [5, 4], 3), strict=True):
        assert torch.equal(part, expected)
