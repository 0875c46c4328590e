r"""Final answers: taking them out of a completion, and an exact comparison that shares no code with
math-verify.

The comparison is one of the two verifiers that must agree before an answer counts as wrong. It says "same"
and "different" only where that is proved (`pns.answers.exact`); of everything else it says that it cannot
tell. Conventions, where usage differs:

- a list without brackets is unordered ("1, -2", the usual way to state all solutions), `(1, -2)` is ordered,
`\{1, -2\}` is a set; - a unit, a currency sign or `x =` that only one side states does not count; two
different units do (`5 cm`, `5 m`); - `50%` is `0.5` and `50`; `90^\circ` is `90` and `\pi/2`; - a base is
part of the answer: `101_2` is neither `101_3` nor, decidedly, `5`; - `0.33` is not `1/3`, but a rounding is
not called different either, unless a tolerance is given; - letters name choices: `(A)`, `\text{A}` and `A`
are one answer; words are compared without case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pns.answers.exact import Budget, approximate, rational, same_value
from pns.answers.notation import (
    MAX_CHARACTERS,
    UNIT_LETTERS,
    Based,
    Expr,
    Group,
    Matrix,
    Node,
    Ratio,
    Relation,
    Tree,
    Union,
    Words,
    is_number,
    is_prose,
    readings,
    rebuild,
    spelling,
    symbols,
    unit_size,
    walk,
)
from pns.records import AnswerRule

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\.|[{}]", re.DOTALL)
_JOINED = re.compile(r"[,;]|\b(?:and|or)\b")
_ANSWER = re.compile(r"\banswer\s*(?:is\s*:?|:|=)\s*|####\s*", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_MAX_BARE = 500  # characters of a prediction without a box that is read as the answer itself
_MAX_PAIRS = 400  # of items compared with each other

_NOTHING = {
    "no solution",
    "no solutions",
    "empty set",
    "the empty set",
    "does not exist",
    "no real solution",
    "no real solutions",
    "none",
}
_EVERYTHING = {"all real numbers", "all reals", "the set of all real numbers", "all real number"}
_VAGUE = frozenset(
    (
        "none",
        "nothing",
        "null",
        "empty",
        "never",
        "no",
        "not",
        "impossible",
        "undefined",
        "infinite",
        "infinity",
        "unbounded",
        "neither",
    )
) | {"dne", "all", "any"}
_POLAR = ({"yes", "no"}, {"true", "false"})
_CONVERSIONS = {3, 7, 12, 24, 60, 3600}  # beside powers of ten: ratios that may be a change of unit
_REALS = Group("()", (Expr(("-", ("inf",))), Expr(("inf",))))
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def extract_boxed(text: str, think_tags: tuple[str, str] = ("<think>", "</think>")) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces balance, stripped; None where there
    is none or it is empty.

    Boxes that are joined to the last one by nothing but commas, "and" or "or" state one answer: their
    contents, joined by ", ". A box inside a reasoning block that is never closed is not an answer. Where the
    prompt already opens the block, put its opening before `text`.
    """
    text = _finished(text, think_tags)
    spans = _boxes(text)
    if not spans:
        return None
    contents = [text[slice(*spans[-1])].strip()]
    for (_, end), (start, _) in zip(spans[-2::-1], spans[:0:-1], strict=True):
        between = text[end + 1 : text.rfind("\\", end, start)] if text.rfind("\\", end, start) > end else ""
        if len(between) > 40 or not _JOINED.search(between) or not _is_joint(between):
            break
        contents.insert(0, text[slice(*_span_ending(spans, end))].strip())
    return ", ".join(contents) or None


def extract_answer(text: str, think_tags: tuple[str, str] = ("<think>", "</think>")) -> str | None:
    r"""The final answer of a completion or of a bare answer: the box (`extract_boxed`). Where there is no box
    at all, what follows the last "answer is", "answer:" or "####" up to the end of its sentence, else the
    text. If at most 500 characters, that is the answer, or the formula between dollar signs, `\(...\)` or
    `\[...\]` that ends it when it is a sentence. None where there is nothing of these."""
    finished = _finished(text, think_tags)
    if re.search(r"\\(?:boxed|fbox)(?![A-Za-z])", finished):
        return extract_boxed(text, think_tags)
    final = finished.rpartition(think_tags[1])[2].strip()
    for stated in list(_ANSWER.finditer(final))[-1:]:
        final = re.split(r"\.\s+(?=[A-Z<])|\n|<\|", final[stated.end() :].strip(), maxsplit=1)[0].strip()
    if len(final) > _MAX_BARE:
        return None
    final = final.rstrip(". \n")
    formulas = list(_FORMULA.finditer(final))
    around = re.sub(r"[^A-Za-z' .,;!?-]", "", _FORMULA.sub(" ", final)).strip()
    if (
        formulas
        and formulas[-1].end() == len(final)
        and ((not around and len(formulas) == 1) or is_prose(around))
    ):
        return next(part for part in formulas[-1].groups() if part).strip() or None
    return final or None


