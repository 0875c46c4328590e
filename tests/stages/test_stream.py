"""The one stream: rows in order whatever arrives when, on disk as soon as they are whole, asked for once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pns.records import Problem, Rollout
from pns.stages.context import Context
from pns.stages.scoring import Draws, roll_out
from pns.stages.stream import Ask, Unfinished, stable_seed, stream
from workers.rollout.engine import Sample, Sampling

SAMPLING = Sampling(1.0, 1.0, 30)


class EchoScorer:
    """Rows that are plain dicts; whole at once, or (`late`) only when they are waited for."""

    def __init__(self, prompts: Any, late: bool = False) -> None:
        self.prompts, self.late = prompts, late
        self.waiting: list[tuple[str, dict[str, str]]] = []

    def submit(self, samples: list[tuple[Ask, Sample]]) -> None:
        rows = [(ask.key, {"key": ask.key, "text": self.prompts.decode(s.token_ids)}) for ask, s in samples]
        self.waiting += rows

    def finished(self, wait: bool) -> list[tuple[str, dict[str, str]]]:
        if self.late and not wait:
            return []
        whole, self.waiting = self.waiting, []
        return whole


def asks_of(num: int, sampling: Sampling = SAMPLING) -> list[Ask]:
    problems = [Problem(f"p{i}", f"Ann has {i}. ", str(i)) for i in range(num)]
    return [Ask(f"s/{problem.id}#0", problem, 0, 100 + i, sampling) for i, problem in enumerate(problems)]


def kept_rows(directory: Path) -> Unfinished[dict[str, str]]:
    return Unfinished(directory / "rows.unfinished.jsonl", dict, lambda row: row["key"])


def on_disk(directory: Path) -> list[str]:
    file = directory / "rows.unfinished.jsonl"
    return [json.loads(line)["key"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_rows_are_in_order_whatever_the_order_of_arrival(
    bench: Any, late: bool, backwards: bool, chunk: int
) -> None:
    bench.fleet.rollout.chunk, bench.fleet.rollout.backwards = chunk, backwards
    asks = asks_of(10)
    with bench.making() as ctx:
        scorer = EchoScorer(bench.prompts, late)
        rows = stream(ctx, asks, scorer, kept_rows(ctx.directory), lambda row: True)
    assert [row["key"] for row in rows] == [ask.key for ask in asks]
    assert [row["text"] for row in rows] == [bench.solution(10 + i) for i in range(10)]


def test_every_way_of_sampling_is_one_call_and_a_prompt_is_encoded_once(bench: Any) -> None:
    greedy = Sampling(0.0, 1.0, 8)
    [first, second] = asks_of(2)
    asks = [first, Ask("s/p0#1", first.problem, 1, 7, greedy), second]
    with bench.making() as ctx:
        stream(ctx, asks, EchoScorer(bench.prompts), kept_rows(ctx.directory), lambda row: True)
    rollout = bench.fleet.rollout
    assert rollout.samplings == [SAMPLING, greedy]
    assert [request.id for request in rollout.asked] == ["s/p0#0", "s/p1#0", "s/p0#1"]
    assert rollout.asked[0].prompt_ids is rollout.asked[2].prompt_ids
    assert rollout.asked[0].prompt_ids == bench.prompts.encode(first.problem)


def test_a_row_is_on_disk_as_soon_as_it_is_whole(bench: Any) -> None:
    seen: list[int] = []

    class WatchingScorer(EchoScorer):
        def submit(self, samples: list[tuple[Ask, Sample]]) -> None:
            seen.append(len(on_disk(bench.store / "stage")))
            super().submit(samples)

    with bench.making() as ctx:
        unfinished = kept_rows(ctx.directory)
        stream(ctx, asks_of(8), WatchingScorer(bench.prompts), unfinished, lambda row: True)
        assert seen == [0, 3, 6]
        assert len(on_disk(ctx.directory)) == 8
        unfinished.drop([ask.key for ask in asks_of(8)])
        assert not (ctx.directory / "rows.unfinished.jsonl").exists()


def interrupted_then_continued(bench: Any, keep_all: bool = True) -> tuple[list[str], list[dict[str, str]]]:
    """What was asked again after an interruption at 6 of 10 (one row is cut off at its end), and the rows."""
    bench.fleet.rollout.interrupt_after = 6

    def keep(row: dict[str, str]) -> bool:
        return keep_all or row["key"] != "s/p8#0"

    with pytest.raises(KeyboardInterrupt), bench.making() as ctx:
        stream(ctx, asks_of(10), EchoScorer(bench.prompts), kept_rows(ctx.directory), keep, "model")
    with open(bench.store / "stage" / "rows.unfinished.jsonl", "a") as file:
        file.write('{"key": "s/p0#0", "te')
    assert len(bench.fleet.rollout.take_asked()) == 10
    with bench.making() as ctx:
        rows = stream(ctx, asks_of(10), EchoScorer(bench.prompts), kept_rows(ctx.directory), keep, "model")
    return bench.fleet.rollout.take_asked(), rows


def test_after_an_interruption_only_what_is_missing_is_asked(bench: Any) -> None:
    asked, rows = interrupted_then_continued(bench)
    assert asked == ["s/p0#0", "s/p1#0", "s/p2#0", "s/p3#0"]
    assert [row["key"] for row in rows] == [f"s/p{i}#0" for i in range(10)]
    assert bench.fleet.rollout.loaded == ["model", "model"]
    with bench.making("again") as ctx:
        again = kept_rows(ctx.directory)
        again.add(rows)
        assert stream(ctx, asks_of(10), EchoScorer(bench.prompts), again, lambda row: True, "model") == rows
    assert bench.fleet.rollout.take_asked() == []
    assert len(bench.fleet.rollout.loaded) == 2  # nothing is missing: nothing is loaded


def test_a_row_that_is_not_kept_is_asked_again(bench: Any) -> None:
    asked, rows = interrupted_then_continued(bench, keep_all=False)
    assert asked == ["s/p0#0", "s/p1#0", "s/p2#0", "s/p3#0", "s/p8#0"]
    assert len(rows) == 10


def rolled_out(ctx: Context, problems: list[Problem], num: int = 2) -> list[Rollout]:
    return roll_out(ctx, Draws("name", num, SAMPLING), problems, step=4)


def test_masked_rollouts_are_asked_again(bench: Any) -> None:
    """A verdict that could not be decided may be decided the next time."""
    undecided = bench.solution(bench.undecided)
    bench.fleet.rollout.write = lambda problem, sample, model: (
        undecided if sample == 1 else bench.solution(11)
    )
    with bench.making() as ctx:
        rollouts = rolled_out(ctx, list(bench.problems(2).problems))
        assert [rollout.reward.masked for rollout in rollouts] == [False, True, False, False]
        bench.fleet.rollout.take_asked()
        bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10)
        rollouts = rolled_out(ctx, list(bench.problems(2).problems))
    assert bench.fleet.rollout.take_asked() == ["4/p0#1"]
    assert [rollout.reward.value for rollout in rollouts] == [0.0, 1.0, 1.0, 1.0]


def test_seeds_belong_to_samples(bench: Any) -> None:
    """Neither order of arrival nor an interruption changes them; step, use and run do."""
    problems = list(bench.problems(3).problems)
    with bench.making("whole") as ctx:
        rolled_out(ctx, problems)
    expected = {request.id: request.seed for request in bench.fleet.rollout.asked}
    assert expected == {
        f"4/p{p}#{2 * p + g}": stable_seed(3, "name", 4, f"p{p}", p, g) for p in range(3) for g in range(2)
    }
    assert len(set(expected.values())) == 6
    bench.fleet.rollout.take_asked()
    bench.fleet.rollout.backwards = False
    bench.fleet.rollout.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt), bench.making("cut") as ctx:
        rolled_out(ctx, problems)
    bench.fleet.rollout.asked = []
    with bench.making("cut") as ctx:
        rolled_out(ctx, problems)
    left = {request.id: request.seed for request in bench.fleet.rollout.asked}
    assert len(left) == 3
    assert left.items() <= expected.items()


def test_a_problem_that_is_drawn_twice_has_samples_of_its_own(bench: Any) -> None:
    [problem] = bench.problems(1).problems
    with bench.making() as ctx:
        rollouts = rolled_out(ctx, [problem, problem])
    assert [rollout.completion.id for rollout in rollouts] == ["p0#0", "p0#1", "p0#2", "p0#3"]
    assert len({request.seed for request in bench.fleet.rollout.asked}) == 4


def test_stable_seeds_are_what_they_were() -> None:
    assert stable_seed(0, "rl", 0, "p", 0, 0) == 349974075  # by sha256sum
    assert 0 <= stable_seed("anything", 1.5) < 2**31
