"""The page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from nnunetv2_e2enet.evaluation.comparison import Comparison, ModelFacts
from nnunetv2_e2enet.evaluation.metrics import METRICS
from nnunetv2_e2enet.evaluation.numbers import NOTHING
from nnunetv2_e2enet.evaluation.profile_tables import how_measured
from nnunetv2_e2enet.evaluation.report import charts, tables
from nnunetv2_e2enet.evaluation.report.document import document, figure, figures, provenance_list
from nnunetv2_e2enet.evaluation.report.explanations import explanations
from nnunetv2_e2enet.evaluation.report.pictures import Picture
from nnunetv2_e2enet.evaluation.report.svg import Chart, colour_variables, model_style
from nnunetv2_e2enet.evaluation.statistics import MEAN
from nnunetv2_e2enet.evaluation.tables import cost_notes, missing_costs, verdicts

DICE = METRICS[0]
CURVES = {"train_losses": "training loss", "val_losses": "validation loss", "ema_fg_dice": "pseudo Dice (moving average)"}


def report_html(comparison: Comparison, pictures: Sequence[Picture], provenance: dict[str, Any]) -> str:
    """The whole page as text. It loads nothing: style, charts and pictures are in it."""
    sections = {
        "Summary": _summary(comparison),
        "Accuracy against cost": _cost(comparison),
        "Classes": _classes(comparison),
        "Size of organs": _sizes(comparison),
        "Case by case": _cases(comparison),
        "Pictures": _pictures(pictures),
        "Failures": _failures(comparison),
        "Training": _training(comparison),
        "How to read this": explanations(comparison),
        "How this was made": _provenance(comparison, provenance),
    }
    names = _listed(comparison.names)
    results = comparison.results
    dataset = next((m.source.dataset for m in comparison.models if m.source.dataset), None)
    lead = (
        f"{dataset + ', ' if dataset else ''}{len(results.cases)} cases, {len(results.classes)} classes, {provenance['date']}"
    )
    return document(f"{names}: comparison", names, lead, sections, colour_variables(), _legend(comparison))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _legend(comparison: Comparison) -> str:
    items = []
    for index, name in enumerate(comparison.names):
        mark = Chart("", "", 14)
        mark.mark(7, 7, model_style(index)[0], model_style(index)[1], 5.5)
        items.append(f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{"".join(mark.elements)}</svg>{escape(name)}</li>')
    return f'<ul class="legend" aria-label="Models">{"".join(items)}</ul>'


def _figure(chart: Chart, note: str = "") -> str:
    return figure(chart.title, chart.render(), note)


def _summary(comparison: Comparison) -> str:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdicts(comparison))
    failed = len(comparison.failures)
    total = sum(int((~_isnan(comparison, i)).sum()) for i in range(len(comparison.names)))
    return (
        f"<ul>{sentences}</ul><h3>Accuracy</h3>{tables.accuracy(comparison)}"
        f'<p class="note">Mean of the class means with its 95 % bootstrap interval. {failed} of {total} (model, case, class) '
        f'are failures, <a href="#failures">listed below</a>.</p>'
        + (f"<h3>Dice of each fold</h3>{tables.folds(comparison)}" if tables.folds(comparison) else "")
    )


def _isnan(comparison: Comparison, model: int) -> Any:
    values = comparison.results.values["dice"][model]
    return values != values


def _cost(comparison: Comparison) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in missing_costs(comparison))
    if not any(model.costs for model in comparison.models):
        return notes
    costs = [model.costs for model in comparison.models]
    parameters = [
        [math.nan if c is None else c.parameters_active / 1e6 for c in costs],
        [math.nan if c is None else c.parameters_stored / 1e6 for c in costs],
    ]
    macs = [
        [math.nan if c is None else c.macs_active / 1e9 for c in costs],
        [math.nan if c is None else c.macs_executed / 1e9 for c in costs],
    ]
    plots = [
        _figure(
            charts.pareto(comparison, parameters, "parameters", "M", ("active", "stored")),
            "Filled: active parameters. Hollow: stored ones. Whiskers: 95 % interval. Dashed: models that none beats in both.",
        ),
        _figure(
            charts.pareto(comparison, macs, "multiply-accumulates", "G", ("active", "executed")),
            "Filled: what the topology leaves to compute. Hollow: what is executed. Top left is best.",
        ),
    ]
    measured = ""
    if comparison.profiles:
        settings = comparison.settings
        how = f"Measured on {settings.device}, {settings.threads} threads, {settings.dtype}. {how_measured(settings)}"
        measured = f'{tables.measurements(comparison)}<p class="note">{escape(how)}</p>'
        seconds = {p.name: p.latency[1] for p in comparison.profiles}
        latency = [seconds.get(name, math.nan) for name in comparison.names]
        plots.append(_figure(charts.pareto(comparison, [latency], "time of a patch", "s"), "Median of the timed passes."))
    note = f'<p class="note">{escape(cost_notes(comparison))}</p>'
    return f"{tables.costs(comparison)}{note}{notes}{measured}{figures(plots)}"


def _classes(comparison: Comparison) -> str:
    note = "Triangles at the edge stand for values beyond it."
    plots = [_figure(charts.box_plots(comparison, metric), "" if metric.higher_is_better else note) for metric in METRICS]
    details = [
        f"<details{' open' if metric is DICE else ''}><summary>{metric.title}: means, intervals and tests</summary>"
        f"{tables.classes(comparison, metric)}</details>"
        for metric in METRICS
    ]
    ranks = ""
    if comparison.ranked:
        overall = {metric: next(t for t in comparison.ranked[metric.key] if t.scope == MEAN) for metric in METRICS}
        shown = {metric: test for metric, test in overall.items() if not math.isnan(test.critical_difference)}
        diagrams = [_figure(charts.critical_difference_diagram(comparison, test, metric)) for metric, test in shown.items()]
        if diagrams:
            ranks = (
                "<h3>Ranks</h3><p>A thick bar joins models that Nemenyi's test does not tell apart at the 5 % level.</p>"
                + figures(diagrams)
                + tables.nemenyi(comparison, overall[DICE])
                + '<p class="note">Nemenyi p-values of Dice, mean over classes.</p>'
            )
    return figures(plots) + "".join(details) + ranks


def _sizes(comparison: Comparison) -> str:
    note = (
        f"Small dots are cases (at most {charts.DOTS_PER_MODEL} a model, drawn at random), large marks the means of classes."
    )
    return figures([_figure(charts.volume_and_dice(comparison), note)])


def _cases(comparison: Comparison) -> str:
    plots = []
    for second in range(1, len(comparison.names)):
        for metric in METRICS[:2] if len(comparison.names) > 2 else METRICS:
            chart = charts.case_differences(comparison, 0, second, metric)
            plots.append(_figure(chart, chart.description + ". The colour is that of the better model."))
    return figures(plots)


def _pictures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    parts = []
    for picture in pictures:
        words = f"{picture.heading}. {picture.caption}"
        alt = f"Axial, coronal and sagittal slice with the reference and the predictions. {words}"
        image = f'<img src="{picture.data}" alt="{escape(alt)}">' if picture.data else ""
        parts.append(
            f"<figure><h3>{escape(picture.heading)}</h3>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    note = (
        "Worst and best are those of lowest and highest Dice, averaged over models and classes. The slice of each plane is "
        "the one that shows most."
    )
    return f'<p class="note">{note}</p><div class="pictures">{"".join(parts)}</div>'


def _failures(comparison: Comparison) -> str:
    if not comparison.failures:
        return "<p>No class was missed, invented, or segmented with a Dice below the threshold.</p>"
    counts = {name: sum(f.model == name for f in comparison.failures) for name in comparison.names}
    listed = ", ".join(f"{escape(name)} {count}" for name, count in counts.items())
    shown = min(tables.FAILURES_SHOWN, len(comparison.failures))
    more = f" The {shown} worst are shown; JSON and CSV have all." if shown < len(comparison.failures) else ""
    opened = " open" if shown <= 20 else ""
    return (
        "<p>A class is missed (in the reference alone), invented (in the prediction alone), or of low Dice. "
        f"{listed}.{more}</p>"
        f"<details{opened}><summary>List</summary>{tables.failures(comparison)}</details>"
    )


def _training(comparison: Comparison) -> str:
    found = [charts.training_curves(comparison, key, title) for key, title in CURVES.items()]
    plots = [_figure(chart, "A line for each fold, in the colour of its model.") for chart in found if chart is not None]
    if not plots:
        return ""
    rows = []
    for model in comparison.models:
        for t in model.trainings:
            seconds = NOTHING if math.isnan(t.epoch_seconds) else f"{t.epoch_seconds:.1f} s"
            rows.append([*map(escape, (model.name, t.fold, t.trainer)), str(t.epochs), seconds])
    head = ["model", "fold", "trainer", "epochs", "median epoch"]
    return figures(plots) + tables.table(head, rows, words=3)


def _provenance(comparison: Comparison, provenance: dict[str, Any]) -> str:
    rows = [_model_row(model) for model in comparison.models]
    models = tables.table(["model", "network", "plans", "configuration", "trainer", "folder"], rows, words=6)
    return models + provenance_list(provenance)


def _model_row(model: ModelFacts) -> list[str]:
    trainers = sorted({training.trainer for training in model.trainings})
    configurations = sorted({training.configuration for training in model.trainings})
    words = [
        model.name,
        model.architecture,
        model.plans,
        ", ".join(configurations),
        ", ".join(trainers),
        str(model.source.folder),
    ]
    return [escape(word) or NOTHING for word in words]
