r"""An exact comparison of final answers, that shares no code with math-verify.

The comparison is one of the two verifiers that must agree before an answer counts as wrong. It says "same"
and "different" only where that is proved (`pns.answers.exact`); of everything else it says that it cannot
tell. "Different" is said only of closed kinds (`pns.answers.closed`). Conventions, where usage differs:

- a list without brackets is unordered ("1, -2", the usual way to state all solutions), `(1, -2)` is ordered,
  `\{1, -2\}` is a set;
- a unit, a currency sign or `x =` that only one side states does not count; two different units do (`5 cm`,
  `5 m`);
- `50%` is `0.5` and `50`; `90^\circ` is `90` and `\pi/2`;
- a base is part of the answer: `101_2` is neither `101_3` nor, decidedly, `5`;
- `0.33` is not `1/3`, but a rounding is not called different either, unless a tolerance is given; nor is `3`
  beside `3.14` or `\pi`;
- solutions are the same whatever their arbitrary constants and whole-numbered parameters are called
  (`pns.answers.families`);
- `m+n=31` in a prediction states 31 where the gold answer is a number;
- letters name choices: `(A)`, `\text{A}` and `A` are one answer; words are compared without case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from pns.answers.closed import is_closed
from pns.answers.exact import Budget, approximate, rational, same_value
from pns.answers.families import is_same_family, is_same_up_to_constants
from pns.answers.readings import MAX_CHARACTERS, readings
from pns.answers.relations import (
    End,
    ascending,
    difference_of_sides,
    ends,
    named_value,
    subject,
    tree_of,
    with_argument_of,
    with_primes_of,
)
from pns.answers.spelling import spelling, stable
from pns.answers.tree import (
    DEGREE,
    EMPTY_SET,
    ONE,
    REALS,
    ZERO,
    Answer,
    Based,
    Call,
    Constant,
    Expression,
    Group,
    Matrix,
    Number,
    Ratio,
    Relation,
    Sum,
    Symbol,
    Tree,
    Union,
    Words,
    degree,
    is_numeric,
    substitute,
    walk,
    whole,
)
from pns.answers.units import unit_size
from pns.answers.words import number_in_words
from pns.records import AnswerRule

_MAX_WRITTEN = 10**4300  # longer integers Python does not turn into text
_MAX_PAIRS = 400  # of items compared with each other
_ARTICLE = re.compile(r"^(?:the )?(?:a )?(?:an )?")  # "the east" and "east" are the same
_NOTHING = {
    *("no solution", "no solutions", "empty set", "the empty set", "does not exist", "no real solution"),
    *("no real solutions", "none"),
}
_EVERYTHING = {"all real numbers", "all reals", "the set of all real numbers", "all real number"}
_VAGUE = {
    *("none", "nothing", "null", "empty", "never", "no", "not", "impossible", "undefined", "infinite"),
    *("infinity", "unbounded", "neither", "dne", "all", "any"),
}
_POLAR = ({"yes", "no"}, {"true", "false"})  # opposites, in each set
_UNCLEAR = _VAGUE.union(*_POLAR)
_UNORDERED = {"", "or", "{}"}
_CONVERSIONS = {3, 7, 12, 24, 60, 3600}  # beside powers of ten: ratios that may be a change of unit


@dataclass(frozen=True)
class Finding:
    """`same` is None where nothing is proved; `reason` says why, in words. `doubtful`: both sides were read
    and something speaks against calling them equal (another unit, another name, a rounding), so that equality
    by another verifier alone proves nothing."""

    same: bool | None
    reason: str
    doubtful: bool = False


_SAME = Finding(True, "equal")
_DIFFERENT = Finding(False, "different")
_DIFFERENT_NUMBERS = Finding(False, "different numbers")
_OPEN = Finding(None, "not proved equal, and not of a kind that may be called different", doubtful=True)
_TWO_READINGS = Finding(None, "an expression that is read in different ways", doubtful=True)


def _undecided(reason: str) -> Finding:
    return Finding(None, reason, doubtful=True)


def _first(findings: Iterable[Finding], verdicts: Sequence[bool | None] = (False, None, True)) -> Finding:
    """The first finding with the first of these verdicts that any has; as they are, whether all are the
    same."""
    return min(findings, key=lambda finding: verdicts.index(finding.same), default=_SAME)


def normalise_answer(answer: str) -> str:
    """One spelling of equal answers: exact numbers as `n` or `n/d` without separators and units (percents
    keep `%`), anything else without TeX decoration and spaces, words in lower case. Idempotent."""
    return stable(_normal_form, answer)


def _normal_form(text: str) -> str:
    number, is_percent = _stated_number(text)
    if number is None or max(map(abs, number.as_integer_ratio())) >= _MAX_WRITTEN:
        return spelling(text)
    return f"{number}%" if is_percent else str(number)


def exact_value(answer: str) -> Fraction | None:
    """The rational number an answer states (percents in percent, units dropped); None where there is none."""
    return _stated_number(answer)[0]


def _stated_number(answer: str) -> tuple[Fraction | None, bool]:
    for reading in readings(answer)[:1]:
        if isinstance(reading, Relation) and len(reading.sides) == 2 and (named := named_value(reading)):
            reading = named[1]
        if is_numeric(reading):
            return rational(reading.tree), reading.percent
    return None, False


def same_answer(gold: str, prediction: str, rule: AnswerRule = AnswerRule()) -> bool | None:  # noqa: B008
    """Whether two final answers are the same; None where that cannot be decided here. Never raises;
    milliseconds at most on any text."""
    return compare_answers(gold, prediction, rule).same


def compare_answers(gold: str, prediction: str, rule: AnswerRule = AnswerRule()) -> Finding:  # noqa: B008
    """`same_answer` with its reason."""
    if not gold.strip() or not prediction.strip():
        return Finding(None, "an empty answer")
    if max(len(gold), len(prediction)) > MAX_CHARACTERS:
        return Finding(None, f"an answer of over {MAX_CHARACTERS} characters")
    if spelling(gold) == spelling(prediction):
        return Finding(True, "the same text")
    golds, predictions = readings(gold), readings(prediction)
    if not golds or not predictions:
        return Finding(None, f"the {'prediction' if golds else 'gold answer'} is not in a notation read here")
    basis = _Basis(rule)
    golds = [_with_unit(reading, rule.unit) for reading in golds]
    try:
        if is_numeric(golds[0]):
            predictions += _numbers_asked_for(basis, predictions)
        findings = [_compare(basis, a, b) for a in golds for b in predictions]
    except RecursionError:
        return _undecided("answers too deeply nested to compare")
    best = _first(findings, (True, None, False))
    if min(len(golds), len(predictions)) > 1 and findings[0].same is False and best.same:
        return _undecided("numbers with separators, or lists")  # 100,200 and 200,100
    of_first_reading = findings[: len(predictions)]
    if best.same and all(finding.same is False for finding in of_first_reading) and "," in gold:
        return _undecided("a decimal comma in the gold answer, or a list")  # 1,5
    return best


def _numbers_asked_for(basis: _Basis, predictions: list[Answer]) -> list[Answer]:
    """The 31 of `m+n=31`, whose problem asks for that sum of letters."""
    numbers: list[Answer] = []
    for reading in predictions:
        match reading:
            case Relation(operators, (Expression(Sum() as asked), *_, Expression(value) as last)):
                is_asked_for = set(operators) == {"="} and degree(asked) == 1 and len(asked.symbols) > 1
                is_number = not value.symbols and basis.same(value, ZERO) is False  # not x+y-3=0
                numbers += [last] if is_asked_for and is_number and _holds(basis, reading) else []
    return numbers


def _with_unit(answer: Answer, unit: str) -> Answer:
    """The gold answer with the rule's unit, if it is a number that has none."""
    if not unit or not isinstance(answer, Expression) or answer.unit or answer.percent or answer.degrees:
        return answer
    unit = re.sub(r"[\s${}\\]", "", unit)
    if unit == "%":
        return replace(answer, percent=True)
    return replace(answer, degrees=True) if unit == "^circ" else replace(answer, unit=unit)


