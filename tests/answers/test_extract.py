"""Final answers out of completions."""

from __future__ import annotations

import pytest

from pns.answers.extract import boxed_span, extract_answer, extract_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{57}", "57"),
        (r"\boxed {5} then \fbox{ 6 }", "6"),
        (r"\boxed{1}, \boxed{2}", "1, 2"),  # one answer in two boxes
        (r"\[\boxed{-2} \quad \text{and} \quad \boxed{1}\]", "-2, 1"),
        (r"\boxed{5} or $\boxed{6}$", "5, 6"),
        (r"\boxed{5} \boxed{6}", "6"),
        (r"\boxed{5}, so \boxed{6}", "6"),
        (r"<think>a</think>\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),  # escaped braces do not count
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5} or \boxed{6", "5"),  # the last one that balances
        (r"} stray { \boxed{7}", "7"),
        (r"<think>\boxed{5}", None),  # the reasoning is never closed
        (r"<think>a</think><think>\boxed{5}", None),
        (r"<think>a</think>\boxed{5}<think>\boxed{6}", "5"),
        (r"<think>\boxed{5}</think>", "5"),
        (r"a</think>\boxed{5}", "5"),  # the prompt opened the block
        (r"\boxed{ }", None),
        (r"so \boxed 5.", "5"),
        (r"\boxed57", "57"),
        (r"\boxed{4} then \boxed -1,234$", "-1,234"),
        (r"\boxed\frac12", r"\frac12"),
        (r"$\boxed\frac{a}{2}$", r"\frac{a}{2}"),
        (r"\boxed B", "B"),
        (r"\boxed 1 and \boxed 2", "1, 2"),
        (r"put it in \boxed and stop", None),
        (r"\boxed x", None),
        ("57", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


def test_box_span_points_at_the_content() -> None:
    text = r"x \boxed{ 5 } y"
    assert boxed_span(text) == (9, 12)
    assert text[9:12] == " 5 "
    assert boxed_span("none") is None


def test_other_reasoning_tags() -> None:
    assert extract_boxed(r"<r>\boxed{5}", ("<r>", "</r>")) is None
    assert extract_boxed(r"<think>\boxed{5}", ("<r>", "</r>")) == "5"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("57", "57"),
        ("The answer is 57.", "57"),
        ("It is 5 + 2.\n#### 7", "7"),
        ("So the final answer is $57$. I hope it is correct.", "57"),
        ("Answer $9$", "9"),
        (r"Hence \boxed{5}.", "5"),
        (r"\boxed{5", None),  # a box that is not closed is not replaced by the text around it
        ("<think>57", None),
        ("word " * 200, None),
        ("", None),
    ],
)
def test_a_bare_answer_needs_no_box(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer
