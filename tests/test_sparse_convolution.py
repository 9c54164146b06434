"""Convolutions of active connections alone: the kernels against PyTorch, and what they become on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from support import Project, make
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_e2enet.dsff import CosineSchedule, TopologyUpdater, Uniform, random_topology
from nnunetv2_e2enet.network import E2ENet, maskable_layers, store_active_only
from nnunetv2_e2enet.network._raw_map import FeatureMap, RawMap, flatten, values_of
from nnunetv2_e2enet.network.acceleration import prepare_kernels
from nnunetv2_e2enet.network.memory_format import CHANNELS_LAST, is_channels_last
from nnunetv2_e2enet.network.sparse_convolution import can_compute, sparse_convolution
from nnunetv2_e2enet.settings import override
from nnunetv2_e2enet.trainers.e2enet_experiment_trainers import nnUNetTrainerE2ENet_B16active
from nnunetv2_e2enet.training.variants import variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """Triton's interpreter takes bfloat16, which NumPy lacks, for integers in products of matrices; here it has float32."""
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from nnunetv2_e2enet import kernels

    def widened(x: Any) -> Any:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32) if x.dtype.is_bf16() else x

    whole = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *c: whole(self, widened(a), widened(b), *c))
        yield kernels


CONVOLUTIONS = [((1, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((3, 1, 3), (2, 1, 2)), ((3, 3), (1, 2))]
"""Kernel and stride."""
TRANSPOSED = [(2, 2, 2), (1, 2, 2), (3, 1, 2), (2, 2)]
"""Kernel and stride at once."""


Maps = tuple[tuple[int, ...], str, int]
"""Channels of each map; of each map whether it is raw, "r", or has no norm, "p"; groups of the depth shift."""


@settings(deadline=None, max_examples=6)
@given(
    st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(3, 5)),
    st.sampled_from([*((*conv, False) for conv in CONVOLUTIONS), *((up, up, True) for up in TRANSPOSED)]),
    st.sampled_from([((7,), "p", 1), ((4, 3), "rp", 3), ((2, 3, 2), "prp", 5), ((6, 1), "rr", 3), ((7,), "r", 1)]),
    st.sampled_from([(3, 4, 2), (5, 16, 2), (6, 24, 1)]),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
@example((3, 5, 3), ((1, 3, 3), (1, 1, 1), False), ((11, 5, 7), "rpp", 3), (19, 16, 2), True, torch.float16)
@example((3, 3, 5), ((1, 3, 3), (1, 1, 1), False), ((20, 20), "pr", 5), (33, 16, 2), False, torch.float32)
@example((3, 3, 5), ((2, 2, 2), (2, 2, 2), True), ((23,), "r", 1), (19, 16, 2), False, torch.float16)
@example((2, 5, 3), ((1, 2, 2), (1, 2, 2), True), ((23,), "p", 1), (19, 24, 1), True, torch.float32)
@example((2, 3, 3), ((1, 3, 3), (1, 2, 2), False), ((4, 3), "rp", 3), (3, 4, 2), False, torch.bfloat16)
@example((2, 3, 3), ((1, 2, 2), (1, 2, 2), True), ((7,), "r", 1), (3, 4, 2), True, torch.bfloat16)
@example((3, 4, 4), ((3, 1, 3), (1, 1, 1), False), ((4, 3), "rr", 3), (5, 4, 2), True, torch.float32)
def test_the_kernels_compute_what_pytorch_does(
    kernels: Any,
    size: tuple[int, ...],
    conv: tuple[tuple[int, ...], tuple[int, ...], bool],
    joined: Maps,
    blocks_of: tuple[int, int, int],
    last: bool,
    dtype: torch.dtype,
) -> None:
    """Odd sizes, strides, both orders in memory, blocks of other sizes than a tile, several maps with norms and a shift."""
    (kernel, stride, transposed), (n_inputs, block_size, blocks) = conv, blocks_of
    widths, norms, shift_size = joined
    channels, size = sum(widths), size[-len(kernel) :]
    shift_size = shift_size if len(size) == 3 else 1
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        form = CHANNELS_LAST[len(kernel)] if last else torch.contiguous_format
        return values.contiguous(memory_format=form)

    maps: list[FeatureMap] = [random(2, width, *size) for width in widths]
    for i, (width, norm) in enumerate(zip(widths, norms, strict=True)):
        if norm == "r":
            scale, offset = (torch.randn(2, width, *[1] * len(size), generator=generator).to(DEVICE) for _ in range(2))
            maps[i] = RawMap(values_of(maps[i]), scale, offset, 0.1 * (i + 1))
    weight = random(blocks * block_size, n_inputs, *kernel).contiguous()
    inputs = torch.stack([torch.randperm(channels, generator=generator)[:n_inputs] for _ in range(blocks)]).to(DEVICE)
    exact_maps = [activation(m).requires_grad_() for m in maps]
    exact_weight = weight.double().requires_grad_()
    exact_x = moved(torch.cat(exact_maps, dim=1), shift_size)
    gathered = torch.cat([exact_x[:, block] for block in inputs], dim=1)
    if transposed:
        function = F.conv_transpose3d if len(kernel) == 3 else F.conv_transpose2d
        grouped = exact_weight.unflatten(0, (blocks, block_size)).transpose(1, 2).flatten(0, 1)
        expected = function(gathered, grouped, None, stride, groups=blocks)
    else:
        function = F.conv3d if len(kernel) == 3 else F.conv2d
        expected = function(gathered, exact_weight, None, stride, [k // 2 for k in kernel], 1, blocks)
    grad = random(*expected.shape)
    *of_maps, of_weight = torch.autograd.grad(expected, (*exact_maps, exact_weight), grad.double())

    (tensors, slopes), values, options = flatten(maps), [values_of(m) for m in maps], (list(stride), transposed)
    found = kernels.convolve(tensors, slopes, shift_size, weight, inputs, *options)
    assert is_channels_last(found) == is_channels_last(values[0])

    def of_each_map() -> list[Tensor]:
        gradients: list[Tensor] = kernels.input_gradient(grad, weight, inputs, values, shift_size, *options)
        return gradients

    def of_weights() -> Tensor:
        gradient: Tensor = kernels.weight_gradient(grad, tensors, slopes, shift_size, inputs, list(kernel), *options)
        return gradient

    found_of_maps, found_of_weight = of_each_map(), of_weights()
    for f, value in zip(found_of_maps, values, strict=True):
        assert f.stride() == value.stride() or value.shape[1] == 1
    for f, e in ((found, expected), *zip(found_of_maps, of_maps, strict=True), (found_of_weight, of_weight)):
        largest = max(float(e.detach().abs().max()), 1e-3 * float(expected.detach().abs().max()))
        torch.testing.assert_close(f.double(), e, rtol=0, atol=TOLERANCE[dtype] * largest)
    if torch.device(DEVICE).type == "cuda":  # no order of threads matters; Triton's interpreter has but one
        assert all(torch.equal(f, again) for f, again in zip(found_of_maps, of_each_map(), strict=True))
        assert torch.equal(found_of_weight, of_weights())


def activation(feature_map: FeatureMap) -> Tensor:
    """In float64."""
    values = values_of(feature_map).double()
    if isinstance(feature_map, RawMap):
        values = F.leaky_relu(values * feature_map.scale.double() + feature_map.offset.double(), feature_map.slope)
    return values.detach()


def moved(x: Tensor, shift_size: int) -> Tensor:
    """Each group of channels by a slice more than the one before it, zeros from outside."""
    if shift_size == 1 or x.shape[1] < shift_size:
        return x
    depth, groups = x.shape[2], []
    for index, group in enumerate(torch.tensor_split(x, shift_size, dim=1)):
        sources = [d - index + shift_size // 2 for d in range(depth)]
        groups.append(torch.stack([group[:, :, s] if 0 <= s < depth else 0 * group[:, :, 0] for s in sources], dim=2))
    return torch.cat(groups, dim=1)


@pytest.mark.parametrize("last", [False, True])
def test_operators_are_well_behaved(kernels: Any, last: bool) -> None:
    form = torch.channels_last_3d if last else torch.contiguous_format
    raw, plain, grad = (torch.randn(2, c, 3, 4, 4, device=DEVICE).contiguous(memory_format=form) for c in (3, 2, 32))
    scale, offset = torch.randn(2, 3, 1, 1, 1, device=DEVICE), torch.randn(2, 3, 1, 1, 1, device=DEVICE)
    weight, inputs = torch.randn(32, 3, 1, 3, 3, device=DEVICE), torch.tensor([[0, 2, 3], [1, 2, 4]], device=DEVICE)
    maps = [raw, scale, offset, plain], [0.1, float("nan")], 3
    assert kernels.convolve([raw, scale, offset, plain], [0.1, None], 3, weight, inputs, [1, 1, 1]).shape == grad.shape
    calls = {
        "sparse_convolution": (*maps, weight, inputs, [1, 1, 1], False),
        "sparse_input_gradient": (grad, weight, inputs, [raw, plain], 3, [1, 1, 1], False),
        "sparse_weight_gradient": (grad, *maps, inputs, [1, 3, 3], [1, 1, 1], False),
    }
    up, finer = [1, 2, 2], torch.randn(2, 32, 3, 8, 8, device=DEVICE).contiguous(memory_format=form)
    weights = torch.randn(32, 3, *up, device=DEVICE)
    transposed = {
        "sparse_convolution": (*maps, weights, inputs, up, True),
        "sparse_input_gradient": (finer, weights, inputs, [raw, plain], 3, up, True),
        "sparse_weight_gradient": (finer, *maps, inputs, up, up, True),
    }
    for name, arguments in (*calls.items(), *transposed.items()):
        operator = getattr(torch.ops.e2enet, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("fused_kernels")
def test_gradients_of_raw_maps_under_autocast() -> None:
    """Of activations, as all readers of raw maps give them, of maps in half precision and weights in float32."""
    raw, plain = (torch.randn(1, c, 3, 4, 4, device=DEVICE, dtype=torch.float16, requires_grad=True) for c in (6, 4))
    scale, offset = (torch.randn(1, 6, 1, 1, 1, device=DEVICE) for _ in range(2))
    maps = [RawMap(raw, scale, offset, 0.1), plain]
    weight = torch.randn(32, 3, 1, 3, 3, device=DEVICE, requires_grad=True)
    inputs = torch.tensor([[0, 5, 8], [2, 3, 9]], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.float16):
        out = sparse_convolution(maps, 3, weight, None, inputs, [1, 1, 1])
    assert out.dtype == torch.float16
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (raw, plain, weight), grad)
    assert [f.dtype for f in found] == [torch.float16, torch.float16, torch.float32]
    exact, exact_weight = [activation(m).requires_grad_() for m in maps], weight.detach().double().requires_grad_()
    joined = moved(torch.cat(exact, dim=1), 3)
    expected = F.conv3d(torch.cat([joined[:, block] for block in inputs], dim=1), exact_weight, None, 1, (0, 1, 1), 1, 2)
    for f, e in zip(found, torch.autograd.grad(expected, (*exact, exact_weight), grad.double()), strict=True):
        torch.testing.assert_close(f.double(), e, rtol=0, atol=5e-3 * float(e.abs().max()))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("fused_kernels")
def test_a_training_in_blocks_is_the_same(compiled: bool) -> None:
    """With and without the kernels, over an update of the topology; one graph that is not compiled anew; and prediction."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    strides = [[1, 1, 1], [1, 2, 2]]
    with override(kernels="off"):
        network = E2ENet(1, 2, 2, [4, 6], nn.Conv3d, strides, deep_supervision=True, feature_sparsity=0.5)
        for _, layer in maskable_layers(network):
            layer.share_inputs(2, equal_blocks=True)
        random_topology(network, 0.5, Uniform(), 0)
        for _, layer in maskable_layers(network):
            store_active_only(layer)
        network.to(DEVICE, torch.float64)
    x = torch.randn(1, 1, 3, 4, 6, dtype=torch.float64, device=DEVICE)
    results = []
    for mode in ("off", "on"):
        with override(kernels=mode):
            prepare_kernels(DEVICE)
            each = deepcopy(network)
            run = each
            if compiled:
                run = torch.compile(each, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
            optimizer = torch.optim.SGD(each.parameters(), 0.05)
            updater = TopologyUpdater(each, CosineSchedule(6, 1, 0.5), seed=1)
            losses = []
            for epoch in range(1, 3):
                optimizer.zero_grad()
                loss = sum((o.square().mean() for o in run(x)), x.new_zeros(()))
                loss.backward()
                optimizer.step()
                updater.update(epoch, optimizer)
                losses.append(loss.item())
            with torch.no_grad():
                results.append((losses, each.eval()(x), dict(each.named_parameters())))
    (losses, outputs, parameters), (found_losses, found_outputs, found_parameters) = results
    assert found_losses == pytest.approx(losses, rel=1e-9)
    for found, expected in zip(found_outputs, outputs, strict=True):
        torch.testing.assert_close(found, expected)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found_parameters[name], parameter, atol=1e-9, rtol=1e-6)


@pytest.fixture
def launches(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The grids with which the program of the convolutions is launched."""
    launched: list[Any] = []
    whole = kernels.sparse.programs.convolve_blocks

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            launched.append(grid)
            return whole[grid]

    monkeypatch.setattr(kernels.sparse.programs, "convolve_blocks", Noted())
    return launched


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("blocks", 1), ("nodes", 3)])
@pytest.mark.usefixtures("fused_kernels")
def test_no_other_convolution_than_recomputation_says_is_computed_again(
    recompute: str, again: int, launches: list[Any]
) -> None:
    """The transposed one of the upward flow; with "nodes" the first of two, and before that the flow of its node once more."""
    network = E2ENet(1, 2, 2, [16, 16], nn.Conv2d, [[1, 1], [2, 2]], feature_sparsity=0.5).to(DEVICE)
    for _, layer in maskable_layers(in_blocks(network, 16, 0)):
        store_active_only(layer)
    network.recompute = recompute
    loss = network(torch.randn(1, 1, 4, 4, device=DEVICE)).square().mean()
    assert len(launches) == len(list(maskable_layers(network))) == 3
    launches.clear()
    loss.backward()
    assert len(launches) == again


@pytest.mark.usefixtures("fused_kernels")
def test_blocks_that_are_too_large_for_a_tile_are_left_to_pytorch() -> None:
    """In training, which gathers, and in prediction, where a network then stores all weights."""
    for size, by_kernels in ((64, True), (96, False)):
        network = E2ENet(1, 2, 2, [size, size], nn.Conv2d, [[1, 1], [2, 2]], feature_sparsity=0.5).to(DEVICE)
        in_blocks(network, size, 0)
        predicting = deepcopy(network).eval()
        predicting.predicts_only = True
        predicting.load_state_dict(network.state_dict())
        layers = [layer for _, layer in maskable_layers(predicting)]
        assert [layer.stores_active_only for layer in layers] == [by_kernels] * len(layers)
        for _, layer in maskable_layers(network):
            store_active_only(layer)
            assert can_compute(layer, torch.zeros(1, 1, 1, 1, device=DEVICE)) == by_kernels


def in_blocks(network: E2ENet, block_size: int, seed: int) -> E2ENet:
    for _, layer in maskable_layers(network):
        layer.share_inputs(block_size, equal_blocks=True)
    random_topology(network, 0.5, Uniform(), seed)
    return network


@pytest.mark.usefixtures("fused_kernels", "exact")
def test_a_network_that_predicts_stores_active_blocks_of_the_weights_it_loads(
    launches: list[Any],
) -> None:
    """One after the other: of blocks, of blocks of another size, of single connections, of blocks again."""
    strides = [[1, 1], [2, 2]]
    with override(kernels="off"):
        networks = [
            in_blocks(E2ENet(1, 2, 2, [16, 32], nn.Conv2d, strides, feature_sparsity=0.5), size, seed).to(DEVICE).eval()
            for size, seed in ((16, 0), (32, 1), (1, 2), (16, 3))
        ]
    predicting = E2ENet(1, 2, 2, [16, 32], nn.Conv2d, strides, feature_sparsity=0.5).to(DEVICE).eval()
    predicting.predicts_only = True
    assert predicting.state_dict().keys() == networks[0].state_dict().keys()
    x = torch.randn(1, 1, 8, 8, device=DEVICE)
    for network, in_equal_blocks in zip(networks, (True, True, False, True), strict=True):
        launches.clear()
        predicting.load_state_dict(network.state_dict())
        layers = [layer for _, layer in maskable_layers(predicting)]
        assert [layer.stores_active_only for layer in layers] == [in_equal_blocks] * len(layers)
        with torch.no_grad():
            found = predicting(x)
            assert len(launches) == len(layers) * in_equal_blocks  # the transposed convolution too
            with override(kernels="off"):
                prepare_kernels(DEVICE)
                expected = network(x)
            prepare_kernels(DEVICE)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for name, value in predicting.state_dict().items():
            assert torch.equal(value, network.state_dict()[name])


@pytest.mark.usefixtures("fused_kernels")
def test_a_hook_sees_the_joined_maps_of_a_layer_that_would_read_them_apart(launches: list[Any]) -> None:
    network = in_blocks(E2ENet(1, 2, 2, [16, 32], nn.Conv2d, [[1, 1], [2, 2]], feature_sparsity=0.5), 16, 0).to(DEVICE)
    layers = [layer for _, layer in maskable_layers(network)]
    for layer in layers:
        store_active_only(layer)
    x, seen = torch.randn(1, 1, 4, 4, device=DEVICE), []
    network.eval()
    with torch.no_grad():
        expected = network(x)
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, given: seen.append((layer.n_inputs, given[0].shape[1])))
        torch.testing.assert_close(network(x), expected)
    assert len(seen) == len(layers) == 3
    assert all(inputs == channels for inputs, channels in seen)
    assert len(launches) == 2 * len(layers)


def test_without_kernels_a_network_that_predicts_stays_dense() -> None:
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    network = in_blocks(E2ENet(1, 2, 2, [16, 32], nn.Conv2d, [[1, 1], [2, 2]], feature_sparsity=0.5), 16, 0)
    predicting = deepcopy(network)
    predicting.predicts_only = True
    predicting.load_state_dict(network.state_dict())
    assert not any(layer.stores_active_only for _, layer in maskable_layers(predicting))


@pytest.mark.slow
@pytest.mark.usefixtures("fused_kernels")
def test_nnunets_predictor_uses_active_blocks(in_process: Project) -> None:
    cls = variant(nnUNetTrainerE2ENet_B16active, "small", base_num_features=16, max_num_features=16)
    cls.__name__ = nnUNetTrainerE2ENet_B16active.__name__  # which the predictor looks for
    with override(kernels="off"):
        trainer = make(cls, in_process, in_process.tiny_plans())
        trainer.initialize()
    layers = [layer for _, layer in maskable_layers(trainer.network)]
    assert not trainer.network.predicts_only
    assert all(layer.stores_active_only for layer in layers)
    model, fold = Path(trainer.output_folder_base), Path(trainer.output_folder)
    fold.mkdir(parents=True, exist_ok=True)
    (model / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (model / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    trainer.save_checkpoint(str(fold / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(use_gaussian=False, use_mirroring=False, device=DEVICE, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    image = torch.randn(1, 8, 16, 16)
    found = predictor.predict_logits_from_preprocessed_data(image)
    stored = [layer.weight.shape for _, layer in maskable_layers(predictor.network)]
    assert stored == [layer.weight.shape for layer in layers]
    trainer.set_deep_supervision_enabled(False)
    with override(kernels="off"), torch.no_grad():
        (expected,) = trainer.network.eval().to(DEVICE)(image[None].to(DEVICE))
    on_gpu = DEVICE.type == "cuda"
    tolerance = 2e-2 if on_gpu else 2e-3  # the predictor computes in float16 there
    torch.testing.assert_close(found.cpu(), expected.cpu().to(found.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_compiled_for_gpus_they_use_tensor_cores() -> None:
    """In a process of its own, without the interpreter; for sm_80 and sm_90. In float32 none, which would round to TF32."""
    pytest.importorskip("triton", reason="needs Triton: pip install '.[kernels]'")
    calls = (
        "g.compiled_convolution(p, k, a) for p in g.PROGRAMS for k in g.KINDS",
        "g.compiled_pass(p, t, a) for p in g.PASSES for t in g.TILES",
    )
    each = ", ".join(f"[{call} for a in g.ARCHITECTURES]" for call in calls)
    program = f"import gpu_compile as g, json; print(json.dumps([{each}, [*g.KINDS]]))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(BENCHMARKS)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    convolutions, passes, kinds = json.loads(run.stdout.splitlines()[-1])
    assert len(convolutions) == 3 * len(kinds) * 2 == 66
    assert len(passes) == 32
    named = list(zip(convolutions, product(range(3), kinds, range(2)), strict=True))
    for each in (*convolutions, *passes):
        assert each["stack_bytes"] == 0  # nothing is spilled
        assert each["registers"] <= 255
        assert each["shared_bytes"] <= 48 * 1024
    for each, (_, kind, _) in named:
        assert (each["tensor_core_instructions"] > 0) == (kind != "float32")


def test_multiply_accumulates_of_padded_blocks() -> None:
    """At the AMOS plan, S = 0.8, inputs padded to what a product takes: a fifth of the dense network's, and some."""
    with torch.device("cpu"):
        network = E2ENet(1, 16, 6, [48, 96, 192, 320, 320, 320], nn.Conv3d, [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 4)
    padded = dense = 0
    for _, layer in maskable_layers(network):
        per_connection = prod(layer.shape[2:]) * layer.n_outputs
        n_inputs = layer.connections_at(0.2) // layer.n_outputs
        step = 32 if n_inputs > 16 else 16
        padded += -(-n_inputs // step) * step * per_connection
        dense += layer.n_inputs * per_connection
    assert 0.2 < padded / dense < 0.25
