r"""Reading final answers as models and benchmarks write them: LaTeX, plain text and the code notation of
Minerva, in one grammar."""

from __future__ import annotations

import re

from pns.answers.parser import read_answer
from pns.answers.spelling import NUMBER_WORDS, TEXT, clean, is_prose
from pns.answers.tokens import Unreadable, split_tokens
from pns.answers.tree import INFINITY, Answer, Expression, Words, letter, whole

MAX_CHARACTERS = 2000
_SPACED = r"[1-9]\d{0,2}(?: +\d{3})+"
_GROUPED = re.compile(
    rf"(?<![\w.,}}'])(?:\d{{1,3}}(?:,\d{{3}})+|{_SPACED}|\d{{1,3}}(?:'\d{{3}})+|\d{{1,3}}(?:_\d{{3}})+"
    r"|\d{1,2}(?:,\d{2})+,\d{3})(?![\d,'_]|\.\d*,)"
    r"|(?<![\w.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])"
)
_SPACED_IN_LIST = re.compile(rf"(?<![\w.,]){_SPACED}(?![\d,])")
_WITH_BASE = re.compile(r"(.*\d)\s*_?\s*[({]?\s*(?:base|\\text\{\s*base)\s*[-~]?\s*(\d+|[a-z]+)\s*[)}]*")


def readings(answer: str) -> list[Answer]:
    """Every sensible reading of the answer, the likeliest first: `1,234` is a number and a list. Empty where
    it cannot be read."""
    if len(answer) > MAX_CHARACTERS:
        return []
    text = clean(answer)
    texts = [text]
    if not text.startswith(("(", "[", r"\{")):  # (1,234) is a pair
        joined = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
        if joined != text:
            texts = [joined, text] if "," in text else [joined]
    elif not text.startswith(r"\{"):
        texts = [_SPACED_IN_LIST.sub(lambda match: match[0].replace(" ", ""), text)]
    if pair := re.fullmatch(r"-?(\d+),(\d+)", text):
        whole, decimals = pair.groups()
        if whole == "0" or len(decimals) != 3:
            texts.append(text.replace(",", "."))  # a decimal comma
    answers: list[Answer] = []
    for reading in map(_read, texts):
        if reading is not None and reading not in answers:
            answers.append(reading)
    return answers


def _read(text: str) -> Answer | None:
    if not text or re.fullmatch(r"[-+*/^_=,.;:\s]*", text):
        return None
    bare = re.sub(TEXT, r" \1 ", text).strip().strip("\"'`").strip()
    word = bare.casefold()
    if match := re.fullmatch(r"(\(?)\s*([A-Za-z])\s*([.)]?)", bare):
        is_enclosed = match[1] and match[3]  # (a)
        is_choice = is_enclosed or match[2].isupper() or re.search(TEXT, text)
        return Words(match[2]) if is_choice else Expression(letter(match[2]))
    if word in NUMBER_WORDS:
        return Expression(whole(NUMBER_WORDS[word]))
    if word in ("infinity", "infinite"):
        return Expression(INFINITY)
    if is_prose(bare):
        return Words(re.sub(r"\s+", " ", re.sub(r"[.,;!?]+(?=\s|$)", "", word)).strip())
    if match := _WITH_BASE.fullmatch(bare):
        base = match[2] if match[2].isdigit() else str(NUMBER_WORDS.get(match[2], ""))
        text = f"{match[1].rstrip(' ({')}_{{{base}}}"
    try:
        return read_answer(split_tokens(text))
    except (Unreadable, RecursionError):
        return None
