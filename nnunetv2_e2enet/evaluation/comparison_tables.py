"""A comparison in tables and sentences, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from nnunetv2_e2enet.evaluation import numbers
from nnunetv2_e2enet.evaluation.comparison import Comparison, ModelFacts, comparable_patches
from nnunetv2_e2enet.evaluation.metrics import METRICS, Metric
from nnunetv2_e2enet.evaluation.profile_tables import cost_columns, how_measured, measurements, missing_measurements
from nnunetv2_e2enet.evaluation.statistics import ALPHA, MEAN, PairedTest, RankTest, tested
from nnunetv2_e2enet.evaluation.tables import Table

DICE = METRICS[0]
FAILURES_PRINTED = 10
FAILURES_ON_THE_PAGE = 100


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Accuracy, costs, classes, tests and failures; readable from 80 columns."""
    accuracy(comparison).print(console)
    if any(model.costs for model in comparison.models):
        costs(comparison, with_patch=False).print(console)
        console.print(cost_notes(comparison))
    for note in missing_costs(comparison):
        console.print(note)
    if comparison.profiles:
        console.print()
        measurements(comparison.profiles, comparison.settings).print(console)
        console.print(how_measured(comparison.settings))
        for note in missing_measurements(comparison.profiles):
            console.print(note)
    dice_by_class(comparison).print(console)
    for line in verdicts(comparison):
        console.print(line)
    if comparison.failures.empty:
        console.print("No failure: no class missed, invented, or below the Dice threshold.")
    else:
        failures(comparison, FAILURES_PRINTED).print(console)


# --- accuracy -----------------------------------------------------------------------------------------------------------


def accuracy(comparison: Comparison) -> Table:
    """The mean of the classes by model and metric, with its interval."""
    title = f"Accuracy: mean of classes, 95 % bootstrap interval, {len(comparison.results.cases)} cases"
    head = ["model", *(_metric_head(metric) for metric in METRICS)]
    return Table.of(title, head, ([name, *(_mean(comparison, m, name, MEAN) for m in METRICS)] for name in comparison.names))


def _metric_head(metric: Metric) -> str:
    return f"{metric.title} {'↑' if metric.higher_is_better else '↓'}" + (f"\n{metric.unit}" if metric.unit else "")


def _mean(comparison: Comparison, metric: Metric, model: str, scope: str) -> str:
    interval = comparison.interval(metric.key, model, scope)
    return f"{numbers.value(interval.mean, metric)}\n{numbers.limits(interval, metric)}"


def folds(comparison: Comparison) -> Table | None:
    """Mean Dice of each fold; None where there is one fold or none."""
    means = comparison.fold_means["dice"]
    if len(means.columns) < 2:
        return None
    text = means.apply(lambda fold: fold.map("{:.4f}".format)).add_prefix("fold ").reset_index(names="model")
    return Table("Dice of each fold", text)


# --- classes and tests --------------------------------------------------------------------------------------------------


def dice_by_class(comparison: Comparison) -> Table:
    """As ``classes``, as short as a terminal wants it."""
    paired = bool(comparison.paired)
    head = ["class", *comparison.names, *(["difference"] if paired else []), "p (Holm)"]
    rows = []
    for test in _tests(comparison, DICE):
        row = [numbers.value(comparison.interval(DICE.key, name, test.scope).mean, DICE) for name in comparison.names]
        if isinstance(test, PairedTest):
            row.append(numbers.signed(test.difference.mean, DICE))
        if test.scope != MEAN:
            rows.append([test.scope, *row, numbers.p_value(test.p_holm)])
    return Table.of("Dice by class", head, rows)


def classes(comparison: Comparison, metric: Metric) -> Table:
    """Means and intervals of all classes, with the tests."""
    paired = bool(comparison.paired)
    compared = ["difference"] if paired else [f"rank of {name}" for name in comparison.names]
    rows = []
    for test in _tests(comparison, metric):
        row = ["mean of classes" if test.scope == MEAN else test.scope]
        row += [_mean(comparison, metric, name, test.scope) for name in comparison.names]
        if isinstance(test, PairedTest):
            limits = numbers.limits(test.difference, metric, fewer_digits=0)
            row.append(f"{numbers.signed(test.difference.mean, metric)}\n{limits}")
        else:
            row += [numbers.NOTHING if math.isnan(rank) else f"{rank:.2f}" for rank in test.mean_ranks]
        rows.append([*row, numbers.p_value(test.p), numbers.p_value(test.p_holm)])
    title = f"{metric.title}: means, intervals and tests"
    return Table.of(title, ["class", *comparison.names, *compared, "p", "p (Holm)"], rows, total=True)


def _tests(comparison: Comparison, metric: Metric) -> Sequence[PairedTest | RankTest]:
    return comparison.paired.get(metric.key) or comparison.ranked.get(metric.key, [])


