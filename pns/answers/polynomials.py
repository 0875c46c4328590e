"""Polynomials and rational functions, by the form of their trees."""

import re

from pns.answers.tree import Constant, Negative, Number, Power, Product, Quotient, Sum, Symbol, Tree, walk

_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\w+)?")  # of a variable; f(x), y' and dy/dx are none
_CONSTANT = re.compile(r"[CKck]_\w+|[CK]")  # free constants, beside any variable
_VARIABLES = frozenset("xyztuv")  # beside them these are constants, too:
_CONSTANTS = frozenset("ckABDE")
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
        case Sum(parts) | Product(parts) | Negative(parts) | Quotient(parts):
            return all(map(_is_rational, parts))
        case Power((base, Number(exponent))) | Power((base, Negative((Number(exponent),)))):
            return exponent.denominator == 1 and _is_rational(base)
    return False


def is_polynomial(tree: Tree) -> bool:
    """Whether it is written as a polynomial in its symbols: sums, products and powers, divided by numbers."""
    if not tree.symbols:
        return True
    match tree:
        case Quotient((numerator, denominator)):
            return not denominator.symbols and is_polynomial(numerator)
        case Power((base, Number(exponent))):
            return exponent >= 0 and exponent.denominator == 1 and is_polynomial(base)
        case Sum(parts) | Product(parts) | Negative(parts):
            return all(map(is_polynomial, parts))
    return isinstance(tree, Symbol)
