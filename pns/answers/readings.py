r"""Reading final answers as models and benchmarks write them: LaTeX, plain text and the code notation of
Minerva, in one grammar."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

from pns.answers.parser import read_answer
from pns.answers.spelling import CHOSEN, TEXT, TEXT_OPENING, clean, counted, is_prose
from pns.answers.tokens import Unreadable, split_tokens
from pns.answers.tree import INFINITY, Answer, Based, Expression, Number, Words, letter
from pns.answers.units import unit_size
from pns.answers.words import NUMBER_WORDS, number_in_words, without_phrases

MAX_CHARACTERS = 2000
_SPACED = r"[1-9]\d{0,2}(?: +\d{3})+"
_GROUPED = re.compile(
    rf"(?<![\w.,}}'])(?:[1-9]\d{{0,2}}(?:,\d{{3}})+|{_SPACED}|\d{{1,3}}(?:'\d{{3}})+|\d{{1,3}}(?:_\d{{3}})+"
    r"|\d{1,2}(?:,\d{2})+,\d{3})(?![\d,'_]|\.\d*,)"
    r"|(?<![\w.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])"
)
_SPACED_IN_LIST = re.compile(rf"(?<![\w.,]){_SPACED}(?![\d,])")
_DECIMAL_COMMA = re.compile(r"([-+]?)(\d+),(\d+)(?![\d.])([^,]*)")
_EUROPEAN = re.compile(r"-?\d{1,3}(?:\.\d{3})+,\d+")
# Digits above nine.
_IN_LETTERS = re.compile(r"(?=.*\d.*_)(?P<digits>[\dA-F]*[A-F][\dA-F]*)_\{?(?P<base>1[1-6])\}?")
_HEXADECIMAL = re.compile(r"0x[\dA-Fa-f]+")
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)\\text\{([aApP])meridiem\}")
_POINT = re.compile(r"[A-Z](?:_\d)?'?\s*(\([^()]*,[^()]*\))")  # a point with its name
_UNIT_IN_BRACKETS = re.compile(
    r"(.*[\d}])\s+\((?:\\(?:text|mathrm)\s*\{)?\s*([A-Za-z/^\d ]{1,30})\}?\)", re.DOTALL
)
_CHOICE = re.compile(
    rf"(?:\(([A-J])\)|{TEXT_OPENING} ?\(([A-J])\) ?\}}|{TEXT_OPENING} ?([A-J])[.:)] ?\}}"
    r"|([A-J])(?:[.)]|:(?= )(?!.*:)))"
    r"(?! ?(?:[-+*/^_=<>,.:;)(']|\\(?:cdot|times|in|le|ge|ne|cup|cap)(?![a-z])|(?:\\text\{ ?)?(?:and|or)\b))"
    r" ?(?P<text>(?!.*\([A-J]\)).*)"
)
_WITH_BASE = re.compile(r"(.*\d)\s*_?\s*[({]?\s*(?:base|\\text\{\s*base)\s*[-~]?\s*(\d+|[a-z]+)\s*[)}]*")


def readings(answer: str) -> list[Answer]:
    """Every sensible reading of the answer, the likeliest first: `1,234` is a number and a list. Empty where
    it cannot be read."""
    if len(answer) > MAX_CHARACTERS:
        return []
    if answer.isascii() and answer.isdigit():
        return [Expression(Number(Fraction(answer)))]
    text, is_rounded = without_phrases(clean(answer))
    if len(text) > MAX_CHARACTERS:
        return []
    if choice := _CHOICE.fullmatch(text):
        label = next(filter(None, choice.groups()))
        return [Words(label), *_distinct(map(_read, _spellings(choice["text"])))]
    return [
        replace(reading, ambiguous=True) if is_rounded and isinstance(reading, Expression) else reading
        for reading in _distinct(map(_read, _spellings(text)))
    ]


def _distinct(readings: Iterable[Answer | None]) -> list[Answer]:
    found: list[Answer] = []
    for reading in readings:
        if reading is not None and reading not in found:
            found.append(reading)
    return found


def _spellings(text: str) -> list[str]:
    """The text with what is ambiguous in it written out, the likeliest first."""
    texts = [CHOSEN.sub(counted, text)]
    if not text.startswith(("(", "[", r"\{")):  # (1,234) is a pair
        joined = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
        if joined != text:
            texts = [joined, text] if "," in text else [joined]
    elif not text.startswith(r"\{"):
        texts = [_SPACED_IN_LIST.sub(lambda match: match[0].replace(" ", ""), text)]
    if decimal := _DECIMAL_COMMA.fullmatch(text):
        before, whole, decimals, behind = decimal.groups()
        if whole == "0" or len(decimals) != 3:
            texts.append(f"{before}{whole}.{decimals}{behind}")
    if _EUROPEAN.fullmatch(text) or (";" in text and "." not in text):
        texts.append(re.sub(r"(?<=\d),(?=\d)", ".", text.replace(".", "")))
    if time := _TIME.fullmatch(text):
        hour, minutes, half = time.groups()
        texts.append(f"{int(hour) % 12 + 12 * (half in 'pP')}:{minutes}")  # 19:30
        texts = texts[:1] if half in "aA" and hour != "12" else texts
    if point := _POINT.fullmatch(text):
        texts.append(point[1])
    if unit := _UNIT_IN_BRACKETS.fullmatch(text):
        texts = [rf"{unit[1]}\text{{{unit[2]}}}"] if unit_size(unit[2])[2] else texts
    return texts


def _read(text: str) -> Answer | None:
    if not text or re.fullmatch(r"[-+*/^_=,.;:\s]*", text) or _HEXADECIMAL.fullmatch(text):
        return None
    bare = re.sub(TEXT, r" \1 ", text).strip()
    if based := _IN_LETTERS.fullmatch(re.sub(r"\s", "", bare)):
        return Based(based["digits"].lstrip("0"), int(based["base"]))
    if quoted := re.fullmatch(r"([\"'`])(.*)\1", bare):
        bare = quoted[2].strip()
    word = bare.casefold()
    if match := re.fullmatch(r"(\(?)\s*([A-Za-z])\s*([.)]?)", bare):
        is_enclosed = match[1] and match[3]  # (a)
        is_choice = is_enclosed or match[2].isupper() or re.search(TEXT, text)
        return Words(match[2]) if is_choice else Expression(letter(match[2]))
    if number := _in_words(word):
        return number
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


def _in_words(text: str) -> Expression | None:
    """A number in words, alone or with a unit behind it: "twelve apples", "ten percent"."""
    words = text.split()
    for count in range(min(len(words), 12), max(len(words) - 4, 0), -1):
        if (value := number_in_words(" ".join(words[:count]))) is not None:
            unit = " ".join(words[count:])
            if unit in ("percent", "per cent"):
                return Expression(Number(value), percent=True)
            is_unit = not unit or unit_size(unit)[2] or re.fullmatch(r"[a-z ]*[a-rt-z]s|people|feet", unit)
            return Expression(Number(value), unit) if is_unit else None
    return None
