"""Taking the final answer out of a completion."""

from __future__ import annotations

import re

from pns.answers.spelling import is_prose

_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?:(?P<box>\{)|(?P<bare>-?\d+(?:[.,]\d+)*|\\[dt]?frac\s*(?:\d|\{[^{}]*\}){2}|[A-H]\b))"
    r"|\\.|[{}]",
    re.DOTALL,
)
_COMMAND = re.compile(r"\\+(?:boxed|fbox)")  # from the first backslash on: a pair of them is no command
_JOINED = re.compile(r"[,;]|\b(?:and|or)\b")
_JOINT = re.compile(
    r"(?:[\s$,;]|\\[()\[\], ]|\\quad|\\qquad|\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|\band\b|\bor\b)*"
)
_MAX_JOINT = 40  # characters between two boxes of one answer
_STATED = re.compile(r"\banswer\s*(?:is\s*:?|:|=)\s*|####\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s+(?=[A-Z<])|\n|<\|")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_MAX_BARE = 500  # characters of a prediction without a box that is read as the answer itself


def extract_boxed(text: str, think_tags: tuple[str, str] = ("<think>", "</think>")) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces balance or of `\boxed 5`,
    stripped; None where there is none or it is empty.

    Boxes that are joined to the last one by nothing but commas, "and" or "or" state one answer: their
    contents, joined by ", ". A box inside a reasoning block that is never closed is not an answer. Where the
    prompt already opens the block, put its opening before `text`.
    """
    text = _finished(text, think_tags)
    spans = _boxes(text)
    if not spans:
        return None
    first = len(spans) - 1
    while first and _is_joint(text, spans[first - 1][1], spans[first][0]):
        first -= 1
    contents = [text[start:end].strip() for start, end in spans[first:]]
    return ", ".join(contents) or None


def extract_answer(text: str, think_tags: tuple[str, str] = ("<think>", "</think>")) -> str | None:
    r"""The final answer of a completion or of a bare answer: the box (`extract_boxed`). Where there is no box
    at all, what follows the last "answer is", "answer:" or "####" up to the end of its sentence, else the
    text. If at most 500 characters, that is the answer, or the formula between dollar signs, `\(...\)` or
    `\[...\]` that ends it when it is a sentence. None where there is nothing of these."""
    finished = _finished(text, think_tags)
    if re.search(r"\\(?:boxed|fbox)(?![A-Za-z])", finished):
        return extract_boxed(text, think_tags)
    final = finished.rpartition(think_tags[1])[2].strip()
    if statements := list(_STATED.finditer(final)):
        final = _SENTENCE_END.split(final[statements[-1].end() :].strip(), maxsplit=1)[0].strip()
    if len(final) > _MAX_BARE:
        return None
    final = final.rstrip(". \n").strip("*").rstrip(". \n")  # also of what stands in bold type
    formulas = list(_FORMULA.finditer(final))
    if formulas and formulas[-1].end() == len(final):
        around = re.sub(r"[^A-Za-z' .,;!?-]", "", _FORMULA.sub(" ", final)).strip()
        if is_prose(around) or (not around and len(formulas) == 1):
            return (formulas[-1][formulas[-1].lastindex or 0]).strip() or None
    return final or None


def boxed_span(text: str) -> tuple[int, int] | None:
    """Start and end of the content of the last box of `text` whose braces balance; `end` is the position of
    its closing brace, if it has braces."""
    spans = _boxes(text)
    return spans[-1] if spans else None


def _finished(text: str, think_tags: tuple[str, str]) -> str:
    """The text without a reasoning block that is never closed."""
    opening, closing = think_tags
    unclosed = text.find(opening, text.rfind(closing) + 1)
    return text if unclosed < 0 else text[:unclosed]


def _boxes(text: str) -> list[tuple[int, int]]:
    """Spans of the contents of all balanced boxes, by their start."""
    opened: list[int | None] = []  # per open brace: start of the content if the brace opens a box
    spans = []
    first = _COMMAND.search(text)
    # What a brace before the first box opens is never a box's content.
    for match in _BOX.finditer(text, first.start()) if first else ():
        if match["box"]:
            opened.append(match.end())
        elif match["bare"]:
            spans.append(match.span("bare"))
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                spans.append((start, match.start()))
    return sorted(spans)


def _is_joint(text: str, end: int, start: int) -> bool:
    """Whether a box whose content ends at `end` and one whose content starts at `start` state one answer."""
    command = text.rfind("\\", end, start)
    between = text[end:command].removeprefix("}") if command >= end else ""
    return len(between) <= _MAX_JOINT and bool(_JOINED.search(between) and _JOINT.fullmatch(between))
