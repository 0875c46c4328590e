"""Several runs of one recipe, with other seeds: accuracies with their interval, and paired differences.

What differs from run to run (the training) and from problem to problem are two sources of chance, so both are
resampled: the hierarchical bootstrap draws runs, and problems within them. Where all runs ask the same
problems, a resample draws them once for all its runs, since a hard problem is hard in every run.

Axes: `_R` runs, `_M` models, `_P` problems of a suite, `_N` resamples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pns.algo.metrics import Difference, mean_score, paired_difference, score_of_shares
from pns.records import Score

_CHUNK_ELEMENTS = 2**22  # counts that are drawn at once: bounded memory
Array = NDArray[np.float64]


@dataclass(frozen=True)
class SuiteRuns:
    """A suite in all runs. `shares_RMP`: of each problem the share in [0, 1] of right samples, of which there
    are `num_samples`; `same_problems`: every run has the same ones, in the same order."""

    shares_RMP: Array
    same_problems: bool
    num_samples: int


@dataclass(frozen=True)
class Resampled:
    """Accuracies, observed and resampled, of a suite or of the unweighted mean over suites. A resample is the
    same for all models, so differences are paired."""

    observed_RM: Array
    resampled_NM: Array
    suites: tuple[SuiteRuns, ...]

    def accuracy(self, model: int) -> Score:
        """The mean over the runs with its 95 % interval (percentiles); of a single run the interval of
        `pns.algo.metrics.score_of_shares`. `n` counts the problems of a run."""
        num_runs, num_problems = len(self.observed_RM), sum(s.shares_RMP.shape[2] for s in self.suites)
        if num_runs == 1:
            scores = [score_of_shares(suite.shares_RMP[0, model], suite.num_samples) for suite in self.suites]
            return mean_score(scores) if len(scores) > 1 else scores[0]
        low, high = np.quantile(self.resampled_NM[:, model], [0.025, 0.975])
        return Score(float(self.observed_RM[:, model].mean()), float(low), float(high), num_problems)

    def difference(self, before: int, after: int) -> Difference:
        """after - before with its 95 % interval, and p of the t-test over the runs' differences, which keeps
        few runs from saying too much: resampled runs alone vary too little, by (R - 1) / R. Of a single run
        that of `pns.algo.metrics.paired_difference`."""
        difference_R = self.observed_RM[:, after] - self.observed_RM[:, before]
        if len(difference_R) == 1:
            of_run_SMP = [suite.shares_RMP[0] for suite in self.suites]
            return paired_difference([own[before] for own in of_run_SMP], [own[after] for own in of_run_SMP])
        differences_N = self.resampled_NM[:, after] - self.resampled_NM[:, before]
        low, high = np.quantile(differences_N, [0.025, 0.975])
        return Difference(float(difference_R.mean()), float(low), float(high), t_test(difference_R))


def resample(
    suites: Mapping[str, SuiteRuns], num_resamples: int = 10_000, seed: int = 0
) -> tuple[dict[str, Resampled], Resampled]:
    """Of every suite, and of their unweighted mean. A resample draws as many runs as there are, with
    replacement and for all suites at once, and for each as many problems of each suite as it has. Raises
    ValueError for no suite, an empty one, or suites of different runs or models."""
    if len({suite.shares_RMP.shape[:2] for suite in suites.values()}) != 1:
        raise ValueError("the suites must be at least one, of the same runs and models")
    if not all(suite.shares_RMP.size for suite in suites.values()):
        raise ValueError("a suite has no problem")
    random = np.random.default_rng(seed)
    num_runs = next(iter(suites.values())).shares_RMP.shape[0]
    drawn_NR = random.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_resamples)
    found = {}
    for name, suite in suites.items():
        observed_RM = suite.shares_RMP.mean(axis=2)
        found[name] = Resampled(observed_RM, _resampled_means(suite, drawn_NR, random), (suite,))
    observed_RM = np.mean([own.observed_RM for own in found.values()], axis=0)
    resampled_NM = np.mean([own.resampled_NM for own in found.values()], axis=0)
    return found, Resampled(observed_RM, resampled_NM, tuple(suites.values()))


def _resampled_means(
    suite: SuiteRuns, drawn_NR: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.float64]:
    """`drawn_NR`: how often a resample has each run."""
    num_runs, num_models, num_problems = suite.shares_RMP.shape
    shares_RPM = suite.shares_RMP.transpose(0, 2, 1)
    uniform = np.full(num_problems, 1 / num_problems)
    at_once = max(1, _CHUNK_ELEMENTS // (num_runs * num_problems))
    means = []
    for start in range(0, len(drawn_NR), at_once):
        own_NR = drawn_NR[start : start + at_once]
        if suite.same_problems:
            counts_NP = random.multinomial(num_problems, uniform, size=len(own_NR))
            counts_NRP = own_NR[:, :, None] * counts_NP[:, None, :]
        else:  # a run that is drawn k times has k draws of its problems
            counts_NRP = random.multinomial(own_NR * num_problems, uniform)
        flat = counts_NRP.reshape(len(own_NR), -1).astype(np.float64)
        means.append(flat @ shares_RPM.reshape(-1, num_models) / (num_runs * num_problems))
    return np.concatenate(means)


def t_test(values_R: Array) -> float:
    """Two-sided p-value of the mean of two or more values being 0 (Student). Equal values: 0, or 1 where they
    are 0."""
    mean, deviation = float(values_R.mean()), float(values_R.std(ddof=1))
    if deviation <= 1e-12:  # up to rounding
        return float(abs(mean) <= 1e-12)
    freedom = len(values_R) - 1
    angle = math.atan(abs(mean) / (deviation / math.sqrt(len(values_R))) / math.sqrt(freedom))
    # Abramowitz and Stegun, 26.7.3 and 26.7.4: exact for a whole number of degrees of freedom.
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for power in range(1 if is_odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return max(0.0, 1 - inside)
