"""What stages are tested with: a fleet of small fakes, and a context around a real place, prompts, tracker.

Fakes are what a stage is given and keep what they were asked; nothing is patched. A completion is written by
a function of (problem id, sample number, model), so that a test states who writes what.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pns.answers.extract import extract_boxed
from pns.config import Data, Optimizer, Tracking
from pns.data.prompts import Prompts
from pns.files import read_json, write_json
from pns.records import Problem, Verdict
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages.context import Context, Problems
from pns.tiny.tokenizer import build_tokenizer
from workers.rewards.service import Outcome
from workers.rewards.verifier import VerifierResult
from workers.rollout.engine import Request, Sample, Sampling
from workers.runtime import Runtime
from workers.training.batching import Batch

UNDECIDED = "99"  # the answer that the verifier cannot decide
MALFORMED = "So Ann=3. "  # no tags, no box

Write = Callable[[str, int, str], str]


def solution(answer: int | str, reasoning: str = "So Ann=3. ") -> str:
    """A well-formed completion that ends in `answer`."""
    return f"<think>{reasoning}</think>\\boxed{{{answer}}}"


def made_up_problems(num: int) -> Problems:
    """Problems p0, p1, ... with the answers 10, 11, ..."""
    return Problems(
        [Problem(f"p{i}", f"Ann has {10 + i}. How many has Ann? ", str(10 + i)) for i in range(num)]
    )


@dataclass(frozen=True)
class FakeWeights:
    """What the policy has been through."""

    state: str
    num_bytes: int = 0


class FakeRollout:
    """Yields what `write(problem id, sample, model)` gives, last request first, `chunk` at a time; a text
    that ends in "..." is cut off. `interrupt_after`: completions, after which it fails once."""

    def __init__(self, prompts: Prompts, chunk: int = 3) -> None:
        self.prompts, self.chunk = prompts, chunk
        self.write: Write = lambda problem, sample, model: solution(10 + int(problem[1:]))
        self.model, self.version = "", 0
        self.loaded: list[str] = []
        self.updates: list[Any] = []
        self.asked: list[Request] = []
        self.samplings: list[Sampling] = []
        self.backwards = True
        self.interrupt_after: int | None = None

    def load(self, model: str) -> None:
        self.model, self.version = model, 0
        self.loaded.append(model)

    def update_weights(self, source: FakePolicy, version: int) -> int:
        weights = source.weights()
        self.model, self.version = weights.state, version
        self.updates.append(weights.state)
        return weights.num_bytes

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        self.asked += requests
        self.samplings.append(sampling)
        in_order = list(reversed(requests)) if self.backwards else list(requests)
        for start in range(0, len(in_order), self.chunk):
            if self.interrupt_after is not None and start >= self.interrupt_after:
                self.interrupt_after = None
                raise KeyboardInterrupt
            yield [self.sample(request) for request in in_order[start : start + self.chunk]]

    def sample(self, request: Request) -> Sample:
        match = re.fullmatch(r".*?/(.*)#(\d+)", request.id)
        assert match
        text = self.write(match[1], int(match[2]), self.model)
        ids = self.prompts.encode_completion(text.removesuffix("..."))
        cut = text.endswith("...")
        ids = ids[:-1] if cut else ids
        log_probs = tuple(-0.5 for _ in ids)
        return Sample(request.id, ids, log_probs, "length" if cut else "stop", self.version)

    def take_asked(self) -> list[str]:
        """The requests since the last call, by id."""
        asked = [request.id for request in self.asked]
        self.asked = []
        return asked


def soon(value: Any, late: bool) -> Future[Any]:
    """A future with `value`; `late`: a moment later, in another thread."""
    future: Future[Any] = Future()
    if late:
        threading.Timer(0.02, future.set_result, [value]).start()
    else:
        future.set_result(value)
    return future


class FakeVerifier:
    """Right is what is the same text; UNDECIDED is not decided. `late`: a verdict takes a moment."""

    def __init__(self) -> None:
        self.late = False
        self.asked: list[tuple[Any, ...]] = []

    def submit(
        self, items: Sequence[tuple[Any, ...]], for_negatives: bool = True
    ) -> list[Future[VerifierResult]]:
        self.asked += items
        return [soon(self.verify(gold, extract_boxed(text)), self.late) for gold, text, _ in items]

    def done(self, handle: list[Future[VerifierResult]]) -> bool:
        return all(future.done() for future in handle)

    def collect(self, handle: list[Future[VerifierResult]]) -> list[VerifierResult]:
        return [future.result() for future in handle]

    def verify(self, gold: str, answer: str | None) -> VerifierResult:
        if answer is None:
            return VerifierResult(Verdict.UNVERIFIED, "no_answer", None)
        if answer == UNDECIDED:
            return VerifierResult(Verdict.UNVERIFIED, "timeout", answer)
        return VerifierResult(Verdict.CORRECT if answer == gold else Verdict.WRONG, None, answer)


class FakeScorer:
    """Gives every item `value(item)`; None is missing with cause "too_long". `hangs`: what a real one gives
    after its deadline. `fails`: what asking it raises later."""

    def __init__(self) -> None:
        self.value: Callable[[Any], Any] = lambda item: 0.0
        self.hangs = False
        self.loaded: list[str] = []
        self.asked: list[Any] = []
        self.fails: Exception | None = None

    def load(self, model: str) -> None:
        self.loaded.append(model)

    def submit(self, items: Sequence[Any]) -> list[Future[Outcome[Any]]]:
        self.asked += items
        return [self._begin(item) for item in items]

    def collect(self, handle: list[Future[Outcome[Any]]]) -> list[Outcome[Any]]:
        return [future.result() for future in handle]

    def score(self, items: Sequence[Any]) -> list[Outcome[Any]]:
        return self.collect(self.submit(items))

    def _begin(self, item: Any) -> Future[Outcome[Any]]:
        if self.fails:
            future: Future[Outcome[Any]] = Future()
            future.set_exception(self.fails)
            return future
        value = None if self.hangs else self.value(item)
        cause = "deadline" if self.hangs else "too_long" if value is None else None
        return soon(Outcome(value, cause), self.hangs)


class FakePolicy:
    """Weights are the text "MODEL+STEPS"; a checkpoint and an export hold it. Log-probabilities are
    `log_prob(completion ids)`, -1 by default; scores are `score(prompt ids, completion ids)`. `interrupt_at`:
    the step that fails, once, with `interruption`."""

    compute_dtype = "float32"

    def __init__(self) -> None:
        self.model, self.head, self.steps = "", "", 0
        self.loads: list[tuple[str, str, int, int]] = []
        self.references: list[str] = []
        self.trained: list[tuple[Batch, Any]] = []
        self.scored: list[Batch] = []
        self.restored: list[int] = []
        self.writes_for = 0  # so often a checkpoint is asked for before it is written
        self.asked_whether_saved = 0
        self.save_fails: Exception | None = None
        self.score: Callable[[Sequence[int], Sequence[int]], float] = lambda prompt, completion: 0.0
        self.log_prob: Callable[[Sequence[int]], float] = lambda completion: -1.0
        self.asked: list[Batch] = []  # for log-probabilities
        self.interrupt_at: int | None = None
        self.interruption: BaseException = KeyboardInterrupt()
        self.passed = 0  # steps without an update
        self.ends_of_steps: list[bool] = []
        self.temperatures: list[float] = []
        self.skips: Callable[[int], float] = lambda step: 0.0
        self.losses: Callable[[int], float] = lambda step: 1.0 / (1 + step)

    @property
    def state(self) -> str:
        return f"{self.model}+{self.steps}"

    def load(self, model: str, head: str, optimizer: Optimizer | None, total_steps: int, seed: int) -> None:
        self.model, self.head, self.steps = model, head, 0
        self.loads.append((model, head, total_steps, seed))

    def load_reference(self, model: str) -> None:
        self.references.append(model)

    def pass_step(self) -> None:
        self.passed += 1

    def train_step(self, batch: Batch, objective: Any, end_of_step: bool = True) -> dict[str, float]:
        if self.interrupt_at == self.steps:
            self.interrupt_at = None
            raise self.interruption
        self.trained.append((batch, objective))
        self.ends_of_steps.append(end_of_step)
        self.steps += 1
        return {
            "loss": self.losses(self.steps - 1),
            "grad_norm": 1.0,
            "update_skipped": self.skips(self.steps - 1),
        }

    def log_probs(self, batch: Batch, temperature: float = 1.0) -> list[np.ndarray]:
        self.temperatures.append(temperature)
        self.asked.append(batch)
        return [np.full(len(ids), self.log_prob(ids), np.float32) for ids in batch.completion_ids]

    def reference_log_probs(self, batch: Batch, temperature: float = 1.0) -> list[np.ndarray]:
        self.temperatures.append(temperature)
        return [-2 * np.ones(len(ids), np.float32) for ids in batch.completion_ids]

    def scores(self, batch: Batch) -> list[float]:
        self.scored.append(batch)
        return [self.score(*row) for row in zip(batch.prompt_ids, batch.completion_ids, strict=True)]

    def weights(self) -> FakeWeights:
        return FakeWeights(self.state)

    def begin_save(self, directory: Path) -> None:
        write_json(directory / "policy.json", [self.model, self.steps])
        self.asked_whether_saved = 0

    def is_saved(self, waits: bool = False) -> bool:
        self.asked_whether_saved += 1
        if self.save_fails:
            raise self.save_fails
        return waits or self.asked_whether_saved > self.writes_for

    def restore(self, directory: Path) -> None:
        self.model, self.steps = read_json(directory / "policy.json")
        self.restored.append(self.steps)

    def export(self, directory: str | Path) -> None:
        Path(directory).mkdir(exist_ok=True)
        write_json(Path(directory) / "weights.json", self.state)


class FakeFleet:
    """The roles, and a scorer for each of the names that a test uses."""

    def __init__(self, prompts: Prompts) -> None:
        self.rollout, self.verifier, self.policy = FakeRollout(prompts), FakeVerifier(), FakePolicy()
        self.scorers: dict[str, FakeScorer] = {}
        self.runtime = Runtime()

    def scorer(self, name: str) -> FakeScorer:
        return self.scorers.setdefault(name, FakeScorer())


@dataclass
class Bench:
    """One store of stages with one fleet; `making(name)` gives the context of a stage that is being made."""

    store: Path
    prompts: Prompts
    fleet: FakeFleet
    seed: int = 3
    solution: Callable[..., str] = solution
    problems: Callable[[int], Problems] = made_up_problems
    malformed: str = MALFORMED
    undecided: str = UNDECIDED
    shown: io.StringIO = field(default_factory=io.StringIO)
    scores: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def making(self, name: str = "stage") -> Iterator[Context]:
        place = Place(self.store / name)
        tracker = Tracker(
            self.store, Tracking(), lambda *_: pytest.fail("no backends"), terminal=PlainTerminal(self.shown)
        )
        fleet: Any = self.fleet
        ctx = Context(self.seed, place, fleet, self.prompts, tracker, self.store, self.scores)
        with ctx.making({"inputs": []}):
            tracker.enter(place.directory)
            yield ctx

    def counts(self, name: str = "stage") -> dict[str, int]:
        """Of a stage that is done."""
        manifest = Place(self.store / name).manifest()
        assert manifest is not None
        return manifest["counts"]


@pytest.fixture(scope="session")
def tiny_prompts() -> Prompts:
    return Prompts(build_tokenizer(), Data(max_prompt_tokens=60))


@pytest.fixture
def bench(tmp_path: Path, tiny_prompts: Prompts) -> Bench:
    return Bench(tmp_path / "stages", tiny_prompts, FakeFleet(tiny_prompts))
