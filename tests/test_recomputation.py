"""What is computed again in the backward pass changes what is kept, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from support import AMOS_STRIDES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_memory import Candidate

from nnunetv2_e2enet.dsff import CosineSchedule, GradientGrowth, TopologyUpdater
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, accounts, e2enet_features, maskable_layers
from nnunetv2_e2enet.network._raw_map import instance_norm
from nnunetv2_e2enet.network.depth_shift import depth_shift
from nnunetv2_e2enet.settings import override

AMOS_PATCH = (64, 160, 160)
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]


def small(dimension: int = 3, **kwargs: Any) -> E2ENet:
    strides = [stride[-dimension:] for stride in STRIDES]
    conv = nn.Conv3d if dimension == 3 else nn.Conv2d
    arguments = {"n_stages": 4, "features_per_stage": [4, 5, 7, 8], "strides": strides, "deep_supervision": True}
    return E2ENet(2, 3, conv_op=conv, **{**arguments, **kwargs})


def image(dimension: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 2, *[16] * dimension, dtype=dtype, generator=torch.Generator().manual_seed(1))


def loss_of(network: E2ENet, x: Tensor) -> Tensor:
    outputs = network(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return sum((o.square().mean() + o.sin().mean() for o in outputs), torch.zeros(()))


def gradients(network: E2ENet, x: Tensor, recompute: str) -> tuple[Tensor, dict[str, Tensor]]:
    network.recompute = recompute
    network.zero_grad()
    torch.manual_seed(5)  # for dropout
    loss = loss_of(network, x)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# --- the operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_size", [1, 3, 5])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_activation_shift_and_concatenation_as_one(shift_size: int, affine: bool) -> None:
    eps, slope = 1e-2, 0.1
    torch.manual_seed(0)
    x, other = (torch.randn(2, c, 4, 3, 2, dtype=torch.float64, requires_grad=True) for c in (4, 3))
    parameters = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2 * affine)]

    def fused(x: Tensor, other: Tensor, *parameters: Tensor) -> Tensor:
        return depth_shift([instance_norm(x, *(parameters or (None, None)), eps, slope), other], shift_size)

    def plain(x: Tensor, other: Tensor, *parameters: Tensor) -> Tensor:
        norm = F.instance_norm(x, None, None, *(parameters or (None, None)), eps=eps)
        return depth_shift([F.leaky_relu(norm, slope), other], shift_size)

    inputs = (x, other, *parameters)
    torch.testing.assert_close(fused(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(fused, inputs)


def test_a_map_with_several_readers_gets_the_sum_of_their_gradients() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 4, 4, 4), (3,), (3,)))

    def three_readers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raw = instance_norm(x, weight, bias, 1e-2, 0.1)
        return depth_shift(raw, 1).sin().sum() + depth_shift([raw, raw], 3).cos().sum()

    assert torch.autograd.gradcheck(three_readers, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_maps_are_of_single_precision(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 8, 8, 8) + 100).to(dtype)  # a mean that half precision would round by a tenth of the deviation
    raw = instance_norm(x, None, None, 1e-5, 0.01)
    assert raw.scale.dtype == raw.offset.dtype == torch.float32
    expected = F.leaky_relu(F.instance_norm(x.float()), 0.01)
    out = depth_shift(raw, 1)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


# --- the network ---------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "3d": {},
    "2d": {"dimension": 2},
    "one head": {"deep_supervision": False},
    "dense": {"feature_sparsity": 0.0},
    "no shift": {"shift_size": 1},
    "shift 5": {"shift_size": 5},
    "dropout": {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.3}},
    "no affine": {"norm_op_kwargs": {"affine": False}},
    "batch norm": {"norm_op": nn.BatchNorm3d},
    "another activation": {"nonlin": nn.SiLU, "nonlin_kwargs": {}},
    "learned shift": {"learned_shift": True},
    "kernel 3 x 3 x 3": {"kernel_size": [3, 3, 3]},
    "three convolutions a level": {"n_conv_per_stage": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", ["blocks", "nodes"])
def test_gradients_do_not_depend_on_what_is_recomputed(variant: str, recompute: str) -> None:
    torch.manual_seed(0)
    network = small(**VARIANTS[variant]).double()
    x = image(network.dimension)
    for _, layer in maskable_layers(network):
        layer.dense_gradients = variant == "3d"
    expected_loss, expected = gradients(network, x, "none")
    loss, found = gradients(network, x, recompute)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("recompute", ["blocks", "nodes"])
def test_fifty_steps_with_topology_updates_are_the_same_training(recompute: str) -> None:
    losses = {}
    for setting in ("none", recompute):
        torch.manual_seed(0)
        network = small(feature_sparsity=0.6).double()
        network.recompute = setting
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
        updater = TopologyUpdater(network, CosineSchedule(10, 1), growth=GradientGrowth())
        losses[setting] = []
        for step in range(50):
            optimizer.zero_grad()
            loss = loss_of(network, torch.randn(1, 2, 8, 16, 16, dtype=torch.float64))
            loss.backward()
            optimizer.step()
            losses[setting].append(loss.item())
            if step % 10 == 9:
                optimizer.zero_grad()
                with updater.observation():
                    loss_of(network, torch.randn(1, 2, 8, 16, 16, dtype=torch.float64)).backward()
                update = updater.update(step // 10 + 1, optimizer)
                assert update is not None
                assert update.replaced > 0
    assert losses[recompute] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["none"][-1] < losses["none"][0]


def test_mixed_precision_keeps_half_the_bytes() -> None:
    torch.manual_seed(0)
    network, x = small().float(), image(dtype=torch.float32)
    kept, found = {}, {}
    for recompute in ("none", "blocks", "nodes"):
        network.recompute = recompute
        full = kept_bytes(network, x)
        with torch.autocast("cpu", torch.bfloat16):
            kept[recompute] = kept_bytes(network, x) / full
            _, found[recompute] = gradients(network, x, recompute)
    assert kept["blocks"] == pytest.approx(0.5, abs=0.05)
    assert kept["nodes"] == pytest.approx(0.5, abs=0.05)
    weight = "decoder.stages.0.0.blocks.0.conv.weight"
    for recompute in ("blocks", "nodes"):
        similarity = F.cosine_similarity(found[recompute][weight].flatten(), found["none"][weight].flatten(), dim=0)
        assert similarity > 0.99


def test_maps_of_a_single_voxel_are_refused_as_by_instance_norm() -> None:
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        small(deep_supervision=False)(torch.randn(1, 2, 4, 8, 8))


def test_recompute_is_one_of_three() -> None:
    network = small()
    assert network.recompute == "blocks"
    with pytest.raises(E2ENetError, match="recompute is 'all': use one of none, blocks, nodes"):
        network.recompute = "all"
    assert network.recompute == "blocks"


# --- what it saves, and what it costs -------------------------------------------------------------------------------------


def kept_bytes(network: nn.Module, x: Tensor) -> int:
    """Of distinct storages that a forward pass leaves for the backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = network(x)
    del outputs
    return sum(t.untyped_storage().nbytes() for pointer, t in seen.items() if pointer not in own)


