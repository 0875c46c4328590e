r"""Answers that leave something open, compared as wholes: solutions with arbitrary constants, and families of
angles such as `\frac{\pi}{4} + k\pi`."""

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache

from pns.answers.exact import Budget, approximate, same_value
from pns.answers.relations import named_value, tree_of
from pns.answers.tree import (
    DEGREE,
    ONE,
    ZERO,
    Answer,
    Constant,
    Expression,
    Group,
    Relation,
    Sum,
    Symbol,
    Tree,
    degree,
    substitute,
    walk,
    whole,
)

Same = Callable[[Tree, Tree], bool]
_Linear = tuple[Tree, list[Tree]]  # in constants: what is without one, and the factor of each

_CONSTANT = re.compile(r"[A-DKck](?:_\w+)?")
# Under one name on both sides a letter may be the problem's own (a spring's k, a line's A and B): only these
# are then arbitrary, and only beside nothing but the variables of solutions.
_ARBITRARY = re.compile(r"C|[Cc]_\w+")
_VARIABLES = frozenset({*"xyztsu", r"\theta"})
_PARAMETERS = frozenset("nkm")  # of families
_MAX_CONSTANTS = 3
_OPERATIONS = 80_000  # of one comparison
_MAX_BRANCHES = 60  # of a family in the common period
_POINT = whole(7) / whole(3)
_PLACES = 10**40  # that a period is divided into; values are known to 50 digits


def is_same_up_to_constants(a: Tree, b: Tree) -> bool:
    """Whether two expressions are equal for all values of their variables once the arbitrary constants of one
    are called otherwise, exchanged, or multiplied by numbers: `C_1 e^x + C_2` and `-A + B e^x`."""
    shared = a.symbols & b.symbols
    is_pure = all(name in _VARIABLES or _CONSTANT.fullmatch(name) for name in a.symbols | b.symbols)
    fixed = {name for name in shared if not (is_pure and _ARBITRARY.fullmatch(name))}
    own, other = (
        sorted(name for name in tree.symbols - fixed if _CONSTANT.fullmatch(name)) for tree in (a, b)
    )
    variables = a.symbols.difference(own)
    if variables.isdisjoint(_VARIABLES) or variables != b.symbols.difference(other):
        return False
    if any(name[:1].isupper() and not _CONSTANT.fullmatch(name) for name in variables):  # C_1 V, of physics
        return False
    if not 0 < len(own) == len(other) <= _MAX_CONSTANTS:
        return False
    budget = Budget(_OPERATIONS)

    def same(x: Tree, y: Tree) -> bool:
        return bool(same_value(x, y, budget))

    x, y = _in_constants(a, own, same), _in_constants(b, other, same)
    if x and y:
        return _is_rescaled(x, y, same)
    values = [Symbol(name) for name in own]
    for chosen in itertools.permutations(values):
        for signs in itertools.product((False, True), repeat=len(own)):
            signed = [-value if sign else value for value, sign in zip(chosen, signs, strict=True)]
            if same(a, substitute(b, dict(zip(other, signed, strict=True)))):
                return True
    return False


def _in_constants(tree: Tree, constants: list[str], same: Same) -> _Linear | None:
    """The expression as a linear one in its constants; None where it is none."""
    zeros: dict[str, Tree] = dict.fromkeys(constants, ZERO)
    alone = substitute(tree, zeros)
    factors = [substitute(tree, {**zeros, name: ONE}) - alone for name in constants]
    terms = [Symbol(name) * factor for name, factor in zip(constants, factors, strict=True)]
    return (alone, factors) if same(tree, Sum((alone, *terms))) else None


