"""Log-probabilities of completions under a model that the policy holds for them."""

from __future__ import annotations

from typing import Any

from pns.records import Completion, Reward, Rollout, Verdict
from pns.stages.likelihood import log_probs_under


def test_prompts_and_completions_as_they_were_sampled(bench: Any) -> None:
    problems = bench.problems(2).problems
    rollouts = []
    for problem, ids in zip(problems, [(5, 6, 7), (8,)], strict=True):
        completion = Completion("c", problem.id, "", ids, (), "length")
        rollouts.append(Rollout(0, problem, completion, Reward(0.0, True, Verdict.WRONG)))
    bench.fleet.policy.log_prob = lambda token_ids: -float(len(token_ids))
    with bench.making() as ctx:
        log_probs = log_probs_under(ctx, "MODEL", rollouts)
        assert log_probs_under(ctx, "MODEL", []) == []  # nothing is loaded for nothing
    assert [list(own) for own in log_probs] == [[-3.0] * 3, [-1.0]]
    assert bench.fleet.policy.loads == [("MODEL", "language_model", 1, bench.seed)]
    [batch] = bench.fleet.policy.asked
    assert batch.prompt_ids == [bench.prompts.encode(problem) for problem in problems]
    assert batch.completion_ids == [(5, 6, 7), (8,)]
    assert bench.fleet.policy.temperatures == [1.0]
