"""A whole comparison: metrics, uncertainty, costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nnunetv2_e2enet.errors import E2ENetError
from nnunetv2_e2enet.evaluation.costs import Costs, count_costs
from nnunetv2_e2enet.evaluation.labels import Labels
from nnunetv2_e2enet.evaluation.measure import Results
from nnunetv2_e2enet.evaluation.metrics import METRICS
from nnunetv2_e2enet.evaluation.networks import Design, Training, model_design, of_others, read_trainings
from nnunetv2_e2enet.evaluation.profile import Profile, ProfileSettings
from nnunetv2_e2enet.evaluation.sources import Source
from nnunetv2_e2enet.evaluation.statistics import (
    MEAN,
    Interval,
    PairedTest,
    RankTest,
    class_intervals,
    nan_mean,
    paired_tests,
    rank_tests,
    trade_off_scores,
    with_absences,
)

FAILURE_DICE = 0.5


@dataclass(frozen=True)
class ModelFacts:
    """Costs and trainings of a model, and their origin.

    Attributes:
        costs: None where there is no checkpoint to build the network from; ``note`` says why.
        patch_size: of ``costs``.
        architecture: class of the network.
        plans: name of the plans.
        trainings: one for each fold that is compared; all where the predictions do not tell their folds.
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
        """Name of the model in tables."""
        return self.source.name


@dataclass(frozen=True)
class Comparison:
    """All numbers of tables, files and the report.

    Attributes:
        tolerances: of the surface Dice in mm, by class.
        results: the metrics of each case; its ``frame`` has a row for each case, model and class.
        means: by metric, model and scope (class or ``mean``), the columns ``mean``, ``low``, ``high``, ``n`` of ``Interval``.
        tested: the metrics as the tests take them (``with_absences``): by metric, an array (models, cases, classes).
        fold_means: foreground means by metric: a row for each model, a column for each fold; none where there are no folds.
        paired: tests by metric, of two models.
        ranked: tests by metric, of three or more.
        failures: classes of cases on which a model failed, worst first: ``model``, ``case``, ``label``, ``kind`` (``missed``,
            in the reference alone; ``invented``, in the prediction alone; ``low Dice``), ``dice``, ``reference_ml``,
            ``prediction_ml``.
        weights: ``a1`` and ``a2`` of the scores.
        profiles, settings: measurements of the models' memory and time, where they were asked for.
    """

    models: list[ModelFacts]
    labels: Labels
    tolerances: list[float]
    results: Results
    means: pd.DataFrame
    tested: dict[str, NDArray[np.float64]]
    fold_means: dict[str, pd.DataFrame]
    paired: dict[str, list[PairedTest]]
    ranked: dict[str, list[RankTest]]
    failures: pd.DataFrame
    weights: tuple[float, float] = (1.0, 1.0)
    profiles: list[Profile] = field(default_factory=list)
    settings: ProfileSettings = field(default_factory=ProfileSettings)

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return [model.name for model in self.models]

    @property
    def costs(self) -> pd.DataFrame:
        """The fields of ``Costs`` by model; NaN where they are not known."""
        known = [{} if model.costs is None else asdict(model.costs) for model in self.models]
        return pd.DataFrame(known, self.names, [field.name for field in fields(Costs)], dtype=float)

    @property
    def scores(self) -> pd.DataFrame:
        """Performance trade-off by model, with active and with executed arithmetic; empty where any costs are unknown."""
        costs = self.costs
        if costs.isna().any(axis=None):
            return pd.DataFrame(columns=["active", "executed"])
        dice = self.means.loc["dice"].xs(MEAN, level="scope")["mean"]
        parameters = costs["parameters_active"]
        kinds = ("active", "executed")
        return pd.DataFrame({k: trade_off_scores(dice, parameters, costs[f"macs_{k}"], *self.weights) for k in kinds})

    def interval(self, metric: str, model: str, scope: str = MEAN) -> Interval:
        """A mean of one model, of a class or over the classes."""
        row = self.means.loc[(metric, model, scope)]
        return Interval(float(row["mean"]), float(row["low"]), float(row["high"]), int(row["n"]))

    def case_differences(self, metric: str, first: int, second: int) -> pd.Series:
        """First minus second model in the mean over classes, by case, as tested; NaN where one of the two has no value."""
        means = nan_mean(self.tested[metric], axis=2)
        return pd.Series(means[first] - means[second], self.results.names)

    def overall(self, metric: str) -> RankTest:
        """The test of three or more models on the mean over classes."""
        return next(test for test in self.ranked[metric] if test.scope == MEAN)


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
    two = len(results.models) == 2
    tested = {m.key: with_absences(results.values[m.key], m.perfect) for m in METRICS}
    return Comparison(
        list(models),
        labels,
        list(tolerances),
        results,
        _means(results, seed),
        tested,
        _fold_means(results),
        {m.key: paired_tests(tested[m.key], results.classes, seed) for m in METRICS} if two else {},
        {m.key: rank_tests(tested[m.key], results.classes, m.higher_is_better) for m in METRICS} if not two else {},
        _failures(results, failure_dice),
        weights=weights,
    )


