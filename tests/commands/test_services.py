"""`pns status` and `pns scale` on the page of a run whose services are real actors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pns import cli
from pns.config import Config, ServicePool
from pns.run.page import RunPage
from pns.run.services import read_board
from pns.stages.monitor import ServiceMonitor
from workers.rewards.service import Outcome, ScoringPool
from workers.runtime import Runtime


def echo() -> Callable[[str], Any]:
    """A model that gives items back, by value for Ray; it takes a moment for each."""

    class Echo:
        def score(self, items: Sequence[int]) -> list[Outcome[int]]:
            time.sleep(0.01 * len(items))
            return [Outcome(item) for item in items]

    return lambda model_path: Echo()


@contextmanager
def a_run(path: Path, services: dict[str, Any], seconds: float = 0.1) -> Iterator[Path]:
    with RunPage.open(path) as page:
        page.begin(Config(), {})
        with ServiceMonitor(path, lambda: services, seconds):
            yield path


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def pool(ray_session: None) -> Iterator[ScoringPool[int, int]]:
    pool = ScoringPool[int, int](
        "judge", ServicePool(cpus=8), Runtime(start_timeout_seconds=1800), echo(), lambda item: 128
    )
    pool.load("-")
    yield pool
    pool.shutdown()


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and everything that a command prints."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out + err


def test_scale_and_status_of_a_run_at_work(
    pool: ScoringPool[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with a_run(tmp_path / "run", {"judge": pool}) as run:
        handle = pool.submit(range(600))
        assert said(capsys, "scale", run, "--timeout", 600, "judge=2") == (0, "judge=2: done\n")
        assert pool.replicas == 2
        assert [outcome.value for outcome in pool.collect(handle)] == list(range(600))
        until_scored(run, 600)
        code, table = said(capsys, "status", run)
        assert (code, "not at work" in table) == (0, False)
        [row] = [line for line in table.splitlines() if line.startswith("judge ")]
        cells = row.split()
        assert cells[:5] == ["judge", "2", "0", "0", "600"]
        assert cells[-2:] == ["0", "none"]
        assert "pns scale: judge: done" in table
        assert said(capsys, "scale", run, "--timeout", 600, "judge=1") == (0, "judge=1: done\n")
        pool._runtime = Runtime(start_timeout_seconds=2)
        code, line = said(capsys, "scale", run, "judge=9")  # 72 CPUs of 64
        assert code == 2
        assert line.startswith("pns: judge: waited 2 s for replica ")
        assert line.endswith("add room, or raise placement.start_timeout_seconds\n")
        assert pool.replicas == 1
        assert pool.score([5]) == [Outcome(5)]
    code, table = said(capsys, "status", run, "--watch")
    assert code == 0
    assert "not at work; the last figures are of " in table
    assert said(capsys, "scale", run, "judge=2")[0] == 2


def until_scored(run: Path, number: int) -> None:
    end = time.monotonic() + 240
    while (board := read_board(run)) and (board.services["judge"] or {})["scored"] < number:
        assert time.monotonic() < end
        time.sleep(0.05)


class Slow:
    """A service that never gets the size that it is asked for."""

    def stats(self) -> dict[str, Any]:
        return dict.fromkeys(("queued", "in_flight", "scored", "restarts", "cost"), 0) | {
            **dict.fromkeys(("items_per_second", "seconds_p50", "seconds_p95"), 0.0),
            **{"replicas": 1, "wanted": 4, "failures": {"deadline": 2, "ValueError: [b] is wrong": 1}},
        }

    def resize(self, replicas: int) -> None:
        time.sleep(3600)


def test_what_takes_too_long_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_run(tmp_path / "run", {"judge": Slow()}) as run:
        code, line = said(capsys, "scale", run, "judge=4", "--timeout", "1")
        assert code == 2
        assert line.startswith(
            "pns: judge has 1 of 4 replicas after 1 s: the run goes on trying, and pns status"
        )
        table = said(capsys, "status", run)[1]
        assert "1 of 4" in table
        assert "1 ValueError: [b] is wrong" in table
        assert "under way" in table


def test_a_run_that_does_not_answer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_run(tmp_path / "run", {"judge": Slow()}, seconds=3600) as run:
        code, line = said(capsys, "scale", run, "judge=4", "--timeout", "0.5")
    assert code == 2
    assert "the run has not taken the request within 0.5 s" in line


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("judge=0", "'judge=0' is not of the form TERM=N with N from 1 to 9999"),
        ("judge=-1", "is not of the form TERM=N"),
        ("judge=two", "is not of the form TERM=N"),
        ("judge=1.5", "is not of the form TERM=N"),
        ("judge", "is not of the form TERM=N"),
        ("=4", "is not of the form TERM=N"),
        ("judge=99999", "is not of the form TERM=N"),
        ("juge=4", "juge: this run uses no such service; did you mean judge?"),
        ("third=4", "third: this run uses no such service; there are: judge"),
    ],
)
def test_wrong_requests_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, fault: str
) -> None:
    with a_run(tmp_path / "run", {"judge": Slow()}) as run:
        code, line = said(capsys, "scale", run, word)
        assert code == 2
        assert line.startswith("pns: ")
        assert line.count("\n") == 1
        assert fault in line
        assert not (run / "scale.json").exists()


def test_without_a_run_at_work_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status", tmp_path], ["scale", tmp_path, "judge=2"]):
        code, line = said(capsys, *command)
        assert (code, "is not a run directory" in line, line.count("\n")) == (2, True, 1)
    with RunPage.open(tmp_path) as page:
        page.begin(Config(), {})
        assert "has had no services yet" in said(capsys, "status", tmp_path)[1]
    with a_run(tmp_path, {"judge": Slow()}):
        board = read_board(tmp_path)
        assert board
    board.write(tmp_path)  # as a run leaves it that was killed
    code, line = said(capsys, "scale", tmp_path, "judge=2")
    assert (code, line.count("\n")) == (2, 1)
    assert "no run with services is at work there" in line
