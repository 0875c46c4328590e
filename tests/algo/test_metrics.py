from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pns.algo.metrics import (
    auroc,
    effective_problems,
    expected_calibration_error,
    holm,
    majority,
    mean_score,
    paired_difference,
    pass_at_k,
    rank_correlation,
    score,
    score_of_shares,
)
from pns.records import Score


def test_wilson_by_hand() -> None:
    # 5 of 10, z2 = 3.8415: centre 1/2; half = 1.96 / 1.38415 * sqrt(.025 + .0096037) = 1.41600 * .186021 =
    # .263406
    assert vars(score(5, 10)) == pytest.approx(
        {"accuracy": 0.5, "low": 0.236593, "high": 0.763407, "n": 10}, abs=1e-5
    )
    # 0 of 10: high = z2 / (n + z2) = 3.8415 / 13.8415 = .277533
    assert score(0, 10) == Score(0.0, 0.0, pytest.approx(0.277533, abs=1e-5), 10)
    assert score(10, 10) == Score(1.0, pytest.approx(0.722467, abs=1e-5), 1.0, 10)
    for bad in ((1, 0), (-1, 5), (6, 5), (math.nan, 5)):
        with pytest.raises(ValueError, match="not a share"):
            score(*bad)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(n: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, n))
    figures = score(num_correct, n)
    assert 0 <= figures.low <= num_correct / n <= figures.high <= 1


def test_pass_at_k_by_enumeration() -> None:
    # 5 samples, 2 correct, k = 2: 1 - C(3,2) / C(5,2) = 1 - 3/10
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws))
    for bad in ((5, 2, 0), (5, 2, 6), (5, 6, 1)):
        with pytest.raises(ValueError, match="not defined"):
            pass_at_k(*bad)


def test_paired_difference() -> None:
    before = np.array([0, 0, 1, 1] * 50, dtype=float)
    after = np.array([1, 0, 1, 1] * 50, dtype=float)
    # differences are 1 with share 1/4: mean .25, standard error sqrt(.25 * .75 / 200) = .03062, interval .25
    # -+ 1.96 * .03062
    found = paired_difference([before], [after], seed=3)
    assert found.difference == 0.25
    assert found.low == pytest.approx(0.19, abs=0.01)
    assert found.high == pytest.approx(0.31, abs=0.01)
    assert found.p_value == 1 / 10_001  # 50 heads in a row: 2 ** -49
    assert found.verdict(found.p_value) == "better"
    worse = paired_difference([after], [before], seed=3)
    assert worse.verdict(worse.p_value) == "worse"
    assert worse.verdict(0.05) == "not distinguishable"  # corrected for other tests
    assert paired_difference([before], [after], seed=3) == found
    same = paired_difference([before], [before])
    assert (same.difference, same.low, same.high, same.p_value, same.verdict(1.0)) == (
        0.0,
        0.0,
        0.0,
        1.0,
        "not distinguishable",
    )
    for bad in (([[1.0]], [[1.0, 0.0]]), ([[]], [[]]), ([], [])):
        with pytest.raises(ValueError, match="paired samples"):
            paired_difference(*bad)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # 3 x .01; 2 x .03; no less than that
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_several_samples_count_as_more_problems() -> None:
    assert score_of_shares([1.0, 0.0, 1.0], 1) == score(2, 3)
    same = [0.5] * 10  # every problem half right: as many coins as samples
    assert effective_problems(same, 8) == 80
    assert score_of_shares(same, 8).low == score(40, 80).low
    sure = [1.0, 0.0] * 50  # no problem is ever in doubt: samples tell nothing
    assert effective_problems(sure, 8) == 100
    shares = [0.25, 0.75] * 50
    assert effective_problems(shares, 16) == pytest.approx(0.25 / 0.0625 * 99)
    assert effective_problems([0.0] * 9, 4) == 9
    with pytest.raises(ValueError, match="0 shares"):
        score_of_shares([], 4)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (2.0, 2.0)])
def test_intervals_of_several_samples_cover(alpha: float, beta: float) -> None:
    """In tests/bench/interval_coverage.py for more populations."""
    random = np.random.default_rng(0)
    hits, narrower = 0, []
    for _ in range(400):
        shares = random.binomial(16, random.beta(alpha, beta, 100)) / 16
        found = score_of_shares(shares.tolist(), 16)
        hits += found.low <= alpha / (alpha + beta) <= found.high
        wilson = score(math.fsum(shares), 100)
        narrower.append((wilson.high - wilson.low) / (found.high - found.low))
    assert 0.92 <= hits / 400 <= 0.98
    assert np.mean(narrower) > 1.2


