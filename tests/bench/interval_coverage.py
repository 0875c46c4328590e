"""Coverage and width of the 95 % interval of avg@k, beside Wilson's over the problems alone: prints one JSON
line. Problems' chances of being solved are drawn from beta distributions of several means and spreads."""

import argparse
import json
import math
from itertools import product

import numpy as np

from pns.algo.metrics import score, score_of_shares

POPULATIONS = ((0.5, 0.5), (2.0, 2.0), (0.3, 1.2), (1.2, 0.3), (8.0, 2.0))
PROBLEMS, SAMPLES = (30, 100, 500), (4, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    random = np.random.default_rng(0)
    coverage, of_wilson, ratios = [], [], []
    for (alpha, beta), n, k in product(POPULATIONS, PROBLEMS, SAMPLES):
        mean, hits, wilson_hits, narrower = alpha / (alpha + beta), 0, 0, 0.0
        for _ in range(repetitions):
            shares = random.binomial(k, random.beta(alpha, beta, n)) / k
            own, wilson = score_of_shares(shares.tolist(), k), score(math.fsum(shares), n)
            hits += own.low <= mean <= own.high
            wilson_hits += wilson.low <= mean <= wilson.high
            narrower += (wilson.high - wilson.low) / (own.high - own.low)
        coverage.append(hits / repetitions)
        of_wilson.append(wilson_hits / repetitions)
        ratios.append(narrower / repetitions)
    figures = {"settings": len(coverage), "repetitions": repetitions}
    for name, values in (("coverage", coverage), ("wilson_coverage", of_wilson), ("narrower", ratios)):
        figures |= {f"{name}_{what}": round(float(of(values)), 3) for what, of in _SUMMARIES.items()}
    print(json.dumps(figures))


_SUMMARIES = {"min": np.min, "mean": np.mean, "max": np.max}

if __name__ == "__main__":
    main()
