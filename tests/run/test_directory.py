from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pns.config import Tracking
from pns.errors import UserError
from pns.files import read_jsonl, write_json, write_jsonl
from pns.records import Completion, Problem, Reward, Rollout, Verdict, from_json
from pns.run.directory import RunDirectory, versions
from pns.run.tracking import Tracker

ROOT = Path(__file__).parents[2]


def config(beta: float = 0.1, seed: int = 0, backbone: str = "org/model") -> dict[str, Any]:
    return {
        "seed": seed,
        "models": {"backbone": backbone},
        "rl": {"steps": 5},
        "preference": {"beta": beta, "steps": 3},
    }


def run_stages(path: Path, settings: dict[str, Any], text: str = "weights") -> None:
    """A stage `rl` and a stage `preference` that reads it."""
    with RunDirectory.open(path, settings) as run:
        with run.stage("rl", ("models", "rl"), ()) as directory:
            (directory / "model.txt").write_text(text)
            run.count("rl", samples=7)
        with run.stage("preference", ("preference",), ("rl",)) as directory:
            (directory / "out.txt").write_text("o")


def test_manifest_tells_what_was_made_from_what(tmp_path: Path) -> None:
    run_stages(tmp_path / "r", config())
    run = RunDirectory(tmp_path / "r")
    manifest = run.manifest("rl")
    assert manifest is not None
    assert manifest["outputs"] == {"model.txt": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["config"] == {"seed": 0, "models.backbone": "org/model", "rl.steps": 5}
    assert manifest["counts"] == {"samples": 7}
    assert 0 <= manifest["seconds"] < 5
    assert manifest["versions"]["torch"]
    assert manifest["started"] <= manifest["ended"]
    preference = run.manifest("preference")
    assert preference is not None
    assert preference["inputs"] == {
        "rl": hashlib.sha256(json.dumps(manifest["outputs"]).encode()).hexdigest()
    }
    assert not list((tmp_path / "r").rglob("progress.json"))
    assert "beta: 0.1" in (tmp_path / "r" / "config.yaml").read_text()


def test_a_finished_stage_is_done_and_a_changed_key_is_named(tmp_path: Path) -> None:
    run_stages(tmp_path / "r", config())

    def done(settings: dict[str, Any]) -> list[bool]:
        with RunDirectory.open(tmp_path / "r", settings) as run:
            return [
                run.is_done("rl", ("models", "rl"), ()),
                run.is_done("preference", ("preference",), ("rl",)),
                run.is_done("new", (), ()),
            ]

    assert done(config()) == [True, True, False]
    with pytest.raises(
        UserError,
        match=r"preference.beta was 0.1 when stage preference .* is 0.2 now: .*--from preference.*name=NAME",
    ):
        done(config(beta=0.2))
    with pytest.raises(UserError, match=r"seed was 0 when stage rl .*--from rl"):
        done(config(seed=1))
    assert (
        "beta: 0.1" in (tmp_path / "r" / "config.yaml").read_text()
    )  # a refused configuration is not written


def test_a_dotted_section_depends_on_one_key(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, config()) as run:
        with run.stage("rl", ("preference.steps",), ()):
            pass
        assert run.is_done("rl", ("preference.steps",), ())
    with RunDirectory.open(tmp_path, config(beta=9.0)) as run:
        assert run.is_done("rl", ("preference.steps",), ())


def test_another_output_of_a_stage_that_was_read_is_noticed(tmp_path: Path) -> None:
    run_stages(tmp_path, config())
    manifest = json.loads((tmp_path / "rl" / "manifest.json").read_text())
    write_json(tmp_path / "rl" / "manifest.json", manifest | {"outputs": {"model.txt": "other"}})
    with (
        RunDirectory.open(tmp_path, config()) as run,
        pytest.raises(UserError, match=r"another output of stage rl.*--from preference"),
    ):
        run.is_done("preference", ("preference",), ("rl",))


def test_changed_input_files_are_noticed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.bin").write_bytes(b"one")
    settings = config(backbone=str(model))
    run_stages(tmp_path / "r", settings)
    with RunDirectory.open(tmp_path / "r", settings) as run:
        os.utime(model / "a.bin", (1, 1))  # another time, the same content
        assert run.is_done("rl", ("models", "rl"), ())
        (model / "a.bin").write_bytes(b"two")
        with pytest.raises(UserError, match=r"models.backbone: .*model has changed since stage rl"):
            run.is_done("rl", ("models", "rl"), ())


def test_an_interrupted_stage_continues_with_its_time_and_its_configuration(tmp_path: Path) -> None:
    def interrupted(run: RunDirectory) -> None:
        with run.stage("rl", ("rl",), ()) as directory:
            (directory / "half").write_text("x")
            run.count("rl", before=1)
            time.sleep(0.05)
            raise KeyboardInterrupt

    with RunDirectory.open(tmp_path, config()) as run, pytest.raises(KeyboardInterrupt):
        interrupted(run)
    assert not (tmp_path / "rl" / "manifest.json").exists()
    with (
        RunDirectory.open(tmp_path, {**config(), "rl": {"steps": 6}}) as run,
        pytest.raises(UserError, match=r"rl.steps was 5 .* is 6 now"),
    ):
        run.is_done("rl", ("rl",), ())
    with RunDirectory.open(tmp_path, config()) as run:
        assert not run.is_done("rl", ("rl",), ())
        with run.stage("rl", ("rl",), ()) as directory:
            assert (directory / "half").exists()
            run.count("rl", after=2)
        manifest = run.manifest("rl")
    assert manifest is not None
    assert manifest["seconds"] >= 0.05
    assert manifest["counts"] == {"before": 1, "after": 2}


def test_counts_need_a_running_stage(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, config()) as run, pytest.raises(ValueError, match="not running"):
        run.count("rl", n=1)


def test_from_sets_stages_aside(tmp_path: Path) -> None:
    run_stages(tmp_path, config())
    rows = [{"stage": stage, "step": 0} for stage in ("rl", "preference", "preference_held_out")]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    with RunDirectory.open(tmp_path, config()) as run:
        previous = run.set_aside(["preference", "evaluate"])
        assert previous is not None
        assert (previous / "preference" / "out.txt").read_text() == "o"
        assert read_jsonl(previous / "metrics.jsonl") == rows[1:]
        assert read_jsonl(tmp_path / "metrics.jsonl") == rows[:1]
        assert run.is_done("rl", ("models", "rl"), ())
        assert not run.is_done("preference", ("preference",), ("rl",))
        assert run.set_aside(["preference"]) is None


def fail_to_save(run: RunDirectory) -> None:
    with run.checkpoint("rl", 12) as saved:
        (saved / "shard").write_text("half")
        raise OSError("disk full")


def test_checkpoints_are_complete_and_two_are_kept(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, config()) as run, run.stage("rl", ("rl",), ()) as directory:
        assert run.latest_checkpoint("rl") is None
        for step in (2, 4, 10):
            with run.checkpoint("rl", step) as saved:
                (saved / "shard").write_text(str(step))
        with pytest.raises(OSError, match="disk full"):
            fail_to_save(run)
        latest = run.latest_checkpoint("rl")
        assert latest is not None
        assert latest.step == 10
        assert (latest.path / "shard").read_text() == "10"
        assert [path.name for path in sorted(directory.glob("checkpoints/step-*"))] == [
            "step-00000004",
            "step-00000010",
        ]
        assert json.loads((directory / "progress.json").read_text())["seconds"] > 0
    assert not (tmp_path / "rl" / "checkpoints").exists()  # the stage is finished
    assert json.loads((tmp_path / "rl" / "manifest.json").read_text())["outputs"] == {}


def test_what_a_crash_leaves_behind_is_removed_at_the_start(tmp_path: Path) -> None:
    partial = tmp_path / "rl" / "checkpoints" / ".partial-step-00000012"
    partial.mkdir(parents=True)
    (partial / "shard").write_text("half")
    (tmp_path / "rl" / ".partial-scores.json").write_text("{")
    with RunDirectory.open(tmp_path, config()) as run, run.stage("rl", ("rl",), ()) as directory:
        assert not [path for path in directory.rglob("*") if "partial" in path.name]
        assert run.latest_checkpoint("rl") is None


def test_only_one_driver_at_a_time(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, config()):
        other = "import sys; from pns.run.directory import RunDirectory\nwith RunDirectory.open(sys.argv[1], {}): pass"
        done = subprocess.run(
            [sys.executable, "-c", other, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        assert f"in use by process {os.getpid()} on" in done.stderr
    (tmp_path / "lock").write_text("process 1 on elsewhere\n")  # of a process that has died
    with RunDirectory.open(tmp_path, config()):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def rollout(step: int) -> Rollout:
    completion = Completion("c", "p", "tëxt\n2", (1, 2), (-0.5, -1.0), "stop")
    return Rollout(
        step,
        Problem("p", "q", "5"),
        completion,
        Reward(None, True, Verdict.UNVERIFIED, missing={"verdict": "timeout"}),
    )


def test_rows_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, config()) as run, run.stage("rl", ("rl",), ()) as directory:
        rows = run.append_rows("rl", "rollouts.jsonl", 0)
        for step in range(4):
            rows.append([rollout(step), rollout(step)])
        with open(directory / "rollouts.jsonl", "a") as file:
            file.write('{"step": 4, "prob')  # killed while writing
        rows = run.append_rows("rl", "rollouts.jsonl", 2)
        assert [row["step"] for row in read_jsonl(rows.path)] == [0, 0, 1, 1]
        rows.append([rollout(2)])
        assert [from_json(Rollout, row) for row in read_jsonl(rows.path)] == [
            rollout(step) for step in (0, 0, 1, 1, 2)
        ]
        assert read_jsonl(run.append_rows("rl", "rollouts.jsonl", 0).path) == []


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["ray"]
    assert found["transformers"]


def test_wall_time_and_memory_add_up_over_processes(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"wall_seconds": 100.0, "peak_memory_gib": 5.0})
    with RunDirectory.open(tmp_path, config()) as run:
        run.record_peak_memory(3.0)
    values = RunDirectory(tmp_path).read_json(tmp_path / "run.json")
    assert 100 < values["wall_seconds"] < 110
    assert values["peak_memory_gib"] == 5.0


class Recorder:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished += 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_metrics_and_their_resume(tmp_path: Path) -> None:
    run, recorder, out = RunDirectory(tmp_path), Recorder(), io.StringIO()
    opened: list[object] = []

    def open_backends(*arguments: object) -> Recorder:
        opened.extend(arguments)
        return recorder

    tracker = Tracker(run, Tracking(["tensorboard"], "project"), open_backends, out)
    assert opened == ["project", tmp_path.name, ["tensorboard"]]
    tracker.begin("rl", 3, 0)
    for step in range(3):
        tracker.log(step, {"reward": step / 2, "loss": math.nan})
    tracker.end()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "st')
    tracker.begin("preference", 2, 0)
    tracker.log(0, {"loss": 0.7})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["stage"], row["step"], row["values"]) for row in rows] == [
        ("rl", 0, {"reward": 0.0, "loss": None}),
        ("rl", 1, {"reward": 0.5, "loss": None}),
        ("rl", 2, {"reward": 1.0, "loss": None}),
        ("preference", 0, {"loss": 0.7}),
    ]
    assert abs(rows[0]["time"] - time.time()) < 60
    assert recorder.logged == [
        (0, {"rl/reward": 0.0}),
        (1, {"rl/reward": 0.5}),
        (2, {"rl/reward": 1.0}),
        (3, {"preference/loss": 0.7}),
    ]
    tracker.begin("rl", 3, 1)  # resumed after step 0: only the later rows of this stage go
    assert [(row["stage"], row["step"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == [
        ("rl", 0),
        ("preference", 0),
    ]
    tracker.close()
    assert recorder.finished == 1
    first, last = out.getvalue().splitlines()[
        :2
    ]  # a first line, and the stage's last; none in the seconds between
    assert first.startswith("rl  1/3  ETA 0:")
    assert "reward 0  loss -" in first
    assert last.startswith("rl  3/3  ETA 0:00  reward 1")


def test_one_live_line_on_a_terminal(tmp_path: Path) -> None:
    out = Terminal()
    tracker = Tracker(RunDirectory(tmp_path), Tracking(), out=out)
    tracker.begin("rl", 2, 0)
    tracker.log(0, {"reward": 0.5})
    tracker.log(1, {"reward": 0.75})
    tracker.end()
    assert out.getvalue().count("\r\x1b[K") == 2
    assert out.getvalue().count("\n") == 1


def test_backends_without_anything_to_open_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing opens them"):
        Tracker(RunDirectory(tmp_path), Tracking(["wandb"]))
