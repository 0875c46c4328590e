"""The bcpg stage on given samples, in one set of training processes: every objective, what it trains on, resume,
and what it cannot train on."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pns import recipe
from pns.algo.offline import offline_samples
from pns.config import Config
from pns.driver import load_prompts
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_jsonl
from pns.offline_objectives import OFFLINE_OBJECTIVES
from pns.records import Completion, LabelledCompletion, LabelledStep, Problem, Reward, Rollout, Verdict
from pns.run.place import Place
from pns.run.stage import ModelFiles
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages.artefacts import Negatives, Samples, StepLabels
from pns.stages.bcpg import BcpgSettings, bcpg, bcpg_settings, choose_rows
from pns.stages.context import Context
from pns.tiny import world as tiny_world
from workers.fleet import Fleet
from workers.runtime import Runtime

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes" / "tiny" / "qwen2"
SMALL = ["placement.policy.replicas=1", "bcpg.steps=3", "bcpg.problems_per_step=4"]


def load(objective: str, *overrides: str) -> Config:
    """The tiny recipe with one arm, which has the name of the default's."""
    arm = f"bcpg.arms.nsa.objective={objective}"
    models = [f"bcpg.{service}.model={MODEL}" for service in ("step_judge", "process_reward")]
    base = ["method=bcpg", f"models.backbone={MODEL}", arm, *models]
    return recipe.load(ROOT / "recipes/tiny-qwen2.yaml", [*base, *SMALL, *overrides])


def rollout(problem: Problem, name: str, text: str, value: float | None) -> Rollout:
    ids = load_prompts(load("rft")).encode_completion(text)
    completion = Completion(name, problem.id, text, ids, (-0.5,) * len(ids), "stop")
    verdict = Verdict.CORRECT if value == 1 else Verdict.WRONG
    return Rollout(0, problem, completion, Reward(value, True, verdict))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, StepLabels, Negatives]:
    """Of four problems a right completion and two wrong ones, whose first three tokens are labelled as a correct
    step; the last one's labels are missing. A masked completion. A negative from elsewhere for the first."""
    root = tmp_path_factory.mktemp("given")
    samples, labels, negatives = Samples(root), StepLabels(root), Negatives(root)
    problems, rollouts, labelled = tiny_world.problems("preference", None, 4, 0), [], []
    for problem in problems:
        assert problem.solution
        rollouts.append(rollout(problem, f"{problem.id}#0", problem.solution, 1.0))
        for number in (1, 2):
            wrong = problem.solution.replace(f"{problem.answer}}}", f"{int(problem.answer) + number}}}")
            rollouts.append(rollout(problem, f"{problem.id}#{number}", wrong, 0.0))
            completion = rollouts[-1].completion
            num_tokens = len(completion.token_ids)
            steps = LabelledStep(0, 9, 0, 3, correct=True), LabelledStep(9, len(wrong), 3, num_tokens)
            labelled.append(LabelledCompletion(completion.id, problem.id, steps))
    labelled[-1] = replace(labelled[-1], steps=(), missing={"step_judge": "deadline"})
    rollouts.append(rollout(problems[0], "masked", "text", None))
    write_jsonl(samples.rollouts_file, rollouts)
    write_jsonl(labels.labels_file, labelled)
    write_jsonl(negatives.negatives_file, [rollouts[1]])
    return samples, labels, negatives


@pytest.fixture(scope="module")
def fleet(ray_session: None) -> Iterator[Fleet]:
    made = Fleet(load("rft"), Runtime("cpu"))
    yield made
    made.shutdown()


Train = Callable[..., tuple[Path, list[dict[str, Any]]]]


def no_backends(*_: Any) -> Any:
    raise AssertionError("no tracking backend is asked for")


@pytest.fixture
def train(fleet: Fleet, given: tuple[Samples, StepLabels, Negatives], tmp_path: Path) -> Train:
    """`train(objective, override, ...)` runs the stage, and gives its directory and the metrics of its steps."""
    samples, labels, _ = given

    def run(objective: str, *overrides: str, name: str = "") -> tuple[Path, list[dict[str, Any]]]:
        config = load(objective, *overrides)
        place = Place(tmp_path / (name or objective))
        with place.making({"inputs": []}):
            tracker = Tracker(tmp_path, config.tracking, no_backends, terminal=PlainTerminal(io.StringIO()))
            tracker.enter(place.directory)
            ctx = Context(config.seed, place, fleet, load_prompts(config), tracker, shared=tmp_path)
            read = labels if OFFLINE_OBJECTIVES[objective].reads_steps else None
            bcpg.make(ctx, bcpg.settings(config), ModelFiles(MODEL), samples, {}, read)
        steps = [row["values"] for row in read_jsonl(place.directory / "metrics.jsonl")]
        return place.directory, steps

    return run


