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
from fractions import Fraction
from typing import Any

import mpmath

from pns.answers.notation import Tree, rebuild, symbols, walk

_MAX_BITS = 60_000  # of the numerator and the denominator of an exact value
_MAX_FACTORIAL = 5000
_MAX_MAGNITUDE = 1 << 24  # binary exponent of a numeric value
_MAX_ARGUMENT = 200  # binary exponent of the argument of a transcendental function
_DIGITS = 50
_HUGE_BITS = 120  # numeric values beyond these are not called equal
_PRIMES = ((1 << 61) - 1, 2305843009213693921, 2305843009213693907)
_WHOLE = frozenset("nkmNjl")  # names that often stand for whole numbers
_MAX_RENAMED = 3  # symbols whose renaming is tried
_REALS_P = 3


class Undecided(Exception):
    """No value: undefined, too large, too much work, or a function that is not known."""


class NotRational(Exception):
    """The value is not rational, or not found to be."""


class Budget:
    """Operations left for one comparison of two answers; a thousand are about a millisecond."""

    def __init__(self, operations: int = 40_000) -> None:
        self.left = operations

    def spend(self, operations: int = 1) -> None:
        self.left -= operations
        if self.left < 0:
            raise Undecided


Point = dict[str, Any]


def same_value(a: Tree, b: Tree, budget: Budget) -> bool | None:
    """Whether two expressions are equal for all values of their symbols. None: not decided, among others
    where they would be equal with other names of the symbols, or only at whole numbers."""
    if a == b:
        return True
    if any(part[0] == "inf" for part in itertools.chain(walk(a), walk(b))):
        return _same_infinite(a, b)
    try:
        names = symbols(a) | symbols(b)
        if "log base" in names:
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
    except (Undecided, NotRational, RecursionError):
        return None


def approximate(tree: Tree) -> Any:
    """The value of a number to 50 digits as an mpmath number (complex where it is not real); None where it
    has none."""
    try:
        return _numeric(tree, {}, Budget(), _context(_DIGITS))
    except (Undecided, RecursionError):
        return None


def _same_in_all_bases(a: Tree, b: Tree, budget: Budget) -> bool | None:
    """`log` without a base may be natural, decimal or binary: proved is what holds for all three."""
    found = set()
    for base in (("n", Fraction(1)), ("f", "ln", ("n", Fraction(10))), ("f", "ln", ("n", Fraction(2)))):
        x, y = (
            rebuild(tree, lambda part, base=base: base if part == ("s", "log base") else part)
            for tree in (a, b)
        )  # type: ignore[misc]
        found.add(same_value(x, y, budget))
    return found.pop() if len(found) == 1 else None


def _same_infinite(a: Tree, b: Tree) -> bool | None:
    signs = [1 if tree == ("inf",) else -1 if tree == ("-", ("inf",)) else 0 for tree in (a, b)]
    if all(signs):
        return signs[0] == signs[1]
    finite = b if signs[0] else a
    if any(signs) and not any(part[0] == "inf" for part in walk(finite)) and not symbols(finite):
        return False
    return None


def _same_number(a: Tree, b: Tree, budget: Budget) -> bool | None:
    try:
        return _exact(a, {}, budget) == _exact(b, {}, budget)
    except (Undecided, NotRational):
        pass
    found = _same_at({}, a, b, budget)
    if found is not None:
        return found
    try:
        residues = [(_residue(a, prime, budget), _residue(b, prime, budget)) for prime in _PRIMES]
    except (Undecided, NotRational):
        return None
    return all(x == y for x, y in residues)


