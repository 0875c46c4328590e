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
_PARTS = "half third quarter fourth fifth sixth seventh eighth ninth tenth".split()
_PART_SIZES = dict(zip(_PARTS, (2, 3, 4, 4, 5, 6, 7, 8, 9, 10), strict=True)) | {"halve": 2}
_ONES = "|".join(_UNDER_TWENTY[1:10])
_SEVERAL = _ONES.removeprefix("one|")
_SMALL = rf"(?:(?:{'|'.join(_TENS)})(?: (?:{_ONES}))?|{'|'.join(_UNDER_TWENTY[1:])})"
_HUNDREDS = rf"(?:(?:a|{_ONES}) hundred(?: (?:and )?{_SMALL})?|{_SMALL})"
_WHOLE = rf"(?:(?:(?:a|{_HUNDREDS}) )?(?:{'|'.join(SCALES)})(?: (?:and )?{_HUNDREDS})?|{_HUNDREDS}|zero)"
_NUMBER = re.compile(
    rf"(?P<sign>(?:minus|negative) )?(?:(?P<whole>{_WHOLE})|half|(?:(?P<before>{_WHOLE}) and )?"
    rf"(?:(?:a|one) (?P<part>{'|'.join(_PARTS)})|(?P<count>{_SEVERAL}) (?P<parts>{'|'.join(_PART_SIZES)})s))"
)

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
    """The number that words in lower case state, with halves, thirds, quarters: "two hundred and five", "two
    thirds", "one and a half". None where they state none: "third" alone may be a place."""
    number = _NUMBER.fullmatch(text.replace("-", " "))
    if not number:
        return None
    if number["whole"]:
        value = Fraction(_whole(number["whole"]))
    else:
        part = number["part"] or number["parts"] or "half"
        value = _whole(number["before"] or "") + Fraction(_whole(number["count"] or "a"), _PART_SIZES[part])
    return -value if number["sign"] else value


def _whole(text: str) -> int:
    """The value of a whole number in words."""
    total = part = 0
    for word in text.split():
        if word in SCALES:
            total, part = (part or 1) * SCALES[word], 0
        else:
            part = part * 100 if word == "hundred" else part + NUMBER_WORDS.get(word, word == "a")
    return total + part


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
