"""A topology for machines, and in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from nnunetv2_e2enet.evaluation.numbers import NOTHING
from nnunetv2_e2enet.evaluation.tables import Table
from nnunetv2_e2enet.evaluation.topology import measures
from nnunetv2_e2enet.evaluation.topology.measures import FLOWS, Node
from nnunetv2_e2enet.evaluation.topology.sources import Fold

FORMAT = 1
"""Of the JSON; raised when a key changes its meaning."""
_LOGGED = ("train_losses", "val_losses", "dsff_sparsity", "dsff_prune_fraction", "dsff_connections_changed", "dsff_explored")


def as_json(folds: Sequence[Fold], provenance: dict[str, Any]) -> dict[str, Any]:
    """Plain data; NaN is for ``evaluation.export.plain`` to replace."""
    return {
        "format": FORMAT,
        "provenance": provenance,
        "folds": [_fold(fold) for fold in folds],
        "agreement": [asdict(item) for item in measures.agreements(folds)],
    }


def _fold(fold: Fold) -> dict[str, Any]:
    whole = fold.has_history and fold.history.records[0].epoch == 0
    return {
        "name": fold.name,
        "checkpoint": str(fold.checkpoint),
        "trainer": fold.trainer,
        "epochs": fold.epoch,
        "update_epochs": measures.update_epochs(fold),
        "nodes": [_node(fold, node) for node in measures.nodes(fold)],
        "depth_groups": [asdict(group) for group in measures.depth_groups(fold)],
        "survival": measures.survival(fold) if whole else None,
        "cohorts": {str(epoch): share for epoch, share in measures.cohorts(fold).items()} if whole else None,
        "history": {
            "missing": fold.why_no_history or None,
            "importance": fold.history.importance,
            "parts": [part._asdict() for part in fold.history.parts],
            "records": [asdict(record) for record in fold.history.records],
        },
        "log": {key: fold.logged(key) for key in _LOGGED},
    }


def _node(fold: Fold, node: Node) -> dict[str, Any]:
    records = fold.history.records
    flows = {}
    for flow, place in node.parts.items():
        flows[flow] = {
            "connections": node.connections[flow],
            "active": [record.active[place] for record in records],
            "share": [node.shares(record)[flow] for record in records],
            "explored": [record.explored[place] / node.connections[flow] for record in records],
            "importance": [record.importance[place] for record in records],
        }
    return {
        "stage": node.stage,
        "level": node.level,
        "layer": node.layer,
        "channels": node.channels,
        "epochs": [record.epoch for record in records],
        "flows": flows,
    }


def fold_table(folds: Sequence[Fold]) -> Table:
    """Survival of the connections of each fold, and the active ones of each flow."""
    rows = []
    for fold in folds:
        layers = fold.connections.layers.values()
        active, explored, connections = (
            sum(counts) for counts in zip(*((x.n_active, int(x.explored.sum()), x.n_connections) for x in layers), strict=True)
        )
        first, last = (measures.densities(fold, fold.history.records[place]) for place in (0, -1))
        cells = [fold.name, f"{fold.epoch}", f"{len(measures.update_epochs(fold))}", f"{active:,}"]
        cells += [f"{1 - active / connections:.4f}", f"{explored / connections:.1%}"]
        rows.append([*cells, *_flow_cells(first if len(fold.history.records) > 1 else None, last)])
    return Table.of("Connections", ["fold", "epochs", "updates", "active", "sparsity", "explored", *FLOWS], rows)


def node_table(folds: Sequence[Fold]) -> Table:
    """Shares of the flows of each node, means over folds, first and last record; without rows where there are no nodes."""
    epochs = measures.common_epochs(folds)
    rows = []
    for node in measures.nodes(folds[0]):
        last, first = (
            measures.mean_by_flow([node.shares(measures.records_at(fold, epoch)) for fold in folds])
            for epoch in (None, epochs[0] if epochs else None)
        )
        shown = [{flow: share for flow, share in shares.items() if flow in node.parts} for shares in (first, last)]
        cells = _flow_cells(shown[0] if len(epochs) > 1 else None, shown[1])
        rows.append([f"{node.stage}", f"{node.level}", f"{node.channels}", *cells])
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


def _flow_cells(first: Mapping[str, float] | None, last: Mapping[str, float]) -> list[str]:
    start = {flow: f"{value:.1%} → " for flow, value in (first or {}).items()}
    return [f"{start.get(flow, '')}{last[flow]:.1%}" if flow in last else NOTHING for flow in FLOWS]
