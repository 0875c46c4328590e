"""Pairs: the target's right completions beside negatives, scored, and the quality of the negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pns.config import Config, PairPreference, PairStage
from pns.data.checker import Checker
from pns.data.preference import read_pairs
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_json, write_jsonl
from pns.records import Completion, PreferencePair, Problem, Reward, Rollout, Verdict
from pns.run.stage import ModelFiles
from pns.stages.artefacts import Negatives, Pairs, RewardModels, TrainedModel
from pns.stages.context import Problems
from pns.stages.pair import nearest_first, pair


def config_of(**changes: Any) -> Config:
    return Config(pair=PairStage(**{"samples_per_problem": 2, "prefer": PairPreference.first} | changes))


def negatives_of(bench: Any, texts: dict[str, list[str]], sources: dict[str, str] | None = None) -> Negatives:
    """Wrong completions by problem, as synthesis keeps them; `sources`: of a mixture, by completion id."""
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
    if sources:
        write_json(negatives.sources_file, sources)
    return negatives


def made(bench: Any, config: Config, negatives: Negatives, problems: Problems, name: str = "stage") -> Pairs:
    target, rewards = TrainedModel(bench.store / "target"), RewardModels(bench.store / "rewards")
    with bench.making(name) as ctx:
        backbone = ModelFiles("backbone")
        return pair.make(ctx, pair.settings(config), target, negatives, rewards, problems, backbone)


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


def test_stages_of_a_session_do_not_score_the_same_completions_again(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    scorer = bench.fleet.scorer("plausibility")
    scorer.value = lambda ids: float(len(ids))
    problems, negatives = bench.problems(1), negatives_of(bench, {"p0": [bench.solution(55)]})
    first = made(bench, config_of(), negatives, problems, "first")
    # Both sides of the pair; two right completions and one negative, by two reward models.
    assert len(scorer.asked) == 2 + 2 * 3
    expected = read_json(first.quality_file), read_json(first.scores_file)
    scorer.asked.clear()
    scorer.loaded.clear()
    again = made(bench, config_of(), negatives, problems, "again")
    assert (len(scorer.asked), len(scorer.loaded)) == (2, 1)  # of the pair alone
    assert (read_json(again.quality_file), read_json(again.scores_file)) == expected
    scorer.asked.clear()
    scorer.value = lambda ids: None
    bench.scores.clear()
    for name in ("third", "fourth"):  # what has no score is asked again
        made(bench, config_of(), negatives, problems, name)
    assert len(scorer.asked) == 2 * (2 + 2 * 3)


def test_what_has_no_score_is_counted_and_its_pair_kept_without(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    bench.fleet.scorer("plausibility").value = lambda ids: None
    pairs = made(bench, config_of(), negatives_of(bench, {"p0": [bench.solution(55)]}), bench.problems(1))
    [kept] = read_pairs(pairs.pairs_file)
    assert (kept.score_chosen, kept.score_rejected, kept.score_gap) == (None, None, None)
    # Two right completions and one negative, each without a score of two reward models.
    assert read_json(pairs.quality_file)["unscored"] == 6


def test_one_sidedness_is_of_the_pairs_and_of_all_negatives(bench: Any) -> None:
    """p0: one way and back, of which one is a pair; p1: one way. The target's own wrong ones differ by 1 -> 7."""
    steps = {"p0": "So Ann=3. ", "p1": "So Ann=4. "}

    def write(problem: str, sample: int, model: str) -> str:
        answer = [10 + int(problem[1:]), 77][sample % 2]
        return bench.solution(answer, steps[problem])

    bench.fleet.rollout.write = write
    texts = {
        "p0": [bench.solution(10, "So Ann=4. ")],  # 3 -> 4
        "p1": [bench.solution(11, "So Ann=3. "), bench.solution(11, "So Ann=5. ")],  # 4 -> 3 and 4 -> 5
    }
    pairs = made(bench, config_of(), negatives_of(bench, texts), bench.problems(2))
    quality = read_json(pairs.quality_file)
    # Pairs: 3 -> 4 and 4 -> 3. All negatives: 4 -> 5 beside them. Of rs twice 1 -> 7.
    assert quality["one_sidedness"] == {"pairs": 0.0, "rs": 1.0, "pns": pytest.approx(1 / 3)}
    # Two steps of a walk end at a mean distance of 1, one step ends at 1.
    assert quality["one_sidedness_by_chance"] == {"pairs": 0.5, "rs": 0.5, "pns": pytest.approx(2 / 3)}


