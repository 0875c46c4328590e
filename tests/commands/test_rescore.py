"""`pns rescore`: what other rules make of a run's stored rollouts, from a run that is done or under way."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pns import cli
from pns.algo.reward import rewarded
from pns.commands.rescore import rescore_run
from pns.config import Config
from pns.files import append_jsonl, files_below, sha256_of_tree, write_jsonl
from pns.recipe import load
from pns.records import Completion, Problem, Reward, Rollout, Verdict, from_json, to_json
from pns.run.page import RunPage
from pns.run.place import Place
from pns.run.stage import Artefact, Step, stage
from pns.stages.artefacts import Generator
from pns.stages.negatives import rejection_sample
from pns.stages.reverse_rl import reverse_rl
from pns.stages.synthesize import synthesize
from pns.tiny.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes/tiny/qwen2"
KEYS = [
    "reverse_rl.problems_per_step=1",
    "reverse_rl.completions_per_problem=2",
    "reverse_rl.advantage=dr_grpo",
    "reward.gates.correct=0.25",
    "reward.terms.wrong.weight=0.5",
    "reward.terms.plausibility.weight=0.25",
    "reward.terms.coherence.weight=0.25",
    "placement.device=cpu",
]
PROBLEM = Problem("p", "Ann has 12. How many has Ann? ", "12")
HALF_JUDGE = "reward.terms.coherence.weight=0.125"


@stage(Artefact, lambda config: None, lambda settings: ())
def own_models(ctx: Any, settings: None) -> Artefact:
    raise AssertionError("no command makes a stage here")


def rollout(step: int, number: int, **known: Any) -> Rollout:
    """A wrong completion, unless `answer` is 12; `known`: raw values and missing terms."""
    answer = known.pop("answer", 13)
    text = f"<think>So Ann=3. </think>\\boxed{{{answer}}}"
    token_ids = tuple(build_tokenizer().encode(text, add_special_tokens=False))
    completion = Completion(f"p#{number}", "p", text, token_ids, (-0.5,) * len(token_ids), "stop")
    verdict = Verdict.CORRECT if answer == 12 else Verdict.WRONG
    return Rollout(step, PROBLEM, completion, Reward(None, True, verdict, **known))


def judged(*grades: int) -> dict[str, Any]:
    return {"scores": list(grades), "probabilities": []}


# Rewards 0.5 + 0.25 * sigmoid(r) + 0.25 * grades / 12: 0.625 and 0.875, 0.25 of the right one, and masked.
STEPS = [
    [
        rollout(0, 0, raw={"plausibility": 0.0, "coherence": judged(0, 0, 0, 0)}),
        rollout(0, 1, raw={"plausibility": 0.0, "coherence": judged(3, 3, 3, 3)}),
    ],
    [rollout(1, 0, answer=12), rollout(1, 1, raw={"plausibility": 0.0}, missing={"coherence": "too_long"})],
]


def kept_stage(runs: Path, name: str, made_from: dict[str, Any], done: bool = True) -> Step:
    place = Place(runs / "stages" / f"{name}-1")
    step = Step(name, name, own_models, None, (), place, made_from)
    place.directory.mkdir(parents=True)
    if done:
        with place.making(made_from):
            pass
    return step


def make_run(runs: Path, made: Any = reverse_rl, **sizes: Any) -> Path:
    """A run whose stage `made` has kept STEPS."""
    config: Config = load(ROOT / "recipes/tiny-qwen2.yaml", [*KEYS, *sizes.pop("keys", ()), f"runs={runs}"])
    settings = made.settings(config)
    models = kept_stage(runs, "reward_model", {"inputs": []})
    made_from = {
        "stage": made.name,
        "settings": to_json(settings),
        "roles": {},
        "seed": 0,
        "inputs": [{"stage": models.place.directory.name, "digest": "d"}],
    }
    name = "reverse_rl" if made is reverse_rl else "synthesize"
    step = Step(name, name, made, settings, (), Place(runs / "stages" / f"{name}-1"), made_from)
    with step.place.making(made_from):
        rows = [row for rows in STEPS for row in rewarded(rows, 2, settings.rules)]
        write_jsonl(Generator(step.place.directory).rollouts_file, sizes.get("rows", rows))
    with RunPage.open(runs / "run") as page:
        page.begin(config, {})
        page.link(models)
        page.link(step)
    return runs / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs")


def rows_of(file: Path) -> list[Rollout]:
    return [from_json(Rollout, json.loads(line)) for line in file.read_text().splitlines()]


def comparison_of(file: Path) -> dict[str, Any]:
    return json.loads(file.with_suffix(".json").read_text())


def rewards_of(file: Path) -> list[float | None]:
    return [row.reward.value for row in rows_of(file)]


def state_of(run: Path) -> dict[str, str]:
    """The files of the run, its stages included."""
    own = {name: path.read_text() for name, path in files_below(run) if not name.startswith("rescored/")}
    return own | {"stages": sha256_of_tree(run.parent / "stages")}


def test_another_weight_by_hand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The judge's half: 0.625 and 0.75, and the means and advantages that follow."""
    before = state_of(run)
    file = rescore_run(run, [HALF_JUDGE], "reverse_rl")
    assert file.parent == run / "rescored"
    assert state_of(run) == before
    assert rewards_of(file) == [pytest.approx(0.625), pytest.approx(0.75), 0.25, None]
    rows = rows_of(file)
    stored = rows_of(run / "reverse_rl" / "rollouts.jsonl")
    assert [replace(row, reward=stored[i].reward) for i, row in enumerate(rows)] == stored
    assert [row.reward.raw for row in rows] == [row.reward.raw for row in stored]
    assert rows[3].reward.missing == {"coherence": "too_long"}
    compared = comparison_of(file)
    assert compared["num_rollouts"] == 4
    assert compared["asked"] == {}
    assert compared["masked"] == {"before": 1, "after": 1}
    assert compared["reward"]["before"] == pytest.approx((0.625 + 0.875 + 0.25) / 3)
    assert compared["reward"]["after"] == pytest.approx((0.625 + 0.75 + 0.25) / 3)
    assert compared["terms"]["coherence"] == {"before": 0.5, "after": 0.5}
    assert compared["rank_correlation"] == pytest.approx(1.0)
    advantages = {"num_both": 2, "changed_sign": 0, "became_zero": 0, "became_nonzero": 0}
    assert compared["advantages"] == advantages
    assert compared["failures"] == {"coherence": {"too_long": 1}}
    assert compared["rules"]["terms"]["coherence"]["weight"] == 0.125
    shown = capsys.readouterr().out
    assert "asked: no service" in shown
    assert "0 of 2 changed sign" in shown


