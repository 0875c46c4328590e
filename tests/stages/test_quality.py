"""Quality of negatives by source: what there is of none, first wrong steps, samples and perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from pns.data.checker import Checker
from pns.records import Completion, Problem, Reward, Rollout, Verdict
from pns.stages.quality import first_wrong_step, flow_quality, perplexities, sample, text_quality


@dataclass(frozen=True)
class FakeCheck:
    first_wrong_step: int | None
    first_wrong_end: int | None


class FakeChecker(Checker):
    """The text says in which step it is wrong, which ends after as many characters; none: in no step."""

    def check(self, problem: Problem, text: str) -> Any:
        place = None if text.startswith("none") else int(text[0])
        return FakeCheck(place, place)


def rollout(text: str, token_ids: tuple[int, ...] = (1,), problem: str = "p0") -> Rollout:
    completion = Completion("c", problem, text, token_ids, (), "stop")
    return Rollout(0, Problem(problem, "Ann has 3. ", "3"), completion, Reward(0.0, True, Verdict.WRONG))


def test_first_wrong_steps_are_means_of_those_that_are_known() -> None:
    # 2 of 4 characters, 1 of 10.
    own = [rollout("2abc"), rollout("1abcdefghi"), rollout("none")]
    figures = first_wrong_step(own, FakeChecker())
    assert figures == {"index": 1.5, "share": pytest.approx(0.3), "known": pytest.approx(2 / 3)}
    assert first_wrong_step([rollout("none")], FakeChecker()) == {"index": None, "share": None, "known": 0.0}


def test_figures_of_nothing_are_left_out(bench: Any) -> None:
    sources = {"correct": [rollout("3")], "rs": [], "pns": [rollout("2ab")]}
    with bench.making() as ctx:
        quality = text_quality(ctx, sources, None)
        assert perplexities(ctx, "backbone", {"correct": [], "pns": []}, 5) == {}
    assert quality == {
        "tokens_mean": {"correct": 1.0, "pns": 1.0},
        "detector": {},  # one problem cannot be halved
        "first_wrong_step": {},  # no checker
    }
    assert flow_quality(sources, []) == {"one_sidedness": {}, "one_sidedness_by_chance": {}}  # equal sides
    assert bench.fleet.policy.loads == []


def test_perplexity_counts_tokens_not_completions(bench: Any) -> None:
    bench.fleet.policy.log_prob = lambda token_ids: -float(len(token_ids))
    sources = {"pns": [rollout("", (5, 6, 7)), rollout("", (5,))], "rs": [rollout("", (5, 6))]}
    with bench.making() as ctx:
        measured = perplexities(ctx, "backbone", sources, 5)
    # 3 tokens of 3 nats and one of 1 are 10 / 4 a token.
    assert measured == {"pns": pytest.approx(math.exp(2.5)), "rs": pytest.approx(math.exp(2.0))}


def test_a_sample_is_a_function_of_the_seed_and_in_order() -> None:
    own = [rollout(str(number)) for number in range(20)]
    texts = [drawn.completion.text for drawn in sample(own, 5, seed=1)]
    assert texts == sorted(texts, key=int)
    assert len(set(texts)) == 5
    assert texts == [drawn.completion.text for drawn in sample(own, 5, seed=1)]
    assert texts != [drawn.completion.text for drawn in sample(own, 5, seed=2)]
    assert sample(own, 50, seed=1) == own
