"""Which answers may be called different: of closed kinds, whose meaning leaves nothing open.

Of other answers (trigonometric functions, equations to be solved, solutions with free constants, sentences) a
difference in writing is often none in meaning, and a right answer that counts as wrong becomes a negative
that is right. So everything else that is not proved equal is not decided.
"""

from pns.answers.polynomials import is_rational_function
from pns.answers.relations import ends, named_value
from pns.answers.tree import (
    Answer,
    Based,
    Expression,
    Group,
    Matrix,
    Ratio,
    Relation,
    Union,
    Words,
    is_numeric,
)


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
