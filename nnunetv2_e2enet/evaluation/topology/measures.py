"""The numbers of the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import cast

import pandas as pd
import torch
from torch import Tensor

from nnunetv2_e2enet.dsff import KernelL1Norm, Part
from nnunetv2_e2enet.evaluation.topology.sources import Fold
from nnunetv2_e2enet.network import E2ENet
from nnunetv2_e2enet.network.blocks import ShiftBlock
from nnunetv2_e2enet.network.connections import MaskableLayer
from nnunetv2_e2enet.network.fusion import FusionNode, fusion_nodes

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


def nodes(fold: Fold) -> dict[str, FusionNode]:
    """All fusion nodes by the convolution that fuses their flows, stage by stage, finest level first; none where not known."""
    found = {} if fold.network is None else fusion_nodes(fold.network)
    return {f"{name}.blocks.0.conv": node for name, node in found.items()}


def node_flows(folds: Sequence[Fold], epoch: int | None) -> pd.DataFrame:
    """``share`` and ``density`` of the flows of each node (index ``layer``, ``flow``), means over folds.

    Args:
        folds: all with a record of the epoch.
        epoch: of the records; None is the last of each fold.
    """
    records = pd.concat([fold.at(epoch) for fold in folds])
    return records.groupby(["layer", "flow"], observed=True)[["share", "density"]].mean()


def curves(fold: Fold) -> pd.DataFrame:
    """Numbers of the network by record, a row for each epoch; below each name, a column for each kind of connections.

    ``density`` is active connections over all. ``importance`` is the mean of those that stayed active, NaN where the criterion
    had not seen the network. ``survival`` is the share of the connections of the start that have been active ever since.
    """
    stayed = fold.counts["active"] - fold.counts["grown"]
    numbers = fold.counts.assign(stayed=stayed, weighted=stayed * fold.counts["importance"])
    summed = ["connections", "active", "survivors", "stayed", "weighted"]
    sums = numbers.groupby(["record", "kind"], observed=True)[summed].sum(min_count=1).unstack()
    found = pd.concat(
        {
            "density": sums["active"] / sums["connections"],
            "importance": sums["weighted"] / sums["stayed"].clip(lower=1),
            "survival": sums["survivors"] / sums["active"].iloc[0],
        },
        axis=1,
    )
    return found.set_axis([record.epoch for record in fold.history.records])


def cohorts(fold: Fold) -> dict[int, float]:
    """For the start and each update, by epoch: the share of the connections switched on then that are active at the end."""
    born = torch.cat([values[fold.connections.layers[name].mask] for name, values in fold.connections.born.items()])
    result = {}
    for record in fold.history.records:
        began = sum(record.grown) if record.epoch else sum(record.active)
        if began:
            result[record.epoch] = int((born == record.epoch).sum()) / began
    return result


def depth_groups(fold: Fold) -> pd.DataFrame:
    """The connections of each node from the channels that the depth shift moves together; empty where nothing is shifted.

    Columns: ``stage``, ``level``; ``offset``, slices by which the input maps are moved; ``norm``, mean L1 norm of active
    kernels over that of the whole convolution, NaN where none is active; ``density``, active connections over all.
    """
    result = []
    for name, node in nodes(fold).items():
        layer = fold.connections.layers[name]
        offsets = torch.tensor(cast(ShiftBlock, node.blocks[0]).offsets())
        importance = KernelL1Norm().score(layer)
        mean = float(importance[layer.mask].mean())
        for offset in offsets.unique().tolist():
            channels = offsets == offset
            mask = layer.mask[:, channels]
            norm = float(importance[:, channels][mask].mean()) / mean if mask.any() and mean else math.nan
            result.append((node.stage, node.level, offset, norm, float(mask.float().mean())))
    groups = pd.DataFrame(result, columns=["stage", "level", "offset", "norm", "density"])
    return groups if groups["offset"].any() else groups[:0]


def agreements(folds: Sequence[Fold]) -> pd.DataFrame:
    """How many connections each pair of folds has in common, by kind.

    Columns: ``first``, ``second``, ``kind``; ``overlap``, connections active in both over the mean of those active in one;
    ``chance``, what two independent random topologies of the same densities have on average.
    """
    found = [_agreement(a, b).reset_index(names="kind").assign(first=a.name, second=b.name) for a, b in combinations(folds, 2)]
    columns = ["first", "second", "kind", "overlap", "chance"]
    return pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)


def _agreement(a: Fold, b: Fold) -> pd.DataFrame:
    pairs = [(_part(a, part), _part(b, part)) for part in a.history.parts]
    both = [int((first & second).sum()) for first, second in pairs]
    chance = [int(first.sum()) * int(second.sum()) / first.numel() for first, second in pairs]
    size = [(int(first.sum()) + int(second.sum())) / 2 for first, second in pairs]
    sums = pd.DataFrame({"overlap": both, "chance": chance, "size": size}).groupby(a.kinds, observed=True).sum()
    return sums[["overlap", "chance"]].div(sums["size"], axis=0)[sums["size"] > 0]


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


def update_epochs(fold: Fold) -> list[int]:
    """After how many epochs the topology changed, from the history or, without one, from the log."""
    if fold.has_history:
        return [record.epoch for record in fold.history.records if any(record.grown)]
    return [epoch for epoch, changed in enumerate(fold.logged("dsff_connections_changed")) if changed > 0]
