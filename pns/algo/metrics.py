"""Accuracies with their uncertainty, and how well scores separate and calibrate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from pns.records import Score

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(num_correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share in [0, 1]. `num_correct` may be fractional (means over samples). Raises ValueError for an
    empty sample or a count outside [0, n]."""
    if n <= 0 or not 0 <= num_correct <= n:
        raise ValueError(f"{num_correct} of {n} is not a share")
    share, z2 = num_correct / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if num_correct == 0 else max(0.0, centre - half)
    high = 1.0 if num_correct == n else min(1.0, centre + half)
    return low, high


def score(num_correct: float, n: int) -> Score:
    """Accuracy with its 95 % Wilson interval over `n` problems. Raises ValueError as `wilson_interval`."""
    low, high = wilson_interval(num_correct, n)
    return Score(num_correct / n, low, high, n)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (arXiv 2107.03374, equation 1): 1 - C(n-c, k) / C(n, k).
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} is not defined")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def paired_bootstrap(before_B: ArrayLike, after_B: ArrayLike, num_resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference after - before over the same problems, with its 95 % percentile interval (low, high).

    Each row is one problem's accuracy in [0, 1] (a mean over samples or seeds); problems are resampled with replacement.
    Raises ValueError for empty or unequal lengths.
    """
    before, after = np.asarray(before_B, dtype=np.float64), np.asarray(after_B, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"paired samples have shapes {before.shape} and {after.shape}")
    difference = after - before
    random = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, 256):  # bounded memory
        stop = min(start + 256, num_resamples)
        means[start:stop] = difference[random.integers(0, difference.size, (stop - start, difference.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive's score is above a negative's, ties counting one half; 0.5: indistinguishable. Raises ValueError if either
    is empty or a score is NaN."""
    high, low = np.asarray(positive, dtype=np.float64).ravel(), np.sort(np.asarray(negative, dtype=np.float64).ravel())
    if not high.size or not low.size or np.isnan(high).any() or np.isnan(low).any():
        raise ValueError("AUROC needs scores of both classes and no NaN")
    below, up_to = np.searchsorted(low, high, side="left"), np.searchsorted(low, high, side="right")
    return float((below + up_to).sum() / (2 * high.size * low.size))


def expected_calibration_error(probabilities_B: ArrayLike, outcomes_B: ArrayLike, num_bins: int = 10) -> float:
    """Mean over rows of |mean probability - share of positive outcomes| of the row's bin; bins are (0, 0.1], (0.1, 0.2], ... with 0 in the
    first (arXiv 1706.04599, equation 3). Raises ValueError for empty or unequal input or probabilities outside [0, 1]."""
    probability, outcome = np.asarray(probabilities_B, dtype=np.float64), np.asarray(outcomes_B, dtype=np.float64)
    if probability.shape != outcome.shape or not probability.size or not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("calibration needs as many outcomes as probabilities in [0, 1]")
    bins = np.clip(np.ceil(probability * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, probability - outcome, num_bins)
    return float(np.abs(gaps).sum() / probability.size)
