"""Numbers in words, and the words around an answer that are no part of it."""

from __future__ import annotations

import re
from fractions import Fraction

from pns.answers.spelling import TEXT, is_prose

_UNDER_TWENTY = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: value for value, word in enumerate(_UNDER_TWENTY)}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS, 2)}
SCALES = {"dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth".split()
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {word: value for value, word in enumerate(_ORDINALS, 3)}
_MOST_WORDS = 12

_NAME = r"[A-Za-z](?:_\{?\w\}?)?"
_NAMES = rf"{_NAME}(?:\s*(?:,|\band\b)\s*{_NAME})*"
_SET = r"(?:\\mathbb|\\mathbf|\\mathbb\s)?\s*\{?\s*[ZNQRC]\s*\}?(?:\s*[\^_]\s*\{?[*+0\d]\}?)?"
_KIND = r"""real reals positive negative nonnegative non-negative nonzero non-zero natural complex whole
arbitrary integral integer integers number numbers value values constant constants of the a an any all every
each some"""
_OF_KIND = rf"(?:\b(?:{'|'.join(_KIND.split())})\b\s*)+"
_CONDITION = rf"{_NAMES}\s*(?:(?:\\in\b|\bin\b)\s*{_SET}|\b(?:is|are|be)\s+{_OF_KIND})"
_CONDITION_BEHIND = re.compile(
    rf"(?:\b(?:for|where|with)\s+(?:{_CONDITION}|{_OF_KIND}(?:{_CONDITION}|{_NAMES})?)"
    rf"|[,;(]\s*{_CONDITION})[\s).]*$|(?:\||\\mid|:)\s*{_CONDITION}\s*(?=\\\}}$)"
)
_CONNECTIVE = re.compile(
    rf"[,\s]*(?:(?:{'|'.join(_KIND.split())}|for|where|with|is|are|be|in|answer)\s*)+:?\s*"
)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b[,:\s]+)?(?:(?:(?:the|our|my)\s+)?"
    r"(?:(?:final|correct|exact|required)\s+)?(?:answers?|result|solutions?|it|there|value)"
    r"(?:\s+(?:is|are|equals)\b\s*:?|\s*[:=])\s*|[a-z][a-z' ]{2,40}?\s(?:is|are|equals)\s(?=[-\d\\.]))?"
    r"(?:(?:exactly|precisely)\s+)?",
    re.IGNORECASE,
)
_STATED = re.compile(r"^([A-Za-z])\s+(?:is|equals|is equal to)\s+(?=[-\d\\.])")
_ABOUT = r"(?:approximately|approx\.?|about|roughly|around|nearly|almost)"
_ONLY_ABOUT = re.compile(rf"\s*\(?{_ABOUT}\)?\s*", re.IGNORECASE)
_ROUNDED = re.compile(
    rf"{_ABOUT}\s+(?P<behind>.*)|(?P<before>.*?\S)\s*(?:{_ABOUT}|\({_ABOUT}\))", re.IGNORECASE | re.DOTALL
)


def number_in_words(text: str) -> Fraction | None:
    """The number under a million millions that words in lower case state, with halves, thirds, quarters: "two
    hundred and five", "two thirds", "one and a half". None where they state none."""
    words = text.replace("-", " ").split()[: _MOST_WORDS + 1]
    if words[:1] in (["minus"], ["negative"]):
        value = number_in_words(" ".join(words[1:]))
        return None if value is None else -value
    if not words or len(words) > _MOST_WORDS:
        return None
    *before, last = words
    parts = _PARTS.get(last) or _PARTS.get(last.removesuffix("s"))
    if not parts:
        return _cardinal(words)
    if before in ([], ["one"], ["a"]):  # "third" alone is a place
        return Fraction(1, parts) if before or last == "half" else None
    if before[-1:] == ["and"] or (before[-1] not in NUMBER_WORDS and before[-1] != "a"):
        return None
    count = 1 if before[-1] == "a" else NUMBER_WORDS[before[-1]]
    whole = _cardinal(before[:-2]) if before[-2:-1] == ["and"] else None if before[:-1] else Fraction(0)
    if whole is None or count < 1 or (count > 1) != (last.removesuffix("s") != last):
        return None
    return whole + Fraction(count, parts)


def _cardinal(words: list[str]) -> Fraction | None:
    """A whole number: hundreds with tens and ones, times a scale."""
    for scale in ("trillion", "billion", "million", "thousand", "dozen"):
        if scale in words:
            place = words.index(scale)
            count = _cardinal(words[:place]) if words[:place] not in ([], ["a"]) else Fraction(1)
            rest = _cardinal(words[place + 1 :]) if words[place + 1 :] else Fraction(0)
            if count is None or rest is None or rest >= SCALES[scale] or (rest and scale == "dozen"):
                return None
            return count * SCALES[scale] + rest
    hundreds = 0
    if words[1:2] == ["hundred"]:
        hundreds = 1 if words[0] == "a" else NUMBER_WORDS.get(words[0], 0)
        words = words[3:] if words[2:3] == ["and"] and words[3:] else words[2:]
        if not 0 < hundreds < 10:
            return None
    values = [NUMBER_WORDS.get(word, -1) for word in words]
    match values:
        case []:
            return Fraction(100 * hundreds) if hundreds else None
        case [value] if value >= 0 and (value or not hundreds):
            return Fraction(100 * hundreds + value)
        case [tens, ones] if tens >= 20 and 0 < ones < 10:
            return Fraction(100 * hundreds + tens + ones)
    return None


def without_phrases(text: str) -> tuple[str, bool]:
    r"""The answer without what is said around it ("the answer is", "for all real x", `k \in
    \mathbb{Z}` behind a comma), and whether it is said to be rounded ("about 5")."""
    if not re.search("[A-Za-z]", text):
        return text, False
    plain = re.sub(TEXT, lambda match: f" {match[1]} " if _is_said(match[1]) else match[0], text).strip()
    plain = _STATED.sub(r"\1 = ", plain[_end(_LEAD, plain) :], count=1)
    rounded = _ROUNDED.fullmatch(plain)
    plain = (rounded["behind"] or rounded["before"]) if rounded else plain
    condition = None if is_prose(plain) else _CONDITION_BEHIND.search(plain, 1)
    if condition:
        plain = plain[: condition.start()].rstrip(" ,;") + plain[condition.end() :]
        plain += ")" if plain.count("(") > plain.count(")") else ""  # (x = 2k\pi, k \in \mathbb{Z})
    return plain or text, bool(rounded)


def _end(pattern: re.Pattern[str], text: str) -> int:
    """The end of what a pattern matches at the start of a text."""
    match = pattern.match(text)
    return match.end() if match else 0


def _is_said(words: str) -> bool:
    r"""Whether words in `\text{...}` are no unit or word of the answer itself."""
    return any(pattern.fullmatch(words) for pattern in (_CONNECTIVE, _LEAD, _ONLY_ABOUT))
