"""A comparison in the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from nnunetv2_e2enet.evaluation import numbers
from nnunetv2_e2enet.evaluation.comparison import Comparison, comparable_patches
from nnunetv2_e2enet.evaluation.metrics import METRICS
from nnunetv2_e2enet.evaluation.profile_tables import how_measured, measured
from nnunetv2_e2enet.evaluation.statistics import ALPHA, MEAN

FAILURES_SHOWN = 10


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Accuracy, costs, classes, tests and failures; readable from 80 columns."""
    console.print(_accuracy(comparison))
    if any(model.costs for model in comparison.models):
        console.print(_costs(comparison))
        console.print(cost_notes(comparison))
    for note in missing_costs(comparison):
        console.print(note)
    if comparison.profiles:
        console.print()
        console.print(measured(comparison.profiles, comparison.settings))
        console.print(how_measured(comparison.settings))
    console.print(_classes(comparison))
    for line in verdicts(comparison):
        console.print(line)
    _print_failures(console, comparison)


def _accuracy(comparison: Comparison) -> Table:
    table = _table(f"Accuracy: mean of classes, 95 % bootstrap interval, {len(comparison.results.cases)} cases")
    table.add_column("model", overflow="fold")
    for metric in METRICS:
        arrow = "↑" if metric.higher_is_better else "↓"
        table.add_column(
            f"{metric.title} {arrow}" + (f"\n{metric.unit}" if metric.unit else ""), justify="right", no_wrap=True
        )
    for name in comparison.names:
        cells = []
        for metric in METRICS:
            interval = comparison.intervals[metric.key][name][MEAN]
            cells.append(f"{numbers.value(interval.mean, metric)}\n[dim]{numbers.limits(interval, metric)}[/]")
        table.add_row(name, *cells)
    return table


def _costs(comparison: Comparison) -> Table:
    table = _table("Costs: parameters, multiply-accumulates (MAC) of one patch, trade-off score (PT)")
    table.add_column("model", overflow="fold")
    columns = {"param.": ("stored", "active"), "MAC": ("dense", "active", "executed"), "PT": ("active", "executed")}
    for title in (f"{kind}\n{what}" for what, kinds in columns.items() for kind in kinds):
        table.add_column(title, justify="right")
    for model in comparison.models:
        if model.costs is None:
            table.add_row(model.name, *[numbers.NOTHING] * 7)
            continue
        c, pt = model.costs, comparison.scores.get(model.name)
        table.add_row(
            model.name,
            *(numbers.millions(n) for n in (c.parameters_stored, c.parameters_active)),
            *(numbers.giga(n) for n in (c.macs_dense, c.macs_active, c.macs_executed)),
            *(f"{pt[kind]:.3f}" if pt else numbers.NOTHING for kind in ("active", "executed")),
        )
    return table


def cost_notes(comparison: Comparison) -> str:
    """What the columns of the costs mean."""
    a1, a2 = comparison.weights
    text = (
        "Active: what the sparse topology leaves to compute. Executed: what PyTorch multiplies, zeros included, so the two "
        f"differ. PT score = {a1:g} x Dice / best Dice + {a2:g} x (fewest active parameters / parameters + least MAC / MAC), "
        "higher is better."
    )
    if not comparable_patches(comparison):
        patches = ", ".join(f"{m.name} {' x '.join(map(str, m.patch_size))}" for m in comparison.models if m.costs)
        text += f" The patches differ ({patches}), so multiply-accumulates and scores are not of the same amount of image."
    return text


def missing_costs(comparison: Comparison) -> list[str]:
    """Why costs are not known; models with the same reason in one sentence."""
    reasons: dict[str, list[str]] = {}
    for model in comparison.models:
        if model.note:
            reasons.setdefault(model.note, []).append(model.name)
    return [f"Costs of {', '.join(names)} are not known: {reason}" for reason, names in reasons.items()]


def _classes(comparison: Comparison) -> Table:
    table = _table("Dice by class")
    table.add_column("class")
    for name in comparison.names:
        table.add_column(name, justify="right", overflow="fold")
    paired = {test.scope: test for test in comparison.paired.get("dice", [])}
    ranked = {test.scope: test for test in comparison.ranked.get("dice", [])}
    if paired:
        table.add_column("difference", justify="right")
    table.add_column("p (Holm)", justify="right")
    metric = METRICS[0]
    for label in comparison.results.classes:
        row = [numbers.value(comparison.intervals["dice"][name][label].mean, metric) for name in comparison.names]
        if paired:
            row.append(numbers.signed(paired[label].difference.mean, metric))
        test = paired.get(label) or ranked[label]
        table.add_row(label, *row, numbers.p_value(test.p_holm))
    return table


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence for each metric on the mean over classes."""
    return [_paired_verdict(comparison, key) if comparison.paired else _ranked_verdict(comparison, key) for key in _keys()]


def _keys() -> list[str]:
    return [metric.key for metric in METRICS]


def _paired_verdict(comparison: Comparison, key: str) -> str:
    metric = next(m for m in METRICS if m.key == key)
    first, second = comparison.names
    test = next(t for t in comparison.paired[key] if t.scope == MEAN)
    unit = f" {metric.unit}" if metric.unit else ""
    if math.isnan(test.p_holm):
        return f"{metric.title}: too few cases for a test ({test.difference.n})."
    mean, interval = numbers.signed(test.difference.mean, metric), numbers.limits(test.difference, metric)
    size = f"{first} - {second} = {mean}{unit} ({interval})"
    if test.p_holm < ALPHA:
        better = (test.median_difference > 0) == metric.higher_is_better
        finding = f"{first if better else second} is better"
    elif 2 / 2 ** (test.wins + test.losses) >= ALPHA:  # the smallest p-value that signs of so many cases can give
        finding = "too few cases to show a difference"
    else:
        finding = "no difference shown"
    return f"{metric.title}: {finding}; {size}, Wilcoxon {numbers.p_statement(test.p_holm)} (Holm), n = {test.difference.n}."


def _ranked_verdict(comparison: Comparison, key: str) -> str:
    metric = next(m for m in METRICS if m.key == key)
    test = next(t for t in comparison.ranked[key] if t.scope == MEAN)
    if math.isnan(test.p_holm):
        return f"{metric.title}: too few cases for a test ({test.n})."
    ranks = sorted(zip(test.mean_ranks, comparison.names, strict=True))
    listed = ", ".join(f"{name} {rank:.2f}" for rank, name in ranks)
    finding = "the models differ" if test.p_holm < ALPHA else "no difference shown"
    return (
        f"{metric.title}: {finding} (Friedman {numbers.p_statement(test.p_holm)}, Holm; n = {test.n}). Mean ranks, 1 is best: "
        f"{listed}; critical difference {test.critical_difference:.2f} (Nemenyi)."
    )


def _print_failures(console: Console, comparison: Comparison) -> None:
    failures = comparison.failures
    if not failures:
        console.print("No failure: no class missed, invented, or below the Dice threshold.")
        return
    table = _table(f"Failures: {min(FAILURES_SHOWN, len(failures))} worst of {len(failures)}")
    for title in ("model", "case", "class", "kind"):
        table.add_column(title, overflow="fold")
    for title in ("Dice", "reference", "predicted"):
        table.add_column(title, justify="right")
    for f in failures[:FAILURES_SHOWN]:
        volumes = (f"{ml:.2f} ml" for ml in (f.reference_ml, f.prediction_ml))
        table.add_row(f.model, f.case, f.label, f.kind, f"{f.dice:.3f}", *volumes)
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
