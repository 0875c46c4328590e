"""A cut-down tiny recipe through every stage, as processes: killed once in the middle of reverse RL and
resumed; a second arm on the same runs directory; and a changed key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pns import driver
from pns.config import STAGES, Config
from pns.data.problems import load_problem_sets
from pns.errors import UserError
from pns.recipe import load
from pns.run.page import linked_places
from pns.stages.context import draw

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/tiny-qwen2.yaml"
SMALL = [
    "name=small",
    "data.tiny.num_train=40",
    "data.tiny.num_reward=60",
    "data.tiny.num_preference=40",
    "data.tiny.num_test_per_suite=4",
    "placement.rollout.replicas=1",
    "placement.policy.replicas=1",
    "rl.steps=3",
    "rl.problems_per_step=8",
    "rl.completions_per_problem=4",
    "reward_model.steps=4",
    "reverse_rl.steps=5",
    "reverse_rl.problems_per_step=8",
    "reverse_rl.completions_per_problem=4",
    "reverse_rl.checkpoint_every=2",
    "reverse_rl.refresh_every=3",
    "reverse_rl.refresh_steps=2",
    "preference.steps=3",
    "preference.pairs_per_step=8",
    "evaluate.generator_samples=40",
    "tracking.backends=[tensorboard]",
]
LIMIT_SECONDS = 1500  # of one process; a minute where nothing else runs
MODELS = ("backbone", "target", "result")


def command(runs: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pns.cli", "run", RECIPE, *SMALL, f"runs={runs}", *overrides]


def run(runs: Path, *overrides: str) -> str:
    """Make a run; what it printed."""
    done = subprocess.run(
        command(runs, *overrides),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def small(page: Path) -> Config:
    return load(ROOT / RECIPE, [*SMALL, f"runs={page.parent}"])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def written_at(runs: Path) -> dict[Path, int]:
    """File -> time of its last change in ns."""
    files = [path for path in runs.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's page after a kill in reverse RL, past its first checkpoint, and a resume."""
    runs = tmp_path_factory.mktemp("runs")
    page, log = runs / "small", runs / "log"
    with open(log, "w") as out:
        killed = subprocess.Popen(command(runs), cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + LIMIT_SECONDS
        metrics = page / "reverse_rl" / "metrics.jsonl"
        try:
            while len(metrics.read_text().splitlines() if metrics.exists() else []) < 3:
                assert killed.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    assert not (page / "reverse_rl" / "manifest.json").exists()
    # As if it had come before the first completion of its step: a part of them, sampled alone, would have
    # other last bits. `tests/stages/test_grpo.py` has the rest of a step.
    (page / "reverse_rl" / "rollouts.unfinished.jsonl").unlink(missing_ok=True)
    before = linked_places(page)
    times = written_at(before["rl"]) | written_at(before["reward_model"])
    run(runs)
    after = linked_places(page)
    assert {name: after[name] for name in before} == before
    assert times.items() <= written_at(runs / driver.STORE).items(), "a finished stage was made again"
    return page


def test_every_stage_has_its_manifest(finished: Path) -> None:
    assert set(linked_places(finished)) == set(STAGES)
    for name in STAGES:
        manifest = json.loads((finished / name / "manifest.json").read_text())
        assert manifest["outputs"]
        assert not list((finished / name).rglob("*unfinished*"))


def test_a_run_that_was_killed_is_an_undisturbed_one_to_the_bit(finished: Path, tmp_path: Path) -> None:
    """Weights, rollouts with all rewards, pairs, completions and scores; only times differ. The one that was
    not killed has rollout and policy in the same place."""
    run(tmp_path, "placement.colocate=[rollout,policy]")
    for name in STAGES:
        manifests = [
            json.loads((page / name / "manifest.json").read_text()) for page in (finished, tmp_path / "small")
        ]
        killed, undisturbed = (
            {file: entry["sha256"] for file, entry in manifest["outputs"].items() if file != "metrics.jsonl"}
            for manifest in manifests
        )
        assert killed == undisturbed, name


def test_no_step_is_skipped_or_repeated(finished: Path) -> None:
    config = small(finished)
    problems = load_problem_sets(config).train
    for stage, settings in (("rl", config.rl), ("reverse_rl", config.reverse_rl)):
        sampled = [(row["step"], row["problem"]["id"]) for row in rows(finished / stage / "rollouts.jsonl")]
        expected = []
        for step in range(settings.steps):
            for problem in draw(problems, settings.problems_per_step, step, config.seed):
                expected += [(step, problem.id)] * settings.completions_per_problem
        assert sampled == expected
        logged = [row["step"] for row in rows(finished / stage / "metrics.jsonl")]
        assert logged == list(range(settings.steps))


def test_rollouts_hold_every_term(finished: Path) -> None:
    rewards = [row["reward"] for row in rows(finished / "reverse_rl" / "rollouts.jsonl")]
    rules = small(finished).reward
    wrong = [reward for reward in rewards if reward["format_ok"] and reward["verdict"] == "wrong"]
    assert wrong
    for reward in wrong:
        terms = sum(term.weight * reward["terms"][name] for name, term in rules.terms.items())
        assert reward["value"] == pytest.approx(terms)
    assert all(reward["value"] == -1 for reward in rewards if not reward["format_ok"])
    right = [reward for reward in rewards if reward["format_ok"] and reward["verdict"] == "correct"]
    assert all(reward["value"] == 0 and not reward["terms"] for reward in right)


def test_negatives_are_wrong_and_pairs_are_right_over_wrong(finished: Path) -> None:
    negatives = rows(finished / "synthesize" / "negatives.jsonl")
    assert negatives
    for negative in negatives:
        assert f"\\boxed{{{negative['problem']['answer']}}}" not in negative["completion"]["text"]
    pairs, problems = rows(finished / "pair" / "pairs.jsonl"), rows(finished / "pair" / "rollouts.jsonl")
    answers = {row["problem"]["id"]: row["problem"]["answer"] for row in problems}
    assert pairs
    for pair in pairs:
        boxed = f"\\boxed{{{answers[pair['problem_id']]}}}"
        assert boxed in pair["chosen"]
        assert boxed not in pair["rejected"]
    standard = rows(finished / "pair" / "preference.jsonl")
    assert [row["chosen"][0]["content"] for row in standard] == [pair["chosen"] for pair in pairs]


def test_report(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert len(report["suites"]) == 8
    for suite in report["suites"].values():
        for model in MODELS:
            assert 0 <= suite[model]["low"] <= suite[model]["accuracy"] <= suite[model]["high"] <= 1
    figures = {"wrong_rate", "format_rate", "plausibility_mean", "coherence_mean", "single_error_share"}
    for when in ("before", "after"):
        assert figures <= set(report["generator"][when])
    assert set(report["stages"]) == set(STAGES)
    assert 0.5 < report["peak_memory_gib"] < 24
    assert report["wall_seconds"] > 0
    page = (finished / "report.html").read_text()
    assert page.count("<figure>") > 5
    assert (finished / "browse" / "solutions-1.html").is_file()
    assert list((finished / "tensorboard").rglob("events.out.tfevents*"))


def test_a_score_equals_a_hand_count(finished: Path) -> None:
    scores = json.loads((finished / "evaluate" / "scores.json").read_text())
    completions = rows(finished / "evaluate" / "result.jsonl")
    for suite in ("short", "mul"):
        own = [row for row in completions if row["problem"]["suite"] == suite]
        boxed = [row["completion"].rpartition("\\boxed{")[2].rstrip("}") for row in own]
        right = [answer == row["problem"]["answer"] for answer, row in zip(boxed, own, strict=True)]
        assert scores[suite]["result"]["n"] == len(own) == 4
        assert scores[suite]["result"]["accuracy"] == sum(right) / 4


def test_a_finished_run_does_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written_at(finished.parent)
    assert driver.run(small(finished)) == finished
    assert "every stage is done" in capsys.readouterr().out
    assert written_at(finished.parent) == before


def test_damage_is_said_before_anything_starts(finished: Path) -> None:
    report = finished / "reward_model" / "quality.json"
    text = report.read_bytes()
    report.write_bytes(text[:10])
    try:
        with pytest.raises(UserError, match=r"quality.json is not what .*--from reward_model"):
            driver.run(small(finished))
    finally:
        report.write_bytes(text)
    assert driver.run(small(finished)) == finished


def test_a_second_arm_makes_only_what_is_not_shared(finished: Path) -> None:
    runs = finished.parent
    before = written_at(runs)
    run(runs, "negatives=rs", "name=rs")
    first, second = linked_places(finished), linked_places(runs / "rs")
    assert {name for name in second if second[name] == first[name]} == {"rl", "reward_model"}
    assert set(second) == set(STAGES) - {"reverse_rl"}
    assert before.items() <= written_at(runs).items(), "the second arm changed what the first one has"
    assert "generator" not in json.loads((runs / "rs" / "report.json").read_text())


def test_a_changed_key_makes_its_stage_and_what_follows_anew(finished: Path) -> None:
    runs = finished.parent
    before, old = written_at(runs / driver.STORE), linked_places(finished)
    said = run(runs, "preference.nll_weight=2.0")
    new = linked_places(finished)
    assert {name for name in new if new[name] != old[name]} == {"preference", "evaluate"}
    assert before.items() <= written_at(runs / driver.STORE).items(), "an output of before was changed"
    assert "nll_weight was 5.0 and is 2.0" in said
    run_of_before = driver.run(small(finished))  # back to what is there: links only
    assert linked_places(run_of_before) == old
