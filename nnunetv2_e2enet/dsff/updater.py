"""The mechanism of dynamic sparse feature fusion: replace the least important connections by others.

The number of active connections of a layer never changes. Where output maps share their input maps in blocks, blocks are
replaced as connections are: importance and growth score of a block are the sums over its connections. Every update draws its
random numbers from (seed, epoch, layer) alone, so that a resumed training draws the same ones as an uninterrupted one.
Topologies are the same where the weights are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, distributed, nn

from nnunetv2_e2enet.dsff.criteria import Growth, Importance, KernelL1Norm, RandomGrowth, growth_of, importance_of
from nnunetv2_e2enet.dsff.distribution import Distribution
from nnunetv2_e2enet.dsff.observation import finite, observed
from nnunetv2_e2enet.dsff.schedule import Schedule
from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.network.connections import MaskableLayer, maskable_layers


@dataclass(frozen=True)
class LayerUpdate:
    """The changes of one layer by an update.

    Attributes:
        importance: of each connection before the update, like the layer's mask.
        pruned, grown: bool, like the layer's mask. A connection where both are True was started anew.
        threshold: importance of the most important connection that was pruned; None where none was.
    """

    name: str
    importance: Tensor
    pruned: Tensor
    grown: Tensor
    threshold: float | None

    @property
    def replaced(self) -> int:
        """The number of connections that were grown, as many as were pruned."""
        return int(self.grown.sum())


@dataclass(frozen=True)
class TopologyUpdate:
    """The changes by an update."""

    epoch: int
    prune_fraction: float
    layers: tuple[LayerUpdate, ...]

    @property
    def replaced(self) -> int:
        """The number of connections that were grown in all layers."""
        return sum(layer.replaced for layer in self.layers)


class TopologyUpdater:
    """Prunes and grows the connections of a network's maskable layers.

    Args:
        network: any module with maskable layers, not wrapped.
        schedule: when, and what fraction.
        importance: what to keep; the L1 norm of kernels unless given.
        growth: what to try; uniform at random unless given.
        seed: of the random numbers that ``growth`` gets.

    Attributes:
        observes: the observations that the criteria need before an update; see ``observation``.

    Raises:
        E2ENetError: ``growth`` needs gradients of all connections, and layers store active weights alone.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        importance: Importance | None = None,
        growth: Growth | None = None,
        seed: int | str = 0,
    ) -> None:
        self.layers: dict[str, MaskableLayer] = dict(maskable_layers(network))
        self.schedule = schedule
        self.importance = importance or KernelL1Norm()
        self.growth = growth or RandomGrowth()
        self.seed = seed
        self.observes = {
            "dense_gradients": getattr(self.growth, "needs_dense_gradients", False),
            "input_deviations": getattr(self.importance, "needs_input_deviations", False),
        }
        for name, layer in self.layers.items():
            if layer.stores_active_only and self.observes["dense_gradients"]:
                raise E2ENetError(
                    f"{type(self.growth).__name__} needs gradients of all connections, but {name} stores active weights "
                    "alone: use RandomGrowth, or leave out store_active_only"
                )

    def needs_observation(self, epoch: int) -> bool:
        """Whether there is an update before ``epoch`` whose criteria ask for an ``observation``."""
        return self._is_due(epoch) and any(self.observes.values())

    def _is_due(self, epoch: int) -> bool:
        """A network whose connections are all active has no updates."""
        return self.schedule.is_update(epoch) and any(layer.n_active < layer.n_connections for layer in self.layers.values())

    def observation(self) -> AbstractContextManager[None]:
        """A context for a forward and backward pass from which the criteria get their observations, before an update.

        The optimizer must not see the gradients of this pass: those of inactive connections would count in clipping.
        """
        return observed(list(self.layers.values()), **self.observes)

    def observation_is_finite(self) -> bool:
        """Whether observations are finite; otherwise another batch, or a smaller loss scale, is needed."""
        return finite(list(self.layers.values()), **self.observes)

    @torch.no_grad()
    def update(self, epoch: int, optimizer: torch.optim.Optimizer) -> TopologyUpdate | None:
        """Change the topology if there is an update before ``epoch`` (from 0); call it before the epoch's first iteration.

        Returns:
            The changes, or None without an update.

        Raises:
            E2ENetError: the fraction is not from 0 to 1, or weights or scores cannot be ranked; nothing has been changed then.
        """
        if not self._is_due(epoch):
            return None
        fraction = self.schedule.prune_fraction(epoch)
        if not 0 <= fraction <= 1:  # NaN is not either
            raise E2ENetError(
                f"{type(self.schedule).__name__} gives {fraction} as the prune fraction before epoch {epoch}, but it is a "
                "share of the active connections: let it give a number from 0 to 1"
            )
        changes = tuple(self._plan(name, layer, fraction, epoch) for name, layer in self.layers.items())
        for change in changes:
            _replace(self.layers[change.name], change.pruned, change.grown, optimizer)
        return TopologyUpdate(epoch, fraction, changes)

    def _plan(self, name: str, layer: MaskableLayer, fraction: float, epoch: int) -> LayerUpdate:
        importance = importance_of(self.importance, name, layer)
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{epoch}/{name}").getrandbits(63))
        growth = growth_of(self.growth, name, layer, generator)
        pruned, grown = _select_blocks(layer, importance, growth, fraction)
        if distributed.is_available() and distributed.is_initialized():  # broadcast from rank 0, so that masks match
            for mask in (pruned, grown):
                flags = mask.to(torch.uint8)
                distributed.broadcast(flags, src=0)
                mask.copy_(flags.bool())
        threshold = float(importance[pruned].max()) if pruned.any() else None
        return LayerUpdate(name, importance, pruned, grown, threshold)