def boxed_span(text: str) -> tuple[int, int] | None:
    """Start and end of the content of the last box of `text` whose braces balance; `end` is the position of
    its closing brace."""
    spans = _boxes(text)
    return spans[-1] if spans else None


def _finished(text: str, think_tags: tuple[str, str]) -> str:
    """The text without a reasoning block that is never closed."""
    opening, closing = think_tags
    unclosed = text.find(opening, text.rfind(closing) + 1)
    return text if unclosed < 0 else text[:unclosed]


def _boxes(text: str) -> list[tuple[int, int]]:
    """Spans of the contents of all balanced boxes, by their start."""
    opened: list[int | None] = []  # per open brace: start of the content if the brace opens a box
    spans = []
    for match in _BOX.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                spans.append((start, match.start()))
    return sorted(spans)


def normalise_answer(answer: str) -> str:
    """One spelling of equal answers: exact numbers as `n` or `n/d` without separators and units (percents
    keep `%`), anything else without TeX decoration and spaces, words in lower case. Idempotent."""
    text = answer
    for _ in range(10):
        number = _stated_number(text)
        previous, text = (
            text,
            spelling(text) if number is None else str(number[0]) + ("%" if number[1] else ""),
        )
        if text == previous:
            break
    return text


def exact_value(answer: str) -> Fraction | None:
    """The rational number an answer states (percents in percent, units dropped), None where it states none."""
    number = _stated_number(answer)
    return number[0] if number else None


def same_answer(gold: str, prediction: str, rule: AnswerRule = AnswerRule()) -> bool | None:  # noqa: B008
    """Whether two final answers are the same; None where that cannot be decided here. Never raises;
    milliseconds at most on any text."""
    return compare_answers(gold, prediction, rule).same


@dataclass(frozen=True)
class Finding:
    """`same` is None where nothing is proved; `reason` says why, in words. `doubtful`: both sides were read
    and something speaks against calling them equal (another unit, another name, a rounding), so that equality
    by another verifier alone proves nothing."""

    same: bool | None
    reason: str
    doubtful: bool = False


def compare_answers(gold: str, prediction: str, rule: AnswerRule = AnswerRule()) -> Finding:  # noqa: B008
    """`same_answer` with its reason."""
    if not gold.strip() or not prediction.strip():
        return Finding(None, "an empty answer")
    if max(len(gold), len(prediction)) > MAX_CHARACTERS:
        return Finding(None, f"an answer of over {MAX_CHARACTERS} characters")
    golds, predictions = readings(gold), readings(prediction)
    if spelling(gold) == spelling(prediction):
        return Finding(True, "the same text")
    if not golds or not predictions:
        return Finding(None, f"the {'prediction' if golds else 'gold answer'} is not in a notation read here")
    comparison = _Comparison(rule)
    findings = [comparison.compare(comparison.with_unit(x), y) for x in golds for y in predictions]
    if (
        min(len(golds), len(predictions)) > 1
        and findings[0].same is False
        and any(finding.same for finding in findings)
    ):
        return _undecided("numbers with separators, or lists")  # 100,200 and 200,100
    for same in (True, None):
        for finding in findings:
            if finding.same is same:
                return finding
    return findings[0]


def _stated_number(answer: str) -> tuple[Fraction, bool] | None:
    for node in readings(answer)[:1]:
        if isinstance(node, Relation) and len(node.sides) == 2 and (named := _named(node)):
            node = named[1]
        if isinstance(node, Expr) and not symbols(node.tree) and (value := rational(node.tree)) is not None:
            return value, node.percent
    return None


SAME, DIFFERENT = Finding(True, "equal"), Finding(False, "different")


def _undecided(reason: str) -> Finding:
    return Finding(None, reason, doubtful=True)


