"""The Triton kernels against PyTorch; without a GPU in Triton's interpreter, on the CPU."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nnunetv2_e2enet.network import E2ENet, acceleration, compact, e2enet, maskable_layers, store_active_only
from nnunetv2_e2enet.network import _raw_map as raw_map
from nnunetv2_e2enet.network._raw_map import FeatureMap, RawMap, flatten
from nnunetv2_e2enet.network.depth_shift import join, separate
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST, is_channels_last
from nnunetv2_e2enet.settings import override

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAPS = [
    *[(shape, last) for shape in ((2, 3, 5, 7, 9), (2, 3, 11, 6)) for last in (False, True)],
    ((1, 2, 33, 32, 40), False),  # so large that several programs sum a channel
    ((1, 70, 5, 9, 13), True),  # and a voxel
]
"""Shape, and whether the channels come last in memory."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def kernels() -> Any:
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    from nnunetv2_e2enet import kernels

    assert DEVICE in kernels.DEVICES
    return kernels


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def random_raw_map(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> RawMap:
    per_channel = (*shape[:2], *[1] * (len(shape) - 2))
    wide = torch.promote_types(dtype, torch.float32)
    return RawMap(
        random(*shape, dtype=dtype, seed=seed),
        random(*per_channel, dtype=wide, seed=seed + 1),
        random(*per_channel, dtype=wide, seed=seed + 2),
        0.1,
    )


def in_format(x: Tensor, last: bool) -> Tensor:
    """The same values, with the channels last in memory or as ever."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim() - 2] if last else torch.contiguous_format)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "last"), MAPS)
def test_statistics(kernels: Any, shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    x = in_format(random(*shape, dtype=dtype) * 2 + 5, last)
    found, expected = kernels.statistics(x, 1e-5), raw_map.statistics(x, 1e-5)
    for f, e in zip(found, expected, strict=True):
        assert_same(f, e)


def test_statistics_of_values_far_from_zero(kernels: Any) -> None:
    x = random(1, 2, 8, 8, 8, dtype=torch.float32) + 1000
    mean, rstd = kernels.statistics(x, 0.0)
    expected_mean, expected_rstd = raw_map.statistics(x.double(), 0.0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), expected_rstd, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "last"), MAPS)
def test_gradient_of_norm_and_activation(kernels: Any, shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    x, grad = (in_format(random(*shape, dtype=dtype, seed=seed), last) for seed in (1, 2))
    mean, rstd = raw_map.statistics(x, 1e-3)
    scale, offset = (t.reshape(*shape[:2], *[1] * (len(shape) - 2)) for t in (rstd * 1.5, 0.3 - mean * rstd * 1.5))
    arguments = (grad, x, mean, rstd, scale, offset, 0.1)
    found, expected = kernels.norm_gradient(*arguments), raw_map.norm_gradient(*arguments)
    assert_same(found[0], expected[0])
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert f.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = TOLERANCE[dtype] * e.abs().max().item() * 10
        torch.testing.assert_close(f.to(e.dtype), e, atol=tolerance, rtol=0)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.booleans(), st.booleans()), min_size=1, max_size=3),
    st.integers(1, 5),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from(list(TOLERANCE)),
)
@example([(70, True, True), (1, False, True), (33, False, True)], 5, 3, torch.float32)
@example([(70, True, True), (8, True, False)], 3, 5, torch.float64)
def test_shift_and_concatenation_and_back(
    kernels: Any, maps: list[tuple[int, bool, bool]], depth: int, shift_size: int, dtype: torch.dtype
) -> None:
    given_maps: list[FeatureMap] = []
    for seed, (width, raw, last) in enumerate(maps):
        shape = (2, width, depth, 3, 4)
        x = in_format(random(*shape, dtype=dtype, seed=10 * seed), last)
        given_maps.append(random_raw_map(shape, dtype, 10 * seed)._replace(raw=x) if raw else x)
    found, expected = kernels.join(*flatten(given_maps), shift_size), join(given_maps, shift_size)
    assert_same(found, expected)
    assert is_channels_last(found) == is_channels_last(raw_map.values_of(given_maps[0]))
    widths = [width for width, *_ in maps]
    parts = kernels.separate(found, widths, shift_size)
    for part, width, e in zip(parts, widths, separate(found, widths, shift_size), strict=True):
        assert part.shape[1] == width
        assert part.stride() == e.stride()
        assert torch.equal(part, e)


@settings(deadline=None, max_examples=10)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.sampled_from([1, 5, 70]),
    st.sampled_from([2, 3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
def test_norm_activation_and_pooling_and_back(
    kernels: Any,
    stride: tuple[int, ...],
    rest: tuple[int, ...],
    channels: int,
    dimension: int,
    raw: bool,
    last: bool,
    dtype: torch.dtype,
) -> None:
    """Also of sizes that the stride does not divide, whose last voxels are in no pool."""
    stride = stride[:dimension]
    size = [s * n + min(r, s - 1) for s, n, r in zip(stride, (2, 3, 2), rest, strict=False)]
    x = in_format(random(2, channels, *size, dtype=dtype), last)
    feature_map = random_raw_map(tuple(x.shape), dtype, 3)._replace(raw=x) if raw else x
    found, index = kernels.pool(*(lambda tensors, slopes: (tensors, slopes[0]))(*flatten([feature_map])), stride)
    activation = join([feature_map], 1).requires_grad_()
    pool = getattr(nn.functional, f"max_pool{dimension}d")
    expected = pool(activation, stride)
    assert_same(found, expected.detach())
    assert index.dtype == torch.uint8
    if not raw:  # or voxels that only rounding makes the same may change places
        (gradient,) = torch.autograd.grad(expected, activation, found)
        assert torch.equal(kernels.pool_gradient(found, index, size, stride), gradient)


def test_pools_hand_on_what_is_not_a_number(kernels: Any) -> None:
    x = random(1, 1, 2, 2, 4)
    x[0, 0, 0, 1, 1] = torch.nan
    found, _ = kernels.pool([x], None, [2, 2, 2])
    assert found.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("last", [False, True])
def test_a_gradient_in_another_format_is_converted_to_that_of_the_map(kernels: Any, last: bool) -> None:
    x, grad = in_format(random(2, 3, 4, 3, 2), last), random(2, 8, 4, 3, 2, seed=2)
    mean, rstd = raw_map.statistics(x, 1e-3)
    arguments = (x, mean, rstd, *(random(2, 3, 1, 1, 1, seed=seed) for seed in (3, 4)), 0.1)
    for gradient in (grad[:, :3], in_format(grad, last)[:, :3], in_format(grad[:, :3], not last)):
        found, expected = kernels.norm_gradient(gradient, *arguments), raw_map.norm_gradient(gradient, *arguments)
        for f, e in zip(found, expected, strict=True):
            assert_same(f, e)


@pytest.mark.parametrize("last", [False, True])
def test_operators_are_well_behaved(kernels: Any, last: bool) -> None:  # noqa: ARG001
    x, grad = in_format(random(2, 3, 4, 3, 2), last), in_format(random(2, 6, 4, 3, 2), last)
    raw = random_raw_map((2, 3, 4, 3, 2), torch.float64, 3)
    raw = raw._replace(raw=in_format(raw.raw, last))
    mean, rstd = raw_map.statistics(x, 1e-5)
    calls = {
        "statistics": (x, 1e-5),
        "norm_gradient": (x, raw.raw, mean, rstd, raw.scale, raw.offset, 0.1),
        "join": ([x, *raw[:3]], [float("nan"), 0.1], 3),
        "separate": (grad, [2, 4], 3),
        "pool": ([raw.raw, *raw[1:3]], 0.1, [2, 1, 2]),
        "pool_gradient": (
            x[:, :, :2, :, :1].contiguous(),
            torch.zeros(2, 3, 2, 3, 1, dtype=torch.uint8, device=DEVICE),
            [4, 3, 2],
            [2, 1, 2],
        ),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.e2enet, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        with FakeTensorMode() as mode:
            fake = operator(*tree_map_only(Tensor, mode.from_tensor, arguments))
        strides = [[t.stride() for t in tree_leaves(results)] for results in (fake, operator(*arguments))]
        assert strides[0] == strides[1], name


@pytest.mark.usefixtures("fused_kernels")
@pytest.mark.parametrize(
    ("dimension", "compiled", "last"),
    [(3, False, False), (2, False, False), (2, True, False), (2, False, True), (2, True, True)],
)
def test_a_training_step_with_kernels(
    kernels: Any, dimension: int, compiled: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d if dimension == 3 else nn.Conv2d
    strides = [[1] * dimension, [2] * dimension]
    with override(kernels="off"):
        network = E2ENet(1, 2, 2, [4, 5], conv, strides, deep_supervision=True).to(DEVICE, torch.float64)
    x = random(1, 1, *[8] * dimension)

    def step(run: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        network.zero_grad()
        loss = sum(output.square().mean() for output in run(x))
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    expected_loss, expected = step(network)
    with torch.no_grad():
        logits = network(x)
    network.to(memory_format=CHANNELS_LAST[dimension] if last else torch.preserve_format)
    calls = []
    monkeypatch.setattr(kernels.operators.programs, "move_tiles", noted(kernels.operators.programs.move_tiles, calls))
    torch._dynamo.reset()
    loss, found = step(torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network)
    assert calls, "no kernel was used"
    calls.clear()
    with torch.no_grad():
        for found_logits, expected_logits in zip(network(x), logits, strict=True):
            torch.testing.assert_close(found_logits, expected_logits)
    assert calls, "no kernel was used in prediction"
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6)


def noted(program: Any, calls: list[Any]) -> Any:
    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            calls.append(grid)
            return program[grid]

    return Noted()


CHECKS = {"wrong_kernel": "join", "wrong_convolution": "convolve"}
"""By name: a kernel that the check looks at."""


def in_tf32(convolution: Any) -> Any:
    """As cuDNN computes in float32: of its numbers, products see 10 bits of the mantissa."""

    def rounded(x: Tensor) -> Tensor:
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x

    return lambda x, weight, *others, **named: convolution(rounded(x), rounded(weight), *others, **named)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Whatever has no deterministic algorithm throws, as max-pooling's backward pass in 3D on CUDA does."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_the_cpu(pool: Any) -> Any:
    def checked(x: Tensor, *others: Any, **named: Any) -> Tensor:
        assert (x.device.type, x.dtype) == ("cpu", torch.float64)
        return pool(x, *others, **named)

    return checked


@pytest.mark.usefixtures("deterministic")
def test_kernels_agree_with_pytorch(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set around the check; and where PyTorch's convolutions in float32 are less exact than ours.

    Of the programs that networks launch: with more maps and voxels than a tile has, more inputs than a product takes at once.
    """
    for name in ("conv3d", "conv_transpose3d"):
        monkeypatch.setattr(nn.functional, name, in_tf32(getattr(nn.functional, name)))
    monkeypatch.setattr(nn.functional, "max_pool3d", on_the_cpu(nn.functional.max_pool3d))
    maps: list[torch.Size] = []
    inputs: list[torch.Size] = []
    statistics, convolve = kernels.check.operators.statistics, kernels.check.sparse.convolve
    monkeypatch.setattr(kernels.check.operators, "statistics", lambda x, *o: maps.append(x.shape) or statistics(x, *o))
    monkeypatch.setattr(kernels.check.sparse, "convolve", lambda *a: inputs.append(a[4].shape) or convolve(*a))
    with torch.inference_mode(), torch.device("meta"):
        assert kernels.wrong_kernel(torch.device(DEVICE)) is None
        assert kernels.wrong_convolution(torch.device(DEVICE)) is None
    assert max(shape[1] for shape in maps) >= 70
    assert max(shape[2:].numel() for shape in maps) > kernels.operators.TILE
    assert {shape[1] for shape in inputs} == {40}


def kernels_that_compute() -> list[bool]:
    """On CUDA: whether the passes do, and the convolutions of active connections."""
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        return [use(x) is not None for use in (acceleration.kernels_for, acceleration.convolutions_for)]


@pytest.fixture
def as_on_cuda(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process where there is CUDA, and the kernels agree with PyTorch there."""
    monkeypatch.setattr(kernels, "DEVICES", ("cuda",))
    for check in CHECKS:
        monkeypatch.setattr(kernels, check, lambda _: None)
    for state in ("_agrees", "_kernels", "_convolutions"):
        monkeypatch.setattr(acceleration, state, {})


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("failure", ["wrong", "broken", "broken within"])
@pytest.mark.parametrize(("check", "name"), CHECKS.items())
def test_kernels_that_do_not_agree_with_pytorch_are_not_used(
    kernels: Any, check: str, name: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the others are."""
    module = kernels.check.operators if name == "join" else kernels.check.sparse
    whole = getattr(module, name)

    def fails(*arguments: Any) -> Tensor:
        if failure == "broken":
            raise RuntimeError("PTX assembly aborted")
        if failure == "broken within":
            raise RuntimeError("at 24:15:\na program") from TypeError("PTX assembly aborted")
        return torch.zeros_like(whole(*arguments))

    monkeypatch.setattr(module, name, fails)
    monkeypatch.setattr(kernels, check, lambda _: getattr(kernels.check, check)(torch.device(DEVICE)))
    with pytest.warns(UserWarning, match=f"{name} differs from PyTorch" if failure == "wrong" else "PTX assembly aborted"):
        acceleration.prepare_kernels(torch.device("cuda"), convolutions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a process is enough
        acceleration.prepare_kernels(torch.device("cuda"), convolutions=True)
    assert kernels_that_compute() == [other != check for other in CHECKS]


@pytest.mark.usefixtures("as_on_cuda")
def test_convolutions_are_checked_where_a_layer_stores_active_weights(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels, "wrong_convolution", lambda device: asked.append(device.type))
    cuda = torch.device("cuda")
    prepare = acceleration.prepare_kernels
    for module in (e2enet, compact):  # networks here are as on a GPU
        monkeypatch.setattr(module, "prepare_kernels", lambda _, convolutions=False: prepare(cuda, convolutions))
    network = E2ENet(1, 2, 2, [16, 16], nn.Conv2d, [[1, 1], [2, 2]], feature_sparsity=0.5)
    assert kernels_that_compute() == [True, False]
    assert not asked
    (_, layer), *_ = maskable_layers(network)
    layer.share_inputs(16, equal_blocks=True)
    layer.set_random_topology(layer.connections_at(0.5))
    store_active_only(layer)
    assert asked == ["cuda"]
    assert kernels_that_compute() == [True, True]
    E2ENet(1, 2, 2, [16, 16], nn.Conv2d, [[1, 1], [2, 2]])
    assert kernels_that_compute() == [True, True]
    acceleration._agrees.clear()  # as in a process to which the network was sent
    network.double()
    assert asked == ["cuda", "cuda"]


@pytest.mark.usefixtures("as_on_cuda")
def test_a_network_without_values_asks_for_no_check(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fake tensors or counters see each operation, kernels cannot be compared; afterwards they are."""
    asked = []
    for check in CHECKS:
        monkeypatch.setattr(kernels, check, lambda _, check=check: asked.append(check))
    for mode, expected in ((FakeTensorMode(), []), (nullcontext(), list(CHECKS)), (FakeTensorMode(), list(CHECKS))):
        with mode:
            acceleration.prepare_kernels(torch.device("cuda"), convolutions=True)
        assert asked == expected
        assert kernels_that_compute() == [bool(expected)] * 2


@pytest.mark.usefixtures("as_on_cuda")
def test_kernels_that_cannot_be_imported_are_not_used(setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a training end for them, unless they are asked for."""
    monkeypatch.setitem(sys.modules, "nnunetv2_e2enet.kernels", None)  # which lets an import fail
    with pytest.warns(UserWarning, match=r"without its fused kernels on cuda: ModuleNotFoundError: import of \S+ halted"):
        acceleration.prepare_kernels(torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a process is enough
        acceleration.prepare_kernels(torch.device("cuda"))
    assert kernels_that_compute() == [False, False]
    setting(kernels="on")
    with pytest.raises(ImportError, match="halted"):
        acceleration.prepare_kernels(torch.device("cuda"))


@pytest.mark.usefixtures("as_on_cuda")
def test_the_kernels_are_prepared_for_a_network_that_was_sent_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its start nor a move says in the other process that it computes on a GPU."""
    prepare, cuda = acceleration.prepare_kernels, torch.device("cuda")
    network = E2ENet(1, 2, 2, [4, 4], nn.Conv2d, [[1, 1], [2, 2]])
    sent = pickle.dumps(network)
    monkeypatch.setattr(e2enet, "prepare_kernels", lambda _, convolutions=False: prepare(cuda, convolutions))
    assert kernels_that_compute() == [False, False]
    pickle.loads(sent)
    assert kernels_that_compute() == [True, False]


def test_without_a_gpu_plain_pytorch_computes() -> None:
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    acceleration.prepare_kernels(torch.device("cpu"))
    assert acceleration.kernels_for(torch.zeros(1)) is None
    assert acceleration.kernels_status().startswith("not used: ")
