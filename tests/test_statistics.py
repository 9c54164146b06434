"""Statistics against scipy, scikit-posthocs, published tables, and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scikit_posthocs
from scipy import stats

from nnunetv2_e2enet.evaluation.statistics import (
    MEAN,
    class_intervals,
    critical_difference,
    holm,
    mean_interval,
    paired_tests,
    rank_tests,
    trade_off_scores,
)

CLASSES = ["a", "b"]


def random_values(models: int, cases: int = 30) -> np.ndarray:
    random = np.random.default_rng(models)
    return np.clip(0.8 + random.normal(0, 0.05, (models, cases, 2)) + np.arange(models)[:, None, None] * 0.02, 0, 1)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.04 with factors 3, 2, 1; never smaller than the one before
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1])
    corrected = holm([0.01, math.nan, 0.02])
    assert corrected[::2] == pytest.approx([0.02, 0.02])
    assert math.isnan(corrected[1])


def test_wilcoxon_of_two_models() -> None:
    values = random_values(2)
    values[0, :3, 1] = math.nan
    mean, a, b = paired_tests(values, CLASSES)
    assert (mean.scope, a.scope, b.scope) == (MEAN, "a", "b")
    assert a.p == pytest.approx(stats.wilcoxon(values[0, :, 0], values[1, :, 0]).pvalue)
    assert b.p == pytest.approx(stats.wilcoxon(values[0, 3:, 1], values[1, 3:, 1]).pvalue)
    assert b.wins + b.ties + b.losses == b.difference.n == 27
    assert a.difference.mean == pytest.approx((values[0, :, 0] - values[1, :, 0]).mean())
    assert mean.p == pytest.approx(stats.wilcoxon(np.nanmean(values[0], 1), np.nanmean(values[1], 1)).pvalue)
    assert [mean.p_holm, a.p_holm, b.p_holm] == pytest.approx(holm([mean.p, a.p, b.p]))


def test_wilcoxon_by_hand() -> None:
    # six cases, the first model is always better: of 2^6 signs one is as extreme on each side
    values = np.zeros((2, 6, 1))
    values[0, :, 0] = [0.91, 0.82, 0.73, 0.64, 0.55, 0.46]
    values[1, :, 0] = [0.90, 0.80, 0.70, 0.60, 0.50, 0.40]
    test = paired_tests(values, ["a"])[1]
    assert test.p == pytest.approx(2 / 64)
    assert (test.wins, test.ties, test.losses) == (6, 0, 0)


def test_most_cases_are_ties() -> None:
    """The median of the differences is zero then, and the ranks of the others decide."""
    values = np.full((2, 24, 1), 0.9)
    values[0, :11, 0] += np.linspace(0.01, 0.05, 11)
    test = paired_tests(values, ["a"])[1]
    assert (test.wins, test.ties, test.losses, test.median_difference) == (11, 13, 0, 0)
    assert test.p < 0.01
    assert test.rank_biserial == 1
    assert paired_tests(values[::-1], ["a"])[1].rank_biserial == -1
    values[1, 0, 0] += 0.5  # the largest of eleven ranks: 11 of 66 against, 55 for the first model
    assert paired_tests(values, ["a"])[1].rank_biserial == pytest.approx((55 - 11) / 66)


def test_few_decided_cases_have_their_exact_p_value() -> None:
    """All signs of six cases that are better by the same millimetre, beside many ties: two of 2^6 are as extreme."""
    values = np.full((2, 26, 1), 5.0)
    values[0, :6, 0] -= 1
    assert paired_tests(values, ["a"])[1].p == pytest.approx(2 / 64)
    values[0, :6, 0] = [4, 4, 4, 4, 4, 6]  # ranks are all 3.5: one of six against, or none, on either side
    assert paired_tests(values, ["a"])[1].p == pytest.approx(2 * (1 + 6) / 64)


@pytest.mark.parametrize("cases", [5, 13, 14, 30])
def test_p_values_without_ties_are_those_of_scipy(cases: int) -> None:
    values = random_values(2, cases)
    assert paired_tests(values, CLASSES)[1].p == pytest.approx(stats.wilcoxon(values[0, :, 0], values[1, :, 0]).pvalue)


def test_a_single_class_is_the_mean_and_one_test() -> None:
    pair, three = random_values(2, 6)[..., :1], random_values(3, 6)[..., :1]
    for tests in (paired_tests(pair, ["a"]), rank_tests(three, ["a"], True)):
        assert [test.p_holm for test in tests] == [test.p for test in tests]


def test_a_class_of_few_cases_does_not_leave_the_mean_in_the_interval() -> None:
    """Draws without the only case of class b would have the mean of class a alone, 0.9."""
    values = np.full((40, 2), [0.9, math.nan])
    values[:3, 1] = [0.3, 0.4, 0.5]
    interval = class_intervals(values, CLASSES)[MEAN]
    assert interval.mean == pytest.approx(0.65)
    assert 0.6 - 1e-9 <= interval.low < 0.65 < interval.high <= 0.7 + 1e-9


def test_models_that_are_the_same_do_not_differ() -> None:
    same = np.repeat(random_values(1), 2, axis=0)
    assert all(test.p == test.p_holm == 1 and test.ties == 30 for test in paired_tests(same, CLASSES))
    ranked = rank_tests(np.repeat(same[:1], 3, axis=0), CLASSES, higher_is_better=True)
    assert all(test.p == 1 and test.mean_ranks == [2, 2, 2] for test in ranked)


def test_too_few_cases_give_no_p_value() -> None:
    one = random_values(2, cases=1)
    assert all(math.isnan(test.p) and math.isnan(test.p_holm) for test in paired_tests(one, CLASSES))
    assert all(math.isnan(test.p) for test in rank_tests(random_values(3, cases=1), CLASSES, True))
    interval = mean_interval(np.array([0.5]))
    assert (interval.mean, interval.n) == (0.5, 1)
    assert math.isnan(interval.low)
    assert math.isnan(mean_interval(np.array([math.nan])).mean)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_friedman_and_nemenyi(higher_is_better: bool) -> None:
    values = random_values(4)
    values[2, 5, 0] = math.nan
    test = rank_tests(values, CLASSES, higher_is_better)[1]
    complete = np.delete(values[:, :, 0], 5, axis=1)
    expected = stats.friedmanchisquare(*complete)
    assert (test.chi2, test.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert test.n == 29
    assert np.array(test.p_nemenyi) == pytest.approx(scikit_posthocs.posthoc_nemenyi_friedman(complete.T).to_numpy())
    best = int(np.argmax(complete.mean(axis=1)))
    assert (np.argmin(test.mean_ranks) == best) == higher_is_better
    assert sum(test.mean_ranks) == pytest.approx(10)


def test_critical_differences_of_the_literature() -> None:
    # Demšar (2006), table 5a: q at 5 %, and the example of 4 classifiers on 14 data sets
    for models, q in ((2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)):
        assert critical_difference(models, 1) == pytest.approx(q * math.sqrt(models * (models + 1) / 6), abs=2e-3 * models)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.01)


def test_a_pair_differs_by_nemenyi_just_when_its_ranks_are_further_apart_than_the_critical_difference() -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=(4, 12, 1)) + np.arange(4)[:, None, None] * 0.4
        test = rank_tests(values, ["a"], True)[1]
        for i in range(4):
            for j in range(i):
                apart = abs(test.mean_ranks[i] - test.mean_ranks[j]) > test.critical_difference
                assert apart == (test.p_nemenyi[i][j] < 0.05)


def test_bootstrap_intervals() -> None:
    numbers = np.random.default_rng(0).normal(0.8, 0.1, 400)
    interval = mean_interval(numbers)
    standard_error = numbers.std() / 20
    assert interval.mean == pytest.approx(numbers.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (numbers.mean() - 1.96 * standard_error, numbers.mean() + 1.96 * standard_error), abs=0.2 * standard_error
    )
    assert interval == mean_interval(numbers)
    assert interval != mean_interval(numbers, seed=1)
    constant = mean_interval(np.full(10, 0.5))
    assert (constant.low, constant.high) == (0.5, 0.5)


def test_the_mean_over_classes_is_the_mean_of_class_means_as_in_nnunet() -> None:
    values = np.array([[0.2, math.nan], [0.4, math.nan], [0.6, 0.9], [0.8, math.nan]])
    intervals = class_intervals(values, CLASSES)
    assert intervals["a"].mean == pytest.approx(0.5)
    assert (intervals["b"].mean, intervals["b"].n) == (0.9, 1)
    assert intervals[MEAN].mean == pytest.approx(0.7)
    assert intervals[MEAN].low < 0.7 < intervals[MEAN].high


def test_trade_off_score_by_hand() -> None:
    dice, parameters, macs = (pd.Series(values, ["x", "y"]) for values in ([0.9, 0.45], [30.0, 10.0], [400.0, 100.0]))
    assert trade_off_scores(dice, parameters, macs).to_dict() == pytest.approx({"x": 1 + 1 / 3 + 1 / 4, "y": 0.5 + 1 + 1})
    assert trade_off_scores(dice, parameters, macs, a1=2, a2=0).to_dict() == pytest.approx({"x": 2, "y": 1})