def _is_rescaled(x: _Linear, y: _Linear, same: Same) -> bool:
    """Whether the constants' factors are proportional, and the rest is the same; where a constant is added by
    itself, the rest may differ by a number."""

    (alone_x, factors_x), (alone_y, factors_y) = x, y

    @cache
    def is_proportional(i: int, j: int) -> bool:
        at_x, at_y = _at_point(factors_x[i]), _at_point(factors_y[j])
        is_known = not same(at_x, ZERO) and not same(at_y, ZERO)
        return is_known and same(factors_x[i] * at_y, factors_y[j] * at_x)

    places = range(len(factors_x))
    if not any(all(map(is_proportional, places, order)) for order in itertools.permutations(places)):
        return False
    if same(alone_x, alone_y):
        return True
    left = alone_x - alone_y
    has_added = any(same(factor, _at_point(factor)) for factor in factors_x)
    return has_added and same(left, _at_point(left))


def _at_point(tree: Tree) -> Tree:
    return substitute(tree, dict.fromkeys(tree.symbols, _POINT))


def is_same_family(a: Answer, b: Answer) -> bool:
    """Whether two answers are the same numbers, all those of expressions `base + parameter * period` with a
    whole-numbered parameter: compared as sets, modulo the common period."""
    members = _members(a), _members(b)
    x, y = map(_family, members)
    names = [{name for name, _ in own if name} for own in members]
    if x is None or y is None or max(map(len, names)) > 1 or len(set().union(*names)) > 1:
        return False
    period = _common_period([step for _, step in [*x, *y]])
    if period is None:
        return False
    is_multiple_alone = len(x) == len(y) == 1 and all(_place(*branch) == 0 for branch in (*x, *y))
    [own, *_], [other, *_] = members
    if is_multiple_alone and tree_of(own[1]).symbols == tree_of(other[1]).symbols:
        return False  # n\pi and (n - 2)\pi, of a polygon
    return _places(x, period) == _places(y, period)


def _places(family: list[tuple[Fraction, Fraction]], period: Fraction) -> set[int]:
    """Where its members lie within a common period."""
    return {
        _place(base + index * step, period) for base, step in family for index in range(round(period / step))
    }


def _place(value: Fraction, period: Fraction) -> int:
    """Where a value lies within the period, in units too small for the error of 50 digits to show."""
    return round(value / period * _PLACES) % _PLACES


def _common_period(periods: list[Fraction]) -> Fraction | None:
    """A common multiple of the periods; None where they have none that is small."""
    ratios = [(period / periods[0]).limit_denominator(_MAX_BRANCHES) for period in periods]
    common = periods[0] * math.lcm(*[ratio.numerator for ratio in ratios])
    is_multiple = common > 0 and all(_place(common, period) == 0 for period in periods)
    return common if is_multiple and common <= _MAX_BRANCHES * min(periods) else None


def _family(members: list[tuple[str, Answer]]) -> list[tuple[Fraction, Fraction]] | None:
    """Base and period of each expression; None for what is no family."""
    branches = []
    for _, item in members:
        if not isinstance(item, Expression) or item.ambiguous or item.unit or len(item.tree.symbols) != 1:
            return None
        (name,) = item.tree.symbols
        has_pi = item.degrees or Constant("pi") in walk(item.tree)  # 2n and 2k may stand for one number each
        tree = item.tree * DEGREE if item.degrees else item.tree
        if not has_pi or name not in _PARAMETERS or degree(tree) != 1:
            return None
        base, first = (approximate(substitute(tree, {name: value})) for value in (ZERO, ONE))
        if base is None or first is None or base == first:
            return None
        branches.append((base, abs(first - base)))
    return branches or None


def _members(answer: Answer) -> list[tuple[str, Answer]]:
    r"""The expressions of a list, an equation `x = ...` or an expression, with their names or ""."""
    if isinstance(answer, Relation) and len(answer.sides) == 2 and (named := named_value(answer)):
        return [(named[0], item) for _, item in _members(named[1])]
    if isinstance(answer, Group) and answer.brackets in ("", "or", "{}"):
        return [member for item in answer.items for member in _members(item)]
    return [("", answer)]
