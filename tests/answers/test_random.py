"""Gold answers of the benchmarks with another value are never the same, in another spelling never different."""

from __future__ import annotations

import random

import pytest

from pns.answers.compare import compare_answers
from answer_variants import DATA, SETS, gold_answers, other_spellings, other_values
from workers.rewards.decide import math_verify_says

pytestmark = pytest.mark.skipif(
    not (DATA / "benchmarks").is_dir(), reason=f"no benchmark files in {DATA / 'benchmarks'} (set PNS_DATA)"
)
NUM_GOLDS = 60  # of each set; tests/bench/answers_random.py takes thousands


@pytest.mark.parametrize("name", SETS)
def test_other_values_are_not_the_same(name: str) -> None:
    rng = random.Random(name)
    golds = gold_answers(name)
    for gold in rng.sample(golds, min(NUM_GOLDS, len(golds))):
        for other in other_values(gold, rng):
            if compare_answers(gold, other).same:  # then it must be one of the few that state the same value
                assert math_verify_says(gold, other)[0], (gold, other)


@pytest.mark.parametrize("name", SETS)
def test_other_spellings_are_not_different(name: str) -> None:
    rng = random.Random(name)
    golds = gold_answers(name)
    for gold in rng.sample(golds, min(NUM_GOLDS, len(golds))):
        for other in other_spellings(gold, rng):
            assert compare_answers(gold, other).same is not False, (gold, other)