def test_other_rules_have_another_file_and_the_same_ones_the_same(run: Path) -> None:
    first = rescore_run(run, [HALF_JUDGE], "reverse_rl")
    content = first.read_bytes()
    assert rescore_run(run, ["reward.terms.coherence.weight=0.5"], "reverse_rl") != first
    # Where a term is computed makes no other rules.
    again = rescore_run(run, [HALF_JUDGE, "reward.terms.coherence.pool.replicas=3"], "reverse_rl")
    assert (again, again.read_bytes()) == (first, content)


@pytest.mark.parametrize(
    ("overrides", "rewards"),
    [
        # A gate whose number is another.
        (["reward.gates.correct=0.5"], [0.625, 0.875, 0.5, None]),
        # A term that is gone masks no more: 0.5 + 0.25 * 0.5.
        (["reward.terms.coherence.weight=0"], [0.625, 0.625, 0.25, 0.625]),
        # z-scores of the group's judgements 0 and 1; 0 of a completion that is alone.
        (["reward.terms.coherence.normalise=z_score"], [0.375, 0.875, 0.25, None]),
        # A new term that no service computes: 0.1 * 1 for any length.
        (["reward.terms.fit.kind=length", "reward.terms.fit.longest=999", "reward.terms.fit.weight=0.1"],
         [0.725, 0.975, 0.25, None]),
    ],
)  # fmt: skip
def test_rules_that_ask_no_service(run: Path, overrides: list[str], rewards: list[float | None]) -> None:
    expected = [None if value is None else pytest.approx(value) for value in rewards]
    assert rewards_of(rescore_run(run, overrides, "reverse_rl")) == expected


def test_rows_of_synthesis_have_no_advantages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", synthesize, keys=["synthesize.samples_per_problem=4"])
    file = rescore_run(run, [HALF_JUDGE], "synthesize", tmp_path / "own.jsonl")
    assert file == tmp_path / "own.jsonl"
    assert rewards_of(file) == [pytest.approx(0.625), pytest.approx(0.75), 0.25, None]
    assert comparison_of(file)["advantages"] is None


