import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnunetv2_e2enet import engine
from nnunetv2_e2enet.network import E2ENet, accounts, depth_shift
from nnunetv2_e2enet.network.learned_shift import LearnedDepthShift, hold_whole_offsets, interpolated_shift, learned_shifts

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]


def network(**changes: object) -> E2ENet:
    torch.manual_seed(0)
    arguments = {"learned_shift": True, "feature_sparsity": 0.5, **changes}
    return E2ENet(1, 3, 3, [5, 8, 9], nn.Conv3d, STRIDES, **arguments)  # type: ignore[arg-type]


def spread_offsets(net: nn.Module) -> None:
    for shift in learned_shifts(net):
        shift.offsets.data = 3 * torch.randn(len(shift.offsets), generator=torch.Generator().manual_seed(1))


def interpolated_by_definition(x: Tensor, offsets: list[float]) -> Tensor:
    out = torch.zeros_like(x)
    depth = x.shape[2]
    for c, offset in enumerate(offsets):
        for d in range(depth):
            below = math.floor(d - offset)
            for source, weight in ((below, below + 1 - (d - offset)), (below + 1, d - offset - below)):
                if 0 <= source < depth:
                    out[:, c, d] += weight * x[:, c, source]
    return out


@settings(deadline=None)
@given(st.lists(st.floats(-7, 7), min_size=1, max_size=5), st.integers(1, 6))
def test_interpolation_equals_its_definition(offsets: list[float], depth: int) -> None:
    x = torch.randn(2, len(offsets), depth, 2, 3, dtype=torch.float64)
    expected = interpolated_by_definition(x, offsets)
    torch.testing.assert_close(interpolated_shift(x, torch.tensor(offsets, dtype=torch.float64)), expected)


def test_gradients_of_maps_and_offsets() -> None:
    x = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([-1.3, 0.4, 2.6, -0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interpolated_shift, (x, offsets))


@pytest.mark.parametrize("shift_size", [1, 3, 5])
@pytest.mark.parametrize("training", [True, False])
def test_starts_as_the_restricted_depth_shift(shift_size: int, training: bool) -> None:
    maps = [torch.randn(2, c, 4, 3, 3) for c in (4, 3, 6)]
    shift = LearnedDepthShift(13, shift_size).train(training)
    assert torch.equal(shift(maps), depth_shift(maps, shift_size))


def test_prediction_moves_whole_slices() -> None:
    shift = LearnedDepthShift(4, 3).eval()
    shift.offsets.data = torch.tensor([-1.4, 0.6, 9.0, 1.8])
    x = torch.randn(1, 4, 5, 2, 2)
    assert shift.whole_offsets() == [-1, 1, 9, 2]
    assert torch.equal(shift([x]), interpolated_by_definition(x, [-1, 1, 9, 2]))
    x.requires_grad_()
    shift([x]).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, :, 0, 0].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0] * 5, [1, 1, 1, 0, 0]]


def test_offsets_are_learned_and_find_the_slice_that_matters() -> None:
    """The target is the input two slices further; the offset walks there over a whole slice, where the gradient has a kink."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 16, 4, 4)
    for _ in range(2):  # slices vary smoothly, as in scans: between unrelated ones there is no way to walk
        x = torch.stack([x.roll(k, 2) for k in range(5)]).mean(0)
    x /= x.std()
    shift = LearnedDepthShift(1, 1)
    target = x.roll(2, 2)
    optimizer = torch.optim.SGD(shift.parameters(), 0.5)
    for _ in range(80):
        optimizer.zero_grad()
        (shift([x]) - target)[:, :, 4:-4].square().mean().backward()
        optimizer.step()
    assert shift.offsets.item() == pytest.approx(2, abs=0.2)
    assert shift.whole_offsets() == [2]


def test_offsets_travel_in_the_state_dict() -> None:
    source, target = network(), network()
    spread_offsets(source)
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 1, 8, 16, 16)
    for training in (True, False):
        assert torch.equal(source.train(training)(x), target.train(training)(x))
    with pytest.raises(RuntimeError, match=r"shift\.offsets"):
        network(learned_shift=False).load_state_dict(source.state_dict())


def test_predictions_cost_what_the_restricted_shift_costs() -> None:
    learned, restricted = network(), network(learned_shift=False)
    ours, theirs = (accounts.multiply_accumulates(each, (1, each.input_channels, 8, 16, 16)) for each in (learned, restricted))
    assert ours == theirs
    assert learned.training
    offsets = sum(len(shift.offsets) for shift in learned_shifts(learned))
    assert accounts.parameter_counts(learned).total == accounts.parameter_counts(restricted).total + offsets


def test_in_two_dimensions_nothing_is_learned() -> None:
    net = E2ENet(1, 2, 2, 4, nn.Conv2d, [[1, 1], [2, 2]], learned_shift=True)
    assert not list(learned_shifts(net))


def test_held_offsets_are_whole_and_stay() -> None:
    net = network()
    spread_offsets(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        net(torch.randn(2, 1, 8, 16, 16)).square().mean().backward()
        optimizer.step()

    step()
    wanted = [shift.offsets.detach().round() for shift in learned_shifts(net)]
    hold_whole_offsets(net, optimizer)
    for _ in range(3):
        step()
    assert all(torch.equal(shift.offsets, offsets) for shift, offsets in zip(learned_shifts(net), wanted, strict=True))
    assert all(shift.offsets.grad is not None for shift in learned_shifts(net))  # all ranks have something to reduce
    x = torch.randn(1, 1, 8, 16, 16)
    torch.testing.assert_close(net(x), net.eval()(x))  # training computes what prediction will compute


def test_compiled_networks_are_one_graph() -> None:
    torch._dynamo.reset()
    net = network()
    spread_offsets(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(1, 1, 8, 16, 16)
    for training in (True, False):
        net.train(training)
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.skipif(isinstance(engine.load_core(), str), reason="the compiled core was not built")
def test_the_cpu_engine_moves_each_channel_by_its_own_offset(setting: Callable[..., None]) -> None:
    setting(engine="on")
    net = network().eval()
    x = torch.randn(1, 1, 8, 32, 32)
    for _ in range(2):
        with torch.inference_mode():
            ours = net(x)
            assert engine.why_pytorch(net) is None
            with engine.disabled():
                theirs = net(x)
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
        spread_offsets(net)  # and again with these
