"""Trees and answers, made by hand and read from text."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pns.answers.exact import Budget, approximate, rational, same_value
from pns.answers.readings import readings
from pns.answers.tree import (
    ONE,
    Answer,
    Based,
    Call,
    Constant,
    Expression,
    Group,
    Number,
    Power,
    Product,
    Quotient,
    Ratio,
    Relation,
    Root,
    Series,
    Sum,
    Symbol,
    Tree,
    Union,
    Words,
    both_signs,
    substitute,
    walk,
    whole,
)
from pns.answers.units import unit_size

X, N = Symbol("x"), Symbol("n")


def test_operators_make_trees() -> None:
    assert Sum((X, ONE)) == X + ONE
    assert X - ONE == X + -ONE
    assert X * ONE != X / ONE
    assert (X**N).symbols == {"x", "n"}
    assert list(walk(X / N)) == [Quotient((X, N)), X, N]
    assert substitute(X * N, {"n": ONE}) == X * ONE
    assert Series((ONE, X, N), "sum", "n").symbols == {"x"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\frac{x}{2}", Expression(X / whole(2))),
        (r"3\sqrt{2}", Expression(whole(3) * Root((whole(2), whole(2))))),
        ("2.50", Expression(Number(Fraction(5, 2)), step=Fraction(1, 100))),
        ("5 cm", Expression(whole(5), unit="cm")),
        ("50%", Expression(whole(50), percent=True)),
        ("f(x)", Expression(Symbol("f(x)"))),
        ("1/2x", Expression(ONE / whole(2) * X, ambiguous=True)),
        (r"e^{\pi}", Expression(Power((Constant("e"), Constant("pi"))))),
        (r"\binom{n}{2}", Expression(Call((N, whole(2)), "binomial"))),
        (r"\sin 2 x", Expression(Call((Product((whole(2), X)),), "sin"))),
        ("101_2", Based("101", 2)),
        ("7:05", Ratio((Expression(whole(7)), Expression(whole(5))), clock=True)),
        ("x > 1", Relation((">",), (Expression(X), Expression(ONE)))),
        (
            r"[1,2)\cup\{x\}",
            Union((Group("[)", (Expression(ONE), Expression(whole(2)))), Group("{}", (Expression(X),)))),
        ),
        (r"\text{east}", Words("east")),
    ],
)
def test_texts_are_read_into_trees(text: str, answer: Answer) -> None:
    assert readings(text) == [answer]


@pytest.mark.parametrize("text", ["1 +", ")", "", "§5", "(1", r"\unknown{5}", "(" * 40 + "1" + ")" * 40])
def test_what_is_no_answer_is_not_read(text: str) -> None:
    assert readings(text) == []


def test_numbers_with_commas_have_two_readings() -> None:
    number, pair = readings("1,234")
    assert number == Expression(whole(1234))
    assert pair == Group("", (Expression(ONE), Expression(whole(234))))


def test_plus_minus_has_two_values() -> None:
    [answer] = readings(r"1\pm x")
    assert answer == Group("", (Expression(ONE + X), Expression(ONE + -X)))
    assert both_signs(Expression(X)) == [Expression(X)]
    assert readings(r"-\pm x") == []


@pytest.mark.parametrize(
    ("tree", "exact", "decimals"),
    [
        (ONE / whole(3), Fraction(1, 3), 0.333333),
        (Root((whole(2), whole(2))), None, 1.414214),
        (Root((whole(9), whole(2))), Fraction(3), 3.0),
        (-Root((whole(2), whole(2))), None, -1.414214),
        (Series((ONE, whole(4), N**N), "sum", "n"), Fraction(288), 288.0),
        (Call((-Constant("pi"),), "abs"), None, 3.141593),
        (Root((-ONE, whole(2))), None, None),
        (ONE / (ONE - ONE), None, None),
        (X, None, None),
    ],
)
def test_values(tree: Tree, exact: Fraction | None, decimals: float | None) -> None:
    assert rational(tree) == exact
    value = approximate(tree)
    assert value is None if decimals is None else float(value or 0) == pytest.approx(decimals, abs=1e-6)


def test_equal_values_and_the_budget() -> None:
    assert same_value((X + ONE) * (X - ONE), X * X - ONE, Budget()) is True
    assert same_value(X + ONE, X, Budget()) is False
    assert same_value((X + ONE) * (X - ONE), X * X - ONE, Budget(5)) is None


def test_units() -> None:
    assert unit_size("km / hour") == (Fraction(1000, 3600), (("length", 1), ("time", -1)), True)
    assert unit_size("square inches")[:2] == (Fraction("0.0254") ** 2, (("length", 2),))
    assert unit_size("apples") == (1, (("apple", 1),), False)
