"""Replicas of a scoring pool are killed at random while they score: nothing is lost, nothing is scored twice.

    python tests/bench/chaos.py

One step of scoring by two replicas of a small reward model (random weights, the real pool, real actors), which
takes 10 ms more for a row, as one on a GPU would leave the CPU alone. Fifty times SIGKILL hits a replica at
random while items are scored, each time after the pool has as many ready replicas as before; the step goes on
until the last kill has been recovered from. Every item gets one outcome, with the value that the model gives it
alone, to the bit. `recovery_seconds` is from a kill to as many ready replicas, target 10; `notice_seconds` the
part until the pool knows; the rest is a process that imports torch and transformers and loads the model. Prints,
last, one JSON line.
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence

import psutil
import ray
import torch
from transformers import AutoModelForSequenceClassification, Qwen2Config

from pns.config import ServicePool
from workers.rewards.reward_model import RewardModel
from workers.rewards.service import Outcome, ScoringPool, ServiceHandle
from workers.runtime import Runtime

REPLICAS, IN_FLIGHT = 2, 400  # items that are always on their way, until all kills are done
ROW_SECONDS = 0.01
VOCABULARY, LONGEST = 200, 200


def save_model(directory: str) -> None:
    """A classifier of 0.2 M parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=LONGEST,
        num_labels=1,
        pad_token_id=0,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)


class Paced:
    """A reward model that takes 10 ms more for a row."""

    def __init__(self, path: str) -> None:
        self._model = RewardModel(path, Runtime())

    def score(self, rows: Sequence[Sequence[int]]) -> list[Outcome[float]]:
        time.sleep(ROW_SECONDS * len(rows))
        return self._model.score(rows)


class Step:
    """Random rows, of which so many are on their way that every replica has work."""

    def __init__(self, pool: ScoringPool[Sequence[int], float]) -> None:
        self.pool = pool
        self.rows: list[tuple[int, ...]] = []
        self.handle: ServiceHandle = []
        self._generator = random.Random(1)

    def keep_busy(self) -> None:
        for _ in range(IN_FLIGHT - (len(self.rows) - self.pool.stats().scored)):
            length = self._generator.randint(1, LONGEST)
            self.rows.append(tuple(self._generator.randrange(VOCABULARY) for _ in range(length)))
            self.handle += self.pool.submit([self.rows[-1]])


def replica_processes() -> list[psutil.Process]:
    running = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()[:1]).startswith("ray::ScoringActor"):
                running.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it ended meanwhile
            continue
    return sorted(running, key=lambda process: process.pid)


def kill_one(step: Step, victims: random.Random) -> tuple[float, float]:
    """Kill a replica at work; seconds until the pool notices, and until it has as many ready ones again."""
    pool, before = step.pool, step.pool.stats()
    while pool.stats().scored == before.scored:  # it is at work
        step.keep_busy()
        time.sleep(0.01)
    victim = victims.choice(replica_processes())
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    noticed = 0.0
    while not noticed or pool.stats().replicas < REPLICAS:
        step.keep_busy()
        time.sleep(0.01)
        if not noticed and pool.stats().restarts > before.restarts:
            noticed = time.monotonic() - began
    return noticed, time.monotonic() - began


def median_and_max(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    num_kills = parser.parse_args().kills
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory)
        pool = ScoringPool[Sequence[int], float]("chaos", ServicePool(REPLICAS), Runtime(), Paced, len)
        pool.load(directory)
        step, victims = Step(pool), random.Random(0)
        began = time.monotonic()
        noticed, recovered = zip(*(kill_one(step, victims) for _ in range(num_kills)), strict=True)
        outcomes = pool.collect(step.handle)
        elapsed, stats = time.monotonic() - began, pool.stats()
        pool.shutdown()
        undisturbed = RewardModel(directory, Runtime()).score(step.rows)
    ray.shutdown()
    differing = [pair for pair in zip(outcomes, undisturbed, strict=True) if pair[0] != pair[1]]
    print(
        json.dumps(
            {
                "kills": num_kills,
                "restarts": stats.restarts,
                "items": len(step.rows),
                "lost": sum(outcome.value is None for outcome in outcomes),
                "scored_twice": stats.scored - len(step.rows),
                "other_values": len(differing),
                "recovery_seconds": median_and_max(recovered),
                "notice_seconds": median_and_max(noticed),
                "over_10_seconds": sum(seconds > 10 for seconds in recovered),
                "seconds": round(elapsed, 1),
                "replicas": REPLICAS,
                "cores": len(os.sched_getaffinity(0)),
                "load_of_5_minutes": round(os.getloadavg()[1], 1),  # this run's own three processes included
            }
        )
    )


if __name__ == "__main__":
    main()
