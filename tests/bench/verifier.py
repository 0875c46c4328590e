"""Throughput of answer verification; prints one JSON line.

    python tests/bench/verifier.py [--processes 2] [--items 2000] [--poison 2.0] [--limit 5]

Ordinary answers are a mixture of numbers, fractions, roots, tuples, intervals, expressions and words, a third
of them right. `evaluation_per_second` and `negatives_per_second` are the rates of a `Verifier` of one process
on them, start-up left out, for the two kinds of request; `asked_always_per_second` that of one process that
asks math-verify wherever equality is not proved, on the same answers, in turn with the others.
`never_asked_evaluation` and `never_asked_negatives` are the shares of answers that never ask math-verify,
`no_process` the share that takes no process. `pool_per_second` is the rate of `--processes` processes for
negatives, `efficiency` = pool / (processes * negatives). `poisoned_per_second` is the rate of the same
answers in that pool when every so many items one that never ends is mixed in, `poisoned_share` its ratio to
the clean pool; `poison_killed_seconds` how long one such item takes alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import random
import re
import statistics
import time
from importlib.metadata import version

from pns.answers.compare import compare_answers
from workers.rewards.decide import EXACT, decide, decide_by_reading, math_verify_says
from workers.rewards.verifier import _WARMING, Verifier, decide_without_process


def poison(number: int) -> str:
    """A prediction that never ends, another for each number: what was decided is remembered."""
    return rf"\boxed{{\int_0^1 9^{{9^{{9^{{{9 + number}}}}}}} dx}}"


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


def warm_up() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for gold, extracted in itertools.pairwise(re.split("  |\n", _WARMING)):
        decide(gold, extracted)


def answer_of(text: str) -> str:
    return text.partition("{")[2].rpartition("}")[0]


def asking_always(items: list[tuple[str, str]]) -> float:
    """Ask math-verify in this process wherever equality is not proved; the rate."""
    begin = time.monotonic()
    for gold, text in items:
        if not compare_answers(gold, answer_of(text)).same:
            math_verify_says(gold, answer_of(text))
    return len(items) / (time.monotonic() - begin)


def never_asked(items: list[tuple[str, str]], for_negatives: bool) -> float:
    """The share that is decided without math-verify."""
    pairs = [(gold, answer_of(text)) for gold, text in items]
    decided = [
        decide_by_reading(compare_answers(*pair), *pair, EXACT, for_negatives) is not None for pair in pairs
    ]
    return decided.count(True) / len(items)


def rate(verifier: Verifier, items: list[tuple[str, str]], for_negatives: bool) -> float:
    """Items a second."""
    begin = time.monotonic()
    verifier.collect(verifier.submit(items, for_negatives))
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

    one, pool = Verifier(1, options.limit), Verifier(options.processes, options.limit)
    rates: dict[str, list[float]] = {name: [] for name in ("evaluation", "negatives", "always", "pool")}
    try:
        for verifier in (one, pool):
            verifier.collect(verifier.submit(ordinary(100, seed=1)))
        for part in range(5):  # in turn, so that a busy machine slows all of them
            chosen = items[part::5]
            rates["evaluation"].append(rate(one, chosen, for_negatives=False))
            rates["negatives"].append(rate(one, chosen, for_negatives=True))
            rates["always"].append(asking_always(chosen))
            rates["pool"].append(rate(pool, chosen, for_negatives=True))
        begin = time.monotonic()
        pool.collect(pool.submit([("5", poison(0))]))
        killed = time.monotonic() - begin

        every = round(100 / options.poison)
        fresh = ordinary(options.items, seed=2)  # the others are remembered
        handles, begin = [], time.monotonic()
        poisons = []
        for start in range(0, len(fresh), every):
            poisons += pool.submit([("5", poison(1 + start))])
            handles.append(pool.submit(fresh[start : start + every]))
        for handle in handles:
            pool.collect(handle)
        poisoned = len(fresh) / (time.monotonic() - begin)
    finally:
        one.shutdown()
        pool.shutdown()
    median = {name: statistics.median(each) for name, each in rates.items()}
    alone = [decide_without_process(gold, answer_of(text)) is not None for gold, text in items]
    print(
        json.dumps(
            {
                "items": len(items),
                "evaluation_per_second": round(median["evaluation"], 1),
                "negatives_per_second": round(median["negatives"], 1),
                "asked_always_per_second": round(median["always"], 1),
                "evaluation_speedup": round(median["evaluation"] / median["always"], 2),
                "negatives_speedup": round(median["negatives"] / median["always"], 2),
                "never_asked_evaluation": round(never_asked(items, for_negatives=False), 3),
                "never_asked_negatives": round(never_asked(items, for_negatives=True), 3),
                "no_process": round(alone.count(True) / len(items), 3),
                "processes": options.processes,
                "pool_per_second": round(median["pool"], 1),
                "efficiency": round(median["pool"] / (options.processes * median["negatives"]), 3),
                "poison_per_cent": options.poison,
                "poisoned_per_second": round(poisoned, 1),
                "poisoned_share": round(poisoned / median["pool"], 3),
                "limit_seconds": options.limit,
                "poison_killed_seconds": round(killed, 2),
                "versions": {name: version(name) for name in ("math-verify", "sympy")}
                | {"python": platform.python_version()},
            }
        )
    )


if __name__ == "__main__":
    main()
