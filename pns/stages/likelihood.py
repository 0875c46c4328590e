"""How likely completions are under a language model, which the policy processes hold untrained for it."""

from collections.abc import Sequence

import numpy as np

from pns.records import Rollout
from pns.stages.context import Context
from workers.training.batching import Batch


def log_probs_under(ctx: Context, model: str, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """Natural-log probabilities (T,) under `model` of each completion's tokens, at temperature 1."""
    if not rollouts:
        return []
    problems = {rollout.problem.id: rollout.problem for rollout in rollouts}
    prompts = {identity: ctx.prompts.encode(problem) for identity, problem in problems.items()}
    prompt_ids = [prompts[rollout.problem.id] for rollout in rollouts]
    ctx.fleet.policy.load(model, "language_model", None, 1, ctx.seed)
    return ctx.fleet.policy.log_probs(Batch(prompt_ids, [own.completion.token_ids for own in rollouts]))
