r"""Equality of two expressions: exact rationals where they are rational, else evaluation to 50 and to 100
digits at several points.

A difference is proved by one point at which two exact values differ, or two numeric ones by far more than
their error; equality by equal rationals, by equal residues modulo random primes (values too large to write
down), or by agreement to 50 digits at every point. Values that differ only beyond the digits compared (2^1000
+ sqrt(2) and 2^1000 + sqrt(3)) are not decided. Every evaluation has a budget, and no intermediate value may
grow without limit: `9^{9^{9^9}}` ends at once.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import mpmath

from pns.answers.tree import (
    INFINITY,
    LOG_BASE,
    MINUS_INFINITY,
    ONE,
    TEN,
    Call,
    Constant,
    Negative,
    Number,
    Operation,
    Power,
    Product,
    Quotient,
    Root,
    Series,
    Sum,
    Symbol,
    Tree,
    substitute,
    walk,
    whole,
)

_MAX_BITS = 60_000  # of the numerator and the denominator of an exact value
_MAX_FACTORIAL = 5000
_MAX_TERMS = 20_000  # of a sum or product
_MAX_MAGNITUDE = 1 << 30  # binary exponent of a numeric value, either way
_MAX_ARGUMENT = 200  # binary exponent of the argument of a transcendental function
_MAX_RATIONAL = 10_000  # binary exponent of a numeric value that is turned into a fraction, either way
_DIGITS = 50
_HUGE_BITS = 120  # numeric values beyond these are not called equal
_PRIMES = ((1 << 61) - 1, 2305843009213693921, 2305843009213693907)
_WHOLE = frozenset("nkmNjl")  # names that often stand for whole numbers
_MAX_RENAMED = 3  # symbols whose renaming is tried
_POSITIVE_POINTS, _NEGATIVE_POINTS = 3, 2
_LOG_BASES = (ONE, Call((TEN,), "ln"), Call((whole(2),), "ln"))  # ln of e, 10 and 2

Point = dict[str, Fraction]
_Evaluate = Callable[[Tree, Point], Any]


class Undecided(Exception):
    """No value: undefined, too large, too much work, a function that is not known, or not rational where that
    is wanted."""


class Budget:
    """Operations left for one comparison of two answers; a thousand are about a millisecond."""

    def __init__(self, operations: int = 40_000) -> None:
        self.left = operations

    def spend(self, operations: int = 1) -> None:
        self.left -= operations
        if self.left < 0:
            raise Undecided


def same_value(a: Tree, b: Tree, budget: Budget) -> bool | None:
    """Whether two expressions are equal for all values of their symbols. None: not decided, among others
    where they would be equal with other names of the symbols, or only at whole numbers."""
    if a == b:
        return True
    if INFINITY in walk(a) or INFINITY in walk(b):
        return _same_infinite(a, b)
    try:
        names = a.symbols | b.symbols
        if LOG_BASE in names:
            return _same_in_all_bases(a, b, budget)
        if not names:
            return _same_number(a, b, budget)
        return _same_function(a, b, sorted(names), budget)
    except (Undecided, RecursionError):
        return None


def rational(tree: Tree) -> Fraction | None:
    """The exact value of a rational number; None for anything else."""
    try:
        return _exact(tree, {}, Budget())
    except (Undecided, RecursionError):
        return None


def approximate(tree: Tree) -> Fraction | None:
    """The value of a real number to 50 digits; None where it is not real, has no value, or one too large or
    small to be written as a fraction."""
    try:
        value = _numeric(tree, {}, Budget(), _context(_DIGITS))
    except (Undecided, RecursionError):
        return None
    if isinstance(value, value.context.mpc):
        return None
    mantissa, exponent = value.man_exp
    if abs(exponent) >= _MAX_RATIONAL:
        return None
    return Fraction(int(mantissa)) * Fraction(2) ** int(exponent)


def _same_in_all_bases(a: Tree, b: Tree, budget: Budget) -> bool | None:
    """`log` without a base may be natural, decimal or binary: proved is what holds for all three."""
    verdicts = set()
    for base in _LOG_BASES:
        x, y = (substitute(tree, {LOG_BASE: base}) for tree in (a, b))
        verdicts.add(same_value(x, y, budget))
    return verdicts.pop() if len(verdicts) == 1 else None


def _same_infinite(a: Tree, b: Tree) -> bool | None:
    infinite = (INFINITY, MINUS_INFINITY)
    if a in infinite and b in infinite:
        return a == b
    if a not in infinite and b not in infinite:
        return None
    other = b if a in infinite else a
    return None if other.symbols or INFINITY in walk(other) else False


def _same_number(a: Tree, b: Tree, budget: Budget) -> bool | None:
    try:
        return _exact(a, {}, budget) == _exact(b, {}, budget)
    except Undecided:
        pass
    same = _same_at({}, a, b, budget)
    if same is not None:
        return same
    residues = [(_residue(a, prime, budget), _residue(b, prime, budget)) for prime in _PRIMES]
    return all(x == y for x, y in residues)


def _same_function(a: Tree, b: Tree, names: list[str], budget: Budget) -> bool | None:
    generator = random.Random(",".join(names))  # the same points for the same names
    whole_points = []
    for _ in range(3):
        values = generator.sample(range(2, 12 + 2 * len(names)), len(names))
        whole_points.append({name: Fraction(value) for name, value in zip(names, values, strict=True)})
    at_whole = [_same_exactly(point, a, b, budget) for point in whole_points]
    if False in at_whole:
        return None if _renamed(a, b, whole_points, budget) else False
    points: list[Point] = []
    for sign in [1] * _POSITIVE_POINTS + [-1] * _NEGATIVE_POINTS:
        point = {}
        for name in names:
            numerator = generator.randint(10**6, 10**7)
            point[name] = Fraction(numerator, generator.randint(10**6, 4 * 10**6)) * sign
        points.append(point)
    at_positive = [_same_at(point, a, b, budget) for point in points[:_POSITIVE_POINTS]]
    if False in at_positive:
        may_be_whole = True in at_whole and not _WHOLE.isdisjoint(names)
        if may_be_whole or any(_is_of_whole_numbers(part) for part in (*walk(a), *walk(b))):
            return None
        return None if _renamed(a, b, points[:1], budget) else False
    if at_positive.count(True) < 2:
        return None
    at_negative = [_same_at(point, a, b, budget, only_real=True) for point in points[_POSITIVE_POINTS:]]
    return None if False in at_negative else True


def _is_of_whole_numbers(tree: Tree) -> bool:
    """Whether its meaning may be limited to whole numbers, so that other points prove nothing."""
    match tree:
        case Series():
            return True
        case Call(_, name):
            return name in ("factorial", "binomial", "floor", "ceil")
        case Power((Negative(), exponent)):
            return bool(exponent.symbols)
    return False


def _renamed(a: Tree, b: Tree, points: list[Point], budget: Budget) -> bool:
    """Whether b equals a with its symbols called otherwise: 2n and 2k."""
    if a.symbols == b.symbols or len(a.symbols) != len(b.symbols) or len(a.symbols) > _MAX_RENAMED:
        return False
    for names in itertools.permutations(sorted(a.symbols)):
        renamed = substitute(b, dict(zip(sorted(b.symbols), map(Symbol, names), strict=True)))
        if all(_same_exactly(point, a, renamed, budget) is True for point in points):
            return True
    return False


def _same_exactly(point: Point, a: Tree, b: Tree, budget: Budget) -> bool | None:
    try:
        return _exact(a, point, budget) == _exact(b, point, budget)
    except Undecided:
        return _same_at(point, a, b, budget)


def _same_at(point: Point, a: Tree, b: Tree, budget: Budget, only_real: bool = False) -> bool | None:
    """Compare numerically at one point, with 50 and with 100 digits; `only_real`: undecided where a value is
    not real."""
    differences = []
    size: Any = 0
    is_huge = False
    for digits in (_DIGITS, 2 * _DIGITS):
        context = _context(digits)
        try:
            x, y = (_numeric(tree, point, budget, context) for tree in (a, b))
        except Undecided:
            return None
        if only_real and any(isinstance(value, context.mpc) for value in (x, y)):
            return None
        differences.append(abs(x - y))
        size = max(abs(x), abs(y))
        is_huge |= context.huge
    coarse, fine = differences
    ten = _context(2 * _DIGITS).mpf(10)
    is_vanishing = fine < coarse * ten ** (-_DIGITS // 2) and fine < ten**-_DIGITS
    if fine == 0 or is_vanishing or fine < size * ten**-_DIGITS:
        return None if is_huge else True
    return False if abs(coarse - fine) < fine * ten**-6 else None


def _exact(tree: Tree, point: Point, budget: Budget) -> Fraction:
    budget.spend()
    match tree:
        case Number(value):
            return _bounded(value, budget)
        case Symbol(name):
            return _bounded(_value(name, point), budget)
        case Sum(terms):
            total = Fraction(0)
            for term in terms:
                total = _bounded(total + _exact(term, point, budget), budget)
            return total
        case Product(factors):
            total = Fraction(1)
            for factor in factors:
                total = _bounded(total * _exact(factor, point, budget), budget)
            return total
        case Series(_, kind):
            values = _terms(tree, point, budget, lambda term, inner: _exact(term, inner, budget))
            total = Fraction(kind == "prod")
            for value in values:
                total = _bounded(total + value if kind == "sum" else total * value, budget)
            return total
        case Operation(parts):
            return _exact_operation(tree, [_exact(part, point, budget) for part in parts], budget)
    raise Undecided


def _exact_operation(tree: Operation, values: list[Fraction], budget: Budget) -> Fraction:
    match tree:
        case Negative():
            return -values[0]
        case Quotient():
            numerator, denominator = values
            if denominator == 0:
                raise Undecided
            return _bounded(numerator / denominator, budget)
        case Power():
            return _exact_power(values[0], values[1], budget)
        case Root():
            radicand, degree = values
            if degree == 0:
                raise Undecided
            return _exact_power(radicand, 1 / degree, budget)
        case Call(_, name):
            return _exact_function(name, values, budget)
    raise Undecided


def _exact_power(base: Fraction, exponent: Fraction, budget: Budget) -> Fraction:
    if exponent.denominator == 1:
        power = int(exponent)
        if power <= 0 and base == 0:
            raise Undecided
        if abs(base) in (0, 1):
            return base if power % 2 else abs(base)
        if abs(power) * _bits(base) > _MAX_BITS:
            raise Undecided
        return _bounded(base**power, budget)
    if base < 0 or exponent.denominator > 1000:
        raise Undecided
    roots = [_whole_root(part, exponent.denominator) for part in base.as_integer_ratio()]
    return _exact_power(Fraction(*roots), Fraction(exponent.numerator), budget)


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() > 1000:
        raise Undecided
    elif value.bit_length() < 50:
        root = round(value ** (1 / degree))
    else:
        root = int(mpmath.nint(_context(400).root(value, degree)))
    if root**degree != value:
        raise Undecided
    return root


def _exact_function(name: str, values: list[Fraction], budget: Budget) -> Fraction:
    value = values[0]
    if name == "abs":
        return abs(value)
    if name in ("floor", "ceil"):
        return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
    if name == "ln" and value == 1:
        return Fraction(0)
    is_whole = all(value.denominator == 1 for value in values)
    if name == "factorial" and is_whole and 0 <= value <= _MAX_FACTORIAL:
        budget.spend(int(value) // 8)
        return Fraction(math.factorial(int(value)))
    if name != "binomial" or not is_whole:
        raise Undecided
    top, chosen = map(int, values)
    if not 0 <= top <= 10**6 or chosen < 0:
        raise Undecided
    work = max(0, min(chosen, top - chosen))
    if work > _MAX_FACTORIAL:
        raise Undecided
    budget.spend(work // 4)
    return _bounded(Fraction(math.comb(top, chosen)), budget)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction, budget: Budget) -> Fraction:
    bits = _bits(value)
    if bits > _MAX_BITS:
        raise Undecided
    budget.spend(bits // 256)
    return value


def _value(name: str, point: Point) -> Fraction:
    if name not in point:
        raise Undecided
    return point[name]


def _terms(series: Series, point: Point, budget: Budget, evaluate: _Evaluate) -> Iterator[Any]:
    """The values of the terms of a series, one by one."""
    low, high, term = series.parts
    first, last = (_exact(limit, point, budget) for limit in (low, high))
    if first.denominator != 1 or last.denominator != 1 or last - first > _MAX_TERMS:
        raise Undecided
    for index in range(int(first), int(last) + 1):
        yield evaluate(term, {**point, series.variable: Fraction(index)})


def _residue(tree: Tree, prime: int, budget: Budget) -> int:
    """The value of a rational number modulo a prime, for values too large to compute."""
    budget.spend()
    match tree:
        case Number(value):
            return value.numerator * _inverse(value.denominator, prime) % prime
        case Sum(terms):
            return sum(_residue(term, prime, budget) for term in terms) % prime
        case Product(factors):
            return math.prod(_residue(factor, prime, budget) for factor in factors) % prime
        case Negative((part,)):
            return -_residue(part, prime, budget) % prime
        case Quotient((numerator, denominator)):
            inverse = _inverse(_residue(denominator, prime, budget), prime)
            return _residue(numerator, prime, budget) * inverse % prime
        case Power((base, exponent)):
            power = _exact(exponent, {}, budget)
            residue = _residue(base, prime, budget)
            if power.denominator != 1 or not residue:
                raise Undecided
            return pow(residue, int(power) % (prime - 1), prime)
        case Call((part,), "factorial"):
            return _residue_of_factorial(_exact(part, {}, budget), prime, budget)
    raise Undecided


def _inverse(value: int, prime: int) -> int:
    if value % prime == 0:
        raise Undecided
    return pow(value, -1, prime)


def _residue_of_factorial(value: Fraction, prime: int, budget: Budget) -> int:
    if value.denominator != 1 or not 0 <= value <= 200_000:
        raise Undecided
    budget.spend(int(value) // 20)
    residue = 1
    for factor in range(2, int(value) + 1):
        residue = residue * factor % prime
    return residue


_contexts = threading.local()


def _context(digits: int) -> Any:
    """mpmath's own state of precision, one per thread; its `huge` says whether a value of the last evaluation
    was beyond 120 bits."""
    name = f"of_{digits}_digits"
    context = getattr(_contexts, name, None)
    if context is None:
        context = mpmath.MPContext()
        context.dps = digits + 15
        setattr(_contexts, name, context)
    context.huge = False
    return context


def _numeric(tree: Tree, point: Point, budget: Budget, mp: Any) -> Any:
    budget.spend(8)
    try:
        value = _numeric_node(tree, point, budget, mp)
    except (ValueError, ArithmeticError, TypeError, NotImplementedError):
        raise Undecided from None  # outside the domain, a pole, no convergence
    if isinstance(value, mp.mpc) and abs(value.imag) <= abs(value.real) * mp.mpf(10) ** (-mp.dps + 10):
        value = value.real
    if not mp.isfinite(value):
        raise Undecided
    magnitude = mp.mag(value) if value else 0
    if abs(magnitude) > _MAX_MAGNITUDE:
        raise Undecided
    if magnitude > _HUGE_BITS:
        mp.huge = True
    return value


def _numeric_node(tree: Tree, point: Point, budget: Budget, mp: Any) -> Any:
    match tree:
        case Number(value):
            return mp.mpf(value.numerator) / value.denominator
        case Symbol(name):
            value = _value(name, point)
            return mp.mpf(value.numerator) / value.denominator
        case Constant("pi" | "e" as name):
            return +getattr(mp, name)
        case Constant("i"):
            return mp.mpc(0, 1)
        case Series(_, kind):
            terms = _terms(tree, point, budget, lambda term, inner: _numeric(term, inner, budget, mp))
            return sum(terms, mp.zero) if kind == "sum" else math.prod(terms, start=mp.one)
        case Operation(parts):
            return _numeric_operation(tree, [_numeric(part, point, budget, mp) for part in parts], mp)
    raise Undecided


def _numeric_operation(tree: Operation, values: list[Any], mp: Any) -> Any:
    match tree:
        case Sum():
            return sum(values)
        case Product():
            return math.prod(values[1:], start=values[0])
        case Negative():
            return -values[0]
        case Quotient():
            return values[0] / values[1]
        case Power():
            return _numeric_power(values[0], values[1], mp)
        case Root():
            return _numeric_power(values[0], 1 / values[1], mp)
        case Call(_, name):
            return _numeric_function(name, values, mp)
    raise Undecided


def _numeric_power(base: Any, exponent: Any, mp: Any) -> Any:
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undecided
        return base * 0
    size = abs(mp.mag(base)) + 1
    if exponent and mp.mag(exponent) + size.bit_length() > 30:
        raise Undecided
    return base**exponent


def _numeric_function(name: str, values: list[Any], mp: Any) -> Any:
    value = values[0]
    if name == "abs":
        return abs(value)
    if name != "ln" and any(value and mp.mag(value) > _MAX_ARGUMENT for value in values):
        raise Undecided
    if name in ("floor", "ceil"):
        if isinstance(value, mp.mpc):
            raise Undecided
        distance = abs(value - mp.nint(value))
        if distance and distance < mp.mpf(10) ** (-mp.dps // 2):  # on an edge
            raise Undecided
    return getattr(mp, name)(*values)
