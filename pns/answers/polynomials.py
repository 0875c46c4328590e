"""Polynomials and rational functions, by the form of their trees."""

import re

from pns.answers.tree import (
    Call,
    Constant,
    Number,
    Operation,
    Power,
    Product,
    Quotient,
    Sum,
    Symbol,
    Tree,
    walk,
    whole,
)

_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\w+)?")  # of a variable; f(x), y' and dy/dx are none
_CONSTANT = re.compile(r"[CKck]_\w+|[CK]")  # free constants, beside any variable
_VARIABLES = frozenset("xyztuv")  # beside them these are constants, too:
_CONSTANTS = frozenset("ckABDE")
_MAX_POWER = 1000
WHOLE_NUMBERS = frozenset("nkmljN")  # names that often stand for them; beside pi, of a family of solutions


def is_rational_function(tree: Tree) -> bool:
    """Of its symbols, none of which may be a free constant or a parameter."""
    names = tree.symbols
    if not all(map(_NAME.fullmatch, names)) or not _is_rational(tree):
        return False
    if len(names) > 1 and any(map(_CONSTANT.fullmatch, names)):
        return False
    if names & _VARIABLES and names & _CONSTANTS:
        return False
    return names.isdisjoint(WHOLE_NUMBERS) or Constant("pi") not in walk(tree)


def _is_rational(tree: Tree) -> bool:
    if not tree.symbols:
        return True
    match tree:
        case Symbol():
            return True
        case Sum(parts) | Product(parts) | Quotient(parts):
            return all(map(_is_rational, parts))
        case Power((base, Number(exponent))):
            return exponent.denominator == 1 and _is_rational(base)
    return False


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