@dataclass
class _Basis:
    """What one comparison goes by: the benchmark's rule, and the work that is left to it."""

    rule: AnswerRule
    budget: Budget = field(default_factory=Budget)
    in_list: bool = False  # constants are the same in all items
    in_tuple: bool = False  # and so are parameters

    def same(self, x: Tree, y: Tree) -> bool | None:
        same = same_value(x, y, self.budget)
        if same or not self.rule.tolerance or x.symbols or y.symbols:
            return same
        distance = _distance(x, y)
        return same if distance is None else distance <= Fraction(repr(self.rule.tolerance))


def _compare(basis: _Basis, a: Answer, b: Answer) -> Finding:
    """The gold answer and the prediction, or parts of them."""
    if a == b:
        return _SAME
    finding = _compare_forms(basis, a, b)
    if not finding.same and not basis.in_tuple and is_same_family(a, b):
        return Finding(True, "the same family of values")
    if finding.same is False and not (is_closed(a) and is_closed(b)):
        return _OPEN
    return finding


def _compare_forms(basis: _Basis, a: Answer, b: Answer) -> Finding:
    orders = (a, b), (b, a)
    compare, x, y = next(
        (forms[type(x)], x, y) for forms in _PRECEDENCE for x, y in orders if type(x) in forms
    )
    return compare(basis, x, y)


