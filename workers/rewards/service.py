"""Ray actors that score: dynamic batches inside, the least loaded replica outside, a cause for every miss.

Requests are retried by Ray when an actor dies and restarts, so scoring must be a pure function of model and
item. A request names the model it wants, and the actor that serves it loads that model if it has another one:
a restarted actor therefore never scores with old weights.
"""

import asyncio
import functools
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayTaskError, TaskCancelledError

from pns.config import Pool
from pns.errors import UserError
from workers.runtime import ALLOCATOR_ENVIRONMENT, Runtime

_Item = TypeVar("_Item")
_AnyItem = TypeVar("_AnyItem", contravariant=True)
_Value = TypeVar("_Value")

_CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", **ALLOCATOR_ENVIRONMENT}  # two threads are slower on small models
_TASK_RETRIES = 3  # of a request whose actor died; an item that kills actors must end
_REMEMBERED_REQUESTS = 256  # of an actor, so that a repeated delivery is not computed twice
# A batch is sorted by length and split, so that a forward pass has little padding; a request is at most one
# forward pass, so that replicas share a large submit.
_FORWARDS_PER_BATCH = 4


@dataclass(frozen=True)
class Outcome(Generic[_Value]):
    """A score, or None with the reason why there is none."""

    value: _Value | None
    cause: str | None = None


class ServedModel(Protocol[_AnyItem, _Value]):
    """What runs inside an actor: one outcome an item, in order. RuntimeError where the whole batch failed."""

    def score(self, items: Sequence[_AnyItem]) -> list[Outcome[_Value]]: ...


class ModelVersion(NamedTuple):
    """A model to score with; the number tells apart two states of one directory."""

    number: int
    path: str


# Of one forward pass, padding included. On CPU larger ones leave the cache: on one core a classifier of 0.8 M
# parameters scored 700 rows of 60 tokens a second with 2,048 tokens, 410 with 16,384.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}


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


@dataclass
class _Waiting:
    item: Any
    num_tokens: int
    model: ModelVersion
    outcome: asyncio.Future[Outcome[Any]]


class ScoringActor:
    """One replica: whatever waits in its queue shares a forward pass, up to `tokens_per_batch`.

    The event loop only takes requests; models are loaded and run in one thread beside it.
    """

    def __init__(
        self,
        build: Callable[[str], ServedModel[Any, Any]],
        num_tokens: Callable[[Any], int],
        tokens_per_batch: int,
    ) -> None:
        self._build, self._num_tokens, self._tokens_per_batch = build, num_tokens, tokens_per_batch
        self._loaded: tuple[ModelVersion, ServedModel[Any, Any]] | None = None
        self._thread = ThreadPoolExecutor(1)  # one: a model takes one batch at a time
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._batches: asyncio.Task[None] | None = None
        self._requests: OrderedDict[str, asyncio.Task[list[Outcome[Any]]]] = OrderedDict()

    async def ready(self) -> None:
        """Return once the process is up."""

    async def load(self, model: ModelVersion) -> None:
        """Have `model` in memory."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._switch, model)

    async def score(self, request_id: str, model: ModelVersion, items: Sequence[Any]) -> list[Outcome[Any]]:
        """Outcomes of `items`, in order; not computed again for a request that is delivered twice."""
        if self._batches is None:  # not in `__init__`: a task needs a running loop
            self._batches = asyncio.create_task(self._run_batches())
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = asyncio.create_task(self._enqueue(model, items))
            # Only answered requests are forgotten: Ray repeats one that it believes lost.
            if len(self._requests) > _REMEMBERED_REQUESTS and next(iter(self._requests.values())).done():
                self._requests.popitem(last=False)
        return await request

    async def _enqueue(self, model: ModelVersion, items: Sequence[Any]) -> list[Outcome[Any]]:
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, self._num_tokens(item), model, loop.create_future()) for item in items]
        self._queue.extend(waiting)
        self._arrived.set()
        return list(await asyncio.gather(*(entry.outcome for entry in waiting)))

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()  # nothing can arrive in between: there is no await since the look
                continue
            items = [entry.item for entry in batch]
            run = loop.run_in_executor(self._thread, self._score, batch[0].model, items)
            await asyncio.wait([run])  # raises nothing: the failure belongs to those who asked
            error = run.exception()
            for index, entry in enumerate(batch):
                if entry.outcome.done():  # its request was cancelled meanwhile
                    continue
                if error is None:
                    entry.outcome.set_result(run.result()[index])
                else:
                    entry.outcome.set_exception(error)

    def _next_batch(self) -> list[_Waiting]:
        """The oldest items that ask for the same model, within the token budget (at least one item)."""
        batch: list[_Waiting] = []
        num_tokens = 0
        while self._queue:
            first = self._queue[0]
            if first.outcome.done():  # cancelled at a deadline
                self._queue.popleft()
                continue
            full = num_tokens + first.num_tokens > self._tokens_per_batch
            if batch and (full or first.model != batch[0].model):
                break
            num_tokens += first.num_tokens
            batch.append(self._queue.popleft())
        return batch

    def _switch(self, model: ModelVersion) -> ServedModel[Any, Any]:
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # frees the memory first
            self._loaded = model, self._build(model.path)
        return self._loaded[1]

    def _score(self, model: ModelVersion, items: list[Any]) -> list[Outcome[Any]]:
        return _score_or_split(self._switch(model), items)


def _score_or_split(model: ServedModel[Any, Any], items: list[Any]) -> list[Outcome[Any]]:
    """A failing batch is halved until the failure is one item's: out of memory, or a row it cannot take."""
    try:
        return model.score(items)
    except RuntimeError as error:
        failure = error
    if len(items) == 1:
        return [Outcome(None, describe_error(failure))]
    half = len(items) // 2
    return _score_or_split(model, items[:half]) + _score_or_split(model, items[half:])


