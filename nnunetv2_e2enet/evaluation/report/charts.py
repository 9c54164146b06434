"""The charts of a comparison."""

from __future__ import annotations

import math
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from nnunetv2_e2enet.evaluation.comparison import Comparison
from nnunetv2_e2enet.evaluation.metrics import Metric
from nnunetv2_e2enet.evaluation.report.drawing import COLOURS, INK, MUTED, Chart, inline_svg, new_figure, style, tip

MODEL_COLOURS = [COLOURS[name] for name in ("blue", "vermillion", "green", "purple", "sky", "orange", "yellow")]
MODEL_MARKERS = "os^D"
DOTS_PER_MODEL = 400
CLASS_CHARACTERS = 18
"""Longer names of classes are cut on the axis; tables have them whole."""


def model_style(index: int) -> tuple[str, str]:
    """Colour and marker of a model; both differ, so that neither is needed alone."""
    return MODEL_COLOURS[index % len(MODEL_COLOURS)], MODEL_MARKERS[index % len(MODEL_MARKERS)]


def legend(index: int) -> str:
    """The mark of a model as a small ``svg`` element."""
    colour, marker = model_style(index)
    with style():
        figure = Figure(figsize=(0.2, 0.2), facecolor="none")
        figure.add_artist(Line2D([0.5], [0.5], marker=marker, color=colour, markersize=8, linestyle="none"))
        return inline_svg(figure, f"legend-{index}", "")


def pareto(
    comparison: Comparison, key: str, cost: str, unit: str, caption: str, values: pd.Series, hollow: pd.Series | None = None
) -> Chart:
    """Mean Dice over a cost, with a line through the models that no other model beats in both.

    Args:
        comparison: the models, with their mean Dice.
        key: name of the figure among those of a page.
        cost: name of the cost, for the title.
        unit: of the cost, for the axis.
        caption: text below the figure.
        values: by model; NaN is not drawn.
        hollow: a second cost of each model, drawn as a hollow mark.
    """
    figure, [[axes]] = new_figure(2.7)
    axes.set_xscale("log")
    intervals = {name: comparison.interval("dice", name) for name in comparison.names}
    dice = pd.Series({name: interval.mean for name, interval in intervals.items()})
    points = pd.DataFrame({"cost": values, "dice": dice}).dropna().sort_values(["cost", "dice"], ascending=[True, False])
    front = points[points["dice"] > points["dice"].cummax().shift(fill_value=-math.inf)]
    if len(front) > 1:
        axes.plot(front["cost"], front["dice"], color=MUTED, linewidth=1, linestyle="--")
    known = [float(x) for x in pd.concat([values, hollow if hollow is not None else values]) if x > 0]
    middle = math.sqrt(min(known) * max(known)) if known else 1.0
    for index, (name, interval) in enumerate(intervals.items()):
        colour, marker = model_style(index)
        x = float(values[name])
        if hollow is not None:
            axes.plot(hollow[name], interval.mean, marker, color=colour, markersize=8, markerfacecolor="none")
        if not (math.isfinite(x) and math.isfinite(interval.mean)):
            continue
        if math.isfinite(interval.low):
            axes.vlines(x, interval.low, interval.high, color=colour, linewidth=1.4)
        (mark,) = axes.plot(x, interval.mean, marker, color=colour, markersize=8)
        tip(mark, f"{name}: {x:.4g} {unit}, Dice {interval.mean:.4f}")
        left = x <= middle
        place: Any = {"xytext": (8 if left else -8, 5), "textcoords": "offset points", "ha": "left" if left else "right"}
        axes.annotate(name, (x, interval.mean), color=MUTED, fontsize=8.5, **place)
    _log_axis(axes)
    axes.margins(x=0.15, y=0.12)
    axes.grid(visible=True)
    axes.set(xlabel=f"{cost} ({unit}), log scale", ylabel="mean Dice")
    listed = "; ".join(f"{name}: Dice {i.mean:.4f}, {values[name]:.4g} {unit}" for name, i in intervals.items())
    return Chart(key, f"Mean Dice over {cost}", caption, figure, listed)


