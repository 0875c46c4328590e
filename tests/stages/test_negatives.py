"""Where rejected sides come from: the stages that each source adds, and rejection sampling itself."""

from __future__ import annotations

from typing import Any

import pytest

from pns.config import Config, GeneratorStart, Synthesize
from pns.errors import UserError
from pns.run.stage import Contents, ModelFiles, Plan
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.context import Problems, Suites, World
from pns.stages.negatives import SOURCES, rejection_sample


def planned(bench: Any, config: Config, source: str) -> tuple[Plan, Negatives]:
    """The plan after `source` has added its stages."""
    plan = Plan(bench.store, config, "", contents=Contents(None))
    suites = Suites({}, {}, {}, config.data)
    world = World(ModelFiles("backbone"), bench.problems(3), Problems([]), bench.problems(2), suites)
    target = TrainedModel(bench.store / "rl-0", "target's digest")
    rewards = RewardModels(bench.store / "rewards-0", "rewards' digest")
    return plan, SOURCES[source](plan, config, world, target, rewards)


def test_plausible_negatives_are_a_generator_and_what_it_writes(bench: Any) -> None:
    plan, negatives = planned(bench, Config(), "pns")
    reverse, synthesis = plan.steps
    assert [reverse.name, synthesis.name] == ["reverse_rl", "synthesize"]
    assert negatives.directory == synthesis.place.directory
    start, solved, rewards, train, measured = reverse.inputs
    assert solved is None
    assert start.directory == bench.store / "rl-0"
    assert (len(train.problems), len(measured.problems)) == (3, 2)
    generator, same_rewards, problems = synthesis.inputs
    assert generator.directory == reverse.place.directory
    assert same_rewards is rewards
    assert problems is measured


def test_a_refreshed_reward_model_sees_what_the_target_solved(bench: Any) -> None:
    config = Config()
    config.reverse_rl.refresh_every = 5
    plan, _ = planned(bench, config, "pns")
    assert plan.steps[0].inputs[1].directory == bench.store / "rl-0"


@pytest.mark.parametrize(
    ("start", "model"), [(GeneratorStart.backbone, "backbone"), (GeneratorStart.path, "own/generator")]
)
def test_the_generator_can_start_elsewhere(bench: Any, start: GeneratorStart, model: str) -> None:
    config = Config()
    config.reverse_rl.start, config.models.generator = start, "own/generator"
    plan, _ = planned(bench, config, "pns")
    assert plan.steps[0].inputs[0].model == model


def test_rejection_sampling_is_one_stage_under_the_same_name(bench: Any) -> None:
    plan, negatives = planned(bench, Config(), "rs")
    [step] = plan.steps
    assert step.name == "synthesize"
    assert step.roles == ("rollout", "verifier")
    assert negatives.directory == step.place.directory
    target, problems = step.inputs
    assert target.directory == bench.store / "rl-0"
    assert len(problems.problems) == 2


def sampled(bench: Any, texts: list[str], **changes: Any) -> Negatives:
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample]
    config = Config(synthesize=Synthesize(samples_per_problem=len(texts), **changes))
    with bench.making() as ctx:
        settings = rejection_sample.settings(config)
        return rejection_sample.make(ctx, settings, TrainedModel(bench.store / "rl"), bench.problems(1))


def test_rejection_sampling_keeps_the_targets_own_wrong_completions(bench: Any) -> None:
    texts = [bench.solution(10), bench.solution(11), bench.malformed, bench.solution(12)]
    negatives = sampled(bench, texts)
    assert [kept.completion.text for kept in negatives.negatives()] == [texts[1], texts[3]]
    assert bench.fleet.rollout.loaded == [str(bench.store / "rl" / "model")]
    assert not bench.fleet.scorers  # the ordinary reward
    assert (bench.counts()["correct"], bench.counts()["malformed"], bench.counts()["kept"]) == (1, 1, 2)


def test_rejection_sampling_has_no_quantile_of_a_term_that_it_does_not_compute(bench: Any) -> None:
    negatives = sampled(bench, [bench.solution(11)], min_quantile=0.9)
    assert len(negatives.negatives()) == 1


def test_a_target_that_is_always_right_has_no_negatives(bench: Any) -> None:
    with pytest.raises(UserError, match=r"no negative was kept .*sample more per problem"):
        sampled(bench, [bench.solution(10)])
