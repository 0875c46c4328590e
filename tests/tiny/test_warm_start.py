"""Training on the tiny world: its rows by themselves, then both tasks through the real actors."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pns.algo.judging import DIMENSIONS
from pns.commands.tiny import tiny_config
from pns.data.prompts import Prompts
from pns.files import read_json, read_jsonl, sha256_of_tree
from pns.run.page import RunPage
from pns.run.stage import Plan
from pns.run.tracking import METRICS, Tracker
from pns.stages.context import Context
from pns.stages.session import Session
from pns.tiny import warm_start, world
from pns.tiny.settings import Architecture, TinyTask, WarmStart
from pns.tiny.tokenizer import build_tokenizer
from pns.tiny.warm_start import (
    WarmStarted,
    agreement,
    fresh_problems,
    make_batch,
    mixed_candidates,
    save_untrained,
    warm_start_stage,
)
from workers.fleet import Fleet
from workers.runtime import Runtime
from workers.training.batching import Batch

SOLVER = str(Path(__file__).parents[2] / "recipes" / "tiny" / "qwen2")
SOLVE = WarmStart(steps=6, checkpoint_every=2)
JUDGE = WarmStart(task=TinyTask.judge, samples_from=SOLVER, steps=4, curriculum_steps=2, batch_size=8)
JUDGE.optimizer.learning_rate = 1.5e-3
STEP_JUDGE = WarmStart(
    task=TinyTask.step_judge, samples_from=SOLVER, steps=2, curriculum_steps=1, batch_size=8
)
# Of the first two above with seed 0, as the code that made the shipped models computed them (the judge's before it
# reads samples).
SOLVE_LOSSES = [4.190253, 4.085424, 4.030389, 3.885339, 3.721512, 3.633964]
JUDGE_LOSSES = [9.203466, 7.717806]

Make = Callable[..., WarmStarted]


class Interrupting(Tracker):
    """Ends the process, as Ctrl-C would, after step 3; the checkpoint after step 2 is written by then."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        if step == 2:
            until = time.monotonic() + 60
            while not list(self._path.parent.glob("checkpoints/*/.metadata")):
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(1)  # the file is there a moment before its writer says so
        if step == 3:
            raise KeyboardInterrupt


def own_context(seed: int = 0) -> Context:
    """One for what needs no actor."""
    prompts = Prompts(build_tokenizer(), tiny_config(WarmStart(), Path("out")).data)
    return Context(seed, *(cast(Any, None) for _ in range(2)), prompts, *(cast(Any, None) for _ in range(2)))


def texts(batch: Batch) -> list[tuple[str, str]]:
    decode = build_tokenizer().decode
    rows = zip(batch.prompt_ids, batch.completion_ids, strict=True)
    return [(decode(list(given)), decode(list(answer))) for given, answer in rows]


@pytest.mark.parametrize(
    ("task", "longest_by_step"),
    [
        (TinyTask.solve, {0: 2, 39: 2, 40: 3, 99: 3, 100: 4}),
        (TinyTask.judge, {0: 1, 19: 1, 20: 2, 49: 2, 50: 3, 99: 3, 100: 4}),
        (TinyTask.step_judge, {0: 1, 49: 1, 50: 2, 74: 2, 75: 3, 99: 3, 100: 4}),
    ],
)
def test_short_problems_come_first(task: TinyTask, longest_by_step: dict[int, int]) -> None:
    settings = WarmStart(task=task, curriculum_steps=100, batch_size=64)
    for step, longest in longest_by_step.items():
        problems = fresh_problems(own_context(), settings, step)
        solutions = [world.check(problem, str(problem.solution)) for problem in problems]
        assert max(len(solution.steps) for solution in solutions) == longest
    later = fresh_problems(own_context(), settings, 101)
    assert later != fresh_problems(own_context(), settings, 100)
    assert later == fresh_problems(own_context(), settings, 101)
    assert later != fresh_problems(own_context(seed=1), settings, 101)


def test_a_backbone_learns_solutions_with_their_end() -> None:
    rows = texts(make_batch(own_context(), WarmStart(batch_size=4), [], 0))
    problems = fresh_problems(own_context(), WarmStart(batch_size=4), 0)
    assert [answer for _, answer in rows] == [f"{problem.solution}<eos>" for problem in problems]
    assert all(problem.prompt in given for (given, _), problem in zip(rows, problems, strict=True))


def test_a_judge_learns_the_checkers_grades() -> None:
    problem = world.problems("train", None, 1, 0)[0]
    sampled = [(problem, "<think>no</think>\\boxed{1}")] * 8
    during = texts(make_batch(own_context(), JUDGE, sampled, 0))
    after = texts(make_batch(own_context(), JUDGE, sampled, 2))
    assert not any(problem.prompt in given for given, _ in during)
    own = [answer for given, answer in after if problem.prompt in given]
    assert set(own) == {"".join(map(str, world.rubric(*sampled[0])))}
    assert all(len(answer) == len(DIMENSIONS) for _, answer in [*during, *after])


