"""The preference stage on given pairs, in one set of training processes: every loss, margins, cache, resume,
and bad input."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pns import cli, recipe
from pns.config import Config
from pns.driver import load_prompts
from pns.errors import UserError
from pns.files import read_jsonl
from pns.preference_losses import PREFERENCE_LOSSES
from pns.run.place import Place
from pns.run.stage import ModelFiles
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages.artefacts import PreferenceTrained
from pns.stages.context import Context, Problems
from pns.stages.preference import chosen_falls, preference
from pns.tiny import world as tiny_world
from workers.fleet import Fleet
from workers.runtime import Runtime

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes" / "tiny" / "qwen2"
SMALL = ["placement.policy.replicas=1", "preference.steps=3", "preference.pairs_per_step=4"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs in the standard format: a right solution, and one with another number of the world in its
    answer."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for problem in tiny_world.problems("preference", None, 6, 0):
        assert problem.solution
        wrong = problem.solution.replace(f"={problem.answer}.", f"={int(problem.answer) + 1}.")
        wrong = wrong.replace(f"{{{problem.answer}}}", f"{{{int(problem.answer) + 1}}}")
        rows.append(
            {
                "prompt": [{"role": "user", "content": problem.prompt}],
                "chosen": [{"role": "assistant", "content": problem.solution}],
                "rejected": [{"role": "assistant", "content": wrong}],
                "score_chosen": 1.5,
                "score_rejected": 0.5,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fleet(ray_session: None) -> Iterator[Fleet]:
    made = Fleet(load(["preference.loss=sigmoid", "preference.nll_weight=null"]), Runtime("cpu"))
    yield made
    made.shutdown()


def load(overrides: list[str]) -> Config:
    return recipe.load(ROOT / "recipes/tiny-qwen2.yaml", [*SMALL, f"models.backbone={MODEL}", *overrides])


Train = Callable[..., tuple[Path, list[dict[str, Any]], str]]


def no_backends(*_: Any) -> Any:
    raise AssertionError("no tracking backend is asked for")


@pytest.fixture
def train(fleet: Fleet, pairs: Path, tmp_path: Path) -> Train:
    """`train(override, ...)` runs the stage, and gives the stage's directory, the metrics of its steps and
    what the terminal showed."""

    def run(
        *overrides: str, name: str = "run", loss: str = "sigmoid"
    ) -> tuple[Path, list[dict[str, Any]], str]:
        given = [f"preference.data.path={pairs}", f"preference.loss={loss}", "preference.nll_weight=null"]
        config, out = load([*given, *overrides]), io.StringIO()
        fleet.policy.settings = config.policy
        place = Place(tmp_path / name)
        tracker = Tracker(tmp_path, config.tracking, no_backends, terminal=PlainTerminal(out))
        ctx = Context(config.seed, place, fleet, load_prompts(config), tracker, shared=tmp_path)
        with ctx.making({"inputs": []}):
            tracker.enter(place.directory)
            settings = preference.settings(config)
            trained = preference.make(ctx, settings, ModelFiles(MODEL), None, Problems([]), None)
        assert isinstance(trained, PreferenceTrained)
        steps = [row["values"] for row in read_jsonl(place.directory / "metrics.jsonl")]
        return place.directory, steps, out.getvalue()

    return run


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_trains_and_only_those_with_a_reference_make_one(
    loss: str, train: Train, tmp_path: Path
) -> None:
    directory, steps, _ = train(
        "preference.optimizer.learning_rate=1e-3",
        "preference.pairs_per_step=6",
        "preference.steps=6",
        "preference.optimizer.warmup_steps=0",
        loss=loss,
    )
    entry = PREFERENCE_LOSSES[loss]
    assert len(steps) == 6
    assert all(math.isfinite(step["loss"]) and step["update_skipped"] == 0 for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    # Losses without a reference weigh other things, too.
    assert steps[-1]["margin"] > steps[0]["margin"] or not entry.needs_reference
    assert (directory / "model" / "model.safetensors").is_file()
    if loss in ("sigmoid", "length_normalised"):
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    if entry.needs_kl:
        assert steps[0]["kto_kl"] == pytest.approx(0, abs=1e-6)  # the policy is the reference
    cached = len(list((tmp_path / "reference_cache").glob("*")))
    assert cached == entry.needs_reference + entry.needs_kl


def test_kto_estimates_its_kl_on_mismatched_pairs(
    train: Train, fleet: Fleet, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts with the completions of the next pair, under the policy of the step; the reference is what
    it was before the first."""
    given, found = [], []
    train_step, infer_log_probs = fleet.policy.train_step, fleet.policy.log_probs

    def step(batch: Any, loss: Any) -> dict[str, float]:
        found.append(loss.kl)
        return train_step(batch, loss)

    def infer(batch: Any) -> Any:
        values = infer_log_probs(batch)
        given.append((batch, values))
        return values

    monkeypatch.setattr(fleet.policy, "train_step", step)
    monkeypatch.setattr(fleet.policy, "log_probs", infer)
    train(
        "preference.pairs_per_step=6",
        "preference.optimizer.learning_rate=1e-2",
        "preference.margin=completion",
        loss="kto",
    )
    (own, _), (mismatched, reference), *steps = given
    assert mismatched.prompt_ids == own.prompt_ids
    assert mismatched.completion_ids == [*own.completion_ids[2:], *own.completion_ids[:2]]
    before = {
        (prompt, ids): row.sum()
        for prompt, ids, row in zip(mismatched.prompt_ids, mismatched.completion_ids, reference, strict=True)
    }
    assert len(steps) == len(found) == 3
    for (batch, values), kl in zip(steps, found, strict=True):
        ratios = [
            row.sum() - before[prompt, ids]
            for prompt, ids, row in zip(batch.prompt_ids, batch.completion_ids, values, strict=True)
        ]
        assert kl == pytest.approx(max(0.0, float(np.mean(ratios))), abs=1e-4)


