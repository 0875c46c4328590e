r"""A second reader, of plain numbers and of lists and tuples of them, which shares no code with the grammar
(`pns.answers.parser`): two answers that it reads apart need no third opinion to be different.

Read are integers, decimals, thousands separators, fractions of two integers, per cent, a currency sign, and
several of these between commas, in no brackets or in one pair. Nothing else: a mixed number is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MAX_CHARACTERS = 200
_INTEGER = r"[+-]?\d+"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:\\?\$)?"
    r"(?:(?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    rf"|(?P<over>\d+/\d+)|\\[dt]?frac\{{(?P<above>{_INTEGER})\}}\{{(?P<below>{_INTEGER})\}})"
    r"(?P<percent>\\?%)?"
)
_SPACING = re.compile(r"\\[,;: ]|\\left(?=[(\[\\])|\\right(?=[)\]\\])|~|\s")
_APART = re.compile(r"[\d}] +[\d\\]")  # 3 1/2
_BRACKETED = re.compile(r"(\\\{|[(\[])(.+)(\\\}|[)\]])")
_UNORDERED = ("", r"\{\}")


@dataclass(frozen=True)
class Plain:
    """`brackets` around the `values`, "" for none; `percent`: the one value there is has a per cent sign."""

    brackets: str
    values: tuple[Fraction, ...]
    percent: bool = False

    @property
    def is_number(self) -> bool:
        return not self.brackets and len(self.values) == 1


def read_plain(text: str) -> Plain | None:
    """None where `text` is anything else. About 10 microseconds; never raises."""
    if len(text) > _MAX_CHARACTERS:
        return None
    text = text.replace("\N{MINUS SIGN}", "-").replace(r"\!", "").replace("{,}", ",")
    text = _SPACING.sub(" ", text.strip().strip("$")).strip()
    if _APART.search(text):
        return None
    is_decimal_comma = re.search(r",(?! )", text)  # 3,50, which is no list
    text = text.replace(" ", "")
    if one := _number(text):
        return Plain("", one[:1], one[1])
    bracketed = _BRACKETED.fullmatch(text)
    if is_decimal_comma and not bracketed:
        return None
    opening, inner, closing = bracketed.groups() if bracketed else ("", text, "")
    items = [_number(item) for item in inner.split(",")]
    values = tuple(item[0] for item in items if item and not item[1])
    return Plain(opening + closing, values) if len(values) == len(items) > 1 else None


def _number(text: str) -> tuple[Fraction, bool] | None:
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    written = (match["decimal"] or match["over"] or "").replace(",", "")
    try:
        value = Fraction(written) if written else Fraction(int(match["above"]), int(match["below"]))
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value, bool(match["percent"])


def are_apart(a: Plain, b: Plain) -> bool:
    """Whether they are of one kind and differ, whatever a per cent sign on one side means."""
    if a.brackets != b.brackets or len(a.values) != len(b.values):
        return False
    if a.is_number:
        [x], [y] = a.values, b.values
        return x != y and (a.percent == b.percent or x != (y * 100 if a.percent else y / 100))
    return set(a.values) != set(b.values) if a.brackets in _UNORDERED else a.values != b.values
