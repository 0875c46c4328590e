"""The second reader of plain numbers: what it reads, what it leaves, and what it calls apart."""

from __future__ import annotations

import pytest

from pns.answers.plain_numbers import are_apart, read_plain


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("57", "58", True),
        ("57", "57.0", False),
        ("1,234", "1234", False),
        ("1{,}234", "$1235$", True),
        (r"\$5", "5.00", False),
        ("-3", "3", True),
        (r"\frac{1}{2}", "2/4", False),
        (r"-\dfrac{1}{2}", r"\frac{-1}{2}", False),
        ("1/3", "0.33", True),  # the exact comparison sees the rounding
        (r"50\%", "0.5", False),
        (r"50\%", "50", False),
        (r"50\%", r"0.5\%", True),
        (r"50\%", "51", True),
        ("(1, 2)", r"\left(1, 3\right)", True),
        ("(1, 2)", "(2, 1)", True),
        ("1, 2", "2, 1", False),
        (r"\{1, 2\}", r"\{2, 3\}", True),
        ("(1, 2)", "[1, 2]", False),  # of different kinds: not for this reader
        ("(1, 2)", "(1, 2, 3)", False),
    ],
)
def test_apart(one: str, other: str, apart: bool) -> None:
    first, second = read_plain(one), read_plain(other)
    assert first
    assert second
    assert are_apart(first, second) is are_apart(second, first) is apart


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "3 1/2",
        r"3\frac{1}{2}",
        "1/0",
        "3,50",
        "12 345",
        "2^3",
        "5.",
        "5$6",
        "1e5",
        "(5)",
        "5 cm",
        "1_2",
    ],
)
def test_anything_else_is_left(text: str) -> None:
    assert read_plain(text) is None