class _Comparison:
    def __init__(self, rule: AnswerRule) -> None:
        self.rule = rule
        self.budget = Budget()

    def with_unit(self, node: Node) -> Node:
        """The gold answer's node with the rule's unit, if it is a number that has none."""
        if isinstance(node, Expr) and self.rule.unit and not (node.unit or node.percent or node.degrees):
            unit = re.sub(r"[\s${}\\]", "", self.rule.unit)
            return (
                replace(node, percent=True)
                if unit == "%"
                else replace(node, degrees=True)
                if unit == "^circ"
                else replace(node, unit=unit)
            )
        return node

    def compare(self, a: Node, b: Node) -> Finding:
        """The gold answer's node and the prediction's."""
        if a == b:
            return SAME
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Relation) and not isinstance(y, Relation):
                return self.relation_with(x, y)
            if isinstance(x, Words) and not isinstance(y, Words):
                return self.words_with(x.text, y)
        if isinstance(a, Relation) and isinstance(b, Relation):
            return self.relations(a, b)
        if isinstance(a, Words) and isinstance(b, Words):
            return _same_words(a.text, b.text)
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Matrix):
                return self.matrix_with(x, y)
            if isinstance(x, Based):
                return self.based_with(x, y)
            if isinstance(x, Ratio):
                return self.ratio_with(x, y)
        if isinstance(a, Expr) and isinstance(b, Expr):
            return self.expressions(a, b)
        if isinstance(a, Union) or isinstance(b, Union):
            return self.sets(a, b)
        if isinstance(a, Group) and isinstance(b, Group):
            return self.groups(a, b)
        group, other = (a, b) if isinstance(a, Group) else (b, a)
        if isinstance(group, Group) and isinstance(other, Expr):
            return self.group_with(group, other)
        return _undecided("answers of different kinds")

    # --------------------------------------------------------------------------------------------------------- expressions

    def expressions(self, a: Expr, b: Expr) -> Finding:
        x, y = a.tree, b.tree
        if a.unit and b.unit:
            (size_x, dimensions_x, known_x), (size_y, dimensions_y, known_y) = (
                unit_size(a.unit),
                unit_size(b.unit),
            )
            if dimensions_x != dimensions_y:
                if known_x and known_y:
                    return Finding(False, f"different units: {a.unit} and {b.unit}")
                return _undecided(f"units that are not known to be the same: {a.unit} and {b.unit}")
            x, y = ("*", x, ("n", size_x)), ("*", y, ("n", size_y))
        same = self.values(x, y)
        if same:
            if bool(a.unit) != bool(b.unit) and (a.ambiguous or b.ambiguous):
                return _undecided("a letter that may be a unit or a factor")
            return SAME
        if a.percent != b.percent and (self.percents(a, b) or self.percents(b, a)):
            return Finding(True, "equal as percentages")
        if a.degrees != b.degrees and self.values(
            ("*", x, ("/", ("pi",), ("n", Fraction(180)))) if a.degrees else x,
            ("*", y, ("/", ("pi",), ("n", Fraction(180)))) if b.degrees else y,
        ):
            return Finding(True, "equal as angles")
        if is_number(x) and is_number(y):
            return self.numbers(a, b, x, y, same)
        if same is None:
            return _undecided("expressions of which neither equality nor difference is proved")
        if a.ambiguous or b.ambiguous:
            return _undecided("an expression that is read in different ways")
        for number, other in ((x, y), (y, x)):
            if (
                is_number(number)
                and symbols(other)
                and symbols(other) <= set(UNIT_LETTERS)
                and self.values(number, _without_symbols(other))
            ):
                return _undecided("a symbol that may be a unit")
        return DIFFERENT

    def percents(self, percent: Expr, other: Expr) -> bool:
        return percent.percent and self.values(percent.tree, ("*", other.tree, ("n", Fraction(100)))) is True

    def values(self, x: Tree, y: Tree) -> bool | None:
        if x == y:
            return True
        same = same_value(x, y, self.budget)
        if not same and self.rule.tolerance and is_number(x) and is_number(y):
            distance = _distance(x, y)
            if distance is not None:
                return bool(distance <= Fraction(repr(self.rule.tolerance)))
        return same

    def numbers(self, a: Expr, b: Expr, x: Tree, y: Tree, same: bool | None) -> Finding:
        if same is None:
            return _undecided("numbers of which neither equality nor difference is proved")
        if not self.rule.tolerance and (distance := _distance(x, y)) is not None:
            for rounded, other in ((a, b), (b, a)):
                if (
                    rounded.step
                    and not (other.step and other.step >= rounded.step)
                    and _is_rounding(rounded, other, distance)
                ):
                    return _undecided("one number may be a rounding of the other")
        if (
            bool(a.unit) != bool(b.unit)
            and (exact_x := rational(x))
            and (exact_y := rational(y))
            and _is_conversion(exact_x / exact_y)
        ):
            return _undecided("one number may be the other in another unit")
        if (a.ambiguous or b.ambiguous) and not (a.unit and b.unit):
            return _undecided("an expression that is read in different ways")
        return Finding(False, "different numbers")

    # ---------------------------------------------------------------------------------------------------------- lists and sets

    def groups(self, a: Group, b: Group) -> Finding:
        brackets = {a.brackets if a.brackets != "or" else "", b.brackets if b.brackets != "or" else ""}
        if "or" in (a.brackets, b.brackets) and any(
            isinstance(item, Relation) and item.operators[0] != "=" for item in a.items + b.items
        ):
            return self.sets(a, b)
        if brackets & {"[)", "(]"}:
            return self.sets(a, b)
        if brackets <= {"", "{}"}:
            if not a.items or not b.items:
                return SAME if a.items == b.items else DIFFERENT
            return self.unordered(a.items, b.items)
        if self.rule.unordered and "" in brackets:
            return self.unordered(a.items, b.items)
        if len(brackets) > 1:
            found = self.ordered(a.items, b.items)
            if found.same:
                return _undecided("the same items in different brackets")
            if brackets == {"()", "[]"}:
                return found
            return (
                DIFFERENT
                if self.unordered(a.items, b.items).same is False
                else _undecided("the same items in different brackets")
            )
        return self.ordered(a.items, b.items)

    def ordered(self, a: Sequence[Node], b: Sequence[Node]) -> Finding:
        if len(a) != len(b):
            return Finding(False, "a different number of items")
        return _all(self.compare(x, y) for x, y in zip(a, b, strict=True))

    def unordered(self, a: Sequence[Node], b: Sequence[Node]) -> Finding:
        a, b = _flat(a), _flat(b)
        if len(a) * len(b) > _MAX_PAIRS:
            return _undecided("lists too long to compare")
        if _named_apart(a) != _named_apart(b):  # x=1, y=2 and 1, 2: the names give the order
            return (
                self.ordered(a, b)
                if self.ordered(a, b).same
                else _undecided("a list with names and one without")
            )
        found = [[self.compare(x, y) for y in b] for x in a]
        free = set(range(len(b)))
        matched = 0
        for row in found:
            match = next((column for column in sorted(free) if row[column].same), None)
            if match is not None:
                free.discard(match)
                matched += 1
        if matched == len(a) == len(b):
            return SAME
        columns = list(zip(*found, strict=True))
        if any(all(finding.same is False for finding in line) for line in [*found, *columns]):
            return Finding(False, "an item that the other list lacks")
        if any(finding.same is None for row in found for finding in row):
            return _undecided("lists with items that may be the same")
        return _undecided("lists that repeat items differently")

    def group_with(self, group: Group, other: Expr) -> Finding:
        if not group.items:
            return DIFFERENT
        if group.brackets in ("", "or", "{}"):
            found = [self.compare(item, other) for item in _flat(group.items)]
            if all(finding.same is False for finding in found) or (
                len(_flat(group.items)) > 1 and any(finding.same is False for finding in found)
            ):
                return Finding(False, "one answer and several")
            return SAME if len(found) == 1 and found[0].same else _undecided("one answer and a set")
        return (
            DIFFERENT
            if group.brackets in ("[)", "(]") or len(group.items) > 1
            else _undecided("answers of different kinds")
        )

    def sets(self, a: Node, b: Node) -> Finding:
        """Unions of intervals and points, inequalities."""
        for node in (a, b):
            if isinstance(node, Expr):
                return (
                    _undecided("a set and an expression")
                    if node.ambiguous or symbols(node.tree)
                    else Finding(False, "a set and a number")
                )
        x, y = _intervals(a), _intervals(b)
        if x is None or y is None:
            return _undecided("sets of a form that is not read here")
        x, y = self.merged(x), self.merged(y)
        if len(x) != len(y):
            numbers = all(
                is_number(_tree(end)) for interval in (*x, *y) for end in (interval.low, interval.high)
            )
            return (
                Finding(False, "sets of different parts")
                if numbers
                else _undecided("unions of different length")
            )
        found = []
        for mine, theirs in zip(x, y, strict=True):
            ends = [self.compare(mine.low, theirs.low), self.compare(mine.high, theirs.high)]
            closed = mine.closed == theirs.closed
            found.append(
                _all([*ends, SAME if closed else Finding(False, "an end that belongs to one set only")])
            )
        return _all(found)

    def merged(self, intervals: list[_Interval]) -> list[_Interval]:
        """Ascending intervals with those joined that touch."""
        found = intervals[:1]
        for interval in intervals[1:]:
            last = found[-1]
            if (last.closed[1] or interval.closed[0]) and self.compare(last.high, interval.low).same:
                found[-1] = _Interval(last.low, interval.high, (last.closed[0], interval.closed[1]))
            else:
                found.append(interval)
        return found

    # ---------------------------------------------------------------------------------------------------------------- relations

    def relations(self, a: Relation, b: Relation) -> Finding:
        if a.operators[0] in ("=", "in") and b.operators[0] in ("=", "in"):
            return self.equations(a, b)
        if "=" in (a.operators[0], b.operators[0]):
            return _undecided("an equation and an inequality")
        x, y = _subject(a), _subject(b)
        if x is None or y is None:
            return self.chains(a, b)
        if _intervals(a) is None or _intervals(b) is None:
            return self.chains(a, b)
        found = self.sets(a, b)
        return (
            found
            if symbols(x) == symbols(y) or found.same is False
            else _undecided("the same inequality of different names")
        )

    def chains(self, a: Relation, b: Relation) -> Finding:
        """b > a > c and c < a < b."""

        def ascending(relation: Relation) -> Relation:
            if all(operator in (">", ">=") for operator in relation.operators):
                return Relation(
                    tuple(_FLIPPED[operator] for operator in reversed(relation.operators)),
                    relation.sides[::-1],
                )
            return relation

        x, y = ascending(a), ascending(b)
        if x.operators == y.operators:
            found = self.ordered(x.sides, y.sides)
            if found.same:
                return found
            same_members = self.unordered(x.sides, y.sides).same
            if len(x.sides) > 2 and same_members and found.same is False and set(x.operators) == {"<"}:
                return Finding(False, "another order")
        return _undecided("inequalities of which nothing is proved")

    def equations(self, a: Relation, b: Relation) -> Finding:
        x, y = _named(a), _named(b)
        if x and y:
            names = _bound(x[0], y[0])
            value = y[1] if names is None else _rename(y[1], *names)
            found = self.compare(x[1], value)
            if x[0] == y[0] or names is not None:
                if found.same is not False or isinstance(x[1], Group):
                    return found
                if (is_number(_tree(x[1])) and is_number(_tree(y[1]))) or x[0].endswith(")"):
                    return found
                zero = self.zero_sets(a, b)
                return zero if zero.same else found if not found.doubtful else zero
            if found.same and not (isinstance(x[1], Expr) and not is_number(x[1].tree)):
                return _undecided("the same value under different names")
            if found.same is False and is_number(_tree(x[1])) and is_number(_tree(y[1])):
                return found
        return self.zero_sets(a, b)

    def zero_sets(self, a: Relation, b: Relation) -> Finding:
        """Two equations with the same solutions: proportional sides, or each linear in a variable and zero
        where the other is."""
        x, y = _difference(a), _difference(b)
        if x is None or y is None:
            return _undecided("equations of a form that is not read here")
        if any(part.ambiguous for relation in (a, b) for part in relation.sides if isinstance(part, Expr)):
            return _undecided("an equation that is read in different ways")
        if symbols(x) != symbols(y) or not symbols(x):
            apart = self.values(x, y) is False and self.values(x, ("-", y)) is False
            return (
                Finding(False, "equations in different variables")
                if apart
                else _undecided("equations in different variables")
            )
        names = sorted(symbols(x))
        point = {name: ("n", Fraction(7 + 4 * index, 3)) for index, name in enumerate(names)}
        x0, y0 = (_at(tree, point) for tree in (x, y))
        if self.values(x0, ("n", Fraction(0))) is False and self.values(("*", x, y0), ("*", y, x0)):
            return Finding(True, "proportional equations")
        for name in names:
            fixed = {other: value for other, value in point.items() if other != name}
            ends = [
                [rational(_at(tree, {**fixed, name: ("n", Fraction(n))})) for n in (0, 1, 2)]
                for tree in (x, y)
            ]
            roots = [_linear_root(values) for values in ends]
            if None not in roots and roots[0] != roots[1]:
                return Finding(False, "equations with different solutions")
        return _undecided("equations of which neither equality nor difference is proved")

    def relation_with(self, relation: Relation, other: Node) -> Finding:
        if relation.operators[0] not in ("=", "in"):
            if isinstance(other, Group | Union):
                return self.sets(relation, other)
            if isinstance(other, Words) and other.text in _EVERYTHING | _NOTHING:
                return _undecided("words and an inequality")
            if (
                isinstance(other, Expr)
                and is_number(other.tree)
                and _intervals(relation) is not None
                and relation.operators[0] != "!="
            ):
                return Finding(False, "an inequality and a number")
            return _undecided("an inequality and an answer of another kind")
        named = _named(relation)
        if named:
            return self.compare(named[1], other)
        difference = _difference(relation)
        if (
            difference is not None
            and isinstance(other, Expr)
            and not other.ambiguous
            and is_number(other.tree)
        ):
            names = symbols(difference)
            if len(names) > 1 or (
                names and self.values(_at(difference, {min(names): other.tree}), ("n", Fraction(0))) is False
            ):
                return Finding(False, "an equation and a number")
        return _undecided("an equation and an answer of another kind")

    # --------------------------------------------------------------------------------------------------------------- other kinds

    def matrix_with(self, matrix: Matrix, other: Node) -> Finding:
        if isinstance(other, Matrix):
            if [len(row) for row in matrix.rows] != [len(row) for row in other.rows]:
                return Finding(False, "matrices of different shape")
            return _all(
                self.compare(x, y)
                for row, line in zip(matrix.rows, other.rows, strict=True)
                for x, y in zip(row, line, strict=True)
            )
        if (
            isinstance(other, Group)
            and other.brackets in ("()", "[]")
            and all(len(row) == 1 for row in matrix.rows)
        ):
            return self.ordered([row[0] for row in matrix.rows], other.items)
        if (
            isinstance(other, Group)
            and other.items
            and all(isinstance(item, Group) and item.brackets == "[]" for item in other.items)
        ):
            return self.matrix_with(
                matrix, Matrix(tuple(item.items for item in other.items if isinstance(item, Group)))
            )
        return (
            DIFFERENT
            if isinstance(other, Expr) and is_number(other.tree)
            else _undecided("a matrix and an answer of another kind")
        )

    def based_with(self, based: Based, other: Node) -> Finding:
        if isinstance(other, Based):
            if based.base != other.base:
                return Finding(False, "different bases")
            return (
                SAME
                if based.digits.casefold() == other.digits.casefold()
                else Finding(False, "different digits")
            )
        if isinstance(other, Expr) and not is_number(other.tree) and not other.ambiguous:
            return Finding(False, "a number in a base and an expression")
        value = rational(other.tree) if isinstance(other, Expr) else None
        if value is None:
            if (
                isinstance(other, Expr)
                and is_number(other.tree)
                and self.values(other.tree, ("n", Fraction(int(based.digits[:500])))) is False
            ):
                return Finding(False, "different numbers")
            return _undecided("a number in a base and an answer of another kind")
        digits = int(based.digits[:500])
        meant = (
            int(based.digits[:500], based.base)
            if all(int(digit) < based.base for digit in based.digits)
            else None
        )
        return (
            _undecided("the base is not stated on both sides")
            if value in (digits, meant)
            else Finding(False, "different numbers")
        )

    def ratio_with(self, ratio: Ratio, other: Node) -> Finding:
        if (
            isinstance(other, Expr)
            and not other.ambiguous
            and all(is_number(_tree(part)) for part in (other, *ratio.parts))
        ):
            first, second = map(_tree, ratio.parts[:2])
            near = (
                ("/", first, second),
                ("/", second, first),
                ("+", ("*", first, ("n", Fraction(60))), second),
                first,
            )
            if all(self.values(value, other.tree) is False for value in near):
                return Finding(False, "a ratio or a time and another number")
        if not isinstance(other, Ratio):
            return _undecided("a ratio or a time and an answer of another kind")
        found = self.ordered(ratio.parts, other.parts)
        if found.same or len(ratio.parts) != 2 or len(other.parts) != 2:
            return found
        first, second, third, fourth = (_tree(part) for part in (*ratio.parts, *other.parts))
        whole = all(self.values(part, ("n", Fraction(0))) is False for part in (first, second, third, fourth))
        if whole and self.values(("*", first, fourth), ("*", second, third)):
            return (
                _undecided("ratios that may be times")
                if ratio.clock and other.clock
                else Finding(True, "equal ratios")
            )
        return found

    def words_with(self, text: str, other: Node) -> Finding:
        if text in _NOTHING and isinstance(other, Group) and not other.items:
            return SAME
        if text in _EVERYTHING:
            return SAME if other == _REALS else _undecided("words and a formula")
        if (
            isinstance(other, Group)
            and other.brackets in ("", "or")
            and any(isinstance(item, Words) for item in other.items)
        ):
            return _undecided("words and a list of words")
        if set(text.split()) & _VAGUE or text in _NOTHING:
            return _undecided("words that may state the same")
        if len(text) == 1:
            if isinstance(other, Expr) and other.tree[0] in ("s", "e", "i"):
                name = other.tree[1] if other.tree[0] == "s" else other.tree[0]
                return (
                    SAME
                    if name == text
                    else _undecided("two letters")
                    if name.casefold() == text.casefold()
                    else DIFFERENT
                )
            return _undecided("a letter that may name a choice")
        if (
            isinstance(other, Expr)
            and not other.unit
            and not other.ambiguous
            and not any(part[0] == "inf" for part in walk(other.tree))
        ):
            return Finding(False, "words and a formula")
        return _undecided("words and a formula")


