"""A run's services as others see them, and requests that are carried out beside the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pns.errors import UserError
from pns.run.place import locked
from pns.run.services import DONE, Board, ask_to_scale, read_board
from pns.stages.monitor import ServiceMonitor
from workers.rewards.service import ServiceStats


class FakeService:
    """Takes `most` replicas at most, and new ones once `gate` is set."""

    def __init__(self, most: int = 8) -> None:
        self.most, self.replicas = most, 1
        self.gate = threading.Event()
        self.gate.set()

    def stats(self) -> ServiceStats:
        return ServiceStats(
            replicas=self.replicas,
            queued=3,
            in_flight=2,
            scored=7,
            items_per_second=1.5,
            seconds_p50=0.1,
            seconds_p95=0.2,
            restarts=1,
            failures={"deadline": 4},
            wanted=self.replicas,
        )

    def resize(self, replicas: int) -> None:
        if replicas > self.most:
            raise TimeoutError(f"judge: waited 2 s for replica {self.most} of {replicas}")
        self.gate.wait()
        self.replicas = replicas


Services = dict[str, FakeService | None]


@pytest.fixture
def services() -> Services:
    return {"judge": FakeService(), "second": None}


@pytest.fixture
def page(tmp_path: Path, services: Services) -> Iterator[Path]:
    with locked(tmp_path / "lock", ""), ServiceMonitor(tmp_path, lambda: services, 0.02):
        yield tmp_path


def board_of(page: Path) -> Board:
    board = read_board(page)
    assert board
    return board


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_figures_are_there_at_once_and_follow(page: Path, services: Services) -> None:
    figures = board_of(page).services["judge"]
    assert figures
    assert (figures["queued"], figures["failures"], figures["wanted"]) == (3, {"deadline": 4}, 1)
    assert board_of(page).services["second"] is None
    services["second"] = FakeService()
    until(lambda: board_of(page).services["second"] is not None)


def test_a_request_is_carried_out_and_what_cannot_be_is_said(page: Path, services: Services) -> None:
    judge = services["judge"]
    assert judge
    ask_to_scale(page, board_of(page).start, {"judge": 4, "third": 2})
    until(lambda: all(board_of(page).outcomes.values()) and bool(board_of(page).outcomes))
    assert board_of(page).outcomes == {"judge": DONE, "third": "third: this run uses no such service"}
    assert judge.replicas == 4
    ask_to_scale(page, board_of(page).start, {"judge": 9})
    until(lambda: board_of(page).outcomes == {"judge": "judge: waited 2 s for replica 8 of 9"})
    assert judge.replicas == 4


def test_nothing_waits_for_a_request(page: Path, services: Services) -> None:
    """Neither for replicas that come up slowly nor for a service that is not up yet."""
    judge, second = services["judge"], FakeService()
    assert judge
    judge.gate.clear()
    ask_to_scale(page, board_of(page).start, {"judge": 2, "second": 3})
    until(lambda: board_of(page).outcomes == {"judge": "", "second": ""})
    written = board_of(page).written
    until(lambda: board_of(page).written > written)
    services["second"] = second
    until(lambda: board_of(page).outcomes == {"judge": "", "second": DONE})
    assert second.replicas == 3
    judge.gate.set()
    until(lambda: board_of(page).outcomes["judge"] == DONE)


def test_requests_of_an_earlier_start_and_damaged_ones_change_nothing(
    page: Path, services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_to_scale(page, "an earlier start", {"judge": 5})
    written = board_of(page).written
    until(lambda: board_of(page).written > written + 0.1)
    (page / "scale.json").write_text("{")
    said: list[str] = []

    def complained() -> bool:
        said.extend(capsys.readouterr().err.splitlines())
        return bool(said)

    until(complained)
    written = board_of(page).written
    until(lambda: board_of(page).written > written + 0.2)
    (page / "scale.json").unlink()
    assert services["judge"]
    assert services["judge"].replicas == 1
    assert board_of(page).outcomes == {}
    said += capsys.readouterr().err.splitlines()
    assert len(said) == 1  # once, not at every look
    assert "scale.json is not valid JSON" in said[0]


def test_after_the_run_the_last_figures_stay_and_are_of_no_running_one(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", ""):
        with ServiceMonitor(tmp_path, lambda: {"judge": FakeService()}):
            assert board_of(tmp_path).is_of_running(tmp_path)
        assert not board_of(tmp_path).is_of_running(tmp_path)  # while the report is written
    assert board_of(tmp_path).services["judge"]


def test_a_service_that_refuses_says_why(tmp_path: Path) -> None:
    class Endpoint(FakeService):
        def resize(self, replicas: int) -> None:
            raise UserError("judge: an endpoint has no replicas")

    with locked(tmp_path / "lock", ""), ServiceMonitor(tmp_path, lambda: {"judge": Endpoint()}, 0.02):
        ask_to_scale(tmp_path, board_of(tmp_path).start, {"judge": 2})
        until(lambda: board_of(tmp_path).outcomes == {"judge": "judge: an endpoint has no replicas"})
