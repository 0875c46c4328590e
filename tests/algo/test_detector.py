"""A detector trained afresh: a fixed cue is found, chance is not, and no problem is trained on and asked about."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pns.algo.detector import L2, MAX_PER_SIDE, MAX_PROBLEMS, Detected, Tokens, detect, fit, ngram_rows

Side = dict[str, list[Tokens]]
CUE = 99


def drawn(num_problems: int, seed: int, cue: bool = False) -> tuple[Side, Side]:
    """Both sides of each problem from the problem's own words; `cue`: negatives have one token more."""
    random = np.random.default_rng(seed)
    right: Side = {}
    negatives: Side = {}
    for number in range(num_problems):
        words = random.integers(0, 20, 5)
        for side, end in ((right, []), (negatives, [CUE] if cue else [])):
            side[f"p{number}"] = [
                [*map(int, random.choice(words, 12)), *end] for _ in range(random.integers(1, 4))
            ]
    return right, negatives


def test_a_fixed_cue_is_found() -> None:
    detected = detect(*drawn(20, seed=0, cue=True))
    assert detected is not None
    assert detected.auroc > 0.99
    assert detected.num_problems == 20


def test_the_order_of_tokens_is_a_cue_too() -> None:
    random = np.random.default_rng(0)
    right: Side = {}
    negatives: Side = {}
    for number in range(20):
        noise = [int(token) for token in random.integers(10, 20, 6)]
        right[f"p{number}"], negatives[f"p{number}"] = [[1, 2, *noise]], [[2, 1, *noise]]
    detected = detect(right, negatives)
    assert detected is not None
    assert detected.auroc > 0.99


def test_of_identical_distributions_the_interval_has_one_half() -> None:
    inside = []
    for seed in range(20):
        detected = detect(*drawn(40, seed), seed, num_resamples=500)
        assert detected is not None
        inside.append(detected.low <= 0.5 <= detected.high)
    assert sum(inside) >= 17  # 95 % of 20, but for one in 40 such tests


def test_another_mix_of_problems_gives_nothing_away() -> None:
    """Every problem has its own word, and its sides are the same; one side alone is not looked at."""
    right: Side = {f"p{number}": [[number]] * (1 + number % 3) for number in range(10)}
    negatives: Side = {f"p{number}": [[number]] * (1 + number % 2) for number in range(10)}
    right["alone"], negatives["empty"], right["empty"] = [[7]], [], [[8]]
    assert detect(right, negatives) == Detected(0.5, 0.5, 0.5, 10)


def test_no_problem_is_trained_on_and_asked_about() -> None:
    """Words of one problem alone tell its sides apart: a detector that has seen the problem knows them all."""
    right: Side = {f"p{number}": [[2 * number]] * 3 for number in range(10)}
    negatives: Side = {f"p{number}": [[2 * number + 1]] * 3 for number in range(10)}
    assert detect(right, negatives) == Detected(0.5, 0.5, 0.5, 10)
    rows = ngram_rows([tokens for side in (right, negatives) for own in side.values() for tokens in own])
    is_right_B = np.arange(60) < 30
    seen = rows.times(fit(rows, is_right_B, np.ones(60)))
    assert seen[is_right_B].min() > seen[~is_right_B].max()


def test_the_same_seed_gives_the_same_and_few_problems_nothing() -> None:
    sides = drawn(10, seed=1)
    assert detect(*sides, seed=4) == detect(*sides, seed=4) != detect(*sides, seed=5)
    assert detect({"p": [[1]]}, {"p": [[2]]}) is None
    assert detect({}, {}) is None


def test_of_many_problems_and_completions_some_are_drawn() -> None:
    right: Side = {f"p{number}": [[1]] for number in range(MAX_PROBLEMS + 5)}
    cue: Side = {name: [[2]] * MAX_PER_SIDE + [[1]] * 50 for name in right}  # the last are not looked at
    assert detect(right, cue) == Detected(1.0, 1.0, 1.0, MAX_PROBLEMS)


def test_rows_are_tokens_and_neighbours_of_length_one() -> None:
    rows = ngram_rows([[5, 6, 5, 6], [6]])
    # 5, 6, (start, 5), (5, 6), (6, 5); and 6, (start, 6), which the first has not
    assert np.bincount(rows.rows).tolist() == [5, 2]
    assert rows.num_columns == 6
    assert rows.times(np.ones(6)) == pytest.approx([math.sqrt(5), math.sqrt(2)])
    assert rows.transposed_times(np.array([0.0, 1.0])).sum() == pytest.approx(math.sqrt(2))


def test_the_fit_is_where_the_gradient_is_zero() -> None:
    """Two rows without a common column, each of two columns of weight w / -w and margin m = sqrt(2) w: of the mean
    of log(1 + exp(-m)) and L2 / 2 |weights|^2 the slope is 0 where 1 / (1 + exp(m)) = 2 L2 m."""
    weights = fit(ngram_rows([[1], [2]]), np.array([True, False]), np.ones(2))
    # The tokens 1 and 2 come before the pairs (start, 1) and (start, 2).
    assert weights == pytest.approx(weights[0] * np.array([1, -1, 1, -1]))
    margin = math.sqrt(2) * weights[0]
    assert 1 / (1 + math.exp(margin)) == pytest.approx(2 * L2 * margin, rel=0.05)
