"""`pns verify`: verdicts on a file of gold answers and predictions, streamed in order."""

import json
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, TextIO

from pns.answers.extract import extract_answer
from pns.errors import UserError
from pns.files import json_lines
from pns.records import AnswerRule

_IN_FLIGHT = 4096  # cases read ahead of the verdicts


def verify_file(
    cases: Path, out: Path, processes: int, limit_seconds: float, force: bool, for_negatives: bool = True
) -> dict[str, int]:
    r"""Verify every line of `cases` and write one line each to `out`, in order; returns the number of lines
    per verdict.

    A case is a JSON object with `gold` and `prediction`, strings or numbers (taken as text), and may have
    `unordered` (true: a list whose order does not count), `tolerance` (a number, absolute) and `unit` (of
    numbers that state none); `cases` may be `-`, for standard input. The
    prediction is a whole completion, whose last box is the answer, or a bare answer
    (`pns.answers.extract.extract_answer`); a gold answer with a box is what stands in it. A line of `out` has
    `verdict` (correct, wrong, unverified), `extracted` (null: no final answer, which is unverified), `reason`
    and `seconds` (a worker's processor time). `for_negatives`: wrong is what two readers call so. Raises
    UserError with the line's number for input of another form; `out` then holds verdicts of lines before it.
    """
    if processes < 1 or limit_seconds <= 0:
        raise UserError(f"--processes {processes} and --seconds {limit_seconds:g} must be positive")
    if str(cases) == "-":
        cases = Path("/dev/stdin")
    elif not cases.is_file():
        raise UserError(f"{cases} does not exist; name a JSONL file with the fields gold and prediction")
    if out.exists() and not force:
        raise UserError(f"{out} exists; add --force to replace it")
    if out.exists() and out.samefile(cases):
        raise UserError(f"--out {out} is the file of cases itself; name another")
    from workers.rewards.verifier import Verifier

    begin = time.monotonic()
    counts: Counter[str] = Counter(correct=0, wrong=0, unverified=0)
    verifier = Verifier(processes, limit_seconds)
    try:
        with _opened(out) as file:
            waiting: deque[Any] = deque()
            for number, case in json_lines(cases):
                gold, prediction, rule = _checked_case(case, f"{cases}, line {number}")
                answer = extract_answer(gold) if "\\boxed" in gold else gold
                request = (answer or gold, extract_answer(prediction), rule)
                waiting.append(verifier.submit_extracted([request], for_negatives))
                while waiting and (len(waiting) >= _IN_FLIGHT or verifier.done(waiting[0])):
                    _write(file, verifier.collect(waiting.popleft())[0], counts)
            while waiting:
                _write(file, verifier.collect(waiting.popleft())[0], counts)
    finally:
        verifier.shutdown()
    total, seconds = counts.total(), time.monotonic() - begin
    shares = [f"{count} {verdict} ({count / max(1, total):.1%})" for verdict, count in counts.items()]
    speed = f"{seconds:.1f} s, {total / seconds:.0f} a second"
    print(
        f"{total} cases: {', '.join(shares)}; {speed} -> {out}", file=sys.stderr
    )  # `--out /dev/stdout` stays clean
    return dict(counts)


def _opened(out: Path) -> TextIO:
    try:
        return out.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _checked_case(case: dict[str, Any], where: str) -> tuple[str, str, AnswerRule]:
    texts = []
    for field in ("gold", "prediction"):
        value = case.get(field)
        if type(value) in (int, float):  # no bool
            value = str(value)
        if not isinstance(value, str):
            kind = json.dumps(value)[:40] if field in case else "missing"
            raise UserError(f"{where}: {field} is {kind}; it must be a string: mend or remove the line")
        texts.append(value)
    unordered, tolerance = case.get("unordered", False), case.get("tolerance", 0)
    unit = case.get("unit") or ""
    if not isinstance(unordered, bool):
        raise UserError(f"{where}: unordered is {unordered!r}; it must be true or false")
    if type(tolerance) not in (int, float) or not 0 <= tolerance < float("inf"):
        raise UserError(f"{where}: tolerance is {tolerance!r}; it must be a number of at least 0")
    if not isinstance(unit, str):
        raise UserError(f"{where}: unit is {unit!r}; it must be a string")
    gold, prediction = texts
    return gold, prediction, AnswerRule(unordered, float(tolerance), unit)


def _write(file: TextIO, result: Any, counts: Counter[str]) -> None:
    counts[result.verdict.value] += 1
    row = {
        "verdict": result.verdict.value,
        "extracted": result.extracted,
        "reason": f"{result.cause}: {result.reason}" if result.cause else result.reason,
        "seconds": round(result.seconds, 6),
    }
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
