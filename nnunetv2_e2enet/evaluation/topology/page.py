"""The page of a topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2_e2enet.evaluation.report.drawing import Chart
from nnunetv2_e2enet.evaluation.report.render import render
from nnunetv2_e2enet.evaluation.tables import Table
from nnunetv2_e2enet.evaluation.topology.export import fold_table, node_table
from nnunetv2_e2enet.evaluation.topology.sources import Fold


def topology_html(folds: Sequence[Fold], views: Sequence[Chart], provenance: dict[str, Any]) -> str:
    """The whole page as text. It loads nothing: style and figures are in it."""
    rows = [[fold.name, str(fold.checkpoint), "yes" if fold.has_history else fold.why_no_history] for fold in folds]
    return render(
        "topology.html",
        folds=folds,
        views=views,
        summary=fold_table(folds),
        nodes=node_table(folds),
        files=Table.of("", ["fold", "checkpoint", "history"], rows, words=3),
        provenance=provenance,
    )
