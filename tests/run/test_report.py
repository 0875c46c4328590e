from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pns.files import write_json, write_jsonl
from pns.run.directory import RunDirectory
from pns.run.report import write_report

SCORES = {
    suite: {
        model: {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 40}
        for model, accuracy in (("start", 0.5), ("rl", 0.6), ("preference", 0.625))
    }
    for suite in ("gsm8k", "mean")
}
BEFORE = {
    "wrong_rate": 0.4,
    "format_rate": 0.9,
    "reward_model_mean": 0.3,
    "judge_mean": 0.5,
    "single_error_share": None,
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    with RunDirectory.open(tmp_path / "r", {"seed": 0}) as run:
        with run.stage("reverse_rl", (), ()) as directory:
            write_json(
                directory / "generator.json", {"before": BEFORE, "after": BEFORE | {"wrong_rate": 0.9}}
            )
            run.count("reverse_rl", samples=3)
        run.record_peak_memory(2.5)
    rows = [
        {
            "stage": "reverse_rl",
            "step": s,
            "time": 0.0,
            "values": {"reward": s / 10, "loss": None if s else 1.0},
        }
        for s in range(5)
    ]
    write_jsonl(
        run.path / "metrics.jsonl",
        [*rows, {"stage": "pair", "step": 0, "time": 0.0, "values": {"pairs": 5.0}}],
    )
    return run


def printed(run: RunDirectory) -> str:
    out = io.StringIO()
    write_report(run, Console(file=out, width=120))
    return out.getvalue()


def test_report_of_a_whole_run(run: RunDirectory) -> None:
    with RunDirectory.open(run.path, {"seed": 0}) as opened:
        with opened.stage("pair", (), ("reverse_rl",)) as directory:
            write_json(
                directory / "scores.json", {"correct": [1.0, 2.0], "rs": [-1.0], "pns": [0.5, 1.5, 1.0]}
            )
            write_json(directory / "quality.json", {"one_sidedness": 0.25})
        with opened.stage("evaluate", (), ("pair",)) as directory:
            write_json(directory / "scores.json", SCORES)
    text = printed(run)
    report = json.loads((run.path / "report.json").read_text())
    assert report["suites"] == SCORES
    assert report["generator"]["after"] == BEFORE | {"wrong_rate": 0.9}
    assert report["pairs"] == {"one_sidedness": 0.25}
    assert list(report["stages"]) == ["reverse_rl", "pair", "evaluate"]  # as they ended
    assert report["stages"]["reverse_rl"]["counts"] == {"samples": 3}
    assert report["wall_seconds"] > 0
    assert report["peak_memory_gib"] == 2.5
    assert report["versions"]["python"]
    assert "62.5 [52.5, 72.5]" in text
    assert "wrong_rate" in text
    plots = sorted(path.name for path in (run.path / "plots").iterdir())
    assert plots == ["reverse_rl.png", "reward_model_scores.png"]  # `pair` has one step only
    for plot in plots:
        assert (run.path / "plots" / plot).read_bytes().startswith(b"\x89PNG")


def test_report_of_a_run_until_reverse_rl(run: RunDirectory) -> None:
    printed(run)
    report = json.loads((run.path / "report.json").read_text())
    assert set(report) == {"generator", "stages", "versions", "wall_seconds", "peak_memory_gib"}
    assert [path.name for path in (run.path / "plots").iterdir()] == ["reverse_rl.png"]


def test_report_of_nothing(tmp_path: Path) -> None:
    assert write_report(RunDirectory(tmp_path), Console(file=io.StringIO())) == {"stages": {}}


def test_plots_of_set_aside_stages_go(run: RunDirectory) -> None:
    printed(run)
    with RunDirectory.open(run.path, {"seed": 0}) as opened:
        opened.set_aside(["reverse_rl"])
        printed(opened)
    assert list((run.path / "plots").iterdir()) == []
