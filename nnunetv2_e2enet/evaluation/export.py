"""A comparison for machines: JSON with everything, CSV with one line for each case, model and class."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd

from nnunetv2_e2enet.evaluation.comparison import Comparison, ModelFacts
from nnunetv2_e2enet.evaluation.metrics import METRICS

FORMAT = 1
"""Of the JSON; raised when a key changes its meaning."""


def as_json(comparison: Comparison, provenance: dict[str, Any]) -> dict[str, Any]:
    """Everything as data, for ``plain``; a number that is not defined is NaN."""
    cases = comparison.results.frame
    metrics = nested(cases.drop(columns="fold"), "case", "model", "class")
    return {
        "format": FORMAT,
        "provenance": provenance,
        "metrics": {m.key: {"unit": m.unit, "higher_is_better": m.higher_is_better} for m in METRICS},
        "classes": [
            {"name": name, "values": list(values), "tolerance_mm": tolerance}
            for (name, values), tolerance in zip(comparison.labels.classes.items(), comparison.tolerances, strict=True)
        ],
        "models": [_model(model) for model in comparison.models],
        "means": nested(comparison.means.reset_index(), "metric", "model", "scope"),
        "fold_means": {metric: means.to_dict("index") for metric, means in comparison.fold_means.items()},
        "paired_tests": {metric: [asdict(test) for test in tests] for metric, tests in comparison.paired.items()},
        "rank_tests": {metric: [asdict(test) for test in tests] for metric, tests in comparison.ranked.items()},
        "trade_off": {"a1": comparison.weights[0], "a2": comparison.weights[1], "scores": comparison.scores.to_dict("index")},
        "profiles": {"settings": asdict(comparison.settings), "models": [p.as_json() for p in comparison.profiles]},
        "failures": comparison.failures.to_dict("records"),
        "cases": [{"case": c.name, "fold": c.fold, "models": metrics[c.name]} for c in comparison.results.cases],
    }


def as_csv(comparison: Comparison) -> str:
    """Columns: case, fold, model, class, and the fields of ``ClassMetrics``; empty where a number is not defined."""
    text: str = comparison.results.frame.to_csv(index=False, lineterminator="\n")
    return text


def nested(frame: pd.DataFrame, *keys: str) -> dict[str, Any]:
    """Rows as dictionaries in dictionaries, by the values of the columns ``keys``."""
    content: dict[str, Any] = {}
    for record in frame.to_dict("records"):
        place = content
        for key in keys:
            place = place.setdefault(record.pop(key), {})
        place.update(record)
    return content


def _model(facts: ModelFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "folder": str(facts.source.folder),
        "model_folder": None if facts.source.model is None else str(facts.source.model),
        "architecture": facts.architecture,
        "plans": facts.plans,
        "patch_size": list(facts.patch_size),
        "costs": None if facts.costs is None else asdict(facts.costs),
        "trainings": [asdict(training) for training in facts.trainings],
        "note": facts.note,
    }
