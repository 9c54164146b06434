"""The tables of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nnunetv2_e2enet.evaluation import numbers
from nnunetv2_e2enet.evaluation.comparison import Comparison, Failure
from nnunetv2_e2enet.evaluation.metrics import METRICS, Metric
from nnunetv2_e2enet.evaluation.statistics import MEAN, PairedTest, RankTest

FAILURES_SHOWN = 100


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, total: bool = False) -> str:
    """HTML cells to a table.

    Args:
        words: how many columns from the left hold words, not numbers.
        total: whether the first row is set off from the others.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{_class('words', i < words)}>{cell}</{tag}>" for i, cell in enumerate(row))

    lines = [f"<tr{_class('total', total and i == 0)}>{cells('td', row)}</tr>" for i, row in enumerate(rows)]
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _class(name: str, applies: bool) -> str:
    return f' class="{name}"' if applies else ""


def accuracy(comparison: Comparison) -> str:
    head = ["model", *(_metric_title(metric) for metric in METRICS)]
    rows = []
    for name in comparison.names:
        row = [escape(name)]
        for metric in METRICS:
            interval = comparison.intervals[metric.key][name][MEAN]
            row.append(f"{numbers.value(interval.mean, metric)}<small>{numbers.limits(interval, metric)}</small>")
        rows.append(row)
    return table(head, rows)


def costs(comparison: Comparison) -> str:
    head = ["model", "parameters<br>stored", "parameters<br>active", "MAC<br>dense", "MAC<br>active", "MAC<br>executed"]
    head += ["PT score<br>active MAC", "PT score<br>executed MAC", "patch"]
    rows = []
    for model in comparison.models:
        c = model.costs
        if c is None:
            rows.append([escape(model.name), *[numbers.NOTHING] * 8])
            continue
        scores = comparison.scores.get(model.name)
        row = [escape(model.name), *(numbers.millions(n) for n in (c.parameters_stored, c.parameters_active))]
        row += [numbers.giga(n) for n in (c.macs_dense, c.macs_active, c.macs_executed)]
        row += [f"{scores[kind]:.3f}" if scores else numbers.NOTHING for kind in ("active", "executed")]
        rows.append([*row, " × ".join(map(str, model.patch_size))])  # noqa: RUF001
    return table(head, rows)


def measurements(comparison: Comparison) -> str:
    """Memory and time, where they were measured."""
    head = [
        "model",
        "training step<br>peak",
        "prediction<br>peak",
        "patch<br>median",
        "quartiles",
        "Mvoxel/s",
        "batch",
        "patch",
    ]
    rows = []
    for p in comparison.profiles:
        low, median, high = p.latency
        peaks = [numbers.NOTHING if math.isnan(n) else numbers.gib(n) for n in (p.training_bytes, p.prediction_bytes)]
        times = [f"{median:.3f} s", f"{low:.3f} to {high:.3f}", f"{p.voxels_per_second / 1e6:.2f}"]
        rows.append([escape(p.name), *peaks, *times, str(p.batch_size), " × ".join(map(str, p.patch_size))])  # noqa: RUF001
    return table(head, rows)


def classes(comparison: Comparison, metric: Metric) -> str:
    """Means and intervals of all classes, with the tests."""
    tests: Sequence[PairedTest | RankTest] = comparison.paired.get(metric.key) or comparison.ranked.get(metric.key, [])
    paired = bool(comparison.paired)
    names = [escape(name) for name in comparison.names]
    head = ["class", *names, *(["difference"] if paired else [f"rank of {name}" for name in names]), "p", "p (Holm)"]
    rows = []
    for test in tests:
        row = ["mean of classes" if test.scope == MEAN else escape(test.scope)]
        for name in comparison.names:
            interval = comparison.intervals[metric.key][name][test.scope]
            row.append(f"{numbers.value(interval.mean, metric)}<small>{numbers.limits(interval, metric)}</small>")
        if isinstance(test, PairedTest):
            size = numbers.signed(test.difference.mean, metric)
            row.append(f"{size}<small>{numbers.limits(test.difference, metric)}</small>")
        else:
            row += [f"{rank:.2f}" if not math.isnan(rank) else numbers.NOTHING for rank in test.mean_ranks]
        rows.append([*row, numbers.p_value(test.p), numbers.p_value(test.p_holm)])
    return table(head, rows, total=True)


def nemenyi(comparison: Comparison, test: RankTest) -> str:
    """p-values of the pairs."""
    names = [escape(name) for name in comparison.names]
    rows = [
        [name, *(numbers.NOTHING if i == j else numbers.p_value(p) for j, p in enumerate(test.p_nemenyi[i]))]
        for i, name in enumerate(names)
    ]
    return table(["Nemenyi p", *names], rows)


def folds(comparison: Comparison) -> str:
    """Mean Dice of each fold; empty where there is one fold or none."""
    means = comparison.fold_means["dice"]
    names = sorted({fold for model in means.values() for fold in model})
    if len(names) < 2:
        return ""
    rows = [[escape(model), *(f"{means[model][fold]:.4f}" for fold in names)] for model in comparison.names]
    return table(["model", *(f"fold {escape(name)}" for name in names)], rows)


def failures(comparison: Comparison) -> str:
    head = ["model", "case", "class", "kind", "Dice", "reference (ml)", "prediction (ml)"]
    return table(head, [_failure(f) for f in comparison.failures[:FAILURES_SHOWN]], words=4)


def _failure(failure: Failure) -> list[str]:
    words = [failure.model, failure.case, failure.label, failure.kind]
    figures = [f"{failure.dice:.3f}", f"{failure.reference_ml:.3f}", f"{failure.prediction_ml:.3f}"]
    return [*map(escape, words), *figures]


def _metric_title(metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.title}{unit} {'↑' if metric.higher_is_better else '↓'}"
