"""The smallest parts of an answer, read from its tokens: numbers, names and units."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pns.answers.exact import Budget, approximate, same_value
from pns.answers.relations import ascending
from pns.answers.spelling import GREEK
from pns.answers.tokens import SEPARATORS, Cursor, Token, Unreadable
from pns.answers.tree import (
    DEGREE,
    REALS,
    Answer,
    Based,
    Expression,
    Group,
    Number,
    Operation,
    Product,
    Relation,
    Symbol,
    Tree,
    Union,
    letter,
)
from pns.answers.units import CURRENCIES, UNIT_LETTERS, unit_size
from pns.answers.words import NUMBER_WORDS, SCALES

_MAX_DIGITS = 2000  # of one number
_MAX_EXPONENT = 3000  # of scientific notation; 1e999999999 is no number that could be written down
_NUMBER_SETS = {*"NZQC", *("mathbb" + name for name in ("N", "Z", "Q", "R", "C"))}
_FUNCTION_LETTERS = frozenset("fghFGH")  # with a bracket behind it such a letter is a function, not a factor
_SCALES = SCALES | {"hundred": 100}
_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\w+)?"
_DERIVATIVE = re.compile(rf"(d|\\partial)(\^\d)?({_NAME}(?:\([A-Za-z]\))?)?/(?:\1{_NAME}(?:\^\d)?)+")
_STOPS = (",", ";", "]", "=", "<", ">")  # behind a unit
_MAX_UNIT_TOKENS = 40
_UNIT_NAME = r"[A-Za-z][A-Za-z.]*(?:\^-?\d+)?"
_UNIT = re.compile(rf"{_UNIT_NAME}(?:\s*/\s*{_UNIT_NAME}|\s+{_UNIT_NAME})*")
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
        if not repeating.isdigit() or len(repeating) > 50:
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
    while cursor.accept("'"):
        name += "'"
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
    a fraction's: `\frac{d}{2}`, `\frac{dk}{d+1}`."""
    if not cursor.at("{") or cursor.peek(1).value not in ("d", r"\partial"):
        return None
    start = cursor.position
    upper, lower = cursor.raw_group(), cursor.raw_group()
    derivative = _DERIVATIVE.fullmatch(f"{upper}/{lower}")
    if derivative and not derivative[3]:  # of what is behind it
        raise Unreadable
    cursor.position = cursor.position if derivative else start
    return Symbol(derivative[0]) if derivative else None


def read_unit(cursor: Cursor, marks: Marks, tree: Tree) -> int:
    """Read the unit after an expression into the marks; returns the factor of words like "million"."""
    if cursor.peek().value in CURRENCIES and not marks.unit:
        marks.unit = CURRENCIES[cursor.take().value]
    if tree.symbols:
        token = cursor.peek()
        if token.kind in ("text", "word") and token.word not in SEPARATORS:
            marks.unit = cursor.take().value.strip()
            marks.ambiguous = True
        return 1
    if unit := at_unit(cursor):
        marks.unit = f"{marks.unit} {unit.name}".strip()
        marks.ambiguous |= unit.is_of_letters
        cursor.position = unit.end
        return 1
    scale = 1
    parts: list[str] = []
    while True:
        if parts and cursor.at("/") and cursor.peek(1).kind in ("text", "word"):  # apples/day
            parts.append(cursor.take().value)
        words = cursor.peek().value.split() if cursor.peek().word else []
        if not words or (len(words) == 1 and words[0].casefold() in SEPARATORS):  # "5 and 6"
            break
        cursor.take()
        first = words[0].casefold().rstrip(".")
        if first in ("percent", "pct", "percentage") and not parts:
            marks.percent = True
            continue
        if first in ("degree", "degrees", "deg") and not parts and not marks.unit:
            if len(words) == 1 and not cursor.peek().word:
                marks.degrees = True
                break
            words = words[1:]  # degrees Celsius
        while words and words[0].casefold() in _SCALES:  # "5 million dollars"
            scale *= _SCALES[words.pop(0).casefold()]
        power = _unit_power(cursor)
        if words:
            parts.append(" ".join(words) + power)
        cursor.accept(".")
    marks.unit = " ".join([marks.unit, *parts]).strip()
    return scale


