"""The CPU engine: the same logits as PyTorch, from active connections alone, and PyTorch wherever it does not fit."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from timeit import Timer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KERNELS, assert_same_logits, both_ways, change_eps, drawn_network, make_network, needs_core, uses_engine
from torch import Tensor, nn
from torch.func import functional_call

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine import core
from nnunetv2_e2enet.engine.core import Core, load_core
from nnunetv2_e2enet.engine.fingerprint import Fingerprint
from nnunetv2_e2enet.engine.prediction import session_of
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.fusion import FusionNode
from nnunetv2_e2enet.settings import override


@pytest.fixture(scope="module", autouse=True)
def on_small_networks_too() -> Iterator[None]:
    with override(engine="on"):
        yield


@st.composite
def networks_and_inputs(draw: st.DrawFn) -> tuple[E2ENet, Tensor]:
    network, divisor = drawn_network(draw, [1, 2, 2, 2, 3, 4], biases=True)
    most = 60 if len(divisor) == 2 else 24
    size = [d * draw(st.integers(1, max(1, most // d))) for d in divisor]
    if all(s == d for s, d in zip(size, divisor, strict=True)):
        size[-1] += divisor[-1]  # one voxel at the coarsest level has no instance norm
    x = torch.randn(draw(st.integers(1, 2)), network.input_channels, *size, generator=torch.Generator().manual_seed(1))
    return network.eval(), x * draw(st.sampled_from([1.0, 30.0])) + draw(st.sampled_from([0.0, 5.0]))


def assert_as_exact_as_pytorch(network: E2ENet, x: Tensor) -> None:
    """Every logit within 1e-3 of the largest of the exact ones, unless PyTorch in float32 is nearly as far from them.

    A level of two or three voxels can have next to no variance, and its norm then multiplies everyone's rounding errors by
    thousands. Winograd's are larger than those of a direct convolution, 3 times in the median of such networks.
    """
    ours, single = both_ways(network, x)
    with torch.inference_mode(), engine.disabled():
        exact = copy.deepcopy(network).double()(x.double())
    for a, b, c in zip(ours, single, exact if isinstance(exact, list) else [exact], strict=True):
        assert a.shape == c.shape
        assert (a - c).abs().max() <= max(1e-3 * c.abs().max(), 50 * (b - c).abs().max())


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a compiler the package installs without its core")
def test_core_was_built_where_a_compiler_is() -> None:
    assert isinstance(engine.load_core(), Core), engine.load_core()


@needs_core
@settings(max_examples=40, deadline=None)
@given(networks_and_inputs(), st.sampled_from(KERNELS or ["none"]))
def test_logits_are_pytorchs(case: tuple[E2ENet, Tensor], kernels: str) -> None:
    with override(engine_kernels=kernels):
        assert_as_exact_as_pytorch(*case)


@needs_core
@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(networks_and_inputs(), st.sampled_from(KERNELS or ["none"]))
def test_logits_are_pytorchs_at_length(case: tuple[E2ENet, Tensor], kernels: str) -> None:
    test_logits_are_pytorchs.hypothesis.inner_test(case, kernels)


@needs_core
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("strides", "size"),
    [
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], (6, 36, 28)),
        ([[1, 1, 1], [1, 2, 2], [1, 2, 2]], (1, 84, 100)),
        ([[1, 1, 1], [2, 1, 2], [1, 2, 1], [2, 2, 2]], (12, 20, 28)),
        ([[1, 1, 1], [3, 3, 3], [1, 1, 1]], (9, 27, 33)),
        ([[1, 1, 1], [1, 4, 4], [1, 1, 2]], (2, 32, 400)),
        ([[1, 1], [2, 2], [2, 2]], (40, 300)),
    ],
)
def test_every_kind_of_kernel(
    strides: list[list[int]], size: tuple[int, ...], kernels: str, setting: Callable[..., None]
) -> None:
    setting(engine_kernels=kernels)
    assert_same_logits(make_network(strides, deep_supervision=True), torch.randn(2, 1, *size))


class RoundedNorm(nn.Module):
    """Instance norm of a map that is stored in float16: its statistics are those of the map before."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.flatten(2), dim=2, correction=0)
        scale = self.norm.weight / torch.sqrt(variance + self.norm.eps)
        offset = self.norm.bias - mean * scale
        over_voxels = (*scale.shape, *[1] * (x.dim() - 2))
        return x.half().to(x.dtype) * scale.reshape(over_voxels) + offset.reshape(over_voxels)