def test_bytes_kept_at_the_amos_plan() -> None:
    """Counted, as docs/memory.md gives them: one patch, five classes."""
    with torch.device("meta"):
        network = E2ENet(1, 5, 6, e2enet_features(6), nn.Conv3d, AMOS_STRIDES, deep_supervision=True)
        stock = PlainConvUNet(
            *(1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, [[1, 3, 3]] + [[3, 3, 3]] * 5, AMOS_STRIDES, 2, 5, 2, True),
            *(nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}),
            deep_supervision=True,
        )
    of_stock = accounts.saved_bytes(stock, (1, 1, *AMOS_PATCH))
    ratio = {}
    for recompute in ("none", "blocks", "nodes"):
        network.recompute = recompute
        ratio[recompute] = network.saved_bytes(AMOS_PATCH) / of_stock
    assert of_stock / 2**30 == pytest.approx(3.25, abs=0.01)
    assert ratio == pytest.approx({"none": 4.37, "blocks": 1.12, "nodes": 0.82}, abs=0.01)


def test_bytes_alive_at_once_at_the_amos_plan() -> None:
    """What a training step needs, not only between the passes, as docs/memory.md gives it."""
    stock, *ours = (Candidate(kind, "AMOS", AMOS_PATCH).peak(1) for kind in ("nnU-Net", "none", "blocks", "nodes"))
    assert stock / 2**30 == pytest.approx(4.03, abs=0.01)
    assert [peak / stock for peak in ours] == pytest.approx([3.86, 1.20, 1.03], abs=0.01)


