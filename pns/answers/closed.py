"""Which answers may be called different: of closed kinds, whose meaning leaves nothing open.

Of other answers (trigonometric functions, equations to be solved, solutions with free constants, sentences) a
difference in writing is often none in meaning, and a right answer that counts as wrong becomes a negative
that is right. So everything else that is not proved equal is not decided.
"""

import re

from pns.answers.exact import WHOLE_NUMBERS
from pns.answers.relations import ends, named_value
from pns.answers.tree import (
    Answer,
    Based,
    Constant,
    Expression,
    Group,
    Matrix,
    Number,
    Power,
    Product,
    Quotient,
    Ratio,
    Relation,
    Sum,
    Symbol,
    Tree,
    Union,
    Words,
    is_numeric,
    walk,
)

_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\w+)?")  # of a variable; f(x), y' and dy/dx are none
_CONSTANT = re.compile(r"[CKck]_\w+|[CK]")  # free constants, beside any variable
_VARIABLES = frozenset("xyztuv")  # beside them these are constants, too:
_CONSTANTS = frozenset("ckABDE")


def is_closed(answer: Answer) -> bool:
    """Numbers, tuples, matrices, intervals, finite sets of them; a letter, a word; polynomials and rational
    functions without free constants or parameters; what names one of these (`x = 5`)."""
    match answer:
        case Expression(tree, ambiguous=is_ambiguous):
            return not tree.symbols or (not is_ambiguous and is_rational_function(tree))
        case Words(text):
            return bool(text)
        case Group(_, parts) | Union(parts) | Ratio(parts):
            return all(map(is_closed, parts))
        case Matrix(rows):
            return all(is_closed(entry) for row in rows for entry in row)
        case Relation():
            if named := named_value(answer):
                return is_closed(named[1])
            if all(map(is_numeric, answer.sides)):  # 2+3=5
                return True
            own_ends = ends(answer)
            return own_ends is not None and all(is_numeric(end) for end, _ in own_ends)
    return isinstance(answer, Based)


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
