"""What stays whole when a text with mathematics and code is cut into pieces."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from pns.algo.formatting import THINK_TAGS

TAG = re.compile("|".join(THINK_TAGS))
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_OPENING = re.compile(
    r"(?P<escaped>\\\\|\\[${}])|(?P<block>```|\[asy\])|(?P<inline_code>`[^`\n]+`)|(?P<display>\$\$|\\\[|\\\()"
    r"|\\begin\{(?P<environment>[A-Za-z]+\*?)\}|(?P<dollar>\$)|(?P<brace>\{)"
)
_CLOSING = {"```": "```", "[asy]": "[/asy]", "$$": "$$", r"\[": r"\]", r"\(": r"\)"}
_UNTIL_DOLLAR = re.compile(r"\\.|[${]|\n[ \t\r]*\n", re.DOTALL)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_GROUP = re.compile(r"\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_AMOUNT = re.compile(r"\s?(?:\d|\.\d|<<)")


@dataclass(frozen=True)
class Whole:
    """text[start:end] stays whole; `code` may be cut at its lines where it is too long."""

    start: int
    end: int
    code: bool = False


def wholes(text: str) -> list[Whole]:
    r"""The outermost formulas (`$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin{..}..\end{..}`), balanced
    braces, code (in backticks, fences and [asy]) and reasoning tags of a text, in order.

    A dollar sign before an amount of money opens no formula. A formula that is never closed goes up to the
    next blank line, a fence to the end; neither goes beyond a reasoning tag, and braces around a blank line
    are none. Time is linear in the length."""
    found: list[Whole] = []
    start = 0
    for tag in TAG.finditer(text):
        found += _wholes_between_tags(text[start : tag.start()], start)
        found.append(Whole(*tag.span()))
        start = tag.end()
    return found + _wholes_between_tags(text[start:], start)


def cuts(position: int, parts: Sequence[Whole]) -> bool:
    """Whether a boundary at `position` would cut one of `parts` (in order, disjoint)."""
    before = bisect_left(parts, position, key=lambda part: part.start) - 1
    return before >= 0 and position < parts[before].end


def _wholes_between_tags(text: str, shift: int) -> list[Whole]:
    blank_lines = [match.start() for match in _BLANK_LINE.finditer(text)]
    closing_brace = _closing_braces(text)

    def blank_line_after(position: int) -> int:
        index = bisect_left(blank_lines, position)
        return blank_lines[index] if index < len(blank_lines) else len(text)

    found = []
    position = 0
    while opening := _OPENING.search(text, position):
        kind, start, inner = opening.lastgroup, opening.start(), opening.end()
        end: int | None = None
        match kind:
            case "inline_code":
                end = inner
            case "block" | "display":
                closing = _CLOSING[opening[0]]
                last = text.find(closing, inner)
                unclosed = len(text) if kind == "block" else blank_line_after(inner)
                end = last + len(closing) if last >= 0 else unclosed
            case "environment":
                end = _end_of_environment(text, opening["environment"], inner) or blank_line_after(inner)
            case "dollar":
                end = _end_of_dollars(text, inner, closing_brace)
            case "brace":
                end = closing_brace.get(start)
                if end is not None and blank_line_after(start) < end:
                    end = None
        if end is not None:
            found.append(Whole(start + shift, end + shift, kind in ("block", "inline_code")))
        position = inner if end is None else end
    return found


def _closing_braces(text: str) -> dict[int, int]:
    """Opening brace -> behind its closing brace, of those that have one."""
    opened: list[int] = []
    closing = {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.end()
    return closing


def _end_of_environment(text: str, name: str, start: int) -> int | None:
    depth = 1
    for match in re.compile(rf"\\(begin|end)\{{{re.escape(name)}\}}").finditer(text, start):
        depth += 1 if match[1] == "begin" else -1
        if depth == 0:
            return match.end()
    return None


def _end_of_dollars(text: str, start: int, closing_brace: dict[int, int]) -> int | None:
    """Behind the dollar sign that closes the formula opened before `start`; None where that is no formula."""
    position = start
    while found := _UNTIL_DOLLAR.search(text, position):
        if found[0] == "$":
            is_formula = _is_formula(text[start : found.start()], text[found.end() : found.end() + 1])
            return found.end() if is_formula else None
        if found[0].startswith("\n"):
            return None
        position = closing_brace.get(found.start(), found.end())
    return None


def _is_formula(content: str, following: str) -> bool:
    """Whether what stands between two dollar signs is a formula: not the text from one amount of money to the
    next ("$5 and she has $"), nor the prose between two formulas."""
    words = _WORD.findall(_GROUP.sub("", content))
    uneven = content[:1].isspace() != content[-1:].isspace()
    if _AMOUNT.match(content):
        return not (words or uneven or following.isdigit() or following == "<")
    return len(words) < 3 and not (uneven and words)