def describe_error(error: BaseException) -> str:
    """An exception as a one-line cause: its class and the first line of its message."""
    lines = str(error).strip().splitlines()  # of CUDA's and Ray's there are dozens
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@dataclass
class _Replica:
    actor: Any
    tokens_in_flight: int = 0


@dataclass
class _Request:
    reference: ray.ObjectRef
    future: Future[list[Outcome[Any]]]
    num_items: int


ServiceHandle = list[_Request]  # the items of one `submit`, in order


class ScoringPool(Generic[_Item, _Value]):
    """`pool.replicas` actors that score items with one model, named by `load` before the first `submit`.

    `name` stands in messages. `build(model_path)` makes the model inside the actor and must be picklable;
    `num_tokens(item)` is the item's size for batching and routing. No GPU is asked for on CPU. Raises
    TimeoutError when the actors are not up within `runtime.start_timeout_seconds`.
    """

    def __init__(
        self,
        name: str,
        pool: Pool,
        runtime: Runtime,
        build: Callable[[str], ServedModel[_Item, _Value]],
        num_tokens: Callable[[_Item], int],
    ) -> None:
        self._name, self._pool, self._runtime = name, pool, runtime
        self._gpus = pool.gpus if runtime.device == "cuda" else 0
        self._build, self._num_tokens = build, num_tokens
        self._forward_tokens = FORWARD_TOKENS[runtime.device]
        self._model: ModelVersion | None = None
        self._lock = threading.Lock()  # futures complete in Ray's thread
        self._replicas: list[_Replica] = []
        self._retiring: list[_Replica] = []
        self.resize(pool.replicas)

    def load(self, model_path: str) -> None:
        """Swap the model in every replica; items submitted before keep the model they were submitted for.
        Raises UserError where the model cannot be used and TimeoutError where loading takes longer than
        `runtime.start_timeout_seconds`."""
        model = ModelVersion(self._model.number + 1 if self._model else 1, str(model_path))
        loading = [replica.actor.load.remote(model) for replica in self._replicas]
        self._wait(loading, f"to load {model_path}")
        self._model = model  # only now: where loading fails, the model before is still served

    def resize(self, replicas: int) -> None:
        """Start or retire replicas. New ones are ready on return; retired ones finish what they have."""
        if replicas < 1:
            raise UserError(f"{self._name}: {replicas} replicas; use 1 or more")
        with ExitStack() as stack:
            added = [_Replica(self._start()) for _ in range(replicas - len(self._replicas))]
            for replica in added:
                stack.callback(ray.kill, replica.actor)  # where one does not come up
            purpose = f"to start with {self._gpus:g} GPU and {self._pool.cpus:g} CPU each"
            self._wait([replica.actor.ready.remote() for replica in added], purpose)
            if self._model:
                loading = [replica.actor.load.remote(self._model) for replica in added]
                self._wait(loading, f"to load {self._model.path}")
            stack.pop_all()
        with self._lock:
            # The idlest retire, so that little is waited for.
            self._replicas.sort(key=lambda replica: -replica.tokens_in_flight)
            kept = self._replicas[:replicas]
            self._retiring += self._replicas[replicas:]
            self._replicas = kept + added
        self._end_retired()

    def submit(self, items: Sequence[_Item]) -> ServiceHandle:
        """Begin scoring, without waiting."""
        if self._model is None:
            raise RuntimeError(f"{self._name}: submit before load")
        handle: ServiceHandle = []
        chunk: list[_Item] = []
        chunk_tokens = 0
        for item in items:
            num_tokens = self._num_tokens(item)
            if chunk and chunk_tokens + num_tokens > self._forward_tokens:
                handle.append(self._send(self._model, chunk, chunk_tokens))
                chunk, chunk_tokens = [], 0
            chunk.append(item)
            chunk_tokens += num_tokens
        if chunk:
            handle.append(self._send(self._model, chunk, chunk_tokens))
        return handle

    def done(self, handle: ServiceHandle) -> bool:
        """Whether `collect` would not wait."""
        return all(request.future.done() for request in handle)

    def collect(self, handle: ServiceHandle, deadline_seconds: float) -> list[Outcome[_Value]]:
        """Outcomes of one `submit`, in order. What is not there `deadline_seconds` after this call is missing
        with cause "deadline" and is given up; what failed is missing with the failure."""
        wait_for_futures([request.future for request in handle], timeout=deadline_seconds)
        outcomes: list[Outcome[_Value]] = []
        for request in handle:
            if not request.future.done():
                ray.cancel(request.reference)  # items of it that still wait are never computed
                outcomes += [Outcome(None, "deadline")] * request.num_items
            elif error := request.future.exception():
                outcomes += [Outcome(None, _cause(error))] * request.num_items
            else:
                outcomes += request.future.result()
        self._end_retired()
        return outcomes

    def score(self, items: Sequence[_Item], deadline_seconds: float) -> list[Outcome[_Value]]:
        """Submit and collect."""
        return self.collect(self.submit(items), deadline_seconds)

    def shutdown(self) -> None:
        """End every actor; what is under way is lost."""
        for replica in self._replicas + self._retiring:
            ray.kill(replica.actor)
        self._replicas, self._retiring = [], []

    def _start(self) -> Any:
        environment = {"env_vars": _CPU_ENVIRONMENT} if self._runtime.device == "cpu" else {}
        remote = ray.remote(ScoringActor).options(
            num_cpus=self._pool.cpus,
            num_gpus=self._gpus,
            max_restarts=-1,  # a request names its model: a fresh process is as good as the old one
            max_task_retries=_TASK_RETRIES,
            max_concurrency=1000,  # calls that wait in the queue
            runtime_env=environment,
        )
        return remote.remote(self._build, self._num_tokens, _FORWARDS_PER_BATCH * self._forward_tokens)

    def _send(self, model: ModelVersion, items: list[_Item], num_tokens: int) -> _Request:
        with self._lock:
            replica = min(self._replicas, key=lambda replica: replica.tokens_in_flight)
            replica.tokens_in_flight += num_tokens
        reference = replica.actor.score.remote(uuid.uuid4().hex, model, items)
        future = reference.future()
        future.add_done_callback(functools.partial(self._landed, replica, num_tokens))
        return _Request(reference, future, len(items))

    def _landed(self, replica: _Replica, num_tokens: int, _: Future[Any]) -> None:
        with self._lock:
            replica.tokens_in_flight -= num_tokens

    def _end_retired(self) -> None:
        with self._lock:
            idle = [replica for replica in self._retiring if not replica.tokens_in_flight]
            self._retiring = [replica for replica in self._retiring if replica.tokens_in_flight]
        for replica in idle:
            ray.kill(replica.actor)

    def _wait(self, references: list[ray.ObjectRef], purpose: str) -> None:
        limit = self._runtime.start_timeout_seconds
        end = time.monotonic() + limit
        for index, reference in enumerate(references):
            try:
                ray.get(reference, timeout=max(0.0, end - time.monotonic()))
            except GetTimeoutError as error:
                raise TimeoutError(
                    f"{self._name}: waited {limit:.0f} s for replica {index + 1} of {len(references)} "
                    f"{purpose}; the cluster has {_free('GPU')} GPU and {_free('CPU')} CPU free"
                ) from error
            except RayTaskError as error:
                if isinstance(error.cause, UserError):  # in one line, as it was raised there
                    raise error.cause from None
                raise


def _free(resource: str) -> str:
    return f"{ray.available_resources().get(resource, 0):g}"


def _cause(error: BaseException) -> str:
    if isinstance(error, TaskCancelledError):
        return "deadline"
    if isinstance(error, RayTaskError):
        return describe_error(error.cause)
    return type(error).__name__  # of Ray: the actor died, its node was lost
