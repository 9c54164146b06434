"""A topology for machines, and in tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.console import Console

from nnunetv2_e2enet.evaluation.numbers import NOTHING
from nnunetv2_e2enet.evaluation.tables import Table
from nnunetv2_e2enet.evaluation.topology import measures
from nnunetv2_e2enet.evaluation.topology.sources import FLOWS, Fold
from nnunetv2_e2enet.network.fusion import FusionNode

FORMAT = 1
"""Of the JSON; raised when a key changes its meaning."""
_LOGGED = ("train_losses", "val_losses", "dsff_sparsity", "dsff_prune_fraction", "dsff_connections_changed", "dsff_explored")


def as_json(folds: Sequence[Fold], provenance: dict[str, Any]) -> dict[str, Any]:
    """Plain data; NaN is for ``evaluation.plain`` to replace."""
    return {
        "format": FORMAT,
        "provenance": provenance,
        "folds": [_fold(fold) for fold in folds],
        "agreement": measures.agreements(folds).to_dict("records"),
    }


def _fold(fold: Fold) -> dict[str, Any]:
    whole = fold.has_history and fold.history.records[0].epoch == 0
    return {
        "name": fold.name,
        "checkpoint": str(fold.checkpoint),
        "trainer": fold.trainer,
        "epochs": fold.epoch,
        "update_epochs": measures.update_epochs(fold),
        "nodes": [_node(fold, layer, node) for layer, node in measures.nodes(fold).items()],
        "depth_groups": measures.depth_groups(fold).to_dict("records"),
        "survival": measures.curves(fold)["survival"].dropna(axis=1).to_dict("list") if whole else None,
        "cohorts": {str(epoch): share for epoch, share in measures.cohorts(fold).items()} if whole else None,
        "history": {
            "missing": fold.why_no_history or None,
            "importance": fold.history.importance,
            "parts": [part._asdict() for part in fold.history.parts],
            "records": [asdict(record) for record in fold.history.records],
        },
        "log": {key: fold.logged(key) for key in _LOGGED},
    }


def _node(fold: Fold, layer: str, node: FusionNode) -> dict[str, Any]:
    own = fold.counts[fold.counts["layer"] == layer]
    own = own.assign(explored=own["explored"] / own["connections"])
    lists = ["active", "share", "explored", "importance"]
    return {
        "stage": node.stage,
        "level": node.level,
        "layer": layer,
        "channels": len(fold.connections.layers[layer].mask),
        "epochs": [record.epoch for record in fold.history.records],
        "flows": {
            flow: {"connections": part["connections"].iloc[0], **part[lists].to_dict("list")}
            for flow, part in own.groupby("flow", observed=True)
        },
    }


def fold_table(folds: Sequence[Fold]) -> Table:
    """Survival of the connections of each fold, and the active ones of each flow."""
    rows = []
    for fold in folds:
        active, explored, connections = fold.at()[["active", "explored", "connections"]].sum()
        density = measures.curves(fold)["density"]
        cells = [fold.name, f"{fold.epoch}", f"{len(measures.update_epochs(fold))}", f"{active:,}"]
        cells += [f"{1 - active / connections:.4f}", f"{explored / connections:.1%}"]
        rows.append([*cells, *_flow_cells(density.iloc[0] if len(density) > 1 else None, density.iloc[-1])])
    return Table.of("Connections", ["fold", "epochs", "updates", "active", "sparsity", "explored", *FLOWS], rows)


def node_table(folds: Sequence[Fold]) -> Table:
    """Shares of the flows of each node, means over folds, first and last record; without rows where there are no nodes."""
    epochs = measures.common_epochs(folds)
    first, last = (measures.node_flows(folds, epoch)["share"] for epoch in (epochs[0] if epochs else None, None))
    rows = []
    for layer, node in measures.nodes(folds[0]).items():
        channels = len(folds[0].connections.layers[layer].mask)
        cells = _flow_cells(first[layer] if len(epochs) > 1 else None, last[layer])
        rows.append([f"{node.stage}", f"{node.level}", f"{channels}", *cells])
    return Table.of("Active connections of each node, by direction", ["stage", "level", "channels", *FLOWS], rows)


def print_topology(console: Console, folds: Sequence[Fold]) -> None:
    """Readable from 80 columns."""
    whole, nodes = fold_table(folds), node_table(folds)
    flows = list(FLOWS)
    Table(whole.title, whole.frame.drop(columns=flows)).print(console)
    if nodes.rows:
        Table("Active connections of each flow", whole.frame[["fold", *flows]]).print(console)
        Table(nodes.title, nodes.frame, words=0).print(console)
    for fold in folds:
        if not fold.has_history:
            console.print(f"{fold.name}: no history, {fold.why_no_history}.", soft_wrap=True)


def _flow_cells(first: pd.Series | None, last: pd.Series) -> list[str]:
    start = {} if first is None else first.map("{:.1%} → ".format)
    return [f"{start.get(flow, '')}{last[flow]:.1%}" if flow in last else NOTHING for flow in FLOWS]
