from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pns.algo.metrics import (
    auroc,
    expected_calibration_error,
    paired_bootstrap,
    pass_at_k,
    score,
    wilson_interval,
)
from pns.records import Score


def test_wilson_by_hand() -> None:
    # 5 of 10, z2 = 3.8415: centre 1/2; half = 1.96 / 1.38415 * sqrt(.025 + .0096037) = 1.41600 * .186021 = .263406
    low, high = wilson_interval(5, 10)
    assert (low, high) == (pytest.approx(0.236593, abs=1e-5), pytest.approx(0.763407, abs=1e-5))
    # 0 of 10: high = z2 / (n + z2) = 3.8415 / 13.8415 = .277533
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.277533, abs=1e-5))
    assert wilson_interval(10, 10) == (pytest.approx(0.722467, abs=1e-5), 1.0)
    assert score(5, 10) == Score(0.5, low, high, 10)
    for bad in ((1, 0), (-1, 5), (6, 5), (math.nan, 5)):
        with pytest.raises(ValueError, match="not a share"):
            wilson_interval(*bad)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(n: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(num_correct, n)
    assert 0 <= low <= num_correct / n <= high <= 1


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


def test_paired_bootstrap() -> None:
    before = np.array([0, 0, 1, 1] * 50, dtype=float)
    after = np.array([1, 0, 1, 1] * 50, dtype=float)
    # differences are 1 with share 1/4: mean .25, standard error sqrt(.25 * .75 / 200) = .03062, interval .25 -+ 1.96 * .03062
    mean, low, high = paired_bootstrap(before, after, seed=3)
    assert mean == 0.25
    assert low == pytest.approx(0.19, abs=0.01)
    assert high == pytest.approx(0.31, abs=0.01)
    assert paired_bootstrap(before, after, seed=3) == (mean, low, high)
    assert paired_bootstrap(before, before) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="shapes"):
        paired_bootstrap([], [])


def test_auroc_by_hand() -> None:
    # 3 > 1, 3 > 2, 2 > 1, 2 = 2: 3.5 of 4
    assert auroc([3, 2], [1, 2]) == 0.875
    assert auroc([1, 2], [1, 2]) == 0.5
    assert auroc([0], [1]) == 0.0
    for bad in (([], [1]), ([1], []), ([math.nan], [1])):
        with pytest.raises(ValueError, match="AUROC"):
            auroc(*bad)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_auroc_is_the_share_of_ordered_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_by_hand() -> None:
    # bin (.8, .9]: .9 twice, outcomes 1 and 0: |.9 - .5| = .4 over 2 rows; bin (.1, .2]: .2, outcome 0: .2 over 1 row; 0: no gap
    assert expected_calibration_error([0.9, 0.9, 0.2, 0.0], [1, 0, 0, 0]) == pytest.approx((2 * 0.4 + 0.2 + 0) / 4)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0
    for bad in (([1.2], [1]), ([], []), ([0.5], [1, 0])):
        with pytest.raises(ValueError, match="calibration"):
            expected_calibration_error(*bad)
