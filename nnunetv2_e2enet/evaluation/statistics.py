"""Uncertainty of differences: bootstrap intervals, paired tests; and the performance trade-off score.

The unit is a case. scipy, statsmodels and scikit-posthocs do the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50
MOST_EXACT = 50
"""Decided cases up to which Wilcoxon's p-value is exact, as in scipy without ties."""
FEWEST_CASES = 2
MEAN = "mean"
"""Name of the mean over classes, among the names of classes."""

Array = NDArray[np.float64]


def nan_mean(values: Array, axis: int) -> Array:
    """Mean of the values that are not NaN; NaN without any."""
    defined = ~np.isnan(values)
    n = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap confidence interval; the limits are NaN where there are fewer than two cases."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedTest:
    """Wilcoxon signed-rank test of two models on one class or the mean over classes.

    Attributes:
        scope: class, or ``MEAN``.
        difference: mean of (first model - second model) over the cases, with its bootstrap interval.
        median_difference: of the same.
        wins, ties, losses: cases in which the first value is larger, the same, smaller.
        rank_biserial: the sum of the ranks of wins minus that of losses, over the sum of all; its sign is the direction of the
            test, which the median has not where most cases are ties. 0 where there is nothing to rank.
        p, p_holm: two-sided p-value, and corrected by Holm for all scopes of the metric; NaN where there is nothing to test.
    """

    scope: str
    difference: Interval
    median_difference: float
    wins: int
    ties: int
    losses: int
    rank_biserial: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class RankTest:
    """Friedman test of three or more models, and Nemenyi's test of each pair.

    Attributes:
        scope: class, or ``MEAN``.
        n: cases in which all models have a value.
        mean_ranks: of each model, 1 is best.
        chi2, p, p_holm: Friedman's statistic and p-value, and corrected by Holm for all scopes of the metric.
        critical_difference: mean ranks that lie further apart differ at the 5 % level (Nemenyi).
        p_nemenyi: p-value of each pair of models, a symmetric matrix.
    """

    scope: str
    n: int
    mean_ranks: list[float]
    chi2: float
    p: float
    p_holm: float
    critical_difference: float
    p_nemenyi: list[list[float]]


def scopes(values: Array, classes: Sequence[str]) -> dict[str, Array]:
    """The mean over classes and each class, as arrays (models, cases), from (models, cases, classes)."""
    return {MEAN: nan_mean(values, axis=2), **{name: values[..., i] for i, name in enumerate(classes)}}


def with_absences(values: Array, perfect: float) -> Array:
    """Values for a test, from (models, cases, classes), where a class that a case lacks counts.

    A model that finds such a class has a value. The value of a model that rightly leaves the class out is not defined, and
    becomes the perfect one here. Where no model finds the class, all values stay NaN.
    """
    found = ~np.isnan(values)
    return np.where(~found & found.any(axis=0), perfect, values)


