"""A step's wall time with `rl.overlap` beside max(rollout + reward, update), from services of known times.

    python tests/bench/overlap.py    # one minute, no Ray

The project's own loop of RL, twice for each case: with and without overlap. Rollout, reward and update only
sleep: `rollout` and `reward` seconds for a step's completions (the reward begins when they are there), `update`
for the optimizer step, 0.05 for the weights. `overlap` and `alternating` are the seconds of a step, the first
one, which nothing overlaps, left out; `ratio` = overlap / max(rollout + reward, update), to be at most 1.1.
Prints one JSON line.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np

from pns.config import Data, GrpoConfig, Tracking
from pns.data.prompts import Prompts
from pns.files import read_jsonl
from pns.records import Problem, Verdict
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages import grpo
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Context
from pns.tiny.tokenizer import build_tokenizer
from workers.rewards.verifier import VerifierResult
from workers.rollout.engine import Request, Sample, Sampling
from workers.training.batching import Batch

STEPS, SYNC = 6, 0.05
COMPLETIONS = 16  # of a step
CASES = {  # rollout, reward, update; seconds
    "as long": (0.7, 0.3, 1.0),
    "rollout longer": (0.9, 0.3, 0.6),
    "update longer": (0.4, 0.2, 1.2),
}


class TimedRollout:
    """Hands over all completions after its time."""

    def __init__(self, seconds: float, token_ids: tuple[int, ...]) -> None:
        self.seconds, self.token_ids, self.version = seconds, token_ids, 0

    def load(self, model: str) -> None:
        self.version = 0

    def update_weights(self, gather: Any, version: int) -> Any:
        weights = gather()
        self.version = version
        return weights

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        time.sleep(self.seconds)
        log_probs = (-0.5,) * len(self.token_ids)
        yield [Sample(own.id, self.token_ids, log_probs, "stop", self.version) for own in requests]


class TimedVerifier:
    """Every second answer is right, a time after it was asked for."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._threads, self._verdicts = seconds, ThreadPoolExecutor(COMPLETIONS), 0

    def submit(self, items: Sequence[Any]) -> list[Future[VerifierResult]]:
        return [self._threads.submit(self._verdict) for _ in items]

    def _verdict(self) -> VerifierResult:
        time.sleep(self._seconds)
        self._verdicts += 1
        return VerifierResult((Verdict.CORRECT, Verdict.WRONG)[self._verdicts % 2], None, "1")


class TimedPolicy:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def load(self, *_: Any) -> None: ...

    def export(self, directory: Path) -> None: ...

    def pass_step(self) -> None: ...

    def log_probs(self, batch: Batch, temperature: float = 1.0) -> list[np.ndarray]:
        return [np.full(len(completion), -0.5, np.float32) for completion in batch.completion_ids]

    def train_step(self, batch: Batch, objective: Any, end_of_step: bool = True) -> dict[str, float]:
        time.sleep(self._seconds)
        return {"loss": 0.0, "update_skipped": 0.0}

    def weights(self) -> Any:
        time.sleep(SYNC)
        return SimpleNamespace(num_bytes=0)


def seconds_of_a_step(rollout: float, reward: float, update: float, overlap: bool) -> float:
    prompts = Prompts(build_tokenizer(), Data(max_prompt_tokens=60))
    engine = TimedRollout(rollout, prompts.encode_completion("<think>So Ann=3. </think>\\boxed{1}"))
    fleet: Any = SimpleNamespace(rollout=engine, verifier=TimedVerifier(reward), policy=TimedPolicy(update))
    problems = [Problem(f"p{i}", "Ann has 3. How many has Ann? ", "3") for i in range(4)]
    settings = GrpoConfig(
        steps=STEPS,
        problems_per_step=4,
        completions_per_problem=COMPLETIONS // 4,
        kl_coefficient=0.0,
        importance_cap=2.0,
        overlap=overlap,
    )
    with TemporaryDirectory() as directory:
        place = Place(Path(directory) / "step")
        tracker = Tracker(place.directory, Tracking(), lambda *_: None, terminal=PlainTerminal(io.StringIO()))
        with place.making({"inputs": []}):
            ctx = Context(0, place, fleet, prompts, tracker, Path(directory))
            artefact = TrainedModel(place.directory)
            run = grpo.GrpoRun("rl", settings, 30, 0.5)
            began = time.monotonic()
            grpo.train(ctx, run, artefact, "backbone", problems, grpo.accuracy)
            wall = time.monotonic() - began
            first = read_jsonl(place.directory / "metrics.jsonl")[0]["values"]
    of_first = rollout + reward  # its update is beside the second's rollouts
    assert first["completions"] == COMPLETIONS
    return (wall - of_first) / STEPS if overlap else wall / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    num_rounds = parser.parse_args().rounds
    results: dict[str, dict[str, float]] = {}
    for name, (rollout, reward, update) in CASES.items():
        measured = {
            side: statistics.median(
                seconds_of_a_step(rollout, reward, update, side == "overlap") for _ in range(num_rounds)
            )
            for side in ("overlap", "alternating")
        }
        longer = max(rollout + reward, update)
        results[name] = {**measured, "longer": longer, "ratio": measured["overlap"] / longer}
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    worst = max(row["ratio"] for row in results.values())
    print(json.dumps({"steps": STEPS, "worst_ratio": round(worst, 3), "cases": rounded}))


if __name__ == "__main__":
    main()