def _compare_expressions(basis: _Basis, a: Expression, b: Expression) -> Finding:
    x, y = a.tree, b.tree
    if any(x.degrees and y.unit and not y.unit.startswith("degree") for x, y in ((a, b), (b, a))):
        return _undecided("an angle and a quantity with a unit")
    if a.unit and b.unit:
        size_x, dimensions_x, is_known_x = unit_size(a.unit)
        size_y, dimensions_y, is_known_y = unit_size(b.unit)
        if dimensions_x != dimensions_y:
            if is_known_x and is_known_y:
                return Finding(False, f"different units: {a.unit} and {b.unit}")
            return _undecided(f"units that are not known to be the same: {a.unit} and {b.unit}")
        x, y = x * Number(size_x), y * Number(size_y)  # 5 m and 500 cm
    same = basis.same(x, y)
    is_ambiguous = a.ambiguous or b.ambiguous
    if same:
        is_letter_unit = is_ambiguous and bool(a.unit) != bool(b.unit)
        return _undecided("a letter that may be a unit or a factor") if is_letter_unit else _SAME
    for is_in_a, is_in_b, factor, reason in (
        (a.percent, b.percent, whole(100), "equal as percentages"),  # 50% and 0.5
        (a.degrees, b.degrees, ONE / DEGREE, "equal as angles"),  # 90^\circ and \pi/2
    ):
        marked, plain = (x, y) if is_in_a else (y, x)
        if is_in_a != is_in_b and basis.same(marked, plain * factor):
            return Finding(True, reason)
    if not (x.symbols or y.symbols):
        if same is None:
            return _undecided("numbers of which neither equality nor difference is proved")
        return _compare_numbers(basis, a, b, x, y)
    if not basis.in_list and is_same_up_to_constants(x, y):
        return Finding(True, "equal but for their arbitrary constants")
    if same is None or x.symbols != y.symbols:
        return _undecided("expressions of which neither equality nor difference is proved")
    return _DIFFERENT


def _compare_numbers(basis: _Basis, a: Expression, b: Expression, x: Tree, y: Tree) -> Finding:
    """Two numbers that differ; `x` and `y` are their values in a unit of both."""
    distance = None if basis.rule.tolerance else _distance(x, y)
    if distance is not None and (_is_rounding(a, b, distance) or _is_rounding(b, a, distance)):
        return _undecided("one number may be a rounding of the other")
    ratio = rational(x / y)
    if ratio and ratio > 0 and bool(a.unit) != bool(b.unit):
        factor = max(ratio, 1 / ratio)
        if factor in _CONVERSIONS or factor == 10 ** round(math.log10(factor.numerator)):  # 5 and 500 cm
            return _undecided("one number may be the other in another unit")
    has_pi = [Constant("pi") in walk(tree) for tree in (x, y)]
    if has_pi[0] != has_pi[1] and (basis.same(x * DEGREE, y) or basis.same(x, y * DEGREE)):
        return _undecided("one number may be the other as an angle in degrees")
    if (a.ambiguous or b.ambiguous) and not (a.unit and b.unit):
        return _TWO_READINGS
    return _DIFFERENT_NUMBERS


