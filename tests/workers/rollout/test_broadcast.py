"""New weights from process to process: rollout has them, whoever dies of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from pns import config
from tests.workers.rollout.given import Given, Sender
from tests.workers.rollout.test_rollout import assert_agrees, build_model, collect, make_requests
from workers.rollout.pool import RolloutPool, Sampling
from workers.runtime import Runtime

Processes = Callable[..., set[psutil.Process]]


@pytest.fixture(scope="module")
def started(ray_session: None) -> Iterator[RolloutPool]:
    pool = make_pool()
    yield pool
    pool.shutdown()


@pytest.fixture
def pool(started: RolloutPool, tmp_path: Path) -> RolloutPool:
    build_model("qwen2", False, 0).save_pretrained(tmp_path / "model")
    started.load(str(tmp_path / "model"))
    return started


def make_pool(sync_seconds: float = 600.0) -> RolloutPool:
    engine = config.RolloutEngine(
        engine=config.EngineKind.transformers, max_batch=32, weight_transport=config.WeightTransport.broadcast
    )
    runtime = Runtime(start_timeout_seconds=1800, sync_timeout_seconds=sync_seconds)
    return RolloutPool(config.Pool(replicas=2, gpus=0, cpus=1), engine, runtime)


@pytest.fixture(scope="module")
def sender(ray_session: None) -> Iterator[Any]:
    actor = ray.remote(Sender).remote()
    yield actor
    ray.kill(actor)


def state(seed: int) -> dict[str, torch.Tensor]:
    return build_model("qwen2", False, seed).state_dict()


def test_every_replica_has_the_last_weights(pool: RolloutPool, sender: Any) -> None:
    for version, seed in ((1, 1), (2, 2)):
        tensors = state(seed)
        num_bytes = pool.update_weights(Given(tensors, sender), version)
        assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert_agrees(pool, build_model("qwen2", False, seed), version)


def test_a_replica_that_dies_afterwards_gets_the_weights_from_who_has_them(
    pool: RolloutPool, sender: Any, actor_processes: Processes
) -> None:
    pool.update_weights(Given(state(1), sender), 1)
    requests, sampling = make_requests(40), Sampling(1.0, max_new_tokens=60)
    expected = collect(pool, requests, sampling)
    kill_one(actor_processes)
    assert collect(pool, requests, sampling) == expected
    # And has a seat in the next transfer.
    pool.update_weights(Given(state(2), sender), 2)
    assert_agrees(pool, build_model("qwen2", False, 2), 2)


def test_weights_of_a_model_that_was_trained_since_are_gone(
    pool: RolloutPool, sender: Any, actor_processes: Processes
) -> None:
    source = Given(state(1), sender)
    pool.update_weights(source, 1)
    source.num_updates += 1
    kill_one(actor_processes)
    with pytest.raises(RuntimeError, match=r"run the same command again.*weight_transport=store"):
        collect(pool, make_requests(40), Sampling(1.0, max_new_tokens=60))


def test_a_replica_dies_of_the_transfer(
    pool: RolloutPool, sender: Any, actor_processes: Processes, tmp_path: Path
) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    with ThreadPoolExecutor() as threads:
        updating = threads.submit(pool.update_weights, Given(state(1), sender, (begun, go_on)), 1)
        while not begun.exists():
            assert not updating.done()
            time.sleep(0.01)
        kill_one(actor_processes)
        go_on.touch()
        updating.result(timeout=600)
    assert_agrees(pool, build_model("qwen2", False, 1), 1)
    pool.update_weights(Given(state(2), sender), 2)
    assert_agrees(pool, build_model("qwen2", False, 2), 2)


def test_a_sender_that_fails(pool: RolloutPool, sender: Any) -> None:
    incomplete = state(1)
    del incomplete["lm_head.weight"]
    with pytest.raises(ValueError, match=r"1 names missing .*lm_head\.weight"):
        pool.update_weights(Given(incomplete, sender), 1)
    with pytest.raises(RuntimeError, match="no weights"):
        pool.log_probs([[2]], [[3]])
    broken: Any = {**state(1), "lm_head.weight": None}
    with pytest.raises(AttributeError, match="NoneType"):
        pool.update_weights(Given(broken, sender), 1)
    pool.update_weights(Given(state(2), sender), 2)
    assert_agrees(pool, build_model("qwen2", False, 2), 2)


def test_a_transfer_that_takes_too_long(sender: Any, tmp_path: Path) -> None:
    pool = make_pool(sync_seconds=2.0)
    try:
        build_model("qwen2", False, 0).save_pretrained(tmp_path / "model")
        pool.load(str(tmp_path / "model"))
        stuck = Given(state(1), sender, (tmp_path / "begun", tmp_path / "never"))
        with pytest.raises(TimeoutError, match=r"version 1 .*weight_transport=store"):
            pool.update_weights(stuck, 1)
    finally:
        pool.shutdown()


def kill_one(actor_processes: Processes) -> None:
    victim = min(actor_processes("RolloutActor"), key=lambda process: process.create_time())
    victim.kill()
    victim.wait(60)
