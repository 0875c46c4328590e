"""Pairs: the target's right completions beside negatives, scored, and the quality of the negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pns.config import Config, PairStage
from pns.data.checker import Checker
from pns.data.preference import read_pairs
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_jsonl
from pns.records import Completion, PreferencePair, Problem, Reward, Rollout, Verdict
from pns.stages.artefacts import Negatives, Pairs, RewardModels, TrainedModel
from pns.stages.context import Problems
from pns.stages.pair import nearest_first, pair


def config_of(**changes: Any) -> Config:
    return Config(pair=PairStage(**{"samples_per_problem": 2, "prefer_shared_prefix": False} | changes))


def negatives_of(bench: Any, texts: dict[str, list[str]]) -> Negatives:
    """Wrong completions by problem, as synthesis keeps them."""
    negatives = Negatives(bench.store / "negatives")
    negatives.directory.mkdir(parents=True, exist_ok=True)
    problems = bench.problems(9).by_id
    rollouts = []
    for problem, own in texts.items():
        for number, text in enumerate(own):
            ids = bench.prompts.encode_completion(text)
            completion = Completion(f"{problem}#{number}", problem, text, ids, (-0.5,) * len(ids), "stop")
            reward = Reward(0.7, True, Verdict.WRONG, {"plausibility": 0.8})
            rollouts.append(Rollout(0, problems[problem], completion, reward))
    write_jsonl(negatives.negatives_file, rollouts)
    return negatives


def made(bench: Any, config: Config, negatives: Negatives, problems: Problems, name: str = "stage") -> Pairs:
    target, rewards = TrainedModel(bench.store / "target"), RewardModels(bench.store / "rewards")
    with bench.making(name) as ctx:
        return pair.make(ctx, pair.settings(config), target, negatives, rewards, problems)


def test_the_target_is_right_and_the_negative_wrong(bench: Any) -> None:
    """Of p0 the first completion is wrong; p1 has no negative, p2 no right completion."""
    right_from = {"p0": 1, "p1": 0, "p2": 9}

    def write(problem: str, sample: int, model: str) -> str:
        return bench.solution(10 + int(problem[1:]) if sample >= right_from[problem] else 77)

    bench.fleet.rollout.write = write
    bench.fleet.scorer("plausibility").value = lambda ids: float(len(ids))
    negatives = negatives_of(bench, {"p0": [bench.solution(55)], "p2": [bench.solution(56)]})
    pairs = made(bench, config_of(), negatives, bench.problems(3))
    [kept] = read_pairs(pairs.pairs_file)
    problem = bench.problems(1).problems[0]
    assert (kept.problem_id, kept.chosen, kept.rejected) == ("p0", bench.solution(10), bench.solution(55))
    assert kept.source == "pns"
    sides = [kept.chosen, kept.rejected]
    lengths = [len(bench.prompts.encode(problem) + bench.prompts.encode_completion(side)) for side in sides]
    assert [kept.score_chosen, kept.score_rejected] == lengths
    [standard] = read_jsonl(pairs.standard_file)
    assert {"prompt", "chosen", "rejected"} <= standard.keys()
    assert bench.fleet.rollout.loaded == [str(bench.store / "target" / "model")]
    assert [rollout["completion"]["id"] for rollout in read_jsonl(pairs.rollouts_file)] == [
        f"p{p}#{2 * p + g}" for p in range(3) for g in range(2)
    ]
    counts = bench.counts()
    assert (counts["samples"], counts["kept"]) == (6, 1)
    assert read_json(pairs.quality_file)["counts"]["kept"] == 1


def test_the_negatives_are_measured_beside_the_targets_own_wrong_completions(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10 if sample == 0 else 77)
    negative = bench.solution(55, "So Ann=3. " * 2)

    def score(ids: Sequence[int]) -> float | None:
        """Higher for longer ones: negatives, alone long, look better than what is right."""
        return float(len(ids))

    bench.fleet.scorer("plausibility").value = score
    pairs = made(bench, config_of(), negatives_of(bench, {"p0": [negative]}), bench.problems(1))
    quality = read_json(pairs.quality_file)
    # AUROC of right against wrong: ties are worth a half.
    assert quality["auroc_held_out"] == {"rs": 0.5, "pns": 0.0}
    assert quality["tokens_mean"]["pns"] > quality["tokens_mean"]["rs"] == quality["tokens_mean"]["correct"]
    assert quality["unscored"] == 0
    rewards = bench.store / "rewards"
    assert bench.fleet.scorer("plausibility").loaded == [
        str(rewards / name) for name in ("main", "main", "held_out")
    ]


def test_what_has_no_score_is_counted_and_its_pair_kept_without(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    bench.fleet.scorer("plausibility").value = lambda ids: None
    pairs = made(bench, config_of(), negatives_of(bench, {"p0": [bench.solution(55)]}), bench.problems(1))
    [kept] = read_pairs(pairs.pairs_file)
    assert (kept.score_chosen, kept.score_rejected, kept.score_gap) == (None, None, None)
    # Two right completions and one negative, each without a score of two reward models.
    assert read_json(pairs.quality_file)["unscored"] == 6


@dataclass(frozen=True)
class FakeCheck:
    first_wrong_end: int


class FakeChecker(Checker):
    """The first wrong step ends after eleven characters."""

    def check(self, problem: Problem, text: str) -> Any:
        assert problem.id == "p0"
        return FakeCheck(11)


def test_a_checker_marks_the_first_wrong_step(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    problems = Problems(bench.problems(1).problems, FakeChecker())
    pairs = made(bench, config_of(), negatives_of(bench, {"p0": [bench.solution(55)]}), problems)
    [kept] = read_pairs(pairs.pairs_file)
    assert kept.margin_end == 11


def test_no_pair_stops_the_stage_with_the_way_out(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(77)
    with pytest.raises(UserError, match=r"no pairs .*raise pair.samples_per_problem"):
        made(bench, config_of(), negatives_of(bench, {"p0": [bench.solution(55)]}), bench.problems(1))
    assert len(read_jsonl(bench.store / "stage" / "rollouts.jsonl")) == 2


def test_the_sides_that_share_most_come_first(bench: Any) -> None:
    def completion(text: str) -> Completion:
        ids = bench.prompts.encode_completion(text)
        return Completion("", "p0", text, ids, (), "stop")

    rights = [completion(bench.solution(10, step)) for step in ("So Bob=4. ", "So Ann=3. ")]
    wrongs = [completion(bench.solution(55, step)) for step in ("So Cid=8. ", "So Ann=3. ")]
    chosen, rejected = nearest_first(rights, wrongs)
    assert (chosen, rejected) == (rights[::-1], wrongs[::-1])


def test_an_interruption_asks_for_the_rest_alone(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    bench.fleet.rollout.interrupt_after = 3
    negatives = negatives_of(bench, {"p0": [bench.solution(55)]})
    config = config_of(samples_per_problem=6)
    with pytest.raises(KeyboardInterrupt):
        made(bench, config, negatives, bench.problems(1))
    bench.fleet.rollout.take_asked()
    pairs = made(bench, config, negatives, bench.problems(1))
    assert bench.fleet.rollout.take_asked() == ["0/p0#0", "0/p0#1", "0/p0#2"]
    assert isinstance(read_pairs(pairs.pairs_file)[0], PreferencePair)


def test_roles_and_source_are_declared() -> None:
    settings = pair.settings(Config(negatives="rs", pair=PairStage(scored_by="style")))
    assert settings.source == "rs"
    assert pair.roles(settings) == ("rollout", "verifier", "style")