# ------------------------------------------------------------------------------------------------------------------------- helpers


def _all(found: Any) -> Finding:
    """All parts the same, one different, or neither proved."""
    found = list(found)
    for same in (False, None):
        for finding in found:
            if finding.same is same:
                return finding
    return SAME


def _is_joint(between: str) -> bool:
    return (
        re.fullmatch(
            r"(?:[\s$,;]|\\[()\[\], ]|\\quad|\\qquad|\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|\band\b|\bor\b)*",
            between,
        )
        is not None
    )


def _span_ending(spans: Sequence[tuple[int, int]], end: int) -> tuple[int, int]:
    return next(span for span in spans if span[1] == end)


def _distance(x: Tree, y: Tree) -> Fraction | None:
    """|x - y| of two real numbers, to 50 digits where it is not rational."""
    difference: Tree = ("+", x, ("-", y))
    exact = rational(difference)
    if exact is not None:
        return abs(exact)
    value = approximate(difference)
    if value is None or not hasattr(value, "man_exp"):
        return None
    mantissa, exponent = value.man_exp
    return abs(Fraction(int(mantissa)) * Fraction(2) ** int(exponent)) if abs(exponent) < 10_000 else None


def _is_rounding(rounded: Expr, other: Expr, distance: Fraction) -> bool:
    """Whether a decimal may be the other number rounded to the nearest, or cut off."""
    step = rounded.step or Fraction(0)
    if distance * 2 <= step:
        return True
    cut = rational(("f", "abs", rounded.tree))
    size = approximate(("f", "abs", other.tree))
    return distance < step and cut is not None and size is not None and cut * size.context.mpf(1) < size


