"""Where rejected sides come from: the stages that each source adds, and rejection sampling itself."""

from __future__ import annotations

from typing import Any

import pytest

from pns.config import Config, GeneratorStart, Mixture, Synthesize
from pns.errors import UserError
from pns.files import read_json, write_jsonl
from pns.records import Completion, Reward, Rollout, Verdict
from pns.run.stage import Contents, ModelFiles, Plan
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.context import Problems, Suites, World
from pns.stages.negatives import SOURCES, mix, rejection_sample


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
    generator, same_rewards, problems, target = synthesis.inputs
    assert target is start
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


def test_rejection_sampling_too_can_keep_a_range_of_log_probabilities(bench: Any) -> None:
    bench.fleet.policy.log_prob = lambda token_ids: -float(len(token_ids))
    short, long = bench.solution(11), bench.solution(12, "So Ann=3. " * 2)
    bound = -float(len(bench.prompts.encode_completion(short)))
    negatives = sampled(bench, [short, long], min_log_prob=bound)
    assert [kept.completion.text for kept in negatives.negatives()] == [short]
    assert bench.counts()["log_prob_out_of_range"] == 1
    settings = rejection_sample.settings(Config(synthesize=Synthesize(min_log_prob=bound)))
    assert rejection_sample.roles(settings) == ("rollout", "verifier", "policy")


def test_a_target_that_is_always_right_has_no_negatives(bench: Any) -> None:
    with pytest.raises(UserError, match=r"no negative was kept .*sample more per problem"):
        sampled(bench, [bench.solution(10)])


def test_a_mixture_is_its_sources_and_their_union(bench: Any) -> None:
    plan, negatives = planned(bench, Config(), "mixed")
    names = ["reverse_rl_pns", "synthesize_pns", "synthesize_rs", "synthesize"]
    assert [step.name for step in plan.steps] == names
    assert [step.asked_as for step in plan.steps] == ["reverse_rl", "synthesize", "synthesize", "synthesize"]
    assert negatives.directory == plan.steps[-1].place.directory
    assert plan.steps[-1].roles == ()
    [parts] = plan.steps[-1].inputs
    assert {name: part.directory for name, part in parts.items()} == {
        "pns": plan.steps[1].place.directory,
        "rs": plan.steps[2].place.directory,
    }
    for source, index in (("pns", 1), ("rs", 2)):  # runs of one source alone make the same
        assert planned(bench, Config(), source)[1].directory == plan.steps[index].place.directory


def test_a_mixture_of_generators_from_several_starts(bench: Any) -> None:
    starts = [GeneratorStart.target, GeneratorStart.backbone]
    config = Config(mixture=Mixture(["pns"], starts))
    plan, _ = planned(bench, config, "mixed")
    steps = {step.name: step for step in plan.steps}
    assert list(steps) == [
        *("reverse_rl_pns_target", "synthesize_pns_target"),
        *("reverse_rl_pns_backbone", "synthesize_pns_backbone", "synthesize"),
    ]
    assert steps["reverse_rl_pns_target"].inputs[0].directory == bench.store / "rl-0"
    assert steps["reverse_rl_pns_backbone"].inputs[0].model == "backbone"
    assert config.reverse_rl.start is GeneratorStart.target
    config.reverse_rl.start = GeneratorStart.backbone
    own, _ = planned(bench, config, "pns")
    assert own.steps[0].place.directory == steps["reverse_rl_pns_backbone"].place.directory


def test_the_union_takes_turns_and_keeps_one_of_the_same(bench: Any) -> None:
    def part(name: str, answers: dict[str, list[int]]) -> Negatives:
        negatives = Negatives(bench.store / name)
        negatives.directory.mkdir(parents=True)
        problems = bench.problems(2).by_id
        rollouts = []
        for problem, own in answers.items():
            for number, answer in enumerate(own):
                completion = Completion(
                    f"{problem}#{number}", problem, bench.solution(answer), (1,), (), "stop"
                )
                rollouts.append(Rollout(0, problems[problem], completion, Reward(0.0, True, Verdict.WRONG)))
        write_jsonl(negatives.negatives_file, rollouts)
        return negatives

    parts = {
        "pns": part("one", {"p0": [20, 21, 22], "p1": [30]}),
        "rs": part("two", {"p0": [21, 24], "p1": [31]}),
    }
    with bench.making() as ctx:
        negatives = mix.make(ctx, None, parts)
    kept = negatives.negatives()
    # p0: pns begins, and its 21 is there already; p1: rs begins.
    assert [rollout.completion.id for rollout in kept] == [
        *("pns/p0#0", "rs/p0#0", "rs/p0#1", "pns/p0#2"),
        *("rs/p1#0", "pns/p1#0"),
    ]
    assert negatives.sources()["rs/p0#1"] == "rs"
    counts = {"kept_pns": 3, "kept_rs": 3, "duplicate_pns": 1, "duplicate_rs": 0}
    assert read_json(negatives.counts_file) == counts
    assert bench.counts() == {"kept": 6, **counts}
