"""The tiny process reward model: its rows, its figures, a short training, and the shipped one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pns.commands.tiny import tiny_config
from pns.data.prompts import Prompts
from pns.errors import UserError
from pns.files import read_json, read_jsonl
from pns.records import Problem
from pns.run.page import RunPage
from pns.run.stage import Plan
from pns.run.tracking import METRICS, Tracker
from pns.stages.context import Context
from pns.stages.session import Session
from pns.tiny import warm_start, world
from pns.tiny.process_reward import labelled_steps, process_reward_stage, step_batch, step_quality
from pns.tiny.settings import TinyTask, WarmStart, check_settings
from pns.tiny.tokenizer import build_tokenizer
from workers.fleet import Fleet
from workers.rewards.process_reward import ProcessReward
from workers.runtime import Runtime

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
SOLVER = str(TINY / "qwen2")
SETTINGS = WarmStart(
    task=TinyTask.process_reward, samples_from=SOLVER, steps=3, curriculum_steps=1, batch_size=8
)
CPU = Runtime(start_timeout_seconds=240)
PROBLEM = Problem(
    "p", "Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. How many has Eve? ", "57", "base"
)


def own_context() -> Context:
    """One for what needs no actor."""
    prompts = Prompts(build_tokenizer(), tiny_config(SETTINGS, Path("out")).data)
    return Context(0, *(cast(Any, None) for _ in range(2)), prompts, *(cast(Any, None) for _ in range(2)))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("<think>Cal has 12+7=19. |So Eve has 19*3=57. |</think>\\boxed{57}", [1, 1, 1]),
        # An error of its own, one that is carried on, and the answer that follows from both.
        ("<think>Cal has 12+7=18. |So Eve has 18*3=54. |</think>\\boxed{54}", [0, 0, 0]),
        ("<think>Cal has 12+7=19. |So Eve has 19+3=22. |</think>\\boxed{22}", [1, 0, 0]),
        ("<think>Cal has 12+7=19. |Cal has 12+7=19. |So Eve has 19*3=57. |</think>\\boxed{57}", [1, 0, 1, 1]),
        ("<think>Cal has 12+7=19. |So Eve has 19*3=57. |</think>\\boxed{19}", [1, 1, 0]),
        ("<think>Cal has 12+7=19. |So Eve 19*3=57. |</think>\\boxed{57}", [1, 0, 0]),
        ("Cal has 12+7=19. ", [0]),
    ],
)
def test_every_step_has_the_checkers_label(text: str, labels: list[int]) -> None:
    steps = labelled_steps(PROBLEM, text.replace("|", ""))
    assert [step for step, _ in steps] == text.split("|")
    assert [is_right for _, is_right in steps] == [bool(label) for label in labels]


def test_a_row_ends_with_the_step_that_is_graded() -> None:
    ctx, decode = own_context(), build_tokenizer().decode
    text = "<think>Cal has 12+7=19. So Eve has 19+3=22. </think>\\boxed{22}"
    batch = step_batch(ctx, [(PROBLEM, text), (PROBLEM, "")])
    assert batch.prompt_ids == [ctx.prompts.encode(PROBLEM)] * 3
    begun = [decode(list(ids)) for ids in batch.completion_ids]
    assert begun == [text[: text.index("So")], text[: text.index("</think>")], text]
    assert batch.row_values == {"label": [1.0, 0.0, 0.0]}


def test_step_quality_by_hand() -> None:
    measured = step_quality([0.9, 0.8, 0.2, 0.7, 0.1], [1, 1, 1, 0, 0])
    assert measured == {
        "steps": 5.0,
        "correct_share": pytest.approx(3 / 5),
        "accuracy": pytest.approx(3 / 5),
        "balanced_accuracy": pytest.approx((2 / 3 + 1 / 2) / 2),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        # Chance: .6 x .6 + .4 x .4.
        "kappa": pytest.approx((0.6 - 0.52) / 0.48),
        "auroc": pytest.approx(5 / 6),
    }


def test_a_grader_of_steps_needs_a_model_that_it_grades() -> None:
    with pytest.raises(UserError, match="samples_from is empty: name the model whose samples"):
        check_settings(WarmStart(task=TinyTask.process_reward))


@pytest.fixture(scope="module")
def fleet(ray_session: None) -> Iterator[Fleet]:
    fleet = Fleet(tiny_config(SETTINGS, Path("out")), CPU)
    yield fleet
    fleet.shutdown()


def test_a_process_reward_model_is_made_and_measured_as_it_will_be_served(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "NUM_GRADED", {"train": 24, "reward": 12})
    config, prompts = tiny_config(SETTINGS, tmp_path / "made"), own_context().prompts
    with RunPage.open(tmp_path / "made") as page:
        plan = Plan(page.path / "stages", config, "prompts")
        made = plan(process_reward_stage(SETTINGS))
        (step,) = plan.steps
        tracker = Tracker(page.path, config.tracking, cast(Any, None))
        Session(config, page, fleet, prompts, tracker).make(step)
    losses = [row["values"]["loss"] for row in read_jsonl(made.directory / METRICS)]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(2), abs=0.5)
    quality = read_json(made.quality_file)
    assert (
        quality["candidates"].keys() == quality["sampled_wrong"].keys() == step_quality([1, 0], [1, 0]).keys()
    )
    text = "<think>Cal has 12+7=19. So Eve has 19+3=22. </think>\\boxed{22}"
    steps = tuple(sentence for sentence, _ in labelled_steps(PROBLEM, text))
    (outcome,) = ProcessReward(made.model, CPU).score([(prompts.messages(PROBLEM), steps)])
    scores = np.array(fleet.policy.scores(step_batch(own_context(), [(PROBLEM, text)])))
    assert outcome.value == pytest.approx(1 / (1 + np.exp(-scores)), abs=1e-5)


def test_the_shipped_model_knows_right_steps() -> None:
    fresh = world.problems("test", None, 60, 0)
    model = ProcessReward(str(TINY / "process_reward"), CPU)
    prompts = own_context().prompts
    probabilities, labels = [], []
    rng = random.Random(0)
    for problem in fresh:
        steps = labelled_steps(
            problem, world.mixed_solution(problem, rng, {"times": 0.6, "fewer": 0.6}, 0, 0)
        )
        sentences = tuple(sentence for sentence, _ in steps)
        (outcome,) = model.score([(prompts.messages(problem), sentences)])
        if outcome.value:
            probabilities += outcome.value
            labels += [float(is_right) for _, is_right in steps]
    assert step_quality(probabilities, labels)["auroc"] > 0.8
