"""What the tiny step judge learns from: steps, the checker's labels of them, rows; and how it is measured."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest

from pns.algo.judging import Template
from pns.algo.step_judging import parse_steps
from pns.records import Problem
from pns.tiny import world
from pns.tiny.step_judge import (
    WEIGHT_OF_SOLVING,
    solution_steps,
    step_agreement,
    step_candidates,
    step_labels,
    step_notes,
    step_row,
)
from pns.tiny.tokenizer import build_tokenizer

TEXT = "Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. How many has Eve? "
PROBLEM = Problem("p", TEXT, "57", "base", None)


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (("<think>Cal has 12+7=19. ", "So Eve has 19*3=57. ", "</think>\\boxed{57}"), (True, True, True)),
        # Carried on, to the box too.
        (("<think>Cal has 12+7=18. ", "So Eve has 18*3=54. ", "</think>\\boxed{54}"), (False, False, False)),
        (("<think>Cal has 12+7=19. ", "So Eve has 19+3=22. ", "</think>\\boxed{22}"), (True, False, False)),
        (("<think>Cal has 12+7=19. ", "So Eve has 19*3=57. ", "</think>\\boxed{56}"), (True, True, False)),
        # What is no step of the checker's: after it nothing is read.
        (
            ("<think>Cal has 12+7=19. ", "Then 3. ", "So Eve has 19*3=57. ", "</think>\\boxed{57}"),
            (True, False, False, False),
        ),
        (("<think>Cal has 12+7=19. ", "So Eve has 19"), (True, False)),
        (("Cal has 12+7=19. ", "</think>\\boxed{57}"), (False, False)),
    ],
)
def test_steps_and_their_labels(steps: tuple[str, ...], labels: tuple[bool, ...]) -> None:
    assert solution_steps("".join(steps)) == steps
    assert step_labels(PROBLEM, steps) == labels


def test_notes_are_the_stated_and_the_right_result() -> None:
    steps = ("<think>Cal has 12+7=8. ", "So Eve has 8*3=124. ", "Ann. ", "</think>\\boxed{124}")
    assert step_notes(PROBLEM, steps) == ("0819", "2457", "0000", "2400")
    steps = ("<think>Cal has 12+7=18. ", "</think>\\boxed{54}")
    assert step_notes(PROBLEM, steps) == ("1819", "5457")


def test_candidates_have_right_and_wrong_steps_and_rows_that_say_so() -> None:
    encode = partial(build_tokenizer().encode, add_special_tokens=False)
    decode = build_tokenizer().decode
    fresh = world.problems("train", None, 200, 0)
    sampled = [(problem, "<think>no. </think>\\boxed{1}") for problem in fresh]
    candidates = step_candidates(fresh, sampled, random.Random(0))
    labels = [step_labels(problem, solution_steps(text)) for problem, text in candidates]
    assert 0.3 < sum(map(sum, labels)) / sum(map(len, labels)) < 0.7
    assert 0.3 < sum(text == sampled[0][1] for _, text in candidates) / len(candidates) < 0.5
    for (problem, text), own in zip(candidates, labels, strict=True):
        steps = solution_steps(text)
        assert "".join(steps) == text
        # Every step of the checker's ends where one of the judge's does.
        ends = {len("".join(steps[: number + 1])) for number in range(len(steps))}
        assert {step.end for step in world.check(problem, text).steps} <= ends
        prompt, ids, weights = step_row(problem, text, 0, encode)
        assert decode(prompt) == f"<bos>{problem.prompt}<solve>"
        solution, verdict = decode(ids).split("<judge>")[0], decode(ids).split("<verdict>1")[1]
        assert solution == problem.solution
        assert parse_steps(verdict, "", len(own), Template.TINY) == own
        assert verdict == "".join(
            f"{number if number > 1 else ''}{noted}{int(label)}"
            for number, (noted, label) in enumerate(zip(step_notes(problem, steps), own, strict=True), 1)
        )
        grades = [token for token, weight in zip(ids, weights, strict=True) if weight == 1]
        assert grades == [token for label in own for token in encode(str(int(label)))]
        learned = [token for token, weight in zip(ids, weights, strict=True) if weight == WEIGHT_OF_SOLVING]
        right_steps = "".join(step for step, label in zip(steps, own, strict=True) if label)
        assert decode(learned) == solution + right_steps


def test_agreement_by_hand() -> None:
    verdicts = [((True, True, False), (True, False, False)), ((True, False), (True, True))]
    quality = step_agreement(verdicts)
    assert quality == pytest.approx(
        {
            "completions": 2,
            "steps": 5,
            "right_steps": 3 / 5,
            "accuracy": 3 / 5,
            "balanced_accuracy": (2 / 3 + 1 / 2) / 2,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "kappa": (0.6 - 0.52) / 0.48,  # by chance 0.6 * 0.6 + 0.4 * 0.4
            "same_completions": 0,
        }
    )
    assert math.isnan(step_agreement([])["accuracy"])
