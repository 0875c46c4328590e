"""A judge behind an OpenAI-compatible server: threads of the driver ask it, an item a request.

The interface is that of a `ScoringPool`. The server's tokenizer is not known here, so nothing but
`pns.algo.judging.neutralise` stands between a candidate and the server's control tokens, and a reply is free
text: it counts where it is one verdict with the nonce, and nothing else but the model's reasoning before it.
"""

import queue
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pns.algo.judging import Judgement, Template, make_nonce, parse_verdict, render_text
from pns.algo.step_judging import StepsAsked, parse_steps, render_steps, step_nonce
from pns.config import Endpoint
from pns.errors import UserError
from workers.http_client import cause_of, make_client
from workers.rewards.service import Outcome, PoolFailedError, ServiceHandle, ServiceStats, describe_error

Messages = list[dict[str, str]]
Candidate = tuple[str, str]  # problem text, solution text
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")

_SAY_SECONDS = 30.0  # of waiting without progress, before it is said what for
# Failures in a row that end the run, for each thread, as all of them fail in the time of one; and their
# weights: what is refused is refused again, and what hangs takes long; a server that limits a rate is alive.
_MAX_FAILURES = 5
_WEIGHTS = {"refused": 5, "timeout": 5, "rate_limit": 0}
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class _Task(Generic[_Item, _Value]):
    item: _Item
    future: Future[Outcome[_Value]]
    submitted: float  # monotonic seconds


@dataclass(frozen=True)
class VerdictFormat(Generic[_Item, _Value]):
    """What is asked of an item, given the run's seed, and how the reply to it, without reasoning, is read
    (None: it is no verdict); `probe` is the item that a model is asked of when it is loaded."""

    ask: Callable[[_Item, int], tuple[Messages, Callable[[str], _Value | None]]]
    probe: _Item


def _ask_rubric(item: Candidate, seed: int) -> tuple[Messages, Callable[[str], Judgement | None]]:
    nonce = make_nonce(seed, *item, Template.TEXT)

    def read(reply: str) -> Judgement | None:
        scores = parse_verdict(reply, Template.TEXT, nonce)
        return Judgement(scores) if scores else None

    return render_text(*item, nonce), read


def _ask_steps(item: StepsAsked, seed: int) -> tuple[Messages, Callable[[str], tuple[bool, ...] | None]]:
    problem, steps = item
    nonce = step_nonce(seed, problem, steps, Template.TEXT)
    return render_steps(problem, steps, nonce), lambda reply: parse_steps(reply, nonce, len(steps))


RUBRIC = VerdictFormat(_ask_rubric, ("What is 1+1?", "1+1=2, so the answer is 2."))
STEPS: VerdictFormat[StepsAsked, tuple[bool, ...]] = VerdictFormat(
    _ask_steps, ("What is 1+1?", ("1+1=2. ", "The answer is 2."))
)


