"""The generator of negatives: when its training stops, and what is measured before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pns.algo.judging import Judgement
from pns.algo.masks import TooManyMaskedError
from pns.config import Config, ReverseRl, RewardConfig, RewardTerm, TermKind
from pns.data.checker import Checker
from pns.files import read_json, read_jsonl, write_jsonl
from pns.records import Completion, PreferencePair, Problem, Reward, Rollout, Verdict
from pns.run.stage import ModelFiles
from pns.stages.artefacts import Generator, RewardModels, TrainedModel
from pns.stages.context import Problems
from pns.stages.reverse_rl import PlausibilityStop, reverse_rl
from workers.training.objectives import BradleyTerryObjective

READY = {"wrong_rate": 0.9, "format_rate": 0.95}


def stops_at(settings: ReverseRl, plausibility: list[float | None], **rates: float) -> int | None:
    """The first step at which the condition says stop."""
    stop = PlausibilityStop(settings)
    for step, value in enumerate(plausibility):
        if stop(step, {**READY, **rates, "plausibility_mean": value}):
            return step
    return None


def test_training_stops_when_plausibility_no_longer_rises() -> None:
    settings = ReverseRl(stop_patience=2)
    assert stops_at(settings, [0.5, 0.6, 0.6, 0.5]) == 3
    assert stops_at(settings, [0.5, 0.4, 0.6, 0.5, 0.55]) == 4
    assert stops_at(settings, [0.1, 0.2, 0.3, 0.4, 0.5]) is None
    assert stops_at(settings, [0.5, None, None]) == 2  # no wrong completion: nothing rose
    assert stops_at(replace(settings, stop_patience=0), [0.5] * 20) is None


@pytest.mark.parametrize("rate", ["wrong_rate", "format_rate"])
def test_patience_counts_only_where_both_rates_are_reached(rate: str) -> None:
    assert stops_at(ReverseRl(stop_patience=1), [0.5] * 9, **{rate: READY[rate] - 0.01}) is None
    assert stops_at(ReverseRl(stop_patience=1), [0.5] * 9, **{rate: READY[rate]}) == 1


def test_another_term_can_be_watched() -> None:
    stop = PlausibilityStop(ReverseRl(stop_patience=1, stop_term="style"))
    rising = [{**READY, "style_mean": 0.1 * step, "plausibility_mean": 0.5} for step in range(1, 5)]
    assert not any(stop(step, metrics) for step, metrics in enumerate(rising))


def test_a_wrong_rate_that_may_not_be_held_stops_at_once() -> None:
    settings = ReverseRl(stop_patience=0, max_hold_wrong_rate=0.8)
    assert stops_at(settings, [0.1], wrong_rate=0.79) is None
    assert stops_at(settings, [0.1, 0.2], wrong_rate=0.8) == 0


@dataclass(frozen=True)
class FakeStepCheck:
    first_wrong_end: int | None = 3
    single_error: bool = False


class FakeChecker:
    """Texts that end in 77 have a single error, and deserve half of the rubric."""

    def check(self, problem: Problem, text: str) -> FakeStepCheck:
        return FakeStepCheck(single_error=text.endswith("{77}"))

    def rubric(self, problem: Problem, text: str) -> tuple[int, int, int, int]:
        return (3, 3, 0, 0) if text.endswith("{77}") else (0, 0, 0, 0)


def config_of(**reverse: Any) -> Config:
    small = {"steps": 4, "problems_per_step": 2, "completions_per_problem": 2, "kl_coefficient": 0.0}
    terms = {
        "wrong": RewardTerm(TermKind.verdict, 0.5),
        "plausibility": RewardTerm(TermKind.reward_model, 0.5),
        "coherence": RewardTerm(TermKind.judge, 0.0),
    }
    config = Config(reverse_rl=ReverseRl(**small | reverse), reward=RewardConfig(terms=terms))
    config.evaluate.generator_samples, config.evaluate.generator_temperature = 5, 0.7
    return config


def made(bench: Any, config: Config, checker: Checker | None = None, solved: Any = None) -> Generator:
    """The generator from "target", trained on three problems and measured on two others."""
    train, measured = bench.problems(3), Problems(bench.problems(5).problems[3:], checker)
    rewards = RewardModels(bench.store / "rewards")
    with bench.making() as ctx:
        settings = reverse_rl.settings(config)
        return reverse_rl.make(ctx, settings, ModelFiles("target"), solved, rewards, train, measured)


def test_the_generator_is_measured_before_and_after(bench: Any) -> None:
    """It learns to write wrong answers, of which every second has a single error."""
    trained_model = str(bench.store / "stage" / "model")

    def write(problem: str, sample: int, model: str) -> str:
        right = bench.solution(10 + int(problem[1:]))
        wrong = bench.solution(77 if sample % 2 else 78)
        return wrong if model == trained_model or sample % 2 else right

    bench.fleet.rollout.write = write
    generator = made(bench, config_of(), FakeChecker())
    figures = read_json(generator.figures_file)
    assert read_json(generator.before_file) == figures["before"]
    # Five completions, of the two problems in turn; the second and the fourth have 77.
    assert (figures["before"]["num_completions"], figures["after"]["num_completions"]) == (5, 5)
    assert (figures["before"]["wrong_rate"], figures["after"]["wrong_rate"]) == (0.4, 1.0)
    assert (figures["before"]["single_error_share"], figures["after"]["single_error_share"]) == (1.0, 0.4)
    assert (figures["before"]["checker_rubric_mean"], figures["after"]["checker_rubric_mean"]) == (0.5, 0.2)
    assert figures["after"]["plausibility_mean"] == 0.5
    rollout = bench.fleet.rollout
    assert rollout.loaded == ["target", "target", trained_model]  # before, training, after
    assert [sampling.temperature for sampling in rollout.samplings] == [0.7, 1.0, 1.0, 1.0, 1.0, 0.7]
    assert {request.id for request in rollout.asked if request.id.startswith("0/p3")} >= {"0/p3#0", "0/p3#2"}
    assert {r.problem.id for r in generator.rollouts()} == {"p0", "p1", "p2"}
    assert not list(generator.directory.glob("*unfinished*"))
    assert bench.counts() == {"prompts_too_long": 0}


def test_terms_that_count_are_loaded_and_asked(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(77)
    generator = made(bench, config_of(steps=1))
    assert bench.fleet.scorer("plausibility").loaded == [RewardModels(bench.store / "rewards").main]
    assert "coherence" not in bench.fleet.scorers
    assert all(r.reward.value == pytest.approx(0.75) for r in generator.rollouts())
    assert "single_error_share" not in read_json(generator.figures_file)["after"]  # no checker
    settings = reverse_rl.settings(config_of())
    assert reverse_rl.roles(settings) == ("rollout", "verifier", "policy", "plausibility")


def test_the_stop_condition_ends_the_training(bench: Any) -> None:
    """Three of four are wrong in every step, and none of them is more plausible than before."""
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        77 if sample else 10 + int(problem[1:])
    )
    generator = made(bench, config_of(stop_patience=1, stop_wrong_rate=0.7))
    assert {r.step for r in generator.rollouts()} == {0, 1}


def test_what_was_measured_before_is_kept_over_a_resume(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        77 if sample % 2 else 10 + int(problem[1:])
    )
    bench.fleet.policy.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        made(bench, config_of(checkpoint_every=1))
    before = bench.store / "stage" / "before.json"
    kept, changed = read_json(before), before.stat().st_mtime_ns
    measured = [request.id for request in bench.fleet.rollout.asked[:5]]
    bench.fleet.rollout.asked = []
    generator = made(bench, config_of(checkpoint_every=1))
    assert before.stat().st_mtime_ns == changed
    assert read_json(generator.figures_file)["before"] == kept
    asked = [request.id for request in bench.fleet.rollout.asked]
    assert asked[-5:] == measured  # after, on the same problems
    assert not any(key.startswith(("0/p3", "0/p4")) for key in asked[:-5])
    assert bench.fleet.policy.restored == [1]


def test_a_measurement_goes_on_where_it_was_interrupted(bench: Any) -> None:
    bench.fleet.rollout.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        made(bench, config_of(steps=1))
    assert not (bench.store / "stage" / "before.json").exists()
    bench.fleet.rollout.asked = []
    made(bench, config_of(steps=1))
    assert [request.id for request in bench.fleet.rollout.asked][:2] == ["0/p3#0", "0/p4#1"]
    assert bench.fleet.rollout.asked[2].id.startswith(("0/p0", "0/p1", "0/p2"))


def reward_models_of_two_pairs(bench: Any) -> RewardModels:
    """Trained on a pair of p3 and one of p4; one of the two problems is the main model's."""
    rewards = RewardModels(bench.store / "rewards")
    rewards.directory.mkdir(parents=True)
    drawn = Problems(bench.problems(5).problems[3:]).problems
    pairs = [PreferencePair(p.id, p.prompt, bench.solution(p.answer), bench.solution(99)) for p in drawn]
    completions = [Completion(p.id, p.id, bench.solution(p.answer), (1,), (-1.0,), "stop") for p in drawn]
    right = Reward(1.0, True, Verdict.CORRECT)
    rollouts = [Rollout(0, p, c, right) for p, c in zip(drawn, completions, strict=True)]
    write_jsonl(rewards.pairs_file, pairs)
    write_jsonl(rewards.rollouts_file, rollouts)
    return rewards