def with_rounded_maps(network: E2ENet) -> E2ENet:
    """The same in double precision, but for its image, conv outputs and upsampled maps, which are rounded to float16."""
    rounded = copy.deepcopy(network).double()
    rounded.register_forward_pre_hook(lambda _, x: (x[0].half().double(),))
    for module in list(rounded.modules()):
        if isinstance(module, ShiftBlock):
            module.norm = RoundedNorm(module.norm)
            if module.conv.bias is not None:
                nn.init.zeros_(module.conv.bias)  # which the norm removes, and the engine never adds
        if isinstance(module, FusionNode):
            module.upsample.register_forward_hook(lambda _module, _inputs, x: x.half().double())
    return rounded


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


FLOAT16_KERNELS = [name for name in engine.KERNELS if not isinstance(engine.load_core(name, "float16"), str)]


@needs_core
@pytest.mark.parametrize("kernels", FLOAT16_KERNELS)
@pytest.mark.parametrize(
    ("strides", "size"),
    [
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], (6, 36, 28)),
        ([[1, 1, 1], [2, 1, 2], [1, 2, 1], [2, 2, 2]], (12, 20, 28)),
        ([[1, 1, 1], [3, 3, 3], [1, 1, 1]], (9, 27, 33)),
        ([[1, 1], [2, 2], [2, 2]], (40, 300)),
    ],
)
def test_maps_in_float16_are_rounded_and_nothing_else(
    strides: list[list[int]], size: tuple[int, ...], kernels: str, setting: Callable[..., None]
) -> None:
    setting(engine_kernels=kernels, engine_storage="float16")
    shares = []
    for seed in range(4):
        network, x = make_network(strides, deep_supervision=True, seed=seed), torch.randn(2, 1, *size)
        ours, exact = both_ways(network, x)
        with torch.inference_mode():
            rounded = with_rounded_maps(network)(x.double())
        for a, b, c in zip(ours, rounded, exact, strict=True):
            assert rms(b - c) > 2e-4 * rms(c)
            if kernels == "amx":  # its products round to 16 bits, which is more often another last bit of a pixel
                assert rms(a - c) < 1.25 * rms(b - c)
            else:
                shares.append(rms(a - b) / rms(b - c))
    # A last bit of difference before rounding is now and then one of a pixel after it, on some CPUs and for some networks more
    # often than on others. What rounded anything else would be 1.4: its errors would have nothing to do with these.
    assert kernels == "amx" or np.sqrt(np.mean(np.square(shares))) < 0.5


@needs_core
@pytest.mark.parametrize("kernels", FLOAT16_KERNELS)
def test_storage_in_float16_is_opt_in_and_half_as_large(kernels: str, setting: Callable[..., None]) -> None:
    setting(engine_kernels="" if kernels == "amx" else kernels)
    network, x = make_network(), torch.randn(1, 1, 16, 64, 64)
    x[0, 0, 3, 5, 7:9] = torch.tensor([torch.finfo(torch.float32).max, 1e-42])  # its square is infinite; next to nothing
    bytes_of, logits = {}, {}
    for storage in (None, "float16", "float32"):
        if storage is not None:
            setting(engine_storage=storage)
        for kind, image in {
            "finite": x.clamp(-9, 9),
            "overflow": x,
            "not a number": x.masked_fill(x == x[0, 0, 0, 0, 0], torch.nan),
        }.items():
            with torch.inference_mode():
                logits[storage, kind] = network(image)
        bytes_of[storage] = sum(program.n_bytes for program in session_of(network).idle_programs())
    assert engine.status().storage == "float32"
    assert torch.equal(logits[None, "finite"], logits["float32", "finite"])
    difference = rms(logits["float16", "finite"] - logits[None, "finite"]) / rms(logits[None, "finite"])
    assert 1e-4 < difference < 5e-3
    assert logits["float16", "not a number"].isnan().all()
    assert logits["float16", "overflow"].isnan().all()
    assert bytes_of[None] == bytes_of["float32"]
    assert bytes_of["float16"] < 0.8 * bytes_of["float32"]  # of which the scratch memory of each thread stays float32


