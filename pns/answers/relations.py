"""What equations and inequalities say: the value of a name, a set of reals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from pns.answers.exact import approximate, rational
from pns.answers.tree import (
    INFINITY,
    MINUS_INFINITY,
    Answer,
    Call,
    Constant,
    Expression,
    Group,
    Number,
    Product,
    Quotient,
    Ratio,
    Relation,
    Symbol,
    Tree,
    Union,
    Words,
    is_numeric,
    substitute,
    walk,
)

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_NO_TREE = Symbol("")
_LOWEST, _HIGHEST = Expression(MINUS_INFINITY), Expression(INFINITY)
_LINE = (Fraction(0), Fraction(1), Fraction(2), Fraction(1009, 3))  # the last is far from where |x - 5| bends


def tree_of(answer: Answer) -> Tree:
    """The tree of an expression, a symbol without a name for any other answer."""
    return answer.tree if isinstance(answer, Expression) else _NO_TREE


def named_value(relation: Relation) -> tuple[str, Answer] | None:
    r"""Name and value of `x = 5`, `f(x) = 2x`, `(p, q) = (3, 2)`, `5 = x`, `x \in [0, 1]`; of `x = 5 + 5 =
    10` the last value."""
    if not {"=", "in"}.issuperset(relation.operators):
        return None
    first, last = relation.sides[0], relation.sides[-1]
    if name := _name(first):
        return name, last
    if relation.operators == ("=",) and (name := _name(last)):
        return name, first
    return None


def _name(answer: Answer) -> str:
    """What tells a name from others: of a letter, a function, a product of letters, several; "" where it is
    none."""
    match answer:
        case Words(text):
            return text if len(text) == 1 else ""
        case Expression(Symbol(name), unit=""):
            return name
        case Expression(tree, unit=""):
            is_name = bool(tree.symbols) and all(map(_is_part_of_name, walk(tree)))
        case Group(_, items):
            are_symbols = [isinstance(item, Expression) and isinstance(item.tree, Symbol) for item in items]
            is_name = bool(items) and all(are_symbols)
        case Ratio(parts):
            is_name = all(map(_name, parts))
        case _:
            is_name = False
    return repr(answer) if is_name else ""


def _is_part_of_name(tree: Tree) -> bool:
    match tree:
        case Call(_, name):
            return name != "ln"
        case Constant(name):
            return name in ("e", "i")  # letters that often are variables
    return isinstance(tree, Symbol | Product | Quotient)


def bound_names(a: str, b: str) -> tuple[str, str] | None:
    """The arguments of `f(x)` and `f(n)`, where only they differ."""
    x, y = (re.fullmatch(r"(.+)\((\w+)\)", name) for name in (a, b))
    return (x[2], y[2]) if x and y and x[1] == y[1] and x[2] != y[2] else None


def rename(answer: Answer, new: str, old: str) -> Answer:
    if not isinstance(answer, Expression):
        return answer
    return replace(answer, tree=substitute(answer.tree, {old: Symbol(new)}))


def difference_of_sides(relation: Relation) -> Tree | None:
    """Left minus right of an equation of two expressions."""
    left, right = relation.sides[0], relation.sides[-1]
    if relation.operators != ("=",) or not isinstance(left, Expression) or not isinstance(right, Expression):
        return None
    return left.tree - right.tree


def linear_root(tree: Tree, name: str, values: Mapping[str, Tree]) -> tuple[Fraction, Fraction] | None:
    """Zero and slope of an expression in one of its symbols, with values for the others, if it
    is linear, as some points show, and not constant."""
    at_0, at_1, *others = [rational(substitute(tree, {**values, name: Number(x)})) for x in _LINE]
    if at_0 is None or at_1 is None or at_0 == at_1:
        return None
    slope = at_1 - at_0
    is_linear = others == [at_0 + slope * x for x in _LINE[2:]]
    return (-at_0 / slope, slope) if is_linear else None


def subject(relation: Relation) -> Tree | None:
    """What an inequality is about: its one side with symbols, in a chain the middle one."""
    trees = [tree_of(side) for side in relation.sides]
    if relation.operators[0] == "in":
        return trees[0]
    if len(trees) == 3:
        return trees[1]  # 1 < x < 2
    sides = [side for side in relation.sides if isinstance(side, Expression | Words) and not is_numeric(side)]
    if len(sides) == 1:
        return tree_of(sides[0])
    return trees[0] if isinstance(trees[0], Symbol) else None


def ascending(relation: Relation) -> Relation:
    """A chain of > and >= the other way round."""
    if not {">", ">="}.issuperset(relation.operators):
        return relation
    operators = tuple(_FLIPPED[operator] for operator in reversed(relation.operators))
    return Relation(operators, relation.sides[::-1])


@dataclass(frozen=True)
class Interval:
    """`closed`: whether its low and its high end belong to it."""

    low: Answer
    high: Answer
    closed: tuple[bool, bool]


def intervals(answer: Answer) -> list[Interval] | None:
    """The intervals of a set of reals in ascending order where their ends are numbers; None for what is not
    such a set."""
    if isinstance(answer, Union):
        return _united(answer.parts)
    if isinstance(answer, Relation):
        return _solution(answer)
    if not isinstance(answer, Group):
        return None
    if answer.brackets == "or":
        return _united(answer.items)
    if answer.brackets == "{}":
        return [Interval(item, item, (True, True)) for item in answer.items] or None
    if len(answer.items) != 2 or not answer.brackets:
        return None
    low, high = answer.items
    return [Interval(low, high, (answer.brackets[0] == "[", answer.brackets[1] == "]"))]


def _united(parts: tuple[Answer, ...]) -> list[Interval] | None:
    united: list[Interval] = []
    for part in parts:
        of_part = intervals(part)
        if of_part is None:
            return None
        united += of_part
    lows: list[tuple[Fraction | float, int]] = []
    for index, interval in enumerate(united):
        low = tree_of(interval.low)
        value = float("-inf") if low == MINUS_INFINITY else approximate(low)
        if value is None:  # ends with symbols have no order
            return united
        lows.append((value, index))
    return [united[index] for _, index in sorted(lows)]


def _solution(relation: Relation) -> list[Interval] | None:
    """The reals of which a relation is true."""
    if relation.operators == ("in",):
        return intervals(relation.sides[1])
    about = subject(relation)
    operators, sides = relation.operators, relation.sides
    if about is None or len(sides) > 3:
        return None
    if len(sides) == 2 and not isinstance(about, Symbol):
        return _solve(relation)  # 2x - 1 > 5
    if operators == ("!=",):  # all but one
        bound = sides[0] if is_numeric(sides[0]) else sides[1]
        return [Interval(_LOWEST, bound, (False, False)), Interval(bound, _HIGHEST, (False, False))]
    chain = ascending(relation)  # 2 > x > 1
    operators, sides = chain.operators, chain.sides
    if len(sides) == 2 and tree_of(sides[0]) == about:  # x < 2
        operators, sides = ("<", *operators), (_LOWEST, *sides)
    elif len(sides) == 2:
        operators, sides = (*operators, "<"), (*sides, _HIGHEST)
    if not {"<", "<="}.issuperset(operators):
        return None
    low, _, high = sides
    return [Interval(low, high, (operators[0] == "<=", operators[1] == "<="))]


def _solve(relation: Relation) -> list[Interval] | None:
    """The reals of which an inequality is true that is linear in its one symbol: 2x - 1 > 5."""
    left, right = relation.sides
    if not isinstance(left, Expression) or not isinstance(right, Expression):
        return None
    difference = left.tree - right.tree
    if len(difference.symbols) != 1 or left.ambiguous or right.ambiguous:
        return None
    name = min(difference.symbols)
    root_and_slope = linear_root(difference, name, {})
    if root_and_slope is None:
        return None
    root, slope = root_and_slope
    operator = relation.operators[0]
    operator = operator if slope > 0 else _FLIPPED.get(operator, operator)
    return _solution(Relation((operator,), (Expression(Symbol(name)), Expression(Number(root)))))