def solved_target(bench: Any) -> TrainedModel:
    """A target whose RL solved p0, p1 and p2."""
    target = TrainedModel(bench.store / "solved")
    target.directory.mkdir(parents=True)
    right = Reward(1.0, True, Verdict.CORRECT)
    ids = bench.prompts.encode_completion(bench.solution(10))
    rows = [
        Rollout(
            0, p, Completion(p.id, p.id, bench.solution(p.answer), ids, (-1.0,) * len(ids), "stop"), right
        )
        for p in bench.problems(3).problems
    ]
    write_jsonl(target.rollouts_file, rows)
    return target


def test_the_reward_model_learns_the_generators_negatives(bench: Any) -> None:
    """Before steps 2 and 4; an interruption changes nothing."""
    config = config_of(steps=5, refresh_every=2, refresh_steps=3, checkpoint_every=9)
    config.reward_model.pairs_per_step = 4
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        10 + int(problem[1:]) if sample == 1 else 77
    )
    rewards, solved = reward_models_of_two_pairs(bench), solved_target(bench)
    policy, scorer = bench.fleet.policy, bench.fleet.scorer("plausibility")
    generator = made(bench, config, solved=solved)
    refreshed = [str(generator.directory / "refreshed" / f"step-{step:08d}") for step in (2, 4)]
    assert scorer.loaded == [rewards.main, *refreshed, rewards.main]  # measured by the first one
    heads = [(model, head) for model, head, *_ in policy.loads]
    assert heads == [
        ("target", "language_model"),
        (rewards.main, "score"),
        ("target", "language_model"),
        (refreshed[0], "score"),
        ("target", "language_model"),
    ]
    assert policy.restored == [2, 4]  # the generator goes on where it was
    assert read_json(generator.directory / "model" / "weights.json") == "target+5"
    assert read_json(Path(refreshed[0]) / "weights.json") == f"{rewards.main}+3"
    batches = [batch for batch, objective in policy.trained if isinstance(objective, BradleyTerryObjective)]
    assert len(batches) == 6
    for batch in batches:
        texts = [bench.prompts.decode(ids) for ids in batch.completion_ids]
        chosen, rejected = texts[::2], texts[1::2]
        # Two of the pairs it was trained on, of one problem; two of what the generator has written.
        assert [text.endswith("{99}") for text in rejected] == [True, True, False, False]
        assert all(text.endswith("{77}") for text in rejected[2:])
        assert chosen[0] == chosen[1]