def _log_axis(axes: Axes) -> None:
    """Plain numbers, and enough of them within one power of ten."""
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def box_plots(comparison: Comparison, metric: Metric) -> Chart:
    """A box for each class and model: quartiles, median, whiskers to the last value within 1.5 box lengths, outliers."""
    results = comparison.results
    values = results.values[metric.key]
    step = 1 / (len(results.models) + 0.7)
    boxes = {
        (i, k): {**boxplot_stats(numbers)[0], "n": numbers.size}
        for i in range(len(results.models))
        for k in range(len(results.classes))
        if (numbers := _defined(values[i, :, k])).size
    }
    figure, [[axes]] = new_figure(0.75 + len(results.classes) * (0.14 * len(results.models) + 0.12))
    end = 1.0 if metric.higher_is_better else 1.25 * max([box["whishi"] for box in boxes.values()], default=0.0) or 1.0
    axes.set(
        xlim=(-0.02 * end, 1.02 * end), ylim=(len(results.classes) - 0.5, -0.5)
    )  # what lies beyond would squeeze all boxes
    for (i, k), box in boxes.items():
        y = k + (i - (len(results.models) - 1) / 2) * step
        _draw_box(axes, box, y, 0.8 * step, i, f"{results.classes[k]}, {results.models[i]}")
    axes.set_yticks(range(len(results.classes)), [_shortened(name) for name in results.classes])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    unit = f" ({metric.unit})" if metric.unit else ""
    axes.set_xlabel(f"{metric.title}{unit}")
    medians = "; ".join(
        f"{label}: " + ", ".join(f"{m} {boxes[i, k]['med']:.3g}" for i, m in enumerate(results.models) if (i, k) in boxes)
        for k, label in enumerate(results.classes)
    )
    caption = "" if metric.higher_is_better else "Triangles at the edge stand for values beyond it."
    return Chart(f"boxes-{metric.key}", f"{metric.title} of each class{unit}", caption, figure, f"Medians: {medians}")


def _draw_box(axes: Axes, box: dict[str, Any], y: float, height: float, model: int, name: str) -> None:
    colour, _ = model_style(model)
    low, median, high = float(box["q1"]), float(box["med"]), float(box["q3"])
    axes.hlines(y, box["whislo"], box["whishi"], color=colour, linewidth=1.2)
    (bar,) = axes.barh(y, high - low, height, low, facecolor=colour, alpha=0.3)
    axes.barh(y, high - low, height, low, facecolor="none", edgecolor=colour, linewidth=1)
    axes.vlines(median, y - height / 2, y + height / 2, color=colour, linewidth=2)
    tip(bar, f"{name}: median {median:.4g}, quartiles {low:.4g} and {high:.4g}, n = {box['n']}")
    end = axes.get_xlim()[1]
    outliers, beyond = (box["fliers"][choice] for choice in (box["fliers"] <= end, box["fliers"] > end))
    axes.plot(outliers, np.full(outliers.shape, y), ".", color=colour, markersize=3, alpha=0.6)
    if beyond.size:
        (mark,) = axes.plot(end, y, ">", color=colour, markersize=5, clip_on=False)
        tip(mark, f"{name}: {beyond.size} of {box['n']} beyond {end:.3g}, up to {beyond.max():.4g}")


def _shortened(name: str) -> str:
    return name if len(name) <= CLASS_CHARACTERS else name[: CLASS_CHARACTERS - 1] + "…"


def _defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def volume_and_dice(comparison: Comparison) -> Chart:
    """Dice over the volume of a class in the reference: small dots are cases, large marks the means of the classes."""
    figure, [[axes]] = new_figure(3.0)
    frame = comparison.results.frame
    frame = frame[(frame["reference_ml"] > 0) & frame["dice"].notna()]
    for i, model in enumerate(comparison.names):
        colour, marker = model_style(i)
        own = frame[frame["model"] == model]
        dots = own.sample(min(len(own), DOTS_PER_MODEL), random_state=0)
        axes.plot(dots["reference_ml"], dots["dice"], marker, color=colour, markersize=2.5, alpha=0.5, markeredgewidth=0)
        for label, mean in own.groupby("class", sort=False)[["reference_ml", "dice"]].mean().iterrows():
            (mark,) = axes.plot(mean["reference_ml"], mean["dice"], marker, color=colour, markersize=8)
            tip(mark, f"{label}, {model}: mean volume {mean['reference_ml']:.3g} ml, mean Dice {mean['dice']:.4f}")
    if not frame.empty:
        axes.set_xscale("log")
        _log_axis(axes)
    axes.grid(visible=True)
    axes.set(ylim=(-0.02, 1.02), xlabel="volume in the reference (ml), log scale", ylabel="Dice")
    volumes = frame[frame["model"] == comparison.names[0]].groupby("class")["reference_ml"].mean().sort_values()
    words = "Classes by mean volume: " + ", ".join(f"{label} {volume:.3g} ml" for label, volume in volumes.items())
    caption = f"Small dots are cases (at most {DOTS_PER_MODEL} a model, drawn at random), large marks the means of classes."
    return Chart("volume", "Dice over the volume of the organ in the reference", caption, figure, words)