def _is_conversion(ratio: Fraction) -> bool:
    size = Fraction(abs(ratio.numerator), ratio.denominator)
    whole = max(size, 1 / size)
    return whole.denominator == 1 and (
        whole.numerator in _CONVERSIONS or str(whole.numerator).strip("0") == "1"
    )


def _without_symbols(tree: Tree) -> Tree:
    return rebuild(tree, lambda part: ("n", Fraction(1)) if part[0] == "s" else part)


def _tree(node: Node) -> Tree:
    return node.tree if isinstance(node, Expr) else ("s", "")


def _flat(items: Sequence[Node]) -> list[Node]:
    found: list[Node] = []
    for item in items:
        if isinstance(item, Group) and item.brackets in ("", "or"):
            found += _flat(item.items)
        else:
            found.append(item)
    return found


def _named_apart(items: Sequence[Node]) -> bool:
    names = [
        named[0]
        for item in items
        if isinstance(item, Relation) and item.operators[0] == "=" and (named := _named(item))
    ]
    return len(set(names)) > 1


def _named(relation: Relation) -> tuple[str, Node] | None:
    """Name and value of `x = 5`, `f(x) = 2x`, `(p, q) = (3, 2)`, `5 = x`, `x \\in [0, 1]`; of `x = 5 + 5 =
    10` the last value."""
    if set(relation.operators) - {"=", "in"}:
        return None
    first, last = relation.sides[0], relation.sides[-1]
    if _is_name(first):
        return _name(first), last
    if len(relation.sides) == 2 and relation.operators == ("=",) and _is_name(last):
        return _name(last), first
    return None