def test_a_detector_tells_a_fixed_cue(bench: Any) -> None:
    def write(problem: str, sample: int, model: str) -> str:
        return bench.solution(77 if sample % 2 else 10 + int(problem[1:]))

    bench.fleet.rollout.write = write
    cue = {f"p{number}": [bench.solution(55, "So Bob=4. ")] for number in range(8)}
    pairs = made(bench, config_of(), negatives_of(bench, cue), bench.problems(8))
    detector = read_json(pairs.quality_file)["detector"]
    assert detector["pns"] == {"auroc": 1.0, "low": 1.0, "high": 1.0, "num_problems": 8}
    assert detector["rs"]["num_problems"] == 8


def test_perplexity_is_of_the_backbone_over_samples_of_each_source(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10 if sample < 3 else 77)
    negatives = negatives_of(bench, {"p0": [bench.solution(55)]})
    config = config_of(samples_per_problem=4, perplexity_samples=2)
    policy = bench.fleet.policy
    policy.log_prob = lambda token_ids: -1.0 if len(token_ids) % 2 else -2.0
    quality = read_json(made(bench, config, negatives, bench.problems(1)).quality_file)
    [asked] = policy.asked
    assert len(asked) == 2 + 1 + 1  # correct, rs, pns
    assert policy.loads == [("backbone", "language_model", 1, bench.seed)]
    for source, answer in {"correct": 10, "rs": 77, "pns": 55}.items():
        length = len(bench.prompts.encode_completion(bench.solution(answer)))
        assert quality["perplexity"][source] == pytest.approx(math.exp(1.0 if length % 2 else 2.0))


def test_the_likeliest_negative_goes_first_with_the_right_side_nearest_to_it(bench: Any) -> None:
    steps = ["So Ann=3. ", "So Bob=4. "]
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10, steps[sample])
    policy = bench.fleet.policy
    likely = tuple(bench.prompts.encode_completion(bench.solution(66, "So Bob=4. ")))
    policy.log_prob = lambda token_ids: -1.0 if tuple(token_ids) == likely else -2.0
    unlikely = [bench.solution(55, "So Ann=3. "), bench.solution(55, "So Ann=5. ")]
    negatives = negatives_of(bench, {"p0": [*unlikely, bench.solution(66, "So Bob=4. ")]})
    config = config_of(prefer=PairPreference.likely, perplexity_samples=0)
    [kept] = read_pairs(made(bench, config, negatives, bench.problems(1)).pairs_file)
    assert (kept.chosen, kept.rejected) == (bench.solution(10, steps[1]), bench.solution(66, steps[1]))
    assert policy.loads == [(str(bench.store / "target" / "model"), "language_model", 1, bench.seed)]


def test_no_perplexity_asks_nothing_of_the_policy(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    negatives = negatives_of(bench, {"p0": [bench.solution(55)]})
    pairs = made(bench, config_of(perplexity_samples=0), negatives, bench.problems(1))
    assert bench.fleet.policy.loads == []
    assert "perplexity" not in read_json(pairs.quality_file)


def test_pairs_of_a_mixture_say_where_their_negative_is_from(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10 + int(problem[1:]))
    texts = {"p0": [bench.solution(55)], "p1": [bench.solution(56)]}
    origins = {"p0#0": "pns_backbone", "p1#0": "rs"}
    config = config_of()
    config.negatives = "mixed"
    pairs = made(bench, config, negatives_of(bench, texts, origins), bench.problems(2))
    assert [kept.source for kept in read_pairs(pairs.pairs_file)] == ["pns_backbone", "rs"]
    assert set(read_json(pairs.quality_file)["tokens_mean"]) == {"correct", "pns_backbone", "rs"}


@dataclass(frozen=True)
class FakeCheck:
    first_wrong_step: int
    first_wrong_end: int


class FakeChecker(Checker):
    """The first wrong step is the second and ends after eleven characters."""

    def check(self, problem: Problem, text: str) -> Any:
        assert problem.id == "p0"
        return FakeCheck(1, 11)


def test_a_checker_marks_the_first_wrong_step(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
    problems = Problems(bench.problems(1).problems, FakeChecker())
    pairs = made(bench, config_of(), negatives_of(bench, {"p0": [bench.solution(55)]}), problems)
    [kept] = read_pairs(pairs.pairs_file)
    assert kept.margin_end == 11
    share = 11 / len(bench.solution(55))
    assert read_json(pairs.quality_file)["first_wrong_step"] == {
        "pns": {"index": 1.0, "share": pytest.approx(share), "known": 1.0}
    }


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
    assert pair.roles(settings) == ("rollout", "verifier", "policy", "style")
    unmeasured = pair.settings(Config(pair=PairStage(perplexity_samples=0)))
    assert pair.roles(unmeasured) == ("rollout", "verifier", "plausibility")
    likely = pair.settings(Config(pair=PairStage(perplexity_samples=0, prefer=PairPreference.likely)))
    assert pair.roles(likely) == ("rollout", "verifier", "policy", "plausibility")
