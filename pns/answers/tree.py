"""What an answer is once it is read: expressions as trees, and the forms of answer that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TypeGuard


class Tree:
    """An expression. Operators make larger ones: `x + y` is a `Sum`."""

    def __add__(self, other: Tree) -> Tree:
        return Sum((self, other))

    def __sub__(self, other: Tree) -> Tree:
        return self + -other

    def __mul__(self, other: Tree) -> Tree:
        return Product((self, other))

    def __truediv__(self, other: Tree) -> Tree:
        return Quotient((self, other))

    def __pow__(self, other: Tree) -> Tree:
        return Power((self, other))

    def __neg__(self) -> Tree:
        return Number(-self.value) if isinstance(self, Number) else Product((whole(-1), self))

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The names of its free symbols; none for a number."""
        return frozenset()


@dataclass(frozen=True)
class Number(Tree):
    value: Fraction


@dataclass(frozen=True)
class Symbol(Tree):
    name: str

    @cached_property
    def symbols(self) -> frozenset[str]:
        return frozenset((self.name,))


@dataclass(frozen=True)
class Constant(Tree):
    name: str  # pi, e, i, inf


@dataclass(frozen=True)
class Operation(Tree):
    """An expression made of others."""

    parts: tuple[Tree, ...]

    @cached_property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*[part.symbols for part in self.parts])


class Sum(Operation): ...


class Product(Operation): ...


class Quotient(Operation): ...  # numerator, denominator


class Power(Operation): ...  # base, exponent; roots have one that is a quotient


@dataclass(frozen=True)
class Call(Operation):
    """A function by its name, applied to the parts."""

    name: str


@dataclass(frozen=True)
class Series(Operation):
    """A sum or product of terms; the parts are the first index, the last one and the term."""

    kind: str  # sum, prod
    variable: str

    @cached_property
    def symbols(self) -> frozenset[str]:
        low, high, term = self.parts
        return low.symbols | high.symbols | (term.symbols - {self.variable})


def whole(value: int) -> Number:
    return Number(Fraction(value))


ZERO, ONE = whole(0), whole(1)
INFINITY = Constant("inf")
MINUS_INFINITY = -INFINITY
DEGREE = Constant("pi") / whole(180)  # in radians
_MAX_POWER = 1000  # of a polynomial
LOG_BASE = "log base"  # the symbol that stands for ln b, where b is the base that a logarithm leaves open


@dataclass(frozen=True)
class Expression:
    """A number or an expression. `step` is the place value of the last digit of a plain decimal (1/100 for
    2.54), None for anything else. `ambiguous`: conventions differ (1/2x, f(x)), so that a difference found
    under one reading proves nothing."""

    tree: Tree
    unit: str = ""
    percent: bool = False
    degrees: bool = False
    ambiguous: bool = False
    step: Fraction | None = None


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Based:
    """Digits with a base as subscript: `204_5`."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """`7:32`; `clock` where it may be a time of day: two digits after the colon."""

    parts: tuple[Answer, ...]
    clock: bool = False


@dataclass(frozen=True)
class Group:
    """`brackets` "()", "[]", "[)", "(]" ordered, "{}" a set, "" a bare list ("or" if separated by "or")."""

    brackets: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Relation:
    """sides[0] operators[0] sides[1] ...; operators are =, <, >, <=, >=, !=, in."""

    operators: tuple[str, ...]
    sides: tuple[Answer, ...]


@dataclass(frozen=True)
class Union:
    parts: tuple[Answer, ...]


Answer = Expression | Words | Based | Ratio | Group | Matrix | Relation | Union
EMPTY_SET = Group("{}", ())
REALS = Group("()", (Expression(MINUS_INFINITY), Expression(INFINITY)))


def letter(name: str) -> Tree:
    """The symbol of a name, or the constant that the letter stands for."""
    return Constant(name) if name in ("e", "i") else Symbol(name)


def product_of(factors: list[Tree]) -> Tree:
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def is_numeric(answer: Answer) -> TypeGuard[Expression]:
    """Whether it is an expression without free symbols."""
    return isinstance(answer, Expression) and not answer.tree.symbols


def walk(tree: Tree) -> Iterator[Tree]:
    yield tree
    if isinstance(tree, Operation):
        for part in tree.parts:
            yield from walk(part)


def degree(tree: Tree, with_steps: bool = False) -> int | None:
    """At least the degree of a polynomial in its symbols, written as sums, products and powers, divided by
    numbers; None for anything else. `with_steps`: floors and ceilings of linear terms and powers of -1 with
    such exponents may be among its terms, for one whole number."""
    if not tree.symbols:
        return 0
    parts = tree.parts if isinstance(tree, Operation) else ()
    degrees = [degree(part, with_steps) for part in parts]
    known = [value for value in degrees if value is not None]
    if len(known) < len(parts):
        return None
    match tree:
        case Symbol():
            return 1
        case Sum():
            return max(known)
        case Product():
            return sum(known)
        case Quotient((_, denominator)) if not denominator.symbols:
            return known[0]
        case Power((_, Number(exponent))) if exponent.denominator == 1 and 0 <= exponent <= _MAX_POWER:
            return known[0] * int(exponent)
        case Call(_, "floor" | "ceil") if with_steps and known == [1]:
            return 1
        case Power((base, _)) if with_steps and base == whole(-1):
            return 0 if known[1] == 1 else None
    return None


def substitute(tree: Tree, values: Mapping[str, Tree]) -> Tree:
    """The tree with a value in place of every symbol that has one."""
    if isinstance(tree, Operation):
        return replace(tree, parts=tuple(substitute(part, values) for part in tree.parts))
    return values.get(tree.name, tree) if isinstance(tree, Symbol) else tree


def both_signs(*answers: Answer) -> list[Answer]:
    """The values of an answer that was read with its upper and with its lower signs; in a list they are two
    more items."""
    lists = [answer.items for answer in answers if isinstance(answer, Group)]
    first = answers[0]
    if isinstance(first, Group) and first.brackets in ("", "or", "{}"):
        values = [value for items in zip(*lists, strict=True) for value in both_signs(*items)]
        return [replace(first, items=tuple(values))]
    return [first, *(answer for answer in answers[1:] if answer != first)]
