"""Sources that train no generator: hard negatives by selection, changed right solutions, a prompt, a file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pns.algo.negatives import box_only_flip
from pns.answers.extract import extract_boxed
from pns.config import Config, Sources, Synthesize
from pns.errors import UserError
from pns.files import write_jsonl
from pns.run.stage import Contents, ModelFiles, Plan
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.baselines import corrupted, corrupted_text, given, hardest, prompted, read_given
from pns.stages.context import Problems, Suites, World
from pns.stages.negatives import SOURCES, rejection_sample


def wrong_samples(bench: Any, write: Any, num_problems: int, samples_per_problem: int) -> Negatives:
    bench.fleet.rollout.write = write
    config = Config(synthesize=Synthesize(samples_per_problem=samples_per_problem))
    with bench.making("sampled") as ctx:
        settings, target = rejection_sample.settings(config), TrainedModel(bench.store / "rl")
        return rejection_sample.make(ctx, settings, target, bench.problems(num_problems))


def test_every_source_ends_in_a_stage_called_synthesize(bench: Any) -> None:
    suites = Suites({}, {}, {}, Config().data)
    world = World(ModelFiles("backbone"), Problems([]), Problems([]), bench.problems(2), suites)
    target, rewards = TrainedModel(bench.store / "rl-0"), RewardModels(bench.store / "rewards-0")
    for source, plan_source in SOURCES.items():
        plan = Plan(bench.store, Config(), "", contents=Contents(None))
        negatives = plan_source(plan, Config(), world, target, rewards)
        assert plan.steps[-1].asked_as == "synthesize", source
        assert negatives.directory == plan.steps[-1].place.directory


def test_of_each_problem_the_negative_is_kept_that_the_reward_model_likes_best(bench: Any) -> None:
    def write(problem: str, sample: int, model: str) -> str:
        return bench.solution(70 + sample, "So Ann=3. " * (1 + sample % 3))

    sampled = wrong_samples(bench, write, 2, 3)
    longest = max(len(own.completion.token_ids) for own in sampled.negatives())
    bench.fleet.scorer("plausibility").value = lambda ids: None if len(ids) > 60 else float(len(ids))
    with bench.making("hardest") as ctx:
        settings = hardest.settings(Config())
        kept = hardest.make(ctx, settings, sampled, RewardModels(bench.store / "rewards")).negatives()
    assert [own.problem.id for own in kept] == ["p0", "p1"]
    assert {len(own.completion.token_ids) for own in kept} == {longest}
    assert bench.counts("hardest")["not_hardest"] == 4
    assert bench.fleet.scorer("plausibility").loaded[-1].endswith("main")


def test_a_right_solution_is_changed_in_its_reasoning_and_its_answer(bench: Any) -> None:
    steps = "So Dan=3+4=7. So Ann=7+3=10. "
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10, steps)
    config, target = Config(synthesize=Synthesize(samples_per_problem=4)), TrainedModel(bench.store / "rl")
    with bench.making() as ctx:
        kept = corrupted.make(ctx, corrupted.settings(config), target, bench.problems(1)).negatives()
    assert len(kept) > 1
    for own in kept:  # the second checker of negatives would drop a box alone
        text = own.completion.text
        assert extract_boxed(text) != "10"
        assert text.partition("</think>")[0] != f"<think>{steps}"
        assert not box_only_flip(text, "10")
        assert bench.prompts.encode_completion(text) == own.completion.token_ids


def test_a_changed_number_is_carried_on_and_nothing_before_it_changes() -> None:
    text = "<think>So Eve has 2.5. So Ann=3+7=10. So Dan=10+2=12. </think>\\boxed{12}"
    for seed in range(50):
        changed = corrupted_text(text, random.Random(seed))
        assert changed is not None
        first = next(place for place, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b)
        assert changed[:first] == text[:first]
        assert "2.5" in changed  # part of a decimal is no whole number
        assert extract_boxed(changed) != "12"
        if "+7=10." not in changed and changed.startswith(text[: text.index("10.")]):
            assert "Dan=10+" not in changed  # what Ann has was drawn, and is carried on
    assert corrupted_text("no box 3", random.Random(0)) is None
    assert corrupted_text("<think>none</think>\\boxed{3}", random.Random(0)) is None


def test_the_backbone_is_told_to_end_wrong_and_pairs_are_of_the_problem_alone(bench: Any) -> None:
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(55 + sample)
    config = Config(synthesize=Synthesize(samples_per_problem=2), sources=Sources(instruction="How many? "))
    problems = bench.problems(2)
    with bench.making() as ctx:
        settings = prompted.settings(config)
        kept = prompted.make(ctx, settings, ModelFiles("backbone"), problems).negatives()
    assert [own.problem for own in kept] == [problems.problems[0]] * 2 + [problems.problems[1]] * 2
    assert bench.fleet.rollout.loaded == ["backbone"]


def test_negatives_of_a_file_are_verified_like_all_others(bench: Any, tmp_path: Path) -> None:
    problems, file = bench.problems(2), tmp_path / "own.jsonl"
    prompt = problems.problems[1].prompt
    rows = [
        ("p0", bench.solution(11)),
        ("p0", bench.solution(10)),
        (prompt, bench.solution(3)),
        ("x", "y"),
        ("p1", bench.malformed),
    ]
    write_jsonl(file, [{"problem": problem, "completion": text} for problem, text in rows])
    with bench.making() as ctx:
        settings = given.settings(Config(sources=Sources(file=str(file))))
        kept = given.make(ctx, settings, problems).negatives()
    assert [(own.problem.id, own.completion.text) for own in kept] == [
        ("p0", bench.solution(11)),
        ("p1", bench.solution(3)),
    ]
    assert (bench.counts()["correct"], bench.counts()["malformed"]) == (1, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "p0"}, 'line 1: needs "problem"'),
        ({"problem": "p0", "completion": " "}, 'line 1: needs "problem"'),
        ({"problem": "other", "completion": "text"}, "none of its problems"),
    ],
)
def test_a_file_without_use_is_refused(bench: Any, tmp_path: Path, row: dict[str, str], said: str) -> None:
    write_jsonl(tmp_path / "own.jsonl", [row])
    with pytest.raises(UserError, match=said):
        read_given(tmp_path / "own.jsonl", bench.problems(1).problems)
