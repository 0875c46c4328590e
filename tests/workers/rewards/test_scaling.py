"""The size of scoring pools: the rule by hand, and pools of real actors whose items only take time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from pns.config import ServicePool
from pns.errors import UserError
from workers.rewards.scaling import Autoscaler, ScaleRule
from workers.rewards.service import Outcome, PoolFailedError, ScoringPool
from workers.runtime import Runtime

RULE = ScaleRule(backlog_seconds=10, patience_seconds=5, idle_seconds=60, rest_seconds=600)
QUICK = ScaleRule(backlog_seconds=1, patience_seconds=1, idle_seconds=2, rest_seconds=600)
CPU = Runtime(start_timeout_seconds=1800)


def test_a_pool_grows_once_work_has_queued_for_a_while_one_replica_at_a_time() -> None:
    scaler = Autoscaler(RULE, smallest=1, largest=3)
    assert [scaler.step(now, 1, False, 11, 0) for now in (0, 4.9)] == [0, 0]
    assert scaler.step(5, 1, False, 11, 0) == 1
    assert scaler.step(6, 2, True, 11, 0) == 0  # the first one is not up yet
    assert scaler.step(20, 2, True, 11, 0) == 0
    assert scaler.step(21, 2, False, 11, 0) == 1
    assert scaler.step(40, 3, False, 11, 0) == 0  # as many as there may be


def test_a_short_queue_does_not_make_a_pool_grow() -> None:
    scaler = Autoscaler(RULE, 1, 3)
    steps = [
        scaler.step(now, 1, False, backlog, 0) for now, backlog in enumerate([11, 11, 9, 11, 11, 11, 11])
    ]
    assert steps == [0] * 7


def test_an_idle_replica_goes_down_to_the_fewest() -> None:
    scaler = Autoscaler(RULE, 2, 3)
    assert [scaler.step(0, 3, False, 0, idle) for idle in (59, 60)] == [0, -1]
    assert scaler.step(0, 2, False, 0, 1000) == 0


def test_after_a_replica_that_could_not_start_the_pool_rests() -> None:
    scaler = Autoscaler(RULE, 1, 2)
    scaler.step(0, 1, False, 11, 0)
    scaler.rest(10)
    assert [scaler.step(now, 1, False, 11, 0) for now in (11, 609, 610)] == [0, 0, 1]


def test_equal_bounds_fix_the_size() -> None:
    scaler = Autoscaler(RULE, 2, 2)
    assert [scaler.step(now, 2, False, 1000, 1000) for now in (0, 100)] == [0, 0]


def slow() -> Callable[[str], Any]:
    """A model whose items take as many seconds as they say, by value for Ray."""

    class Slow:
        def score(self, items: Sequence[float]) -> list[Outcome[float]]:
            time.sleep(sum(items))
            return [Outcome(item) for item in items]

    return lambda model_path: Slow()


Open = Callable[..., Any]


@pytest.fixture
def open_pool(ray_session: None) -> Iterator[Open]:
    """A context: a pool of the slow model with the keys of its ServicePool; one item fills a forward pass."""

    @contextlib.contextmanager
    def opened(runtime: Runtime = CPU, **pool: Any) -> Iterator[ScoringPool[float, float]]:
        keys = ServicePool(batch_tokens=1, **pool)
        scoring = ScoringPool[float, float]("slow", keys, runtime, slow(), lambda item: 1, rule=QUICK)
        try:
            scoring.load("-")
            yield scoring
        finally:
            scoring.shutdown()

    return opened


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_pool_follows_its_queue(open_pool: Open) -> None:
    with open_pool(replicas=1, max_replicas=2) as pool:
        handle = pool.submit([0.05] * 400)  # 20 s for one
        until(lambda: pool.stats().replicas == 2)
        assert [outcome.value for outcome in pool.collect(handle)] == [0.05] * 400
        until(lambda: pool.stats().replicas == 1)
        assert pool.stats().wanted == 1
        assert (pool.stats().restarts, pool.stats().failures) == (0, {})


def test_growth_that_cannot_be_placed_is_given_up_and_hurts_nothing(
    open_pool: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_pool(replicas=1, max_replicas=3, cpus=40) as pool:  # of 64
        pool._runtime = Runtime(start_timeout_seconds=2)  # now that the first one is up
        outcomes = pool.collect(pool.submit([0.05] * 200))
        assert [outcome.value for outcome in outcomes] == [0.05] * 200
        assert (pool.stats().replicas, pool.stats().wanted, pool.stats().restarts) == (1, 1, 0)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "waiting for" not in line]
    assert (
        "slow; replica 2 took longer than 2 s (placement.start_timeout_seconds) to start with 0 GPU and 40 CPU"
        in line
    )
    assert line.endswith("the pool goes on with 1")


def test_a_size_that_cannot_be_placed_leaves_the_pool_as_it_was(open_pool: Open) -> None:
    with open_pool(replicas=1, cpus=40) as pool:
        pool._runtime = Runtime(start_timeout_seconds=2)
        with pytest.raises(
            TimeoutError, match=r"slow: waited 2 s for replica 1 of 2 .* CPU free: add room, or raise"
        ):
            pool.resize(3)
        assert (pool.stats().replicas, pool.stats().wanted) == (1, 1)
        assert pool.score([0.0]) == [Outcome(0.0)]


def test_a_later_size_takes_the_place_of_one_that_is_still_waited_for(open_pool: Open) -> None:
    with open_pool(replicas=1, cpus=40) as pool:
        said = []

        def ask() -> None:
            with pytest.raises(UserError) as error:
                pool.resize(2)
            said.append(str(error.value))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: pool.stats().wanted == 2)
        pool.resize(1)
        thread.join()
        assert said == ["slow: another number of replicas was asked for meanwhile"]
        assert (pool.stats().replicas, pool.stats().wanted) == (1, 1)


def test_replicas_go_where_their_resources_and_labels_are(open_pool: Open) -> None:
    short = Runtime(start_timeout_seconds=2)
    with (
        pytest.raises(TimeoutError, match=r"0 GPU and 1 CPU and 2 scorer each on a node with zone=a; "),
        open_pool(short, resources={"scorer": 2}, labels={"zone": "a"}),
    ):
        pass


def test_replicas_that_always_hang_end_the_pool_with_the_cause(ray_session: None) -> None:
    """After three deadlines and the starts of two replicas between them: a hang counts twice, and five are
    the end. Here within a minute, on a machine that starts a replica in ten seconds."""
    keys = ServicePool(batch_tokens=1)
    pool = ScoringPool[float, float]("slow", keys, CPU, slow(), lambda item: 1, 3)
    try:
        pool.load("-")
        began = time.monotonic()
        with pytest.raises(PoolFailedError, match=r"slow: replica \d gave no answer for 3 s, .*3 restarts"):
            pool.collect(pool.submit([600.0] * 40))
        assert time.monotonic() - began < 60
    finally:
        pool.shutdown()
