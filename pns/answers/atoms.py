"""The smallest parts of an answer, read from its tokens: numbers, names and units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pns.answers.spelling import GREEK, NUMBER_WORDS
from pns.answers.tokens import SEPARATORS, Cursor, Token, Unreadable
from pns.answers.tree import Based, Number, Symbol, Tree, letter
from pns.answers.units import CURRENCIES, UNIT_LETTERS

_MAX_DIGITS = 2000  # of one number
_MAX_EXPONENT = 3000  # of scientific notation; 1e999999999 is no number that could be written down
_FUNCTION_LETTERS = frozenset("fghFGH")  # with a bracket behind it such a letter is a function, not a factor
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALES = {"dozen": 12} | {name: 10**power for name, power in _POWERS.items()}
_AROUND_NUMBERS = ("$", r"\$", r"\%", "%", "{", "}")
_DECIMAL = re.compile(
    r"\d*\.(?P<decimals>\d*)(?:[eE](?P<exponent>[+-]?\d+))?"
    r"(?:(?:\\times|\\cdot|\*)10\^(?P<power>[+-]?\d+)|(?:\^|\\circ).*)?"
)


@dataclass
class Marks:
    """What an expression has besides its tree, as in `Expression`; filled in while it is read."""

    unit: str = ""
    percent: bool = False
    degrees: bool = False
    ambiguous: bool = False


def number_value(written: str) -> Fraction:
    mantissa, _, exponent = written.casefold().partition("e")
    if len(mantissa) > _MAX_DIGITS or abs(int(exponent[:9] or 0)) > _MAX_EXPONENT:
        raise Unreadable
    whole, _, decimals = mantissa.partition(".")
    return Fraction(int((whole + decimals) or 0), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0)


def read_number(cursor: Cursor, written: str) -> Number | Based:
    """The number that begins with a token: with its base, its fraction or its repeating decimals."""
    value = number_value(written)
    if cursor.accept("_"):
        base = _read_base(cursor)
        if not 2 <= base <= 36 or not re.fullmatch(r"\d+", written):
            raise Unreadable
        return Based(written.lstrip("0") or "0", base)
    before_fraction = cursor.peek().kind == "number" and cursor.peek(1).value == "/"
    if before_fraction or (written.isdigit() and cursor.at(r"\frac")):
        return _read_mixed(cursor, value) or Number(value)
    if "." in written and cursor.accept(r"\overline", r"\bar", r"\dot"):
        repeating = _fraction_digits(cursor)
        if repeating is None or not repeating.isdigit() or len(repeating) > 50:
            raise Unreadable
        places = len(written.partition(".")[2])
        return Number(value + Fraction(int(repeating), (10 ** len(repeating) - 1) * 10**places))
    return Number(value)


def _read_base(cursor: Cursor) -> int:
    base = cursor.raw_group().strip("()") or cursor.raw_group() + cursor.expect(")")  # _2, _{two}, _(2)
    base = base.strip("()").casefold()
    return int(base[:4]) if base.isdecimal() else NUMBER_WORDS.get(base, 0)


def _read_mixed(cursor: Cursor, whole: Fraction) -> Number | None:
    r"""`1\frac{4}{5}` and `3 1/2`: a proper fraction of two plain numbers after a whole number adds to it."""
    start = cursor.position
    if cursor.accept(r"\frac"):
        digits = [_fraction_digits(cursor), _fraction_digits(cursor)]
    else:
        digits = [cursor.take().value, cursor.take().value, cursor.take().value][::2]
    if all(re.fullmatch(r"\d{1,9}", part) for part in digits) and not cursor.at("^", "!"):
        numerator, denominator = map(int, digits)
        if 0 < numerator < denominator:
            return Number(whole + Fraction(numerator, denominator))
    cursor.position = start
    return None


def _fraction_digits(cursor: Cursor) -> str:
    r"""The digits of a `\frac` argument; "" where it is anything else."""
    if cursor.at_digit() or cursor.peek().kind == "number":
        return cursor.take().value
    if cursor.at("{") and cursor.peek(1).kind == "number" and cursor.peek(2).value == "}":
        cursor.position += 3
        return cursor.peek(-2).value
    return ""


def last_place(tokens: Sequence[Token]) -> Fraction | None:
    """The place value of the last digit of a decimal, plain or scientific; None where the tokens are anything
    else."""
    values = [token.value for token in tokens if token.kind != "text" and token.value not in _AROUND_NUMBERS]
    decimal = _DECIMAL.fullmatch("".join(values).lstrip("+-"))
    if not decimal:
        return None
    power = int(decimal["power"] or decimal["exponent"] or 0)
    return None if abs(power) > _MAX_EXPONENT else Fraction(10) ** (power - len(decimal["decimals"]))


def read_symbol(cursor: Cursor, name: str, marks: Marks) -> Tree:
    """The symbol that begins with `name`, with its index, its primes and the argument of a function."""
    plain = name
    if cursor.accept("_"):
        name += "_" + cursor.raw_group()
    while True:
        if cursor.accept("'"):
            name += "'"
        elif cursor.at("^") and cursor.peek(2 if cursor.peek(1).value == "{" else 1).value == r"\prime":
            cursor.take()
            name += "'" * cursor.raw_group().count("prime")
        else:
            break
    ahead = "".join(cursor.peek(place).value for place in range(6))
    if plain in _FUNCTION_LETTERS and ahead == "^{-1}(":  # f^{-1}(x), the inverse function
        cursor.position += 5
        name += "^-1"
    if cursor.at("(") and (argument := _read_argument(cursor, plain)):
        marks.ambiguous |= plain not in _FUNCTION_LETTERS  # a(x) may be a product
        return Symbol(name + argument)
    return letter(name)


def _read_argument(cursor: Cursor, name: str) -> str:
    """The bracket of `f(x)`, `I(0)` as text; "" where it is a factor: `n(n+1)`."""
    closing, level = 0, 1
    while level:
        closing += 1
        token = cursor.peek(closing)
        if token.kind == "end":
            raise Unreadable
        level += {"(": 1, ")": -1}.get(token.value, 0)
    inner = cursor.peek(1)
    is_simple = closing == 2 and (inner.kind in ("number", "letter") or inner.value[1:] in GREEK)  # V(\theta)
    if name in ("e", "i") or not (is_simple or name in _FUNCTION_LETTERS):  # e(1+i) is a product
        return ""
    tokens = cursor.tokens[cursor.position + 1 : cursor.position + closing]
    cursor.position += closing + 1
    return "(" + "".join(token.value for token in tokens) + ")"


def read_derivative(cursor: Cursor) -> Symbol | None:
    r"""The arguments of `\frac{dM}{dt}` as one symbol: as a fraction its d would cancel. None where they are
    a fraction's."""
    start = cursor.position
    if cursor.at("{") and cursor.peek(1).value in ("d", r"\partial"):
        upper = cursor.raw_group()
        if cursor.at("{") and cursor.peek(1).value in ("d", r"\partial"):
            return Symbol(f"{upper}/{cursor.raw_group()}")
    cursor.position = start
    return None


