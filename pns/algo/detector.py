"""How well a detector that is trained afresh tells right completions from negatives of the same problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pns.algo.metrics import auroc

Tokens = Sequence[int]
Floats = NDArray[np.float64]

_STRIDE = 2**32  # above every token id
MAX_PROBLEMS, MAX_PER_SIDE = 1000, 4  # what is looked at; a million tokens take some five seconds
_NUM_STEPS = 300  # of gradient descent
L2 = 1e-4


@dataclass(frozen=True)
class Detected:
    """`auroc` in [0, 1] with its 95 % bootstrap interval over `num_problems`: the chance that the detector
    gives a right completion a higher score than a negative of the same problem, ties counting one half; 0.5:
    indistinguishable."""

    auroc: float
    low: float
    high: float
    num_problems: int


@dataclass(frozen=True)
class _Rows:
    """Completions as sparse unit vectors: `values` at (`rows`, `columns`) of (num_rows, num_columns)."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: Floats
    num_rows: int
    num_columns: int

    def times(self, weights: Floats) -> Floats:
        products = self.values * weights[self.columns]
        return np.bincount(self.rows, products, self.num_rows).astype(np.float64)

    def transposed_times(self, weights_B: Floats) -> Floats:
        products = self.values * weights_B[self.rows]
        return np.bincount(self.columns, products, self.num_columns).astype(np.float64)


def detect(
    right: Mapping[str, Sequence[Tokens]],
    negatives: Mapping[str, Sequence[Tokens]],
    seed: int = 0,
    num_resamples: int = 2000,
) -> Detected | None:
    """Cross-fitted AUROC of logistic regression on which tokens and pairs of neighbouring tokens a completion
    has; both sides are token ids by problem id.

    Only problems with both sides count, and each counts once: another mix of problems gives nothing away. At
    most `MAX_PROBLEMS` of them are drawn, with the first `MAX_PER_SIDE` completions of either side. They are
    halved at random; a detector trained on either half is asked about the other, so that no problem is in
    both. The interval is of the problems that are asked, not of the training. None for fewer than two
    problems.
    """
    both_sided = sorted(name for name in right if right[name] and negatives.get(name))
    if len(both_sided) < 2:
        return None
    random = np.random.default_rng(seed)
    problems = [both_sided[p] for p in random.permutation(len(both_sided))[:MAX_PROBLEMS]]
    halves = np.arange(0, len(problems), 2), np.arange(1, len(problems), 2)
    sides = [(right[name][:MAX_PER_SIDE], negatives[name][:MAX_PER_SIDE]) for name in problems]
    completions = [tokens for both in sides for side in both for tokens in side]
    problem_B = np.concatenate([np.full(len(a) + len(b), p) for p, (a, b) in enumerate(sides)])
    is_right_B = np.concatenate([[True] * len(a) + [False] * len(b) for a, b in sides])
    weight_B = np.concatenate([[1 / len(side)] * len(side) for both in sides for side in both])
    ngrams = ngram_rows(completions)
    auroc_P = np.zeros(len(problems))
    for trained_on, asked in (halves, halves[::-1]):
        weights = fit(ngrams, is_right_B, weight_B * np.isin(problem_B, trained_on))
        score_B = ngrams.times(weights)
        for p in asked:
            own = problem_B == p
            auroc_P[p] = auroc(score_B[own & is_right_B], score_B[own & ~is_right_B])
    # As many as one half asks: where nothing tells the sides apart, what is chance in the one half is the
    # same chance in the other, and intervals of all problems leave out 0.5 three times as often as they say.
    resampled = random.integers(0, len(problems), (num_resamples, len(problems) // 2))
    low, high = np.quantile(auroc_P[resampled].mean(axis=1), [0.025, 0.975])
    return Detected(float(auroc_P.mean()), float(low), float(high), len(problems))


def ngram_rows(completions: Sequence[Tokens]) -> _Rows:
    """One row a completion: which tokens and which pairs of neighbours it has, scaled to length 1. A token is
    itself, a pair (a, b) is b + (a + 2) * _STRIDE, the first token's b + _STRIDE."""
    ngrams = []
    for tokens in completions:
        token_T = np.asarray(tokens, dtype=np.int64)
        before_T = np.roll(token_T, 1)
        before_T[:1] = -1  # of the first
        ngrams.append(np.unique(np.concatenate([token_T, token_T + (before_T + 2) * _STRIDE])))
    sizes = np.array([len(own) for own in ngrams])
    seen, columns = np.unique(np.concatenate(ngrams), return_inverse=True)
    return _Rows(
        rows=np.repeat(np.arange(len(sizes)), sizes),
        columns=columns,
        values=np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes),
        num_rows=len(sizes),
        num_columns=len(seen),
    )


def fit(ngrams: _Rows, is_right_B: NDArray[np.bool_], weight_B: Floats) -> Floats:
    """Weights of logistic regression with a small L2 penalty, by gradient descent from 0 with Nesterov's
    momentum; without a bias, as the sides weigh the same. Rows of weight 0 take no part."""
    sign_B = np.where(is_right_B, 1.0, -1.0)
    share_B = weight_B / weight_B.sum()
    weights = ahead = np.zeros(ngrams.num_columns)
    rate = 1 / (0.25 + L2)  # of rows of length 1 the curvature is at most that
    for step in range(_NUM_STEPS):
        margin_B = sign_B * ngrams.times(ahead)
        slope_B = -sign_B * share_B / (1 + np.exp(np.minimum(margin_B, 500.0)))  # exp(710) overflows
        gradient = ngrams.transposed_times(slope_B) + L2 * ahead
        before, weights = weights, ahead - rate * gradient
        ahead = weights + step / (step + 3) * (weights - before)
    return weights
