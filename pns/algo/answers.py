"""Final answers: taking them out of a completion, and a comparison that shares no code with math-verify.

The comparison is the second of the two verifiers that must agree before a completion counts as a negative. It therefore says
"different" only where it has read both sides as numbers, words or lists of them; of everything else it says that it cannot tell.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\.|[{}]", re.DOTALL)
_MAX_CHARACTERS = 300  # of an answer that is read as an expression; sampled text is untrusted
_MAX_DEPTH = 40  # of nested brackets
_MAX_BITS = 900  # of a numerator or denominator; larger values are not evaluated, and all others fit a float

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|rm)\s*\{([^{}]*)\}")
_TEXT_UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*(?!and\b|or\b)([^{},;\d]*[A-Za-z][^{},;\d]*)\}\s*((?:\^\s*\{?\d\}?)?)$")
_PLAIN_UNIT = re.compile(
    r"(?<=[\d)}])(?:\s+([A-Za-z]{3,}(?:[\s/]+[A-Za-z]{2,})*)|\s*(cm|mm|km|kg|mg|ft|in|yd|mi|lb|oz|ml|hr|mph))\.?\s*(\^\s*\{?\d\}?)?$"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b|°")
_CURRENCY = re.compile(r"\\\$|[£€]")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d./^{])(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*\\frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d)))(?![\d/])")
_ASSIGNED = re.compile(r"^([A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?)\s*=\s*([^=<>]+)$")
_TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+|\\[A-Za-z]+|[-+*/^(){}\[\]])\s*")

_NOT_UNITS = set(
    "factorial squared cubed sin cos tan cot sec log exp sqrt root roots mod base and plus minus times over choose infinity "  # noqa: SIM905
    "theta alpha beta gamma lambda pairs".split()
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "  # noqa: SIM905
        "seventeen eighteen nineteen twenty".split()
    )
}
_VAGUE_WORDS = set("none nothing null empty never impossible undefined infinite infinity unbounded diverges neither".split())  # noqa: SIM905
_POLAR_WORDS = ({"yes", "no"}, {"true", "false"})
_CONVERSIONS = {3, 7, 12, 24, 60, 3600}  # beside powers of ten: ratios that may be a change of unit


def extract_boxed(text: str, think_tags: tuple[str, str] = ("<think>", "</think>")) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces balance, stripped; None where there is none or it is empty.

    A box inside a reasoning block that is never closed is not an answer. Where the prompt already opens the block, put its opening
    before `text`.
    """
    opening, closing = think_tags
    unclosed = text.find(opening, text.rfind(closing) + 1)
    if unclosed >= 0:
        text = text[:unclosed]
    span = boxed_span(text)
    return (text[span[0] : span[1]].strip() or None) if span else None


def boxed_span(text: str) -> tuple[int, int] | None:
    """Start and end of the content of the last box of `text` whose braces balance; `end` is the position of its closing brace."""
    opened: list[int | None] = []  # per open brace: start of the content if the brace opens a box
    last: tuple[int, int] | None = None
    for match in _BOX.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    return last


def normalise_answer(answer: str) -> str:
    """One spelling of equal answers: exact numbers as `n` or `n/d` without separators and units (percents keep `%`), anything else
    without TeX decoration and spaces, words in lower case. Idempotent."""
    read = _read(answer)
    if isinstance(read.value, Fraction):
        return str(read.value) + ("%" if read.percent else "")
    return read.text


def exact_value(answer: str) -> Fraction | None:
    """The rational number an answer states (percents in percent, units dropped), None where it states none."""
    value = _read(answer).value
    return value if isinstance(value, Fraction) else None


