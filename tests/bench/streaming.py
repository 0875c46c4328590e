"""How near a step comes to max(rollout, reward): completions that finish at known times, a service of known speed.

    python tests/bench/streaming.py

The project's own `roll_out` and `RolloutActor.generate`, in one process, over an engine that finishes its
completions at given times and a service that scores one after the other. Per schedule: `rollout` and
`reward`, the seconds that each takes alone, `wall`, and `ratio` = wall / max(rollout, reward). Where
completions come in waves, no system reaches a ratio of 1: what comes last still has to be scored. `ideal` is
the wall time of a service that begins each completion as soon as it is there and the one before is done, and
`over_ideal` = wall / ideal, whose largest is to be at most 1.1. Times are those of the schedule times
`--scale`. Prints one JSON line.
"""

import argparse
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from pns.algo.reward import reward_rules
from pns.config import Config, Data, RewardConfig, RewardTerm, TermKind, Tracking
from pns.data.prompts import Prompts
from pns.records import Problem, Verdict
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages.context import Context
from pns.stages.scoring import Draws, roll_out
from pns.tiny.tokenizer import build_tokenizer
from workers.rewards.service import Outcome
from workers.rewards.verifier import VerifierResult
from workers.rollout.engine import Request, Sample, Sampling
from workers.rollout.pool import RolloutActor

NUM = 160  # completions
# Name -> (seconds at which completions finish, seconds of the service for all of them).
SCHEDULES: dict[str, tuple[list[float], float]] = {
    "steady": ([8.0 * (i + 1) / NUM for i in range(NUM)], 8.0),
    "long tail": ([2.0 * (i + 1) / 156 for i in range(156)] + [10.0] * 4, 9.0),
    "four waves": ([seconds for seconds in (1.0, 2.0, 3.0, 8.0) for _ in range(40)], 8.0),
    "two waves": ([1.0] * 80 + [6.0] * 80, 6.0),
    "one wave and a tail": ([2.0] * 156 + [10.0] * 4, 8.0),
}


class TimedEngine:
    """Finishes its n-th request at the n-th time."""

    def __init__(self, times: Sequence[float], token_ids: tuple[int, ...]) -> None:
        self.times, self.token_ids = times, token_ids

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sample]:
        began = time.monotonic()
        for request, seconds in zip(requests, self.times, strict=True):
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            yield Sample(request.id, self.token_ids, (-0.5,) * len(self.token_ids), "stop", 0)


class WrongAtOnce:
    """Every answer is wrong: all completions go on to the service."""

    def submit(self, items: Sequence[Any]) -> list[Future[VerifierResult]]:
        futures: list[Future[VerifierResult]] = [Future() for _ in items]
        for future in futures:
            future.set_result(VerifierResult(Verdict.WRONG, None, "1"))
        return futures


class SerialService:
    """Scores one item after the other, each in the same time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._items: SimpleQueue[Future[Outcome[float]]] = SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, items: Sequence[Any]) -> list[Future[Outcome[float]]]:
        futures: list[Future[Outcome[float]]] = [Future() for _ in items]
        for future in futures:
            self._items.put(future)
        return futures

    def _serve(self) -> None:
        while True:
            future = self._items.get()
            time.sleep(self._seconds)
            future.set_result(Outcome(0.0))


def wall_seconds(times: Sequence[float], service_seconds: float) -> float:
    """Of one step over completions that finish at `times`."""
    prompts = Prompts(build_tokenizer(), Data(max_prompt_tokens=60))
    actor = RolloutActor.__new__(RolloutActor)  # its engine is ours: none is built
    engine: Any = TimedEngine(times, prompts.encode_completion("<think>So Ann=3. </think>\\boxed{1}"))
    actor.engine = engine
    service = SerialService(service_seconds / len(times))
    rollout = SimpleNamespace(stream=lambda requests, sampling: actor.generate(list(requests), sampling))
    fleet: Any = SimpleNamespace(rollout=rollout, verifier=WrongAtOnce(), scorer=lambda name: service)
    terms = {"judge": RewardTerm(TermKind.reward_model, 0.5)}
    rules = reward_rules(Config(reward=RewardConfig(terms=terms)))
    problem = Problem("p", "Ann has 3. How many has Ann? ", "3")
    with TemporaryDirectory() as directory:
        place = Place(Path(directory) / "step")
        tracker = Tracker(Path(directory), Tracking(), lambda *_: None, terminal=PlainTerminal(io.StringIO()))
        with place.making({"inputs": []}):
            ctx = Context(0, place, fleet, prompts, tracker, Path(directory))
            draws = Draws("bench", len(times), Sampling(1.0, 1.0, 30), 0.2, rules)
            began = time.monotonic()
            rollouts = roll_out(ctx, draws, [problem])
            wall = time.monotonic() - began
    assert all(rollout.reward.terms for rollout in rollouts)
    return wall


def ideal_seconds(times: Sequence[float], service_seconds: float) -> float:
    """When a service that never waits without need has scored all."""
    done = 0.0
    for seconds in times:
        done = max(done, seconds) + service_seconds / len(times)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of all times (default %(default)s)")
    scale = parser.parse_args().scale
    results: dict[str, dict[str, float]] = {}
    for name, (times, service_seconds) in SCHEDULES.items():
        scaled, rollout, reward = (
            [scale * seconds for seconds in times],
            scale * times[-1],
            scale * service_seconds,
        )
        wall, ideal = wall_seconds(scaled, reward), ideal_seconds(scaled, reward)
        ratio, over_ideal = wall / max(rollout, reward), wall / ideal
        row = {"rollout": rollout, "reward": reward, "wall": wall, "ideal": ideal}
        results[name] = row | {"ratio": ratio, "over_ideal": over_ideal}
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    worst = max(row["over_ideal"] for row in results.values())
    print(json.dumps({"completions": NUM, "worst_over_ideal": round(worst, 3), "schedules": rounded}))


if __name__ == "__main__":
    main()
