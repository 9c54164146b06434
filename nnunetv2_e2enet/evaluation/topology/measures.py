"""The numbers of the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import cast

import torch
from torch import Tensor

from nnunetv2_e2enet.dsff import KernelL1Norm, Part, TopologyRecord
from nnunetv2_e2enet.evaluation.topology.sources import Fold
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.connections import MaskableLayer
from nnunetv2_e2enet.network.depth_shift import shift_groups
from nnunetv2_e2enet.network.fusion import SOURCES, FusionNode

FLOWS = tuple(SOURCES)
MOST_EPOCHS = 5
"""Shown of a history."""


class MissingError(Exception):
    """The data of a view are missing; the message says which."""


def fusion_network(folds: Sequence[Fold]) -> E2ENet:
    """The network of all folds.

    Raises:
        MissingError: it is not E2ENet.
    """
    network = folds[0].network
    if network is None:
        raise MissingError(
            "this network is not E2ENet with its own encoder and decoder, so its fusion nodes and flows are not known"
        )
    return network


@dataclass(frozen=True)
class Node:
    """A fusion node ``x[level, stage]``.

    Attributes:
        layer: the convolution that fuses its flows.
        channels: of its output.
        parts: place of each flow in the lists of a record.
        connections: of each flow, active or not.
    """

    stage: int
    level: int
    layer: str
    channels: int
    parts: Mapping[str, int]
    connections: Mapping[str, int]

    def active(self, record: TopologyRecord) -> dict[str, int]:
        """Active connections by flow."""
        return {flow: record.active[place] for flow, place in self.parts.items()}

    def shares(self, record: TopologyRecord) -> dict[str, float]:
        """Of its active connections, by flow; 0 for a flow that the node does not have."""
        active = self.active(record)
        total = max(sum(active.values()), 1)
        return {flow: active.get(flow, 0) / total for flow in FLOWS}

    def densities(self, record: TopologyRecord) -> dict[str, float]:
        """Active connections of each flow over all of that flow."""
        return {flow: active / self.connections[flow] for flow, active in self.active(record).items()}


def nodes(fold: Fold) -> list[Node]:
    """All fusion nodes, stage by stage, finest level first; none in networks other than E2ENet."""
    by_layer: dict[str, dict[str, int]] = {}
    for index, part in enumerate(fold.history.parts):
        if part.flow:
            by_layer.setdefault(part.layer, {})[part.flow] = index
    result = []
    for layer, parts in by_layer.items():
        connections = {flow: fold.history.parts[index].connections for flow, index in parts.items()}
        node = fusion_network([fold]).get_submodule(layer.removesuffix(".blocks.0.conv"))
        assert isinstance(node, FusionNode)
        result.append(Node(node.stage, node.level, layer, fold.connections.layers[layer].mask.shape[0], parts, connections))
    return result


def kind_of(fold: Fold, part: Part) -> str:
    """The kind of a part: its flow, or another name for a layer without flows."""
    if part.flow:
        return part.flow
    if fold.network is not None:
        return "upsampling" if part.layer.endswith("upsample") else "second block"
    return "all layers"


def totals(fold: Fold, values: Sequence[float]) -> dict[str, float]:
    """Sums of values of the parts over the network, by kind; flows first."""
    result: dict[str, float] = {}
    for part, value in zip(fold.history.parts, values, strict=True):
        kind = kind_of(fold, part)
        result[kind] = result.get(kind, 0) + value
    return {kind: result[kind] for kind in sorted(result, key=lambda kind: [*FLOWS, kind].index(kind))}


def densities(fold: Fold, record: TopologyRecord) -> dict[str, float]:
    """Active connections over all, by kind."""
    possible = totals(fold, [part.connections for part in fold.history.parts])
    return {kind: n / possible[kind] for kind, n in totals(fold, record.active).items()}


def importances(fold: Fold, record: TopologyRecord) -> dict[str, float]:
    """Mean importance of the connections that stayed active, by kind; NaN where the criterion had not seen the network."""
    stayed = [active - grown for active, grown in zip(record.active, record.grown, strict=True)]
    means = [math.nan if mean is None else mean for mean in record.importance]
    sums = totals(fold, [mean * n for mean, n in zip(means, stayed, strict=True)])
    return {kind: sums[kind] / n if n else 0.0 for kind, n in totals(fold, stayed).items()}


def survival(fold: Fold) -> dict[str, list[float]]:
    """For each kind of connection and record, the share of those of the start that have been active ever since."""
    records = fold.history.records
    start = totals(fold, records[0].active)
    survivors = [totals(fold, record.survivors) for record in records]
    return {kind: [counts[kind] / n for counts in survivors] for kind, n in start.items() if n}


def cohorts(fold: Fold) -> dict[int, float]:
    """For the start and each update, by epoch: the share of the connections switched on then that are active at the end."""
    born = torch.cat([values[fold.connections.layers[name].mask] for name, values in fold.connections.born.items()])
    result = {}
    for record in fold.history.records:
        began = sum(record.grown) if record.epoch else sum(record.active)
        if began:
            result[record.epoch] = int((born == record.epoch).sum()) / began
    return result


@dataclass(frozen=True)
class DepthGroup:
    """The connections of one node's fusion convolution from the channels that the depth shift moves together.

    Attributes:
        offset: slices by which their input maps are moved.
        norm: mean L1 norm of active kernels, over that of the whole convolution; NaN where none is active.
        density: active connections over all.
    """

    stage: int
    level: int
    offset: int
    norm: float
    density: float


def depth_groups(fold: Fold) -> list[DepthGroup]:
    """For each node and offset; empty where nothing is shifted."""
    if fold.network is None:
        return []
    result = []
    for node in nodes(fold):
        layer = fold.connections.layers[node.layer]
        block = cast(ShiftBlock, fold.network.get_submodule(node.layer.removesuffix(".conv")))
        offsets = torch.tensor(_offsets(block, layer.mask.shape[1]))
        importance = KernelL1Norm().score(layer)
        mean = float(importance[layer.mask].mean())
        for offset in offsets.unique().tolist():
            channels = offsets == offset
            mask = layer.mask[:, channels]
            norm = float(importance[:, channels][mask].mean()) / mean if mask.any() and mean else math.nan
            result.append(DepthGroup(node.stage, node.level, offset, norm, float(mask.float().mean())))
    return result if any(group.offset for group in result) else []


def _offsets(block: ShiftBlock, channels: int) -> list[int]:
    """Slices by which each input map is moved, in prediction."""
    if block.shift is not None:
        return block.shift.whole_offsets()
    return [offset for group, offset in shift_groups(channels, block.shift_size) for _ in range(group.start, group.stop)]


@dataclass(frozen=True)
class Agreement:
    """How many connections two trainings have in common.

    Attributes:
        first, second: names of the folds.
        kind: of the connections; see ``kind_of``.
        overlap: connections active in both, over the mean of those active in one.
        chance: what two independent random topologies of the same densities have on average.
    """

    first: str
    second: str
    kind: str
    overlap: float
    chance: float


def agreements(folds: Sequence[Fold]) -> list[Agreement]:
    """For each pair of folds and each kind of connections."""
    return [agreement for a, b in combinations(folds, 2) for agreement in _agreements(a, b)]


def _agreements(a: Fold, b: Fold) -> list[Agreement]:
    pairs = [(_part(a, part), _part(b, part)) for part in a.history.parts]
    both = totals(a, [int((first & second).sum()) for first, second in pairs])
    chance = totals(a, [int(first.sum()) * int(second.sum()) / first.numel() for first, second in pairs])
    size = totals(a, [(int(first.sum()) + int(second.sum())) / 2 for first, second in pairs])
    return [Agreement(a.name, b.name, kind, both[kind] / n, chance[kind] / n) for kind, n in size.items() if n]


def _part(fold: Fold, part: Part) -> Tensor:
    layer: MaskableLayer = fold.connections.layers[part.layer]
    if not part.flow:
        return layer.mask
    return layer.mask[:, fold.connections.flows[part.layer][part.flow]]


def common_epochs(folds: Sequence[Fold]) -> list[int]:
    """Epochs of which all folds have a record, the first, the last and some between; none where histories are missing."""
    if not all(fold.has_history for fold in folds):
        return []
    shared = sorted(set.intersection(*({record.epoch for record in fold.history.records} for fold in folds)))
    if len(shared) <= MOST_EPOCHS:
        return shared
    return [shared[round(i * (len(shared) - 1) / (MOST_EPOCHS - 1))] for i in range(MOST_EPOCHS)]


def records_at(fold: Fold, epoch: int | None) -> TopologyRecord:
    """The record of an epoch; the last for None."""
    if epoch is None:
        return fold.history.records[-1]
    return next(record for record in fold.history.records if record.epoch == epoch)


def mean_by_flow(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over folds."""
    return {flow: sum(value[flow] for value in values) / len(values) for flow in FLOWS if all(flow in v for v in values)}


def update_epochs(fold: Fold) -> list[int]:
    """After how many epochs the topology changed, from the history or, without one, from the log."""
    if fold.has_history:
        return [record.epoch for record in fold.history.records if any(record.grown)]
    return [epoch for epoch, changed in enumerate(fold.logged("dsff_connections_changed")) if changed > 0]
