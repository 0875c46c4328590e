"""Metrics on disk, at backends and on the terminal."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

from pns.config import Tracking, TrackingBackend
from pns.files import read_jsonl
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker


class Recorder:
    """Backends that remember what they were given."""

    def __init__(self) -> None:
        self.opened_with: list[object] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.num_finished = 0

    def open(self, *arguments: object) -> Recorder:
        self.opened_with = list(arguments)
        return self

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))

    def finish(self) -> None:
        self.num_finished += 1


def make_tracker(page: Path, recorder: Recorder, out: io.StringIO, num_rows: int = 0) -> Tracker:
    settings = Tracking([TrackingBackend.tensorboard], "project")
    return Tracker(page, settings, recorder.open, num_rows, PlainTerminal(out))


def logged_steps(directory: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_jsonl(directory / "metrics.jsonl")]


def test_metrics_go_to_the_stage_and_to_backends(tmp_path: Path) -> None:
    recorder = Recorder()
    tracker = make_tracker(tmp_path, recorder, io.StringIO(), num_rows=7)
    assert recorder.opened_with == ["project", tmp_path.name, ["tensorboard"]]
    directories = [tmp_path / "rl", tmp_path / "preference"]
    for directory in directories:
        directory.mkdir()
    tracker.enter(directories[0])
    tracker.begin("rl", 2, 0)
    tracker.log(0, {"reward": 0.0, "loss": math.nan})
    tracker.log(1, {"reward": 0.5, "loss": math.inf})
    tracker.end()
    tracker.enter(directories[1])
    assert tracker.begin("preference", 1, 0) == []
    tracker.log(0, {"loss": 0.7})
    rows = read_jsonl(directories[0] / "metrics.jsonl")
    assert [row["values"] for row in rows] == [{"reward": 0.0, "loss": None}, {"reward": 0.5, "loss": None}]
    assert rows[0]["time"] <= rows[1]["time"] <= time.time()
    assert logged_steps(directories[1]) == [("preference", 0)]
    # What backends get never falls from one stage, or one process, to the next.
    assert recorder.logged == [
        (7, {"rl/reward": 0.0}),
        (8, {"rl/reward": 0.5}),
        (9, {"preference/loss": 0.7}),
    ]
    tracker.close()
    tracker.close()
    assert recorder.num_finished == 1


def test_a_resumed_series_drops_only_its_own_later_rows(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path, Recorder(), io.StringIO())
    for series in ("main", "held_out"):
        tracker.begin(series, 3, 0)
        for step in range(3):
            tracker.log(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "held_out", "st')  # killed while writing
    assert tracker.begin("main", 3, 1) == [{"loss": 0.0}]
    assert logged_steps(tmp_path) == [("main", 0), *(("held_out", step) for step in range(3))]


def test_no_backend_is_opened_where_none_is_asked_for(tmp_path: Path) -> None:
    recorder = Recorder()
    tracker = Tracker(tmp_path, Tracking(), recorder.open, terminal=PlainTerminal(io.StringIO()))
    tracker.begin("rl", 1, 0)
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert (recorder.opened_with, recorder.logged, recorder.num_finished) == ([], [], 0)
