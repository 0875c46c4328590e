"""Rollout: one engine per actor, and the driver's pool of such actors.

The pool starts its actors once and keeps them: a stage gives them a model (`load`), training gives them new
weights (`update_weights`), and `stream` yields finished samples while others still decode. An actor that dies
is started anew with the pool's present weights, and the requests it had not answered are asked again; a
request has its own seed, so it gets the same sample.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

import pns.config as config
from pns.errors import UserError
from workers.rollout.engine import Engine, Request, Sample, Sampling

__all__ = ["Request", "RolloutActor", "RolloutPool", "Sample", "Sampling"]

MAX_RESTARTS = 3  # of one replica within one call of the pool
_CHUNK_SECONDS = 0.05  # an actor hands over what has finished in this time together
_T = TypeVar("_T")


@dataclass(frozen=True)
class Chunk:
    """Samples that finished together, `seconds` after the actor began with the call's requests."""

    samples: list[Sample]
    seconds: float


class RolloutActor:
    """An engine behind calls that an actor can take. Every call is idempotent."""

    def __init__(
        self, device: str, engine: config.RolloutEngine, tensor_parallel: int, trust_remote_code: bool
    ) -> None:
        self.engine: Engine
        if engine.engine is config.EngineKind.vllm:
            from workers.rollout.pool.engine_vllm import VllmEngine

            self.engine = VllmEngine(
                device,
                engine.max_batch,
                engine.memory_fraction,
                engine.kv_cache_gib,
                tensor_parallel,
                trust_remote_code,
            )
        else:
            from workers.rollout.pool.engine_transformers import TransformersEngine

            dtype = "float32" if device == "cpu" else "bfloat16"
            self.engine = TransformersEngine(device, dtype, engine.max_batch, trust_remote_code)

    def ready(self) -> bool:
        return True

    def load(self, model_path: str) -> None:
        self.engine.load(model_path)

    def update_weights(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        self.engine.update_weights(tensors, version)

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[Chunk]:
        begin = last = time.monotonic()
        finished: list[Sample] = []
        for sample in self.engine.generate(requests, sampling):
            finished.append(sample)
            now = time.monotonic()
            if now - last >= _CHUNK_SECONDS:
                yield Chunk(finished, now - begin)
                finished, last = [], now
        if finished:
            yield Chunk(finished, time.monotonic() - begin)

    def log_probs(
        self, prompt_ids: list[Sequence[int]], completion_ids: list[Sequence[int]]
    ) -> list[np.ndarray]:
        return self.engine.log_probs(prompt_ids, completion_ids)


class RolloutPool:
    """`pool.replicas` rollout actors on `device` ("cpu" or "cuda"). The constructor returns when all are up
    (they start in parallel).

    Every wait ends after `start_timeout_seconds` without progress, with a TimeoutError that names what was
    waited for.
    """

    def __init__(
        self,
        pool: config.Pool,
        device: str,
        engine: config.RolloutEngine,
        start_timeout_seconds: float,
        trust_remote_code: bool = False,
    ) -> None:
        if (
            device == "cuda"
            and pool.gpus > 1
            and (pool.gpus != int(pool.gpus) or engine.engine is not config.EngineKind.vllm)
        ):
            raise UserError(
                f"placement.rollout.gpus: {pool.gpus}; use at most 1, or a whole number with rollout.engine=vllm (tensor parallel)"
            )
        self._timeout = start_timeout_seconds
        self._start: Callable[[], Any] = lambda: _start_actor(pool, device, engine, trust_remote_code)
        self._model_path: str | None = None
        self._weights: tuple[Any, int] | None = (
            None  # object reference of the tensors, version; newer than the model's own
        )
        self._tokens, self._seconds = 0, 0.0
        self._actors = [self._start() for _ in range(pool.replicas)]
        self._wait([actor.ready.remote() for actor in self._actors], "to start")

    @property
    def tokens_per_second(self) -> float:
        """Of the last finished `stream`: new tokens of all replicas over the decoding time of the slowest. 0
        before the first."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def load(self, model_path: str) -> None:
        """Every replica takes the model; the weights version becomes 0. Raises UserError if it is not a
        usable checkpoint."""
        self._model_path, self._weights = model_path, None
        self._on_all(lambda actor, _: actor.load.remote(model_path), f"to load {model_path}")

    def update_weights(self, ref: list[Any], version: int) -> None:
        """Every replica takes the weights of `ref` = [object reference of dict name -> tensor]; returns when
        all have them."""
        self._weights = (ref[0], version)
        self._on_all(
            lambda actor, _: actor.update_weights.remote(ref[0], version),
            f"to take weights version {version}",
        )

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Sample]]:
        """Yield lists of finished samples of all replicas until every request has exactly one. Ids must
        differ. A stream left early is decoded to its end by the actors before they take the next call."""
        open_requests = {request.id: request for request in requests}
        if len(open_requests) != len(requests):
            raise ValueError("rollout requests: ids are not unique")
        parts = _split(
            requests,
            [len(request.prompt_ids) + sampling.max_new_tokens for request in requests],
            len(self._actors),
        )
        tokens, seconds, restarts = 0, 0.0, [0] * len(parts)
        running = {self._actors[i].generate.remote(part, sampling): i for i, part in enumerate(parts) if part}
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=self._timeout)
            if not ready:
                raise TimeoutError(
                    f"rollout: no completion from replicas {sorted(running.values())} for {self._timeout:.0f} s "
                    f"({len(open_requests)} of {len(requests)} requests open; placement.start_timeout_seconds)"
                )
            replica = running[ready[0]]
            try:
                chunk = cast(Chunk, _get(next(ready[0]), self._timeout))
            except StopIteration:
                del running[ready[0]]
                continue
            except RayActorError as error:
                del running[ready[0]]
                restarts[replica] += 1
                self._restart(replica, restarts[replica], error)
                rest = [request for request in parts[replica] if request.id in open_requests]
                if rest:
                    running[self._actors[replica].generate.remote(rest, sampling)] = replica
                continue
            for sample in chunk.samples:
                del open_requests[sample.id]
                tokens += len(sample.token_ids)
            seconds = max(seconds, chunk.seconds)
            yield chunk.samples
        if open_requests:
            raise RuntimeError(
                f"rollout: {len(open_requests)} requests were not answered, among them {next(iter(open_requests))!r}"
            )
        self._tokens, self._seconds = tokens, seconds

    def log_probs(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Natural-log probabilities (T,) float32 at temperature 1 of each completion after its prompt, in the
        order given."""
        pairs = list(zip(prompt_ids, completion_ids, strict=True))
        parts = _split(
            pairs, [len(prompt) + len(completion) for prompt, completion in pairs], len(self._actors)
        )
        results = self._on_all(
            lambda actor, i: actor.log_probs.remote(
                [prompt for prompt, _ in parts[i]], [completion for _, completion in parts[i]]
            ),
            "to compute log-probabilities",
        )
        return [log_probs for part in results for log_probs in part]

    def shutdown(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _on_all(self, call: Callable[[Any, int], Any], what: str) -> list[Any]:
        """`call(actor, replica)` on every replica in parallel, asked again of those that die; the results by
        replica."""
        refs = {i: call(actor, i) for i, actor in enumerate(self._actors)}
        results: dict[int, Any] = {}
        restarts = [0] * len(self._actors)
        while refs:
            i, ref = next(iter(refs.items()))
            try:
                results[i] = self._wait([ref], what)[0]
                del refs[i]
            except RayActorError as error:
                restarts[i] += 1
                self._restart(i, restarts[i], error)
                refs[i] = call(self._actors[i], i)
        return [results[i] for i in range(len(self._actors))]

    def _restart(self, replica: int, times: int, error: RayActorError) -> None:
        if times > MAX_RESTARTS:
            raise RuntimeError(
                f"rollout replica {replica} died {times} times in one call; the last time: {error}"
            ) from error
        ray.kill(self._actors[replica])
        actor = self._actors[replica] = self._start()
        self._wait([actor.ready.remote()], f"to start again (replica {replica})")
        if self._model_path is not None:
            self._wait(
                [actor.load.remote(self._model_path)], f"to load {self._model_path} (replica {replica})"
            )
        if self._weights is not None:
            self._wait(
                [actor.update_weights.remote(*self._weights)],
                f"to take weights version {self._weights[1]} (replica {replica})",
            )

    def _wait(self, refs: list[Any], what: str) -> list[Any]:
        _, waiting = ray.wait(refs, num_returns=len(refs), timeout=self._timeout)
        if waiting:
            raise TimeoutError(
                f"rollout: {len(waiting)} of {len(refs)} replicas took longer than {self._timeout:.0f} s {what}: see the actors' logs, "
                "check that the cluster has room for placement.rollout, or raise placement.start_timeout_seconds"
            )
        return [_get(ref, self._timeout) for ref in refs]


def _start_actor(
    pool: config.Pool, device: str, engine: config.RolloutEngine, trust_remote_code: bool
) -> Any:
    """A rollout actor. Ray must not restart or repeat anything by itself: a fresh process has no weights
    until the pool gives it some."""
    threads = str(max(1, int(pool.cpus)) if device == "cpu" else 1)
    environment = {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": str(
            2**30
        ),  # freed memory stays in the process: no page faults at every step
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    if engine.engine is config.EngineKind.vllm:
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in the actor
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one calls logits processors in another way
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # weight updates are functions sent to the actor's own workers
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if device == "cpu":
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    actor = ray.remote(RolloutActor).options(
        num_cpus=pool.cpus,
        num_gpus=pool.gpus if device == "cuda" else 0,
        max_restarts=0,
        max_task_retries=0,
        runtime_env={"env_vars": environment},
    )
    return actor.remote(device, engine, max(1, int(pool.gpus)), trust_remote_code)


def _get(ref: Any, timeout: float) -> Any:
    """The value of a finished call; a UserError of the actor arrives as it was raised there, in one line."""
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _split(items: Sequence[_T], weights: Sequence[int], parts: int) -> list[list[_T]]:
    """Consecutive parts of about equal weight (tokens): completions of one problem stay together and share
    their prompt's cache."""
    total = max(1, sum(weights))
    ends = list(itertools.accumulate(weights))
    result: list[list[_T]] = [[] for _ in range(parts)]
    for item, weight, end in zip(items, weights, ends, strict=True):
        result[min(parts - 1, (2 * end - weight) * parts // (2 * total))].append(item)
    return result
