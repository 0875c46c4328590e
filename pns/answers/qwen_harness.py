r"""Whether a completion is right as the evaluation of Qwen2.5-Math counts, by which most published accuracies
were counted (github.com/QwenLM/Qwen2.5-Math, evaluation/parser.py and grader.py); written from its rules.

It takes the last number of a completion that states no answer, calls numbers equal within a ten-thousandth,
also where one is a hundred times the other, and leaves out units, signs of currency and per cent. Where it
asks sympy whether two formulas are equal, this asks our own comparison. A second column, beside the verdicts;
nothing is decided by it.
"""

import re

from pns.answers.compare import compare_answers
from pns.answers.extract import boxed_span

_RELATIVE_TOLERANCE = 1e-4
_NUMBER = re.compile(r"-?\d*\.?\d+")
_STATED = re.compile(r"(?:final )?answer is\s*:?\s*\$?(.+?)\$?(?:\. |\.?$|\n)", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}")
_DROPPED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\displaystyle|\^\s*\{?\s*\\circ\s*\}?|\\degree|°"
    r"|\\?\$|\\?%|\\{2}|[\s\u00a0]"
)
_NAMED = re.compile(r"^[A-Za-z]{1,2}(?:\([A-Za-z]\))?=(?=.)|^[A-Za-z]{1,2}\\in")
_CHOICE = re.compile(r"(?<![A-Za-z])[A-E](?![A-Za-z])")
_WORD_BEHIND = re.compile(r"(?<=\d)[A-Za-z]{2,}(?:\^\d|/[A-Za-z]+)*\.?$")


def counts_as_right(gold: str, completion: str) -> bool:
    """Whether the completion's answer, boxed, stated or else its last number, equals the gold one by these
    rules. Never raises."""
    answer = stated_answer(completion)
    return bool(answer) and _is_equal(_normalised(gold), _normalised(answer), answer, gold)


def stated_answer(completion: str) -> str:
    """The last box, else what follows the last "answer is", else the last number; "" without any."""
    if span := boxed_span(completion):
        return completion[span[0] : span[1]].strip()
    if stated := _STATED.findall(completion):
        return str(stated[-1]).strip()
    numbers = _NUMBER.findall(completion.replace(",", ""))
    return numbers[-1] if numbers else ""


def _normalised(answer: str) -> str:
    text = _TEXT.sub(r"\1", answer.strip().rstrip("."))
    text = re.sub(r"\\[dt]frac", r"\\frac", _DROPPED.sub("", text))
    text = _NAMED.sub("", text)
    text = _WORD_BEHIND.sub("", text)
    return re.sub(r"(\d)\.0+(?!\d)", r"\1", text)


def _is_equal(gold: str, answer: str, written: str, written_gold: str) -> bool:
    if gold.casefold() == answer.casefold():
        return True
    if re.fullmatch("[A-E]", gold):
        choices = _CHOICE.findall(written)
        return bool(choices) and choices[-1] == gold
    numbers = _number(gold), _number(answer)
    if None not in numbers:
        own, other = (number for number in numbers if number is not None)
        return any(_is_close(own * factor, other) for factor in (0.01, 1, 100))
    parts = _parts(gold), _parts(answer)
    if all(parts):
        pairs = list(zip(*parts, strict=False))
        return len(parts[0]) == len(parts[1]) and all(_is_equal(x, y, y, x) for x, y in pairs)
    return bool(compare_answers(written_gold, written).same or compare_answers(gold, answer).same)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b))


def _parts(text: str) -> list[str]:
    """The items of a tuple or an interval; none for anything else. Which brackets it has does not count."""
    is_several = len(text) > 2 and text[0] in "([" and text[-1] in ")]" and "," in text
    return text[1:-1].split(",") if is_several else []