def test_every_objective_trains_and_all_share_one_reference(train: Train, tmp_path: Path) -> None:
    for objective in OFFLINE_OBJECTIVES:
        directory, steps = train(
            objective, "bcpg.optimizer.learning_rate=1e-4", "bcpg.optimizer.warmup_steps=0"
        )
        assert len(steps) == 3
        assert all(math.isfinite(step["loss"]) and step["update_skipped"] == 0 for step in steps)
        assert steps[-1]["loss"] < steps[0]["loss"]
        assert (directory / "model" / "model.safetensors").is_file()
        figures = read_json(directory / "data.json")
        assert (figures["problems"], figures["right"], figures["masked"]) == (4, 4, 1)
        wrong = {"rft": 0, "rpo": 4, "nsa": 7, "masked": 7}.get(objective, 8)
        assert figures["wrong"] == wrong == sum(figures["wrong_by_source"].values())
        assert (figures["behaviour_gap"] is None) is (objective == "rft")
        if objective in ("nsa", "masked", "bcpg", "w_reinforce"):
            first, last = steps[0], steps[-1]
            assert abs(first["positive_log_ratio"]) < 1e-4  # the policy is the reference
            # Most tokens are in right and wrong completions alike, and of these there are twice as many.
            assert last["positive_log_ratio"] > last["negative_log_ratio"] + 1e-2
            assert last["positive_log_ratio"] > 1e-2 or objective in ("bcpg", "w_reinforce")
        if objective == "rpo":
            assert steps[-1]["chosen_log_ratio"] > 1e-2
    assert len(list((tmp_path / "reference_cache").glob("*"))) == 1


def test_figures_of_what_nsa_trains_on(
    train: Train, fleet: Fleet, given: tuple[Samples, StepLabels, Negatives], tmp_path: Path
) -> None:
    directory, steps = train("nsa", "bcpg.steps=1")
    figures = read_json(directory / "data.json")
    rollouts = given[0].rollouts()[:-2]  # without the masked and the unlabelled one
    rights = [own for own in rollouts if own.reward.value]
    num_right = sum(len(own.completion.token_ids) for own in rights)
    num_wrong = sum(len(own.completion.token_ids) for own in rollouts) - num_right
    assert figures["tokens"] == {"positive": num_right + 21, "zero": 0, "negative": num_wrong - 21}
    assert figures["correct_token_share"] == pytest.approx(21 / num_wrong)
    assert (figures["labelled"], figures["mean_steps"]) == (7, 2.0)
    assert figures["unlabelled"] == {"step_judge/deadline": 1}
    assert steps[0]["advantage_positive"] == pytest.approx((num_right + 21) / (num_right + num_wrong))
    # The samples say -0.5 of every token.
    [cached] = (tmp_path / "reference_cache").glob("*")
    values = np.frombuffer(cached.read_bytes().split(b"\n", 1)[1], "<f4")
    assert figures["behaviour_gap"] == pytest.approx(np.abs(values + 0.5).mean(), rel=1e-5)
    counts = read_json(directory / "manifest.json")["counts"]
    assert counts == {"problems": 4, "right": 4, "wrong": 7, "labelled": 7}


def test_a_resumed_stage_ends_with_the_same_bytes(
    train: Train, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["bcpg.checkpoint_every=2", "bcpg.steps=5", "bcpg.problems_per_step=2"]
    whole, _ = train("nsa", *options, name="whole")
    train_step = fleet.policy.train_step

    def interrupted(batch: Any, objective: Any) -> dict[str, float]:
        if len(read_jsonl(tmp_path / "cut" / "metrics.jsonl")) == 3:
            raise KeyboardInterrupt
        return train_step(batch, objective)

    monkeypatch.setattr(fleet.policy, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("nsa", *options, name="cut")
    monkeypatch.setattr(fleet.policy, "train_step", train_step)
    resumed, steps = train("nsa", *options, name="cut")
    assert len(steps) == 5
    weights = [(where / "model" / "model.safetensors").read_bytes() for where in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_samples(train: Train) -> None:
    diverging = ["learning_rate=1e30", "clip_grad=1e30", "warmup_steps=0"]
    cause = r"bcpg: .*not finite at step 1 \(\S+#\d and \d+ more\).*bcpg\.optimizer\.learning_rate"
    with pytest.raises(UserError, match=cause):
        train("bcpg", *(f"bcpg.optimizer.{key}" for key in diverging))


def settings_of(objective: str, *overrides: str) -> BcpgSettings:
    return bcpg_settings(load(objective, *overrides))


def test_negatives_of_other_sources_beside_or_instead_of_the_policys_own(
    given: tuple[Samples, StepLabels, Negatives],
) -> None:
    samples, labels, negatives = given
    others = {"pns": negatives.negatives()}
    for takes_own, expected in ((True, {"own": 8, "pns": 1}), (False, {"pns": 1})):
        found = offline_samples(samples.rollouts(), others, takes_own)
        figures = choose_rows(settings_of("bcpg"), found, ()).figures()
        assert figures["wrong_by_source"] == expected
        assert figures["right"] == 4
    [own_label, *_] = labels.labels()
    of_other = replace(own_label, completion_id=f"pns/{own_label.completion_id}")
    figures = choose_rows(settings_of("nsa"), found, [own_label, of_other]).figures()
    assert (figures["labelled"], figures["unlabelled"]) == (1, {})


def test_an_arm_with_nothing_to_learn_from_is_refused(given: tuple[Samples, StepLabels, Negatives]) -> None:
    samples, _, _ = given
    found = offline_samples(samples.rollouts(), {}, takes_own=True)
    rights = [own for own in found if own.right]
    with pytest.raises(
        UserError, match=r"objective=bcpg has no wrong completion beside 4 right .*samples_per"
    ):
        choose_rows(settings_of("bcpg"), rights, ())
    with pytest.raises(UserError, match=r"objective=nsa .*'label_steps/not_asked': 8"):
        choose_rows(settings_of("nsa"), found, ())
    with pytest.raises(UserError, match=r"no right and wrong completion .* 1\.5 times .*max_length_ratio"):
        choose_rows(settings_of("rpo", "pair.max_length_ratio=1.5"), rights, ())