def test_few_problems_tell_nothing() -> None:
    """Four problems that all turn right: the bootstrap interval is [1, 1], by chance alone it happens once in
    2 ** 3 (either way)."""
    found = paired_difference([[0.0] * 4], [[1.0] * 4])
    assert (found.low, found.high) == (1.0, 1.0)
    assert found.p_value == pytest.approx(1 / 8, abs=0.02)
    assert found.verdict(found.p_value) == "not distinguishable"


def test_permutation_p_value_by_enumeration() -> None:
    differences = np.array([0.5, 0.25, -0.25, 1.0, 0.75])
    signs = np.array(list(itertools.product([1, -1], repeat=5)))
    exact = float((np.abs(signs @ differences) >= differences.sum() - 1e-9).mean())
    assert paired_difference([np.zeros(5)], [differences]).p_value == pytest.approx(exact, abs=0.02)


def test_the_mean_difference_weighs_suites_not_problems() -> None:
    found = paired_difference([np.zeros(400), np.zeros(4)], [np.zeros(400), np.ones(4)])
    assert found.difference == 0.5
    with pytest.raises(ValueError, match="zip"):
        paired_difference([np.zeros(4)], [np.zeros(4), np.zeros(4)])


def test_mean_of_scores() -> None:
    one, other = score(5, 10), score(30, 40)
    assert mean_score([one]) == one
    found = mean_score([one, other])
    assert (found.accuracy, found.n) == (0.625, 50)
    # squared distances to the lower limits add up, halved for the mean of two
    assert found.low == pytest.approx(0.625 - math.hypot(0.5 - one.low, 0.75 - other.low) / 2)
    assert found.high == pytest.approx(0.625 + math.hypot(one.high - 0.5, other.high - 0.75) / 2)
    with pytest.raises(ValueError, match="no scores"):
        mean_score([])


def test_the_mean_interval_covers() -> None:
    """2,000 draws of three suites of different size and difficulty: about 95 % of the intervals hold the true
    mean."""
    random, suites = np.random.default_rng(0), ((0.9, 100), (0.5, 40), (0.1, 30))
    held = 0
    for _ in range(2000):
        found = mean_score([score(int(random.binomial(n, p)), n) for p, n in suites])
        held += found.low <= 0.5 <= found.high
    assert 0.93 <= held / 2000 <= 0.98


def test_majority_by_hand() -> None:
    assert majority([0, 1, 1, 2], [False, True, True, False]) == 1.0
    assert majority([0, 0, 1, 2], [False, False, True, False]) == 0.0
    assert majority([0, 0, 1, 1], [False, False, True, True]) == 0.5  # a tie is broken at random
    assert majority([0, 1, 2], [True, False, False]) == pytest.approx(1 / 3)
    assert majority([None, None, 1], [False, False, True]) == 1.0  # no answer, no vote
    assert majority([None, None], [False, False]) == 0.0


def test_auroc_by_hand() -> None:
    # 3 > 1, 3 > 2, 2 > 1, 2 = 2: 3.5 of 4
    assert auroc([3, 2], [1, 2]) == 0.875
    assert auroc([1, 2], [1, 2]) == 0.5
    assert auroc([0], [1]) == 0.0
    for bad in (([], [1]), ([1], []), ([math.nan], [1])):
        with pytest.raises(ValueError, match="AUROC"):
            auroc(*bad)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8), st.lists(st.integers(0, 4), min_size=1, max_size=8)
)
def test_auroc_is_the_share_of_ordered_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_by_hand() -> None:
    # bin (.8, .9]: .9 twice, outcomes 1 and 0: |.9 - .5| = .4 over 2 rows; bin (.1, .2]: .2, outcome 0: .2
    # over 1 row; 0: no gap
    assert expected_calibration_error([0.9, 0.9, 0.2, 0.0], [1, 0, 0, 0]) == pytest.approx(
        (2 * 0.4 + 0.2 + 0) / 4
    )
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0
    for bad in (([1.2], [1]), ([], []), ([0.5], [1, 0])):
        with pytest.raises(ValueError, match="calibration"):
            expected_calibration_error(*bad)


def test_rank_correlation_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)."""
    assert rank_correlation([1, 2, 2, 3], [10, 30, 20, 40]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert rank_correlation([1, 2, 3], [0.1, 0.2, 7.0]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [9, 8, 7]) == pytest.approx(-1.0)


@pytest.mark.parametrize("sides", [([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])])
def test_ranks_that_do_not_differ_have_no_correlation(sides: tuple[list[float], list[float]]) -> None:
    assert rank_correlation(*sides) is None


@pytest.mark.parametrize("sides", [([1], [1, 2]), ([1, math.nan], [1, 2])])
def test_ranks_of_what_cannot_be_ranked_are_refused(sides: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="rank correlation"):
        rank_correlation(*sides)
