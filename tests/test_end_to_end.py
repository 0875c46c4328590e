"""A cut-down tiny recipe through every stage: killed once in the middle of reverse RL, resumed, and run again
when it is done."""

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

from pns.config import STAGES as NAMED_STAGES
from pns.data.problems import load_problem_sets
from pns.driver import STAGES
from pns.recipe import load
from pns.stages.context import draw

ROOT = Path(__file__).parents[1]
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
    "preference.steps=3",
    "preference.pairs_per_step=8",
    "evaluate.generator_samples=40",
    "tracking.backends=[tensorboard]",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pns.cli", "run", "recipes/tiny-qwen2.yaml", *SMALL, *arguments]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reached(run: Path, stage: str, step: int) -> bool:
    return any(row["stage"] == stage and row["step"] >= step for row in rows(run / "metrics.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory after a kill in reverse RL (past its first checkpoint) and a resume."""
    runs = tmp_path_factory.mktemp("runs")
    run, log = runs / "small", runs / "log"
    with open(log, "w") as out:
        killed = subprocess.Popen(
            command(f"runs={runs}"), cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
        deadline = time.monotonic() + 300
        try:
            while not reached(run, "reverse_rl", 2):
                assert killed.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    assert not (run / "reverse_rl" / "manifest.json").exists()
    rl_manifest = (run / "rl" / "manifest.json").read_bytes()
    done = subprocess.run(command(f"runs={runs}"), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (run / "rl" / "manifest.json").read_bytes() == rl_manifest, "a finished stage was run again"
    return run


def test_the_command_names_the_drivers_stages() -> None:
    assert tuple(STAGES) == NAMED_STAGES


def test_a_failed_start_changes_nothing(finished: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    for arguments, word in ((["placement.device=cuda"], "placement.device"), (["rl.steps=7"], "rl.steps")):
        failing = command(f"runs={finished.parent}", "--from", "preference", *arguments)
        done = subprocess.run(
            failing,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 2
        assert word in done.stderr
    assert {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name != "lock"
    } == before


def test_every_stage_has_its_manifest(finished: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        assert manifest["seconds"] >= 0
        assert manifest["versions"]["ray"]


def test_no_step_is_skipped_or_repeated(finished: Path) -> None:
    config = load(ROOT / "recipes/tiny-qwen2.yaml", SMALL)
    problems = load_problem_sets(config).train
    for stage, settings in (("rl", config.rl), ("reverse_rl", config.reverse_rl)):
        found = rows(finished / stage / "rollouts.jsonl")
        for step in range(settings.steps):
            expected = [p.id for p in draw(problems, settings.problems_per_step, step, config.seed)]
            sampled = [row["problem"]["id"] for row in found if row["step"] == step]
            assert sampled == [
                identity for identity in expected for _ in range(settings.completions_per_problem)
            ]
        assert len(found) == settings.steps * settings.problems_per_step * settings.completions_per_problem
        logged = [row["step"] for row in rows(finished / "metrics.jsonl") if row["stage"] == stage]
        assert logged == list(range(settings.steps))


def test_rollouts_hold_every_term(finished: Path) -> None:
    rewards = [row["reward"] for row in rows(finished / "reverse_rl" / "rollouts.jsonl")]
    wrong = [r for r in rewards if r["format_ok"] and r["verdict"] == "wrong"]
    assert wrong
    weights = load(ROOT / "recipes/tiny-qwen2.yaml", SMALL).reward.weights
    for reward in wrong:
        assert reward["value"] == pytest.approx(
            weights.wrong
            + weights.reward_model * reward["plausibility"]
            + weights.judge * reward["coherence"]
        )
    assert all(r["value"] == -1 for r in rewards if not r["format_ok"])
    assert all(r["value"] == 0 for r in rewards if r["format_ok"] and r["verdict"] == "correct")


def test_negatives_are_wrong_and_pairs_are_right_over_wrong(finished: Path) -> None:
    for negative in rows(finished / "synthesize" / "negatives.jsonl"):
        assert f"\\boxed{{{negative['problem']['answer']}}}" not in negative["completion"]["text"]
    pairs = rows(finished / "pair" / "pairs.jsonl")
    answers = {
        row["problem"]["id"]: row["problem"]["answer"] for row in rows(finished / "pair" / "rollouts.jsonl")
    }
    assert pairs
    for pair in pairs:
        boxed = f"\\boxed{{{answers[pair['problem_id']]}}}"
        assert boxed in pair["chosen"]
        assert boxed not in pair["rejected"]
    exported = rows(finished / "pair" / "preference.jsonl")
    assert [row["chosen"][0]["content"] for row in exported] == [pair["chosen"] for pair in pairs]


def test_report(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert len(report["suites"]) == 8
    for suite in report["suites"].values():
        for model in ("start", "rl", "preference"):
            assert 0 <= suite[model]["low"] <= suite[model]["accuracy"] <= suite[model]["high"] <= 1
    for when in ("before", "after"):
        assert {"wrong_rate", "format_rate", "reward_model_mean", "judge_mean", "single_error_share"} <= set(
            report["generator"][when]
        )
    assert set(report["stages"]) == set(STAGES)
    assert 0.5 < report["peak_memory_gib"] < 12
    assert report["wall_seconds"] > 0
    assert list(finished.rglob("*.png"))
    assert list(finished.rglob("events.out.tfevents*"))


def test_a_score_equals_a_hand_count(finished: Path) -> None:
    scores = json.loads((finished / "evaluate" / "scores.json").read_text())
    completions = rows(finished / "evaluate" / "preference.jsonl")
    for suite in ("short", "mul"):
        own = [row for row in completions if row["problem"]["suite"] == suite]
        right = [
            row
            for row in own
            if row["completion"].rpartition("\\boxed{")[2].rstrip("}") == row["problem"]["answer"]
        ]
        assert scores[suite]["preference"]["n"] == len(own) == 4
        assert scores[suite]["preference"]["accuracy"] == len(right) / 4


def test_second_run_does_nothing(finished: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    done = subprocess.run(
        command(f"runs={finished.parent}"), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "every stage is done" in done.stdout
    assert {
        path: path.stat().st_mtime_ns
        for path in finished.rglob("*")
        if path.is_file() and path.name != "lock"
    } == before


def test_changed_configuration_is_not_reused(finished: Path) -> None:
    done = subprocess.run(
        command(f"runs={finished.parent}", "preference.beta=0.2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "preference.beta" in done.stderr
    assert "--from preference" in done.stderr
