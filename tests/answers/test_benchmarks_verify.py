"""Gold answers of the benchmarks against themselves and against those of the next problem; skipped where the
files are not there."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pns.answers.compare import same_answer
from pns.records import AnswerRule, Verdict
from random_answers import SETS
from workers.rewards.verifier import Verifier

DATA = Path(os.environ["PNS_DATA"])
TRULY_EQUAL = {  # spelt differently in neighbouring problems
    ("math500", "5", "x=5"),
    ("gaokao2023en", "$-2$", r"$\{-2\}$"),
    ("college_math", "$10 $", r"width $=$ height $=\operatorname{depth}=10$"),
}
MAX_UNDECIDED_SHARE = {  # of others: 0.03
    "math500": 0.11,
    "olympiadbench": 0.16,
    "gaokao2023en": 0.26,
    "minerva_math": 0.40,
    "college_math": 0.78,
}
MUTATIONS = 2_500

pytestmark = pytest.mark.skipif(
    not (DATA / "benchmarks").is_dir(), reason=f"no benchmark files in {DATA / 'benchmarks'} (set PNS_DATA)"
)


def problems(name: str) -> list[dict[str, Any]]:
    lines = (DATA / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [row for row in map(json.loads, filter(None, lines)) if row["answer"]]


def rule_of(row: dict[str, Any]) -> AnswerRule:
    return AnswerRule(bool(row.get("multiple")), float(row.get("error") or 0), row.get("unit") or "")


@pytest.mark.parametrize("name", SETS)
def test_gold_answers_equal_themselves_and_not_their_neighbours(name: str) -> None:
    rows = problems(name)
    following = rows[1:] + rows[:1]
    own = [same_answer(row["answer"], row["answer"], rule_of(row)) for row in rows]
    assert own.count(True) >= 0.995 * len(rows)
    others = [
        same_answer(row["answer"], other["answer"], rule_of(row))
        for row, other in zip(rows, following, strict=True)
    ]
    equal = {
        (name, row["answer"], other["answer"])
        for row, other, same in zip(rows, following, others, strict=True)
        if same and row["answer"].strip("$") != other["answer"].strip("$")
    }
    assert equal <= TRULY_EQUAL
    assert others.count(None) <= MAX_UNDECIDED_SHARE.get(name, 0.03) * len(rows)


CLOSED = re.compile(r"(?:[\d\s+\-*/^(){}\[\],.xyzab=$]|\\(?:[dt]?frac|sqrt|pi|left|right|cdot|infty|cup|,))+")
REWRITINGS: tuple[Callable[[str], str], ...] = (
    lambda text: text.replace(r"\frac", r"\dfrac"),
    lambda text: text.replace(" ", ""),
    lambda text: re.sub(r"^(-?\d+)$", lambda match: f"{3 * int(match[1])}/3", text),
    lambda text: re.sub(r"^(-?\d+)$", lambda match: rf"{match[1]}.0 \text{{ m}}", text),
    lambda text: re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\\frac{\1\\cdot 7}{7\\cdot \2}", text),
    lambda text: text if re.search(r"[,=$\[]|\\infty", text) else rf"\frac{{6({text})}}{{6}}",
    lambda text: text if re.search(r"[,=$\[]|\\infty", text) else f"7+({text})-7",
)


def test_another_digit_is_never_equal_and_another_spelling_never_different() -> None:
    golds = sorted({row["answer"] for name in SETS for row in problems(name)})
    closed = [gold for gold in golds if CLOSED.fullmatch(gold) and re.search(r"\d", gold)]
    generator = random.Random(12)
    equal, different = [], []
    for _ in range(MUTATIONS):
        gold = generator.choice(closed)
        place = generator.choice([match.start() for match in re.finditer(r"\d", gold)])
        digit = generator.choice([digit for digit in "123456789" if digit != gold[place]])
        mutated = gold[:place] + digit + gold[place + 1 :]
        if same_answer(gold, mutated):
            equal.append((gold, mutated))
        rewritten = generator.choice(REWRITINGS)(gold)
        if same_answer(gold, rewritten) is False:
            different.append((gold, rewritten))
    assert equal == []
    assert different == []


def test_both_verifiers_together() -> None:
    """As above, with math-verify: neighbours of closed kinds are wrong, not merely undecided."""
    rows = [row for name in ("aime24", "aime25", "amc23", "math500") for row in problems(name)]
    following = rows[1:] + rows[:1]
    verifier = Verifier(processes=2, limit_seconds=5)
    try:
        own_handle = verifier.submit(
            [(row["answer"], rf"\boxed{{{row['answer']}}}", rule_of(row)) for row in rows]
        )
        others_handle = verifier.submit(
            [
                (row["answer"], rf"\boxed{{{other['answer']}}}", rule_of(row))
                for row, other in zip(rows, following, strict=True)
            ]
        )
        own, others = verifier.collect(own_handle), verifier.collect(others_handle)
    finally:
        verifier.shutdown()
    assert [result for result in own if result.verdict is not Verdict.CORRECT] == []
    verdicts = [result.verdict for result in others]
    assert verdicts.count(Verdict.WRONG) >= 0.88 * len(rows)
    equal = [
        row["answer"]
        for row, other, verdict in zip(rows, following, verdicts, strict=True)
        if verdict is Verdict.CORRECT and row["answer"] != other["answer"]
    ]
    assert equal == ["5"]  # x=5 follows
