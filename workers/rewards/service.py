"""A pool of Ray actors that score items: batches made from one queue, the least loaded replica, a cause for
every miss.

Items wait in the driver, and a replica holds two requests at most, so that neither a death nor a hang takes
more than that with it. An actor that dies, or works longer on a request than `deadline_seconds`, is ended and
started anew, and its items are asked again: those it was working on one by one, so that an item that ends
every process costs itself only. A pool that fails again and again without a success between says so and ends
the run.

Scoring must be a pure function of model and item. A request names the model it wants, and the actor loads
that model if it has another one: a restarted actor never scores with old weights.

Between `min_replicas` and `max_replicas` a pool follows its queue (`workers.rewards.scaling`). Nothing waits
for a replica that is added so: where it cannot be placed it is given up.
"""

import itertools
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from pns.config import EngineKind, RewardConfig, ServicePool
from pns.errors import UserError
from workers.actor_logs import actor_log, print_to
from workers.rewards.scaling import Autoscaler, ScaleRule
from workers.runtime import Limit, Runtime, process_environment
from workers.sizes import FORWARD_TOKENS

_Item = TypeVar("_Item")
_AnyItem = TypeVar("_AnyItem", contravariant=True)
_Value = TypeVar("_Value")

_REQUESTS_PER_REPLICA = 2  # one that is computed, and the next, so that no replica waits for the driver
# A request is split into forward passes of similar lengths: a few of them, so that the lengths can be sorted.
_FORWARDS_PER_REQUEST = 4
_MAX_DEATHS = 3  # of processes, with an item at work, before the item is given up
_MAX_TIMEOUTS = 2  # of an item, in two processes
# Failures in a row, without any success of the pool between, that end it. A hang weighs more: it takes long.
_MAX_FAILURES, _TIMEOUT_WEIGHT = 5, 2
_TICK_SECONDS = 0.5  # between looks at deadlines
_RULE = ScaleRule()
_SAY_SECONDS = 30.0  # of waiting without progress, before the pool says what for


@dataclass(frozen=True)
class Outcome(Generic[_Value]):
    """A score, or None with the reason why there is none."""

    value: _Value | None
    cause: str | None = None


class PoolFailedError(UserError):
    """A pool whose replicas fail again and again."""


class ServedModel(Protocol[_AnyItem, _Value]):
    """What runs inside an actor: one outcome an item, in order. Raises an exception where the batch failed as
    a whole."""

    def score(self, items: Sequence[_AnyItem]) -> list[Outcome[_Value]]: ...


class ModelVersion(NamedTuple):
    """A model to score with; the number tells apart two states of one directory."""

    number: int
    path: str


def micro_batches(lengths: Mapping[int, int], max_tokens: int) -> list[list[int]]:
    """Rows, given with their lengths, in batches of similar length, the longest first: rows x longest is at
    most `max_tokens` (or one row)."""
    batches: list[list[int]] = []
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class ScoringActor:
    """One replica: a model, loaded when it is asked for."""

    def __init__(self, build: Callable[[str], ServedModel[Any, Any]], log_file: str = "") -> None:
        print_to(log_file)
        self._build = build
        self._model: ServedModel[Any, Any] | None = None
        self._version: ModelVersion | None = None

    def load(self, model: ModelVersion | None) -> None:
        """Have `model` in memory; None: return once the process is up."""
        if model is not None and self._version != model:
            self._model = self._version = None  # frees the memory first
            self._model = self._build(model.path)
            self._version = model

    def score(self, model: ModelVersion, items: Sequence[Any]) -> list[Outcome[Any]]:
        """Outcomes of `items`, in order."""
        self.load(model)
        assert self._model is not None
        return _score_or_split(self._model, items)


def _score_or_split(model: ServedModel[Any, Any], items: Sequence[Any]) -> list[Outcome[Any]]:
    """A failing batch is halved until the failure is one item's own: out of memory, or a row the model cannot
    take."""
    try:
        return model.score(items)
    except Exception as error:  # whatever a model raises: it is the item's cause
        failure = error
    if len(items) == 1:
        return [Outcome(None, describe_error(failure))]
    half = len(items) // 2
    return _score_or_split(model, items[:half]) + _score_or_split(model, items[half:])


