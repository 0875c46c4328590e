"""The count of published figures, by its rules."""

import pytest

from pns.answers.qwen_harness import counts_as_right, stated_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{5}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("The final answer is $12$. I hope it is correct.", "12"),
        ("the answer is: 7", "7"),
        ("that makes 3 apples and 1,250 pears", "1250"),
        ("none", ""),
    ],
)
def test_the_answer_is_the_box_or_what_is_stated_or_the_last_number(completion: str, answer: str) -> None:
    assert stated_answer(completion) == answer


@pytest.mark.parametrize(
    ("gold", "completion", "is_right"),
    [
        ("18", "18 eggs, so 18", True),
        ("18", r"\boxed{18\text{ dollars}}", True),
        ("0.5", r"\boxed{50\%}", True),  # a hundredfold, either way
        ("50", r"\boxed{0.5}", True),
        ("50", r"\boxed{5}", False),
        ("3.14159", r"\boxed{3.1416}", True),  # within a ten-thousandth
        ("3.14159", r"\boxed{3.14}", False),
        ("1/3", r"\boxed{0.3333}", False),  # a fraction is a formula
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        ("x=5", r"\boxed{5.0}", True),
        ("B", r"\boxed{\text{(B) } 12}", True),
        ("B", r"\boxed{C}", False),
        ("(1,2]", r"\boxed{[1, 2)}", True),  # its brackets do not count
        ("(1,2)", r"\boxed{(1,2,3)}", False),
        (r"90^\circ", r"\boxed{90}", True),
        (r"2x+3", r"\boxed{3+2x}", True),
        ("3.83e35", r"\boxed{3.83e35}", True),
        ("5", "", False),
    ],
)
def test_published_figures_count_so(gold: str, completion: str, is_right: bool) -> None:
    assert counts_as_right(gold, completion) is is_right
