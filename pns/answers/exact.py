r"""Equality of two expressions: exact rationals where they are rational, else evaluation to 50 and to 100
digits at several points.

A difference is proved by one point at which two exact values differ, or two numeric ones by far more than
their error; equality by equal rationals, by equal residues modulo random primes (values too large to write
down), or by agreement to 50 digits at every point. Points say nothing of absolute values, floors and
ceilings: those are equal by what is in them alone, or where they are functions of one whole number at as many
whole numbers as settle it. Values that differ only beyond the digits compared (2^1000
+ sqrt(2) and 2^1000 + sqrt(3)) are not decided. Every evaluation has a budget, and no intermediate value may
grow without limit: `9^{9^{9^9}}` ends at once.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import mpmath

from pns.answers.tree import (
    INFINITY,
    LOG_BASE,
    MINUS_INFINITY,
    ONE,
    Call,
    Constant,
    Number,
    Operation,
    Power,
    Product,
    Quotient,
    Series,
    Sum,
    Symbol,
    Tree,
    degree,
    substitute,
    walk,
    whole,
)

_MAX_BITS = 60_000  # of the numerator and the denominator of an exact value
_MAX_FACTORIAL = 5000  # has 54,000 bits
_MAX_RESIDUE_FACTORIAL = 200_000  # modulo a prime it is a loop of small products
_MAX_TERMS = 20_000  # of a sum or product
_MAX_MAGNITUDE = 1 << 30  # binary exponent of a numeric value, either way
_MAX_ARGUMENT = (
    200  # binary exponent of a function's argument: the sine of more needs more digits than there are
)
_MAX_RATIONAL = 10_000  # binary exponent of a numeric value that is turned into a fraction, either way
_DIGITS = 50
_HUGE_BITS = 120  # of 50 digits' 166: values beyond are not called equal, as too little is left of a fraction
# By three of 61 bits: two different numbers agree modulo all of them as good as never.
_PRIMES = ((1 << 61) - 1, 2305843009213693921, 2305843009213693907)
WHOLE_NUMBERS = frozenset("nkmljN")  # names that often stand for them; beside pi, of a family of solutions
_WHOLE_POINTS = 121  # from 0, at which functions of a whole number are compared
_POINT = whole(7) / whole(3)
_INFINITE = (INFINITY, MINUS_INFINITY)
_ROUNDINGS: dict[str, Callable[..., Any]] = {"abs": abs, "floor": math.floor, "ceil": math.ceil}
_LOG_BASES = (whole(1), Call((whole(10),), "ln"), Call((whole(2),), "ln"))  # ln of e, 10 and 2

Point = dict[str, Fraction]


class Undecided(ArithmeticError):
    """No value: undefined, too large, too much work, a function that is not known, or not rational where that
    is wanted. Python's own arithmetic errors mean the same here."""


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
    where they would be equal only at whole numbers."""
    if a == b:
        return True
    for x, y in ((a, b), (b, a)):
        if x in _INFINITE and (y in _INFINITE or not (y.symbols or INFINITY in walk(y))):
            return False
    if a.symbols or b.symbols:
        if _is_same_of_whole_number(a, b, budget):
            return True
        steps = _Steps(budget)
        a, b = steps.replaced(a), steps.replaced(b)
    names = sorted(a.symbols | b.symbols)
    if LOG_BASE in names:  # `log` without a base may be any of these: proved is what holds for all
        bases = [{LOG_BASE: base} for base in _LOG_BASES]
        verdicts = {same_value(substitute(a, base), substitute(b, base), budget) for base in bases}
        return verdicts.pop() if len(verdicts) == 1 else None
    try:
        if names:
            return _same_function(a, b, names, budget)
        same = _same_exactly({}, a, b, budget)
        if same is None:
            moduli = [_Residue(budget, prime) for prime in _PRIMES]
            same = all(modulus.value(a) == modulus.value(b) for modulus in moduli)
        return same
    except (ArithmeticError, RecursionError):
        return None


def rational(tree: Tree) -> Fraction | None:
    """The exact value of a rational number; None for anything else."""
    try:
        return _Exact(Budget(), {}).value(tree)
    except (ArithmeticError, RecursionError):
        return None


def approximate(tree: Tree) -> Fraction | None:
    """The value of a real number, to 50 digits where it is not rational; None where it is not real, has no
    value, or one too large or small to be written as a fraction."""
    if (exact := rational(tree)) is not None:
        return exact
    try:
        value = _Numeric(Budget(), {}, _DIGITS).value(tree)
    except (Undecided, RecursionError):
        return None
    if isinstance(value, value.context.mpc) or abs(value.man_exp[1]) >= _MAX_RATIONAL:
        return None
    return Fraction(*map(int, mpmath.libmp.to_rational(value._mpf_)))


def _same_function(a: Tree, b: Tree, names: list[str], budget: Budget) -> bool | None:
    generator = random.Random(",".join(names))  # the same points for the same names
    numbers = [generator.sample(range(2, 12 + 2 * len(names)), len(names)) for _ in range(3)]
    whole_points = [dict(zip(names, map(Fraction, values), strict=True)) for values in numbers]
    sizes = 10, 10, 900  # \sqrt{x^2 - 40x + 400} is 20 - x up to 20 only
    positive_points = [{name: Fraction(generator.uniform(0.2, size)) for name in names} for size in sizes]
    negative_points = [{name: -value for name, value in point.items()} for point in positive_points[:2]]
    if False in [_same_exactly(point, a, b, budget) for point in whole_points]:
        return False
    at_positive = [_same_at(point, a, b, budget) for point in positive_points]
    # \sqrt{x^2} and x differ at negative numbers only, where the problem may not go: not decided
    at_negative = [_same_at(point, a, b, budget, only_real=True) for point in negative_points]
    is_same = at_positive.count(True) >= 2 and False not in at_positive + at_negative
    return True if is_same else None


def _is_same_of_whole_number(a: Tree, b: Tree, budget: Budget) -> bool:
    """Whether two expressions with floors or ceilings of one whole number are equal: they are polynomials of
    each class of remainders, so that enough points from 0 on prove it."""
    names = a.symbols | b.symbols
    parts = [*walk(a), *walk(b)]
    has_steps = any(isinstance(part, Call) and part.name in ("floor", "ceil") for part in parts)
    degrees = [degree(tree, with_steps=True) for tree in (a, b)]
    if not has_steps or len(names) != 1 or names.isdisjoint(WHOLE_NUMBERS) or None in degrees:
        return False
    written = [part.value.as_integer_ratio() for part in parts if isinstance(part, Number)]
    period = math.lcm(*filter(None, itertools.chain.from_iterable(written)))  # or a multiple of it
    if 2 * period * (1 + max(degree or 0 for degree in degrees)) > _WHOLE_POINTS:
        return False
    (name,) = names
    points = [{name: Fraction(value)} for value in range(_WHOLE_POINTS)]
    try:
        return all(_Exact(budget, point).value(a) == _Exact(budget, point).value(b) for point in points)
    except ArithmeticError:
        return False


class _Steps:
    """Puts symbols in the place of absolute values, floors and ceilings of what has symbols, the same one for
    those that are equal by what is in them; of absolute values, but for a factor."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.known: list[Call] = []

    def replaced(self, tree: Tree) -> Tree:
        if not isinstance(tree, Operation) or not tree.symbols:
            return tree
        if isinstance(tree, Series):  # of its terms nothing is known but how they are written
            has_steps = any(isinstance(part, Call) and part.name in _ROUNDINGS for part in walk(tree))
            return Symbol(f"step {tree!r}") if has_steps else tree
        tree = replace(tree, parts=tuple(map(self.replaced, tree.parts)))
        match tree:
            case Power((Power((base, square)), root)) if (square, root) == (whole(2), ONE / whole(2)):
                tree = Call((base,), "abs")
        if not isinstance(tree, Call) or tree.name not in _ROUNDINGS:
            return tree
        own, size = tree.parts[0], ONE
        if tree.name == "abs" and (at_point := rational(substitute(own, dict.fromkeys(own.symbols, _POINT)))):
            own, size = own / Number(at_point), Number(abs(at_point))  # |3x| is 3|x|
        for index, call in enumerate(self.known):
            candidates = (own, -own) if tree.name == "abs" else (own,)
            if call.name == tree.name and any(same_value(call.parts[0], x, self.budget) for x in candidates):
                return size * Symbol(f"step {index}")
        self.known.append(Call((own,), tree.name))
        return size * Symbol(f"step {len(self.known) - 1}")


