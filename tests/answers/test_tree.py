"""Trees and answers, made by hand and read from text."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from pns.answers.exact import Budget, approximate, rational, same_value
from pns.answers.readings import readings
from pns.answers.tree import (
    DEGREE,
    ONE,
    REALS,
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

X, N, HALF = Symbol("x"), Symbol("n"), ONE / whole(2)


def _clock(hour: int, minutes: int, half: str = "") -> Ratio:
    return Ratio((Expression(whole(hour)), Expression(whole(minutes), half)), clock=True)


def _arranged(things: int, places: int) -> Expression:
    factorials = [Call((tree,), "factorial") for tree in (whole(things), whole(things) - whole(places))]
    return Expression(factorials[0] / factorials[1])


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
        (r"3\sqrt{2}", Expression(whole(3) * whole(2) ** HALF)),
        ("2.50", Expression(Number(Fraction(5, 2)), step=Fraction(1, 100))),
        ("5 cm", Expression(whole(5), unit="cm")),
        ("50%", Expression(whole(50), percent=True)),
        ("f(x)", Expression(Symbol("f(x)"))),
        ("1/2x", Expression(ONE / whole(2) * X, ambiguous=True)),
        (r"e^{\pi}", Expression(Power((Constant("e"), Constant("pi"))))),
        (r"\binom{n}{2}", Expression(Call((N, whole(2)), "binomial"))),
        (r"\sin 2 x", Expression(Call((Product((whole(2), X)),), "sin"))),
        ("101_2", Based("101", 2)),
        ("1A_{16}", Based("1A", 16)),
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


@pytest.mark.parametrize(
    "texts",
    [
        (
            r"\frac{dy}{dx}",
            "dy/dx",
            r"\frac{d}{dx} y",
            r"\frac{\mathrm{d}y}{\mathrm{d}x}",
            r"\frac{d}{dx}(y)",
        ),
        (r"\frac{d^2y}{dx^2}", "d^2y/dx^2", r"\frac{d^{2}}{dx^{2}} y"),
        ("y''", r"y^{\prime\prime}", "y″"),
        (r"\dot y", r"\dot{y}"),
        (
            "5",
            r"\mathbf{5}",
            r"\mathcal{5}",
            r"{\bf 5}",
            r"\textbf{5}",
            "**5**",
            "`5`",
            "*5*",
            "__5__",
            "### 5",
        ),
        (
            "5",
            "\u200b5\u2060",
            "\ufeff5\u00a0",
            "\u202f5",
            "𝟓",
            "５",
            r"\boxed 5",
            r"\boxed5",
            r"\boxed{\boxed{5}}",
        ),
        (
            "5",
            "five",
            "the answer is 5",
            "The answer is: 5.",
            "exactly 5",
            "**Answer:** 5",
            r"\text{The answer is } 5",
        ),
        (r"\frac{1}{2}", r"\boldsymbol{\frac{1}{2}}", r"\boxed\frac12", "½"),
        (r"\mathbf{i}+2\mathbf{j}", "i+2j"),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix}",
            r"\begin{bmatrix} 1 & 2 \\ [1ex] 3 & 4 \\ \end{bmatrix}",
            r"\left[\begin{array}{c|c} 1 & 2 \\ \hline 3 & 4 \end{array}\right]",
            r"\begin{pmatrix} 1 & 2 \cr 3 & 4 \end{pmatrix}",
        ),
        ("x=1 or x=2", r"x=1 \text{ or } x=2", r"x=1 \lor x=2"),
        (
            "2 < x < 5",
            "x > 2 and x < 5",
            r"x>2 \land x<5",
            "x < 5, x > 2",
            r"\{x \mid x>2 \text{ and } x<5\}",
        ),
        ("x < 1 or x > 2", "x < 1 and x > 2"),
        (
            "x > 2",
            r"\{x \mid x>2, x \in \mathbb{R}\}",
            r"\{x \in \mathbb{R} : x > 2\}",
            r"x \in \mathbb{R}, x > 2",
        ),
        (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}\setminus\{0\}"),
        (
            r"\frac{\pi}{4}+k\pi",
            r"\frac{\pi}{4}+k\pi, k \in \mathbb{Z}",
            r"\frac{\pi}{4}+k\pi \quad (k \in \mathbb{Z})",
            r"\frac{\pi}{4}+k\pi \text{ for all integers } k",
            r"\frac{\pi}{4}+k\pi, \text{ where } k \text{ is an integer}",
        ),
        ("x^2", r"x^2 \text{ for all real } x", "x^2 for all x", r"x^2, x \in \mathbb{R}"),
        (
            r"\binom{5}{2}",
            "C_5^2",
            "C^2_5",
            "{}_5C_2",
            "^5C_2",
            "5C2",
            r"\mathrm{C}_{5}^{2}",
            r"{5 \choose 2}",
        ),
        ("A_5^3", "P_5^3", "{}_5P_3", "5P3"),
        ("7:30 p.m.", "7:30 pm", r"7:30 \text{ p.m.}", "7: 30 p.m.", r"7:30\,\mathrm{pm}"),
        ("205", "two hundred and five", "two hundred five"),
        ("999", "nine hundred ninety-nine", r"\text{nine hundred and ninety-nine}"),
        ("24", "two dozen"),
        ("minus twenty-three", "negative twenty-three"),
        ("12 apples", "twelve apples"),
        ("5%", "five percent"),
        ("x^{12}", "x¹²"),
        ("x^{-1}", "x⁻¹"),
        ("2^{n+1}", "2ⁿ⁺¹"),
        ("a_{12}", "a₁₂"),
        (r"5 \text{ um}", "5 µm", "5 μm", r"5 \mu\text{m}", r"5 \mathrm{~\mu m}"),
        (r"5 \text{ celsius}", "5 ℃", "5°C", r"5^\circ\text{C}"),
        (r"5 \text{ ohm}", "5 Ω", r"5\,\Omega"),
        (r"5 \text{ m^2}", "5 ㎡"),
        (r"5 \text{ cm}", "5 cm", "5 (cm)", r"5\ (\text{cm})"),
        (r"5 \text{ m / s^2}", r"5 \frac{\text{m}}{\text{s}^2}"),
        ("x = 5", "x is 5", "x equals 5", "Thus, x = 5"),
        ("12 square units", "The area is 12 square units."),
        ("A, C", "(A), (C)", "(A) and (C)"),
        ("101_2", "101_{2}", "(101)_2", r"101_{\text{two}}", "101 base 2", r"101_{(2)}"),
        (r"90^\circ", "90°", "90 degrees", r"90^{\circ}", r"90 \text{ degrees}"),
        ("(2,3)", "M(2,3)", "P(2,3)"),
    ],
)
def test_notations_of_one_answer_are_read_alike(texts: tuple[str, ...]) -> None:
    [first, *others] = [readings(text)[:1] for text in texts]
    assert first
    for text, other in zip(texts[1:], others, strict=True):
        assert [_plain(reading) for reading in other] == [_plain(reading) for reading in first], text


def _plain(answer: Answer) -> Answer:
    return replace(answer, ambiguous=False) if isinstance(answer, Expression) else answer


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("(B) 5", [Words("B"), Expression(whole(5))]),
        (r"\textbf{(B)}\ x", [Words("B"), Expression(X)]),
        ("B. yes", [Words("B"), Words("yes")]),
        ("B: 5", [Words("B"), Expression(whole(5))]),
        ("P(5,2)", [_arranged(5, 2), Group("()", (Expression(whole(5)), Expression(whole(2))))]),
        ("7:30 PM", [_clock(7, 30, "Pmeridiem"), _clock(19, 30)]),
        ("12:05 AM", [_clock(12, 5, "Ameridiem"), _clock(0, 5)]),
        ("7:30 AM", [_clock(7, 30, "Ameridiem")]),
        ("7 p.m.", [_clock(7, 0, "pmeridiem"), _clock(19, 0)]),
    ],
)
def test_what_may_mean_two_things_has_two_readings(text: str, answers: list[Answer]) -> None:
    assert readings(text) == answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\frac{d}{2}", Expression(Symbol("d") / whole(2))),
        (r"\frac{d_1}{d_2}", Expression(Symbol("d_1") / Symbol("d_2"))),
        (r"\frac{dk}{d+1}", Expression(Symbol("d") * Symbol("k") / (Symbol("d") + ONE))),
        ("C_1^2", Expression(Symbol("C_1") ** whole(2))),
        ("C_1+C_2", Expression(Symbol("C_1") + Symbol("C_2"))),
        ("C(x)", Expression(Symbol("C(x)"), ambiguous=True)),
        ("2*3*4", Expression(Product((whole(2), whole(3), whole(4))))),
        ("5m", Expression(whole(5) * Symbol("m"))),
        (r"\frac{3 m}{2}", Expression(whole(3) * Symbol("m") / whole(2))),
        ("x^{2 m}", Expression(X ** (whole(2) * Symbol("m")))),
        ("5 mgh", Expression(Product((whole(5), Symbol("m"), Symbol("g"), Symbol("h"))))),
        ("(x) 5", Expression(X * whole(5))),
        ("third", Words("third")),
        ("one two", Words("one two")),
        ("two-sided", Words("two-sided")),
        ("true for all n", Words("true for all n")),
        (r"x \in \mathbb{R}", Relation(("in",), (Expression(X), REALS))),
    ],
)
def test_what_looks_like_another_notation_is_not_read_so(text: str, answer: Answer) -> None:
    assert [_plain(reading) for reading in readings(text)] == [_plain(answer)]


@pytest.mark.parametrize(
    "text",
    [
        r"\frac{d}{dx}(x^2)",  # not carried out
        r"\begin{pmatrix} 1 & 2 \\ 3 \end{pmatrix}",
        r"\mathbb{R}\setminus\mathbb{Q}",
        "at least 5",
        "0x1A",
        "5 to 6",
        "30 degrees + x",
        r"30^\circ \text{ cm}",
        "5 hours 30 minutes",
        "5 ft 3 in",
    ],
)
def test_what_would_have_to_be_guessed_is_not_read(text: str) -> None:
    assert readings(text) == []


@pytest.mark.parametrize(
    ("text", "tree", "is_marked"),
    [
        (r"30^\circ + 45^\circ", whole(30) + whole(45), True),
        (r"\frac{45^\circ}{2}", whole(45) / whole(2), True),
        (r"-30^\circ", whole(-1) * whole(30), True),
        (r"\sin 30^\circ", Call((whole(30) * DEGREE,), "sin"), False),
        (r"2\cos(40^\circ)", whole(2) * Call((whole(40) * DEGREE,), "cos"), False),
        (r"90^\circ - x", whole(90) * DEGREE - X, False),
        (r"30^\circ + 1", whole(30) * DEGREE + ONE, False),
    ],
)
def test_degrees_bind_to_their_operand(text: str, tree: Tree, is_marked: bool) -> None:
    [answer] = readings(text)
    assert isinstance(answer, Expression)
    assert (answer.tree, answer.degrees, answer.unit) == (tree, is_marked, "")


@pytest.mark.parametrize("text", ["about 5", "approximately 5", r"\text{roughly } 5", "5 (approximately)"])
def test_a_rounded_number_is_ambiguous(text: str) -> None:
    assert readings(text) == [Expression(whole(5), ambiguous=True)]


@pytest.mark.parametrize(
    "text", ["dy/d", "½", "5 m/", "(k in Z", "for all ", "one hundred ", "1{,}", "**a ", "C_5^"]
)
def test_poison_is_read_at_once_or_not_at_all(text: str) -> None:
    readings((text * 2000)[:2000])


def test_numbers_with_commas_have_two_readings() -> None:
    number, pair = readings("1,234")
    assert number == Expression(whole(1234))
    assert pair == Group("", (Expression(ONE), Expression(whole(234))))
    assert len(readings("3,5 cm")) == len(readings("3,5")) == 2
    assert readings("3{,}5") == readings("3.5")
    assert readings("(0,5; 1)")[1:] == readings("(0.5, 1)")
    assert readings("1.234,5")[1:] == readings("1234.5")
    assert Expression(ONE) not in readings("0,001")
    assert readings("1{,}234") == readings("1,234")


def test_plus_minus_has_two_values() -> None:
    [answer] = readings(r"1\pm x")
    assert answer == Group("", (Expression(ONE + X), Expression(ONE + -X)))
    assert both_signs(Expression(X)) == [Expression(X)]
    assert readings(r"-\pm x") == []


@pytest.mark.parametrize(
    ("tree", "exact", "decimals"),
    [
        (ONE / whole(3), Fraction(1, 3), 0.333333),
        (whole(2) ** HALF, None, 1.414214),
        (whole(9) ** HALF, Fraction(3), 3.0),
        (-(whole(2) ** HALF), None, -1.414214),
        (Series((ONE, whole(4), N**N), "sum", "n"), Fraction(288), 288.0),
        (Call((-Constant("pi"),), "abs"), None, 3.141593),
        ((-ONE) ** HALF, None, None),
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
    assert unit_size("mW")[0] * 10**9 == unit_size("MW")[0]
    assert unit_size("quux / s")[2] is False


@pytest.mark.parametrize(
    "texts",
    [
        (
            "5 m/s^2",
            r"5 \mathrm{~m/s^2}",
            "5 m s^{-2}",
            "5 m·s⁻²",
            r"5 \text{ meters per second^2}",
            "5m/s^2",
        ),
        ("5 N", "5 kg·m/s²", r"5 \mathrm{~kg} \cdot \mathrm{m} / \mathrm{s}^2", "5 newtons"),
        ("5 W", "5 J/s", "5 N·m/s"),
        ("5 m²", "5 square meters", r"5 \text{ m}^{2}", r"5 \text{ sq. m}"),
        ("5 L", "5 dm^3", "5 liters"),
        (r"3 \times 10^8 m/s", r"3 \times 10^8 \mathrm{~m} / \mathrm{s}"),
        ("5 km/h", "5 kilometers per hour", r"5 \frac{km}{h}"),
        ("5 Hz", "5 s^{-1}"),
    ],
)
def test_units_of_one_quantity_have_one_size(texts: tuple[str, ...]) -> None:
    answers = [readings(text)[0] for text in texts]
    sizes = {unit_size(answer.unit) for answer in answers if isinstance(answer, Expression)}
    assert len(sizes) == 1
    assert all(isinstance(answer, Expression) and not answer.tree.symbols for answer in answers)
    assert sizes.pop()[2]
