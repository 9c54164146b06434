"""DSFF keeps what is useful, and nothing else tells its topologies from random ones. Small networks, really trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_e2enet.datasets.phantom import phantom_case
from nnunetv2_e2enet.dsff import CosineSchedule, Schedule, TopologyUpdater, Uniform, random_topology, sparsity
from nnunetv2_e2enet.network import E2ENet, MaskableLayer, fusion_flows

N_CLASSES, SIZE, EPOCHS, ITERATIONS, WIDTH = 5, 32, 20, 5, 16
SEEDS = range(3)
CENTRAL_NODE = "decoder.stages.0.1"  # the only one of three levels that all three flows reach
FLOWS = ("forward", "upward", "downward")

Data = tuple[Tensor, Tensor]


def phantom_slices(n_cases: int, seed: int) -> Data:
    images, labels = [], []
    for case in range(n_cases):
        image, segmentation = phantom_case(np.random.default_rng([seed, case]), (16, SIZE, SIZE), (2.0, 1.0, 1.0))
        for depth in (5, 7, 9, 11):
            images.append((image[depth] - image.mean()) / image.std())
            labels.append(segmentation[depth])
    return torch.tensor(np.stack(images))[:, None].float(), torch.tensor(np.stack(labels)).long()


@pytest.fixture(scope="module")
def phantoms() -> Data:
    return phantom_slices(8, seed=0)


@dataclass
class Trained:
    """A network after training, and what each epoch left: sparsity, connections that an update replaced."""

    network: E2ENet
    sparsities: list[float] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)

    def densities(self) -> dict[str, float]:
        """Share of active connections of each flow into the central node."""
        name = f"{CENTRAL_NODE}.blocks.0.conv"
        mask = cast(MaskableLayer, self.network.get_submodule(name)).mask
        return {flow: float(mask[:, maps].float().mean()) for flow, maps in fusion_flows(self.network)[name].items()}


def train(data: Data, seed: int, schedule: Schedule, silenced: str | None = None) -> Trained:
    """``silenced``: the flow into the central node whose source maps are zero."""
    torch.manual_seed(seed)
    network = E2ENet(1, N_CLASSES, 3, WIDTH, nn.Conv2d, [[1, 1], [2, 2], [2, 2]])
    if silenced is not None:
        index = FLOWS.index(silenced)
        network.get_submodule(CENTRAL_NODE).register_forward_pre_hook(
            lambda _node, maps: tuple(torch.zeros_like(m) if i == index else m for i, m in enumerate(maps))
        )
    random_topology(network, 0.8, Uniform(), seed)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=3e-5)
    updater = TopologyUpdater(network, schedule, seed=seed)
    result = Trained(network)
    batches = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - epoch / EPOCHS) ** 0.9
        for _ in range(ITERATIONS):
            chosen = torch.randint(len(data[0]), (2,), generator=batches)
            optimizer.zero_grad()
            F.cross_entropy(network(data[0][chosen]), data[1][chosen]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
        update = updater.update(epoch, optimizer)
        result.sparsities.append(sparsity(updater.layers))
        result.replaced.append(update.replaced if update is not None else 0)
    return result


DSFF = CosineSchedule(EPOCHS, period=1)


@pytest.fixture(scope="module")
def untouched(phantoms: Data) -> list[Trained]:
    return [train(phantoms, seed, DSFF) for seed in SEEDS]


def test_sparsity_is_constant_and_change_falls(untouched: list[Trained]) -> None:
    for trained in untouched:
        assert len(set(trained.sparsities)) == 1
        assert trained.sparsities[0] == pytest.approx(0.8, abs=1e-3)
        assert all(a >= b for a, b in zip(trained.replaced, trained.replaced[1:], strict=False))
        assert trained.replaced[0] > 2 * trained.replaced[EPOCHS // 2] > 4 * trained.replaced[-2] > trained.replaced[-1] == 0


@pytest.mark.parametrize("silenced", ["forward", "downward"])
def test_a_flow_without_information_is_given_up(phantoms: Data, untouched: list[Trained], silenced: str) -> None:
    """Its connections are a quarter of what they were; every seed alike. (The upward flow ends low in any case.)"""
    shares = [train(phantoms, seed, DSFF, silenced).densities() for seed in SEEDS]
    usual = [trained.densities() for trained in untouched]
    print(silenced, shares, usual)
    for share, before in zip(shares, usual, strict=True):
        assert all(share[silenced] < share[flow] for flow in FLOWS if flow != silenced)
        assert share[silenced] < 0.5 * before[silenced]
    mean = {flow: float(np.mean([share[flow] for share in shares])) for flow in FLOWS}
    assert all(mean[silenced] < 0.7 * mean[flow] for flow in FLOWS if flow != silenced)