def test_an_interrupted_stage_takes_refreshed_models_up_again(bench: Any) -> None:
    config = config_of(steps=5, refresh_every=2, refresh_steps=3, checkpoint_every=9)
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(
        10 + int(problem[1:]) if sample == 1 else 77
    )
    rewards, solved = reward_models_of_two_pairs(bench), solved_target(bench)
    bench.fleet.policy.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        made(bench, config, solved=solved)
    bench.fleet.policy.interrupt_at, bench.fleet.policy.trained = None, []
    bench.fleet.scorer("plausibility").loaded.clear()
    generator = made(bench, config, solved=solved)
    refreshed = [str(generator.directory / "refreshed" / f"step-{step:08d}") for step in (2, 4)]
    assert bench.fleet.scorer("plausibility").loaded == [rewards.main, *refreshed, rewards.main]
    assert bench.fleet.policy.restored[0] == 2
    trained = [type(objective).__name__ for _, objective in bench.fleet.policy.trained]
    assert trained == ["GrpoObjective"] * 2 + ["BradleyTerryObjective"] * 3 + ["GrpoObjective"]


@pytest.mark.parametrize(("num_garbled", "stops"), [(1, False), (3, True)])
def test_garbage_of_the_judge_is_masked_and_counted_up_to_a_bound(
    bench: Any, num_garbled: int, stops: bool
) -> None:
    """A fifth of the verdicts cannot be read: those completions are masked, and the run goes on. Three fifths:
    it stops with the cause."""
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(70 + sample % 5)
    garbled = tuple(f"{{{70 + number}}}" for number in range(num_garbled))
    judge = bench.fleet.scorer("coherence")
    judge.value = lambda item: None if item[1].endswith(garbled) else Judgement((3, 3, 0, 0))
    config = config_of(steps=2, completions_per_problem=5)
    config.reward.terms["coherence"].weight = 0.5
    if stops:
        with pytest.raises(TooManyMaskedError, match=r"coherence failed for 3 of the 5 .*60%.*3 x too_long"):
            made(bench, config)
        return
    rewards = [rollout.reward for rollout in made(bench, config).rollouts()]
    masked = [reward for reward in rewards if reward.masked]
    assert len(rewards) == 5 * len(masked) == 20
    assert all(reward.missing == {"coherence": "too_long"} for reward in masked)
    metrics = [row["values"] for row in read_jsonl(bench.store / "stage" / "metrics.jsonl")]
    assert [values["masked/coherence/too_long"] for values in metrics] == [2.0, 2.0]
    trained_rows = [len(batch) for batch, _ in bench.fleet.policy.trained]
    assert all(num_rows <= 8 for num_rows in trained_rows)  # of ten, without the two that are masked