def skip_set_builder(cursor: Cursor) -> None:
    r"""Skip `x |` and `x \in R :` of a set given by a condition."""
    start = cursor.position
    is_letter = cursor.take().kind == "letter"
    if cursor.accept(r"\in"):
        cursor.take()
        if cursor.at("{"):
            cursor.raw_group()
    if not is_letter or not cursor.accept("|", r"\mid", ":", r"\vert"):
        cursor.position = start


def read_unit(cursor: Cursor, marks: Marks, tree: Tree) -> int:
    """Read the unit after an expression into the marks; returns the factor of words like "million"."""
    if cursor.peek().value in CURRENCIES and not marks.unit:
        marks.unit = CURRENCIES[cursor.take().value]
    if tree.symbols:
        token = cursor.peek()
        if token.kind in ("text", "word") and token.word not in SEPARATORS:
            marks.unit = cursor.take().word
            marks.ambiguous = True
        return 1
    scale = 1
    parts: list[str] = []
    while True:
        if parts and cursor.at("/") and cursor.peek(1).kind in ("text", "word", "letter"):  # km/h
            parts.append(cursor.take().value)
        words = cursor.peek().word.split()
        if not parts and at_unit_letter(cursor):
            words = [cursor.peek().value.casefold()]
            marks.ambiguous = True
        if not words or (len(words) == 1 and words[0] in SEPARATORS):  # "5 and 6"
            break
        cursor.take()
        if words[0].rstrip(".") in ("percent", "pct", "percentage") and not parts:
            marks.percent = True
            continue
        while words and words[0] in _SCALES:  # "5 million dollars"
            scale *= _SCALES[words.pop(0)]
        power = ""
        if cursor.peek(1).value != r"\circ" and cursor.accept("^"):
            power = "^" + cursor.accept("-") + cursor.raw_group()
        if not re.fullmatch(r"(\^-?\d+)?", power):
            raise Unreadable
        if words:
            parts.append(" ".join(words) + power)
        cursor.accept(".")
    marks.unit = " ".join([marks.unit, *parts]).strip()
    return scale


def at_unit_letter(cursor: Cursor) -> bool:
    """Whether a single letter after a number may be its unit: `5 m`, `5 m^2` and nothing behind it."""
    token = cursor.peek()
    if token.kind != "letter" or not token.spaced or token.value not in UNIT_LETTERS:
        return False
    behind = 1
    if cursor.peek(1).value == "^":
        behind += 4 if cursor.peek(2).value == "{" else 2  # m^{2}, m^2
    following = cursor.peek(behind)
    if following.value == "/":
        return cursor.peek(behind + 1).kind in ("text", "letter")
    return following.kind == "end" or following.value in (",", ";", ")", "]")
