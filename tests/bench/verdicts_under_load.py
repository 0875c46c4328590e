"""Whether verdicts depend on load: a thousand cases, in quiet and beside busy processes; one JSON line.

    python tests/bench/verdicts_under_load.py [--items 1000] [--busy 20] [--limit 2]

The cases are the golds of `tests/cases/answers.jsonl` with their own predictions and with their neighbours'
golds, and a per cent of items that never end, for negatives. The busy processes have the ordinary niceness.
Fails where a verdict or its cause differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from pns.answers.extract import extract_answer
from pns.records import AnswerRule
from workers.rewards.verifier import Verifier

Item = tuple[str, str | None, AnswerRule]
CASES = Path(__file__).parents[1] / "cases/answers.jsonl"


def cases(number: int) -> list[Item]:
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    rule = AnswerRule()
    items: list[Item] = []
    for distance in range(1, number):
        if distance == 1:
            items += [(row["gold"], extract_answer(row["prediction"]), rule) for row in rows]
        others = rows[distance:] + rows[:distance]
        pairs = zip(rows, others, strict=True)
        items += [(row["gold"], other["gold"], rule) for row, other in pairs]
        if len(items) >= number:
            break
    num_poisons = max(1, number // 100)
    poisons = [("5", rf"\int_0^1 9^{{9^{{9^{{{9 + index}}}}}}} dx", rule) for index in range(num_poisons)]
    return items[: number - num_poisons] + poisons


def decided(items: list[Item], limit: float) -> tuple[list[tuple[str, str | None]], float]:
    """Verdicts with their causes, and the seconds that they took."""
    verifier = Verifier(2, limit)
    try:
        begin = time.monotonic()
        results = verifier.collect(verifier.submit_extracted(items))
        return [(result.verdict.value, result.cause) for result in results], time.monotonic() - begin
    finally:
        verifier.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--busy", type=int, default=20, help="processes that use all the processor they get")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds of processor time of an item")
    options = parser.parse_args()
    items = cases(options.items)
    quiet, quiet_seconds = decided(items, options.limit)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        loaded, loaded_seconds = decided(items, options.limit)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    changed = [
        [*item[:2], before, after]
        for item, before, after in zip(items, quiet, loaded, strict=True)
        if before != after
    ]
    verdicts = Counter(cause or verdict for verdict, cause in quiet)
    figures = {
        "items": len(items),
        "cores": len(os.sched_getaffinity(0)),
        "busy_processes": options.busy,
        "limit_seconds": options.limit,
        "quiet_seconds": round(quiet_seconds, 1),
        "loaded_seconds": round(loaded_seconds, 1),
        "verdicts": dict(sorted(verdicts.items())),
        "changed": changed,
    }
    print(json.dumps(figures))
    if changed:
        sys.exit(f"{len(changed)} verdicts depend on load")


if __name__ == "__main__":
    main()