def class_intervals(values: Array, classes: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """Means over cases of each class and, under ``MEAN``, the mean of these means; of one model's (cases, classes).

    The interval of ``MEAN`` comes from drawing whole cases, so classes of one case stay together. Where no case of a class is
    drawn, its mean over all cases stands in, so that each draw is a mean over the same classes.
    """
    overall = nan_mean(values, axis=0)

    def mean_of_classes(drawn: Array) -> Array:
        means = nan_mean(drawn, axis=-2)
        return nan_mean(np.where(np.isnan(means), overall, means), axis=-1)

    intervals = {MEAN: _bootstrap(values, mean_of_classes, seed)}
    for index, name in enumerate(classes):
        intervals[name] = mean_interval(values[:, index], seed)
    return intervals


def mean_interval(values: Array, seed: int = 0) -> Interval:
    """Mean of the values that are defined."""
    defined = values[~np.isnan(values)]
    return _bootstrap(defined[:, None], lambda drawn: drawn.mean(axis=(-2, -1)), seed)


def _bootstrap(values: Array, statistic: Callable[[Array], Array], seed: int) -> Interval:
    """Percentile bootstrap over the first axis. ``statistic`` reduces the last two axes: cases, classes."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    estimate = float(statistic(values))
    if n < FEWEST_CASES or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan, n)
    result = stats.bootstrap(
        (np.arange(n),),
        lambda drawn, axis: statistic(values[np.moveaxis(drawn, axis, -1).astype(int)]),
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    limits = result.confidence_interval
    return Interval(estimate, float(limits.low), float(limits.high), n)


def paired_tests(values: Array, classes: Sequence[str], seed: int = 0) -> list[PairedTest]:
    """Two models, (2, cases, classes): one test for the mean over classes and for each class.

    Cases in which one of the two is not defined are left out. Cases of equal value say nothing about the sign of the
    difference and are left out of the test (Wilcoxon's own way).
    """
    tests = []
    for scope, (first, second) in scopes(values, classes).items():
        difference = first - second
        difference = difference[~np.isnan(difference)]
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        tests.append(
            PairedTest(
                scope,
                mean_interval(difference, seed),
                float(np.median(difference)) if difference.size else math.nan,
                wins,
                difference.size - wins - losses,
                losses,
                _rank_biserial(difference),
                _wilcoxon(difference),
                math.nan,
            )
        )
    return [replace(test, p_holm=p) for test, p in zip(tests, _holm_of_scopes([test.p for test in tests]), strict=True)]


def _wilcoxon(difference: Array) -> float:
    """Two-sided p-value. For few decided cases it is exact, also where some differ by the same amount, unlike scipy's."""
    if difference.size < FEWEST_CASES:
        return math.nan
    decided = difference[difference != 0]
    if decided.size > MOST_EXACT:
        return float(stats.wilcoxon(decided).pvalue)
    ranks = np.rint(2 * stats.rankdata(np.abs(decided))).astype(int)  # twice the ranks: whole numbers, also of ties
    ways = np.ones(1)  # in which the signs give each sum of the ranks of wins
    for rank in ranks:
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    wins = int(ranks[decided > 0].sum())
    return float(min(1.0, 2 * min(ways[: wins + 1].sum(), ways[wins:].sum()) / ways.sum()))


def _rank_biserial(difference: Array) -> float:
    """Matched-pairs rank-biserial correlation (Kerby 2014), from the ranks of Wilcoxon's test."""
    decided = difference[difference != 0]
    ranks = stats.rankdata(np.abs(decided))
    return float((np.sign(decided) * ranks).sum() / ranks.sum()) if decided.size else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method; NaN stays NaN and does not count."""
    from statsmodels.stats.multitest import multipletests

    given = np.asarray(p_values, dtype=float)
    defined = ~np.isnan(given)
    corrected = np.full(given.shape, math.nan)
    if defined.any():
        corrected[defined] = multipletests(given[defined], method="holm")[1]
    return [float(p) for p in corrected]


def tested(p_values: Sequence[float]) -> int:
    """The number of tests on the mean and on each class. A single class is the mean, so that both are one test."""
    return 1 if len(p_values) == 2 else sum(not math.isnan(p) for p in p_values)


def _holm_of_scopes(p_values: Sequence[float]) -> list[float]:
    return holm(p_values) if tested(p_values) > 1 else list(p_values)


def rank_tests(values: Array, classes: Sequence[str], higher_is_better: bool) -> list[RankTest]:
    """Three or more models, (models, cases, classes): one test for the mean over classes and for each class."""
    tests = [_rank_test(scope, array, higher_is_better) for scope, array in scopes(values, classes).items()]
    return [replace(test, p_holm=p) for test, p in zip(tests, _holm_of_scopes([test.p for test in tests]), strict=True)]


def _rank_test(scope: str, values: Array, higher_is_better: bool) -> RankTest:
    import scikit_posthocs

    complete = values[:, ~np.isnan(values).any(axis=0)]
    k, n = complete.shape
    if n < FEWEST_CASES:
        nothing = [[math.nan] * k for _ in range(k)]
        return RankTest(scope, n, [math.nan] * k, math.nan, math.nan, math.nan, math.nan, nothing)
    ranks = stats.rankdata(-complete if higher_is_better else complete, axis=0)
    if np.ptp(complete, axis=0).any():
        chi2, p = (float(x) for x in stats.friedmanchisquare(*complete))
    else:  # all models are equal in all cases: Friedman's statistic is 0 / 0
        chi2, p = 0.0, 1.0
    nemenyi = scikit_posthocs.posthoc_nemenyi_friedman(ranks.T).to_numpy()
    mean_ranks = [float(r) for r in ranks.mean(axis=1)]
    return RankTest(scope, n, mean_ranks, chi2, p, math.nan, critical_difference(k, n), nemenyi.tolist())


def critical_difference(models: int, cases: int) -> float:
    """Nemenyi's, at the 5 % level (Demšar 2006): ``q sqrt(k (k + 1) / (6 N))``, q of the studentised range over root 2."""
    return _studentized_range(models) / math.sqrt(2) * math.sqrt(models * (models + 1) / (6 * cases))


@lru_cache
def _studentized_range(models: int) -> float:
    """Its quantile at the 5 % level, an integral solved for its bound: the same for every metric and class."""
    return float(stats.studentized_range.ppf(1 - ALPHA, models, np.inf))


def trade_off_scores(dice: pd.Series, parameters: pd.Series, macs: pd.Series, a1: float = 1.0, a2: float = 1.0) -> pd.Series:
    """The paper's performance trade-off score of each model, over all the models given.

    ``a1 mDice / max(mDice) + a2 (min(Params) / Params + min(FLOPs) / FLOPs)``. Multiply-accumulates may stand for FLOPs:
    a constant factor cancels out. NaN where no model has a Dice above 0.
    """
    best = dice.max()
    relative = dice / (best if best > 0 else math.nan)
    return a1 * relative + a2 * (parameters.min() / parameters + macs.min() / macs)