def test_a_run_under_way_gives_its_whole_steps(run: Path) -> None:
    """Its manifest is not there yet, and the last step is half written."""
    place = run.parent / "stages" / "reverse_rl-1"
    (place / "manifest.json").rename(place / "progress.json")
    append_jsonl(place / "rollouts.jsonl", [rollout(2, 0, raw={"plausibility": 0.0})])
    with open(place / "rollouts.jsonl", "a") as file:
        file.write('{"step": 2, "problem": {"id": "p')
    with Place(place).making(json.loads((place / "progress.json").read_text())):
        assert len(rewards_of(rescore_run(run, [HALF_JUDGE], "reverse_rl"))) == 4
        (place / "rollouts.jsonl").write_text("")
        assert cli.main(["rescore", str(run)]) == 2


def test_nothing_heavy_is_loaded_where_no_service_is_asked(run: Path) -> None:
    heavy = ["ray", "torch", "transformers", "verl", "vllm"]
    code = (
        f"import sys; from pns import cli; code = cli.main(['rescore', {str(run)!r}, {HALF_JUDGE!r}]); "
        f"print('loaded', code, [name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "loaded 0 []"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl.steps=3"], "rl.steps is not below reward."),
        (["reward.terms.coherence.wieght=1"], "unknown key"),
        (["reward.terms.coherence.weight=-1"], "must be 0 or more"),
        (["reward.gates.corect=0"], "no gate; did you mean correct?"),
        (["reward.terms.plausibility.model=/nowhere/at/all"], "neither a directory that exists nor a Hub id"),
        (["reward.gates.correct=null"], "its reward model is gone"),
        (["--stage", "synthesize"], "has not begun"),
        (["--out", "/nowhere/file"], "/nowhere is not a directory"),
        (["--out", __file__], "exists: remove it"),
    ],
)
def test_wrong_use(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["rescore", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (run / "rescored").exists()


def test_values_of_refreshed_models_are_not_mixed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gate that is opened asks for values that are lacking: no one of the stage's models gave the others."""
    (run / "reverse_rl").resolve().joinpath("refreshed").mkdir()
    assert cli.main(["rescore", str(run), "reward.gates.correct=null"]) == 2
    assert "was refreshed on the way" in capsys.readouterr().err
    assert cli.main(["rescore", str(run), "reward.terms.plausibility.weight=0.5"]) == 0  # asks none


def test_a_directory_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rescore", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_the_ordinary_reward_has_no_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs", rejection_sample)
    assert cli.main(["rescore", str(run), "--stage", "synthesize"]) == 2
    assert "are of rejection_sample, whose reward is the ordinary one" in capsys.readouterr().err


def save_reward_model(directory: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(MODEL)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)


def test_reward_models_are_asked_for_what_is_lacking(run: Path, tmp_path: Path) -> None:
    """The run's own for the right completion, as its gate is open now; a second one for all; the judge, of
    weight 0, for none. Then all is known."""
    import torch

    from pns.driver import load_prompts
    from workers.rewards.reward_model import RewardModel
    from workers.runtime import Runtime

    own, second = run / "reward_model" / "main", tmp_path / "second"
    save_reward_model(own, seed=1)
    save_reward_model(second, seed=2)
    words = ["reward.gates.correct=null", "reward.terms.coherence.weight=0"]
    words += [f"reward.terms.second.{key}" for key in ("weight=0.125", f"model={second}", "input=tokens")]
    command = [sys.executable, "-m", "pns.cli", "rescore", str(run), *words]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/4 completions answered" in done.stdout
    [file] = (run / "rescored").glob("*.jsonl")
    assert comparison_of(file)["asked"] == {"second": 4, "plausibility": 1}
    rows = rows_of(file)
    prompt_ids = load_prompts(load(ROOT / "recipes/tiny-qwen2.yaml")).encode(PROBLEM)
    texts = [(*prompt_ids, *row.completion.token_ids) for row in rows]
    torch.manual_seed(0)
    scores = {
        name: [outcome.value for outcome in RewardModel(str(path), Runtime()).score(texts)]
        for name, path in (("own", own), ("second", second))
    }
    assert [row.reward.raw["second"] for row in rows] == pytest.approx(scores["second"], abs=1e-5)
    plausibility = [row.reward.raw["plausibility"] for row in rows]
    assert plausibility == pytest.approx([0.0, 0.0, scores["own"][2], 0.0], abs=1e-5)
    expected = [
        0.5 * (row.reward.verdict is Verdict.WRONG)
        + 0.25 / (1 + math.exp(-row.reward.raw["plausibility"]))
        + 0.125 / (1 + math.exp(-row.reward.raw["second"]))
        for row in rows
    ]
    assert [row.reward.value for row in rows] == pytest.approx(expected)
    content = file.read_bytes()
    assert rescore_run(run, words, "reverse_rl") == file  # in this process, which has started no Ray
    assert file.read_bytes() == content
    assert not list((run / "rescored").glob("*unfinished*"))