def select(mask: Tensor, importance: Tensor, growth: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The connections to prune and those to grow.

    ``ceil(fraction * active)`` of the active connections with the lowest importance are pruned. As many with the highest
    growth score are grown: of those that were inactive before, or of all inactive ones, the just pruned among them, where
    those are too few. A layer without inactive connections is dense and stays so.

    Args:
        mask: bool, True where active.
        importance: scores of the mask's shape; the lowest active ones are pruned.
        growth: scores of the mask's shape; the highest inactive ones are grown.
        fraction: from 0 to 1.

    Returns:
        Two bool tensors of the mask's shape, with the same number of True: pruned and grown. A connection where both are True
        starts anew.
    """
    active = mask.flatten()
    n_active = int(active.sum())
    n_inactive = active.numel() - n_active
    count = ceil(fraction * n_active) if n_inactive else 0

    kept_order = importance.flatten().masked_fill(~active, torch.inf).argsort(stable=True)
    pruned = torch.zeros_like(active)
    pruned[kept_order[:count]] = True

    # Candidates in ranks: inactive before, just pruned, active; the first two in one where the first is too small. Within a
    # rank by score, highest first.
    by_score = growth.flatten().argsort(descending=True, stable=True)
    rank = active.to(torch.uint8) * 2 - pruned.to(torch.uint8) * (2 if n_inactive < count else 1)
    order = by_score[rank[by_score].argsort(stable=True)]
    grown = torch.zeros_like(active)
    grown[order[:count]] = True
    return pruned.reshape(mask.shape), grown.reshape(mask.shape)


def _select_blocks(layer: MaskableLayer, importance: Tensor, growth: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """``select`` among the blocks of a layer; among the inputs of each block where all shall have as many."""
    mask, importance, growth = layer.by_block(layer.mask).bool(), layer.by_block(importance), layer.by_block(growth)
    if layer.equal_blocks:
        blocks = zip(*(t.unbind(layer.output_axis) for t in (mask, importance, growth)), strict=True)
        each = [select(m, i, g, fraction) for m, i, g in blocks]
        pruned, grown = (torch.stack(masks, layer.output_axis) for masks in zip(*each, strict=True))
    else:
        pruned, grown = select(mask, importance, growth, fraction)
    return layer.from_blocks(pruned), layer.from_blocks(grown)


def _replace(layer: MaskableLayer, pruned: Tensor, grown: Tensor, optimizer: torch.optim.Optimizer) -> None:
    values = [layer.weight.grad, *optimizer.state.get(layer.weight, {}).values()]
    states = [value for value in values if isinstance(value, Tensor) and value.shape == layer.weight.shape]
    layer.change_topology((layer.mask & ~pruned) | grown, pruned | grown, states)
    layer.explored.logical_or_(layer.mask)


def random_topology(network: nn.Module, sparsity: float, distribution: Distribution, seed: int | str) -> None:
    """Give every maskable layer a uniform random set of active connections, the same for the same seed.

    Raises:
        E2ENetError: a layer cannot have as many active connections as the distribution gives it.
    """
    layers = dict(maskable_layers(network))
    for name, n_active in distribution.active(sparsity, layers).items():
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/start/{name}").getrandbits(63))
        layer = layers[name]
        layer.set_random_topology(n_active, generator)
        if not layer.weight.is_meta and layer.n_active != n_active:  # in whole blocks, or not more than there are
            raise E2ENetError(
                f"{type(distribution).__name__} gives {name} {n_active} active connections, but it can have {layer.n_active}: "
                "let the distribution return layer.connections_at(density)"
            )


def sparsity(layers: Mapping[str, MaskableLayer]) -> float:
    """Share of connections that are off; 0 without any maskable layer."""
    connections = sum(layer.n_connections for layer in layers.values())
    return sum(layer.n_connections - layer.n_active for layer in layers.values()) / max(connections, 1)


def explored_share(layers: Mapping[str, MaskableLayer]) -> float:
    """Share of connections that have been active at any time; 0 without any maskable layer."""
    connections = sum(layer.n_connections for layer in layers.values())
    return sum(int(layer.explored.sum()) for layer in layers.values()) / max(connections, 1)
