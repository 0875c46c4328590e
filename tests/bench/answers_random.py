"""Gold answers of the nine benchmarks changed in value and rewritten: how often the exact comparison says what
is not so. Prints one JSON line; `--show` prints the failures. Needs the benchmark files in PNS_DATA."""

import argparse
import json
import random
import time
from collections import Counter

from pns.answers.compare import compare_answers
from answer_variants import SETS, gold_answers, other_spellings, other_values
from workers.rewards.decide import math_verify_says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000, help="variants of each kind")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    rng = random.Random(0)
    golds = [gold for name in SETS for gold in gold_answers(name)]
    counts: Counter[str] = Counter()
    began = time.process_time()
    while min(counts["other_values"], counts["other_spellings"]) < options.number:
        gold = rng.choice(golds)
        for kind, variants in (("other_values", other_values), ("other_spellings", other_spellings)):
            for other in variants(gold, rng):
                if counts[kind] >= options.number:
                    continue
                counts[kind] += 1
                same = compare_answers(gold, other).same
                counts[f"{kind}_undecided"] += same is None
                is_false = same is (kind == "other_values")
                if is_false and kind == "other_values" and math_verify_says(gold, other)[0]:
                    counts["other_values_that_state_the_same"] += 1
                elif is_false:
                    counts["false_correct" if kind == "other_values" else "false_wrong"] += 1
                    if options.show:
                        print(kind, gold, "|", other)
    seconds = round(time.process_time() - began, 1)
    figures = {"false_correct": 0, "false_wrong": 0} | counts | {"processor_seconds": seconds}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
