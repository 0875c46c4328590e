r"""The decision on two answers: what each reader says, and when that is enough.

math-verify is asked last: it takes nearly all of the time, and of what reaches it some never ends."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

from pns.answers.compare import Finding, compare_answers
from pns.answers.plain_numbers import are_apart, read_plain
from pns.answers.spelling import is_prose
from pns.records import AnswerRule, Verdict

# Decimals that math-verify compares, digits that it computes; with 6, 1/2^99 equals 1/2^98.
_ROUNDING, _PRECISION = 60, 80
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")  # not a command, nor a product of a few variables
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")

EXACT = AnswerRule()  # of an answer that brings no rule of its own

Decision = tuple[Verdict, str | None, str]
AnswerComparison = tuple[str, str, AnswerRule, bool]  # gold answer, answer, rule, for negatives


def decide(gold: str, extracted: str, rule: AnswerRule = EXACT, for_negatives: bool = True) -> Decision:
    """Verdict, cause and reason of all readers together. Without a limit: for a killable process."""
    finding = compare_answers(gold, extracted, rule)
    if decision := decide_by_reading(finding, gold, extracted, rule, for_negatives):
        return decision
    equal, cause = math_verify_says(gold, extracted)
    if equal is None:
        reason = f"math-verify cannot decide ({cause}); exact comparison: {finding.reason}"
        return Verdict.UNVERIFIED, cause, reason
    if equal and finding.same is None:
        return Verdict.CORRECT, None, "math-verify says equal"
    if not equal and finding.same is False:
        return Verdict.WRONG, None, finding.reason
    said, cause = ("equal", "disagreement") if equal else ("different", "undecided")
    return Verdict.UNVERIFIED, cause, f"math-verify says {said}, exact comparison: {finding.reason}"


def decide_by_reading(
    finding: Finding, gold: str, extracted: str, rule: AnswerRule, for_negatives: bool
) -> Decision | None:
    """The decision where math-verify cannot change it; None where it must be asked."""
    if finding.same:
        return Verdict.CORRECT, None, finding.reason
    if finding.same is False:
        plain = [read_plain(gold), read_plain(extracted)] if for_negatives and rule == EXACT else []
        both = [answer for answer in plain if answer]
        is_proved_twice = len(both) == 2 and are_apart(*both)
        return (Verdict.WRONG, None, finding.reason) if is_proved_twice or not for_negatives else None
    # math-verify leaves out the words beside a number: to it five apples are five pears.
    if finding.doubtful or _WORD.search(gold + " " + extracted):
        return Verdict.UNVERIFIED, "undecided", f"exact comparison: {finding.reason}"
    return None


def math_verify_says(gold: str, extracted: str) -> tuple[bool | None, str | None]:
    """Whether math-verify calls them equal; None where it cannot tell: gold, unparsable or comparison."""
    from math_verify import verify
    from sympy.core.cache import clear_cache
    from sympy.core.random import seed

    clear_cache()  # what was asked before changes no answer, by its caches or by its random points
    seed(0)
    gold_parsed = _parse(gold)
    if not gold_parsed:
        return None, "gold"
    parsed = _parse(extracted)
    if not parsed:
        return None, "unparsable"
    try:
        if _differ(gold_parsed, parsed) is True:
            return False, None
        same = verify(
            list(gold_parsed),
            list(parsed),
            float_rounding=_ROUNDING,
            numeric_precision=_PRECISION,
            timeout_seconds=None,  # its own limit is a signal, which C code can outlast: the parent kills
            raise_on_error=True,
        )
        return bool(same), None
    except MemoryError:
        raise
    except Exception:  # sympy raises anything at all on odd input; whatever it is, nothing was decided
        return None, "comparison"


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two expressions, as math-verify reads them, take different values: sympy's evaluation at two
    points decides in a millisecond where its simplification may take for ever."""
    import sympy

    if not (len(a) == len(b) == 1 and isinstance(a[0], sympy.Expr) and isinstance(b[0], sympy.Expr)):
        return False
    names = sorted(a[0].free_symbols | b[0].free_symbols, key=str)
    for first in (17, 41):
        point = {name: sympy.Rational(first + 12 * index, 13) for index, name in enumerate(names)}
        x, y = a[0].evalf(30, subs=point), b[0].evalf(30, subs=point)
        for value in (x, y):
            if not (value.is_number and value.is_finite and value.is_comparable is not None):
                return False
        if not abs(x - y) > sympy.Float("1e-12") * max(abs(x), abs(y)):
            return False
    return True


@functools.lru_cache(maxsize=64)  # the completions of one problem share its gold answer
def _parse(answer: str) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    text = answer.strip().strip("$").strip().replace("\\%", "%").replace("**", "^")
    if is_prose(text):  # else every letter would be a variable
        text = rf"\text{{{text}}}"
    # What models write and LaTeX has no word for: 1.2e5, np.sqrt, 5. and \mathrm{x}.
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", re.sub(r"\b(?:np|math)\.(?=[a-z])", r"\\", text))
    text = re.sub(r"\\mathrm\s*\{\s*([A-Za-z])\s*\}", r"\1", re.sub(r"(?<=\d)\.(?!\d)", "", text))
    # Plain expressions are looked for anywhere in the text, so only where the number is all there is (LaTeX
    # reads no percents).
    config = ExprExtractionConfig() if re.fullmatch(r"[+-]?[\d.,]+\s*%", text) else LatexExtractionConfig()
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}
    try:
        return tuple(parse(f"${text}$", [config], **options))
    except MemoryError:
        raise
    except Exception:  # as above
        return ()


def what_is_broken() -> str:
    """What is wrong with math-verify, and the way out; "" if nothing is."""
    try:
        says = math_verify_says("1", "1")
        error = "" if says == (True, None) else f"it does not find 1 equal to 1: {says[1]}"
    except Exception as exception:  # an installation can be broken in any way
        error = f"{type(exception).__name__}: {str(exception).partition(chr(10))[0]}"
    if not error:
        return ""
    return f"{sys.executable} cannot use math-verify ({error}); install it: pip install math-verify==0.9.0"
