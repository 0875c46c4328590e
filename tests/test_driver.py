"""The method as a plan, without a cluster: which steps there are, what each lies under, what arms share, and
what can be added from outside."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, cast

import pytest

from pns import driver
from pns.config import (
    STAGES,
    Config,
    DataSource,
    Decoding,
    GeneratorStart,
    PromptFamily,
    ReasoningBlock,
    Tracking,
    services,
    stages,
)
from pns.data.benchmarks import BENCHMARKS, ProblemSet, content_hash
from pns.data.problems import load_problem_sets
from pns.data.prompts import Prompts
from pns.errors import UserError
from pns.fields import Key, walk_keys
from pns.methods import METHODS
from pns.recipe import load
from pns.run.page import RunPage, linked_places
from pns.run.stage import Artefact, Plan, Step, stage
from pns.run.terminal import Terminal
from pns.run.tracking import Tracker
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.context import Context, World
from pns.stages.negatives import SOURCES
from pns.stages.session import Session, changed_keys
from workers.fleet import Fleet
from workers.placement import local_resources, totals

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/tiny-qwen2.yaml"
LLAMA = ROOT / "recipes/tiny/llama"
SMALL = [
    "data.tiny.num_train=6",
    "data.tiny.num_reward=6",
    "data.tiny.num_preference=6",
    "data.tiny.num_test_per_suite=1",
]
SECOND = [
    "reward.terms.second.kind=reward_model",
    f"reward.terms.second.model={LLAMA}",
    "reward.terms.second.weight=0.1",
]


def write_problems(path: Path, *texts: str) -> Path:
    rows = [{"problem": text, "answer": "2"} for text in texts]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_pairs(path: Path) -> Path:
    row = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
    path.write_text(f"{json.dumps(row)}\n")
    return path


@pytest.fixture(scope="module")
def worlds() -> dict[str, tuple[World, Prompts]]:
    """Worlds that have been loaded, by the keys that they depend on."""
    return {}


Steps = dict[str, Step]
MakePlan = Callable[..., Steps]


@pytest.fixture
def plan_of(tmp_path: Path, worlds: dict[str, tuple[World, Prompts]]) -> MakePlan:
    """The steps of a configuration's run, by name."""

    def make(config: Config, attempts: dict[str, int] | None = None) -> Steps:
        decoded = (config.evaluate, config.rollout.max_new_tokens)
        key = repr((config.models.backbone, config.data, config.preference.data, config.seed, decoded))
        config = copy.deepcopy(config)
        if key not in worlds:
            prompts = driver.load_prompts(config)
            worlds[key] = driver.make_world(config, load_problem_sets(config)), prompts
        world, prompts = worlds[key]
        plan = Plan(tmp_path / "stages", config, driver.prompts_digest(prompts), attempts)
        METHODS[config.method](plan, config, world)
        return {step.name: step for step in plan.steps}

    return make


def tiny(*overrides: str) -> Config:
    return load(RECIPE, [*SMALL, *overrides])


def bcpg(*overrides: str) -> Config:
    """With an arm of each kind of objective."""
    arms = {"nsa": "nsa", "own": "w_reinforce", "pairs": "rpo", "right": "rft"}
    named = [f"bcpg.arms.{name}.objective={objective}" for name, objective in arms.items()]
    models = [f"bcpg.{name}.model={LLAMA}" for name in ("step_judge", "process_reward")]
    return tiny("method=bcpg", *named, *models, *overrides)


def moved(before: Steps, now: Steps) -> set[str]:
    """The names of the steps that are in one only, or lie elsewhere."""
    names = before.keys() | now.keys()
    return {name for name in names if place_of(before, name) != place_of(now, name)}


def place_of(steps: Steps, name: str) -> Path | None:
    return steps[name].place.directory if name in steps else None


def follows(first: str) -> set[str]:
    return set(STAGES[STAGES.index(first) :])