def _same_function(a: Tree, b: Tree, names: list[str], budget: Budget) -> bool | None:
    generator = random.Random(",".join(names))
    whole = [
        {
            name: Fraction(value)
            for name, value in zip(
                names, generator.sample(range(2, 12 + 2 * len(names)), len(names)), strict=True
            )
        }
        for _ in range(3)
    ]
    at_whole = [_same_exactly(point, a, b, budget) for point in whole]
    if False in at_whole:
        return None if _renamed(a, b, whole, budget) else False
    rationals = [
        {
            name: Fraction(generator.randint(10**6, 10**7), generator.randint(10**6, 4 * 10**6)) * sign
            for name in names
        }
        for sign in (1, 1, 1, -1, -1)
    ]
    found = [_same_at(point, a, b, budget) for point in rationals[:_REALS_P]]
    if False in found:
        if (True in at_whole and _WHOLE & set(names)) or any(
            _integral(part) for tree in (a, b) for part in walk(tree)
        ):
            return None
        return None if _renamed(a, b, rationals[:1], budget) else False
    if found.count(True) < 2:
        return None
    negative = [_same_at(point, a, b, budget, only_real=True) for point in rationals[_REALS_P:]]
    return None if False in negative else True


def _integral(tree: Tree) -> bool:
    """Whether its meaning may be limited to whole numbers, so that other points prove nothing."""
    return (
        tree[0] in ("sum", "prod")
        or (tree[0] == "f" and tree[1] in ("factorial", "binomial", "floor", "ceil"))
        or (tree[0] == "^" and tree[1][0] == "-" and bool(symbols(tree[2])))
    )


def _renamed(a: Tree, b: Tree, points: list[Point], budget: Budget) -> bool:
    """Whether b equals a with its symbols called otherwise: 2n and 2k."""
    mine, theirs = symbols(a), symbols(b)
    if mine == theirs or len(mine) != len(theirs) or len(mine) > _MAX_RENAMED:
        return False
    for order in itertools.permutations(sorted(mine)):
        names = dict(zip(sorted(theirs), order, strict=True))
        renamed = rebuild(
            b,
            lambda tree, names=names: ("s", names.get(tree[1], tree[1])) if tree[0] == "s" else tree,  # type: ignore[misc]
        )
        if all((_same_exactly(point, a, renamed, budget)) is True for point in points):
            return True
    return False


def _same_exactly(point: Point, a: Tree, b: Tree, budget: Budget) -> bool | None:
    try:
        return _exact(a, point, budget) == _exact(b, point, budget)
    except (NotRational, Undecided):
        return _same_at(point, a, b, budget)