def _distance(x: Tree, y: Tree) -> Fraction | None:
    """|x - y| of two real numbers, to 50 digits where it is not rational."""
    return approximate(Call((x - y,), "abs"))


def _is_rounding(rounded: Expression, other: Expression, distance: Fraction) -> bool:
    """Whether a decimal or an integer may be the other number rounded to the nearest, or cut off."""
    step = rounded.step or _place_of_integer(rounded, other, distance)
    if not step or (other.step and other.step >= step):
        return False
    lost = approximate(Call((other.tree,), "abs") - Call((rounded.tree,), "abs"))
    return distance * 2 <= step or (distance < step and lost is not None and lost > 0)


def _place_of_integer(rounded: Expression, other: Expression, distance: Fraction) -> Fraction | None:
    """The place value of the last digit of an integer beside a decimal or an irrational number; zeros at its
    end may be rounded where it is within 1 % of the other."""
    value = rational(rounded.tree)
    if value is None or value.denominator != 1 or not (other.step or rational(other.tree) is None):
        return None
    digits = str(abs(value.numerator)) if abs(value) < _MAX_WRITTEN else ""
    zeros = len(digits) - len(digits.rstrip("0"))
    return Fraction(10**zeros if distance * 100 <= abs(value) else 1)


def _compare_group(basis: _Basis, a: Group, b: Answer) -> Finding:
    if not isinstance(b, Group):
        if a.brackets not in _UNORDERED:
            is_several = a.brackets in ("[)", "(]") or len(a.items) > 1
            return _DIFFERENT if is_several else _undecided("answers of different kinds")
        verdicts = [_compare(basis, item, b).same for item in _flat(a.items)]
        if False in verdicts or not verdicts:
            return Finding(False, "one answer and several")
        return _SAME if verdicts == [True] else _undecided("one answer and a set")
    kinds = {a.brackets, b.brackets}
    items = a.items + b.items
    has_inequality = any(isinstance(item, Relation) and item.operators[0] != "=" for item in items)
    if kinds & {"[)", "(]"} or ("or" in kinds and has_inequality):  # x < 1 or x > 2
        return _compare_sets(basis, a, b)
    if kinds <= _UNORDERED or (basis.rule.unordered and kinds & {"", "or"}):
        return _compare_unordered(basis, a.items, b.items, are_sets=kinds == {"{}"})
    in_order = _compare_ordered(basis, a.items, b.items)
    names = [*_named(a.items), *_named(b.items)]
    if "" in kinds and names == sorted(names) and names and in_order.same:  # x=1, y=2 and (1, 2)
        return in_order
    is_vector = kinds == {"()", "[]"}  # that is written with either
    if a.brackets == b.brackets or (is_vector and not in_order.same):
        return in_order
    is_apart = _compare_unordered(basis, a.items, b.items).same is False
    return _DIFFERENT if is_apart else _undecided("the same items in different brackets")


def _compare_ordered(basis: _Basis, a: Sequence[Answer], b: Sequence[Answer]) -> Finding:
    if len(a) != len(b):
        return Finding(False, "a different number of items")
    inside = replace(basis, in_list=True, in_tuple=True)
    return _first(_compare(inside, x, y) for x, y in zip(a, b, strict=True))