def _is_name(node: Node) -> bool:
    if isinstance(node, Group):
        return bool(node.items) and all(isinstance(item, Expr) and item.tree[0] == "s" for item in node.items)
    if isinstance(node, Words):
        return len(node.text) == 1
    if isinstance(node, Ratio):
        return all(map(_is_name, node.parts))
    if not isinstance(node, Expr) or node.unit or not symbols(node.tree):
        return False
    return all(
        part[0] in ("s", "e", "i", "f", "*", "/") and part[:2] != ("f", "ln") for part in walk(node.tree)
    )


def _name(node: Node) -> str:
    if isinstance(node, Expr) and node.tree[0] == "s":
        return str(node.tree[1])
    return node.text if isinstance(node, Words) else repr(node)


def _bound(a: str, b: str) -> tuple[str, str] | None:
    """The arguments of `f(x)` and `f(n)`, where only they differ."""
    x, y = (re.fullmatch(r"(.+)\((\w+)\)", name) for name in (a, b))
    return (x[2], y[2]) if x and y and x[1] == y[1] and x[2] != y[2] else None


def _rename(node: Node, new: str, old: str) -> Node:
    def change(tree: Tree) -> Tree:
        return ("s", new) if tree == ("s", old) else tree

    return replace(node, tree=rebuild(node.tree, change)) if isinstance(node, Expr) else node