class EndpointGrader(Generic[_Item, _Value]):
    """The model that `load` names, at `endpoint.url`, is asked for verdicts in `form`; messages say `name`.

    A request without an answer within `deadline_seconds`, or with an error of the server, is repeated
    `endpoint.retries` times; the pauses between grow, or are those that the server asks for.
    """

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        seed: int,
        deadline_seconds: float,
        form: VerdictFormat[_Item, _Value],
    ) -> None:
        self._name, self._endpoint, self._seed, self._form = name, endpoint, seed, form
        self._client, self._headers = make_client(
            endpoint.url, endpoint.key_variable, deadline_seconds, endpoint.retries
        )
        self._model = ""
        self._tasks: queue.SimpleQueue[_Task[_Item, _Value] | None] = queue.SimpleQueue()
        # Everything below is under the lock.
        self._lock = threading.Lock()
        self._failed: Exception | None = None
        self._failures_in_row = 0
        self._last_failure = ""
        self._num_submitted = self._num_begun = self._num_scored = 0
        self._causes: Counter[str] = Counter()
        self._latencies: deque[tuple[float, float]] = deque(maxlen=1000)  # (when, seconds)
        self._cost = 0.0
        for number in range(endpoint.concurrency):
            # Daemons: a request that hangs does not keep the driver.
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def load(self, model: str) -> None:
        """Name the model, once it has answered one request. Raises UserError where it cannot be used."""
        outcome, message = self._ask(model, self._form.probe)
        if message:
            raise UserError(f"{self._name}: {self._endpoint.url} does not serve {model}: {message}")
        if outcome.cause:
            said = f"{model} does not reply with a verdict alone"
            print(f"{self._name}: {said}; what it says else is missing", file=sys.stderr, flush=True)
        self._model = model

    def resize(self, replicas: int) -> None:
        """There is nothing to resize. Raises UserError."""
        raise UserError(f"{self._name}: an endpoint has no replicas: set endpoint.concurrency")

    def submit(self, items: Sequence[_Item]) -> list[Future[Outcome[_Value]]]:
        """Begin grading, without waiting: the future outcome of every item."""
        if not self._model:
            raise RuntimeError(f"{self._name}: submit before load")
        now = time.monotonic()
        tasks: list[_Task[_Item, _Value]] = [_Task(item, Future(), now) for item in items]
        with self._lock:
            if self._failed:
                raise self._failed
            self._num_submitted += len(tasks)
            for task in tasks:
                self._tasks.put(task)
        return [task.future for task in tasks]

    def collect(self, handle: ServiceHandle) -> list[Outcome[_Value]]:
        """Outcomes of one `submit`, in order. Missing: "unparsable", "rate_limit", "server_error", "timeout",
        "connection", "refused", "bad_request" (such as too long for the model), "bad_reply" (no chat
        completion). Says every 30 s what it waits for. Raises PoolFailedError."""
        while late := wait_for_futures(handle, timeout=_SAY_SECONDS).not_done:
            print(
                f"{self._name}: waiting for {len(late)} of {len(handle)} scores of "
                f"{self._endpoint.url}{self._last_failure}",
                file=sys.stderr,
                flush=True,
            )
        return [future.result() for future in handle]

    def score(self, items: Sequence[_Item]) -> list[Outcome[_Value]]:
        """Submit and collect."""
        return self.collect(self.submit(items))

    def stats(self) -> ServiceStats:
        """How it is doing; `replicas` is the number of requests at once, `cost` in the currency of the
        prices."""
        with self._lock:
            now = time.monotonic()
            seconds = sorted(seconds for _, seconds in self._latencies)
            recent = [when for when, _ in self._latencies if now - when < 60]
            span = max(now - recent[0], 1e-3) if recent else 1.0
            return ServiceStats(
                replicas=self._endpoint.concurrency,
                wanted=self._endpoint.concurrency,
                queued=self._num_submitted - self._num_begun,
                in_flight=self._num_begun - self._num_scored,
                scored=self._num_scored,
                items_per_second=len(recent) / span,
                seconds_p50=seconds[len(seconds) // 2] if seconds else 0.0,
                seconds_p95=seconds[int(0.95 * (len(seconds) - 1))] if seconds else 0.0,
                restarts=0,
                failures=dict(self._causes),
                cost=self._cost,
            )

    def shutdown(self) -> None:
        """Ask nothing more; what is under way is lost."""
        with self._lock:
            self._failed = self._failed or RuntimeError(f"{self._name}: the judge was shut down")
            for _ in range(self._endpoint.concurrency):
                self._tasks.put(None)
        self._client.close()

    # The threads.

    def _work(self) -> None:
        while task := self._tasks.get():
            with self._lock:
                failed = self._failed
                self._num_begun += not failed
            if not failed:
                outcome, message = self._ask(self._model, task.item)
                with self._lock:
                    self._settle(outcome, message, task.submitted)
                    failed = self._failed
            if failed:
                task.future.set_exception(failed)
            else:
                task.future.set_result(outcome)

    def _ask(self, model: str, item: _Item) -> tuple[Outcome[_Value], str]:
        """What became of one item; and where the request failed, with what."""
        messages: Any
        messages, read = self._form.ask(item, self._seed)
        try:
            completion = self._client.chat.completions.create(
                model=model,
                messages=messages,
                temperature=0.0,
                max_tokens=self._endpoint.max_tokens,
                extra_headers=self._headers,
            )
            reply, usage = completion.choices[0].message.content or "", completion.usage
        except Exception as error:  # also whatever a reply that is no completion makes of the library
            return Outcome(None, cause_of(error)), describe_error(error)
        if usage:
            price_in, price_out = self._endpoint.price_in, self._endpoint.price_out
            cost = (usage.prompt_tokens * price_in + usage.completion_tokens * price_out) / 1e6
            with self._lock:
                self._cost += cost
        value = read(_REASONING.sub("", reply, count=1))
        return Outcome(value, None if value else "unparsable"), ""

    def _settle(self, outcome: Outcome[_Value], message: str, submitted: float) -> None:
        now = time.monotonic()
        self._num_scored += 1
        self._latencies.append((now, now - submitted))
        if outcome.cause:
            self._causes[outcome.cause] += 1
        if not message:
            self._failures_in_row, self._last_failure = 0, ""
            return
        self._failures_in_row += _WEIGHTS.get(str(outcome.cause), 1)
        self._last_failure = f": {message}"
        if self._failures_in_row >= _MAX_FAILURES * max(2, self._endpoint.concurrency):
            self._failed = self._failed or PoolFailedError(
                f"{self._name}: {self._endpoint.url} fails again and again, without an answer between "
                f"({message}): look at the server, its key and its limits, then start the run again: it goes "
                "on from here"
            )


class EndpointJudge(EndpointGrader[Candidate, Judgement]):
    """Asked for the rubric of (problem text, solution text)."""

    def __init__(self, name: str, endpoint: Endpoint, seed: int, deadline_seconds: float) -> None:
        super().__init__(name, endpoint, seed, deadline_seconds, RUBRIC)


class EndpointStepJudge(EndpointGrader[StepsAsked, tuple[bool, ...]]):
    """Asked of (problem text, steps) whether each step is correct. A verdict takes about five tokens a step:
    `Endpoint.max_tokens` of 1024 are enough for 200 steps, and a verdict that is cut off is unparsable."""

    def __init__(self, name: str, endpoint: Endpoint, seed: int, deadline_seconds: float) -> None:
        super().__init__(name, endpoint, seed, deadline_seconds, STEPS)
