"""Labels of steps: what is asked of whom, the consensus, the checker's word, and what an interruption keeps."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from pns.algo.masks import TooManyMaskedError
from pns.config import SegmentRules, SplitterKind, StepJudgeConfig, StepRule
from pns.errors import UserError
from pns.files import read_json, write_jsonl
from pns.records import LabelledCompletion
from pns.run.stage import ModelFiles
from pns.stages.artefacts import Negatives, Samples, StepLabels
from pns.stages.context import Problems
from pns.stages.label_steps import LabelSettings, label_steps
from pns.stages.sample import SampleSettings, sample
from pns.tiny import world

SEGMENTS = SegmentRules(SplitterKind.sentences, min_tokens=1, max_tokens=40)
BOTH = LabelSettings(SEGMENTS, StepRule.both, StepJudgeConfig(model="judge"), "prm", 0.5, True, 0.2)
WRONG = "<think>Cal has 12+7=19. Eve has 19*2=38. </think>\\boxed{38}"


def problems_of_chains(num: int) -> Problems:
    text = "Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. How many has Eve? "
    own = [world.Problem(f"p{number}", text, "57") for number in range(num)]
    return Problems(own, world.StepChecker())


def sampled(bench: Any, write: Any, num_problems: int = 2) -> tuple[Samples, Problems]:
    """Two completions of each problem."""
    problems = problems_of_chains(num_problems)
    bench.fleet.rollout.write = lambda problem, number, model: write(problem, number)
    with bench.making("sample") as ctx:
        made = sample.make(ctx, SampleSettings(2, 1.0, 60, 0.2), ModelFiles("policy"), problems)
    return made, problems


def right_and_wrong(problem: str, number: int) -> str:
    return WRONG if number % 2 else "<think>So Cal has 12+7=19. Eve has 19*3=57. </think>\\boxed{57}"


def say(bench: Any, judge: Any, process_reward: Any) -> None:
    bench.fleet.scorer("step_judge").value = lambda item: judge(item[1])
    bench.fleet.scorer("process_reward").value = lambda item: process_reward(item[1])


def labelled(
    bench: Any, settings: LabelSettings, made: tuple[Samples, Problems], **others: Any
) -> StepLabels:
    samples, problems = made
    with bench.making("labels") as ctx:
        return label_steps.make(ctx, settings, samples, others, problems)


def test_each_step_has_both_labels_their_consensus_and_the_checkers_word(bench: Any) -> None:
    say(bench, lambda steps: (True, True, True), lambda steps: (0.9, 0.4, 0.9))
    labels = labelled(bench, BOTH, sampled(bench, right_and_wrong))
    rows = labels.labels()
    assert [row.completion_id for row in rows] == ["p0#1", "p1#3"]
    texts = [WRONG[step.start : step.end] for step in rows[0].steps]
    assert texts == ["<think>Cal has 12+7=19. ", "Eve has 19*2=38. ", "</think>\\boxed{38}"]
    assert "".join(texts) == WRONG
    assert [(step.judge, step.process_reward, step.correct, step.exact) for step in rows[0].steps] == [
        (True, 0.9, True, True),
        (True, 0.4, False, False),
        (True, 0.9, False, False),  # the final answer, whatever they say
    ]
    assert rows[0].steps[0].first_token == 0
    assert all(a.end_token == b.first_token for a, b in zip(rows[0].steps, rows[0].steps[1:], strict=False))
    judged, scored = (bench.fleet.scorer(name).asked for name in ("step_judge", "process_reward"))
    assert judged[0] == (
        "Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. How many has Eve? ",
        tuple(texts),
    )
    assert scored[0] == ([{"role": "user", "content": judged[0][0]}], tuple(texts))
    quality = read_json(labels.quality_file)
    assert (quality["completions"], quality["steps"], quality["steps_per_completion"]) == (2, 4, 2)
    assert quality["correct_share"] == 0.5
    assert quality["agreement"]["agreement"] == 0.5
    assert quality["exact"]["consensus"]["kappa"] == 1
    assert quality["exact"]["judge"] == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 1,
        "f1": pytest.approx(2 / 3),
        "kappa": 0,
    }


def test_a_carried_error_is_wrong_and_what_is_not_built_on_it_is_right(bench: Any) -> None:
    text = (
        "Bob has 12. Fay has 2. Cal has 7 more than Bob. Gus has 3 times Fay. Eve has Cal plus Gus. "
        "How many has Eve? "
    )
    problems = Problems([world.Problem("p0", text, "25")], world.StepChecker())
    wrong = "<think>Cal has 12+7=20. Gus has 2*3=6. Eve has 20+6=26. </think>\\boxed{26}"
    right = "<think>Cal has 12+7=19. Gus has 2*3=6. Eve has 19+6=25. </think>\\boxed{25}"
    bench.fleet.rollout.write = lambda problem, number, model: wrong if number else right
    with bench.making("sample") as ctx:
        samples = sample.make(ctx, SampleSettings(2, 1.0, 60, 0.2), ModelFiles("policy"), problems)
    say(bench, lambda steps: (True,) * len(steps), lambda steps: (1.0,) * len(steps))
    [row] = labelled(bench, BOTH, (samples, problems)).labels()
    assert [step.exact for step in row.steps] == [False, True, False, False]


def test_segments_are_the_checkers_steps_and_a_box() -> None:
    from pns.algo.segments import segment, sentences

    rng = Random(0)
    for problem in world.problems("reward", None, 200, seed=1):
        text = world.corrupt(
            problem, rng, rng.choice(("arithmetic", "operator", "operand", "entity", "query"))
        )
        checked = world.check(problem, text)
        if checked.format_ok:
            offsets = [(number, number + 1) for number in range(len(text))]
            found = segment(text, offsets, 1, 200, sentences)
            assert [own.end for own in found] == [*(step.end for step in checked.steps), len(text)]


def test_one_service_alone_is_asked_alone(bench: Any) -> None:
    settings = LabelSettings(SEGMENTS, StepRule.process_reward, None, "prm", 0.5, True, 0.2)
    assert settings.services == ("process_reward",)
    say(bench, lambda steps: pytest.fail("not asked"), lambda steps: (0.5, 0.4, 0.4))
    labels = labelled(bench, settings, sampled(bench, right_and_wrong))
    assert [step.correct for step in labels.labels()[0].steps] == [True, False, False]
    assert "agreement" not in read_json(labels.quality_file)
    assert set(read_json(labels.quality_file)["exact"]) == {"process_reward", "consensus"}


def test_a_failure_leaves_a_completion_unlabelled_and_too_many_stop_the_run(bench: Any) -> None:
    fails = iter([True, *[False] * 9])
    say(bench, lambda steps: None if next(fails) else (True,) * 3, lambda steps: (1.0,) * 3)
    made = sampled(bench, right_and_wrong, num_problems=6)
    labels = labelled(bench, BOTH, made)
    first, second, *_ = labels.labels()
    assert (first.missing, second.missing) == ({"step_judge": "too_long"}, {})
    assert not any(step.correct for step in first.steps)
    assert read_json(labels.quality_file)["missing"] == {"step_judge": {"too_long": 1}}
    say(bench, lambda steps: None, lambda steps: (1.0,) * 3)
    with (
        pytest.raises(TooManyMaskedError, match="step_judge failed for 6 of"),
        bench.making("failing") as ctx,
    ):
        label_steps.make(ctx, BOTH, made[0], {}, made[1])
    # Once the service answers, the same stage goes on: what failed is asked again.
    say(bench, lambda steps: (True,) * 3, lambda steps: (1.0,) * 3)
    with bench.making("failing") as ctx:
        again = label_steps.make(ctx, BOTH, made[0], {}, made[1])
    assert [row.missing for row in again.labels()] == [{}] * 6


def test_an_interruption_asks_only_for_the_rest(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pns.stages.label_steps._CHUNK", 2)
    say(bench, lambda steps: (True,) * 3, lambda steps: (1.0,) * 3)
    made = sampled(bench, right_and_wrong, num_problems=5)
    collect, calls = bench.fleet.scorer("step_judge").collect, []

    def interrupted(handle: Any) -> Any:
        calls.append(handle)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return collect(handle)

    bench.fleet.scorer("step_judge").collect = interrupted
    with pytest.raises(KeyboardInterrupt):
        labelled(bench, BOTH, made)
    bench.fleet.scorer("step_judge").asked.clear()
    labels = labelled(bench, BOTH, made)
    assert len(bench.fleet.scorer("step_judge").asked) == 3
    assert [row.completion_id for row in labels.labels()] == ["p0#1", "p1#3", "p2#5", "p3#7", "p4#9"]


def test_negatives_of_other_sources_are_labelled_under_their_source(bench: Any) -> None:
    samples, problems = sampled(bench, right_and_wrong, num_problems=1)
    negatives = Negatives(bench.store / "negatives")
    negatives.directory.mkdir()
    write_jsonl(negatives.negatives_file, [own for own in samples.rollouts() if own.reward.value == 0])
    say(bench, lambda steps: (True,) * 3, lambda steps: (1.0,) * 3)
    labels = labelled(bench, BOTH, (samples, problems), pns=negatives)
    assert [row.completion_id for row in labels.labels()] == ["p0#1", "pns/p0#1"]
    without = LabelSettings(SEGMENTS, StepRule.both, StepJudgeConfig(model="judge"), "prm", 0.5, False, 0.2)
    with bench.making("others") as ctx:
        rows: list[LabelledCompletion] = label_steps.make(
            ctx, without, samples, {"pns": negatives}, problems
        ).labels()
    assert [row.completion_id for row in rows] == ["pns/p0#1"]


def test_nothing_wrong_is_one_line(bench: Any) -> None:
    made = sampled(bench, lambda problem, number: right_and_wrong(problem, 0))
    with pytest.raises(UserError, match="label_steps: none of 4 completions is wrong"):
        labelled(bench, BOTH, made)