def test_the_reference_is_computed_once_for_a_sweep_and_again_for_other_data(
    train: Train, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    log_probs = fleet.policy.log_probs
    monkeypatch.setattr(
        fleet.policy, "log_probs", lambda batch: computed.append(len(batch)) or log_probs(batch)
    )
    _, first, _ = train(name="a")
    train("preference.beta=0.5", "preference.margin=first_divergent_token", name="b")
    assert computed == [12]
    train("preference.data.limit=5", name="c")
    assert computed == [12, 10]
    for file in (tmp_path / "reference_cache").glob("*"):
        damaged = bytearray(file.read_bytes())
        damaged[-2] ^= 1
        file.write_bytes(damaged)
    _, again, _ = train(name="d")
    assert computed == [12, 10, 12]
    assert [step["loss"] for step in again] == [step["loss"] for step in first]


def test_a_resumed_stage_takes_the_steps_that_were_left(
    train: Train, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = train("preference.checkpoint_every=2", "preference.steps=5", name="whole")
    train_step = fleet.policy.train_step

    def interrupted(batch: Any, loss: Any) -> dict[str, float]:
        if len(read_jsonl(tmp_path / "cut" / "metrics.jsonl")) == 2:
            raise KeyboardInterrupt  # while the checkpoint after the second step is being written
        return train_step(batch, loss)

    monkeypatch.setattr(fleet.policy, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("preference.checkpoint_every=2", "preference.steps=5", name="cut")
    checkpoint = Place(tmp_path / "cut").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == 2
    monkeypatch.setattr(fleet.policy, "train_step", train_step)
    _, resumed, _ = train("preference.checkpoint_every=2", "preference.steps=5", name="cut")
    assert [step["loss"] for step in resumed] == [step["loss"] for step in whole]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_it_resumable(
    train: Train, pairs: Path, tmp_path: Path
) -> None:
    diverging = [
        "preference.optimizer.learning_rate=1e30",
        "preference.optimizer.clip_grad=1e30",
        "preference.optimizer.warmup_steps=0",
    ]
    with pytest.raises(
        UserError,
        match=rf"not finite at step 1 \({pairs}, line \d and 2 more\): .*learning_rate.*max_skipped_updates",
    ):
        train(*diverging)
    _, steps, _ = train(*diverging, "preference.max_skipped_updates=2", name="skips")
    assert [step["update_skipped"] for step in steps] == [0, 1, 1]
    directory, steps, _ = train()
    assert len(steps) == 3
    assert all(step["loss"] is not None for step in steps)
    assert (directory / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"rejected": [{"role": "assistant", "content": " "}]}, "empty_side"),
        ({"rejected": "as chosen"}, "identical_sides"),
        ({"prompt": [{"role": "user", "content": "Ann has 3. " * 40}]}, "prompt_too_long"),
    ],
)
def test_bad_pairs_stop_before_training_or_are_dropped_and_counted(
    change: dict[str, Any], cause: str, train: Train, pairs: Path, tmp_path: Path
) -> None:
    rows = read_jsonl(pairs)
    rows[3] |= {key: rows[3]["chosen"] if value == "as chosen" else value for key, value in change.items()}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{mixed}, line 4: .*preference.data.bad_pairs=drop"):
        train(f"preference.data.path={mixed}")
    directory, steps, _ = train(f"preference.data.path={mixed}", "preference.data.bad_pairs=drop")
    assert len(steps) == 3
    assert json.loads((directory / "manifest.json").read_text())["counts"] == {"pairs": 5} | {
        key: int(key == cause) for key in json.loads((directory / "data.json").read_text())["dropped"]
    }


def test_a_pair_larger_than_the_token_budget_names_its_line(train: Train, pairs: Path) -> None:
    with pytest.raises(UserError, match=rf"{pairs}, line \d: .*policy.max_tokens_per_micro_batch"):
        train("policy.max_tokens_per_micro_batch=60")


def test_falling_chosen_completions_are_warned_about_once(train: Train) -> None:
    # A hinge on the last token alone, with a large step: both sides fall.
    _, steps, shown = train(
        "preference.steps=14", "preference.beta=5.0", "preference.optimizer.learning_rate=1e-2"
    )
    falling = float(np.mean([step["chosen_log_ratio"] for step in steps[-10:]])) < -1
    assert falling
    assert shown.count("chosen completions are") == 1
    assert chosen_falls([{"chosen_log_ratio": 0.5}] * 12) == ""
    assert chosen_falls([{"chosen_log_ratio": -9.0}] * 9) == ""
    assert "from 1 to 2 a token" in chosen_falls([{"chosen_nll": 1.0}] * 10 + [{"chosen_nll": 2.0}] * 10)


def test_given_pairs_leave_out_the_stages_that_make_them(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(ROOT / "recipes/tiny-qwen2.yaml"), f"preference.data.path={pairs}"]
    assert cli.main(["run", "--from", "pair", *arguments]) == 2
    assert capsys.readouterr().err.startswith(
        "pns: --from pair: the stages of this run are preference, evaluate"
    )