def _same_exactly(point: Point, a: Tree, b: Tree, budget: Budget) -> bool | None:
    exact = _Exact(budget, point)
    try:
        return bool(exact.value(a) == exact.value(b))
    except ArithmeticError:
        return _same_at(point, a, b, budget)


def _same_at(point: Point, a: Tree, b: Tree, budget: Budget, only_real: bool = False) -> bool | None:
    """Compare numerically at one point, with 50 and with 100 digits; `only_real`: undecided where a value is
    not real."""
    differences = []
    for digits in (_DIGITS, 2 * _DIGITS):
        numeric = _Numeric(budget, point, digits)
        try:
            x, y = numeric.value(a), numeric.value(b)
        except Undecided:
            return None
        if only_real and any(isinstance(value, numeric.mp.mpc) for value in (x, y)):
            return None
        differences.append(abs(x - y))
    coarse, fine = differences
    size, ten = max(abs(x), abs(y)), numeric.mp.mpf(10)
    is_vanishing = fine < coarse * ten ** (-_DIGITS // 2) and fine < ten**-_DIGITS
    if fine == 0 or is_vanishing or fine < size * ten**-_DIGITS:
        return None if numeric.is_huge else True
    return False if abs(coarse - fine) < fine * ten**-6 else None


class _Arithmetic:
    """Values of expressions at a point, in one kind of numbers. What has no value raises Undecided, or
    ZeroDivisionError."""

    cost = 1  # of a node, in operations

    def __init__(self, budget: Budget, point: Point) -> None:
        self.budget = budget
        self.point = point

    def value(self, tree: Tree) -> Any:
        self.budget.spend(self.cost)
        match tree:
            case Number(value):
                return self.number(value)
            case Symbol(name) if name in self.point:
                return self.number(self.point[name])
            case Sum(terms):
                return self.fold(operator.add, map(self.value, terms))
            case Product(factors):
                return self.fold(operator.mul, map(self.value, factors))
            case Quotient((numerator, denominator)):
                return self.divide(self.value(numerator), self.value(denominator))
            case Power((base, exponent)):
                return self.power(self.value(base), self.argument(exponent))
            case Call(parts, name):
                return self.call(name, [self.argument(part) for part in parts])
            case Series(_, kind):
                return self.fold(operator.add if kind == "sum" else operator.mul, self.terms(tree))
            case Constant(name):
                return self.constant(name)
        raise Undecided

    def fold(self, operation: Callable[[Any, Any], Any], values: Iterable[Any]) -> Any:
        result = self.number(Fraction(int(operation is operator.mul)))
        for value in values:
            result = self.checked(operation(result, value))
        return result

    def terms(self, series: Series) -> Iterator[Any]:
        """The values of the terms of a series, one by one."""
        low, high, term = series.parts
        exact, outer = _Exact(self.budget, self.point), self.point
        first, last = exact.value(low), exact.value(high)
        if first.denominator != 1 or last.denominator != 1 or last - first > _MAX_TERMS:
            raise Undecided
        for index in range(int(first), int(last) + 1):
            self.point = {**outer, series.variable: Fraction(index)}
            value = self.value(term)
            self.point = outer
            yield value

    number: Callable[[Fraction], Any]
    power: Callable[[Any, Any], Any]
    call: Callable[[str, list[Any]], Any]

    def constant(self, name: str) -> Any:
        raise Undecided

    def checked(self, value: Any) -> Any:
        """A result, if it is within the limits."""
        return value

    def divide(self, numerator: Any, denominator: Any) -> Any:
        return self.checked(numerator / denominator)

    def argument(self, tree: Tree) -> Any:
        """The value of an exponent, or of what a function is applied to."""
        return self.value(tree)


class _Exact(_Arithmetic):
    """Rational numbers."""

    def number(self, value: Fraction) -> Fraction:
        return self.checked(value)

    def checked(self, value: Fraction) -> Fraction:
        bits = _bits(value)
        if bits > _MAX_BITS:
            raise Undecided
        self.budget.spend(bits // 256)
        return value

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            if base < 0 or exponent.denominator > 1000:
                raise Undecided
            roots = [_whole_root(part, exponent.denominator) for part in base.as_integer_ratio()]
            base = Fraction(*roots)
        power = exponent.numerator
        if power <= 0 and base == 0:
            raise Undecided
        if abs(base) in (0, 1):
            return base if power % 2 else abs(base)
        if abs(power) * _bits(base) > _MAX_BITS:
            raise Undecided
        return self.checked(base**power)

    def call(self, name: str, values: list[Fraction]) -> Fraction:
        if name in _ROUNDINGS:
            return Fraction(_ROUNDINGS[name](values[0]))
        if name == "ln" and values[0] == 1:
            return Fraction(0)
        if name not in ("factorial", "binomial") or any(value.denominator != 1 for value in values):
            raise Undecided
        top, chosen = int(values[0]), int(values[-1])
        work = top if name == "factorial" else max(0, min(chosen, top - chosen))
        if not 0 <= top <= 10**6 or chosen < 0 or work > _MAX_FACTORIAL:
            raise Undecided
        self.budget.spend(work // 8)
        return self.checked(Fraction(math.factorial(top) if name == "factorial" else math.comb(top, chosen)))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() > 1000:
        raise Undecided
    else:
        context = _context(400, threading.get_ident())
        root = int(context.nint(context.root(value, degree)))
    if root**degree != value:
        raise Undecided
    return root


class _Residue(_Arithmetic):
    """Rational numbers modulo a prime, for values too large to compute."""

    def __init__(self, budget: Budget, prime: int) -> None:
        super().__init__(budget, {})
        self.prime = prime

    def number(self, value: Fraction) -> int:
        return self.divide(value.numerator, value.denominator)

    def checked(self, value: int) -> int:
        return value % self.prime

    def divide(self, numerator: int, denominator: int) -> int:
        if denominator % self.prime == 0:
            raise Undecided
        return numerator * pow(denominator, -1, self.prime) % self.prime

    def argument(self, tree: Tree) -> Fraction:
        return _Exact(self.budget, self.point).value(tree)

    def power(self, base: int, exponent: Fraction) -> int:
        if exponent.denominator != 1 or not base:
            raise Undecided
        return pow(base, int(exponent) % (self.prime - 1), self.prime)

    def call(self, name: str, values: list[Fraction]) -> int:
        value = values[0]
        if name != "factorial" or value.denominator != 1 or not 0 <= value <= _MAX_RESIDUE_FACTORIAL:
            raise Undecided
        self.budget.spend(int(value) // 20)
        residue = 1
        for factor in range(2, int(value) + 1):
            residue = residue * factor % self.prime
        return residue


@functools.cache
def _context(digits: int, _thread: int) -> Any:
    """mpmath's own state of precision, one per thread."""
    context = mpmath.MPContext()
    context.dps = digits + 15
    return context


class _Numeric(_Arithmetic):
    """Real and complex numbers of mpmath; `is_huge` once a value was beyond 120 bits."""

    cost = 8

    def __init__(self, budget: Budget, point: Point, digits: int) -> None:
        super().__init__(budget, point)
        self.mp = _context(digits, threading.get_ident())
        self.is_huge = False

    def value(self, tree: Tree) -> Any:
        mp = self.mp
        try:
            value = super().value(tree)
        except (ValueError, ArithmeticError, TypeError, NotImplementedError):
            raise Undecided from None  # outside the domain, a pole, no convergence
        if isinstance(value, mp.mpc) and abs(value.imag) <= abs(value.real) * mp.mpf(10) ** (-mp.dps + 10):
            value = value.real
        if not mp.isfinite(value):
            raise Undecided
        magnitude = mp.mag(value) if value else 0
        if abs(magnitude) > _MAX_MAGNITUDE:
            raise Undecided
        self.is_huge |= magnitude > _HUGE_BITS
        return value

    def number(self, value: Fraction) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def constant(self, name: str) -> Any:
        if name == "i":
            return self.mp.mpc(0, 1)
        return +getattr(self.mp, name)  # pi, e

    def power(self, base: Any, exponent: Any) -> Any:
        mp = self.mp
        if base == 0:
            if mp.re(exponent) <= 0:
                raise Undecided
            return base * 0
        size = abs(mp.mag(base)) + 1
        if exponent and mp.mag(exponent) + size.bit_length() > 30:
            raise Undecided
        return base**exponent

    def call(self, name: str, values: list[Any]) -> Any:
        mp, value = self.mp, values[0]
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