def model_facts(source: Source) -> ModelFacts:
    """Costs and trainings of a source, from its model folder where there is one."""
    if source.model is None:
        return ModelFacts(source, None, (), "", "", [], "name the model folder with --model")
    try:
        compared = set(source.folds.values())
        with of_others(f"{source.model} cannot be described"):
            trainings = [t for t in read_trainings(source.model) if not compared or t.fold in compared]
            design = model_design(source.model, source.name)
    except E2ENetError as error:
        return ModelFacts(source, None, (), "", "", [], str(error))
    plans = str(design.plans.get("plans_name", ""))
    try:
        architecture, costs = _counted(design)
    except E2ENetError as error:
        return ModelFacts(source, None, (), "", plans, trainings, str(error))
    return ModelFacts(source, costs, design.patch_size, architecture, plans, trainings)


def _counted(design: Design) -> tuple[str, Costs]:
    """Class and costs of a network."""
    with of_others("the network cannot be built and counted"):
        network = design.build()
        return type(network).__name__, count_costs(network, design.input_shape())


def _fold_means(results: Results) -> dict[str, pd.DataFrame]:
    keys = [metric.key for metric in METRICS]
    means = results.frame.groupby(["model", "fold", "class"])[keys].mean().groupby(level=["model", "fold"]).mean()
    return {key: means[key].unstack().reindex(results.models) for key in keys}


def _means(results: Results, seed: int) -> pd.DataFrame:
    rows = [
        {"metric": metric.key, "model": model, "scope": scope, **asdict(interval)}
        for metric in METRICS
        for model, values in zip(results.models, results.values[metric.key], strict=True)
        for scope, interval in class_intervals(values, results.classes, seed).items()
    ]
    return pd.DataFrame(rows).set_index(["metric", "model", "scope"])


def _failures(results: Results, failure_dice: float) -> pd.DataFrame:
    """Worst first: by Dice, then by how much of the reference is concerned. A Dice of 0 is a failure at any threshold."""
    frame = results.frame
    failed = frame[(frame["dice"] < failure_dice) | (frame["dice"] == 0)]
    kinds = np.select([failed["prediction_ml"] == 0, failed["reference_ml"] == 0], ["missed", "invented"], "low Dice")
    volumes = ["reference_ml", "prediction_ml"]
    ranks = failed["model"].map(results.models.index)
    ordered = failed.assign(kind=kinds, size=-failed[volumes].max(axis=1), rank=ranks).sort_values(["dice", "size", "rank"])
    return ordered.rename(columns={"class": "label"})[["model", "case", "label", "kind", "dice", *volumes]]


def comparable_patches(comparison: Comparison) -> bool:
    """Whether all known costs are of the same patch; otherwise multiply-accumulates should be read per voxel."""
    return len({model.patch_size for model in comparison.models if model.costs is not None}) <= 1


def order_by_dice(comparison: Comparison) -> list[int]:
    """Indices of cases, lowest mean Dice first, over the models that have one; cases in which none has one are left out."""
    means = nan_mean(comparison.results.case_means("dice"), axis=0)
    return [int(i) for i in np.argsort(means, kind="stable") if not math.isnan(means[i])]
