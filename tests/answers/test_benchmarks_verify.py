"""Gold answers of the benchmarks against themselves and against those of the next problem; skipped where the
files are not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pns.answers.compare import same_answer
from pns.records import AnswerRule, Verdict
from workers.rewards.verifier import Verifier

DATA = Path(os.environ["PNS_DATA"])
SETS = (
    "gsm8k",
    "math500",
    "amc23",
    "minerva_math",
    "olympiadbench",
    "aime24",
    "aime25",
    "college_math",
    "gaokao2023en",
)
TRULY_EQUAL = {  # spelt differently in neighbouring problems
    ("math500", "5", "x=5"),
    ("gaokao2023en", "$-2$", r"$\{-2\}$"),
    ("college_math", "$10 $", r"width $=$ height $=\operatorname{depth}=10$"),
}
MAX_UNDECIDED_SHARE = {"minerva_math": 0.08, "gaokao2023en": 0.17, "college_math": 0.45}  # others: 0.03

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


def test_both_verifiers_together() -> None:
    """As above, with math-verify: neighbours are wrong, not merely undecided."""
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
    assert verdicts.count(Verdict.WRONG) >= 0.97 * len(rows)
    equal = [
        row["answer"]
        for row, other, verdict in zip(rows, following, verdicts, strict=True)
        if verdict is Verdict.CORRECT and row["answer"] != other["answer"]
    ]
    assert equal == ["5"]  # x=5 follows
