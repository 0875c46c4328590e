"""What equations and inequalities say: the value of a name, a set of reals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

from pns.answers.exact import approximate, rational
from pns.answers.tree import (
    INFINITY,
    MINUS_INFINITY,
    ONE,
    ZERO,
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
    degree,
    is_numeric,
    substitute,
    walk,
)

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_NO_TREE = Symbol("")
_LOWEST, _HIGHEST = Expression(MINUS_INFINITY), Expression(INFINITY)
_LEIBNIZ = re.compile(r"d(?:\^(?P<order>\d))?(?P<of>[A-Za-z])/d(?P<by>[A-Za-z])(?:\^(?P=order))?")

End = tuple[Answer, bool]  # of an interval, and whether it belongs to it


def tree_of(answer: Answer) -> Tree:
    """The tree of an expression, a symbol without a name for any other answer."""
    return answer.tree if isinstance(answer, Expression) else _NO_TREE


def symbols_of(relation: Relation) -> frozenset[str]:
    return frozenset().union(*[tree_of(side).symbols for side in relation.sides])


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
        case Group(_, parts) | Ratio(parts):
            is_name = bool(parts) and all(map(_name, parts))
        case _:
            is_name = False
    return repr(answer) if is_name else ""


def _is_part_of_name(tree: Tree) -> bool:
    is_letter = isinstance(tree, Symbol) or tree in (Constant("e"), Constant("i"))
    return is_letter or isinstance(tree, Product | Quotient) or (isinstance(tree, Call) and tree.name != "ln")


def with_argument_of(name: str, other: str, value: Answer) -> Answer | None:
    """The value that `other` has, in the argument of `name`: of `f(n)` in x, where that is `f(x)`. None where
    the two are not the same function of one argument each."""
    x, y = (re.fullmatch(r"(.+)\(([A-Za-z]\w*)\)", function) for function in (name, other))
    if not x or not y or x[1] != y[1] or x[2] == y[2]:
        return None
    if not isinstance(value, Expression) or x[2] in value.tree.symbols:  # f(n) = n + x
        return None
    return replace(value, tree=substitute(value.tree, {y[2]: Symbol(x[2])}))


def with_primes_of(primed: Relation, other: Relation) -> Relation:
    r"""The other equation with Newton's and Lagrange's names of derivatives, where the first has these and
    the other has Leibniz's: `\frac{d^2y}{dx^2}` as `y''`, `\frac{dx}{dt}` as `\dot x`."""
    names = symbols_of(primed)
    derivatives = list(filter(None, map(_LEIBNIZ.fullmatch, symbols_of(other))))
    renamed: dict[str, Tree] = {}
    for leibniz in derivatives:
        order = int(leibniz["order"] or 1)
        primes, dots = leibniz["of"] + "'" * order, f"\\{'d' * (order - 1)}dot {leibniz['of']}"
        for name in (primes, dots)[: 1 + (leibniz["by"] == "t")]:
            if name in names:
                renamed[leibniz[0]] = Symbol(name)
    if not renamed or len({leibniz["by"] for leibniz in derivatives}) > 1:
        return other
    sides = [
        replace(side, tree=substitute(side.tree, renamed)) if isinstance(side, Expression) else side
        for side in other.sides
    ]
    return replace(other, sides=tuple(sides))


def difference_of_sides(relation: Relation) -> Tree | None:
    """Left minus right of two expressions; None where a side is none, has a unit, or may be read in other
    ways."""
    match relation.sides:
        case (Expression(left, "", ambiguous=False), Expression(right, "", ambiguous=False)):
            return left - right
    return None


def linear_root(tree: Tree, name: str) -> tuple[Fraction, Fraction] | None:
    """Zero and slope of an expression in its one symbol, if it is written as a linear one, not a constant."""
    at_0, at_1 = (rational(substitute(tree, {name: value})) for value in (ZERO, ONE))
    if degree(tree) != 1 or at_0 is None or at_1 is None or at_0 == at_1:
        return None
    return at_0 / (at_0 - at_1), at_1 - at_0


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


def ends(answer: Answer) -> list[End] | None:
    """The low and the high end of each interval of a set of reals, ascending where they are numbers; None for
    what is not such a set."""
    match answer:
        case Union(parts) | Group("or", parts):
            return _ends_of_union(parts)
        case Relation():
            return _ends_of_solution(answer)
        case Group("{}", items):
            return [(item, True) for item in items for _ in range(2)] or None
        case Group(brackets, (low, high)) if brackets:
            return [(low, brackets[0] == "["), (high, brackets[1] == "]")]
    return None


def _ends_of_union(parts: tuple[Answer, ...]) -> list[End] | None:
    pairs: list[list[End]] = []
    for part in parts:
        of_part = ends(part)
        if of_part is None:
            return None
        pairs += [of_part[index : index + 2] for index in range(0, len(of_part), 2)]
    lows = [-math.inf if pair[0][0] == _LOWEST else approximate(tree_of(pair[0][0])) for pair in pairs]
    known = [low for low in lows if low is not None]
    if len(known) == len(pairs):  # ends with symbols have no order
        pairs = [pairs[index] for index in sorted(range(len(pairs)), key=known.__getitem__)]
    return [end for pair in pairs for end in pair]


def _ends_of_solution(relation: Relation) -> list[End] | None:
    """The reals of which a relation is true."""
    if relation.operators == ("in",):
        return ends(relation.sides[1])
    about = subject(relation)
    operators, sides = relation.operators, relation.sides
    if about is None or len(sides) > 3:
        return None
    if len(sides) == 2 and not isinstance(about, Symbol):  # 2x - 1 > 5
        difference = difference_of_sides(relation)
        if difference is None or len(difference.symbols) != 1:
            return None
        about = Symbol(min(difference.symbols))
        root_and_slope = linear_root(difference, about.name)
        if root_and_slope is None:
            return None
        sides = (Expression(about), Expression(Number(root_and_slope[0])))
        if root_and_slope[1] < 0:
            operators = (_FLIPPED.get(operators[0], operators[0]),)
    if operators == ("!=",):  # all but one
        bound = sides[0] if is_numeric(sides[0]) else sides[1]
        return [(_LOWEST, False), (bound, False), (bound, False), (_HIGHEST, False)]
    chain = ascending(Relation(operators, sides))  # 2 > x > 1
    operators, sides = chain.operators, chain.sides
    if len(sides) == 2 and tree_of(sides[0]) == about:  # x < 2
        operators, sides = ("<", *operators), (_LOWEST, *sides)
    elif len(sides) == 2:
        operators, sides = (*operators, "<"), (*sides, _HIGHEST)
    if not {"<", "<="}.issuperset(operators):
        return None
    return [(sides[0], operators[0] == "<="), (sides[2], operators[1] == "<=")]