def scaled(network: E2ENet, part: str, factor: float) -> E2ENet:
    """The network with the weights of its convs, or of its norms, multiplied."""
    for module in network.modules():
        parts: list[nn.Module] = []
        if isinstance(module, ShiftBlock):
            parts = [module.conv if part == "convs" else module.norm]
        elif isinstance(module, FusionNode) and part == "convs":
            parts = [module.upsample]
        for weight in (p for child in parts for p in child.parameters()):
            weight.data.mul_(factor)
    return network


@needs_core
@pytest.mark.parametrize("kernels", FLOAT16_KERNELS)
@pytest.mark.parametrize("factor", [1e-4, 1e4, 1e9])
@pytest.mark.parametrize("part", ["image", "convs", "norms"])
def test_float16_has_the_range_for_any_scale(part: str, factor: float, kernels: str, setting: Callable[..., None]) -> None:
    setting(engine_kernels=kernels, engine_storage="float16")
    network, x = make_network(features=[12, 24, 36], deep_supervision=True), torch.randn(1, 1, 8, 48, 48)
    if part == "image":
        x *= factor
    else:
        scaled(network, part, factor)
    ours, _ = both_ways(network, x)
    with torch.inference_mode():  # squares of outputs of 1e18 are more than float32 holds
        exact = copy.deepcopy(network).double()(x.double())
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= 5e-3 * b.abs().max()


@needs_core
def test_outliers_and_constants_stay_in_the_range_of_float16(setting: Callable[..., None]) -> None:
    """One voxel that is all there is of an image, and weights of one sign, which add up."""
    setting(engine_storage="float16")
    network = make_network(features=[12, 24, 36])
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ShiftBlock):
                module.conv.weight.abs_()
    outlier = torch.zeros(1, 1, 16, 64, 64)
    outlier[0, 0, 8, 30, 31] = 1e6
    for x in (outlier, outlier - 3e4, torch.randn(1, 1, 16, 64, 64).exp() ** 5):
        ours, theirs = both_ways(network, x)
        assert (ours[0] - theirs[0]).abs().max() <= 5e-3 * theirs[0].abs().max()


@needs_core
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_wide_layers(sparsity: float) -> None:
    network = make_network([[1, 1, 1], [1, 2, 2], [2, 2, 2]], [40, 150, 300], feature_sparsity=sparsity, shift_size=7)
    assert_same_logits(network, torch.randn(1, 1, 8, 48, 48))


