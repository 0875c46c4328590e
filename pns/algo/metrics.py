"""Accuracies with their uncertainty, and how well scores separate and calibrate."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pns.records import Score

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def score(num_correct: float, n: int) -> Score:
    """Accuracy over `n` problems with its 95 % Wilson score interval; `num_correct` may be fractional (means
    over samples). Raises ValueError for an empty sample or a count outside [0, n]."""
    if n <= 0 or not 0 <= num_correct <= n:
        raise ValueError(f"{num_correct} of {n} is not a share")
    return Score(num_correct / n, *_wilson(num_correct / n, n), n)


def _wilson(share: float, n: float) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the limit is exact, where rounding would leave 1e-17.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return low, high


def score_of_shares(shares: Sequence[float], num_samples: int) -> Score:
    """avg@k: the mean over problems of their share of right samples, of `num_samples` each, with a 95 %
    interval; of one sample that of `score`.

    With several, a problem says more than one answer does. The interval is Wilson's of the effective number
    of problems, the one whose binomial variance p (1 - p) / n is that of the mean of the shares, s^2 / n
    (the design effect of Kish, Survey Sampling, 1965, section 8.2), which lies between the number of problems
    and that of samples. Raises ValueError for no share or one outside [0, 1].
    """
    n = len(shares)
    if not n or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{n} shares of right samples: they must be in [0, 1], at least one")
    mean = math.fsum(shares) / n
    effective = effective_problems(shares, num_samples)
    return Score(mean, *_wilson(mean, effective), n)


def effective_problems(shares: Sequence[float], num_samples: int) -> float:
    """As many problems, asked once, tell as much as these, asked `num_samples` times."""
    n = len(shares)
    mean = math.fsum(shares) / n
    if n < 2 or num_samples < 2 or not 0 < mean < 1:
        return n
    variance = math.fsum((share - mean) ** 2 for share in shares) / (n - 1)
    most = n * num_samples
    return max(n, min(most, n * mean * (1 - mean) / variance)) if variance else most


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that the chance of any false finding stays below the level that
    each is held against (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = highest
    return corrected


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (arXiv 2107.03374, equation 1): 1 -
    C(n-c, k) / C(n, k). Raises ValueError unless 1 <= k <= n and 0 <= c <= n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} is not defined")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_score(scores: Sequence[Score]) -> Score:
    """The unweighted mean of independent accuracies; `n` is the sum. Its 95 % interval comes from theirs: the
    squared distances of their limits from their estimates add up (MOVER; Zou and Donner, Statistics in
    Medicine 27, 2008, equation 1 with weights 1/S). Raises ValueError for no score."""
    if not scores:
        raise ValueError("the mean of no scores")
    mean = math.fsum(s.accuracy for s in scores) / len(scores)
    below = math.sqrt(math.fsum((s.accuracy - s.low) ** 2 for s in scores)) / len(scores)
    above = math.sqrt(math.fsum((s.high - s.accuracy) ** 2 for s in scores)) / len(scores)
    return Score(mean, max(0.0, mean - below), min(1.0, mean + above), sum(s.n for s in scores))


@dataclass(frozen=True)
class Difference:
    """after - before in [-1, 1], its 95 % bootstrap interval, and the p-value of the permutation test."""

    difference: float
    low: float
    high: float
    p_value: float

    def verdict(self, p_value: float) -> str:
        """ "better" or "worse" where the interval excludes 0 and `p_value`, its own or one that is corrected,
        is below 0.05, else "not distinguishable". The interval alone says too much on few problems: from four
        problems that all turn right it is [1, 1], and p is 1/8."""
        if p_value >= 0.05 or self.low <= 0 <= self.high:
            return "not distinguishable"
        return "better" if self.difference > 0 else "worse"


def paired_difference(
    before: Sequence[ArrayLike], after: Sequence[ArrayLike], num_resamples: int = 10_000, seed: int = 0
) -> Difference:
    """The difference after - before of the mean over suites of the mean over problems.

    `before` and `after` hold per suite one accuracy in [0, 1] per problem (a mean over samples), of the same
    problems in the same order. Problems are resampled with replacement within their suite (percentile
    interval); the permutation test flips the sign of each problem's difference at random (two-sided). Raises
    ValueError for empty or unequal lengths.
    """
    differences = [_paired(a, b) for a, b in zip(before, after, strict=True)]
    if not differences:
        raise ValueError("paired samples of no suite")
    random = np.random.default_rng(seed)
    resampled, flipped = np.zeros(num_resamples), np.zeros(num_resamples)
    for d in differences:
        for start in range(0, num_resamples, 256):  # bounded memory
            stop = min(start + 256, num_resamples)
            shape = (stop - start, d.size)
            resampled[start:stop] += d[random.integers(0, d.size, shape)].mean(axis=1) / len(differences)
            signs = random.integers(0, 2, shape, dtype=np.int8) * 2 - 1
            flipped[start:stop] += signs @ d / d.size / len(differences)
    observed = float(np.mean([d.mean() for d in differences]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    # As large as observed, up to rounding. What was observed counts as one of the permutations: p is never 0.
    hits = int((np.abs(flipped) >= abs(observed) - 1e-12).sum())
    return Difference(observed, float(low), float(high), (1 + hits) / (1 + num_resamples))


def _paired(before: ArrayLike, after: ArrayLike) -> NDArray[np.float64]:
    before_B, after_B = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before_B.shape != after_B.shape or before_B.ndim != 1 or not before_B.size:
        raise ValueError(f"paired samples have shapes {before_B.shape} and {after_B.shape}")
    return after_B - before_B


def majority(classes: Sequence[int | None], right: Sequence[bool]) -> float:
    """Chance that the most frequent answer of a problem is right, ties broken at random (arXiv 2203.11171).

    `classes` gives the answer of each sample as a number, the same for equal answers (None: no answer, no
    vote); `right` says whether it is correct, the same throughout a class. 0 without any vote.
    """
    votes = Counter(c for c in classes if c is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    right_answers = {answer for answer, is_right in zip(classes, right, strict=True) if is_right}
    return len(right_answers.intersection(tied)) / len(tied)


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive's score is above a negative's, ties counting one half; 0.5: indistinguishable.
    Raises ValueError if either is empty or a score is NaN."""
    high = np.asarray(positive, dtype=np.float64).ravel()
    low = np.sort(np.asarray(negative, dtype=np.float64).ravel())
    if not high.size or not low.size or np.isnan(high).any() or np.isnan(low).any():
        raise ValueError("AUROC needs scores of both classes and no NaN")
    below, up_to = np.searchsorted(low, high, side="left"), np.searchsorted(low, high, side="right")
    return float((below + up_to).sum() / (2 * high.size * low.size))