def _at(tree: Tree, point: dict[str, Tree]) -> Tree:
    change: Callable[[Tree], Tree] = lambda part: point.get(part[1], part) if part[0] == "s" else part  # noqa: E731
    return rebuild(tree, change)


def _difference(relation: Relation) -> Tree | None:
    if relation.operators != ("=",) or not all(isinstance(side, Expr) for side in relation.sides):
        return None
    left, right = (_tree(side) for side in relation.sides)
    return ("+", left, ("-", right))


def _subject(relation: Relation) -> Tree | None:
    """What an inequality is about: its one side with symbols, in a chain the middle one."""
    if relation.operators[0] == "in":
        return _tree(relation.sides[0])
    if len(relation.sides) == 3:
        return _tree(relation.sides[1])
    with_symbols = [
        side for side in relation.sides if isinstance(side, Expr | Words) and not is_number(_tree(side))
    ]
    if len(with_symbols) == 1:
        return _tree(with_symbols[0])
    return _tree(relation.sides[0]) if _tree(relation.sides[0])[0] == "s" else None


@dataclass(frozen=True)
class _Interval:
    low: Node
    high: Node
    closed: tuple[bool, bool]


_INFINITE = Expr(("inf",))
_MINUS_INFINITE = Expr(("-", ("inf",)))


