import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import layers_of
from torch import Tensor, nn

from nnunetv2_e2enet.dsff import (
    CosineSchedule,
    ErdosRenyiKernel,
    GradientGrowth,
    RandomGrowth,
    StaticSchedule,
    TopologyUpdater,
    Uniform,
    explored_share,
    random_topology,
    sparsity,
)
from nnunetv2_e2enet.dsff.updater import select
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import (
    MaskableLayer,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    maskable_layers,
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.99, nesterov=True, weight_decay=3e-5),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}
SPARSITIES = st.floats(0.0, 0.97)


def tiny(a: int, b: int, c: int) -> nn.Sequential:
    return nn.Sequential(MaskedConv3d(a, b, (1, 3, 3), padding=(0, 1, 1)), MaskedConvTranspose3d(b, c, 2, 2, bias=False))


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = next(network.parameters()).shape[1]
    optimizer.zero_grad()
    network(torch.randn(1, width, 2, 4, 4, generator=generator)).square().mean().backward()
    optimizer.step()


def observe(network: nn.Module, optimizer: torch.optim.Optimizer, updater: TopologyUpdater, seed: int) -> None:
    """A pass of its own before an update, as the trainer makes it."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    width = next(layer.n_inputs for layer in layers_of(network))
    with updater.observation():
        network(torch.randn(1, width, 2, 4, 4, generator=generator)).square().mean().backward()


@settings(deadline=None, max_examples=120)
@given(st.tuples(*[st.integers(1, 7)] * 3), SPARSITIES, st.sampled_from(sorted(OPTIMIZERS)), st.booleans(), st.integers(0, 99))
def test_long_update_sequences(
    widths: tuple[int, int, int], feature_sparsity: float, optimizer_name: str, by_gradient: bool, seed: int
) -> None:
    network = tiny(*widths)
    random_topology(network, feature_sparsity, Uniform(), seed)
    optimizer = OPTIMIZERS[optimizer_name](network.parameters())
    growth = GradientGrowth() if by_gradient else RandomGrowth()
    n_epochs = 12
    updater = TopologyUpdater(network, CosineSchedule(n_epochs, 1, 0.5), growth=growth, seed=seed)
    for epoch in range(n_epochs):
        for step in range(2):
            train_step(network, optimizer, 100 * epoch + step)
        before = [(layer.mask.clone(), layer.weight.detach().clone()) for layer in layers_of(network)]
        if by_gradient:
            observe(network, optimizer, updater, epoch)
        update = updater.update(epoch + 1, optimizer)
        dense = all(mask.all() for mask, _ in before)
        assert (update is None) == (dense or epoch + 1 >= n_epochs - 1)
        for layer, (mask, weight) in zip(layers_of(network), before, strict=True):
            assert layer.n_active == round((1 - feature_sparsity) * layer.n_connections)
            assert bool((layer.explored >= layer.mask).all())
            grown, pruned = layer.mask & ~mask, mask & ~layer.mask
            if update is None:
                assert not grown.any()
                continue
            restarted = layer.mask & mask & (layer.weight.flatten(2) == 0).all(2)
            if (~mask).sum() >= math.ceil(update.prune_fraction * mask.sum()):
                importance = weight.abs().flatten(2).sum(2)
                kept = layer.mask & mask
                if pruned.any() and kept.any():
                    assert importance[pruned].max() <= importance[kept].min()
                assert int(grown.sum()) == math.ceil(update.prune_fraction * int(mask.sum()))
            else:  # too few were inactive: some of the pruned start anew, or the layer is dense
                assert mask.all() or restarted.sum() + grown.sum() >= math.ceil(update.prune_fraction * int(mask.sum()))
            assert_clean(layer, grown | pruned, optimizer)


def assert_clean(layer: MaskableLayer, changed: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Pruned and grown connections have zero weights and zero optimizer state."""
    assert layer.weight[changed].abs().sum() == 0
    assert layer.weight[~layer.mask].abs().sum() == 0
    states = [v for v in optimizer.state[layer.weight].values() if isinstance(v, Tensor) and v.shape == layer.weight.shape]
    assert states
    assert all(value[changed].abs().sum() == 0 for value in states)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.data())
