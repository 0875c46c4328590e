"""Rollout: one engine per actor, and the driver's pool of such actors.

The pool starts its actors once and keeps them: a stage gives them a model (`load`), training gives them new
weights (`update_weights`), and `stream` yields finished samples while others still decode. An actor that dies
is started anew with the pool's present weights, and the requests it had not answered are asked again; a
request has its own seed, so it gets the same sample.

New weights come through Ray's object store (`workers.weights`), which holds them until the next ones, or from
process to process (`workers.broadcast`); then the policy alone has them, and a new actor gets them from it.
"""

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from pns.config import EngineKind, Pool, RolloutEngine
from pns.errors import UserError
from workers.actor_logs import actor_log, print_to
from workers.broadcast import Meeting, Seat
from workers.placement import broadcasts_weights
from workers.reservation import Slot
from workers.rollout.engine import Engine, Request, Sample, Sampling
from workers.runtime import Limit, Runtime, process_environment
from workers.weights import StoredWeights, rollout_dtype

__all__ = ["Request", "RolloutActor", "RolloutPool", "Sample", "Sampling"]

MAX_RESTARTS = 3  # of one replica within one call of the pool
_CHUNK_SECONDS = 0.05  # what finishes within it is handed over together: a hand-over costs milliseconds
_T = TypeVar("_T")


class RolloutActor:
    """An engine behind calls that an actor can take. Every call is idempotent. `sleeps`: `sleep` will be
    called."""

    def __init__(
        self,
        engine: RolloutEngine,
        tensor_parallel: int,
        runtime: Runtime,
        sleeps: bool = False,
        replica: int = 0,
    ) -> None:
        print_to(actor_log(runtime.logs, "rollout", replica))
        self.engine: Engine
        self.has_weights = False
        if engine.engine is EngineKind.vllm:
            from workers.rollout.engine_vllm import VllmEngine

            self.engine = VllmEngine(
                runtime,
                engine.max_batch,
                engine.memory_fraction,
                engine.kv_cache_gib,
                tensor_parallel,
                sleeps,
            )
        else:
            from workers.rollout.engine_transformers import TransformersEngine

            self.engine = TransformersEngine(runtime, rollout_dtype(runtime), engine.max_batch)

    def ready(self) -> None:
        """Return once the process is up."""

    def load(self, model_path: str) -> None:
        self.engine.load(model_path)
        self.has_weights = True

    def update_weights(self, weights: StoredWeights | Seat, version: int) -> None:
        self.has_weights = False
        self.engine.update_weights(weights if isinstance(weights, Seat) else weights.tensors(), version)
        self.has_weights = True

    def sleep(self) -> None:
        self.has_weights = False
        self.engine.sleep()

    def wake_up(self) -> None:
        self.engine.wake_up()

    def _check_weights(self) -> None:
        if not self.has_weights:
            raise RuntimeError("rollout: the engine has slept or just begun, and has been given no weights")

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        self._check_weights()
        # The engine runs in a thread, so that what has finished is handed over in time, and not when the next
        # completion finishes.
        arrived: queue.SimpleQueue[Sample | Exception | None] = queue.SimpleQueue()
        engine = threading.Thread(target=self._decode, args=(requests, sampling, arrived))
        engine.start()
        try:
            while (sample := arrived.get()) is not None:
                finished, until = [], time.monotonic() + _CHUNK_SECONDS
                while sample is not None:
                    if isinstance(sample, Exception):
                        raise sample
                    finished.append(sample)
                    try:
                        sample = arrived.get(timeout=max(0.0, until - time.monotonic()))
                    except queue.Empty:
                        break
                yield finished
                if sample is None:
                    return
        finally:
            engine.join()  # the next call finds the engine free, also where this one was left early

    def _decode(self, requests: list[Request], sampling: Sampling, arrived: queue.SimpleQueue) -> None:
        try:
            for sample in self.engine.generate(requests, sampling):
                arrived.put(sample)
            arrived.put(None)
        except Exception as error:  # raised where the samples are waited for
            arrived.put(error)

    def log_probs(
        self, prompt_ids: list[Sequence[int]], completion_ids: list[Sequence[int]]
    ) -> list[np.ndarray]:
        self._check_weights()
        return self.engine.log_probs(prompt_ids, completion_ids)


