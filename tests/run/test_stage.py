"""Stages as functions of values: what a place depends on, and what it does not."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pns.config import Config, Dtype, PolicyConfig, Pool, RewardTerm, TermKind
from pns.fields import walk_keys
from pns.files import read_json
from pns.records import Problem
from pns.run.stage import Artefact, Contents, ModelFiles, Plan, Step, stage
from pns.stages.context import Problems


class Text(Artefact):
    @property
    def file(self) -> Path:
        return self.directory / "text.txt"


@dataclass(frozen=True)
class WriteSettings:
    temperature: float


@dataclass(frozen=True)
class TrainSettings:
    steps: int
    judge: str


@stage(Text, lambda config: WriteSettings(config.rl.temperature), lambda settings: ("rollout", "verifier"))
def write(ctx: Any, settings: WriteSettings, backbone: ModelFiles) -> Text:
    written = Text(ctx.directory)
    written.file.write_text(f"{settings.temperature}")
    return written


@stage(
    Text,
    lambda config: TrainSettings(config.preference.steps, config.reward.terms["coherence"].model),
    lambda settings: ("policy",),
)
def train(ctx: Any, settings: TrainSettings, written: Text, models: dict[str, ModelFiles]) -> Text:
    trained = Text(ctx.directory)
    trained.file.write_text(f"{written.file.read_text()} {settings.steps}")
    return trained


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "weights").write_bytes(b"one")
    return path


def set_key(config: Config, name: str, value: object) -> None:
    (key,) = [key for key in walk_keys(config) if key.name == name]
    setattr(key.section, key.field.name, value)


def plan_of(
    store: Path,
    changes: dict[str, object] | None = None,
    model: str = "owner/model",
    prompts: str = "prompts",
    attempts: dict[str, int] | None = None,
) -> list[Step]:
    config = Config()
    for name, value in (changes or {}).items():
        set_key(config, name, value)
    plan = Plan(store, config, prompts, attempts)
    written = plan(write, ModelFiles(model))
    plan(train, written, {"start": ModelFiles("owner/other")})
    return plan.steps


def moved(steps: list[Step], others: list[Step]) -> set[str]:
    """The names of the steps that lie elsewhere."""
    return {
        step.name
        for step, other in zip(steps, others, strict=True)
        if step.place.directory != other.place.directory
    }


def test_the_same_values_have_the_same_place(tmp_path: Path) -> None:
    steps, again = plan_of(tmp_path), plan_of(tmp_path)
    assert [step.place.directory for step in steps] == [step.place.directory for step in again]
    assert [step.place.directory.name.split("-")[0] for step in steps] == ["write", "train"]
    assert steps[0].place.directory.parent == tmp_path


BOTH = {"write", "train"}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"rl.temperature": 0.5}, BOTH),  # what a step is made from moves with it
        ({"seed": 1}, BOTH),
        ({"rollout.max_new_tokens": 7}, BOTH),  # of the role rollout, which write uses
        ({"reward.verify_seconds": 7.0}, BOTH),
        ({"preference.steps": 7}, {"train"}),
        ({"policy.dtype": Dtype.float32}, {"train"}),  # of the role policy, which write does not use
        ({"policy.lora.rank": 8}, {"train"}),
        ({"reward.terms.coherence.model": "owner/judge"}, {"train"}),
        ({"placement.rollout.replicas": 7}, set()),
        ({"evaluate.generator_samples": 7}, set()),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_a_place_depends_on_what_its_stage_declares(
    tmp_path: Path, changes: dict[str, object], steps: set[str]
) -> None:
    assert moved(plan_of(tmp_path), plan_of(tmp_path, changes)) == steps


def test_prompts_are_part_of_every_place(tmp_path: Path) -> None:
    assert moved(plan_of(tmp_path), plan_of(tmp_path, prompts="others")) == BOTH


def test_an_attempt_moves_a_step_and_what_follows(tmp_path: Path) -> None:
    assert moved(plan_of(tmp_path), plan_of(tmp_path, attempts={"train": 1})) == {"train"}
    assert moved(plan_of(tmp_path), plan_of(tmp_path, attempts={"write": 1})) == BOTH
    once, twice = plan_of(tmp_path, attempts={"write": 1}), plan_of(tmp_path, attempts={"write": 2})
    assert moved(once, twice) == BOTH


def test_problems_count_by_their_content(tmp_path: Path) -> None:
    def place(problems: Problems) -> Path:
        plan = Plan(tmp_path, Config(), "")
        return plan(write, problems).directory

    problem = Problem("p", "1+1?", "2")
    assert place(Problems([problem])) == place(Problems([replace(problem)]))
    assert place(Problems([problem])) != place(Problems([replace(problem, answer="3")]))
    assert place(Problems([problem])) != place(Problems([]))


def test_a_model_counts_by_its_content_wherever_it_lies(tmp_path: Path, model: Path) -> None:
    before = plan_of(tmp_path, model=str(model))
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert moved(before, plan_of(tmp_path, model=str(copy))) == set()
    os.utime(model / "weights", (1, 1))
    assert moved(before, plan_of(tmp_path, model=str(model))) == set()
    (model / "weights").write_bytes(b"two!")
    assert moved(before, plan_of(tmp_path, model=str(model))) == BOTH


def test_a_model_that_settings_name_counts_by_its_content(tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    key = "reward.terms.coherence.model"
    before = plan_of(tmp_path, {key: str(model)})
    assert moved(before, plan_of(tmp_path, {key: str(copy)})) == set()
    (copy / "weights").write_bytes(b"two!")
    assert moved(before, plan_of(tmp_path, {key: str(copy)})) == {"train"}


def test_contents_are_hashed_once_and_names_stand_for_themselves(tmp_path: Path, model: Path) -> None:
    kept = tmp_path / "store" / "contents.json"
    digest = Contents(kept).digest(str(model))
    assert digest.startswith("sha256:")
    entries = read_json(kept)
    assert list(entries) == [str(model)]
    stat = (model / "weights").stat()
    (model / "weights").write_bytes(b"two")
    os.utime(model / "weights", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Contents(kept).digest(str(model)) == digest  # size and time say that nothing has changed
    assert Contents(kept).digest("owner/model") == "owner/model"
    assert Contents(kept).digest("model") == "model"  # a relative path is any word
    assert Contents(None).digest(str(model)) == str(model)


def test_a_stage_may_be_used_twice_under_two_names(tmp_path: Path) -> None:
    plan = Plan(tmp_path, Config(), "", {"again": 1})
    backbone = ModelFiles("owner/model")
    first, again = plan(write, backbone), plan(write, backbone, name="again")
    assert first.directory != again.directory
    assert [step.name for step in plan.steps] == ["write", "again"]
    with pytest.raises(ValueError, match="two steps of the run are called write"):
        plan(write, backbone)
    assert [step.name for step in plan.until("write")] == ["write"]
    assert plan.until(None) == plan.steps


def test_a_part_has_names_and_settings_of_its_own_in_the_same_plan(tmp_path: Path) -> None:
    config, other = Config(), Config()
    other.rl.temperature = 0.5
    attempts = {"write": 2}
    plan = Plan(tmp_path, config, "", attempts, contents=Contents(None))
    backbone = ModelFiles("owner/backbone")
    whole = plan(write, backbone)
    same = plan.part("same", config)(write, backbone)
    hot = plan.part("hot", other)(write, backbone)
    assert [step.name for step in plan.steps] == ["write", "write_same", "write_hot"]
    assert {step.asked_as for step in plan.steps} == {"write"}
    assert same.directory == whole.directory != hot.directory
    assert [step.made_from["attempt"] for step in plan.steps] == [2, 2, 2]
    assert plan.until("write") == plan.steps
    with pytest.raises(ValueError, match="two steps of the run are called write_hot"):
        plan.part("hot", config)(write, backbone)


def test_roles_follow_the_settings(tmp_path: Path) -> None:
    @stage(Text, lambda config: config.reward, lambda reward: tuple(reward.terms))
    def score(ctx: Any, settings: Any) -> Text:
        return Text(ctx.directory)

    config = Config(policy=PolicyConfig())
    config.reward.terms = {"second": RewardTerm(TermKind.reward_model, 0.1, "owner/second", Pool())}
    plan = Plan(tmp_path, config, "")
    plan(score)
    assert plan.steps[0].roles == ("second",)


@dataclass
class Ctx:
    directory: Path


def make(steps: list[Step]) -> list[str]:
    """Make what is not done, in order; the names of the steps that were made."""
    made = []
    for step in steps:
        if not step.is_done():
            with step.place.making(step.made_from):
                step.stage.make(Ctx(step.place.directory), step.settings, *step.inputs)
            made.append(step.name)
    return made


def test_a_changed_key_makes_another_place_and_the_old_one_is_kept(tmp_path: Path) -> None:
    assert make(plan_of(tmp_path)) == ["write", "train"]
    assert make(plan_of(tmp_path)) == []
    changed = plan_of(tmp_path, {"preference.steps": 7})
    assert make(changed) == ["train"]
    assert (changed[1].place.directory / "text.txt").read_text() == "1.0 7"
    assert make(plan_of(tmp_path)) == []
    assert make(plan_of(tmp_path, attempts={"write": 1})) == ["write", "train"]
    assert len(list(tmp_path.glob("*/manifest.json"))) == 5


def test_what_a_step_was_made_from_can_be_read(tmp_path: Path, model: Path) -> None:
    steps = plan_of(tmp_path, {"preference.steps": 7}, model=str(model))
    make(steps)
    manifest = steps[1].place.manifest()
    assert manifest is not None
    assert manifest["settings"] == {"steps": 7, "judge": ""}
    assert manifest["inputs"][0]["stage"] == steps[0].place.directory.name
    assert manifest["inputs"][1] == {"start": {"model": "owner/other", "digest": "owner/other"}}
    assert sorted(manifest["roles"]) == [
        "policy.dtype",
        "policy.lora.alpha",
        "policy.lora.rank",
        "policy.lora.targets",
    ]
    written = steps[0].place.manifest()
    assert written is not None
    assert written["inputs"][0]["model"] == str(model)
