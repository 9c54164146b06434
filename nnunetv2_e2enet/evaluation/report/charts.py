"""The charts of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunetv2_e2enet.evaluation.comparison import Comparison
from nnunetv2_e2enet.evaluation.measure import nan_mean
from nnunetv2_e2enet.evaluation.metrics import Metric
from nnunetv2_e2enet.evaluation.report.svg import CHARACTER, WIDTH, Axis, Chart, fitting_axis, model_style, shortened
from nnunetv2_e2enet.evaluation.statistics import MEAN, RankTest

LEFT, RIGHT, TOP, BOTTOM = 64, WIDTH - 14, 14, 46
DOTS_PER_MODEL = 400
BOX = 9


def pareto(
    comparison: Comparison, values: Sequence[Sequence[float]], title: str, unit: str, kinds: Sequence[str] = ("",)
) -> Chart:
    """Mean Dice over a cost: filled marks for the first of ``kinds``, hollow ones for the second.

    Args:
        values: for each kind, the cost of each model; NaN is not drawn.
    """
    models = comparison.names
    intervals = [comparison.intervals["dice"][name][MEAN] for name in models]
    heights = [h for i in intervals for h in (i.mean, i.low, i.high)]
    x = fitting_axis([v for kind in values for v in kind], LEFT, RIGHT, logarithmic=True, margin=0.15)
    y = fitting_axis(heights, 240 - BOTTOM, TOP, margin=0.1)
    listed = "; ".join(
        f"{name}: Dice {i.mean:.4f}, {cost:.4g} {unit}" for name, i, cost in zip(models, intervals, values[0], strict=True)
    )
    chart = Chart(f"Mean Dice over {title}", listed, 240)
    chart.frame(x, y, f"{title} ({unit}), log scale", "mean Dice")
    front = _front([(v, i.mean) for v, i in zip(values[0], intervals, strict=True)])
    if len(front) > 1:
        chart.path([(x(v), y(d)) for v, d in front], "var(--muted)", "front")
    for kind, costs in zip(kinds, values, strict=False):
        for index, (name, cost, interval) in enumerate(zip(models, costs, intervals, strict=True)):
            if not (math.isfinite(cost) and math.isfinite(interval.mean)):
                continue
            colour, marker = model_style(index)
            first = kind == kinds[0]
            tip = f"{name}{', ' + kind if kind else ''}: {cost:.4g} {unit}, Dice {interval.mean:.4f}"
            if first and math.isfinite(interval.low):
                chart.line(x(cost), y(interval.low), x(cost), y(interval.high), "whisker", colour)
            chart.mark(x(cost), y(interval.mean), colour, marker, 5.5, "mark" if first else "hollow", tip)
            if first:
                left = x(cost) < (LEFT + RIGHT) / 2
                chart.text(x(cost) + (9 if left else -9), y(interval.mean) - 7, name, "start" if left else "end", "tick")
    return chart


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both cost and Dice, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, dice in sorted((p for p in points if all(map(math.isfinite, p))), key=lambda p: (p[0], -p[1])):
        if not front or dice > front[-1][1]:
            front.append((cost, dice))
    return front


def box_plots(comparison: Comparison, metric: Metric) -> Chart:
    """A box for each class and model: quartiles, median, whiskers to the last value within 1.5 box lengths, outliers."""
    results = comparison.results
    values = results.values[metric.key]
    row = len(results.models) * (BOX + 3) + 12
    height = TOP + row * len(results.classes) + BOTTOM
    label_width = min(120.0, 12 + 6.2 * max(len(name) for name in results.classes))
    x = Axis(0.0, 1.0 if metric.higher_is_better else _widest_whisker(values), label_width, RIGHT - 6)
    unit = f" ({metric.unit})" if metric.unit else ""
    medians = "; ".join(
        f"{label}: " + ", ".join(f"{m} {_median(values[i, :, k]):.3g}" for i, m in enumerate(results.models))
        for k, label in enumerate(results.classes)
    )
    chart = Chart(f"{metric.title} of each class{unit}", f"Medians: {medians}", height)
    bottom = height - BOTTOM
    for tick in x.ticks:
        chart.line(x(tick), TOP, x(tick), bottom, "grid")
        chart.text(x(tick), bottom + 15, f"{tick:g}", kind="tick")
    for k, label in enumerate(results.classes):
        top = TOP + k * row
        chart.text(label_width - 6, top + row / 2 + 3, shortened(label, label_width - 8), "end", "tick")
        for i, model in enumerate(results.models):
            numbers = values[i, :, k]
            _draw_box(chart, x, top + 6 + i * (BOX + 3), numbers[np.isfinite(numbers)], i, f"{label}, {model}")
    chart.line(label_width, bottom, RIGHT, bottom)
    chart.text((label_width + RIGHT) / 2, bottom + 34, f"{metric.title}{unit}", kind="label")
    return chart


def _draw_box(chart: Chart, x: Axis, top: float, numbers: NDArray[np.float64], model: int, name: str) -> None:
    if not numbers.size:
        return
    colour, _ = model_style(model)
    q1, median, q3 = (float(q) for q in np.percentile(numbers, [25, 50, 75]))
    inside = numbers[(numbers >= q1 - 1.5 * (q3 - q1)) & (numbers <= q3 + 1.5 * (q3 - q1))]
    middle = top + BOX / 2
    chart.line(x(float(inside.min())), middle, x(float(inside.max())), middle, "whisker", colour)
    tip = f"{name}: median {median:.4g}, quartiles {q1:.4g} and {q3:.4g}, n = {numbers.size}"
    chart.box(x(q1), top, x(q3) - x(q1), BOX, colour, tip=tip)
    chart.line(x(median), top, x(median), top + BOX, "median", colour)
    outliers = numbers[(numbers < inside.min()) | (numbers > inside.max())]
    for outlier in outliers[outliers <= x.high]:
        chart.mark(x(float(outlier)), middle, colour, "circle", 1.6, "dot")
    beyond = outliers[outliers > x.high]
    if beyond.size:
        tip = f"{name}: {beyond.size} of {numbers.size} beyond {x.high:.3g}, up to {beyond.max():.4g}"
        chart.mark(x.end + 7, middle, colour, "right", 3.2, "mark", tip)


def _widest_whisker(values: NDArray[np.float64]) -> float:
    """A little more than the end of the longest whisker: what lies beyond would squeeze all boxes."""
    ends = [0.0]
    for numbers in values.transpose(0, 2, 1).reshape(-1, values.shape[1]):
        defined = numbers[np.isfinite(numbers)]
        if defined.size:
            q1, q3 = np.percentile(defined, [25, 75])
            ends.append(float(defined[defined <= q3 + 1.5 * (q3 - q1)].max()))
    return 1.25 * max(ends) or 1.0


def volume_and_dice(comparison: Comparison, seed: int = 0) -> Chart:
    """Dice over the volume of a class in the reference: small dots are cases, large marks the means of the classes."""
    results = comparison.results
    volumes, dice = results.values["reference_ml"], results.values["dice"]
    shown = np.isfinite(dice) & (volumes > 0)
    x = fitting_axis(volumes[shown].tolist(), LEFT, RIGHT, logarithmic=True)
    y = Axis(-0.02, 1.02, 260 - BOTTOM, TOP)
    chart = Chart("Dice over the volume of the organ in the reference", _volume_words(comparison), 260)
    chart.frame(x, y, "volume in the reference (ml), log scale", "Dice")
    random = np.random.default_rng(seed)
    for i, model in enumerate(results.models):
        colour, marker = model_style(i)
        places = np.argwhere(shown[i])
        if len(places) > DOTS_PER_MODEL:
            places = places[random.choice(len(places), DOTS_PER_MODEL, replace=False)]
        for j, k in places:
            chart.mark(x(float(volumes[i, j, k])), y(float(dice[i, j, k])), colour, marker, 1.8, "dot")
        for k, label in enumerate(results.classes):
            if shown[i, :, k].any():
                means = (float(values[i, shown[i, :, k], k].mean()) for values in (volumes, dice))
                volume, mean = means
                tip = f"{label}, {model}: mean volume {volume:.3g} ml, mean Dice {mean:.4f}"
                chart.mark(x(volume), y(mean), colour, marker, 5.5, "mark", tip)
    return chart


def _volume_words(comparison: Comparison) -> str:
    reference = comparison.results.values["reference_ml"][0]
    volumes = nan_mean(np.where(reference > 0, reference, np.nan), axis=0)
    sized = sorted((volume, name) for volume, name in zip(volumes, comparison.results.classes, strict=True) if volume > 0)
    return "Classes by mean volume: " + ", ".join(f"{name} {volume:.3g} ml" for volume, name in sized)


def case_differences(comparison: Comparison, first: int, second: int, metric: Metric) -> Chart:
    """First model minus second, a bar for each case, in order of size; coloured by the model that is better."""
    results = comparison.results
    means = results.case_means(metric.key)
    difference = means[first] - means[second]
    order = [int(i) for i in np.argsort(difference, kind="stable") if math.isfinite(difference[i])]
    names = results.models[first], results.models[second]
    better = sum((difference[i] > 0) == metric.higher_is_better and difference[i] != 0 for i in order)
    worse = sum((difference[i] < 0) == metric.higher_is_better and difference[i] != 0 for i in order)
    words = f"{names[0]} is better in {better} of {len(order)} cases, {names[1]} in {worse}"
    chart = Chart(f"{metric.title} by case, {names[0]} minus {names[1]}", words, 220)
    y = fitting_axis([0.0, *(float(difference[i]) for i in order)], 220 - 34, TOP)
    x = Axis(0, max(len(order), 1), LEFT, RIGHT)
    for tick in y.ticks:
        chart.line(LEFT, y(tick), RIGHT, y(tick), "grid")
        chart.text(LEFT - 6, y(tick) + 4, f"{tick:+g}" if tick else "0", "end", "tick")
    for place, index in enumerate(order):
        value = float(difference[index])
        colour, _ = model_style(first if (value > 0) == metric.higher_is_better else second)
        top, bottom = sorted((y(value), y(0)))
        tip = f"{results.cases[index].name}: {value:+.4f}"
        chart.box(x(place) + 0.5, top, x(place + 1) - x(place) - 1, bottom - top, colour, "bar", tip)
    chart.line(LEFT, y(0), RIGHT, y(0))
    chart.text((LEFT + RIGHT) / 2, 220 - 10, f"{len(order)} cases, in order of the difference", kind="label")
    chart.vertical_text(13, (y.start + y.end) / 2, "difference" + (f" ({metric.unit})" if metric.unit else ""))
    return chart


def training_curves(comparison: Comparison, key: str, title: str) -> Chart | None:
    """One line for each fold, in the colour of its model; None where no training is known."""
    curves = [
        (i, training.fold, training.curves.get(key, []))
        for i, model in enumerate(comparison.models)
        for training in model.trainings
    ]
    curves = [(i, fold, [v for v in values if math.isfinite(v)]) for i, fold, values in curves if len(values) > 1]
    if not curves:
        return None
    last = "; ".join(f"{comparison.names[i]} fold {fold} ends at {values[-1]:.3f}" for i, fold, values in curves if values)
    chart = Chart(f"{title} by epoch", last, 220)
    x = Axis(0, max(len(values) for _, _, values in curves) - 1, LEFT, RIGHT)
    y = fitting_axis([v for _, _, values in curves for v in values], 220 - BOTTOM, TOP)
    chart.frame(x, y, "epoch", title)
    for i, _, values in curves:
        step = max(1, len(values) // 400)
        kept = [*range(0, len(values), step), len(values) - 1]
        chart.path([(x(e), y(values[e])) for e in kept], model_style(i)[0])
    return chart


def critical_difference_diagram(comparison: Comparison, test: RankTest, metric: Metric) -> Chart:
    """Mean ranks on a line, 1 is best; a bar joins models that Nemenyi's test does not tell apart."""
    models = sorted(zip(test.mean_ranks, range(len(comparison.names)), strict=True))
    groups = _cliques([rank for rank, _ in models], test.critical_difference)
    top = 46 + 9 * len(groups)
    height = top + 22 * len(models) + 10
    words = ", ".join(f"{comparison.names[i]} {rank:.2f}" for rank, i in models)
    chart = Chart(
        f"Critical difference diagram, {metric.title}",
        f"Mean ranks: {words}. Critical difference {test.critical_difference:.2f}",
        height,
    )
    x = Axis(1, len(models), 24, WIDTH - 24)
    chart.line(x.start, 30, x.end, 30)
    for tick in range(1, len(models) + 1):
        chart.line(x(tick), 26, x(tick), 30)
        chart.text(x(tick), 20, str(tick), kind="tick")
    for row, (low, high) in enumerate(groups):
        chart.line(x(low) - 3, 38 + 9 * row, x(high) + 3, 38 + 9 * row, "clique")
    for row, (rank, i) in enumerate(reversed(models)):  # the best has the longest line, so that labels cross none
        colour, marker = model_style(i)
        y = top + 22 * row + 8
        words = f"{comparison.names[i]} ({rank:.2f})"
        fits = x(rank) + 8 + CHARACTER * len(words) < WIDTH
        chart.line(x(rank), 30, x(rank), y, "whisker", colour)
        chart.mark(x(rank), 30, colour, marker, 4)
        chart.text(x(rank) + (8 if fits else -8), y + 4, words, "start" if fits else "end", "tick halo")
    return chart


def _cliques(ranks: Sequence[float], critical: float) -> list[tuple[float, float]]:
    """Largest groups of sorted ranks that lie within the critical difference, of two or more."""
    groups: list[tuple[float, float]] = []
    for start, low in enumerate(ranks):
        high = [rank for rank in ranks[start:] if rank - low <= critical][-1]
        if high > low and (not groups or high > groups[-1][1]):
            groups.append((low, high))
    return groups


def _median(values: NDArray[np.float64]) -> float:
    defined = values[np.isfinite(values)]
    return float(np.median(defined)) if defined.size else math.nan