def rank_correlation(before_B: ArrayLike, after_B: ArrayLike) -> float | None:
    """Spearman's rho in [-1, 1]: the correlation of ranks, tied values at the mean of theirs. None where
    either side has fewer than two different values. Raises ValueError for unequal lengths or NaN."""
    before, after = np.asarray(before_B, dtype=np.float64), np.asarray(after_B, dtype=np.float64)
    if before.shape != after.shape or np.isnan(before).any() or np.isnan(after).any():
        raise ValueError("a rank correlation needs as many values on both sides, and no NaN")
    ranks = [_ranks(values) for values in (before, after)]
    centred = [own - own.mean() for own in ranks if own.size]
    norms = [float(np.sqrt((own**2).sum())) for own in centred]
    return float((centred[0] * centred[1]).sum() / (norms[0] * norms[1])) if norms and all(norms) else None


def _ranks(values_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1 for the lowest; of equal values the mean of their places."""
    _, place_B, counts = np.unique(values_B, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_B]


def expected_calibration_error(
    probabilities_B: ArrayLike, outcomes_B: ArrayLike, num_bins: int = 10
) -> float:
    """Mean over rows of |mean probability - share of positive outcomes| of the row's bin; bins are (0, 0.1],
    (0.1, 0.2], ... with 0 in the first (arXiv 1706.04599, equation 3). Raises ValueError for empty or unequal
    input or probabilities outside [0, 1]."""
    probability = np.asarray(probabilities_B, dtype=np.float64)
    outcome = np.asarray(outcomes_B, dtype=np.float64)
    in_range = ((probability >= 0) & (probability <= 1)).all()
    if probability.shape != outcome.shape or not probability.size or not in_range:
        raise ValueError("calibration needs as many outcomes as probabilities in [0, 1]")
    bins = np.clip(np.ceil(probability * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, probability - outcome, num_bins)
    return float(np.abs(gaps).sum() / probability.size)
