"""Offline training on samples: which completions an objective of `pns.offline_objectives` trains on, and the
advantage of each of their tokens. `pns.algo.losses` has the losses, the README beside it the derivation.

Axes: `_T` tokens of one completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pns.algo.pairs import match_by_length
from pns.config import OWN
from pns.records import Completion, LabelledStep, Rollout


@dataclass(frozen=True)
class OfflineSample:
    """An unmasked completion with its reward r = 1 (`right`) or 0: the policy's own (`source` "own"), or a
    negative of another source. `mean_reward` is r-bar in [0, 1], the mean over the policy's own unmasked
    completions of the problem."""

    source: str
    rollout: Rollout
    right: bool
    mean_reward: float

    @property
    def id(self) -> str:
        """`completion_id` of its labels."""
        return labelled_as(self.source, self.rollout.completion)

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.completion.token_ids)


def offline_samples(
    samples: Sequence[Rollout], others: Mapping[str, Sequence[Rollout]], takes_own: bool
) -> list[OfflineSample]:
    """What there is to train on, problem by problem in the order of `samples`: the policy's right completions
    and (`takes_own`) wrong ones, then the negatives of `others` (source -> negatives) for the same problems.

    A reward of `samples` is 0, 1, or None where it is masked: such a completion is left out, of r-bar as
    well. The negatives count as wrong, whatever value their own reward has, and not in r-bar.
    """
    own: dict[str, list[Rollout]] = {}
    for rollout in samples:
        if not rollout.reward.masked:
            own.setdefault(rollout.problem.id, []).append(rollout)
    negatives: dict[str, list[tuple[str, Rollout]]] = {}
    for source, rollouts in others.items():
        for rollout in rollouts:
            negatives.setdefault(rollout.problem.id, []).append((source, rollout))
    found: list[OfflineSample] = []
    for identity, rollouts in own.items():
        rights = [rollout.reward.value == 1 for rollout in rollouts]
        mean_reward = sum(rights) / len(rights)
        for rollout, right in zip(rollouts, rights, strict=True):
            if right or takes_own:
                found.append(OfflineSample(OWN, rollout, right, mean_reward))
        of_others = negatives.get(identity, ())
        found += [OfflineSample(source, rollout, False, mean_reward) for source, rollout in of_others]
    return found


def labelled_as(source: str, completion: Completion) -> str:
    """The `completion_id` of a completion's labels: ids are unique within a source alone."""
    return completion.id if source == OWN else f"{source}/{completion.id}"


def token_advantages(
    sample: OfflineSample, objective: str, parameters: Mapping[str, float], steps: Sequence[LabelledStep] = ()
) -> NDArray[np.float32]:
    """The advantages (T,) of a completion under `objective` with its hyper-parameters.

    nsa, masked, bcpg: r - r-bar, in [-1, 1]; but for a wrong completion's tokens in `steps` that are labelled
    correct `correct_step_weight` (nsa) or 0 (masked). w_reinforce: `positive_weight` where right, else -1
    (arXiv 2506.01347). rft: 1, of right completions alone. Raises ValueError for any other objective and for
    a wrong completion under rft.
    """
    if objective == "rft" and sample.right:
        return np.ones(sample.num_tokens, np.float32)
    if objective == "w_reinforce":
        advantage = parameters["positive_weight"] if sample.right else -1.0
        return np.full(sample.num_tokens, advantage, np.float32)
    if objective not in ("nsa", "masked", "bcpg"):
        raise ValueError(f"{objective} has no advantages for this completion")
    advantages_T = np.full(sample.num_tokens, sample.right - sample.mean_reward, np.float32)
    if objective != "bcpg" and not sample.right:
        weight = parameters["correct_step_weight"] if objective == "nsa" else 0.0
        for step in steps:
            if step.correct:
                advantages_T[step.first_token : step.end_token] = weight
    return advantages_T


def right_wrong_pairs(samples: Sequence[OfflineSample], max_length_ratio: float) -> list[tuple[int, int]]:
    """Indices (right, wrong) into `samples` of pairs of one problem, each used once, whose lengths in tokens
    differ by a factor of `max_length_ratio` at most; as many as there can be, problem by problem."""
    by_problem: dict[str, tuple[list[int], list[int]]] = {}
    for index, sample in enumerate(samples):
        rights, wrongs = by_problem.setdefault(sample.rollout.problem.id, ([], []))
        (rights if sample.right else wrongs).append(index)
    pairs: list[tuple[int, int]] = []
    for rights, wrongs in by_problem.values():
        right_lengths, wrong_lengths = (
            [samples[index].num_tokens for index in side] for side in (rights, wrongs)
        )
        matched = match_by_length(right_lengths, wrong_lengths, max_length_ratio)
        pairs += [(rights[right], wrongs[wrong]) for right, wrong in matched]
    return pairs