def test_candidates_are_of_three_kinds() -> None:
    fresh = world.problems("train", None, 400, 0)
    sampled = [(problem, "sampled") for problem in fresh]
    candidates = mixed_candidates(fresh, sampled, random.Random(0))
    assert [problem for problem, _ in candidates] == fresh
    num_sampled = sum(text == "sampled" for _, text in candidates)
    num_right = sum(world.check(problem, text).correct for problem, text in candidates)
    assert num_sampled / 400 == pytest.approx(0.35, abs=0.08)
    assert num_right / 400 == pytest.approx(0.30, abs=0.08)
    without = [text for _, text in mixed_candidates(fresh, [], random.Random(0))]
    assert "sampled" not in without


def test_agreement_by_hand() -> None:
    full, none = (3, 3, 3, 3), (0, 0, 0, 0)
    quality = agreement([(full, full), ((3, 3, 3, 0), full), ((3, 0, 0, 0), none), (none, (3, 3, 0, 0))])
    assert quality == {
        "candidates": 4.0,
        "same_verdict": 0.25,
        "absolute_difference": pytest.approx((0 + 0.25 + 0.25 + 0.5) / 4),
        "mean_of_full_marks": pytest.approx((1 + 0.75) / 2),
        "mean_of_no_marks": pytest.approx(0.25),
    }


@pytest.mark.parametrize("architecture", Architecture)
def test_an_untrained_model_has_the_configured_shape(architecture: Architecture, tmp_path: Path) -> None:
    settings = WarmStart(architecture=architecture, hidden_size=24, layers=2, heads=6, key_value_heads=3)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        save_untrained(settings, seed, str(tmp_path / name))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    shape = model.config
    assert (shape.model_type, shape.num_hidden_layers, shape.head_dim) == (architecture.value, 2, 4)
    assert model.get_input_embeddings().weight.shape == (len(build_tokenizer()), 24)
    assert sha256_of_tree(tmp_path / "one") == sha256_of_tree(tmp_path / "same")
    assert sha256_of_tree(tmp_path / "one") != sha256_of_tree(tmp_path / "other")


@pytest.fixture(scope="module")
def fleet(ray_session: None) -> Iterator[Fleet]:
    fleet = Fleet(tiny_config(SOLVE, Path("out")), Runtime(start_timeout_seconds=240))
    yield fleet
    fleet.shutdown()


@pytest.fixture
def make(fleet: Fleet, tmp_path: Path) -> Make:
    """A function that makes a model in a page by its name, or goes on with it."""

    def make(name: str, settings: WarmStart, tracker_class: type[Tracker] = Tracker) -> WarmStarted:
        config, prompts = tiny_config(settings, tmp_path / name), own_context().prompts
        with RunPage.open(tmp_path / name) as page:
            plan = Plan(page.path / "stages", config, "prompts")
            made = plan(warm_start_stage(settings))
            (step,) = plan.steps
            tracker = tracker_class(page.path, config.tracking, cast(Any, None))
            Session(config, page, fleet, prompts, tracker).make(step)
            assert step.is_done()
        return made

    return make


def losses(made: WarmStarted) -> list[float]:
    return [row["values"]["loss"] for row in read_jsonl(made.directory / METRICS)]


def test_a_backbone_is_made_and_goes_on_where_it_was_interrupted(make: Make, tmp_path: Path) -> None:
    whole = make("whole", SOLVE)
    assert losses(whole) == pytest.approx(SOLVE_LOSSES, rel=1e-3)
    with pytest.raises(KeyboardInterrupt):
        make("broken", SOLVE, Interrupting)
    (place,) = (tmp_path / "broken" / "stages").glob("warm_start-*")
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000002"]
    resumed = make("broken", SOLVE)
    assert losses(resumed) == losses(whole)
    assert sha256_of_tree(Path(resumed.model)) == sha256_of_tree(Path(whole.model))
    model = AutoModelForCausalLM.from_pretrained(whole.model)
    assert model.num_parameters() == 794_496
    assert AutoTokenizer.from_pretrained(whole.model).get_vocab() == build_tokenizer().get_vocab()


def test_a_judge_is_made_from_the_samples_of_a_model_and_measured(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "NUM_GRADED", {"train": 24, "reward": 12})
    made = make("judge", JUDGE)
    assert losses(made)[:2] == pytest.approx(JUDGE_LOSSES, rel=1e-3)
    assert len(losses(made)) == 4
    sampled = [read_jsonl(made.samples_file(split)) for split in ("train", "reward")]
    assert [len({row["problem"]["id"] for row in rows}) for rows in sampled] == [24, 12]
    assert any("\\boxed{" in row["text"] for row in sampled[0])
    quality = read_json(made.quality_file)
    assert quality["candidates"] == 12
    assert 0 <= quality["same_verdict"] <= 1
    assert all(value is None or math.isfinite(value) for value in quality.values())


def test_a_step_judge_is_made_and_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "NUM_GRADED", {"train": 16, "reward": 12})
    made = make("step_judge", STEP_JUDGE)
    assert len(losses(made)) == 2
    quality = read_json(made.quality_file)
    assert quality["completions"] <= 12
    assert quality["steps"] > quality["completions"]
    assert quality["sampled_wrong_completions"] < 12