def _unit_power(cursor: Cursor) -> str:
    if cursor.peek(1).value == r"\circ" or not cursor.accept("^"):
        return ""
    power = cursor.accept("-") + cursor.raw_group()
    if not re.fullmatch(r"-?\d+", power):
        raise Unreadable
    return "^" + power


@dataclass(frozen=True)
class Unit:
    name: str  # as `unit_size` reads it
    end: int  # the place behind its last token
    is_of_letters: bool  # that might be variables as well
    is_one_letter: bool


def at_unit(cursor: Cursor) -> Unit | None:
    r"""The unit at a place behind a number, if all its names are known and the end follows: `5 m`, `5 m/s^2`,
    `5 kg \cdot m/s^2`, `5 \frac{m}{s}`."""
    first, tokens, level = cursor.peek(), list[Token](), 0
    for token in cursor.tokens[cursor.position :][:_MAX_UNIT_TOKENS]:
        level += {"(": 1, ")": -1}.get(token.value, 0)  # J/(kg K)
        if level < 0 or token.value in _STOPS:
            break
        tokens.append(token)
    written = "".join(f" {token.value} " if token.spaced or token.word else token.value for token in tokens)
    written = re.sub(r"\}\s*\{", "/", written) if first.value == r"\frac" else written
    name = re.sub(r"\s*\^\s*", "^", re.sub(r"\\frac|\\cdot|[{}()*]", " ", written).strip())
    if written.count("{") != written.count("}") or not _UNIT.fullmatch(name) or not unit_size(name)[2]:
        return None
    has_only_letters = not any(token.word for token in tokens)
    is_one_letter = has_only_letters and len(re.findall("[A-Za-z]+", name)) == 1
    is_likely = "/" in name or "^-" in name or (first.spaced if is_one_letter else name[0] == "N")
    if has_only_letters and not (is_likely and (first.value in UNIT_LETTERS or not is_one_letter)):
        return None
    return Unit(name, cursor.position + len(tokens), has_only_letters, is_one_letter)


def in_degrees(tree: Tree) -> Tree | None:
    """The number of degrees that an expression is as a whole; None where only a part of it is in degrees."""
    number = _without_degrees(tree)
    return number if same_value(tree, number * DEGREE, Budget()) else None


def _without_degrees(tree: Tree) -> Tree:
    match tree:
        case Product((number, unit)) if unit == DEGREE:
            return number
        case Operation(parts):
            return replace(tree, parts=tuple(map(_without_degrees, parts)))
    return tree


def is_domain(answer: Answer) -> bool:
    r"""Whether it says no more than where a name lies: `k \in \mathbb{Z}`."""
    match answer:
        case Relation(("in",), (Expression(Symbol()), Expression(Symbol(name)))):
            return name in _NUMBER_SETS
        case Relation(("in",), (Expression(Symbol()), place)):
            return place == REALS
    return False


def both_hold(answer: Group) -> Answer:
    """A lower and an upper bound of one name as a chain, where both can hold: `x > 2 and x < 5`."""
    bounds = [ascending(item) for item in answer.items if isinstance(item, Relation)]
    if answer.brackets or len(answer.items) != 2:
        return answer
    for pair in itertools.permutations(bounds, 2):
        match pair:
            case (
                Relation(("<" | "<=" as over,), (Expression() as low, Expression(Symbol(name)) as middle)),
                Relation(("<" | "<=" as under,), (Expression(Symbol(other)), Expression() as high)),
            ) if name == other and (distance := approximate(high.tree - low.tree)) is not None:
                if distance < 0:  # x < 1 and x > 2, for "or"
                    return Group("or", answer.items)
                return Relation((over, under), (low, middle, high))
    return answer


def without_points(parts: list[Answer], points: Answer) -> Answer:
    r"""`\mathbb{R} \setminus \{0, 1\}` as a union of intervals; Unreadable for other differences of sets."""
    items = points.items if isinstance(points, Group) and points.brackets == "{}" else ()
    numbers = [item for item in items if isinstance(item, Expression) and isinstance(item.tree, Number)]
    if parts != [REALS] or not numbers or len(numbers) != len(items):
        raise Unreadable
    low, high = REALS.items
    inner = sorted(numbers, key=lambda item: approximate(item.tree) or Fraction(0))
    return Union(tuple(Group("()", pair) for pair in itertools.pairwise((low, *inner, high))))
