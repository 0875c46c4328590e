"""Runs together: intervals of a known variance, and the p-value against published tables."""

from __future__ import annotations

import numpy as np
import pytest

from pns.algo.across import SuiteRuns, resample, t_test
from pns.algo.metrics import Difference, mean_score, paired_difference, score, score_of_shares


def verdict(difference: Difference) -> str:
    return difference.verdict(difference.p_value)


def suite(*runs: list[list[float]], same: bool = False) -> SuiteRuns:
    """Runs of models of problems."""
    return SuiteRuns(np.array(runs), same, 1)


def test_t_test_has_the_tables_quantiles() -> None:
    for freedom, quantile in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042}.items():
        # Values of mean m and deviation 1 have t = m sqrt(n).
        spread = np.resize([1.0, -1.0], freedom + 1)
        spread -= spread.mean()
        spread /= spread.std(ddof=1)
        assert t_test(spread + quantile / np.sqrt(freedom + 1)) == pytest.approx(0.05, abs=1e-4), freedom
    assert t_test(np.zeros(5)) == 1.0
    assert t_test(np.full(5, 0.1)) == 0.0


def test_intervals_have_the_known_variance() -> None:
    """Four runs of 50 problems, of which a share is right. Resampled runs alone: the variance of their means,
    over 4; problems of their own: p (1 - p) / 50 over 4 on top; the same ones in all runs: that of a
    problem's mean over the runs, over 50."""
    rates = (0.2, 0.4, 0.6, 0.8)
    means = [[[1.0] * round(50 * rate) + [0.0] * round(50 * (1 - rate))] for rate in rates]
    between = np.var(rates) / 4
    constant = [[[rate] * 50] for rate in rates]
    within = np.mean([rate * (1 - rate) for rate in rates]) / 50 / 4
    cases = {"constant": (constant, False, between), "nested": (means, False, between + within)}
    by_problem = np.array(means)[:, 0].mean(axis=0)
    cases["crossed"] = (means, True, between + by_problem.var() / 50)
    for name, (runs, same, variance) in cases.items():
        found, mean = resample({"s": suite(*runs, same=same)}, 40_000)
        assert found["s"].accuracy(0).accuracy == pytest.approx(0.5)
        slack = 0.05 if name == "crossed" else 0.03  # crossed draws have a product term, a fourth of within
        assert found["s"].resampled_NM.var() == pytest.approx(variance, rel=slack), name
        assert np.array_equal(mean.resampled_NM, found["s"].resampled_NM)
    low, high = found["s"].accuracy(0).low, found["s"].accuracy(0).high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.05)


def test_suites_weigh_the_same_and_differences_are_paired() -> None:
    """The second model is 0.25 better on a suite of four, and as good on one of two, in every run."""
    small = [[[0.5, 0.0, 1.0, 0.0], [0.75, 0.25, 1.0, 0.5]]] * 3
    found, mean = resample({"a": suite(*small), "b": suite(*[[[1.0, 0.0], [1.0, 0.0]]] * 3)})
    assert found["b"].difference(0, 1) == resample({"b": suite(*[[[1.0, 0.0]] * 2] * 3)})[1].difference(0, 1)
    assert verdict(found["b"].difference(0, 1)) == "not distinguishable"
    assert mean.difference(0, 1).difference == pytest.approx(0.125)
    assert mean.difference(1, 0).difference == pytest.approx(-0.125)
    assert mean.accuracy(1).n == 6
    assert verdict(mean.difference(0, 1)) == "better"
    assert verdict(mean.difference(1, 0)) == "worse"


def test_few_runs_do_not_say_too_much() -> None:
    """Three runs whose differences are 1, 2 and 6 hundredths: none of the resampled runs' means is below 0,
    but three such numbers happen by chance."""
    runs = [[[0.5] * 100, [0.5 + gain] * 100] for gain in (0.01, 0.02, 0.06)]
    difference = resample({"s": suite(*runs)})[1].difference(0, 1)
    assert difference.low > 0
    assert difference.p_value == pytest.approx(0.18, abs=0.01)
    assert verdict(difference) == "not distinguishable"


def test_identical_runs_and_a_single_one() -> None:
    shares = [[1.0, 0.0, 1.0, 1.0, 0.5], [1.0, 0.5, 1.0, 0.0, 0.5]]
    one, one_mean = resample({"s": suite(shares), "t": suite(shares)})
    expected = [score(sum(own), 5) for own in shares]
    assert [one["s"].accuracy(model) for model in (0, 1)] == expected
    assert one_mean.accuracy(0) == mean_score([expected[0]] * 2)
    assert one["s"].difference(0, 1) == paired_difference([shares[0]], [shares[1]])
    sampled = SuiteRuns(np.array([shares]), False, num_samples=4)
    mine = resample({"s": sampled})[0]["s"].accuracy(0)
    assert mine == score_of_shares(shares[0], 4)  # the interval that `pns evaluate` gives
    assert mine.high - mine.low < expected[0].high - expected[0].low
    assert one_mean.difference(0, 1) == paired_difference([shares[0]] * 2, [shares[1]] * 2)
    # The same problems in four runs that came out alike: chance of the problems is all there is.
    same, _ = resample({"s": suite(*[shares] * 4, same=True)}, 40_000)
    assert same["s"].resampled_NM[:, 0].var() == pytest.approx(np.var(shares[0]) / 5, rel=0.03)
    nothing = same["s"].difference(0, 0)
    assert (nothing.low, nothing.high, nothing.p_value) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "suites", [{}, {"s": suite([[]])}, {"s": suite([[1.0]]), "t": suite([[1.0]], [[0.0]])}]
)
def test_what_cannot_be_resampled_is_refused(suites: dict[str, SuiteRuns]) -> None:
    with pytest.raises(ValueError, match="suite"):
        resample(suites)