@needs_core
@pytest.mark.parametrize("kernels", FLOAT16_KERNELS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_wide_layers_in_float16(sparsity: float, kernels: str, setting: Callable[..., None]) -> None:
    """Dense products of all sizes: inputs of several passes, groups of outputs that are not full, one input."""
    setting(engine_kernels=kernels, engine_storage="float16")
    network = make_network(
        [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [40, 150, 300], feature_sparsity=sparsity, shift_size=7, num_classes=19
    )
    ours, theirs = both_ways(network, torch.randn(1, 1, 8, 48, 48))
    assert (ours[0] - theirs[0]).abs().max() <= 5e-3 * theirs[0].abs().max()


@needs_core
def test_the_default_dtype_does_not_matter() -> None:
    """Wide layers are computed in chunks of inputs, which 8 bits do not number."""
    network, x = make_network(features=[40, 150, 300]), torch.randn(1, 1, 4, 16, 16)
    with torch.inference_mode():
        expected = network(x)
        engine.release(network)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            found = network(x)
        finally:
            torch.set_default_dtype(default)
    assert engine.why_pytorch(network) is None
    assert torch.equal(found, expected)


@needs_core
def test_large_mean_does_not_cancel() -> None:
    network = make_network()
    assert_same_logits(network, torch.randn(1, 1, 8, 32, 32) + 1000)


@needs_core
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("strides", [[[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 2, 2], [1, 2, 2], [2, 2, 2]]])
def test_a_pixel_far_from_all_others_does_not_cancel(
    kernels: str, strides: list[list[int]], setting: Callable[..., None]
) -> None:
    """Wherever it lies: sums of the norms are gathered around some pixels of their own."""
    setting(engine_kernels=kernels)
    network = make_network(strides, [12, 24, 36])
    exact = copy.deepcopy(network).double()
    for place in ((0, 0, 0), (3, 4, 8), (5, 17, 31)):
        x = torch.randn(1, 1, 8, 64, 64)
        x[(0, 0, *place)] = 1e5
        ours, _ = both_ways(network, x)
        with torch.inference_mode():
            expected = exact(x.double())
        assert (ours[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_core_of_other_tiles_or_points_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structs may be of the same sizes."""
    if isinstance(core._library(), str):
        pytest.skip("the compiled core was not built")
    for name, value in {"POINTS": (0, 1, -1, 2, -2), "CHUNK": 32, "TIMERS": core.TIMERS[:-1]}.items():
        with monkeypatch.context() as patch:
            patch.setattr(core, name, value)
            assert "is of another version of this package: reinstall it" in core._library.__wrapped__()


@needs_core
def test_weights_and_masks_changed_in_place_are_followed() -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    assert_same_logits(network, x)
    head = network.decoder.seg_layers[-1]
    changes: list[Callable[[], object]] = [
        lambda: head.weight.data.mul_(2),  # version counters do not see this one
        lambda: network.encoder.stages[0][0].conv.weight.data.add_(0.1),
        lambda: network.decoder.stages[0][0].upsample.mask.zero_(),
        lambda: network.decoder.stages[0][0].blocks[0].conv.set_random_topology(7),
        lambda: setattr(head, "weight", nn.Parameter(torch.randn_like(head.weight))),
    ]
    before = both_ways(network, x)[0][0]
    for change in changes:
        with torch.no_grad():
            change()
        assert_same_logits(network, x)
        after = both_ways(network, x)[0][0]
        assert not torch.equal(before, after)
        before = after


@needs_core
def test_any_byte_that_changes_unseen_is_noticed_within_a_few_patches() -> None:
    core = load_core()
    assert isinstance(core, Core)
    tensors = [torch.zeros(1 << 19) for _ in range(6)]  # 2 MiB each
    fingerprint = Fingerprint.take(tensors, core)
    assert all(fingerprint.holds(tensors, core) for _ in range(10))
    tensors[4].data[12345] = 1.0
    assert not all(fingerprint.holds(tensors, core) for _ in range(6))
    tensors[4][12345] = 0.0  # seen at once, although the content is the old one again
    assert not fingerprint.holds(tensors, core)
    assert fingerprint.same_content(Fingerprint.take(tensors, core))


@needs_core
def test_weights_that_lie_where_others_did_are_noticed() -> None:
    """As memory that was freed is given out again. One value of a large weight differs, which a sample does not see."""
    network, x = make_network(features=[40, 150, 300]), torch.randn(1, 1, 4, 16, 16)
    name = "decoder.stages.1.0.blocks.0.conv"
    layer = network.get_submodule(name)
    memory = layer.weight.detach().numpy().copy()
    logits = []
    with torch.no_grad():
        for place in layer.mask.nonzero()[100:104].tolist():
            memory[(*place, 0, 1, 1)] += 100
            weights = {f"{name}.weight": torch.from_numpy(memory)}
            logits.append(functional_call(network, weights, x))
            assert engine.why_pytorch(network) is None
            with engine.disabled():
                torch.testing.assert_close(logits[-1], functional_call(network, weights, x), atol=1e-3, rtol=1e-3)
    assert not any(torch.equal(a, b) for a, b in pairwise(logits))


@needs_core
def test_a_weight_of_the_same_bytes_and_another_shape_is_pytorchs_error() -> None:
    network, x = make_network(), torch.randn(1, 1, 4, 16, 16)
    assert uses_engine(network, x)
    head = network.decoder.seg_layers[-1]
    head.weight = nn.Parameter(head.weight.detach().reshape(5, 3, 1, 1, 1))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="to have 3 channels"):
        network(x)


@needs_core
def test_connections_that_trade_places_are_noticed() -> None:
    """Topologies on the same weights, whose masks differ in ways that simple sums do not see."""
    network = make_network([[1, 1, 1], [1, 2, 2]], [64, 64], feature_sparsity=0.0)
    x = torch.randn(1, 1, 4, 32, 32)
    conv = network.decoder.stages[0][0].blocks[0].conv
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        conv.mask[:16].zero_()
        conv.mask[0, 19] = True
        conv.mask[9:16, ::4] = torch.eye(7, conv.in_channels // 4).bool()
        assert_same_logits(network, x)
        before = both_ways(network, x)[0][0]
        changed = conv.mask.clone()
        changed[0, 19], changed[8, 19] = False, True
        conv.mask.copy_(changed)
        found, expected = (logits[0] for logits in both_ways(network, x))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.equal(found, before)
        for _ in range(20):  # swaps that leave each map as many connections as before
            before, changed = found, conv.mask.clone()
            a, b = (9 + torch.randperm(7, generator=generator)[:2]).tolist()
            of_a, of_b = (int(changed[row].nonzero()[0]) for row in (a, b))
            changed[a, of_a], changed[b, of_b], changed[a, of_b], changed[b, of_a] = False, False, True, True
            conv.mask.copy_(changed)
            found, expected = (logits[0] for logits in both_ways(network, x))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert not torch.equal(found, before)


@needs_core
def test_dropout_that_stays_on_is_left_to_pytorch() -> None:
    """As for Monte Carlo dropout."""
    network = make_network(dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.5})
    x = torch.randn(1, 1, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), network(x))
        assert engine.why_pytorch(network) is None
        for module in network.modules():
            if isinstance(module, nn.Dropout3d):
                module.train()
        assert not torch.allclose(network(x), network(x), atol=1e-2)
        assert "is in training mode, the network is not" in str(engine.why_pytorch(network))


@needs_core
def test_hooks_of_all_modules_are_called() -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    with torch.no_grad():
        before = network(x)
        head = network.decoder.seg_layers[-1]
        hook = nn.modules.module.register_module_forward_hook(lambda m, _, out: 2 * out if m is head else None)
        try:
            assert torch.allclose(network(x), 2 * before, rtol=1e-3, atol=1e-3)
            assert "hooks" in str(engine.why_pytorch(network))
        finally:
            hook.remove()
        assert torch.equal(network(x), before)


@needs_core
def test_weights_made_in_inference_mode_are_followed() -> None:
    x = torch.randn(1, 1, 8, 32, 32)
    with torch.inference_mode():
        network = make_network()
        before = network(x)
        network.decoder.seg_layers[-1].weight.mul_(2)
        assert torch.allclose(network(x), 2 * before)
        assert engine.why_pytorch(network) is None


@needs_core
def test_load_state_dict_is_followed() -> None:
    folds = [make_network(seed=seed) for seed in range(3)]
    network, x = make_network(seed=9), torch.randn(1, 1, 8, 32, 32)
    with torch.inference_mode():
        expected = [fold(x) for fold in folds]
        for fold, logits in zip(folds, expected, strict=True):
            network.load_state_dict(fold.state_dict())
            assert torch.equal(network(x), logits)


def change_slope(network: E2ENet) -> None:
    for module in network.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.3


def change_activation(network: E2ENet) -> None:
    for module in network.modules():
        if isinstance(module, ShiftBlock):
            module.nonlin = nn.ReLU()


def change_pooling(network: E2ENet) -> None:
    for module in network.modules():
        if isinstance(module, FusionNode) and module.downsample is not None:
            module.downsample = nn.AvgPool3d(module.downsample.stride)


def pad_pooling(network: E2ENet) -> None:
    for module in network.modules():
        if isinstance(module, FusionNode) and module.downsample is not None:
            module.downsample = nn.MaxPool3d((1, 3, 3), module.downsample.stride, (0, 1, 1))


def add_softmax(network: E2ENet) -> None:
    heads = network.decoder.seg_layers
    heads[-1] = nn.Sequential(heads[-1], nn.Softmax(1))


def change_padding(network: E2ENet) -> None:
    for module in network.modules():
        if isinstance(module, ShiftBlock):
            module.conv.padding_mode = "circular"
            module.conv._reversed_padding_repeated_twice = [p for p in reversed(module.conv.padding) for _ in range(2)]


@needs_core
@pytest.mark.parametrize("strides", [[[2, 2, 2], [2, 2, 2]], [[1, 2, 2], [2, 2, 2]], [[2, 1], [2, 2]]])
def test_a_first_level_with_a_stride(strides: list[list[int]]) -> None:
    network = make_network(strides)
    assert_same_logits(network, torch.randn(2, 1, *[24] * len(strides[0])))


@needs_core
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("features", "size", "sparsity"),
    [([4, 8, *[16] * 5], 128, 0.8), ([4, 8, *[16] * 5], 128, 0.0), ([24, 48, 96, 96, 96], 48, 0.8)],
    ids=["narrow", "narrow, dense", "wide"],
)
def test_rounding_of_deep_networks(kernels: str, features: list[int], size: int, sparsity: float) -> None:
    """To 1e-4, as the method asks, and at most four times that of PyTorch. Narrow networks with all connections round most."""
    levels = len(features)
    strides = [[1, 1, 1], *[[1, 2, 2]] * (levels - 1)]
    for seed in range(3):
        torch.manual_seed(seed)
        settings = {"deep_supervision": True, "feature_sparsity": sparsity}
        network = E2ENet(1, 3, levels, features, nn.Conv3d, strides, **settings).eval()
        x = torch.randn(1, 1, 4, size, size)
        with override(engine_kernels=kernels):
            ours, theirs = both_ways(network, x)
        with torch.inference_mode(), engine.disabled():
            exact = copy.deepcopy(network).double()(x.double())
        rounding, of_pytorch = (
            max(float((a - b).abs().max()) for a, b in zip(logits, exact, strict=True)) for logits in (ours, theirs)
        )
        assert rounding <= min(1e-4, 4 * of_pytorch)


@needs_core
@pytest.mark.parametrize(
    "change", [change_eps, change_slope, change_activation, change_pooling, pad_pooling, add_softmax, change_padding]
)
def test_what_is_no_tensor_is_followed(change: Callable[[E2ENet], None]) -> None:
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2]]
    network, x = make_network(strides), torch.randn(1, 1, 8, 32, 32)
    with torch.inference_mode():
        before = network(x)
        change(network)
        found = network(x)
        with engine.disabled():
            expected = network(x)
    assert (engine.why_pytorch(network) is None) is (change in (change_eps, change_slope))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(before, expected, atol=1e-2)


@needs_core
def test_inactive_weights_have_no_effect() -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    with torch.inference_mode():
        expected = network(x)
    with torch.no_grad():
        for module in network.modules():
            if hasattr(module, "over_kernel"):
                module.weight.masked_fill_(module.over_kernel(~module.mask), float("nan"))
    with torch.inference_mode():
        assert torch.equal(network(x), expected)


@needs_core
def test_results_repeat_and_patch_sizes_alternate() -> None:
    network = make_network()
    patches = [torch.randn(1, 1, 8, 32, 32), torch.randn(1, 1, 4, 16, 48), torch.randn(1, 1, 2, 64, 8)]
    with torch.inference_mode():
        first = [network(p) for p in patches]
        for _ in range(3):
            for patch, logits in zip(patches, first, strict=True):
                assert torch.equal(network(patch), logits)


@needs_core
def test_input_in_any_memory_order() -> None:
    network = make_network(input_channels=2)
    x = torch.randn(2, 2, 8, 32, 32).to(memory_format=torch.channels_last_3d)
    assert_same_logits(network, x)
    assert_same_logits(network, torch.randn(2, 2, 8, 64, 32)[..., ::2, :])


@needs_core
def test_weights_in_any_memory_order() -> None:
    assert_same_logits(make_network().to(memory_format=torch.channels_last_3d), torch.randn(1, 1, 8, 32, 32))


@needs_core
def test_two_threads_at_once() -> None:
    network = make_network()
    patches = [torch.randn(1, 1, 8, 32, 32), torch.randn(1, 1, 8, 32, 32)]
    with torch.inference_mode():
        expected = [network(p) for p in patches]
    wrong: list[int] = []

    def predict(index: int) -> None:
        with torch.inference_mode():
            for _ in range(30):
                if not torch.equal(network(patches[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_core
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_logits(network, x)
    finally:
        torch.set_num_threads(before)


@needs_core
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("strides", "patch"),
    [
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], [8, 40, 32]),
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2]], [8, 36, 52]),
        ([[1, 1, 1], [1, 1, 3], [2, 2, 1]], [6, 24, 48]),
    ],
)
def test_results_are_the_same_for_any_number_of_threads(kernels: str, strides: list[list[int]], patch: list[int]) -> None:
    x, before = torch.randn(1, 1, *patch), torch.get_num_threads()
    logits = []
    try:
        with override(engine_kernels=kernels), torch.inference_mode():
            for threads in (1, 2, 3, 7):  # with one, blocks are a thread's own, with seven they are shared
                torch.set_num_threads(threads)
                network = make_network(strides, [20, 24, 28], n_conv_per_stage=2, feature_sparsity=0.5)
                logits.append(network(x))
                assert engine.why_pytorch(network) is None
    finally:
        torch.set_num_threads(before)
    for other in logits[1:]:
        assert torch.equal(other, logits[0])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@needs_core
@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_leak(rounds: int) -> None:  # four predictions a round
    network = make_network()
    sizes = [(4, 16, 16), (8, 16, 16), (4, 32, 16), (2, 8, 8)]
    patches = [torch.randn(1, 1, *size) for size in sizes]
    with torch.inference_mode():
        for patch in patches * 5:
            network(patch)
        gc.collect()
        before = resident_bytes()
        for _ in range(rounds):
            for patch in patches:
                network(patch)
        gc.collect()
    assert resident_bytes() - before < 8 << 20


@needs_core
def test_memory_goes_with_the_network_and_on_release() -> None:
    """The process holds the maps of a patch after a prediction, and neither after a release nor without the network.

    At once: Python's collector of cycles may not run for hours.
    """
    patch = torch.randn(1, 1, 32, 128, 128)
    maps = 16 * patch.nbytes  # of the finest level; the engine needs some more
    networks = [make_network(features=[16, 16, 16])]

    def growth(action: Callable[[], object]) -> int:
        before = resident_bytes()
        action()
        return resident_bytes() - before

    def predict() -> None:
        assert uses_engine(networks[0], patch)

    predict()  # whatever the first prediction of a process leaves behind
    engine.release(networks[0])
    assert growth(predict) > maps
    assert growth(lambda: engine.release(networks[0])) < -maps
    assert growth(predict) > maps
    assert growth(networks.clear) < -maps


@needs_core
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))], ids=["copy", "pickle"]
)
def test_networks_can_be_copied_and_pickled_after_a_prediction(copied: Callable[[E2ENet], E2ENet]) -> None:
    """The copy predicts with the engine, and with weights of its own."""
    network, x = make_network(), torch.randn(1, 1, 8, 32, 32)
    with torch.inference_mode():
        expected = network(x).clone()
        other = copied(network)
        assert torch.equal(other(x), expected)
        assert engine.why_pytorch(other) is None
        other.decoder.seg_layers[-1].weight.mul_(2)
        assert torch.equal(other(x), 2 * expected)
        assert torch.equal(network(x), expected)


@needs_core
def test_peak_is_that_of_a_cpu() -> None:
    """Matrix products, measured in turn, stay below it; no core does two multiply-adds of 16 floats at more than 8 GHz.

    The margin is for other work on the machine, which stops either of them.
    """
    n, threads = 512, torch.get_num_threads()
    a, b = torch.randn(n, n), torch.randn(n, n)
    timer = Timer("a @ b", globals={"a": a, "b": b})
    products, peak = 0.0, 0.0
    torch.set_num_threads(1)
    try:
        for _ in range(4):
            products = max(products, 2 * n**3 / min(timer.repeat(repeat=5, number=1)))
            peak = max(peak, engine.peak_flops(1))
    finally:
        torch.set_num_threads(threads)
    assert 0.4 * products < peak < 2 * 2 * 16 * 8e9


@needs_core
@pytest.mark.slow
def test_segmentations_of_real_scans_are_the_same(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registered: None,  # noqa: ARG001
) -> None:
    task = shared / "data" / "Task04_Hippocampus"
    if not task.is_dir():
        pytest.skip(f"needs the Hippocampus scans in {task}, which are not there")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    whole_command = importlib.import_module("whole_command")
    whole_command.prepare(tmp_path / "nnunet", task, None)
    variants = {variant.name: variant for variant in whole_command.VARIANTS}
    on, off = variants["E2ENet, engine on"], variants["E2ENet, engine off"]
    for variant in (on, off):
        whole_command.measure(
            tmp_path / "nnunet", variant, ["--save_probabilities", "--disable_tta"], whole_command.Measured()
        )
    names = sorted(path.name for path in (tmp_path / "nnunet" / "predictions" / on.name).glob("*.npz"))
    assert len(names) == 10
    for name in names:
        ours, theirs = (
            np.load(tmp_path / "nnunet" / "predictions" / variant.name / name)["probabilities"] for variant in (on, off)
        )
        difference = np.abs(
            ours - theirs
        )  # nnU-Net sums logits in half precision, and a last bit of that is now and then another
        assert np.mean(difference > 1e-3) < 1e-4
        assert difference.max() <= 1e-2
        second, first = np.sort(theirs, axis=0)[-2:]
        ties = first - second <= 2e-3
        assert ties.mean() < 0.02
        assert np.array_equal(ours.argmax(0)[~ties], theirs.argmax(0)[~ties])


@needs_core
@pytest.mark.parametrize("storage", engine.STORAGES)
def test_status_says_which_kernels_and_why(storage: str, setting: Callable[..., None]) -> None:
    setting(engine_storage=storage)
    usable = KERNELS if storage == "float32" else FLOAT16_KERNELS
    status = engine.status()
    assert status.kernels == usable[0]
    missing = [name for name in engine.KERNELS if name not in usable and (name != "amx" or storage == "float16")]
    assert all(f"no {name}" in status.reason for name in missing)
    assert ("no amx" in status.reason) == ("amx" in missing)
    setting(engine_kernels=usable[-1])
    assert f"{usable[-1]} kernels (nnUNet_e2enet_engine_kernels asks for them)" in engine.status().reason
