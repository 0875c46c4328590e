"""Weights from a sender to replicas: by flat buckets in Ray's object store, by broadcast, as a pickled dictionary.

    python tests/bench/weight_sync.py

Tensors of the shapes of Qwen2.5-0.5B (494 million, tied), float32 at the sender, through real Ray actors.
`dictionary`: a copy of every tensor in float32, put into the store as a dictionary, while the version before
is still held; every replica reads it and copies it into its own weights. `buckets`: `workers.weights`, in the
dtype that rollout computes in, the version before let go first. `broadcast`: `workers.broadcast`, the same
from process to process over this machine's loopback by gloo; its group is made in the round that is not
counted (between GPUs it is NCCL's, which this does not measure). Of two kinds of replicas, with weights in
bfloat16 (as on GPUs) and in float32 (as on CPUs), and of one and four of them (with four, tensors of half the
model: the dictionaries of the whole do not fit 24 GiB): the sides take turns, and a figure is the median over
`--rounds`.

`seconds`: from the call until every replica has them (`send`: until they are in the store). Beside the weights
that are held anyway, at most and over the bytes of the weights in the replicas' dtype: `sender_copies` of the
sender's own memory and the object store together, `replica_copies` of a replica's own memory. Prints one JSON
line.
"""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from workers.broadcast import Meeting, Seat, member
from workers.runtime import Runtime
from workers.weights import StoredWeights, store

LAYERS, HIDDEN, KEY_VALUE, INNER, VOCABULARY = 24, 896, 128, 4864, 151936


def shapes(parts: int) -> dict[str, tuple[int, ...]]:
    """Of one of `parts` equal parts of the model."""
    named: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY // parts, HIDDEN), "norm": (HIDDEN,)}
    of_layer: dict[str, tuple[int, ...]] = {
        "query": (HIDDEN, HIDDEN),
        "query.bias": (HIDDEN,),
        "key": (KEY_VALUE, HIDDEN),
        "key.bias": (KEY_VALUE,),
        "value": (KEY_VALUE, HIDDEN),
        "value.bias": (KEY_VALUE,),
        "output": (HIDDEN, HIDDEN),
        "gate": (INNER, HIDDEN),
        "up": (INNER, HIDDEN),
        "down": (HIDDEN, INNER),
        "input.norm": (HIDDEN,),
        "attention.norm": (HIDDEN,),
    }
    for layer in range(LAYERS // parts):
        named |= {f"{layer}.{name}": shape for name, shape in of_layer.items()}
    return named


def own_memory() -> int:
    """Bytes of this process that it shares with none: the object store's pages are shared ones."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


class Peak:
    """Of `own_memory` beyond what it was before, while a call runs."""

    bytes = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        before, done = own_memory(), threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                self.bytes = max(self.bytes, own_memory() - before)

        self.bytes = 0
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class Sender:
    def __init__(self, parts: int) -> None:
        torch.set_num_threads(1)
        self.weights = {name: torch.rand(shape) for name, shape in shapes(parts).items()}
        self.peak = Peak()

    def dictionary(self) -> list[ray.ObjectRef]:
        with self.peak.watched():
            return [ray.put({name: weight.to("cpu", copy=True) for name, weight in self.weights.items()})]

    def buckets(self, dtype: torch.dtype) -> StoredWeights:
        with self.peak.watched():
            return store((name, weight.to(dtype)) for name, weight in self.weights.items())

    def broadcast(self, dtype: torch.dtype, seat: Seat) -> int:
        with self.peak.watched():
            return member(seat).send((name, weight.to(dtype)) for name, weight in self.weights.items())

    def peak_bytes(self) -> int:
        return self.peak.bytes


class Replica:
    def __init__(self, parts: int, dtype: torch.dtype) -> None:
        torch.set_num_threads(1)
        self.weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes(parts).items()}
        self.peak = Peak()

    def take(self, weights: Any) -> float:
        with self.peak.watched():
            read = weights.tensors() if isinstance(weights, StoredWeights) else ray.get(weights[0])
            for name, weight in self.weights.items():
                weight.copy_(read[name])
        return float(self.weights["norm"][0])

    def receive(self, seat: Seat) -> float:
        with self.peak.watched():
            for name, tensor in member(seat).receive():
                self.weights[name].copy_(tensor)
        return float(self.weights["norm"][0])

    def peak_bytes(self) -> int:
        return self.peak.bytes


def measured(
    sender: Any, replicas: list[Any], side: str, parts: int, dtype: torch.dtype, meeting: Meeting
) -> dict[str, float]:
    """Of one sync after another of the same side, as in training."""
    held = ray.get(sender.dictionary.remote()) if side == "dictionary" else []
    began = time.monotonic()
    versions = 1 + len(held)
    if side == "broadcast":
        versions = 0  # that the store holds
        taking = [replica.receive.remote(meeting.seat(1 + i)) for i, replica in enumerate(replicas)]
        ray.get(sender.broadcast.remote(dtype, meeting.seat(0)))
        sent = time.monotonic()
    else:
        making = sender.buckets.remote(dtype) if side == "buckets" else sender.dictionary.remote()
        held = weights = ray.get(making)
        sent = time.monotonic()
        taking = [replica.take.remote(weights) for replica in replicas]
    values = ray.get(taking)
    seconds = time.monotonic() - began
    assert len(set(values)) == 1
    assert values[0] != 0
    num = sum(torch.Size(shape).numel() for shape in shapes(parts).values())
    num_bytes, stored = num * dtype.itemsize, num * (4 if side == "dictionary" else dtype.itemsize)
    peaks = ray.get([actor.peak_bytes.remote() for actor in (sender, *replicas)])
    return {
        "seconds": seconds,
        "send": sent - began,
        "sender_copies": (peaks[0] + versions * stored) / num_bytes,
        "replica_copies": max(peaks[1:]) / num_bytes,
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(own[name] for own in rounds), 2) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    num_rounds = parser.parse_args().rounds
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=6 * 2**30,
        include_dashboard=False,
        log_to_driver=False,
    )
    results: dict[str, Any] = {}
    for num_replicas, parts in ((1, 1), (4, 2)):
        sender = ray.remote(Sender).remote(parts)
        for dtype in (torch.bfloat16, torch.float32):
            replicas = [ray.remote(Replica).remote(parts, dtype) for _ in range(num_replicas)]
            rounds: dict[str, list[dict[str, float]]] = {"dictionary": [], "buckets": [], "broadcast": []}
            meeting = Meeting(num_replicas, Runtime())
            for _ in range(1 + num_rounds):
                for side, of_side in rounds.items():
                    of_side.append(measured(sender, replicas, side, parts, dtype, meeting))
            for replica in replicas:
                ray.kill(replica)
            row: dict[str, Any] = {side: medians(of_side[1:]) for side, of_side in rounds.items()}
            for side in ("buckets", "broadcast"):
                row[side]["speedup"] = round(row["dictionary"]["seconds"] / row[side]["seconds"], 2)
            results[f"{str(dtype).removeprefix('torch.')}, {num_replicas} replicas"] = row
        ray.kill(sender)
    ray.shutdown()
    versions = {"ray": ray.__version__, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"model": "0.5b", **results, "versions": versions}))


if __name__ == "__main__":
    main()
