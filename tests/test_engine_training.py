"""Training on the CPU engine: PyTorch's gradients from active connections alone, and PyTorch wherever it does not fit."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KERNELS, change_eps, drawn_network, random_network
from torch import Tensor, nn
from torch.func import functional_call
from two_processes import run_both

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.engine import training_program
from nnunetv2_e2enet.engine.core import Core, load_core
from nnunetv2_e2enet.engine.layout import Floats, empty
from nnunetv2_e2enet.engine.prediction import session_of
from nnunetv2_e2enet.engine.training import training_session_of
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network import E2ENet, maskable_layers
from nnunetv2_e2enet.settings import override

pytestmark = pytest.mark.skipif(not KERNELS, reason="the compiled core was not built")

TOLERANCE = 1e-4  # of the largest gradient of a tensor
WORKER = Path(__file__).with_name("engine_training_worker.py")


@pytest.fixture(scope="module", autouse=True)
def on_small_networks_too() -> Iterator[None]:
    with override(engine="on"):
        yield


def make_network(*shape: Any, **options: Any) -> E2ENet:
    return random_network(*shape, **{"deep_supervision": True, **options}).train()


def image(network: E2ENet, *size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, network.input_channels, *size, generator=torch.Generator().manual_seed(1))


def as_list(logits: Tensor | list[Tensor]) -> list[Tensor]:
    return logits if isinstance(logits, list) else [logits]


def gradients(network: E2ENet, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits, and gradients of a weighted sum of them."""
    network.zero_grad()
    logits = as_list(network(x))
    generator = torch.Generator().manual_seed(2)
    loss = sum((level * torch.randn(level.shape, generator=generator)).sum() for level in logits)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [level.detach() for level in logits], {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


class Kinks:
    """How near a forward pass came to where the gradient jumps: activations of zero, and two largest values in a window."""

    def __init__(self, network: E2ENet) -> None:
        self.nearest = float("inf")
        for module in network.modules():
            if isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
                module.register_forward_hook(lambda _module, _inputs, y: self._see(y.abs().min() / y.abs().max()))
            if isinstance(module, (nn.MaxPool2d, nn.MaxPool3d)):
                module.register_forward_pre_hook(self._see_windows)

    def _see(self, distance: Tensor) -> None:
        self.nearest = min(self.nearest, distance.item())

    def _see_windows(self, pool: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        windows = inputs[0].detach()
        for axis, size in enumerate(pool.kernel_size):
            windows = windows.unfold(2 + axis, size, size)
        windows = windows.flatten(inputs[0].dim())
        if windows.shape[-1] > 1:
            best, second = windows.topk(2).values.unbind(-1)
            self._see((best - second).min() / windows.abs().max())


def away_from_kinks(network: E2ENet) -> E2ENet:
    """Norms whose channels are almost all positive or almost all negative, some either way."""
    for module in network.modules():
        if isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
            nn.init.uniform_(module.weight, 0.1, 0.3)
            nn.init.uniform_(module.bias, 1.5, 2.5)
            for values in (module.weight, module.bias):
                values.data *= torch.randint(0, 2, values.shape) * 2 - 1
    return network


def errors(network: E2ENet, x: Tensor) -> tuple[dict[str, float], float]:
    """Of the gradient of each parameter, as a share of its largest; and the distance to the nearest kink."""
    _, ours = gradients(network, x)
    assert engine.why_pytorch(network) is None
    with engine.disabled():
        _, single = gradients(network, x)
        reference = copy.deepcopy(network).double()
        reference.recompute = "none"
        kinks = Kinks(reference)
        _, exact = gradients(reference, x.double())
    assert ours.keys() == exact.keys()
    found = {}
    of_all = max(g.abs().max().item() for g in exact.values())
    for name, expected in exact.items():
        largest = max(expected.abs().max().item(), 1e-3 * of_all)  # what is next to nothing of that is left of larger sums
        error, of_float32 = ((g[name] - expected).abs().max().item() for g in (ours, single))
        if name.endswith("conv.bias"):  # which the norm removes again: zero
            largest = max(exact[f"{name.removesuffix('bias')}weight"].abs().max().item(), 1e-3 * of_all)
        # Where all but a small part of a sum cancels, float32 itself is no more exact than that
        found[name] = max(0.0, error - 30 * of_float32) / largest
    return found, kinks.nearest


@st.composite
def cases(draw: st.DrawFn) -> tuple[E2ENet, Tensor]:
    network, divisor = drawn_network(draw, [1, 2, 2], biases=False)
    most = 40 if len(divisor) == 2 else 20
    size = [d * draw(st.integers(1, max(1, most // d))) for d in divisor]
    if all(s <= 2 * d for s, d in zip(size, divisor, strict=True)):
        size[-1] += 3 * divisor[-1]  # what is left of few voxels after their norm is as small as rounding
    return away_from_kinks(network.train()), image(network, *size, batch=draw(st.integers(1, 3)))


# ---- gradients -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, derandomize=True)
@given(cases(), st.sampled_from(KERNELS or ["none"]))
def test_gradients_are_pytorchs(case: tuple[E2ENet, Tensor], kernels: str) -> None:
    """Over shapes, strides, sparsities, batch sizes, and every kind of kernel.

    In layers of one or two channels, sums that cancel have been seen to be 1.3e-4 off, beyond the allowance for them.
    """
    network, x = case
    with override(engine_kernels=kernels):
        found, nearest_kink = errors(network, x)
    narrow = min(p.shape[0] for p in network.parameters()) <= 2
    # Next to a kink the two may be on different sides, and one pixel's gradient differs
    limit = 10 * TOLERANCE if nearest_kink <= 1e-5 else 3 * TOLERANCE if narrow else TOLERANCE
    assert max(found.values()) <= limit, max(found, key=found.__getitem__)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(cases(), st.sampled_from(KERNELS or ["none"]))
def test_gradients_are_pytorchs_at_length(case: tuple[E2ENet, Tensor], kernels: str) -> None:
    test_gradients_are_pytorchs.hypothesis.inner_test(case, kernels)


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_wide_layers(sparsity: float) -> None:
    """Threads work on the same blocks of tiles, and connections are visited in several chunks of input maps."""
    network = away_from_kinks(make_network([[1, 1, 1], [1, 2, 2]], [48, 150], feature_sparsity=sparsity))
    found, _ = errors(network, image(network, 3, 20, 36))
    assert max(found.values()) <= TOLERANCE


def test_a_first_level_with_a_stride() -> None:
    network = away_from_kinks(make_network([[2, 2, 2], [1, 2, 2]], [10, 12]))
    found, _ = errors(network, image(network, 8, 24, 24, batch=2))
    assert max(found.values()) <= TOLERANCE


def test_an_ordinary_network() -> None:
    """With kinks: a few pixels on the other side of zero, in gradients that are otherwise the same."""
    network = make_network(features=[12, 24, 40])
    _, ours = gradients(network, image(network, 16, 32, 32, batch=2))
    with engine.disabled():
        _, theirs = gradients(network, image(network, 16, 32, 32, batch=2))
    for name, expected in theirs.items():
        if not name.endswith("conv.bias"):
            assert (ours[name] - expected).norm() <= 2e-3 * expected.norm(), name


@pytest.mark.parametrize(
    "size", [(14, 160, 160), (16, 144, 148)]
)  # where slices begin with a line of the cache, and where not
def test_gradients_that_no_cache_holds(size: tuple[int, int, int]) -> None:
    """They are written past the caches, where whole lines of them are known."""
    network = away_from_kinks(make_network([[1, 1, 1], [1, 2, 2]], [26, 24]))
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(4))  # no activation within 1e-6 of zero
    with engine.disabled():
        _, theirs = gradients(network, x)
    for kernels in KERNELS:
        with override(engine_kernels=kernels):
            _, ours = gradients(network, x)
        for name, expected in theirs.items():
            if not name.endswith("conv.bias"):
                assert (ours[name] - expected).norm() <= 1e-3 * expected.norm(), (kernels, name)


def test_equal_values_in_a_window_have_the_gradient_of_the_first() -> None:
    network = make_network([[1, 1, 1], [2, 2, 2]], [4, 6], feature_sparsity=0.0)
    x = torch.zeros(1, 1, 4, 8, 8)  # all activations of a map are the same, but at the border
    _, ours = gradients(network, x)
    with engine.disabled():
        _, theirs = gradients(network, x)
    weight = "decoder.stages.0.0.blocks.0.norm.bias"
    assert torch.allclose(ours[weight], theirs[weight], rtol=1e-3, atol=1e-3)


def test_inactive_connections_have_no_gradient() -> None:
    network = make_network()
    _, ours = gradients(network, image(network, 4, 16, 16))
    for name, layer in maskable_layers(network):
        weight = ours[f"{name}.weight"]
        assert (weight[~layer.mask] == 0).all()
        assert weight[layer.mask].any()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("patch", [(8, 32, 48), (10, 40, 24), (6, 24, 88)])
def test_threads_change_rounding_alone_and_results_repeat(kernels: str, patch: tuple[int, ...]) -> None:
    """With more threads the blocks of coarse levels have fewer tiles, and some threads have none."""
    network = make_network(features=[12, 24, 40])
    x = image(network, *patch)
    before = torch.get_num_threads()
    try:
        with override(engine_kernels=kernels):
            torch.set_num_threads(1)
            (_, one), (_, again) = gradients(network, x), gradients(network, x)
            of_others = []
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                of_others.append(gradients(network, x)[1])
    finally:
        torch.set_num_threads(before)
    for name, gradient in one.items():
        assert torch.equal(gradient, again[name])
        for other in of_others:
            assert (gradient - other[name]).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-6)


def test_gradients_add_up_over_iterations() -> None:
    network = make_network()
    first, second = image(network, 4, 16, 16), image(network, 8, 16, 32)
    parts = [gradients(network, x)[1] for x in (first, second)]
    network.zero_grad()
    losses = []
    for x in (first, second):  # two forward passes before the backward pass, of two patch sizes
        generator = torch.Generator().manual_seed(2)
        losses.append(sum((level * torch.randn(level.shape, generator=generator)).sum() for level in network(x)))
    sum(losses).backward()
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.grad, parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-4)


def test_parameters_without_gradient_and_heads_that_are_not_used() -> None:
    network = make_network([[1, 1, 1], *[[1, 2, 2]] * 3])
    network.encoder.requires_grad_(False)
    logits = network(image(network, 3, 32, 32))
    assert len(logits) == 2
    logits[0].sum().backward()
    assert engine.why_pytorch(network) is None
    assert all(p.grad is None for p in network.encoder.parameters())
    coarse, fine = network.decoder.seg_layers
    assert coarse.weight.grad is None
    assert fine.weight.grad.any()


@pytest.mark.parametrize("heads", [[0], [1], [2], [1, 2], [0, 2]])
def test_what_a_loss_does_not_reach_has_no_gradient(heads: list[int]) -> None:
    """A gradient of zero would let an optimizer move it, by momentum and weight decay."""
    network = make_network([[1, 1, 1], *[[1, 2, 2]] * 4], [6, 6, 6, 6, 6])
    x, reached = image(network, 2, 64, 64), []
    for mode in (nullcontext(), engine.disabled()):
        network.zero_grad()
        with mode:
            logits = network(x)
            torch.stack([logits[head].square().sum() for head in heads]).sum().backward()
        reached.append({name for name, parameter in network.named_parameters() if parameter.grad is not None})
    assert engine.why_pytorch(network) is None
    assert reached[0] == reached[1]
    assert (len(reached[0]) < len(list(network.named_parameters()))) == (heads != [0, 1, 2])


def test_heads_that_share_a_weight_have_the_gradient_of_the_one_that_is_used() -> None:
    network = make_network([[1, 1, 1], *[[1, 2, 2]] * 3], [6, 6, 6, 6])
    coarse, fine = network.decoder.seg_layers
    coarse.weight = fine.weight
    x = image(network, 3, 32, 32)
    network(x)[0].sum().backward()
    assert engine.why_pytorch(network) is None
    ours, fine.weight.grad = fine.weight.grad, None
    with engine.disabled():
        network(x)[0].sum().backward()
    assert torch.allclose(ours, fine.weight.grad, rtol=1e-3, atol=1e-3)


# ---- training --------------------------------------------------------------------------------------------------------


def replace_some(network: E2ENet, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A fifth of the connections of each layer, as an update of the topology does."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in maskable_layers(network):
        scores = torch.rand(layer.mask.shape, generator=generator) + layer.mask
        scores[torch.rand(layer.mask.shape, generator=generator) < 0.2] = 0.5
        mask = torch.zeros_like(layer.mask).flatten()
        mask[scores.flatten().topk(layer.n_active).indices] = True
        mask = mask.reshape(layer.mask.shape)
        states = [state for state in optimizer.state.get(layer.weight, {}).values() if isinstance(state, Tensor)]
        layer.change_topology(mask, mask & ~layer.mask, states)


def losses(steps: int) -> list[float]:
    network = make_network(features=[8, 16, 24], feature_sparsity=0.7)
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    optimizer = torch.optim.SGD(network.parameters(), 0.005, momentum=0.9, nesterov=True, weight_decay=3e-5)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        if step % 10 == 9:
            replace_some(network, optimizer, step)
        x = torch.randn(2, 1, 8, 16, 16, generator=generator)
        target = (x[:, 0] > 0.5).long() + (x[:, 0].roll(1, 1) > 0.5)
        optimizer.zero_grad()
        (logits,) = network(x)
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_fifty_steps_with_updates_of_the_topology_have_pytorchs_losses() -> None:
    ours = losses(50)
    with engine.disabled():
        theirs = losses(50)
    assert ours[-1] < 0.9 * ours[0]
    differences = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    # Rounding grows from step to step: PyTorch's float32 and float64 differ by 6e-4 after 30 of them, and by 1.3e-3 after 40
    assert max(differences[:25]) <= 1e-4
    assert max(differences) <= 5e-3


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel averages what two processes found with their halves of a batch."""
    run_both(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (_, averaged) in first.items():
        assert torch.equal(averaged, second[name][1])
        assert torch.allclose(averaged, (first[name][0] + second[name][0]) / 2, rtol=1e-5, atol=1e-6)


# ---- autograd's rules, and where PyTorch stays -----------------------------------------------------------------------


def test_weights_that_change_before_the_backward_pass_are_an_error() -> None:
    network = make_network()
    (logits,) = network(image(network, 4, 16, 16))
    with torch.no_grad():
        network.decoder.seg_layers[-1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_parameters_that_no_logit_depends_on_may_change_before_the_backward_pass() -> None:
    """As a weight of the loss does that is learned and held within bounds."""
    network = make_network()
    network.encoder.log_sigma = nn.Parameter(torch.zeros(()))
    (logits,) = network(image(network, 4, 16, 16))
    with torch.no_grad():
        network.encoder.log_sigma.clamp_(-1, 1)
        network.encoder.stages[0][0].conv.bias.mul_(1)  # which the norm takes away
    (logits.square().mean() * network.encoder.log_sigma.exp()).backward()
    assert engine.why_pytorch(network) is None
    assert network.encoder.log_sigma.grad.item() > 0
    assert network.decoder.seg_layers[-1].weight.grad.any()


@pytest.mark.parametrize("linear", [True, False])
def test_gradients_of_gradients_are_an_error(linear: bool) -> None:
    """A penalty on gradients would be left out silently otherwise, where the loss is linear in the logits."""
    network = make_network()
    (logits,) = network(image(network, 4, 16, 16))
    loss = logits.sum() if linear else logits.square().sum()
    found = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
    assert engine.why_pytorch(network) is None
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.stack([gradient.square().sum() for gradient in found]).sum().backward()


def test_other_weights_may_be_used_before_the_backward_pass() -> None:
    """Those of the graph count, as in meta-learning and in a loss of two sets of weights."""
    network = away_from_kinks(make_network())
    x, found = image(network, 8, 16, 16), []
    first = {name: parameter.detach().clone().requires_grad_() for name, parameter in network.named_parameters()}
    second = {name: 2 * parameter.detach() + 0.1 for name, parameter in first.items()}
    for mode in (nullcontext(), engine.disabled()):
        with mode:
            (logits,) = functional_call(network, first, x)
            functional_call(network, second, x)
            generator = torch.Generator().manual_seed(2)
            loss = (logits * torch.randn(logits.shape, generator=generator)).sum()
            found.append(torch.autograd.grad(loss, list(first.values())))
    assert engine.why_pytorch(network) is None
    for name, ours, theirs in zip(first, *found, strict=True):
        if not name.endswith("conv.bias"):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), name


def test_a_second_backward_pass_is_an_error() -> None:
    network = make_network()
    (logits,) = network(image(network, 4, 16, 16))
    logits.sum().backward(retain_graph=True)
    with pytest.raises(E2ENetError, match="call backward once"):
        logits.sum().backward()


def test_kernels_may_change_from_one_iteration_to_the_next() -> None:
    network = make_network(features=[12, 24, 40])
    x = image(network, 4, 16, 16)
    _, first = gradients(network, x)
    for kernels in KERNELS:
        with override(engine_kernels=kernels):
            _, found = gradients(network, x)
        assert all(torch.allclose(found[name], g, rtol=1e-2, atol=1e-2 * g.abs().max()) for name, g in first.items())


def change_heads(network: E2ENet) -> None:
    head = network.decoder.seg_layers[-1]
    network.decoder.seg_layers[-1] = nn.Conv3d(head.in_channels, 7, 1, bias=False)


def add_a_parameter(network: E2ENet) -> None:
    network.encoder.temperature = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("change", [change_heads, change_eps, add_a_parameter])
def test_networks_may_change_from_one_iteration_to_the_next(change: Callable[[E2ENet], None]) -> None:
    network = away_from_kinks(make_network())
    x = image(network, 4, 16, 16)
    gradients(network, x)
    torch.manual_seed(1)
    change(network)
    assert_same_iteration(network, x)


def assert_same_iteration(network: E2ENet, x: Tensor) -> None:
    logits, ours = gradients(network, x)
    assert engine.why_pytorch(network) is None
    with engine.disabled():
        expected, theirs = gradients(network, x)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(logits, expected, strict=True))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if not name.endswith("conv.bias"):
            assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_parameters_may_change_their_places_from_one_iteration_to_the_next() -> None:
    """The order of those of a module, and which layers share one."""
    network = away_from_kinks(make_network())
    x = image(network, 4, 16, 16)
    first, second = network.encoder.stages[0][0].norm, network.encoder.stages[0][1].norm
    gradients(network, x)
    weight = first.weight
    del first.weight
    first.weight = weight  # behind the bias
    assert_same_iteration(network, x)
    for shared in (first.weight, first.bias):
        second.weight = shared
        assert_same_iteration(network, x)


def test_a_module_that_is_put_in_later_is_not_left_out() -> None:
    network = make_network()
    x = image(network, 4, 16, 16)
    gradients(network, x)
    heads = network.decoder.seg_layers
    heads[-1] = nn.Sequential(heads[-1], nn.Softmax(1))
    found, _ = gradients(network, x)
    assert torch.allclose(found[0].sum(1), torch.ones(()), atol=1e-5)
    assert "a head is Sequential" in str(engine.why_pytorch(network))


def test_threads_may_train_the_same_network() -> None:
    """A forward pass does not read the kernels that the backward pass of another thread has turned."""
    network = make_network(features=[12, 24, 40])
    x = image(network, 8, 32, 32)
    expected = [level.detach() for level in network(x)]
    wrong = []

    def iterate() -> None:
        for _ in range(20):
            logits = network(x)
            if not all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True)):
                wrong.append(1)
            torch.autograd.grad(logits[0].sum(), network.encoder.stages[0][0].conv.weight)

    threads = [Thread(target=iterate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_default_dtype_does_not_matter() -> None:
    network = make_network()
    x = image(network, 4, 16, 16)
    logits, _ = gradients(network, x)
    engine.release(network)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        found = as_list(network(x))
        torch.autograd.backward(found[:1], [torch.ones_like(found[0])])
    finally:
        torch.set_default_dtype(default)
    assert all(torch.equal(a, b) for a, b in zip(found, logits, strict=True))


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_default_device_does_not_matter(storage: str) -> None:
    network = make_network()
    x = image(network, 4, 16, 16)
    with override(engine_storage=storage):
        logits, expected = gradients(network, x)
        engine.release(network)
        with torch.device("meta"):
            found = as_list(network(x))
            torch.autograd.backward(found[:1], [torch.ones_like(found[0], device="cpu")])
            assert engine.why_pytorch(network) is None
            with torch.inference_mode():
                predicted = as_list(network.eval()(x))[0]
            assert engine.why_pytorch(network) is None
    assert all(torch.equal(a, b) for a, b in zip(found, logits, strict=True))
    assert (predicted - logits[0]).abs().max() <= 5e-3 * logits[0].abs().max()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == set(expected)


def test_memory_is_used_again_and_goes_on_release() -> None:
    network = make_network()
    x = image(network, 4, 16, 16)
    session = training_session_of(network)
    gradients(network, x)
    (before,) = session.idle_programs()
    gradients(network, x)
    (after,) = session.idle_programs()
    assert before is after
    network(x)  # whose graph is never used
    assert sum(engine.profile(network).values()) == 0
    gradients(network, x)
    assert sum(engine.profile(network).values()) > 0
    engine.release(network)
    assert session.idle_programs() == []


def test_training_and_validation_hold_no_memory_for_each_other() -> None:
    network, core = make_network(), load_core()
    assert isinstance(core, Core)
    x = image(network, 4, 16, 16)
    _, expected = gradients(network, x)
    assert training_session_of(network).idle_programs()
    network.eval()
    with torch.no_grad():
        network(x)
    assert session_of(network).idle_programs()
    assert not training_session_of(network).idle_programs()
    of_prediction = weakref.ref(session_of(network).plan(network, core).weights)
    assert of_prediction() is not None
    network.train()
    _, again = gradients(network, x)
    assert not session_of(network).idle_programs()
    assert of_prediction() is None
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_that_keeps_nothing_is_given_back_during_the_loss(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(features=[8, 16, 24])
    x = image(network, 8, 32, 32, batch=batch)
    logits, kept = gradients(network, x)
    engine.release(network)
    emptied = []

    def overwritten(memory: Floats, first: int, last: int) -> None:
        emptied.append(last - first)
        memory.view(np.uint8)[first:last] = 255  # not a number
        empty(memory, first, last)

    monkeypatch.setattr(training_program, "WORTH_EMPTYING", 1)
    monkeypatch.setattr(training_program, "empty", overwritten)
    for _ in range(2):
        again, ours = gradients(network, x)
        assert all(torch.equal(a, b) for a, b in zip(again, logits, strict=True))
        assert all(torch.equal(ours[name], gradient) for name, gradient in kept.items())
    programs = training_session_of(network).idle_programs()
    assert 0.05 * programs[0].n_bytes < sum(emptied) / 2 < programs[0].n_bytes


def stays_with_pytorch(network: E2ENet, x: Tensor) -> str:
    for level in as_list(network(x)):
        level.sum().backward(retain_graph=True)
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())
    reason = engine.why_pytorch(network)
    assert reason is not None
    return reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.1}}, "dropout"),
        ({"learned_shift": True}, "learns its depth shift"),
        ({"kernel_size": (3, 3, 3)}, "kernel"),
        ({"norm_op": nn.BatchNorm3d}, "BatchNorm3d"),
        ({"nonlin": nn.ReLU}, "activation"),
        ({"strides": [[1, 1, 1], [1, 4, 4]]}, "stride"),
    ],
)
def test_other_configurations_stay_with_pytorch(options: dict[str, object], reason: str) -> None:
    network = make_network(**options)  # type: ignore[arg-type]
    assert reason in stays_with_pytorch(network, image(network, 4, 16, 16))
    assert engine.why_not_trained(network, (1, 1, 4, 16, 16)) is not None


def test_hooks_and_wanted_gradients_stay_with_pytorch() -> None:
    network = make_network()
    x = image(network, 4, 16, 16)
    assert engine.why_not_trained(network, x.shape) is None
    handle = network.encoder.stages[0].register_full_backward_hook(lambda *_: None)
    assert "backward hooks" in stays_with_pytorch(network, x)
    handle.remove()
    assert "gradient of the input" in stays_with_pytorch(network, x.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in stays_with_pytorch(network, x)
    _, layer = next(maskable_layers(network))
    layer.dense_gradients = True
    assert "connections that are off" in stays_with_pytorch(network, x)
    assert layer.weight.grad is not None
    assert layer.weight.grad[~layer.mask].any()
    layer.dense_gradients = False
    gradients(network, x)
    assert engine.why_pytorch(network) is None


def test_off_switch_and_small_networks() -> None:
    network = make_network()
    x = image(network, 4, 16, 16)
    with override(engine="off"):
        assert "switched off" in stays_with_pytorch(network, x)
    with override(engine="auto"):
        assert "the network is small" in stays_with_pytorch(network, x)