def test_multiply_accumulates_of_a_step_at_the_amos_plan() -> None:
    """Of the forward and backward pass of one patch, in G, as docs/memory.md gives them, and README.md how many times more."""
    expected = {"nnU-Net": 1314, "none": 3398, "blocks": 3477, "nodes": 3739, "B16active": 988}
    found = {kind: Candidate(kind, "AMOS", AMOS_PATCH).multiply_accumulates() / 1e9 for kind in expected}
    assert found == pytest.approx(expected, abs=0.5)
    readme = " ".join((Path(__file__).resolve().parents[1] / "README.md").read_text().split())
    times = f"{found['blocks'] / found['nnU-Net']:.1f}"
    assert f"training step has {times} times the multiply-accumulates of stock nnU-Net (counted)" in readme


@pytest.mark.parametrize("recompute", ["blocks", "nodes"])
def test_only_these_convolutions_are_computed_again(recompute: str) -> None:
    network = small(feature_sparsity=0.0)
    network.recompute = recompute
    x = image(dtype=torch.float32)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        network(x)
    by_name = {name: sum(flops.values()) for name, flops in forward.get_flop_counts().items()}
    again = sum(flops for name, flops in by_name.items() if name.endswith(".upsample"))
    if recompute == "nodes":  # the first of two successive convolutions, and the flows of such a node once more
        levels = range(4)
        again += sum(by_name[f"E2ENet.encoder.stages.{level}.0.conv"] for level in levels)
        last = [f"E2ENet.decoder.stages.{2 - level}.{level}" for level in range(3)]
        again += sum(by_name[f"{node}.blocks.0.conv"] + by_name[f"{node}.upsample"] for node in last)
    assert step_flops(network, x, recompute) - step_flops(network, x, "none") == again


def step_flops(network: E2ENet, x: Tensor, recompute: str) -> int:
    with FlopCounterMode(display=False) as counter:
        gradients(network, x, recompute)
    return counter.get_total_flops()


def test_memory_in_use_really_falls() -> None:
    """What the allocator of PyTorch hands out during a step, at its highest."""
    network = small(features_per_stage=[16, 16, 16, 16])
    x = torch.randn(1, 2, 32, 32, 32)
    with override(engine="off"):  # which has memory of its own
        check_that_memory_falls(network, x)


def check_that_memory_falls(network: E2ENet, x: Tensor) -> None:
    peaks = {recompute: peak_allocation(network, x, recompute) for recompute in ("none", "blocks", "nodes")}
    assert peaks["blocks"] < 0.6 * peaks["none"]
    assert peaks["nodes"] < 0.95 * peaks["blocks"]


def peak_allocation(network: E2ENet, x: Tensor, recompute: str) -> int:
    gradients(network, x, recompute)
    with torch.profiler.profile(profile_memory=True) as profiler:
        gradients(network, x, recompute)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", ["blocks", pytest.param("nodes", marks=pytest.mark.slow)])
def test_a_compiled_network_keeps_no_more(recompute: str) -> None:
    """With the partitioner that decides what is kept when nnU-Net compiles; no machine code is made here."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network, x = small(n_stages=3, features_per_stage=[4, 5, 7], strides=STRIDES[:3]), image(dtype=torch.float32)
    network.recompute = recompute
    compiled = torch.compile(network, backend="aot_eager_decomp_partition", fullgraph=True)
    masked_weights = sum(4 * layer.weight.numel() for _, layer in maskable_layers(network))  # not worth recomputing
    assert kept_bytes(compiled, x) <= 1.02 * kept_bytes(network, x) + masked_weights
    _, expected = gradients(network, x, recompute)
    network.zero_grad()
    loss_of(compiled, x).backward()
    for name, parameter in network.named_parameters():
        if not name.endswith("conv.bias"):  # whose true gradient is zero
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)
