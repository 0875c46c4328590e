"""Synthesis: all samples kept, the safe ones as negatives, and why the others were dropped."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pns.config import Config, RewardConfig, RewardTerm, Synthesize, TermKind
from pns.errors import UserError
from pns.files import read_json, read_jsonl
from pns.records import Problem
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.context import Problems
from pns.stages.synthesize import synthesize


def config_of(**changes: Any) -> Config:
    terms = {
        "plausibility": RewardTerm(TermKind.reward_model, 0.25),
        "coherence": RewardTerm(TermKind.judge, 0.0),
    }
    small = {"samples_per_problem": 6, "temperature": 0.8}
    return Config(synthesize=Synthesize(**small | changes), reward=RewardConfig(terms=terms))


def made(bench: Any, config: Config, texts: list[str], problems: Problems | None = None) -> Negatives:
    """From the generator's completions `texts` of each problem."""
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample % len(texts)]
    generator, target = TrainedModel(bench.store / "generator"), TrainedModel(bench.store / "target")
    rewards = RewardModels(bench.store / "rewards")
    with bench.making() as ctx:
        settings = synthesize.settings(config)
        return synthesize.make(ctx, settings, generator, rewards, problems or bench.problems(1), target)


def test_wrong_completions_become_negatives_and_the_rest_is_counted(bench: Any) -> None:
    texts = [
        bench.malformed,
        bench.solution(10),
        bench.solution(bench.undecided),
        bench.solution(11),
        bench.solution(11),  # again
        bench.solution(12, "So Ann=10. "),  # reasons rightly, boxes a wrong number
    ]
    negatives = made(bench, config_of(), texts)
    [kept] = negatives.negatives()
    assert kept.completion.text == bench.solution(11)
    assert kept.reward.terms == {"plausibility": 0.5}
    rollouts = read_jsonl(negatives.rollouts_file)
    assert [row["completion"]["text"] for row in rollouts] == texts
    dropped = ("malformed", "correct", "unverified", "duplicate", "box_only_flip")
    counts = read_json(negatives.counts_file)
    assert {cause: num for cause, num in counts.items() if num} == dict.fromkeys(dropped, 1)
    assert bench.counts() == counts | {"samples": 6, "kept": 1, "prompts_too_long": 0}
    [row] = read_jsonl(negatives.directory / "metrics.jsonl")
    assert (row["stage"], row["values"]) == ("synthesize", {"kept": 1.0, "kept_share": pytest.approx(1 / 6)})


def test_models_and_terms(bench: Any) -> None:
    made(bench, config_of(samples_per_problem=2), [bench.solution(77)], bench.problems(2))
    assert bench.fleet.rollout.loaded == [str(bench.store / "generator" / "model")]
    assert [sampling.temperature for sampling in bench.fleet.rollout.samplings] == [0.8]
    assert bench.fleet.scorer("plausibility").loaded == [str(bench.store / "rewards" / "main")]
    assert len(bench.fleet.scorer("plausibility").asked) == 4
    assert "coherence" not in bench.fleet.scorers  # of weight 0
    settings = synthesize.settings(config_of())
    assert synthesize.roles(settings) == ("rollout", "verifier", "plausibility")


def test_the_implausible_are_dropped_by_quantile(bench: Any) -> None:
    answers = [11, 12, 13, 14]
    lengths = {11: 1, 12: 2, 13: 3, 14: 4}
    texts = [bench.solution(answer, "So Ann=3. " * lengths[answer]) for answer in answers]
    bench.fleet.scorer("plausibility").value = lambda item: math.log(len(item))  # longer is more plausible
    negatives = made(bench, config_of(samples_per_problem=4, min_quantile=0.5), texts)
    assert [kept.completion.text for kept in negatives.negatives()] == texts[2:]
    assert read_json(negatives.counts_file)["below_quantile"] == 2


def test_the_unlikely_and_the_too_likely_under_the_target_are_dropped(bench: Any) -> None:
    texts = [bench.solution(10 + number, "So Ann=3. " * number) for number in (1, 2, 3, 4)]
    lengths = [len(bench.prompts.encode_completion(text)) for text in texts]
    bench.fleet.policy.log_prob = lambda token_ids: -1.0 - lengths.index(len(token_ids))
    bounds = {"min_log_prob": -3.0, "max_log_prob": -2.0}
    config = config_of(samples_per_problem=4, **bounds)
    negatives = made(bench, config, texts)
    assert [kept.completion.text for kept in negatives.negatives()] == texts[1:3]
    assert read_json(negatives.counts_file)["log_prob_out_of_range"] == 2
    assert bench.counts()["log_prob_out_of_range"] == 2
    assert bench.fleet.policy.loads == [
        (str(bench.store / "target" / "model"), "language_model", 1, bench.seed)
    ]
    assert synthesize.roles(synthesize.settings(config)) == ("rollout", "verifier", "policy", "plausibility")


def test_without_bounds_the_policy_is_not_asked(bench: Any) -> None:
    negatives = made(bench, config_of(samples_per_problem=1), [bench.solution(11)])
    assert bench.fleet.policy.loads == []
    assert read_json(negatives.counts_file)["log_prob_out_of_range"] == 0


def test_no_negative_in_the_range_stops_the_stage(bench: Any) -> None:
    with pytest.raises(UserError, match=r"no negative was kept .*'log_prob_out_of_range': 1"):
        made(bench, config_of(samples_per_problem=1, max_log_prob=-1.5), [bench.solution(11)])


def test_problems_that_do_not_fit_are_counted(bench: Any) -> None:
    too_long = Problem("p9", "Ann has 3. " * 40, "19")
    problems = Problems([*bench.problems(1).problems, too_long])
    negatives = made(bench, config_of(samples_per_problem=1), [bench.solution(11)], problems)
    assert {kept.problem.id for kept in negatives.negatives()} == {"p0"}
    assert bench.counts()["prompts_too_long"] == 1


def test_no_negative_stops_the_stage_and_keeps_the_samples(bench: Any) -> None:
    with pytest.raises(UserError, match=r"no negative was kept .*'correct': 2.*train the generator longer"):
        made(bench, config_of(samples_per_problem=2), [bench.solution(10)])
    assert len(read_jsonl(bench.store / "stage" / "rollouts.jsonl")) == 2
    assert not (bench.store / "stage" / "negatives.jsonl").exists()


def test_an_interruption_asks_for_the_rest_alone(bench: Any) -> None:
    bench.fleet.rollout.interrupt_after = 3
    texts = [bench.solution(11 + sample) for sample in range(6)]
    with pytest.raises(KeyboardInterrupt):
        made(bench, config_of(), texts)
    bench.fleet.rollout.take_asked()
    negatives = made(bench, config_of(), texts)
    assert bench.fleet.rollout.take_asked() == ["0/p0#0", "0/p0#1", "0/p0#2"]
    assert [kept.completion.text for kept in negatives.negatives()] == texts
