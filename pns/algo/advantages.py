"""Group-relative advantages over the unmasked completions of each problem.

Axes: `_P` problems, `_G` completions of one problem.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pns.config import Advantage, GrpoConfig
from pns.records import Rollout

# Of a group's rewards, which are of order 1: dividing by less would make a signal of rounding.
_MIN_SPREAD = 1e-6


def group_advantages(
    rewards_PG: ArrayLike | Sequence[Sequence[float | None]], kind: Advantage = Advantage.grpo
) -> NDArray[np.float64]:
    """(P, G) rewards, None or NaN where masked -> (P, G) advantages.

    grpo (arXiv 2402.03300, section 4.1.2): (R - mean) / std with the group's population standard deviation;
    dr_grpo (arXiv 2503.20783): R - mean; rloo (arXiv 2402.14740): R minus the mean of the others,
    (R - mean) n / (n - 1) of n members; reinforce_pp (arXiv 2501.03262, with the group's mean as baseline):
    R - mean over the standard deviation of that in the whole batch. Mean and deviation are of the unmasked
    members. A masked member gets 0; a group with fewer than two unmasked members, or whose rewards
    differ by no more than rounding (1e-6), gets 0 throughout.

    Raises ValueError for infinite rewards or an array that is not two-dimensional.
    """
    rewards = np.array(rewards_PG, dtype=np.float64)  # None becomes NaN
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {rewards.shape}, expected (problems, completions)")
    if np.isinf(rewards).any():
        raise ValueError("a reward is infinite")
    present = ~np.isnan(rewards)
    num_P1 = np.maximum(present.sum(axis=1, keepdims=True), 1)
    mean_P1 = np.where(present, rewards, 0.0).sum(axis=1, keepdims=True) / num_P1
    centred = np.where(present, rewards - mean_P1, 0.0)
    lowest_P1 = np.where(present, rewards, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    highest_P1 = np.where(present, rewards, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    spread = highest_P1 - lowest_P1 > _MIN_SPREAD  # False for fewer than two members
    if kind is Advantage.grpo:
        std_P1 = np.sqrt((centred**2).sum(axis=1, keepdims=True) / num_P1)
        centred = centred / np.where(spread, std_P1, 1.0)
    elif kind is Advantage.rloo:
        centred = centred * num_P1 / np.maximum(num_P1 - 1, 1)
    centred = np.where(spread, centred, 0.0)
    if kind is Advantage.reinforce_pp and spread.any():
        centred = centred / np.sqrt((centred**2).sum() / present.sum())  # their mean is 0 already
    return centred


def overlong_penalties(lengths: Sequence[int], max_tokens: int, buffer_tokens: int) -> NDArray[np.float64]:
    """What completions of `lengths` tokens lose: 0 up to `max_tokens` - `buffer_tokens`, from there linearly
    down to -1 at `max_tokens` (soft overlong punishment, arXiv 2503.14476, equation 13)."""
    over = np.asarray(lengths, dtype=np.float64) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)


def rollout_advantages(rollouts: Sequence[Rollout], settings: GrpoConfig, max_new_tokens: int) -> list[float]:
    """Of every completion of a step, `settings.completions_per_problem` of each problem one after the other;
    0 where it is masked."""
    # NaN stands for a masked reward, which `group_advantages` leaves out of its group.
    rewards = np.array([np.nan if r.reward.value is None else r.reward.value for r in rollouts])
    if settings.overlong_tokens:
        lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
        rewards += overlong_penalties(lengths, max_new_tokens, settings.overlong_tokens)
    rewards_PG = rewards.reshape(-1, settings.completions_per_problem)
    return group_advantages(rewards_PG, settings.advantage).reshape(-1).tolist()
