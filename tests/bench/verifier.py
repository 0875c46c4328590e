"""Throughput of answer verification; prints one JSON line.

    python tests/bench/verifier.py [--processes 2] [--items 2000] [--poison 2.0] [--limit 5]

`single_per_second` is the rate of `workers.rewards.verifier.decide` in this process on ordinary answers (a
mixture of numbers, fractions, roots, tuples, intervals, expressions and words, a third of them right),
`pool_per_second` that of the pool, start-up left out; `efficiency` = pool / (processes * single).
`independent_per_second` is the rate of as many processes that share nothing and run `decide` on their part:
what the machine can give at that moment; `share_of_independent` = pool / independent. `poisoned_per_second`
is the rate of the same ordinary answers when every so many items one that never ends is mixed in,
`poisoned_share` its ratio to the clean pool; `poison_killed_seconds` how long one such item takes alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import random
import statistics
import time
from typing import Any

from workers.rewards.verifier import _WARMING, Verifier, decide

POISON = r"\boxed{9^{9^{9^{9}}}}"


def ordinary(num: int, seed: int = 0) -> list[tuple[str, str]]:
    """Gold answers and boxed predictions, the same for every run; no two alike, so that no cache helps more
    than in a real run."""
    generator = random.Random(seed)
    items = []
    for index in range(num):
        a, b, c = (generator.randint(2, 99) for _ in range(3))
        wrong = index % 3
        gold, answer = generator.choice(
            [
                (f"{a * 1000 + b}", f"{a},{b + wrong:03d}"),
                (rf"\frac{{{a}}}{{{b + 100}}}", f"{2 * a}/{2 * (b + 100 + wrong)}"),
                (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b + wrong}}}"),
                (rf"({a}, \frac{{{b}}}{{{c}}})", rf"\left({a + wrong}, \frac{{{b}}}{{{c}}}\right)"),
                (rf"[{a},{a + b})", rf"{a} \le x < {a + b + wrong}"),
                (f"{a}x^2+{b}x", f"x({a + wrong}x+{b})"),
                (rf"{a}\pi", rf"{a + wrong}\pi"),
                (f"{a}, {a + b}", f"{a + b}, {a + wrong}"),
                (f"{a / 10}", rf"{a / 10 + wrong}\%"),
                (rf"{a}^\circ", f"{a + wrong}"),
            ]
        )
        items.append((gold, rf"Therefore the answer is \boxed{{{answer}}}."))
    return items


def plain(items: list[tuple[str, str]], ready: Any, go: Any) -> None:
    """A process that decides its part alone."""
    warm_up()
    ready.release()
    go.wait()
    decide_all(items)


def warm_up() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for gold, extracted in itertools.pairwise(_WARMING.split("\n")):
        decide(gold, extracted)


def decide_all(items: list[tuple[str, str]]) -> float:
    """Decide in this process; the rate."""
    begin = time.monotonic()
    for gold, text in items:
        decide(gold, text.partition("{")[2].rpartition("}")[0])
    return len(items) / (time.monotonic() - begin)


def independent(items: list[tuple[str, str]], processes: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    parts = [
        context.Process(target=plain, args=(items[part::processes], ready, go)) for part in range(processes)
    ]
    for part in parts:
        part.start()
    for _ in parts:
        ready.acquire()
    begin = time.monotonic()
    go.set()
    for part in parts:
        part.join()
    return len(items) / (time.monotonic() - begin)


def rate(verifier: Verifier, items: list[tuple[str, str]]) -> float:
    """Items a second of the pool; `items` are ordinary ones."""
    begin = time.monotonic()
    verifier.collect(verifier.submit(items))
    return len(items) / (time.monotonic() - begin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--poison", type=float, default=2.0, help="per cent of the items")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds an item may take")
    options = parser.parse_args()
    items = ordinary(options.items)
    warm_up()

    verifier = Verifier(options.processes, options.limit)
    single, clean, alone = [], [], []
    try:
        verifier.collect(verifier.submit(items[:200]))
        for part in range(3):  # in turn, so that a busy machine slows both
            chosen = items[part::3]
            single.append(decide_all(chosen))
            clean.append(rate(verifier, chosen))
            alone.append(independent(chosen, options.processes))
        begin = time.monotonic()
        verifier.collect(verifier.submit([("5", POISON)]))
        killed = time.monotonic() - begin

        every = round(100 / options.poison)
        handles, begin = [], time.monotonic()
        poison = []
        for start in range(0, len(items), every):
            poison += verifier.submit([("5", POISON)])
            handles.append(verifier.submit(items[start : start + every]))
        for handle in handles:
            verifier.collect(handle)
        poisoned = len(items) / (time.monotonic() - begin)
    finally:
        verifier.shutdown()
    one, pool, ideal = statistics.median(single), statistics.median(clean), statistics.median(alone)
    print(
        json.dumps(
            {
                "items": len(items),
                "processes": options.processes,
                "single_per_second": round(one, 1),
                "pool_per_second": round(pool, 1),
                "efficiency": round(pool / (options.processes * one), 3),
                "independent_per_second": round(ideal, 1),
                "share_of_independent": round(pool / ideal, 3),
                "poison_per_cent": options.poison,
                "poisoned_per_second": round(poisoned, 1),
                "poisoned_share": round(poisoned / pool, 3),
                "limit_seconds": options.limit,
                "poison_killed_seconds": round(killed, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
