"""A comparison for machines: JSON with everything, CSV with one line for each case, model and class."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from nnunetv2_e2enet.evaluation.comparison import Comparison
from nnunetv2_e2enet.evaluation.metrics import METRICS, ClassMetrics

FORMAT = 1
"""Of the JSON; raised when a key changes its meaning."""


def as_json(comparison: Comparison, provenance: dict[str, Any]) -> dict[str, Any]:
    """Plain data; what is not defined is null."""
    results = comparison.results
    content: dict[str, Any] = {
        "format": FORMAT,
        "provenance": provenance,
        "metrics": {m.key: {"unit": m.unit, "higher_is_better": m.higher_is_better} for m in METRICS},
        "classes": [
            {"name": name, "values": list(values), "tolerance_mm": tolerance}
            for (name, values), tolerance in zip(comparison.labels.classes.items(), comparison.tolerances, strict=True)
        ],
        "models": [_model(comparison, name) for name in comparison.names],
        "means": {
            metric: {model: {scope: asdict(i) for scope, i in scopes.items()} for model, scopes in models.items()}
            for metric, models in comparison.intervals.items()
        },
        "fold_means": comparison.fold_means,
        "paired_tests": {metric: [asdict(test) for test in tests] for metric, tests in comparison.paired.items()},
        "rank_tests": {metric: [asdict(test) for test in tests] for metric, tests in comparison.ranked.items()},
        "trade_off": {"a1": comparison.weights[0], "a2": comparison.weights[1], "scores": comparison.scores},
        "profiles": {"settings": asdict(comparison.settings), "models": [p.as_json() for p in comparison.profiles]},
        "failures": [asdict(failure) for failure in comparison.failures],
        "cases": [
            {
                "case": case.name,
                "fold": case.fold,
                "models": {
                    model: {
                        label: {name: results.values[name][i, j, k] for name in ClassMetrics._fields}
                        for k, label in enumerate(results.classes)
                    }
                    for i, model in enumerate(results.models)
                },
            }
            for j, case in enumerate(results.cases)
        ],
    }
    return {key: plain(value) for key, value in content.items()}


def as_csv(comparison: Comparison) -> str:
    """Columns: case, fold, model, class, and the fields of ``ClassMetrics``; empty where a number is not defined."""
    results = comparison.results
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "fold", "model", "class", *ClassMetrics._fields])
    for j, case in enumerate(results.cases):
        for i, model in enumerate(results.models):
            for k, label in enumerate(results.classes):
                numbers = [float(results.values[name][i, j, k]) for name in ClassMetrics._fields]
                cells = ["" if math.isnan(n) else repr(n) for n in numbers]
                writer.writerow([case.name, case.fold if case.fold is not None else "", model, label, *cells])
    return text.getvalue()


def _model(comparison: Comparison, name: str) -> dict[str, Any]:
    facts = next(model for model in comparison.models if model.name == name)
    return {
        "name": name,
        "folder": str(facts.source.folder),
        "model_folder": None if facts.source.model is None else str(facts.source.model),
        "architecture": facts.architecture,
        "plans": facts.plans,
        "patch_size": list(facts.patch_size),
        "costs": None if facts.costs is None else asdict(facts.costs),
        "trainings": [asdict(training) for training in facts.trainings],
        "note": facts.note,
    }


def plain(value: Any) -> Any:
    """Without numpy's types, tuples, and numbers that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