def nemenyi(comparison: Comparison) -> Table:
    """p-values of the pairs of models, for the mean Dice."""
    names = comparison.names
    p_values = comparison.overall(DICE.key).p_nemenyi
    rows = (
        [name, *(numbers.NOTHING if i == j else numbers.p_value(p) for j, p in enumerate(p_values[i]))]
        for i, name in enumerate(names)
    )
    return Table.of("Nemenyi p-values of Dice, mean over classes", ["Nemenyi p", *names], rows)


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence for each metric on the mean over classes."""
    return [(_paired_verdict if comparison.paired else _ranked_verdict)(comparison, metric) for metric in METRICS]


def _paired_verdict(comparison: Comparison, metric: Metric) -> str:
    first, second = comparison.names
    tests = comparison.paired[metric.key]
    test = next(t for t in tests if t.scope == MEAN)
    unit = f" {metric.unit}" if metric.unit else ""
    if math.isnan(test.p_holm):
        return f"{metric.title}: too few cases for a test ({test.difference.n})."
    mean, interval = numbers.signed(test.difference.mean, metric), numbers.limits(test.difference, metric, fewer_digits=0)
    size = f"{first} - {second} = {mean}{unit} ({interval})"
    different = test.wins + test.losses
    if test.p_holm < ALPHA:
        finding = _better(comparison, metric, test)
    elif different == 0:
        finding = "the results are equal in all cases"
    elif tested([t.p for t in tests]) * 2 / 2**different >= ALPHA:  # the least p of so many signs
        few = "too few cases" if test.ties == 0 else f"only {different} of {test.difference.n} cases differ, too few"
        finding = f"{few} to show a difference"
    else:
        finding = "no difference shown"
    return f"{metric.title}: {finding}; {size}, Wilcoxon {numbers.p_statement(test.p_holm)} (Holm), n = {test.difference.n}."


def _better(comparison: Comparison, metric: Metric, test: PairedTest) -> str:
    """The model that the ranks of cases favour; with its cases where a mean favours the other."""
    first, second = (comparison.interval(metric.key, name).mean for name in comparison.names)
    for_first = (test.rank_biserial > 0) == metric.higher_is_better
    name = comparison.names[0 if for_first else 1]
    sign = 1 if metric.higher_is_better == for_first else -1
    if sign * test.difference.mean >= 0 and sign * (first - second) >= 0:
        return f"{name} is better"
    cases = test.wins if sign > 0 else test.losses
    return f"{name} is better in {cases} of {test.difference.n} cases, and not in the mean"


def _ranked_verdict(comparison: Comparison, metric: Metric) -> str:
    test = comparison.overall(metric.key)
    if math.isnan(test.p_holm):
        return f"{metric.title}: too few cases for a test ({test.n})."
    ranks = sorted(zip(test.mean_ranks, comparison.names, strict=True))
    listed = ", ".join(f"{name} {rank:.2f}" for rank, name in ranks)
    finding = "the models differ" if test.p_holm < ALPHA else "no difference shown"
    return (
        f"{metric.title}: {finding} (Friedman {numbers.p_statement(test.p_holm)}, Holm; n = {test.n}). Mean ranks, 1 is best: "
        f"{listed}; critical difference {test.critical_difference:.2f} (Nemenyi)."
    )


# --- costs --------------------------------------------------------------------------------------------------------------


def costs(comparison: Comparison, with_patch: bool = True) -> Table:
    """Parameters, multiply-accumulates and trade-off scores of the models."""
    scores = comparison.scores.apply(lambda score: score.map("{:.3f}".format)).reindex(comparison.names)
    text = cost_columns(comparison.costs).join(scores.fillna(numbers.NOTHING).add_prefix("PT\n")).reset_index(names="model")
    if with_patch:
        text["patch"] = [numbers.sizes(model.patch_size) or numbers.NOTHING for model in comparison.models]
    return Table("Costs: parameters, multiply-accumulates (MAC) of one patch, trade-off score (PT)", text)


def cost_notes(comparison: Comparison) -> str:
    """Explains the columns of the costs."""
    a1, a2 = comparison.weights
    text = (
        "Active: products with active connections and dense layers. Executed: products that PyTorch computes, "
        f"zeros included. PT score = {a1:g} x Dice / best Dice + {a2:g} x (fewest active parameters / parameters + least MAC "
        "/ MAC), higher is better."
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


# --- failures, trainings, models ----------------------------------------------------------------------------------------


def failures(comparison: Comparison, most: int, digits: int = 2) -> Table:
    """The worst failures, at most so many; volumes with so many digits after the point."""
    shown = comparison.failures.head(most)
    text = shown.assign(
        dice=shown["dice"].map("{:.3f}".format),
        reference_ml=shown["reference_ml"].map(f"{{:.{digits}f}}".format),
        prediction_ml=shown["prediction_ml"].map(f"{{:.{digits}f}}".format),
    )
    text.columns = ["model", "case", "class", "kind", "Dice", "reference\nml", "predicted\nml"]
    return Table(f"Failures: {len(shown)} worst of {len(comparison.failures)}", text, words=4)


def tested_values(comparison: Comparison) -> int:
    """How many (model, case, class) have a Dice."""
    return int((~np.isnan(comparison.results.values["dice"])).sum())


def trainings(comparison: Comparison) -> Table:
    """Each fold of each model."""
    rows = []
    for model in comparison.models:
        for t in model.trainings:
            seconds = numbers.NOTHING if math.isnan(t.epoch_seconds) else f"{t.epoch_seconds:.1f} s"
            rows.append([model.name, t.fold, t.trainer, str(t.epochs), seconds])
    return Table.of("", ["model", "fold", "trainer", "epochs", "median epoch"], rows, words=3)


def models(comparison: Comparison) -> Table:
    """Where each model comes from."""
    head = ["model", "network", "plans", "configuration", "trainer", "folder"]
    return Table.of("", head, [_model_row(model) for model in comparison.models], words=6)


def _model_row(model: ModelFacts) -> list[str]:
    trainers = sorted({training.trainer for training in model.trainings})
    configurations = sorted({training.configuration for training in model.trainings})
    words = [model.name, model.architecture, model.plans, ", ".join(configurations), ", ".join(trainers)]
    return [word or numbers.NOTHING for word in [*words, str(model.source.folder)]]