def _same_at(point: Point, a: Tree, b: Tree, budget: Budget, only_real: bool = False) -> bool | None:
    """Compare numerically at one point, with 50 and with 100 digits; `only_real`: undecided where a value is
    not real."""
    differences, sizes = [], []
    huge = False
    for digits in (_DIGITS, 2 * _DIGITS):
        context = _context(digits)
        try:
            x, y = (_numeric(tree, point, budget, context) for tree in (a, b))
        except Undecided:
            return None
        if only_real and any(isinstance(value, context.mpc) for value in (x, y)):
            return None
        difference, size = abs(x - y), max(abs(x), abs(y))
        differences.append(difference)
        sizes.append(size)
        huge |= context.huge
    coarse, fine = differences
    size = sizes[1]
    tiny = _context(2 * _DIGITS).mpf(10)
    if (
        fine == 0
        or fine < size * tiny ** (-_DIGITS)
        or (fine < coarse * tiny ** (-_DIGITS // 2) and fine < tiny ** (-_DIGITS))
    ):
        return None if huge else True
    return False if abs(coarse - fine) < fine * tiny**-6 else None


# -------------------------------------------------------------------------------------------------------------------- exact values


def _exact(tree: Tree, point: Point, budget: Budget) -> Fraction:
    budget.spend()
    head = tree[0]
    if head == "n":
        return _bounded(tree[1], budget)
    if head == "s":
        return _bounded(Fraction(_value(tree[1], point)), budget)
    if head == "+":
        total = Fraction(0)
        for part in tree[1:]:
            total = _bounded(total + _exact(part, point, budget), budget)
        return total
    if head == "*":
        product = Fraction(1)
        for part in tree[1:]:
            product = _bounded(product * _exact(part, point, budget), budget)
        return product
    if head == "-":
        return -_exact(tree[1], point, budget)
    if head == "/":
        numerator, denominator = _exact(tree[1], point, budget), _exact(tree[2], point, budget)
        if denominator == 0:
            raise Undecided
        return _bounded(numerator / denominator, budget)
    if head == "^":
        return _exact_power(_exact(tree[1], point, budget), _exact(tree[2], point, budget), budget)
    if head == "root":
        degree = _exact(tree[2], point, budget)
        if degree == 0:
            raise Undecided
        return _exact_power(_exact(tree[1], point, budget), 1 / degree, budget)
    if head == "f":
        return _exact_function(tree[1], [_exact(part, point, budget) for part in tree[2:]], budget)
    if head in ("sum", "prod"):
        return _series(
            tree, point, lambda body, inner: _exact(body, inner, budget), budget, Fraction(head == "prod")
        )
    raise NotRational


def _exact_power(base: Fraction, exponent: Fraction, budget: Budget) -> Fraction:
    if exponent.denominator == 1:
        power = int(exponent)
        if (power < 0 and base == 0) or (power == 0 and base == 0):
            raise Undecided
        if abs(base) in (0, 1):
            return base if power % 2 else abs(base)
        bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        if abs(power) * bits > _MAX_BITS:
            raise NotRational
        return _bounded(base**power, budget)
    if base < 0 or exponent.denominator > 1000:
        raise NotRational
    roots = [_whole_root(part, exponent.denominator) for part in (base.numerator, base.denominator)]
    return _exact_power(Fraction(*roots), Fraction(exponent.numerator), budget)


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    else:
        if value.bit_length() > 1000:
            raise NotRational
        root = (
            round(value ** (1 / degree))
            if value.bit_length() < 50
            else int(mpmath.nint(_context(400).root(value, degree)))
        )
    if root**degree != value:
        raise NotRational
    return root


def _exact_function(name: str, values: list[Fraction], budget: Budget) -> Fraction:
    value = values[0]
    if name == "abs":
        return abs(value)
    if name == "floor":
        return Fraction(math.floor(value))
    if name == "ceil":
        return Fraction(math.ceil(value))
    if name == "factorial" and value.denominator == 1 and 0 <= value <= _MAX_FACTORIAL:
        budget.spend(int(value) // 8)
        return Fraction(math.factorial(int(value)))
    if (
        name == "binomial"
        and value.denominator == values[1].denominator == 1
        and values[1] >= 0
        and abs(value) <= 10**6
    ):
        top, chosen = int(value), int(values[1])
        if 0 <= top < chosen:
            return Fraction(0)
        if top < 0:
            raise NotRational
        if min(chosen, top - chosen) > _MAX_FACTORIAL:
            raise NotRational
        budget.spend(min(chosen, top - chosen) // 4)
        return _bounded(Fraction(math.comb(top, chosen)), budget)
    if name == "ln" and value == 1:
        return Fraction(0)
    raise NotRational


def _bounded(value: Fraction, budget: Budget) -> Fraction:
    bits = max(abs(value.numerator).bit_length(), value.denominator.bit_length())
    if bits > _MAX_BITS:
        raise NotRational
    budget.spend(bits // 256)
    return value


def _value(name: str, point: Point) -> Any:
    if name not in point:
        raise Undecided
    return point[name]


def _series(tree: Tree, point: Point, evaluate: Any, budget: Budget, start: Any) -> Any:
    head, name, low, high, body = tree
    limits = []
    for limit in (low, high):
        try:
            value = _exact(limit, point, budget)
        except NotRational:
            raise Undecided from None
        if value.denominator != 1:
            raise Undecided
        limits.append(int(value))
    if limits[1] - limits[0] > 20_000:
        raise Undecided
    total: Any = start
    for index in range(limits[0], limits[1] + 1):
        found = evaluate(body, {**point, name: Fraction(index)})
        total = total + found if head == "sum" else total * found
        if isinstance(total, Fraction):
            _bounded(total, budget)
    return total


# ---------------------------------------------------------------------------------------------------------------- residues, numerics


def _residue(tree: Tree, prime: int, budget: Budget) -> int:
    """The value of a rational number modulo a prime, for values too large to compute."""
    budget.spend()
    head = tree[0]
    if head == "n":
        if tree[1].denominator % prime == 0:
            raise Undecided
        return tree[1].numerator * pow(tree[1].denominator, -1, prime) % prime
    if head == "+":
        return sum(_residue(part, prime, budget) for part in tree[1:]) % prime
    if head == "*":
        return math.prod(_residue(part, prime, budget) for part in tree[1:]) % prime
    if head == "-":
        return -_residue(tree[1], prime, budget) % prime
    if head == "/":
        denominator = _residue(tree[2], prime, budget)
        if not denominator:
            raise Undecided
        return _residue(tree[1], prime, budget) * pow(denominator, -1, prime) % prime
    if head == "^":
        exponent = _exact(tree[2], {}, budget)
        base = _residue(tree[1], prime, budget)
        if exponent.denominator != 1 or not base:
            raise NotRational
        return pow(base, int(exponent) % (prime - 1), prime)
    if head == "f" and tree[1] == "factorial":
        value = _exact(tree[2], {}, budget)
        if value.denominator != 1 or not 0 <= value <= 200_000:
            raise NotRational
        budget.spend(int(value) // 20)
        product = 1
        for factor in range(2, int(value) + 1):
            product = product * factor % prime
        return product
    raise NotRational


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.by_digits: dict[int, Any] = {}


_contexts = _Contexts()


def _context(digits: int) -> Any:
    """mpmath's own state of precision, one per thread; its `huge` says whether a value of the last evaluation
    was beyond 120 bits."""
    context = _contexts.by_digits.get(digits)
    if context is None:
        context = _contexts.by_digits[digits] = mpmath.MPContext()
        context.dps = digits + 15
    context.huge = False
    return context


def _numeric(tree: Tree, point: Point, budget: Budget, mp: Any) -> Any:
    budget.spend(8)
    try:
        value = _numeric_node(tree, point, budget, mp)
    except (
        ValueError,
        ArithmeticError,
        TypeError,
        NotImplementedError,
    ):  # outside the domain, a pole, no convergence
        raise Undecided from None
    if isinstance(value, mp.mpc) and abs(value.imag) <= abs(value.real) * mp.mpf(10) ** (-mp.dps + 10):
        value = value.real
    if not mp.isfinite(value):
        raise Undecided
    magnitude = mp.mag(value) if value else 0
    if magnitude > _MAX_MAGNITUDE * 64 or magnitude < -_MAX_MAGNITUDE * 64:
        raise Undecided
    if magnitude > _HUGE_BITS:
        mp.huge = True
    return value


def _numeric_node(tree: Tree, point: Point, budget: Budget, mp: Any) -> Any:
    head = tree[0]
    if head in ("n", "s"):
        value = tree[1] if head == "n" else _value(tree[1], point)
        return mp.mpf(value.numerator) / value.denominator
    if head == "pi":
        return +mp.pi
    if head == "e":
        return +mp.e
    if head == "i":
        return mp.mpc(0, 1)
    if head in ("sum", "prod"):
        return _series(
            tree, point, lambda body, inner: _numeric(body, inner, budget, mp), budget, mp.mpf(head == "prod")
        )
    values = [_numeric(part, point, budget, mp) for part in tree[1:] if isinstance(part, tuple)]
    if head == "+":
        return sum(values)
    if head == "*":
        return math.prod(values[1:], start=values[0])
    if head == "-":
        return -values[0]
    if head == "/":
        return values[0] / values[1]
    if head == "root":
        return _numeric_power(values[0], 1 / values[1], mp)
    if head == "^":
        return _numeric_power(values[0], values[1], mp)
    if head == "f":
        return _numeric_function(tree[1], values, mp)
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
    if any(value and mp.mag(value) > _MAX_ARGUMENT for value in values) and name not in ("ln", "abs"):
        raise Undecided
    if name in ("floor", "ceil"):
        whole = mp.nint(value)
        if isinstance(value, mp.mpc) or (
            value != whole and abs(value - whole) < mp.mpf(10) ** (-mp.dps // 2)
        ):
            raise Undecided  # on an edge
        return mp.floor(value) if name == "floor" else mp.ceil(value)
    if name == "abs":
        return abs(value)
    if name == "factorial":
        return mp.factorial(value)
    if name == "binomial":
        return mp.binomial(*values)
    return getattr(mp, name)(value)
