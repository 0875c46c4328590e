"""How a scoring pool grows with its replicas: items of known latency through real Ray actors.

    python tests/bench/reward_pool.py

2,048 items of which sixteen take 50 ms together, submitted one by one (as completions come) and all at once,
with 1, 2 and 4 replicas. `linear` is the throughput of 4 replicas over four times that of one, to be at least
0.9; `ideal` the seconds that the latencies alone take. The items only sleep: no core is needed for them.
Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Sequence

import ray

from pns.config import ServicePool
from workers.rewards.service import Outcome, ScoringPool
from workers.runtime import Runtime
from workers.sizes import FORWARD_TOKENS

TOGETHER, SECONDS = 16, 0.05  # items of one forward pass, and what it takes


class Sleeping:
    def score(self, items: Sequence[int]) -> list[Outcome[int]]:
        time.sleep(SECONDS * -(-len(items) // TOGETHER))
        return [Outcome(item) for item in items]


def seconds_of(pool: ScoringPool[int, int], num_items: int, one_by_one: bool) -> float:
    began = time.monotonic()
    parts = [[number] for number in range(num_items)] if one_by_one else [list(range(num_items))]
    handles = [pool.submit(part) for part in parts]
    values = [outcome.value for handle in handles for outcome in pool.collect(handle)]
    assert values == list(range(num_items))
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2048)
    num_items = parser.parse_args().items
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    size = FORWARD_TOKENS["cpu"] // TOGETHER
    pool = ScoringPool(
        "bench", ServicePool(replicas=1), Runtime(), lambda path: Sleeping(), lambda item: size
    )
    pool.load("-")
    seconds: dict[str, dict[int, float]] = {"one_by_one": {}, "at_once": {}}
    for replicas in (1, 2, 4):
        pool.resize(replicas)
        for name, measured in seconds.items():
            measured[replicas] = seconds_of(pool, num_items, name == "one_by_one")
    pool.shutdown()
    ray.shutdown()
    linear = {name: round(own[1] / own[4] / 4, 3) for name, own in seconds.items()}
    rounded = {name: {k: round(value, 2) for k, value in own.items()} for name, own in seconds.items()}
    ideal = {k: round(num_items / TOGETHER * SECONDS / k, 2) for k in (1, 2, 4)}
    print(json.dumps({"items": num_items, "ideal": ideal, "seconds": rounded, "linear": linear}))


if __name__ == "__main__":
    main()