def _compare_unordered(
    basis: _Basis, a: Sequence[Answer], b: Sequence[Answer], are_sets: bool = False
) -> Finding:
    """Two lists; of sets, an item may be written several times."""
    a, b = _flat(a), _flat(b)
    if not a or not b:
        return _DIFFERENT
    if len(a) * len(b) > _MAX_PAIRS:
        return _undecided("lists too long to compare")
    basis = replace(basis, in_list=len(a) > 1 or basis.in_list)
    names_a, names_b = _named(a), _named(b)
    if names_a and names_b and names_a.keys() == names_b.keys():
        return _first(_compare(basis, value, names_b[name]) for name, value in names_a.items())
    if bool(names_a) != bool(names_b):  # x=1, y=2 and 1, 2: the names give the order
        in_order = _compare_ordered(basis, a, b)
        return in_order if in_order.same else _undecided("a list with names and one without")
    rows = [[_compare(basis, x, y).same for y in b] for x in a]
    free = list(range(len(b)))
    for row in rows:
        matches = [column for column in free if row[column]]  # each item of b serves once
        if matches:
            free.remove(matches[0])
    if not free and len(a) == len(b):
        return _SAME
    columns = [list(column) for column in zip(*rows, strict=True)]
    if are_sets and all(True in line for line in rows + columns):
        return _SAME
    if any({False}.issuperset(line) for line in rows + columns):
        return Finding(False, "an item that the other list lacks")
    return _undecided("lists with items that may be the same, or that repeat them differently")


def _flat(items: Sequence[Answer]) -> list[Answer]:
    """The items with those of bare lists among them in their place."""
    flat: list[Answer] = []
    for item in items:
        flat += _flat(item.items) if isinstance(item, Group) and item.brackets in ("", "or") else [item]
    return flat


def _named(items: Sequence[Answer]) -> dict[str, Answer]:
    """The values of items that are equations for different names; empty for others."""
    named = [named_value(item) for item in items if isinstance(item, Relation) and not _middle(item)]
    values = dict(filter(None, named))
    return values if len(values) == len(items) > 1 else {}


def _compare_sets(basis: _Basis, a: Answer, b: Answer) -> Finding:
    """Unions of intervals and points, inequalities."""
    for answer in (a, b):
        if is_numeric(answer) and not answer.ambiguous:
            return Finding(False, "a set and a number")
    x, y = ends(a), ends(b)
    if x is None or y is None:
        return _undecided("sets of a form that is not read here")
    x, y = _joined(basis, x), _joined(basis, y)
    has_points = any(isinstance(answer, Group) and answer.brackets == "{}" for answer in (a, b))
    if has_points and any(isinstance(answer, Relation) for answer in (a, b)):
        return _undecided("a list of numbers and an inequality, which may be of whole numbers")
    if len(x) != len(y):
        if all(is_numeric(value) for value, _ in x + y):
            return Finding(False, "sets of different parts")
        return _undecided("unions of different length")
    if [is_closed for _, is_closed in x] != [is_closed for _, is_closed in y]:
        return Finding(False, "an end that belongs to one set only")
    finding = _compare_ordered(basis, [value for value, _ in x], [value for value, _ in y])
    names = {about.symbols for part in _parts(a) + _parts(b) if (about := subject(part))}
    return _undecided("the same set of different names") if finding.same and len(names) > 1 else finding


def _parts(answer: Answer) -> list[Relation]:
    """The inequalities that a set is stated by."""
    match answer:
        case Relation():
            return [answer]
        case Group("or", parts) | Union(parts):
            return [relation for part in parts for relation in _parts(part)]
    return []


def _joined(basis: _Basis, ascending_ends: list[End]) -> list[End]:
    """The ends of intervals with those joined that touch."""
    joined = ascending_ends[:2]
    for low, high in zip(ascending_ends[2::2], ascending_ends[3::2], strict=True):
        touches = (joined[-1][1] or low[1]) and _compare(basis, joined[-1][0], low[0]).same
        joined[-1:] = [high] if touches else [joined[-1], low, high]
    return joined