def test_select(n: int, data: st.DataObject) -> None:
    """Checked with sorted Python lists: pruned are the least important, grown the highest scores of the inactive."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    scores = st.lists(st.integers(-50, 50).map(float), min_size=n, max_size=n, unique=n <= 100)
    importance, growth = torch.tensor(data.draw(scores)), torch.tensor(data.draw(scores))
    fraction = data.draw(st.floats(0, 1))
    pruned, grown = select(mask, importance, growth, fraction)
    active = [i for i in range(n) if mask[i]]
    inactive = [i for i in range(n) if not mask[i]]
    count = math.ceil(fraction * len(active)) if inactive else 0
    expected_pruned = sorted(active, key=lambda i: importance[i].item())[:count]
    candidates = sorted(inactive if len(inactive) >= count else inactive + expected_pruned, key=lambda i: -growth[i].item())
    assert set(pruned.nonzero().flatten().tolist()) == set(expected_pruned)
    assert set(grown.nonzero().flatten().tolist()) == set(candidates[:count])


@pytest.mark.parametrize("layer", [MaskedConv2d(5, 4, 1), MaskedConvTranspose2d(4, 5, 2)])
def test_the_topology_of_the_start_is_uniform(layer: MaskableLayer) -> None:
    """Every connection is as likely as any other (chi-square, 1e-5), and so is every pair of them, in one row or in two."""
    n, active, all_of_them = 3000, 6, 20
    network, times, in_a_row = nn.Sequential(layer), torch.zeros(4, 5), 0
    for seed in range(n):
        random_topology(network, 0.7, Uniform(), seed)
        times += layer.mask
        of_row = layer.mask.sum(1)
        in_a_row += int((of_row * (of_row - 1) // 2).sum())
    expected, variance = n * active / all_of_them, n * active / all_of_them * (1 - active / all_of_them)
    chi_square = ((times - expected) ** 2).sum().item() / variance * (all_of_them - 1) / all_of_them
    assert chi_square < 60  # 19 degrees of freedom
    pairs = 4 * 5 * 4 / 2  # that are in one row
    assert in_a_row == pytest.approx(n * pairs * active * (active - 1) / (all_of_them * (all_of_them - 1)), rel=0.05)


def test_growth_is_uniform() -> None:
    """Every connection that was inactive is as likely to be grown as any other (chi-square, 1e-4)."""
    network = nn.Sequential(MaskedConv2d(8, 5, 1))
    layer = layers_of(network)[0]
    start = torch.zeros(5, 8, dtype=torch.bool)
    start.view(-1)[:10] = True
    times = torch.zeros(5, 8)
    n = 3000
    for seed in range(n):
        layer.set_topology(start)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        TopologyUpdater(network, CosineSchedule(10, 1, 0.5), seed=seed).update(1, optimizer)
        times += layer.mask & ~start
    expected = n * 5 / 30
    chi_square = ((times[~start] - expected) ** 2 / (expected * (1 - 5 / 30))).sum().item()
    assert times[start].sum() == 0
    assert chi_square < 70  # 29 degrees of freedom


def test_growth_is_uniform_over_all_inactive_where_few_were_inactive_before() -> None:
    """8 of 10 are active and 4 of them are pruned: the 2 inactive ones and these 4 are equally likely (4 of 6)."""
    mask = torch.arange(10) < 8
    importance = torch.arange(10.0)
    generator = torch.Generator().manual_seed(0)
    n = 2000
    times = sum(select(mask, importance, torch.rand(10, generator=generator), 0.5)[1].float() for _ in range(n))
    assert isinstance(times, Tensor)
    assert times[4:8].sum() == 0
    assert times[[0, 1, 2, 3, 8, 9]].sub(n * 4 / 6).abs().max() < 5 * math.sqrt(n * 4 / 6 * 2 / 6)


def topologies(n_epochs: int, stop_at: int | None, seed: int) -> list[Tensor]:
    """Masks after each epoch; with ``stop_at``, everything but the state dicts is lost after that epoch."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, TopologyUpdater]:
        network = tiny(5, 6, 4)
        random_topology(network, 0.8, Uniform(), seed)
        optimizer = OPTIMIZERS["sgd"](network.parameters())
        return network, optimizer, TopologyUpdater(network, CosineSchedule(n_epochs, 2, 0.5), seed=seed)

    torch.manual_seed(seed)
    network, optimizer, updater = build()
    masks = []
    for epoch in range(n_epochs):
        train_step(network, optimizer, epoch)
        updater.update(epoch + 1, optimizer)
        masks.append(torch.cat([layer.mask.flatten() for layer in layers_of(network)]))
        if epoch == stop_at:
            saved, saved_optimizer = network.state_dict(), optimizer.state_dict()
            torch.manual_seed(seed + 12345)
            network, optimizer, updater = build()
            network.load_state_dict(saved)
            optimizer.load_state_dict(saved_optimizer)
    return masks


