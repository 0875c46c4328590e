"""Random changes of the benchmarks' golds; prints one JSON line.

    PNS_DATA=... PYTHONPATH=tests python tests/bench/answers_random.py [--num 10000] [--seed 0] [--failures FILE]

By set: `false_correct` counts mutations called the same, `false_wrong` rewritings called different,
`undecided_mutations` and `undecided_rewritings` those of which nothing was claimed. The exact comparison
alone is asked; with `--whole` the two verifiers together (`workers.rewards.verifier.decide`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from pns.answers.compare import compare_answers
from pns.records import AnswerRule
from random_answers import mutations, rewritings


def same(gold: str, answer: str, rule: AnswerRule, whole: bool) -> bool | None:
    if not whole:
        return compare_answers(gold, answer, rule).same
    from workers.rewards.verifier import decide

    verdict = decide(gold, answer, rule)[0]
    return {"correct": True, "wrong": False}.get(str(getattr(verdict, "value", verdict)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--failures", type=Path)
    args = parser.parse_args()
    data = Path(os.environ["PNS_DATA"])
    counts: dict[str, Counter[str]] = {}
    failures = []
    for made, change, bad in (("mutations", mutations, True), ("rewritings", rewritings, False)):
        for name, kind, gold, changed, rule in change(data, args.num, args.seed):
            found = same(gold, changed, rule, args.whole)
            count = counts.setdefault(name, Counter())
            count[made] += 1
            if found is None:
                count[f"undecided_{made}"] += 1
            elif found is bad:
                count["false_correct" if bad else "false_wrong"] += 1
                failures.append({"set": name, "kind": kind, "gold": gold, "changed": changed, "said": found})
    if args.failures:
        args.failures.write_text("".join(json.dumps(row) + "\n" for row in failures), encoding="utf-8")
    print(json.dumps({name: dict(sorted(count.items())) for name, count in sorted(counts.items())}))


if __name__ == "__main__":
    main()