def case_differences(comparison: Comparison, first: int, second: int, metric: Metric) -> Chart:
    """First model minus second, a bar for each case, in order of size; coloured by the model that is better."""
    difference = comparison.case_differences(metric.key, first, second).dropna().sort_values(kind="stable")
    names = comparison.names[first], comparison.names[second]
    gain = difference if metric.higher_is_better else -difference
    figure, [[axes]] = new_figure(2.5)
    colours = [model_style(first if value > 0 else second)[0] for value in gain]
    for bar, (case, value) in zip(
        axes.bar(range(len(difference)), difference, color=colours), difference.items(), strict=True
    ):
        tip(bar, f"{case}: {value:+.4f}")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}" if y else "0"))
    axes.grid(visible=True, axis="y")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    unit = f" ({metric.unit})" if metric.unit else ""
    axes.set(xlabel=f"{len(difference)} cases, in order of the difference", ylabel=f"difference{unit}")
    words = f"{names[0]} is better in {(gain > 0).sum()} of {len(gain)} cases, {names[1]} in {(gain < 0).sum()}"
    title = f"{metric.title} by case, {names[0]} minus {names[1]}"
    return Chart(f"cases-{second}-{metric.key}", title, f"{words}. The colour is that of the better model.", figure, words)


def training_curves(comparison: Comparison, key: str, title: str) -> Chart | None:
    """One line for each fold, in the colour of its model; None where no training is known."""
    figure, [[axes]] = new_figure(2.5)
    ends = []
    for i, model in enumerate(comparison.models):
        for training in model.trainings:
            values = [v for v in training.curves.get(key, []) if math.isfinite(v)]
            if len(values) < 2:
                continue
            step = max(1, len(values) // 400)
            kept = [*range(0, len(values), step), len(values) - 1]
            axes.plot(kept, [values[epoch] for epoch in kept], color=model_style(i)[0], linewidth=1.4)
            ends.append(f"{model.name} fold {training.fold} ends at {values[-1]:.3f}")
    if not ends:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(visible=True)
    axes.set(xlabel="epoch", ylabel=title)
    caption = "A line for each fold, in the colour of its model."
    return Chart(f"training-{key}", f"{title} by epoch", caption, figure, "; ".join(ends))


def critical_differences(comparison: Comparison, metric: Metric) -> Chart:
    """Mean ranks on a line, 1 is best; a bar joins models that Nemenyi's test does not tell apart (Demšar, 2006)."""
    from scikit_posthocs import critical_difference_diagram

    test = comparison.overall(metric.key)
    names = comparison.names
    figure, [[axes]] = new_figure(0.9 + 0.3 * ceil(len(names) / 2))
    drawn = critical_difference_diagram(
        pd.Series(test.mean_ranks, names),
        pd.DataFrame(test.p_nemenyi, names, names),
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})\u00a0",
        label_fmt_right="\u00a0{label} ({rank:.2f})",
        label_props={"fontsize": 9},
        text_h_margin=0.08,
        crossbar_props={"color": INK, "linewidth": 3},
        marker_props={"s": 25},
        color_palette={name: model_style(i)[0] for i, name in enumerate(names)},
    )
    for label in drawn["labels"]:
        label.set_color(INK)
    axes.spines["top"].set_visible(True)
    axes.set(xlim=(0.8, len(names) + 0.2), xticks=range(1, len(names) + 1))
    listed = sorted(zip(test.mean_ranks, names, strict=True))
    words = f"Mean ranks: {', '.join(f'{name} {rank:.2f}' for rank, name in listed)}. "
    caption = f"Critical difference {test.critical_difference:.2f}"
    return Chart(f"ranks-{metric.key}", f"Critical difference diagram, {metric.title}", f"{caption}.", figure, words + caption)