def _compare_relation(basis: _Basis, relation: Relation, other: Answer) -> Finding:
    chains = [answer for answer in (relation, other) if isinstance(answer, Relation)]
    if not all(_holds(basis, chain) for chain in chains):
        return _undecided("a chain of equations whose sides are not proved equal")
    middles = [_middle(chain) for chain in chains if len(chain.sides) > 2]
    if len(middles) == 2 and any(middles) and not _compare_ordered(basis, *middles).same:
        return _undecided("chains of equations for different names")
    is_equation = relation.operators[0] in ("=", "in")
    if isinstance(other, Relation):
        if is_equation and other.operators[0] in ("=", "in"):
            return _compare_equations(basis, relation, other)
        if "=" in (relation.operators[0], other.operators[0]):
            return _undecided("an equation and an inequality")
        return _compare_inequalities(basis, relation, other)
    if not is_equation and isinstance(other, Group | Union):
        return _compare_sets(basis, relation, other)
    if not is_equation and is_numeric(other) and relation.operators[0] != "!=" and ends(relation):
        return Finding(False, "an inequality and a number")
    if named := named_value(relation):  # x = 5 and 5
        return _compare(basis, named[1], other)
    if set(relation.operators) == {"="} and all(map(is_numeric, relation.sides)):  # 2+3=5
        return _compare(basis, relation.sides[-1], other)
    return _undecided("a relation and an answer of another kind")


def _holds(basis: _Basis, relation: Relation) -> bool:
    """Whether the numbers in a chain of equations, or else its values, are proved to be the same; those of
    `x = 5 + 5 = 11` and `y = 2x z = x` are not."""
    if set(relation.operators) != {"="}:
        return True
    *values, last = relation.sides[1:]
    numbers: list[Answer] = [side for side in relation.sides[:-1] if is_numeric(side)]
    return all(_compare(basis, side, last).same for side in (numbers if is_numeric(last) else values))


def _middle(chain: Relation) -> list[Answer]:
    """What a chain of equations says beside its first side, its last one and its numbers: the y of `x = y =
    4`."""
    return [side for side in chain.sides[1:-1] if "=" in chain.operators and not is_numeric(side)]


def _compare_inequalities(basis: _Basis, a: Relation, b: Relation) -> Finding:
    x, y = subject(a), subject(b)
    if x and y and ends(a) and ends(b):
        finding = _compare_sets(basis, a, b)
        if x.symbols == y.symbols or finding.same is False:
            return finding
        return _undecided("the same inequality of different names")
    a, b = ascending(a), ascending(b)  # a > b > c and c < b < a
    if a.operators == b.operators and _compare_ordered(basis, a.sides, b.sides).same:
        return _SAME
    return _undecided("inequalities of which nothing is proved")


def _compare_equations(basis: _Basis, a: Relation, b: Relation) -> Finding:
    b = with_primes_of(a, b)
    a = with_primes_of(b, a)
    named_a, named_b = named_value(a), named_value(b)
    if not named_a or not named_b:
        return _compare_solutions(basis, a, b)
    (name_a, x), (name_b, y) = named_a, named_b
    renamed = with_argument_of(name_a, name_b, y)  # f(x) = 2x and f(n) = 2n
    finding = _compare(basis, x, renamed or y)
    if name_a == name_b or renamed is not None:
        return finding if finding.same is not None else _compare_solutions(basis, a, b)
    if finding.same and (is_numeric(x) or not isinstance(x, Expression)):  # x = 5 and y = 5
        return _undecided("the same value under different names")
    return _compare_solutions(basis, a, b)


def _compare_solutions(basis: _Basis, a: Relation, b: Relation) -> Finding:
    """Two equations, the same where their sides differ in proportion: then they have the same solutions."""
    x, y = difference_of_sides(a), difference_of_sides(b)
    if x is None or y is None or not a.operators == b.operators == ("=",):
        return _undecided("equations of a form that is not read here")
    point: dict[str, Tree] = {
        name: whole(index + 7) / whole(3) for index, name in enumerate(sorted(x.symbols | y.symbols))
    }
    x_at_point, y_at_point = substitute(x, point), substitute(y, point)
    is_value_known = basis.same(x_at_point, ZERO) is False and basis.same(y_at_point, ZERO) is False
    if x.symbols == y.symbols and is_value_known and basis.same(x * y_at_point, y * x_at_point):
        return Finding(True, "proportional equations")
    return _undecided("equations of which neither equality nor difference is proved")