def test_the_steps_in_order(plan_of: MakePlan, tmp_path: Path) -> None:
    assert tuple(plan_of(tiny())) == STAGES == stages(tiny())
    assert tuple(plan_of(tiny("negatives=rs"))) == tuple(name for name in STAGES if name != "reverse_rl")
    outside = tiny(f"preference.data.path={write_pairs(tmp_path / 'pairs.jsonl')}")
    assert tuple(plan_of(outside)) == stages(outside) == ("preference", "evaluate")


def test_arms_of_bcpg_share_samples_and_go_their_own_ways_after_a_round(plan_of: MakePlan) -> None:
    config = bcpg("bcpg.rounds=2")
    assert stages(config) == ("sample", "label_steps", "bcpg", "evaluate")
    steps = plan_of(config)
    labelled = [name for name in steps if name.startswith("label_steps")]
    assert labelled == ["label_steps_nsa_1", "label_steps_nsa_2"]  # no other arm reads labels
    first = {steps[f"sample_{arm}_1"].place.directory for arm in config.bcpg.arms}
    second = {steps[f"sample_{arm}_2"].place.directory for arm in config.bcpg.arms}
    assert (len(first), len(second)) == (1, 4)
    assert moved(steps, plan_of(bcpg("bcpg.rounds=2", "bcpg.arms.nsa.correct_step_weight=0.5"))) == {
        "bcpg_nsa_1",
        "sample_nsa_2",
        "label_steps_nsa_2",
        "bcpg_nsa_2",
        "evaluate",
    }


def test_negatives_of_other_sources_are_made_for_the_arms_that_take_them(plan_of: MakePlan) -> None:
    config = bcpg("bcpg.arms.nsa.negatives=[own,pns]")
    steps = plan_of(config)
    assert stages(config)[:4] == ("rl", "reward_model", "reverse_rl", "synthesize")
    assert list(steps)[:4] == ["rl", "reward_model", "reverse_rl_pns", "synthesize_pns"]
    assert moved(plan_of(bcpg()), steps) == {*list(steps)[:4], "label_steps_nsa_1", "bcpg_nsa_1", "evaluate"}
    assert driver.roles_used(config) == {name: step.roles for name, step in steps.items()}


def test_a_start_from_the_target_asks_for_rl(plan_of: MakePlan) -> None:
    config = bcpg("bcpg.start=target")
    assert next(iter(plan_of(config))) == "rl" == stages(config)[0]


def test_the_same_configuration_has_the_same_places(plan_of: MakePlan) -> None:
    assert moved(plan_of(tiny()), plan_of(tiny())) == set()


def test_two_sources_of_negatives_share_what_comes_before(plan_of: MakePlan) -> None:
    arms = plan_of(tiny()), plan_of(tiny("negatives=rs"))
    assert moved(*arms) == follows("reverse_rl")


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("preference.nll_weight=2.0", "preference"),
        ("policy.max_tokens_per_micro_batch=4096", "preference"),  # it decides which pairs are dropped
        ("policy.layout=padded", "preference"),
        ("pair.samples_per_problem=3", "pair"),
        ("synthesize.temperature=0.5", "synthesize"),
        ("reward.terms.wrong.weight=0.3", "reverse_rl"),
        (f"models.reward_model={LLAMA}", "reward_model"),
        ("rl.steps=3", "rl"),
        ("policy.dtype=float32", "rl"),
        ("seed=1", "rl"),
        ("data.instruction=Think.", "rl"),
    ],
)
def test_a_changed_key_moves_its_stage_and_what_follows(plan_of: MakePlan, override: str, first: str) -> None:
    assert moved(plan_of(tiny()), plan_of(tiny(override))) == follows(first)


def test_an_evaluation_of_its_own_keys(plan_of: MakePlan) -> None:
    assert moved(plan_of(tiny()), plan_of(tiny("evaluate.max_new_tokens=50"))) == {"evaluate"}