def same_answer(gold: str, prediction: str) -> bool | None:
    """Whether two final answers are the same; None where that cannot be decided here.

    Numbers (with separators, fractions, roots, powers, pi) are compared exactly where they are rational. Not decided: symbolic
    expressions that are spelt differently, different units, a decimal that may be a rounding of the other side.
    """
    if not gold.strip() or not prediction.strip():
        return None
    a, b = _read(gold), _read(prediction)
    if a.name and b.name and a.name != b.name:
        return None
    if a.value is not None and b.value is not None:
        return _same_number(a, b)
    if a.items and b.items:
        return _same_items(a, b)
    if (a.value is None) != (b.value is None):
        return None
    if a.text == b.text:
        return True
    if a.word and b.word:
        return _same_word(a.text, b.text)
    return None


@dataclass(frozen=True)
class _Answer:
    """An answer as read: `value` if it is a number, `items` if it is a list, `word` if it is one word; `text` always."""

    text: str
    value: Fraction | float | None = None
    decimals: int = 0  # digits after the point where the number is written as a plain decimal
    percent: bool = False
    unit: str = ""
    name: str = ""  # left side of `x = 5`
    word: bool = False
    brackets: str = ""  # of a list; "" for a bare one
    items: tuple[_Answer, ...] = ()


def _core(answer: str) -> str:
    """Without wrappers that carry no meaning."""
    text = re.sub(r"(?<!\\)\$", "", answer).strip()
    text = re.sub(r"\\(?:left|right|displaystyle|limits|[dt]?big[gl]?)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = text.replace("{,}", ",").replace("−", "-").replace("–", "-").replace("π", r"\pi").replace("√", r"\sqrt")
    text = re.sub(r"\\[,;:! ]|~|\\quad|\\qquad", " ", text)
    return text.strip().rstrip(".").strip()


def _read(answer: str) -> _Answer:
    text = _core(answer)
    name = ""
    if assigned := _ASSIGNED.match(text):
        name, text = re.sub(r"[\s{}]", "", assigned[1]), assigned[2].strip()
    bare = _TEXT.sub(r"\1", text).strip()
    plain = re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", bare)).rstrip(".")
    if re.fullmatch(r"[A-Za-z' .,-]*[A-Za-z]{3}[A-Za-z' .,-]*", bare):
        plain = plain.casefold()
    if len(text) > _MAX_CHARACTERS:
        return _Answer(plain, name=name)
    if re.fullmatch(r"\(?[A-Za-z]\)?|[A-Za-z][A-Za-z'-]+", bare):
        word = bare.strip("()")
        word = word if len(word) == 1 else word.casefold()
        if word in _NUMBER_WORDS:
            return _Answer(word, Fraction(_NUMBER_WORDS[word]), name=name)
        return _Answer(word, name=name, word=True)
    number = _read_number(text, plain, name)
    if number.value is not None:
        return number
    brackets, items = _read_items(text)
    return _Answer(plain, name=name, brackets=brackets, items=items)


def _read_number(text: str, plain: str, name: str) -> _Answer:
    unit = ""
    if degrees := _DEGREES.search(text):
        text, unit = text[: degrees.start()] + " " + text[degrees.end() :], "degree"
    if _CURRENCY.search(text):
        text, unit = _CURRENCY.sub("", text), "dollar"
    text = text.strip()
    percent = re.search(r"(?:\\?%|\s*(?:\\text\{\s*)?percent\s*\}?)$", text)
    if percent:
        text = text[: percent.start()].strip()
    scale = 1
    if (found := _TEXT_UNIT.search(text)) and found.start() > 0:
        text, (unit, scale) = text[: found.start()].strip(), _unit(found[1], found[2])
    elif found := _PLAIN_UNIT.search(text):
        words = found[1] or found[2]
        if words.casefold().split()[0] not in _NOT_UNITS:
            text, (unit, scale) = text[: found.start()].strip(), _unit(words, found[3] or "")
    decimal = re.fullmatch(r"-?[\d,]*\.(\d+)", text)
    value = _evaluate(text, scale)
    if value is None:
        return _Answer(plain)
    return _Answer(plain, value, len(decimal[1]) if decimal else 0, bool(percent), unit, name)


def _unit(words: str, power: str) -> tuple[str, int]:
    """The unit in one spelling, and the factor of a leading scale word ("5 million people")."""
    scale = 1
    parts = words.casefold().split()
    while parts and parts[0] in _SCALES:
        scale *= _SCALES[parts.pop(0)]
    unit = " ".join(part[:-1] if len(part) > 3 and part.endswith("s") else part for part in parts)
    return unit.rstrip(".") + re.sub(r"[\s{}]", "", power), scale


def _read_items(text: str) -> tuple[str, tuple[_Answer, ...]]:
    """Brackets and items of a tuple, an interval, a set or a bare list; no items where there is no comma at the top level."""
    text = re.sub(r"\s*,?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*", ",", text)
    text = text.replace(r"\{", "⟨").replace(r"\}", "⟩").strip()
    brackets = ""
    if len(text) > 1 and text[0] in "([⟨" and text[-1] in ")]⟩":
        brackets, text = text[0] + text[-1], text[1:-1]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{⟨") - (character in ")]}⟩")
        if depth < 0:
            return "", ()
        if character in ",;" and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    if len(parts) < 2 or not all(part.strip() for part in parts):
        return "", ()
    return brackets, tuple(_read(part.replace("⟨", r"\{").replace("⟩", r"\}")) for part in parts)