@pytest.mark.parametrize("stop_at", range(9))
def test_resumed_training_goes_through_the_same_topologies(stop_at: int) -> None:
    straight, resumed = topologies(10, None, seed=3), topologies(10, stop_at, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert len({tuple(m.tolist()) for m in straight}) > 3


def test_another_seed_gives_other_topologies() -> None:
    first, second = topologies(6, None, seed=3), topologies(6, None, seed=4)
    assert not torch.equal(first[-1], second[-1])


def test_same_seed_gives_the_same_start_whatever_the_global_random_state() -> None:
    masks = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        network = tiny(5, 6, 4)
        random_topology(network, 0.7, Uniform(), seed=11)
        masks.append([layer.mask for layer in layers_of(network)])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_cosine_schedule() -> None:
    schedule = CosineSchedule(n_epochs=1000, period=5, initial_fraction=0.5)
    assert schedule.prune_fraction(0) == 0.5
    assert schedule.prune_fraction(999) == 0
    assert schedule.prune_fraction(333) == pytest.approx(0.375)
    fractions = [schedule.prune_fraction(e) for e in range(1000)]
    assert fractions == sorted(fractions, reverse=True)
    assert [e for e in range(21) if schedule.is_update(e)] == [5, 10, 15, 20]
    assert not schedule.is_update(0)
    assert schedule.is_update(995)
    assert not CosineSchedule(n_epochs=1000, period=1).is_update(999)
    assert not any(CosineSchedule(1, 1).is_update(e) for e in range(3))


def test_static_schedule_and_dense_layers_change_nothing() -> None:
    for schedule, start in ((StaticSchedule(), 0.5), (CosineSchedule(10, 1), 0.0)):
        network = tiny(4, 4, 4)
        random_topology(network, start, Uniform(), 0)
        optimizer = OPTIMIZERS["sgd"](network.parameters())
        train_step(network, optimizer, 0)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        update = TopologyUpdater(network, schedule).update(1, optimizer)
        assert update is None or update.replaced == 0
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_weights_that_are_not_finite_stop_the_update_before_anything_changes() -> None:
    network = tiny(4, 4, 4)
    random_topology(network, 0.5, Uniform(), 0)
    last = layers_of(network)[-1]
    last.weight.data[last.mask] = float("nan")
    masks = [layer.mask.clone() for layer in layers_of(network)]
    with pytest.raises(E2ENetError, match=r"^1 has weights that are not finite: the training has diverged"):
        TopologyUpdater(network, CosineSchedule(10, 1)).update(1, torch.optim.SGD(network.parameters(), 0.1))
    assert all(torch.equal(layer.mask, m) for layer, m in zip(layers_of(network), masks, strict=True))


@dataclass
class EveryEpoch:
    """An update before each epoch, of the same fraction."""

    fraction: float = 0.5

    def is_update(self, epoch: int) -> bool:  # noqa: ARG002
        return True

    def prune_fraction(self, epoch: int) -> float:  # noqa: ARG002
        return self.fraction


@dataclass
class ByMask:
    """Importance or growth of any numbers."""

    numbers: Callable[[Tensor], Tensor]

    def score(self, layer: MaskableLayer, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG002
        return self.numbers(layer.mask)


def in_order(mask: Tensor) -> Tensor:
    return torch.arange(mask.numel()).reshape(mask.shape)


def half_sparse() -> nn.Sequential:
    network = tiny(4, 6, 4)
    random_topology(network, 0.6, Uniform(), 0)
    return network


def updated(importance: Callable[[Tensor], Tensor], growth: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Masks after an update by these scores."""
    network = half_sparse()
    updater = TopologyUpdater(network, EveryEpoch(), ByMask(importance), ByMask(growth))
    update = updater.update(1, torch.optim.SGD(network.parameters(), 0.1))
    assert update is not None
    assert update.replaced > 0
    return [layer.mask for layer in layers_of(network)]


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan])
def test_a_fraction_that_is_no_share_stops_the_update_before_anything_changes(fraction: float) -> None:
    """More than all active connections would be pruned, or fewer than none grown: the sparsity would not be kept."""
    network = half_sparse()
    masks = [layer.mask.clone() for layer in layers_of(network)]
    with pytest.raises(E2ENetError, match=rf"^EveryEpoch gives {fraction} as the prune fraction before epoch 1, .* 0 to 1"):
        TopologyUpdater(network, EveryEpoch(fraction)).update(1, torch.optim.SGD(network.parameters(), 0.1))
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers_of(network), masks, strict=True))


@pytest.mark.parametrize("filler", [-math.inf, math.inf, math.nan])
def test_scores_count_only_where_they_are_ranked(filler: float) -> None:
    """The importance of active connections, and the growth score of those that are inactive."""
    expected = updated(in_order, in_order)
    found = updated(
        lambda mask: in_order(mask).float().masked_fill(~mask, filler),
        lambda mask: in_order(mask).float().masked_fill(mask, filler),
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_scores_may_be_whole_numbers() -> None:
    whole, real = (updated(scores, scores) for scores in (in_order, lambda mask: in_order(mask).float()))
    assert all(torch.equal(a, b) for a, b in zip(whole, real, strict=True))


@pytest.mark.parametrize("role", ["importance", "growth"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (lambda mask: mask.float().sum(1), r"gives 0 scores of shape \[6\], but .* \[6, 4\]"),
        (lambda mask: mask.float()[..., None], r"gives 0 scores of shape \[6, 4, 1\], but .* \[6, 4\]"),
        (lambda mask: torch.full(mask.shape, -math.inf), r"gives (?:in)?active connections of 0 scores that are not finite"),
    ],
)
def test_scores_that_cannot_be_ranked_name_the_criterion(role: str, numbers: Callable[[Tensor], Tensor], message: str) -> None:
    """And no diverged training, as the weights are finite."""
    network = half_sparse()
    given = {"importance": ByMask(in_order), "growth": ByMask(in_order), role: ByMask(numbers)}
    updater = TopologyUpdater(network, EveryEpoch(), **given)
    with pytest.raises(E2ENetError, match=f"^ByMask {message}") as error:
        updater.update(1, torch.optim.SGD(network.parameters(), 0.1))
    assert "diverged" not in str(error.value)


def test_gradient_growth_finds_the_connections_that_matter() -> None:
    """The target is one of the inputs: its connection has the largest gradient."""
    torch.manual_seed(0)
    network = nn.Sequential(MaskedConv2d(12, 1, 1, bias=False))
    layer = layers_of(network)[0]
    start = torch.zeros(1, 12, dtype=torch.bool)
    start[0, :2] = True
    layer.set_topology(start)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    updater = TopologyUpdater(network, CosineSchedule(10, 1, 0.5), growth=GradientGrowth())
    x = torch.randn(64, 12, 1, 1)
    with updater.observation():
        (network(x)[:, 0] - x[:, 7]).square().mean().backward()
    updater.update(1, optimizer)
    assert bool(layer.mask[0, 7])


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_growth_sums_absolute_gradients_over_a_kernel(transposed: bool) -> None:
    """Neither gradients that cancel nor a single large one count for more than they are."""
    layer = MaskedConvTranspose2d(4, 1, 3, bias=False) if transposed else MaskedConv2d(4, 1, 3, bias=False)
    of_input = (lambda tensor: tensor[:, 0]) if transposed else (lambda tensor: tensor[0])
    start = torch.zeros_like(layer.mask)
    of_input(start)[0] = True
    layer.set_topology(start)
    layer.weight.grad = torch.zeros_like(layer.weight)
    gradients = of_input(layer.weight.grad)
    gradients[1] = torch.tensor([1.0, -1.0] * 4 + [1.0]).reshape(3, 3)  # 9 in all
    gradients[2, 0, 0] = 8
    gradients[3] = 0.8  # 7.2 in all
    updater = TopologyUpdater(nn.Sequential(layer), CosineSchedule(10, 1, 0.5), growth=GradientGrowth())
    updater.update(1, torch.optim.SGD(layer.parameters(), 0.1))
    assert of_input(layer.mask).tolist() == [False, True, False, False]


def test_dense_networks_have_no_updates() -> None:
    """And so no criterion looks at them: a batch of its own would change the order of a training's batches."""
    network = tiny(4, 4, 4)
    updater = TopologyUpdater(network, CosineSchedule(10, 1), growth=GradientGrowth())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    random_topology(network, 0.0, Uniform(), 0)
    assert not updater.needs_observation(1)
    assert updater.update(1, optimizer) is None
    random_topology(network, 0.5, Uniform(), 0)
    assert updater.needs_observation(1)


def test_gradient_growth_without_a_gradient_says_so() -> None:
    network = tiny(3, 3, 3)
    random_topology(network, 0.5, Uniform(), 0)
    updater = TopologyUpdater(network, CosineSchedule(10, 1), growth=GradientGrowth())
    with pytest.raises(E2ENetError, match=r"within TopologyUpdater\.observation"):
        updater.update(1, torch.optim.SGD(network.parameters(), 0.1))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5), SPARSITIES)
def test_erdos_renyi_keeps_the_budget_and_favours_small_layers(shapes: list[tuple[int, int]], feature_sparsity: float) -> None:
    layers: dict[str, MaskableLayer] = {str(i): MaskedConv2d(a, b, 3) for i, (a, b) in enumerate(shapes)}
    active = ErdosRenyiKernel().active(feature_sparsity, layers)
    total = sum(layer.n_connections for layer in layers.values())
    assert abs(sum(active.values()) - (1 - feature_sparsity) * total) <= len(layers) / 2 + 1e-6
    raw = {name: sum(layer.weight.shape) / layer.weight.numel() for name, layer in layers.items()}
    for a, b in itertools.combinations(layers, 2):
        small, large = (a, b) if raw[a] >= raw[b] else (b, a)
        rounding = 0.5 / layers[small].n_connections + 0.5 / layers[large].n_connections + 1e-9
        assert active[small] / layers[small].n_connections >= active[large] / layers[large].n_connections - rounding


def test_shares_without_maskable_layers() -> None:
    assert (sparsity({}), explored_share({})) == (0, 0)


def test_shares() -> None:
    network = tiny(10, 10, 10)
    random_topology(network, 0.8, Uniform(), 0)
    layers = dict(maskable_layers(network))
    assert sparsity(layers) == pytest.approx(0.8)
    assert explored_share(layers) == pytest.approx(0.2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    update = TopologyUpdater(network, CosineSchedule(10, 1, 0.5)).update(1, optimizer)
    assert update is not None
    assert update.replaced == 20
    assert sparsity(layers) == pytest.approx(0.8)
    assert explored_share(layers) == pytest.approx(0.3)
