"""What the tiny world's step judge learns from and is measured by: the checker's labels of every step."""

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from pns.algo.judging import Template, without_markers
from pns.algo.segments import sentences
from pns.algo.step_judging import VERDICTS, render_tiny, render_tiny_problem, step_nonce, verdict_parts
from pns.records import Problem
from pns.tiny import world

# Of the training rows: samples of a model, made-up solutions by one who often errs, solutions with one
# made-up error; the rest are right ones.
SAMPLED_SHARE, MIXED_SHARE, CORRUPTED_SHARE = 0.4, 0.25, 0.2
MISCONCEPTIONS, SLIPS, MISREADINGS = {"times": 0.25, "fewer": 0.25}, 0.25, 0.25

# In the loss, of a token of a right solution or a right step, and of a noted digit; a grade has 1.
WEIGHT_OF_SOLVING, WEIGHT_OF_NOTES = 0.2, 0.5

Candidate = tuple[Problem, str]  # a problem and the text of a solution


def solution_steps(text: str) -> tuple[str, ...]:
    """The text's sentences and, behind them, its box, as `pns.algo.segments` cuts them: joined they are the
    text."""
    boundaries = [0, *sentences(text), len(text)]
    return tuple(text[start:end] for start, end in pairwise(boundaries))


def step_labels(problem: Problem, steps: Sequence[str]) -> tuple[bool, ...]:
    """Of each step whether it is correct, by the checker: it ends where one of the checker's steps does,
    which has no error of its own and carries none on; the last, where it is the box, if that has no error and
    the answer is right."""
    text = "".join(steps)
    found = world.check(problem, text)
    right_ends = {step.end for step in found.steps if not step.kinds and not step.carried}
    errors_of_box = len(found.kinds) - sum(len(step.kinds) for step in found.steps)
    if found.answer_correct and found.format_ok and not errors_of_box:
        right_ends.add(len(text))
    ends = np.cumsum([len(step) for step in steps]).tolist()
    return tuple(end in right_ends for end in ends)


def step_notes(problem: Problem, steps: Sequence[str]) -> tuple[str, ...]:
    """What the judge notes of each step: the last two digits of its last number, and of the right value of
    what it names (the box: of the answer); 00 for none."""
    found, gold = world.check(problem, "".join(steps)), world.parse_problem(problem.prompt).values()
    right_values = {step.end: gold.get(step.name, 0) for step in found.steps}
    if found.format_ok:
        right_values[len("".join(steps))] = int(problem.answer)
    notes = []
    for step, end in zip(steps, np.cumsum([len(step) for step in steps]).tolist(), strict=True):
        stated = re.findall("[0-9]+", step)[-1:] or ["0"]
        notes.append(f"{stated[0][-2:]:0>2}{right_values.get(end, 0):02d}")
    return tuple(notes)


def step_candidates(fresh: list[Problem], sampled: list[Candidate], rng: random.Random) -> list[Candidate]:
    """One for each of the `fresh` problems, or, where there are any, one that was `sampled` (of a problem of
    its own)."""
    candidates = []
    for index, problem in enumerate(fresh):
        kind = rng.random()
        if kind < SAMPLED_SHARE and sampled:
            candidates.append(sampled[index])
        elif kind < SAMPLED_SHARE + MIXED_SHARE:
            text = world.mixed_solution(problem, rng, MISCONCEPTIONS, SLIPS, MISREADINGS)
            candidates.append((problem, text))
        elif kind < SAMPLED_SHARE + MIXED_SHARE + CORRUPTED_SHARE:
            candidates.append((problem, world.corrupt(problem, rng, rng.choice(world.ERROR_KINDS))))
        else:
            candidates.append((problem, world.random_solution(problem, rng)))
    return [(problem, text) for problem, text in candidates if text]


def step_row(
    problem: Problem, text: str, seed: int, encode: Callable[[str], list[int]]
) -> tuple[list[int], list[int], list[float]]:
    """Token ids of the problem, those of all that follows (a right solution, in the place of the judge's own,
    the steps, the verdict), and the weight of each of the latter in the loss."""
    steps = solution_steps(text)
    nonce = step_nonce(seed, problem.prompt, steps, Template.TINY)
    parts = verdict_parts(Template.TINY, nonce, len(steps))
    solution, asked = encode(str(problem.solution)), encode(render_tiny(steps, nonce))
    ids = solution + asked
    weights = [WEIGHT_OF_SOLVING] * len(solution) + [0.0] * len(asked)
    labels = step_labels(problem, steps)
    # To foresee right steps from the solution is on the way to telling wrong ones.
    end = len(solution) + len(encode(f"<judge>{nonce}"))
    for place, (step, correct) in enumerate(zip(steps, labels, strict=True), 1):
        start, end = end, end + len(encode(without_markers(step)))
        weights[start:end] = [WEIGHT_OF_SOLVING * correct] * (end - start)
        end += len(encode(f"<solve>{place}<solve>"))
    for part, noted, correct in zip(parts, step_notes(problem, steps), labels, strict=False):
        number = encode(part) if part else []
        ids += number + encode(noted + VERDICTS[Template.TINY][correct])
        weights += [0.0] * len(number) + [WEIGHT_OF_NOTES] * len(noted) + [1.0]
    return encode(render_tiny_problem(problem.prompt)), ids, weights


def step_agreement(verdicts: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> dict[str, float]:
    """Of (judge's, checker's) labels of completions, over all their steps: the share of right steps,
    accuracy, the mean of the accuracies on right and on wrong steps, precision and recall of "correct", and
    Cohen's kappa; and the share of completions with all steps labelled alike. NaN for 0/0."""
    judge = np.array([label for own, _ in verdicts for label in own], dtype=bool)
    checker = np.array([label for _, exact in verdicts for label in exact], dtype=bool)
    both, neither = float(np.sum(judge & checker)), float(np.sum(~judge & ~checker))
    num, said, right = float(len(checker)), float(np.sum(judge)), float(np.sum(checker))
    accuracy = _share(both + neither, num)
    by_chance = _share(said * right + (num - said) * (num - right), num * num)
    recall, specificity = _share(both, right), _share(neither, num - right)
    return {
        "completions": float(len(verdicts)),
        "steps": num,
        "right_steps": _share(right, num),
        "accuracy": accuracy,
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": _share(both, said),
        "recall": recall,
        "kappa": _share(accuracy - by_chance, 1 - by_chance),
        "same_completions": _share(sum(tuple(own) == tuple(exact) for own, exact in verdicts), len(verdicts)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