def describe_error(error: BaseException) -> str:
    """An exception as a one-line cause: its class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@dataclass(eq=False)
class _Entry:
    """An item on its way."""

    item: Any
    num_tokens: int
    model: ModelVersion
    future: Future[Outcome[Any]]
    submitted: float  # monotonic seconds
    deaths: int = 0
    timeouts: int = 0
    is_probe: bool = False  # one that has been scored before, asked of a new process before suspects are


@dataclass(eq=False)
class _Replica:
    """`number` counts all that were started; `index` is the least that no other has; `began`: when it began
    to start, to load, to be idle, or to work on its first request, in monotonic seconds; `restarted`: in the
    place of one that failed; `grown`: as items queued up."""

    number: int
    index: int
    actor: Any
    began: float
    restarted: bool = False
    grown: bool = False
    up: bool = False  # the process is there, and loads the model if there is one by then
    ready: bool = False
    retiring: bool = False
    requests: deque[list[_Entry]] = field(default_factory=deque)

    @property
    def starting(self) -> bool:
        return not self.ready and not self.retiring

    @property
    def tokens_in_flight(self) -> int:
        return sum(entry.num_tokens for request in self.requests for entry in request)

    @property
    def holds_suspect(self) -> bool:
        return any(entry.deaths for request in self.requests for entry in request)


@dataclass
class ServiceStats:
    """Of a pool, since it started: what `pns status` shows."""

    replicas: int  # that are up
    queued: int
    in_flight: int
    scored: int
    items_per_second: float  # over the last minute
    seconds_p50: float  # from submission to outcome, of the last thousand
    seconds_p95: float
    restarts: int
    failures: dict[str, int]  # cause -> items
    wanted: int = 0  # replicas that are up or being started
    cost: float = 0.0  # of an endpoint's tokens, in the currency of its prices


ServiceHandle = list[Future[Outcome[Any]]]


class ScoringPool(Generic[_Item, _Value]):
    """`pool.replicas` actors that score items with one model; `load` names the model before the first
    `submit`.

    `rule` says when their number follows the queue. `name` stands in messages. `build(model_path)` makes the
    model inside the actor and must be picklable; `num_tokens(item)` is the item's size for batching and
    routing. An item that two processes did not answer within `deadline_seconds` each is missing. No GPU is
    asked for on CPU. Raises TimeoutError when the actors are not up within the runtime's limit of starting.
    """

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        build: Callable[[str], ServedModel[_Item, _Value]],
        num_tokens: Callable[[_Item], int],
        deadline_seconds: float = RewardConfig.deadline_seconds,
        rule: ScaleRule = _RULE,
    ) -> None:
        self._name, self._pool, self._runtime = name, pool, runtime
        self._gpus = pool.gpus if runtime.device == "cuda" else 0
        self._build, self._num_tokens, self._deadline_seconds = build, num_tokens, deadline_seconds
        self._forward_tokens = pool.batch_tokens or FORWARD_TOKENS[runtime.device]
        self._model: ModelVersion | None = None
        # Everything below is the manager thread's, under the lock where others look at it.
        self._lock = threading.RLock()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[_Entry] = deque()
        self._suspects: deque[_Entry] = deque()  # at work when a process died: asked alone
        self._replicas: list[_Replica] = []
        smallest, largest = pool.min_replicas or pool.replicas, pool.max_replicas or pool.replicas
        self._rule = rule
        self._autoscaler = Autoscaler(rule, smallest, largest)
        self._seconds_per_token = 0.0  # of a replica, lately
        self._num_started = 0
        self._failures_in_row = 0
        self._failed: PoolFailedError | None = None
        self._last_failure = ""
        self._scored: _Entry | None = None  # the last one that a model gave a value
        self._num_scored = self._num_restarts = 0
        self._causes: Counter[str] = Counter()
        self._latencies: deque[tuple[float, float]] = deque(maxlen=1000)  # (when, seconds)
        self._manager = threading.Thread(target=self._manage, name=f"pool-{name}", daemon=True)
        self._manager.start()
        try:
            self._set_size(pool.replicas)
        except BaseException:
            self.shutdown()
            raise

    @property
    def replicas(self) -> int:
        with self._lock:
            return sum(not replica.retiring for replica in self._replicas)

    def load(self, model_path: str) -> None:
        """Swap the model in every replica; items submitted before keep the model they were submitted for.
        Raises UserError where the model cannot be used and TimeoutError where loading takes longer than the
        runtime's limit of it."""
        model = ModelVersion(self._model.number + 1 if self._model else 1, str(model_path))
        with self._lock:
            ready = [replica for replica in self._replicas if replica.ready and not replica.retiring]
        loading = {replica.actor.load.remote(model): replica for replica in ready}
        self._wait_to_load(loading, f"to load {model_path}")
        self._model = model  # only now: where loading fails, the model before is still served

    def resize(self, replicas: int) -> None:
        """Have so many replicas from now on, whatever `min_replicas` and `max_replicas` are. New ones are
        ready on return; retired ones finish what they have, then go.

        Raises UserError or TimeoutError where new ones cannot be started; the pool is then as it was.
        """
        if replicas < 1:
            raise UserError(f"{self._name}: {replicas} replicas; use 1 or more")
        fixed = Autoscaler(self._rule, replicas, replicas)
        with self._lock:
            before, self._autoscaler = self._autoscaler, fixed
        try:
            self._set_size(replicas)
        except (TimeoutError, UserError):
            with self._lock:
                if self._autoscaler is fixed:
                    self._autoscaler = before
            raise

    def _set_size(self, replicas: int) -> None:
        with self._lock:
            autoscaler = self._autoscaler
            kept = [replica for replica in self._replicas if not replica.retiring]
            # The idlest retire, so that little is waited for; first those that are not up.
            kept.sort(key=lambda replica: (not replica.ready, -replica.tokens_in_flight))
            for replica in kept[replicas:]:
                replica.retiring = True
            for _ in range(replicas - len(kept)):
                self._start()
            added = [replica for replica in self._replicas if replica.starting and not replica.restarted]
        self._inbox.put(self._end_retired)
        try:
            self._wait_to_start(added, autoscaler)
        except (TimeoutError, UserError):
            with self._lock:
                if self._autoscaler is autoscaler:  # else they belong to whoever asked for another size
                    for replica in set(added) & set(self._replicas):
                        self._end(replica)
            raise

    def submit(self, items: Sequence[_Item]) -> ServiceHandle:
        """Begin scoring, without waiting: the future outcome of every item, in order."""
        if self._model is None:
            raise RuntimeError(f"{self._name}: submit before load")
        if self._failed:
            raise self._failed
        now, model = time.monotonic(), self._model
        entries = [_Entry(item, self._num_tokens(item), model, Future(), now) for item in items]
        self._inbox.put(lambda: self._waiting.extend(entries))
        return [entry.future for entry in entries]

    def collect(self, handle: ServiceHandle) -> list[Outcome[_Value]]:
        """Outcomes of one `submit`, in order; what failed is missing with its cause ("deadline": no answer in
        time). Says every 30 s what it waits for. Raises PoolFailedError."""
        while late := wait_for_futures(handle, timeout=_SAY_SECONDS).not_done:
            stats = self.stats()
            print(
                f"{self._name}: waiting for {len(late)} of {len(handle)} scores; {stats.replicas} of "
                f"{stats.wanted} replicas are up and hold {stats.in_flight} items, {stats.queued} wait"
                f"{self._last_failure}",
                file=sys.stderr,
                flush=True,
            )
        return [future.result() for future in handle]

    def score(self, items: Sequence[_Item]) -> list[Outcome[_Value]]:
        """Submit and collect."""
        return self.collect(self.submit(items))

    def stats(self) -> ServiceStats:
        """How the pool is doing."""
        with self._lock:
            now = time.monotonic()
            seconds = sorted(seconds for _, seconds in self._latencies)
            recent = [when for when, _ in self._latencies if now - when < 60]
            span = max(now - recent[0], 1e-3) if recent else 1.0
            in_flight = sum(len(request) for replica in self._replicas for request in replica.requests)
            return ServiceStats(
                replicas=sum(replica.ready and not replica.retiring for replica in self._replicas),
                queued=len(self._waiting) + len(self._suspects),
                in_flight=in_flight,
                scored=self._num_scored,
                items_per_second=len(recent) / span,
                seconds_p50=seconds[len(seconds) // 2] if seconds else 0.0,
                seconds_p95=seconds[int(0.95 * (len(seconds) - 1))] if seconds else 0.0,
                restarts=self._num_restarts,
                failures=dict(self._causes),
                wanted=self.replicas,
            )

    def shutdown(self) -> None:
        """End every actor; what is under way is lost."""
        self._inbox.put(None)
        self._manager.join()
        for replica in self._replicas:
            ray.kill(replica.actor)
        self._replicas = []
        self._give_up(RuntimeError(f"{self._name}: the pool was shut down"))

    # The manager's thread.

    def _manage(self) -> None:
        looked = time.monotonic()
        while True:
            try:
                event = self._inbox.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                event = self._tick
            if event is None:
                return
            with self._lock:
                try:
                    event()
                    # Also while events never cease: a replica may hang beside others that answer.
                    if time.monotonic() - looked >= _TICK_SECONDS:
                        looked = time.monotonic()
                        self._tick()
                    self._dispatch()
                except Exception as error:  # this thread's own: without it nobody would ever be answered
                    self._failed = self._failed or PoolFailedError(f"{self._name}: {describe_error(error)}")
                if self._failed:
                    self._give_up(self._failed)  # also of what was submitted since

    def _start(self) -> _Replica:
        """A replica that is starting; it takes work once the process is up and has loaded the model."""
        vllm = self._pool.engine is EngineKind.vllm
        environment = process_environment("reward", self._runtime.device, self._pool.cpus, vllm)
        remote = ray.remote(ScoringActor).options(
            num_cpus=self._pool.cpus,
            num_gpus=self._gpus,
            resources=self._pool.resources,
            label_selector=self._pool.labels,
            max_restarts=0,  # the pool starts another one: it knows which items were at work
            runtime_env={"env_vars": environment},
        )
        self._num_started += 1
        taken = {replica.index for replica in self._replicas}
        index = next(number for number in itertools.count() if number not in taken)
        actor = remote.remote(self._build, self._log_of(index))
        replica = _Replica(self._num_started, index, actor, time.monotonic())
        self._replicas.append(replica)
        self._await(replica, replica.actor.load.remote(None))
        return replica

    def _await(self, replica: _Replica, reference: ray.ObjectRef) -> None:
        future = reference.future()
        future.add_done_callback(lambda future: self._inbox.put(lambda: self._started(replica, future)))

    def _started(self, replica: _Replica, future: Future[None]) -> None:
        if error := future.exception():
            fault = f"could not start ({_cause(error)}){self._printed(replica, error)}"
            if replica.restarted:
                self._replace(replica, fault, 1)
            else:
                self._give_up_replica(replica, fault)
            return
        replica.began = time.monotonic()
        if not replica.up and self._model is not None:
            replica.up = True
            self._await(replica, replica.actor.load.remote(self._model))
            return
        replica.up = replica.ready = True
        if replica.restarted and self._suspects and self._scored:
            # A process that scores what was scored before is sound: what ends it is the next item's fault.
            known = self._scored
            now = time.monotonic()
            probe = _Entry(known.item, known.num_tokens, known.model, Future(), now, is_probe=True)
            self._waiting.appendleft(probe)

    def _dispatch(self) -> None:
        """Give waiting items to replicas that have room."""
        for _ in range(_REQUESTS_PER_REPLICA):
            open_replicas = [
                replica
                for replica in self._replicas
                if replica.ready and not replica.retiring and len(replica.requests) < _REQUESTS_PER_REPLICA
            ]
            for replica in sorted(open_replicas, key=lambda replica: replica.tokens_in_flight):
                # After a failure first what nobody suspects: a success shows that the pool works.
                suspects_first = not self._failures_in_row or not self._waiting
                if self._suspects and suspects_first and not replica.requests:
                    self._send(replica, [self._suspects.popleft()])
                elif self._waiting and not replica.holds_suspect:
                    self._send(replica, self._next_request())

    def _next_request(self) -> list[_Entry]:
        """The oldest items that ask for one model: a few forward passes of tokens, less where that would
        leave other replicas idle, and at least one item."""
        num_waiting = sum(entry.num_tokens for entry in self._waiting)
        share = num_waiting // (_REQUESTS_PER_REPLICA * max(1, self.replicas))
        budget = min(max(share, self._forward_tokens), _FORWARDS_PER_REQUEST * self._forward_tokens)
        request = [self._waiting.popleft()]
        num_tokens = request[0].num_tokens
        while self._waiting and self._waiting[0].model == request[0].model:
            num_tokens += self._waiting[0].num_tokens
            if num_tokens > budget:
                break
            request.append(self._waiting.popleft())
        return request

    def _send(self, replica: _Replica, request: list[_Entry]) -> None:
        if not replica.requests:
            replica.began = time.monotonic()
        replica.requests.append(request)
        items = [entry.item for entry in request]
        scoring = replica.actor.score.remote(request[0].model, items).future()
        landed = self._landed
        scoring.add_done_callback(lambda future: self._inbox.put(lambda: landed(replica, request, future)))

    def _landed(self, replica: _Replica, request: list[_Entry], future: Future[list[Outcome[Any]]]) -> None:
        if replica not in self._replicas or request not in replica.requests:
            return  # ended meanwhile, and its items are asked again
        error = future.exception()
        if isinstance(error, RayActorError):
            for entry in replica.requests[0]:  # the one it was computing; the next is innocent
                entry.deaths += 1
            self._replace(replica, f"died ({_cause(error)}){self._printed(replica, error)}", 1)
            return
        replica.requests.remove(request)
        seconds = time.monotonic() - replica.began
        replica.began = time.monotonic()
        if error is None:
            rate = seconds / max(1, sum(entry.num_tokens for entry in request))
            # Of about the last four requests.
            known = self._seconds_per_token or rate
            self._seconds_per_token = known + (rate - known) / 4
            self._failures_in_row, self._last_failure = 0, ""
            outcomes = future.result()
        else:
            outcomes = [Outcome(None, _cause(error))] * len(request)
        for entry, outcome in zip(request, outcomes, strict=True):
            self._settle(entry, outcome)
            if outcome.value is not None:
                self._scored = entry
        self._end_retired()

    def _settle(self, entry: _Entry, outcome: Outcome[Any]) -> None:
        if entry.is_probe:
            return
        now = time.monotonic()
        self._num_scored += 1
        self._latencies.append((now, now - entry.submitted))
        if outcome.cause:
            self._causes[outcome.cause] += 1
        entry.future.set_result(outcome)

    def _tick(self) -> None:
        self._end_late()
        self._follow_queue()

    def _end_late(self) -> None:
        """End replicas that work too long on a request, or take too long to start."""
        now = time.monotonic()
        for replica in list(self._replicas):
            seconds = now - replica.began
            limit = self._limit(replica)
            if replica.starting and seconds > limit.seconds:
                fault = f"took longer than {limit.seconds:g} s ({limit.key}) {self._purpose(replica)}"
                if replica.restarted:
                    self._replace(replica, fault, _TIMEOUT_WEIGHT)
                elif replica.grown:  # those of `resize` are watched there
                    self._give_up_replica(replica, fault)
            elif replica.requests and seconds > self._deadline_seconds:
                for entry in replica.requests[0]:
                    entry.timeouts += 1
                self._replace(replica, f"gave no answer for {self._deadline_seconds:g} s", _TIMEOUT_WEIGHT)

    def _follow_queue(self) -> None:
        """Grow by one while items queue up, shrink by one where a replica has long had nothing to do."""
        now = time.monotonic()
        ready = [replica for replica in self._replicas if replica.ready and not replica.retiring]
        starting = any(replica.starting for replica in self._replicas)
        idle = [replica for replica in ready if not replica.requests]
        idlest = min(idle, key=lambda replica: replica.began, default=None)
        num_waiting = sum(entry.num_tokens for entry in self._waiting)
        backlog_seconds = num_waiting * self._seconds_per_token / max(1, len(ready))
        idle_seconds = now - idlest.began if idlest else 0.0
        step = self._autoscaler.step(now, self.replicas, starting, backlog_seconds, idle_seconds)
        if step > 0:
            self._start().grown = True
        elif step < 0 and idlest:
            idlest.retiring = True
            self._end_retired()

    def _end(self, replica: _Replica) -> None:
        self._replicas.remove(replica)
        ray.kill(replica.actor)

    def _give_up_replica(self, replica: _Replica, fault: str) -> None:
        """End one that has not started and that nothing depends on."""
        if replica not in self._replicas:
            return
        self._end(replica)
        self._last_failure = f"; replica {replica.number} {fault}"
        if replica.grown:  # else `resize` says it
            self._autoscaler.rest(time.monotonic())
            kept = f"the pool goes on with {self.replicas}"
            print(f"{self._name}{self._last_failure}: {kept}", file=sys.stderr, flush=True)

    def _replace(self, replica: _Replica, fault: str, weight: int) -> None:
        """End a replica, ask its items again, and start another, unless the pool has failed too often."""
        if replica not in self._replicas:
            return
        self._end(replica)
        self._num_restarts += 1
        self._failures_in_row += weight
        self._last_failure = f"; replica {replica.number} {fault}"
        self._ask_again(replica)
        if self._failures_in_row >= _MAX_FAILURES:
            self._failed = PoolFailedError(
                f"{self._name}: replica {replica.number} {fault}, and so did those before it, without a "
                f"score between ({self._num_restarts} restarts): look at the model and at memory, then "
                "start the run again: it goes on from here"
            )
            return
        if not replica.retiring:
            self._start().restarted = True

    def _ask_again(self, replica: _Replica) -> None:
        for request in reversed(replica.requests):
            for entry in reversed(request):
                if entry.is_probe:
                    continue
                if entry.deaths >= _MAX_DEATHS:
                    self._settle(entry, Outcome(None, "process_died"))
                elif entry.timeouts >= _MAX_TIMEOUTS:
                    self._settle(entry, Outcome(None, "deadline"))
                elif entry.deaths:
                    self._suspects.appendleft(entry)
                else:
                    self._waiting.appendleft(entry)

    def _end_retired(self) -> None:
        for replica in list(self._replicas):
            if replica.retiring and not replica.requests:
                self._end(replica)

    def _give_up(self, error: Exception) -> None:
        entries = [*self._waiting, *self._suspects]
        for replica in self._replicas:
            entries += [entry for request in replica.requests for entry in request]
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(error)
        self._waiting.clear()
        self._suspects.clear()

    # Waits of the caller's thread.

    def _wait_to_start(self, added: Sequence[_Replica], autoscaler: Autoscaler) -> None:
        for index, replica in enumerate(added):
            while not replica.ready:
                if self._failed:
                    raise self._failed
                if self._autoscaler is not autoscaler:
                    raise UserError(f"{self._name}: another number of replicas was asked for meanwhile")
                if replica not in self._replicas:  # it failed
                    raise PoolFailedError(f"{self._name}{self._last_failure}")
                limit = self._limit(replica)
                if not replica.ready and time.monotonic() - replica.began > limit.seconds:
                    raise self._late(index, len(added), self._purpose(replica), limit)
                time.sleep(0.02)

    def _wait_to_load(self, loading: dict[ray.ObjectRef, _Replica], purpose: str) -> None:
        limit = self._runtime.load_limit
        end = time.monotonic() + limit.seconds
        for index, reference in enumerate(loading):
            try:
                ray.get(reference, timeout=max(0.0, end - time.monotonic()))
            except ray.exceptions.GetTimeoutError as error:
                raise self._late(index, len(loading), purpose, limit) from error
            except RayActorError:
                continue  # the manager starts another, which loads what its first request names
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise

    def _log_of(self, index: int) -> str:
        return actor_log(self._runtime.logs, self._name, index)

    def _printed(self, replica: _Replica, error: BaseException) -> str:
        """Where to look for what an exception does not tell: that a process died."""
        file = self._log_of(replica.index)
        return f" (what it printed: {file})" if file and isinstance(error, RayActorError) else ""

    def _limit(self, replica: _Replica) -> Limit:
        """Of what it does before it is ready."""
        return self._runtime.load_limit if replica.up else self._runtime.start_limit

    def _purpose(self, replica: _Replica) -> str:
        """What it does before it is ready, and asks of a node for that."""
        if replica.up and self._model is not None:
            return f"to load {self._model.path}"
        units = {"GPU": self._gpus, "CPU": self._pool.cpus} | self._pool.resources
        asked = " and ".join(f"{amount:g} {unit}" for unit, amount in units.items())
        labels = ", ".join(f"{label}={value}" for label, value in self._pool.labels.items())
        return f"to start with {asked} each" + (f" on a node with {labels}" if labels else "")

    def _late(self, index: int, num_replicas: int, purpose: str, limit: Limit) -> TimeoutError:
        return TimeoutError(
            f"{self._name}: waited {limit.seconds:g} s for replica {index + 1} of {num_replicas} {purpose}; "
            f"the cluster has {_free('GPU')} GPU and {_free('CPU')} CPU free: add room, or raise {limit.key}"
        )


def _free(resource: str) -> str:
    return f"{ray.available_resources().get(resource, 0):g}"


def _cause(error: BaseException) -> str:
    if isinstance(error, RayTaskError):
        return describe_error(error.cause)
    return type(error).__name__  # of Ray: the actor died, its node was lost