@pytest.mark.parametrize("name", STAGES)
def test_from_moves_what_depends_on_the_stage(plan_of: MakePlan, name: str) -> None:
    # Every stage of the method is, through pairs or negatives, made from all before it.
    assert moved(plan_of(tiny()), plan_of(tiny(), {name: 1})) == follows(name)


def test_from_leaves_what_does_not_depend_on_the_stage(plan_of: MakePlan, tmp_path: Path) -> None:
    outside = tiny(f"preference.data.path={write_pairs(tmp_path / 'pairs.jsonl')}")
    assert moved(plan_of(outside), plan_of(outside, {"evaluate": 1})) == {"evaluate"}
    assert moved(plan_of(outside), plan_of(outside, {"rl": 1})) == set()


SERVICES = tuple(service.key for service in services(Config()).values())
# Keys that decide no result, by the reason. Of groups the beginning.
WITHOUT_EFFECT = {
    "where output goes and what it is called": ("name", "runs"),
    "where roles run": ("placement.", *(f"{service}.pool." for service in SERVICES)),
    "how an endpoint is asked": tuple(
        f"{service}.endpoint.{key}"
        for service in SERVICES
        for key in ("key_variable", "concurrency", "retries", "price_in", "price_out")
    ),
    "how a model's endpoint is asked": tuple(
        f"evaluate.endpoint.{key}" for key in ("key_variable", "concurrency", "retries", "deadline_seconds")
    ),
    "a sample depends on its seed, not on its neighbours": (
        "rollout.max_batch",
        "rollout.memory_fraction",
        "rollout.kv_cache_gib",
    ),
    "how weights travel, not what they are": ("rollout.weight_transport",),
    "the same sums in another order, or place": (
        "policy.gradient_checkpointing",
        "policy.compile",
        "policy.fsdp_size",
        "policy.offload",
    ),
    "whether a model is read, not what it is": ("models.trust_remote_code",),
    "where sets come from; their content counts": ("data.revisions",),
    "where a decoding comes from; what it says counts": ("evaluate.from_generation_config",),
    "the tiny models' chat templates have no switch (tests/data/test_prompts.py)": ("data.thinking",),
    "where metrics are shown": ("tracking.",),
    "which runs a study has": ("study.seeds", "study.backbones", "study.at_once"),
}


def another_value(key: Key, values: dict[str, Any]) -> Any:
    """A value that the key does not have: of `values` where the type alone does not tell a sensible one."""
    value = key.value
    if key.name in values:
        return values[key.name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, list):
        return [*value, "other"]
    if isinstance(value, dict):
        return {**value, "other": 1.0}
    if isinstance(value, str):
        return f"{value}-other"
    return 2 if value is None else value + 1


def with_value(config: Config, name: str, value: Any) -> Config:
    changed = copy.deepcopy(config)
    (key,) = [key for key in walk_keys(changed) if key.name == name]
    setattr(key.section, key.field.name, value)
    return changed


