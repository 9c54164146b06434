"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from nnunetv2_e2enet.evaluation import comparison_tables as tables
from nnunetv2_e2enet.evaluation.comparison import Comparison
from nnunetv2_e2enet.evaluation.metrics import METRICS
from nnunetv2_e2enet.evaluation.profile_tables import how_measured, measurements, missing_measurements
from nnunetv2_e2enet.evaluation.report import charts
from nnunetv2_e2enet.evaluation.report.drawing import Chart, style
from nnunetv2_e2enet.evaluation.report.pictures import Picture
from nnunetv2_e2enet.evaluation.report.render import render
from nnunetv2_e2enet.evaluation.statistics import RESAMPLES

CURVES = {"train_losses": "training loss", "val_losses": "validation loss", "ema_fg_dice": "pseudo Dice (moving average)"}


def report_html(comparison: Comparison, pictures: Sequence[Picture], provenance: dict[str, Any]) -> str:
    """The whole page as text. It loads nothing: style, charts and pictures are in it."""
    with style():
        drawn = {
            "cost_charts": _cost_charts(comparison),
            "box_charts": [charts.box_plots(comparison, metric) for metric in METRICS],
            "rank_charts": _rank_charts(comparison),
            "size_charts": [charts.volume_and_dice(comparison)],
            "case_charts": _case_charts(comparison),
            "training_charts": _training_charts(comparison),
        }
    return render(
        "comparison.html",
        comparison=comparison,
        tables=tables,
        metrics=METRICS,
        legend=charts.legend,
        pictures=pictures,
        provenance=provenance,
        tolerance=_tolerance(comparison),
        resamples=RESAMPLES,
        dataset=next((m.source.dataset for m in comparison.models if m.source.dataset), None),
        measurements=measurements(comparison.profiles, comparison.settings, with_patch=True),
        how_measured=how_measured(comparison.settings),
        missing_measurements=missing_measurements(comparison.profiles),
        **drawn,
    )


def _cost_charts(comparison: Comparison) -> list[Chart]:
    costs = comparison.costs
    if costs.isna().all(axis=None):
        return []
    drawn = [
        charts.pareto(
            comparison,
            "parameters",
            "parameters",
            "M",
            "Filled: active parameters. Hollow: stored ones. Whiskers: 95 % interval. Dashed: models that none beats in both.",
            costs["parameters_active"] / 1e6,
            costs["parameters_stored"] / 1e6,
        ),
        charts.pareto(
            comparison,
            "macs",
            "multiply-accumulates",
            "G",
            "Filled: active multiply-accumulates. Hollow: executed ones. Top left is best.",
            costs["macs_active"] / 1e9,
            costs["macs_executed"] / 1e9,
        ),
    ]
    if comparison.profiles:
        seconds = pd.Series({p.name: p.latency[1] for p in comparison.profiles}).reindex(comparison.names)
        drawn.append(charts.pareto(comparison, "time", "time of a patch", "s", "Median of the timed passes.", seconds))
    return drawn


def _rank_charts(comparison: Comparison) -> list[Chart]:
    if not comparison.ranked:
        return []
    tested = [m for m in METRICS if not math.isnan(comparison.overall(m.key).critical_difference)]
    return [charts.critical_differences(comparison, metric) for metric in tested]


def _case_charts(comparison: Comparison) -> list[Chart]:
    """The first model against each other one; of several the metrics that most look at."""
    shown = METRICS[:2] if len(comparison.names) > 2 else METRICS
    seconds = range(1, len(comparison.names))
    return [charts.case_differences(comparison, 0, second, metric) for second in seconds for metric in shown]


def _training_charts(comparison: Comparison) -> list[Chart]:
    drawn = [charts.training_curves(comparison, key, title) for key, title in CURVES.items()]
    return [chart for chart in drawn if chart is not None]


def _tolerance(comparison: Comparison) -> str:
    """Of the surface Dice, in words."""
    if len(set(comparison.tolerances)) == 1:
        return f"{comparison.tolerances[0]:g} mm"
    own = zip(comparison.results.classes, comparison.tolerances, strict=True)
    return f"a tolerance ({', '.join(f'{name} {mm:g} mm' for name, mm in own)})"