def _intervals(node: Node) -> list[_Interval] | None:
    """The intervals of a set of reals in ascending order where their ends are numbers; None for what is not
    such a set."""
    if isinstance(node, Union) or (isinstance(node, Group) and node.brackets == "or"):
        parts = [_intervals(part) for part in (node.parts if isinstance(node, Union) else node.items)]
        found = [interval for part in parts if part is not None for interval in part]
        if any(part is None for part in parts):
            return None
        keys = [
            approximate(_tree(interval.low)) if _tree(interval.low) != ("-", ("inf",)) else float("-inf")
            for interval in found
        ]
        if any(key is None or not _is_real(key) for key in keys):
            return found
        return [interval for _, interval in sorted(zip(keys, found, strict=True), key=lambda pair: pair[0])]
    if isinstance(node, Group):
        if node.brackets == "{}":
            return [_Interval(item, item, (True, True)) for item in node.items] or None
        if len(node.items) != 2 or node.brackets not in ("()", "[]", "[)", "(]"):
            return None
        low, high = node.items
        return [_Interval(low, high, (node.brackets[0] == "[", node.brackets[1] == "]"))]
    if isinstance(node, Relation):
        return _relation_intervals(node)
    return None


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or hasattr(value, "man_exp")


def _relation_intervals(relation: Relation) -> list[_Interval] | None:
    operators, sides = relation.operators, relation.sides
    if operators == ("in",):
        return _intervals(sides[1])
    if _subject(relation) is None:
        return None
    if len(sides) == 3:
        if all(operator in (">", ">=") for operator in operators):
            operators, sides = tuple(_FLIPPED[operator] for operator in reversed(operators)), sides[::-1]
        if not all(operator in ("<", "<=") for operator in operators):
            return None
        return [_Interval(sides[0], sides[2], (operators[0] == "<=", operators[1] == "<="))]
    if len(sides) != 2:
        return None
    operator = operators[0]
    bound = sides[1]
    if is_number(_tree(sides[0])) and isinstance(sides[0], Expr):
        operator, bound = _FLIPPED.get(operator, operator), sides[0]
    subject = _subject(relation)
    if subject is None or subject[0] != "s":
        return _solved(relation)
    if operator == "!=":
        return [
            _Interval(_MINUS_INFINITE, bound, (False, False)),
            _Interval(bound, _INFINITE, (False, False)),
        ]
    if operator in ("<", "<="):
        return [_Interval(_MINUS_INFINITE, bound, (False, operator == "<="))]
    if operator in (">", ">="):
        return [_Interval(bound, _INFINITE, (operator == ">=", False))]
    return None


def _linear_root(values: Sequence[Fraction | None]) -> Fraction | None:
    """The zero of a function with these values at 0, 1, 2 if it is linear and not constant."""
    at_0, at_1, at_2 = values
    if at_0 is None or at_1 is None or at_2 is None or at_2 - at_1 != at_1 - at_0 or at_0 == at_1:
        return None
    return -at_0 / (at_1 - at_0)


def _solved(relation: Relation) -> list[_Interval] | None:
    """An inequality that is linear in its one symbol: 2x - 1 > 5."""
    if not all(isinstance(side, Expr) and not side.ambiguous for side in relation.sides):
        return None
    difference: Tree = ("+", _tree(relation.sides[0]), ("-", _tree(relation.sides[1])))
    names = symbols(difference)
    if len(names) != 1:
        return None
    name = min(names)
    values = [rational(_at(difference, {name: ("n", Fraction(n))})) for n in (0, 1, 2)]
    root = _linear_root(values)
    beyond = rational(_at(difference, {name: ("n", Fraction(1009, 3))}))
    slope = (values[1] or Fraction(0)) - (values[0] or Fraction(0))
    if root is None or beyond != slope * (Fraction(1009, 3) - root):  # not linear
        return None
    operator = relation.operators[0]
    flipped = operator if slope > 0 else _FLIPPED.get(operator, operator)
    return _relation_intervals(Relation((flipped,), (Expr(("s", name)), Expr(("n", root)))))


def _same_words(a: str, b: str) -> Finding:
    """Two different words. Not decided: letters that differ in case only, abbreviations, plurals, words for
    "there is none"."""
    if a == b:
        return Finding(True, "the same words")
    x, y = a.casefold(), b.casefold()
    if x == y and len(x) > 1:
        return Finding(True, "the same words")
    if {x, y} in _POLAR:
        return Finding(False, "opposite words")
    if x in _NOTHING and y in _NOTHING and {x, y} & {"no solutions", "no solution"} == {x, y}:
        return Finding(True, "the same words")
    for article in ("the ", "a ", "an "):
        x, y = x.removeprefix(article), y.removeprefix(article)
    if x == y and len(x) > 1:
        return Finding(True, "the same words")
    if len(x) == 1 and len(y) == 1:
        return (
            _undecided("two letters that differ in case") if x == y else Finding(False, "different letters")
        )
    if (set(x.split()) | set(y.split())) & (_VAGUE | _POLAR[0] | _POLAR[1]):
        return _undecided("words that may state the same")
    if x.startswith(y) or y.startswith(x) or len(x.split()) > 1 or len(y.split()) > 1:
        return _undecided("words that may state the same")
    return Finding(False, "different words")
