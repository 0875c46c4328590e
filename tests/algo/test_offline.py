"""Advantages of tokens by hand, and which completions an objective takes."""

from __future__ import annotations

import numpy as np
import pytest

from pns.algo.offline import OfflineSample, offline_samples, right_wrong_pairs, token_advantages
from pns.records import Completion, LabelledStep, Problem, Reward, Rollout, Verdict


def rollout(problem: str, name: str, value: float | None, num_tokens: int = 3) -> Rollout:
    tokens = tuple(range(num_tokens))
    completion = Completion(name, problem, "text", tokens, (-0.5,) * num_tokens, "stop")
    verdict = Verdict.CORRECT if value == 1 else Verdict.WRONG
    return Rollout(0, Problem(problem, "?", "1"), completion, Reward(value, True, verdict))


SAMPLES = [
    rollout("p", "p0", 1.0),
    rollout("q", "q0", 1.0),
    rollout("p", "p1", 0.0),
    rollout("p", "p2", None),
    rollout("p", "p3", 0.0),
    rollout("p", "p4", 0.0),
    rollout("r", "r0", None),
]
# Of a generator whose reward says how well they deceive.
OTHERS = {"pns": [rollout("p", "p0", 0.9), rollout("r", "r0", 0.9), rollout("elsewhere", "e", 0.1)]}


def test_rewards_and_means_are_of_the_policys_own_unmasked_samples() -> None:
    found = offline_samples(SAMPLES, OTHERS, takes_own=True)
    assert [(own.id, own.right, own.mean_reward) for own in found] == [
        ("p0", True, 0.25),
        ("p1", False, 0.25),
        ("p3", False, 0.25),
        ("p4", False, 0.25),
        ("pns/p0", False, 0.25),  # with its own id, as it is from elsewhere
        ("q0", True, 1.0),
    ]
    without = offline_samples(SAMPLES, OTHERS, takes_own=False)
    assert [own.id for own in without] == ["p0", "pns/p0", "q0"]
    assert {own.mean_reward for own in without if own.rollout.problem.id == "p"} == {0.25}


RIGHT = OfflineSample("own", rollout("p", "p0", 1.0), True, 0.25)
WRONG = OfflineSample("own", rollout("p", "p1", 0.0), False, 0.25)
STEPS = (LabelledStep(0, 2, 0, 1, correct=True), LabelledStep(2, 4, 1, 3))
ADVANTAGES = {
    ("nsa", "right"): [0.75, 0.75, 0.75],
    ("nsa", "wrong"): [0.5, -0.25, -0.25],
    ("masked", "right"): [0.75, 0.75, 0.75],
    ("masked", "wrong"): [0.0, -0.25, -0.25],
    ("bcpg", "right"): [0.75, 0.75, 0.75],
    ("bcpg", "wrong"): [-0.25, -0.25, -0.25],
    ("w_reinforce", "right"): [0.125, 0.125, 0.125],
    ("w_reinforce", "wrong"): [-1.0, -1.0, -1.0],
    ("rft", "right"): [1.0, 1.0, 1.0],
}


@pytest.mark.parametrize(("objective", "side"), ADVANTAGES)
def test_advantages_by_hand(objective: str, side: str) -> None:
    sample, steps = (RIGHT, ()) if side == "right" else (WRONG, STEPS)
    parameters = {"correct_step_weight": 0.5, "positive_weight": 0.125}
    found = token_advantages(sample, objective, parameters, steps)
    assert found.dtype == np.float32
    assert found.tolist() == ADVANTAGES[objective, side]


def test_a_weight_of_zero_is_masking_to_the_bit() -> None:
    nsa = token_advantages(WRONG, "nsa", {"correct_step_weight": 0.0}, STEPS)
    assert nsa.tobytes() == token_advantages(WRONG, "masked", {}, STEPS).tobytes()


def test_what_has_no_advantages_is_refused() -> None:
    for sample, objective in ((WRONG, "rft"), (RIGHT, "rpo")):
        with pytest.raises(ValueError, match=f"{objective} has no advantages"):
            token_advantages(sample, objective, {})


def test_pairs_are_of_one_problem_and_of_like_length() -> None:
    samples = [
        OfflineSample("own", rollout(problem, "c", float(right), length), right, 0.5)
        for problem, right, length in [
            ("p", True, 10),
            ("p", True, 40),
            ("p", False, 50),
            ("p", False, 11),
            ("p", False, 45),
            ("q", True, 10),
            ("r", False, 10),
        ]
    ]
    assert right_wrong_pairs(samples, 1.5) == [(0, 3), (1, 4)]
    assert right_wrong_pairs(samples, 1.05) == []
