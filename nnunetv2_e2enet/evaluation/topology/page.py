"""The page of a topology."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from nnunetv2_e2enet.evaluation.report.document import document, figure, figures, provenance_list
from nnunetv2_e2enet.evaluation.report.tables import table
from nnunetv2_e2enet.evaluation.topology.export import fold_rows, share_rows
from nnunetv2_e2enet.evaluation.topology.figures import View
from nnunetv2_e2enet.evaluation.topology.sources import Fold
from nnunetv2_e2enet.evaluation.topology.style import colour_variables, inline_svg


def topology_html(folds: Sequence[Fold], views: Sequence[View], provenance: dict[str, Any]) -> str:
    """The whole page as text. It loads nothing: style and figures are in it."""
    over = f", means of {len(folds)} folds" if len(folds) > 1 else ""
    when = "at the first and the last record of the history; in the checkpoint where there is none"
    explained = {
        "Summary": f"Of each flow, the active connections over all, {when}.",
        "Nodes": f"Of the active connections of each fusion node, the share from each direction, {when}{over}.",
    }
    sections = {
        "Summary": _table(*fold_rows(folds), explained["Summary"]),
        "Figures": figures([_view(view) for view in views]),
        "Nodes": _table(*share_rows(folds), explained["Nodes"]),
        "How this was made": _files(folds) + provenance_list(provenance),
    }
    lead = f"{folds[0].trainer}, {', '.join(fold.name for fold in folds)}, {provenance['date']}"
    return document(f"{folds[0].trainer}: topology", "What the fusion learned", lead, sections, colour_variables())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    if not rows:
        return ""
    cells = [[escape(cell) for cell in row] for row in rows]
    return f'{table(head, cells)}<p class="note">{note}</p>'


def _view(view: View) -> str:
    if view.figure is None:
        return figure(view.title, "", view.caption)
    return figure(view.title, inline_svg(view.figure, view.key, f"{view.title}. {view.caption}"), view.caption)


def _files(folds: Sequence[Fold]) -> str:
    rows = [
        [escape(fold.name), escape(str(fold.checkpoint)), "yes" if fold.has_history else escape(fold.why_no_history)]
        for fold in folds
    ]
    return table(["fold", "checkpoint", "history"], rows, words=3)