def test_every_key_moves_a_stage_or_can_change_no_result(
    plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_problems(tmp_path / "own.jsonl", "Add one and one.")
    digest = content_hash([("Add one and one.", "2")])
    monkeypatch.setitem(BENCHMARKS, "own", ProblemSet(1, digest))
    suites = {"first": str(write_problems(tmp_path / "suite.jsonl", "What is half of four?"))}
    parts = ("train", "reward", "preference")
    files = {
        part: write_problems(
            tmp_path / f"{part}.jsonl", f"Solve {part}.", f"Prove {part}.", "What is half of four?"
        )
        for part in parts
    }
    other = str(write_problems(tmp_path / "other.jsonl", "Halve eight.", "Double one."))
    pairs = str(write_pairs(tmp_path / "pairs.jsonl"))
    in_files = [f"data.jsonl.{part}={file}" for part, file in files.items()]
    in_files += [f"data.jsonl.suites.first={suites['first']}", f"data.root={own.parent}"]
    sampled = ["evaluate.temperature=0.5", "evaluate.samples_per_problem=2"]
    sampled += ["reverse_rl.start=path", f"models.generator={LLAMA}"]
    examples = tmp_path / "examples.jsonl"
    lines = [{"problem": f"Double {i}.", "solution": f"It is {2 * i}."} for i in range(3)]
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    in_files.append("data.source=jsonl")
    # The tiny world with the keys of files, which a recipe cannot have beside it: data.source moves all stages.
    in_tiny_world = [
        tiny(*in_files, *sampled, f"data.few_shot={examples}"),
        tiny(*in_files, *sampled),
        tiny(*in_files, *sampled, "negatives=mixed"),
        bcpg(*in_files, "bcpg.arms.own.negatives=[own,mixed]"),
        tiny(*in_files, "method=study", "study.arms.rs=[negatives=rs]", "study.arms.pns=[]"),
        tiny(*in_files, "negatives=prompted"),
        tiny(*in_files, "negatives=file", f"sources.file={suites['first']}"),
    ]
    configs = [
        *(with_value(config, "data.source", DataSource.tiny) for config in in_tiny_world),
        tiny(*in_files, *sampled),
        tiny(*in_files, f"preference.data.path={pairs}"),
    ]
    values: dict[str, Any] = {
        "data.source": DataSource.jsonl,
        "data.prompt": PromptFamily.base,
        "data.reasoning": ReasoningBlock.none,
        "data.think_tags": ["[THINK]", "[/THINK]"],
        "data.benchmarks": ["own"],
        "data.root": str(tmp_path / "elsewhere"),
        "data.few_shot": str(examples),
        "data.revisions": {"own": "main"},
        "data.jsonl.suites": {"first": other},
        "data.jsonl.fields": {"problem": "answer"},
        "evaluate.stop": ["\n\n"],
        "evaluate.per_suite": {"short": Decoding(max_new_tokens=3)},
        "mixture.sources": ["rs"],
        "mixture.starts": [GeneratorStart.backbone],
        "models.backbone": str(LLAMA),
        "negatives": "rs",
        "sources.file": other,
        "study.arms": {"rs": ["negatives=rs"]},
        "study.seeds": [7],
        "preference.data.path": pairs,
        "preference.loss": "sigmoid",
        **{f"bcpg.arms.{name}.objective": "bcpg" for name in ("nsa", "own", "pairs", "right")},
        **{f"bcpg.arms.{name}.negatives": ["mixed"] for name in ("nsa", "own", "pairs", "right")},
        **{f"data.jsonl.{part}": other for part in parts},
    }
    effective: set[str] = set()
    for config in configs:
        before = plan_of(config)
        for key in walk_keys(config):
            if key.name in effective:
                continue  # one configuration in which it moves a stage is enough
            try:
                now = plan_of(with_value(config, key.name, another_value(key, values)))
            except UserError:  # a value that fits another of the configurations
                continue
            if moved(before, now):
                effective.add(key.name)
    without_effect = tuple(name for names in WITHOUT_EFFECT.values() for name in names)
    names = {key.name for config in configs for key in walk_keys(config)}
    assert {name for name in names - effective if not name.startswith(without_effect)} == set()
    assert {name for name in effective if name.startswith(without_effect)} == set()


def test_suites_count_by_what_is_asked_not_by_where_they_lie(plan_of: MakePlan, tmp_path: Path) -> None:
    def places(name: str, *suite: str) -> Steps:
        folder = tmp_path / name
        folder.mkdir()
        train = write_problems(folder / "train.jsonl", "Add one and one.")
        own = write_problems(folder / "own.jsonl", *suite)
        files = [f"data.jsonl.train={train}", f"data.jsonl.suites.own={own}"]
        return plan_of(tiny(*files, "data.source=jsonl"))

    here = places("here", "What is half of four?")
    assert moved(here, places("there", "What is half of four?")) == set()
    assert moved(here, places("other", "What is half of six?")) == {"evaluate"}


def test_a_second_reward_model_is_the_recipe_alone(plan_of: MakePlan) -> None:
    config = tiny(*SECOND)
    roles = driver.roles_used(config)
    assert {name for name, used in roles.items() if "second" in used} == {"reverse_rl", "synthesize"}
    assert moved(plan_of(tiny()), plan_of(config)) == follows("reverse_rl")
    every_role = {role for used in roles.values() for role in used}
    own_cpus = config.reward.terms["second"].pool.cpus
    assert (
        totals(config, every_role, "cpu")["CPU"]
        == totals(config, every_role - {"second"}, "cpu")["CPU"] + own_cpus
    )
    assert local_resources(config, every_role, "cpu")["num_cpus"] >= totals(config, every_role, "cpu")["CPU"]


def test_a_term_of_weight_0_has_no_role_and_no_place(plan_of: MakePlan) -> None:
    off = tiny(*SECOND, "reward.terms.second.weight=0", "reward.terms.second.model=owner/absent")
    assert "second" not in {role for used in driver.roles_used(off).values() for role in used}
    assert moved(plan_of(tiny()), plan_of(off)) == set()
    no_judge = driver.roles_used(tiny("reward.terms.coherence.weight=0"))
    assert "coherence" not in {role for used in no_judge.values() for role in used}


@pytest.mark.parametrize("negatives", sorted(SOURCES))
def test_roles_are_known_without_a_model_or_a_problem(plan_of: MakePlan, negatives: str) -> None:
    config = tiny(f"negatives={negatives}", f"sources.file={Path(__file__)}")
    steps = plan_of(config)
    assert driver.roles_used(config) == {name: step.roles for name, step in steps.items()}
    assert ("coherence" in driver.roles_used(config)["synthesize"]) == (negatives == "pns")


def test_wrong_names_are_said_with_the_near_one(plan_of: MakePlan) -> None:
    with pytest.raises(UserError, match="negatives: 'pnss' is no source of negatives; did you mean pns"):
        driver.check_source(tiny("negatives=pnss"))
    with pytest.raises(
        UserError, match=r"mixture\.sources: 'rss' is no source of negatives; did you mean rs"
    ):
        driver.check_source(tiny("negatives=mixed", "mixture.sources=[pns,rss]"))
    with pytest.raises(UserError, match=r"bcpg\.arms\.nsa\.negatives: 'rss' is no source .*did you mean rs"):
        driver.check_source(bcpg("bcpg.arms.nsa.negatives=[own,rss]"))


def test_from_and_until_name_a_stage_in_every_part_of_a_mixture(plan_of: MakePlan, tmp_path: Path) -> None:
    config = tiny("negatives=mixed")
    parts = {"reverse_rl_pns", "synthesize_pns", "synthesize"}
    assert moved(plan_of(config), plan_of(config, {"reverse_rl": 1})) == parts | follows("pair")
    synthesis = {"synthesize_pns", "synthesize_rs", "synthesize"}
    assert moved(plan_of(config), plan_of(config, {"synthesize": 1})) == synthesis | follows("pair")
    plan = Plan(tmp_path / "stages", config, "")
    plan.steps = list(plan_of(config).values())
    assert [step.name for step in plan.until("synthesize")][-2:] == ["synthesize_rs", "synthesize"]
    assert plan.until("reverse_rl")[-1].name == "reverse_rl_pns"
    assert driver.check_step(plan, "reverse_rl", "--from") == "reverse_rl"


def test_bounds_of_log_probabilities_ask_for_the_policy(plan_of: MakePlan) -> None:
    config = tiny("synthesize.min_log_prob=-2")
    assert "policy" in driver.roles_used(config)["synthesize"]
    assert "policy" not in driver.roles_used(tiny())["synthesize"]
    assert moved(plan_of(tiny()), plan_of(config)) == follows("synthesize")


def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """It would read the backbone's token ids as other words."""
    other = tmp_path / "other"
    shutil.copytree(LLAMA, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"*"', '"swap"').replace('"/"', '"*"').replace('"swap"', '"/"'))
    prompts = driver.load_prompts(tiny())
    driver.check_token_readers(tiny(f"models.reward_model={LLAMA}"), prompts)
    with pytest.raises(UserError, match=r"models\.reward_model: .*does not read the token ids"):
        driver.check_token_readers(tiny(f"models.reward_model={other}"), prompts)
    named = [*SECOND, f"reward.terms.second.model={other}"]
    driver.check_token_readers(tiny(*named), prompts)  # it reads the chat
    with pytest.raises(UserError, match=r"terms\.second\.model: .*second\.input=chat"):
        driver.check_token_readers(tiny(*named, "reward.terms.second.input=tokens"), prompts)


class Text(Artefact):
    @property
    def file(self) -> Path:
        return self.directory / "text.txt"


def test_a_source_of_negatives_from_outside_is_one_entry(
    plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    @stage(Negatives, lambda config: config.synthesize, lambda settings: ("rollout",))
    def copied(ctx: Context, settings: Any, target: TrainedModel) -> Negatives:
        raise AssertionError("a plan makes nothing")

    def source(
        run: Plan, config: Config, world: World, target: TrainedModel, rewards: RewardModels
    ) -> Negatives:
        return run(copied, target)

    monkeypatch.setitem(SOURCES, "copied", source)
    config = tiny("negatives=copied")
    driver.check_source(config)
    steps = plan_of(config)
    sampled = plan_of(tiny("negatives=rs"))
    assert list(steps) == ["copied" if name == "synthesize" else name for name in sampled]
    assert moved(sampled, steps) == {"copied"} | follows("synthesize")


# A small method of toy stages that are made for real.


def toy_settings(config: Config) -> tuple[float]:
    return (config.rl.temperature,)


class Toys:
    """Toy stages that note that they were called, and fail where `failing` names them."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.failing = ""
        self.base = stage(Text, toy_settings, lambda settings: ())(self.write_base)
        self.arm = stage(Text, lambda config: config.preference.steps, lambda settings: ())(self.write_arm)
        self.joined = stage(Text, lambda config: None, lambda settings: ())(self.write_joined)

    def write_base(self, ctx: Context, settings: Any) -> Text:
        return self._write(ctx, "base", f"{settings}")

    def write_arm(self, ctx: Context, settings: Any, base: Text) -> Text:
        return self._write(ctx, "arm", f"{base.file.read_text()} {settings}")

    def write_joined(self, ctx: Context, settings: Any, texts: dict[str, Text]) -> Text:
        return self._write(ctx, "joined", "+".join(text.file.read_text() for text in texts.values()))

    def _write(self, ctx: Context, name: str, text: str) -> Text:
        self.made.append(name)
        written = Text(ctx.directory)
        written.file.write_text(text)
        if self.failing == name:
            raise KeyboardInterrupt
        return written

    def method(self, run: Plan) -> None:
        base = run(self.base)
        arm = run(self.arm, base)
        run(self.joined, {"base": base, "arm": arm})


NO_FLEET = cast(Fleet, None)
NO_PROMPTS = cast(Prompts, None)


class Notes(Terminal):
    """What a run wants known at once, and nothing else that it shows."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(f"{text}\n")


def run_toys(
    toys: Toys, runs: Path, name: str, changes: Sequence[str] = (), attempts: dict[str, int] | None = None
) -> str:
    """Make a run of toy stages as the driver does, without a cluster; what its tracker said."""
    config = tiny(f"runs={runs}", f"name={name}", *changes)
    toys.made.clear()
    notes = Notes()
    with RunPage.open(runs / name) as page:
        plan = Plan(runs / driver.STORE, config, "", attempts)
        toys.method(plan)
        page.begin(config, attempts or {})
        tracker = Tracker(page.path, Tracking(), lambda *_: pytest.fail("no backends"), terminal=notes)
        making = Session(config, page, NO_FLEET, NO_PROMPTS, tracker)
        for step in plan.steps:
            if step.is_done():
                page.link(step)
            else:
                making.make(step)
    return "".join(notes.said)


def test_two_arms_make_what_they_share_once(tmp_path: Path) -> None:
    toys = Toys()
    run_toys(toys, tmp_path, "first")
    assert toys.made == ["base", "arm", "joined"]
    run_toys(toys, tmp_path, "second", ["preference.steps=7"])
    assert toys.made == ["arm", "joined"]
    first, second = linked_places(tmp_path / "first"), linked_places(tmp_path / "second")
    assert {name for name in first if first[name] == second[name]} == {"write_base"}
    assert (second["write_joined"] / "text.txt").read_text() == "(1.0,)+(1.0,) 7"
    run_toys(toys, tmp_path, "first")
    assert toys.made == []


def test_a_changed_key_is_said_and_going_back_costs_nothing(tmp_path: Path) -> None:
    toys = Toys()
    assert run_toys(toys, tmp_path, "run") == ""
    said = run_toys(toys, tmp_path, "run", ["rl.temperature=0.5"])
    assert toys.made == ["base", "arm", "joined"]
    assert "write_base: made anew, as settings was [1.0] and is [0.5] (the output before is kept)" in said
    run_toys(toys, tmp_path, "run")
    assert toys.made == []
    assert (tmp_path / "run" / "write_base" / "text.txt").read_text() == "(1.0,)"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    toys = Toys()
    toys.failing = "arm"
    with pytest.raises(KeyboardInterrupt):
        run_toys(toys, tmp_path, "run")
    assert sorted(linked_places(tmp_path / "run")) == ["write_arm", "write_base"]
    toys.failing = ""
    run_toys(toys, tmp_path, "run")
    assert toys.made == ["arm", "joined"]


def test_from_keeps_the_output_before(tmp_path: Path) -> None:
    toys = Toys()
    run_toys(toys, tmp_path, "run")
    before = linked_places(tmp_path / "run")
    run_toys(toys, tmp_path, "run", attempts={"write_arm": 1})
    assert toys.made == ["arm", "joined"]
    assert linked_places(tmp_path / "run")["write_base"] == before["write_base"]
    assert all((place / "manifest.json").is_file() for place in before.values())


def test_changed_keys_are_worded_from_two_records() -> None:
    before = {"settings": {"rl": {"steps": 3}, "old": 1}, "roles": {}, "seed": 0, "inputs": [1]}
    now = {"settings": {"rl": {"steps": 4}}, "roles": {"policy.dtype": "auto"}, "seed": 0, "inputs": [2]}
    assert changed_keys(None, now) == ""
    assert changed_keys(before, before) == ""
    said = changed_keys(before, now)
    assert "settings.rl.steps was 3 and is 4" in said
    assert "settings.old was 1 and is None" in said
    assert "roles.policy.dtype was None and is auto" in said
    assert "inputs" not in said


def test_the_generator_may_start_from_the_backbone_or_a_model_of_its_own(plan_of: MakePlan) -> None:
    starts = ["backbone", "target", "path"]
    runs = [plan_of(tiny(f"reverse_rl.start={start}", f"models.generator={LLAMA}")) for start in starts]
    backbone, target, own = (steps["reverse_rl"].inputs[0] for steps in runs)
    assert backbone.model == str(ROOT / "recipes/tiny/qwen2-mixed")
    assert target.directory == place_of(runs[1], "rl")
    assert own.model == str(LLAMA)
