"""A whole comparison: what was measured, how sure it is, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.costs import Costs, count_costs
from nnunetv2_e2enet.evaluation.labels import Labels
from nnunetv2_e2enet.evaluation.measure import Results
from nnunetv2_e2enet.evaluation.metrics import METRICS
from nnunetv2_e2enet.evaluation.networks import Training, model_design, read_trainings
from nnunetv2_e2enet.evaluation.profile import Profile, Settings
from nnunetv2_e2enet.evaluation.sources import Source
from nnunetv2_e2enet.evaluation.statistics import (
    Interval,
    PairedTest,
    RankTest,
    class_intervals,
    paired_tests,
    rank_tests,
    trade_off_scores,
)

FAILURE_DICE = 0.5


@dataclass(frozen=True)
class Failure:
    """A class of a case on which a model failed.

    Attributes:
        kind: ``missed`` (in the reference alone), ``invented`` (in the prediction alone) or ``low Dice``.
    """

    model: str
    case: str
    label: str
    kind: str
    dice: float
    reference_ml: float
    prediction_ml: float


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model beside its predictions.

    Attributes:
        costs: None where there is no checkpoint to build the network from; ``note`` says why.
        patch_size: of ``costs``.
        architecture: class of the network.
        plans: name of the plans.
        trainings: one for each fold.
    """

    source: Source
    costs: Costs | None
    patch_size: tuple[int, ...]
    architecture: str
    plans: str
    trainings: list[Training]
    note: str = ""

    @property
    def name(self) -> str:
        return self.source.name


@dataclass(frozen=True)
class Comparison:
    """Everything that tables, files and the report show.

    Attributes:
        tolerances: of the surface Dice in mm, by class.
        intervals: by metric, model, and class or ``mean``.
        fold_means: foreground mean of each metric, by model and fold; empty where there are no folds.
        paired: tests by metric, of two models.
        ranked: tests by metric, of three or more.
        scores: performance trade-off by model, with active and with executed arithmetic; empty where costs are unknown.
        weights: ``a1`` and ``a2`` of the scores.
        profiles, settings: measurements of the models' memory and time, where they were asked for.
    """

    models: list[ModelFacts]
    labels: Labels
    tolerances: list[float]
    results: Results
    intervals: dict[str, dict[str, dict[str, Interval]]]
    fold_means: dict[str, dict[str, dict[str, float]]]
    paired: dict[str, list[PairedTest]]
    ranked: dict[str, list[RankTest]]
    failures: list[Failure]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: tuple[float, float] = (1.0, 1.0)
    profiles: list[Profile] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]


def compare(
    models: Sequence[ModelFacts],
    labels: Labels,
    tolerances: Sequence[float],
    results: Results,
    weights: tuple[float, float] = (1.0, 1.0),
    failure_dice: float = FAILURE_DICE,
    seed: int = 0,
) -> Comparison:
    """The statistics of finished measurements. ``seed`` is that of the bootstrap; the same seed gives the same intervals."""
    intervals = {
        metric.key: {
            name: class_intervals(results.values[metric.key][i], results.classes, seed)
            for i, name in enumerate(results.models)
        }
        for metric in METRICS
    }
    two = len(results.models) == 2
    tests = results.values
    comparison = Comparison(
        list(models),
        labels,
        list(tolerances),
        results,
        intervals,
        _fold_means(results),
        {m.key: paired_tests(tests[m.key], results.classes, seed) for m in METRICS} if two else {},
        {m.key: rank_tests(tests[m.key], results.classes, m.higher_is_better) for m in METRICS} if not two else {},
        _failures(results, failure_dice),
        weights=weights,
    )
    comparison.scores.update(_scores(comparison))
    return comparison


def model_facts(source: Source) -> ModelFacts:
    """Costs and trainings of a source, from its model folder where there is one."""
    if source.model is None:
        return ModelFacts(source, None, (), "", "", [], "name the model folder with --model")
    try:
        trainings = read_trainings(source.model)
        design = model_design(source.model, source.name)
        network = design.build()
    except E2ENetError as error:
        return ModelFacts(source, None, (), "", "", [], str(error))
    costs = count_costs(network, design.input_shape())
    plans = str(design.plans.get("plans_name", ""))
    return ModelFacts(source, costs, design.patch_size, type(network).__name__, plans, trainings)


def _fold_means(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    folds = sorted({case.fold for case in results.cases if case.fold is not None})
    means: dict[str, dict[str, dict[str, float]]] = {}
    for metric in METRICS:
        means[metric.key] = {model: {} for model in results.models}
        for fold in folds:
            chosen = [i for i, case in enumerate(results.cases) if case.fold == fold]
            part = {metric.key: results.values[metric.key][:, chosen]}
            per_model = Results(results.models, results.classes, [results.cases[i] for i in chosen], part, 0)
            for model, mean in zip(results.models, per_model.foreground_means(metric.key), strict=True):
                means[metric.key][model][fold] = float(mean)
    return means


def _failures(results: Results, failure_dice: float) -> list[Failure]:
    """Worst first: by Dice, then by how much of the reference is concerned."""
    dice, reference, prediction = (results.values[key] for key in ("dice", "reference_ml", "prediction_ml"))
    failures = []
    for i, j, k in np.argwhere(dice < failure_dice):
        volumes = float(reference[i, j, k]), float(prediction[i, j, k])
        kind = "missed" if volumes[1] == 0 else "invented" if volumes[0] == 0 else "low Dice"
        failures.append(
            Failure(results.models[i], results.cases[j].name, results.classes[k], kind, float(dice[i, j, k]), *volumes)
        )
    return sorted(failures, key=lambda f: (f.dice, -max(f.reference_ml, f.prediction_ml)))


def _scores(comparison: Comparison) -> dict[str, dict[str, float]]:
    costs = {model.name: model.costs for model in comparison.models if model.costs is not None}
    if len(costs) < len(comparison.models):
        return {}
    means = comparison.results.foreground_means("dice")
    dice = {name: float(mean) for name, mean in zip(comparison.names, means, strict=True)}
    parameters = {name: float(c.parameters_active) for name, c in costs.items()}
    a1, a2 = comparison.weights
    active = trade_off_scores(dice, parameters, {name: float(c.macs_active) for name, c in costs.items()}, a1, a2)
    executed = trade_off_scores(dice, parameters, {name: float(c.macs_executed) for name, c in costs.items()}, a1, a2)
    return {name: {"active": active[name], "executed": executed[name]} for name in comparison.names}


def comparable_patches(comparison: Comparison) -> bool:
    """Whether all known costs are of the same patch; otherwise multiply-accumulates should be read per voxel."""
    return len({model.patch_size for model in comparison.models if model.costs is not None}) <= 1


def order_by_dice(comparison: Comparison) -> list[int]:
    """Indices of cases, lowest mean Dice over all models first; cases without any class are left out."""
    means = comparison.results.case_means("dice").mean(axis=0)
    return [int(i) for i in np.argsort(means, kind="stable") if not math.isnan(means[i])]