def _same_number(a: _Answer, b: _Answer) -> bool | None:
    x, y = a.value, b.value
    if x is None or y is None:
        return None
    if a.unit and b.unit and a.unit != b.unit:
        return None
    if a.percent != b.percent and (_equal(x, y * 100) if a.percent else _equal(x * 100, y)):
        return True
    equal = _equal(x, y)
    if equal is not False:
        return equal
    if "," in a.text and "," in b.text and sorted(a.text.split(",")) == sorted(b.text.split(",")):
        return None  # 100,200 and 200,100 may be lists
    for decimal, other in ((a, b), (b, a)):
        if decimal.decimals and abs(Fraction(x) - Fraction(y)) < Fraction(1, 10**decimal.decimals) and other.decimals != decimal.decimals:
            return None  # possibly the other side rounded
    if a.unit != b.unit and x and y and _is_conversion(Fraction(x) / Fraction(y)):
        return None
    return False


def _equal(x: Fraction | float, y: Fraction | float) -> bool | None:
    """Exact for rationals; with an irrational side, equal to 1e-12 and different from 1e-6 on (relative)."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    difference = abs(float(x) - float(y)) / max(abs(float(x)), abs(float(y)), 1e-300)
    return True if difference < 1e-12 else False if difference > 1e-6 else None


def _is_conversion(ratio: Fraction) -> bool:
    size = Fraction(abs(ratio.numerator), ratio.denominator)
    whole = max(size, 1 / size)
    return whole.denominator == 1 and (whole.numerator in _CONVERSIONS or str(whole.numerator).strip("0") == "1")


def _same_items(a: _Answer, b: _Answer) -> bool | None:
    ordered = a.brackets not in ("", "⟨⟩")
    if {a.brackets, b.brackets} - {"", "⟨⟩"} and a.brackets != b.brackets:
        return None
    if ordered:
        if len(a.items) != len(b.items):
            return False
        compared = [_compare_read(x, y) for x, y in zip(a.items, b.items, strict=True)]
        return False if False in compared else None if None in compared else True
    values_a, values_b = {item.value for item in a.items}, {item.value for item in b.items}
    if all(isinstance(value, Fraction) for value in values_a | values_b):
        return values_a == values_b
    return True if sorted(item.text for item in a.items) == sorted(item.text for item in b.items) else None


def _compare_read(a: _Answer, b: _Answer) -> bool | None:
    if a.value is not None and b.value is not None:
        return _same_number(a, b)
    return True if a.text == b.text else None


def _same_word(a: str, b: str) -> bool | None:
    """Two different words. Not decided: letters that differ in case only, abbreviations, plurals, words for "there is none"."""
    a, b = a.casefold(), b.casefold()
    if {a, b} in _POLAR_WORDS:
        return False
    if {a, b} & (_VAGUE_WORDS | _POLAR_WORDS[0] | _POLAR_WORDS[1]) or a.startswith(b) or b.startswith(a):
        return None
    return False


class _NotANumber(Exception):
    pass


def _evaluate(text: str, scale: int) -> Fraction | float | None:
    """`scale` times the value of a closed expression (exact where it is rational), None where it is not one or too large to evaluate."""
    if not text.startswith(("(", "[")):  # (1,234) is a pair
        text = _THOUSANDS.sub(lambda match: re.sub(r"[, ]", "", match[0]), text)
    text = re.sub(r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·]", "*", text)
    text = re.sub(r"\\div(?![A-Za-z])|÷", "/", text)
    text = _MIXED.sub(lambda m: "({}+{}/{})".format(*[group for group in m.groups() if group]), text)
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        tokens.append(match[1])
        position = match.end()
    parser = _Parser(tokens[::-1])
    try:
        value = _bounded(parser.sum() * scale)
        return None if parser.tokens else value
    except (_NotANumber, ZeroDivisionError, OverflowError):
        return None


class _Parser:
    """Recursive descent over `tokens`, kept in reverse order; `2\\sqrt{3}` multiplies, two adjacent numbers are an error."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *expected: str) -> str:
        if not self.tokens or (expected and self.tokens[-1] not in expected):
            raise _NotANumber
        return self.tokens.pop()

    def sum(self) -> Fraction | float:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotANumber
        value = self.product()
        while self.peek() in ("+", "-"):
            operator = self.take()
            right = self.product()
            value = _bounded(value + right if operator == "+" else value - right)
        self.depth -= 1
        return value

    def product(self) -> Fraction | float:
        value = self.signed()
        while token := self.peek():
            if token in ("*", "/"):
                self.take()
                right = self.signed()
                value = _bounded(value * right if token == "*" else value / right)
            elif token in ("(", "{") or token.startswith("\\"):
                value = _bounded(value * self.power())
            else:
                return value
        return value

    def signed(self) -> Fraction | float:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        return sign * self.power()

    def power(self) -> Fraction | float:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.signed_atom()
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent) * bits > _MAX_BITS:
                raise _NotANumber
            return base ** int(exponent)
        if base < 0:
            raise _NotANumber
        return _bounded(float(base) ** float(exponent))

    def signed_atom(self) -> Fraction | float:
        sign = -1 if self.peek() == "-" else 1
        if sign < 0:
            self.take()
        return sign * self.atom()

    def atom(self) -> Fraction | float:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return _bounded(Fraction(token))
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token == r"\pi":
            return math.pi
        if token == r"\frac":
            numerator = self.argument()
            return _bounded(numerator / self.argument())
        if token == r"\sqrt":
            degree: Fraction | float = Fraction(2)
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return _root(self.argument(), degree)
        raise _NotANumber

    def argument(self) -> Fraction | float:
        r"""A TeX argument: a group, a command, or one digit (`\frac12`)."""
        token = self.peek()
        if token[:1].isdigit() and len(token) > 1:
            self.take()
            self.tokens.append(token[1:])
            return Fraction(token[0])
        return self.atom()


def _root(value: Fraction | float, degree: Fraction | float) -> Fraction | float:
    if value < 0 or degree < 2:
        raise _NotANumber
    if degree == 2 and isinstance(value, Fraction):
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root * root == value:
            return root
    return _bounded(float(value) ** (1 / float(degree)))


def _bounded(value: Fraction | float) -> Fraction | float:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _NotANumber
    elif max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _NotANumber
    return value