class WeightsSource(Protocol):
    """Who has new weights: `workers.training.policy.Policy`, whose methods these are."""

    num_updates: int

    def weights(self) -> StoredWeights: ...

    def send_weights(self, seat: Seat) -> list[Any]: ...


@dataclass(frozen=True)
class _Present:
    """What to give to a replica that has no weights."""

    weights: Callable[[], StoredWeights]
    version: int


class RolloutPool:
    """`pool.replicas` rollout actors. The constructor returns when all are up (they start in parallel).

    A wait longer than the runtime's limit for it (of starting, loading, taking weights, or a completion) ends
    with a TimeoutError that says for what, with the limit's key.
    Actors in `slots`, one each, have the GPUs of policy ranks: every call that uses them begins with `turn`,
    and between turns the pool sleeps.
    """

    def __init__(
        self,
        pool: Pool,
        engine: RolloutEngine,
        runtime: Runtime,
        slots: Sequence[Slot] = (),
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        tensor_parallel = pool.gpus == int(pool.gpus) and engine.engine is EngineKind.vllm
        if runtime.device == "cuda" and pool.gpus > 1 and not tensor_parallel:
            raise UserError(
                f"placement.rollout.gpus: {pool.gpus}; use at most 1, or a whole number with "
                "rollout.engine=vllm (tensor parallel)"
            )
        self._runtime = runtime
        self._turn = turn
        self._start: Callable[[int], Any] = lambda replica: _start_actor(
            pool, engine, runtime, replica, slots[replica] if slots else None
        )
        self._model_path: str | None = None
        self._present: _Present | None = None  # None while the model's own weights are in use
        self._weights_gone = False  # by a sleep
        self._workers = int(pool.gpus) if tensor_parallel and pool.gpus > 1 else 1  # of a replica
        self._meeting: Meeting | None = None
        if broadcasts_weights(pool, engine, runtime.device, bool(slots)):
            self._meeting = Meeting(pool.replicas * self._workers, runtime)
        self._actors = [self._start(replica) for replica in range(pool.replicas)]
        with ExitStack() as stack:
            stack.callback(self.shutdown)  # where one does not come up
            starting = [actor.ready.remote() for actor in self._actors]
            self._wait(starting, "to start", runtime.start_limit)
            stack.pop_all()

    def load(self, model_path: str) -> None:
        """Every replica takes the model, as version 0. Raises UserError if it is no usable checkpoint."""
        with self._turn():
            self._model_path, self._present = model_path, None
            self._give_weights()

    def update_weights(self, source: WeightsSource, version: int) -> int:
        """Every replica takes the weights that the source has now; their bytes. The version before is let go
        first, so that the object store never holds two."""
        self._present = None
        if self._meeting is not None:
            num_bytes = self._receive_weights(self._meeting, source, version)
            self._present = _Present(_gathered_again(source), version)
            return num_bytes
        weights = source.weights()
        with self._turn():
            self._present = _Present(lambda: weights, version)
            self._give_weights()
        return weights.num_bytes

    def _give_weights(self) -> None:
        """The present ones, to every replica."""
        path, present = self._model_path, self._present
        if present is None:
            limit, purpose = self._runtime.load_limit, f"to load {path}"
            self._on_all(lambda actor, _: actor.load.remote(path), purpose, limit)
        else:
            limit, purpose = self._runtime.sync_limit, f"to take weights version {present.version}"
            weights = present.weights()
            self._on_all(
                lambda actor, _: actor.update_weights.remote(weights, present.version), purpose, limit
            )
        self._weights_gone = False

    def _receive_weights(self, meeting: Meeting, source: WeightsSource, version: int) -> int:
        """From process to process; anew to all of them, where a replica dies of it."""
        restarts = Counter[int]()
        while True:
            taking = {}  # an actor's call -> replica
            for replica, actor in enumerate(self._actors):
                seat = meeting.seat(1 + replica * self._workers)
                taking[actor.update_weights.remote(seat, version)] = replica
            sending = source.send_weights(meeting.seat(0))
            died = self._until_sent(meeting, taking, sending, version)
            if not died:
                return ray.get(sending[0])
            restarts.update(died.keys())
            for replica, error in died.items():
                self._restart(replica, restarts[replica], error)

    def _until_sent(
        self, meeting: Meeting, taking: dict[Any, int], sending: list[Any], version: int
    ) -> dict[int, RayActorError]:
        """Wait for all of them; the replicas that died. Raises what went wrong else."""
        limit = self._runtime.sync_limit
        ends = time.monotonic() + limit.seconds
        pending = [*taking, *sending]
        died: dict[int, RayActorError] = {}
        failures: list[Exception] = []
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, ends - time.monotonic()))
            if not ready:
                meeting.give_up()
                raise TimeoutError(
                    f"rollout: weights version {version} were not with all {len(self._actors)} replicas "
                    f"within {limit.seconds:g} s: raise {limit.key}, or set rollout.weight_transport=store"
                )
            try:
                _get(ready[0], limit.seconds)
            except RayActorError as error:
                if ready[0] not in taking:
                    failures.insert(0, error)  # the policy's: there is nobody to send
                else:
                    died[taking[ready[0]]] = error
            except Exception as error:
                failures.append(error)
            else:
                continue
            if len(died) + len(failures) == 1:
                meeting.give_up()  # the others wait for this one; what they end with is of no interest
        if failures and not died:
            raise failures[0]
        return died

    def sleep(self) -> None:
        """Every replica leaves its GPUs to others; its weights are dropped."""
        self._weights_gone = self._model_path is not None
        self._on_all(lambda actor, _: actor.sleep.remote(), "to fall asleep", self._runtime.sync_limit)

    def wake_up(self) -> None:
        """Every replica takes its GPUs again. The pool's present weights come back with the first call that
        needs them; other ones may come before."""
        self._on_all(lambda actor, _: actor.wake_up.remote(), "to wake up", self._runtime.sync_limit)

    @contextmanager
    def _turn_with_weights(self) -> Iterator[None]:
        with self._turn():
            if self._weights_gone:
                self._give_weights()
            yield

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Yield lists of finished samples of all replicas until every request has exactly one. Ids must
        differ. A stream left early is decoded to its end by the actors before they take the next call."""
        with self._turn_with_weights():
            yield from self._stream(requests, sampling)

    def _stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        open_requests = {request.id: request for request in requests}
        if len(open_requests) != len(requests):
            raise ValueError("rollout requests: ids are not unique")
        longest = [len(request.prompt_ids) + sampling.max_new_tokens for request in requests]
        shares = _split(requests, longest, len(self._actors))
        restarts = [0] * len(shares)
        limit = self._runtime.step_limit
        running = {}  # an actor's stream of samples -> replica
        for replica, share in enumerate(shares):
            if share:
                running[self._actors[replica].generate.remote(share, sampling)] = replica
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=limit.seconds)
            if not ready:
                raise TimeoutError(
                    f"rollout: no completion from replicas {sorted(running.values())} for "
                    f"{limit.seconds:g} s ({len(open_requests)} of {len(requests)} requests open): if they "
                    f"only need longer, raise {limit.key}"
                )
            replica = running[ready[0]]
            try:
                samples = cast(list[Sample], _get(next(ready[0]), limit.seconds))
            except StopIteration:
                del running[ready[0]]
                continue
            except RayActorError as error:
                del running[ready[0]]
                restarts[replica] += 1
                self._restart(replica, restarts[replica], error)
                rest = [request for request in shares[replica] if request.id in open_requests]
                if rest:
                    running[self._actors[replica].generate.remote(rest, sampling)] = replica
                continue
            for sample in samples:
                del open_requests[sample.id]
            yield samples
        if open_requests:
            first = next(iter(open_requests))
            raise RuntimeError(
                f"rollout: {len(open_requests)} requests were not answered, among them {first!r}"
            )

    def log_probs(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """`Engine.log_probs`, by all replicas together."""
        pairs = list(zip(prompt_ids, completion_ids, strict=True))
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        shares = _split(pairs, lengths, len(self._actors))

        def ask(actor: Any, replica: int) -> Any:
            prompts = [prompt for prompt, _ in shares[replica]]
            completions = [completion for _, completion in shares[replica]]
            return actor.log_probs.remote(prompts, completions)

        with self._turn_with_weights():
            answers = self._on_all(ask, "to compute log-probabilities", self._runtime.step_limit)
            return list(itertools.chain.from_iterable(answers))

    def shutdown(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _on_all(self, call: Callable[[Any, int], Any], purpose: str, limit: Limit) -> list[Any]:
        """The results of `call(actor, replica)` on every replica at once, asked again of those that die."""
        refs = [call(actor, replica) for replica, actor in enumerate(self._actors)]
        results: list[Any] = []
        restarts = 0  # of the replica that is waited for
        while len(results) < len(refs):
            replica = len(results)
            try:
                results += self._wait([refs[replica]], purpose, limit)
                restarts = 0
            except RayActorError as error:
                restarts += 1
                self._restart(replica, restarts, error)
                refs[replica] = call(self._actors[replica], replica)
        return results

    def _restart(self, replica: int, times: int, error: RayActorError) -> None:
        if times > MAX_RESTARTS:
            file = actor_log(self._runtime.logs, "rollout", replica)
            printed = f" (what it printed: {file})" if file else ""
            fault = f"rollout replica {replica} died {times} times in one call{printed}"
            raise RuntimeError(f"{fault}; the last time: {error}") from error
        ray.kill(self._actors[replica])  # it may only be out of reach
        actor = self._actors[replica] = self._start(replica)
        purpose = f"to start again (replica {replica})"
        self._wait([actor.ready.remote()], purpose, self._runtime.start_limit)
        if self._model_path is not None:
            purpose = f"to load {self._model_path} (replica {replica})"
            self._wait([actor.load.remote(self._model_path)], purpose, self._runtime.load_limit)
        if self._present is not None:
            version = self._present.version
            purpose = f"to take weights version {version} (replica {replica})"
            taking = actor.update_weights.remote(self._present.weights(), version)
            self._wait([taking], purpose, self._runtime.sync_limit)
        if self._meeting is not None:
            self._meeting.give_up()  # the process that died had a seat in the group

    def _wait(self, refs: list[Any], purpose: str, limit: Limit) -> list[Any]:
        _, waiting = ray.wait(refs, num_returns=len(refs), timeout=limit.seconds)
        if waiting:
            logs = self._runtime.logs or "the actors' logs"
            raise TimeoutError(
                f"rollout: {len(waiting)} of {len(refs)} replicas took longer than {limit.seconds:g} s "
                f"{purpose}: see {logs}, check that the cluster has room for placement.rollout, or raise "
                f"{limit.key}"
            )
        return [_get(ref, limit.seconds) for ref in refs]


def _gathered_again(source: WeightsSource) -> Callable[[], StoredWeights]:
    """The weights that the source has now, when they are asked for; RuntimeError where it has trained on."""
    num_updates = source.num_updates

    def gather() -> StoredWeights:
        weights = source.weights()
        if source.num_updates != num_updates:
            raise RuntimeError(
                "rollout: a replica died while the policy trained, and nobody has the weights that it "
                "sampled with: run the same command again, which goes on from the last checkpoint; "
                "rollout.weight_transport=store keeps a copy"
            )
        return weights

    return gather


def _start_actor(pool: Pool, engine: RolloutEngine, runtime: Runtime, replica: int, slot: Slot | None) -> Any:
    """A rollout actor. Ray must not restart or repeat anything by itself: a fresh process has no weights
    until the pool gives it some. In a slot it takes nothing that Ray counts but CPUs; its GPUs it is told."""
    vllm = engine.engine is EngineKind.vllm
    environment = process_environment("rollout", runtime.device, pool.cpus, vllm)
    tensor_parallel = max(1, int(pool.gpus))
    if slot is None:
        place: dict[str, Any] = {
            "num_cpus": pool.cpus,
            "num_gpus": pool.gpus if runtime.device == "cuda" else 0,
            "resources": pool.resources,
            "label_selector": pool.labels,
        }
    else:
        place = {"num_cpus": pool.cpus / tensor_parallel, "scheduling_strategy": slot.strategy}
        if slot.gpu_ids:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpu_ids)
    actor = ray.remote(RolloutActor).options(
        **place, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment}
    )
    return actor.remote(engine, tensor_parallel, runtime, slot is not None, replica)


def _get(ref: Any, timeout: float) -> Any:
    """The value of a finished call; a UserError of the actor arrives as it was raised there."""
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _split(requests: Sequence[_T], weights: Sequence[int], replicas: int) -> list[list[_T]]:
    """Consecutive shares of about equal weight (tokens): completions of one problem stay together and share
    their prompt's cache. A request goes where its middle lies."""
    total = max(1, sum(weights))
    ends = itertools.accumulate(weights)
    shares: list[list[_T]] = [[] for _ in range(replicas)]
    for request, weight, end in zip(requests, weights, ends, strict=True):
        replica = (2 * end - weight) * replicas // (2 * total)
        shares[min(replicas - 1, replica)].append(request)
    return shares