def _compare_matrix(basis: _Basis, matrix: Matrix, other: Answer) -> Finding:
    if is_numeric(other):
        return _DIFFERENT
    if isinstance(other, Group):
        rows = [item.items for item in other.items if isinstance(item, Group) and item.brackets == "[]"]
        if other.brackets in ("()", "[]") and all(len(row) == 1 for row in matrix.rows):  # a column
            rows = [(item,) for item in other.items]
        if rows and len(rows) == len(other.items):
            other = Matrix(tuple(rows))
    if not isinstance(other, Matrix):
        return _undecided("a matrix and an answer of another kind")
    if [len(row) for row in matrix.rows] != [len(row) for row in other.rows]:
        return Finding(False, "matrices of different shape")
    return _compare_ordered(basis, sum(matrix.rows, ()), sum(other.rows, ()))


def _compare_based(basis: _Basis, based: Based, other: Answer) -> Finding:
    if isinstance(other, Based):
        values = _in_bases(based, based.base) + _in_bases(other, other.base)
        if len(values) == 2 and values[0] != values[1]:
            return Finding(False, "different numbers, in bases")
        return _undecided("one number in two bases")
    if not is_numeric(other):
        return _undecided("a number in a base and an answer of another kind")
    values = _in_bases(based, 10, based.base)
    if values and all(basis.same(other.tree, value) is False for value in values):
        return _DIFFERENT_NUMBERS
    return _undecided("the base is not stated on both sides")


def _in_bases(based: Based, *bases: int) -> list[Tree]:
    """The numbers that its digits are in those of the bases that have all of them."""
    highest = max(int(digit, 36) for digit in based.digits)
    return [whole(int(based.digits, base)) for base in bases if highest < base]


def _compare_ratio(basis: _Basis, ratio: Ratio, other: Answer) -> Finding:
    if not isinstance(other, Ratio):
        return _undecided("a ratio or a time and an answer of another kind")
    in_order = _compare_ordered(basis, ratio.parts, other.parts)
    if in_order.same or len(ratio.parts) != len(other.parts):
        return in_order
    x, y = list(map(tree_of, ratio.parts)), list(map(tree_of, other.parts))
    is_known = all(basis.same(part, ZERO) is False for part in x + y)
    if is_known and all(basis.same(u * y[0], v * x[0]) for u, v in zip(x, y, strict=True)):
        are_clocks = ratio.clock and other.clock
        return _undecided("ratios that may be times") if are_clocks else Finding(True, "equal ratios")
    return in_order


def _compare_words(basis: _Basis, words: Words, other: Answer) -> Finding:
    text = words.text
    if isinstance(other, Words):
        return _same_words(text, other.text)
    if is_numeric(other) and (part := number_in_words(f"a {text}")) and basis.same(other.tree, Number(part)):
        return _SAME  # "third" and 1/3
    if (text in _NOTHING and other == EMPTY_SET) or (text in _EVERYTHING and other == REALS):
        return _SAME
    if isinstance(other, Expression) and len(text) == 1:
        match other.tree:
            case Symbol(name) | Constant("e" | "i" as name) if len(name) == 1:
                return _SAME if name == text else _same_words(name, text)
    return _undecided("words or a letter that names a choice, and a formula")


def _same_words(a: str, b: str) -> Finding:
    """Two different words. Not decided: letters that differ in case only, abbreviations, plurals, words for
    "there is none"."""
    x, y = (_ARTICLE.sub("", text.casefold()) for text in (a, b))
    if (x == y and len(x) > 1) or {x, y} == {"no solution", "no solutions"}:
        return Finding(True, "the same words")
    if {x, y} in _POLAR:
        return Finding(False, "opposite words")
    words = x.split() + y.split()
    is_abbreviation = x.startswith(y) or y.startswith(x)  # "cube" and "cubes"
    if is_abbreviation or len(words) > 2 or not _UNCLEAR.isdisjoint(words):
        return _undecided("words that may state the same")
    return Finding(False, "different words")


_PRECEDENCE: tuple[dict[type, Callable[..., Finding]], ...] = (  # which form decides how two are compared
    {Relation: _compare_relation, Words: _compare_words},  # first, as x = (1, 2) may stand for (1, 2)
    {Matrix: _compare_matrix, Based: _compare_based, Ratio: _compare_ratio},
    {Union: _compare_sets},
    {Group: _compare_group},
    {Expression: _compare_expressions},
)
