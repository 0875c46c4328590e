"""RL of the backbone: the loop with the ordinary reward, and what does not fit left out."""

from __future__ import annotations

from typing import Any

from pns.config import Config, GrpoConfig
from pns.files import read_jsonl
from pns.records import Problem
from pns.run.stage import ModelFiles
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Problems
from pns.stages.rl import rl


def test_the_backbone_becomes_the_target(bench: Any) -> None:
    config = Config(
        rl=GrpoConfig(steps=2, problems_per_step=2, completions_per_problem=2, kl_coefficient=0.0)
    )
    config.rollout.max_new_tokens = 17
    too_long = Problem("p9", "Ann has 3. " * 40, "19")
    problems = Problems([*bench.problems(3).problems, too_long])
    bench.fleet.rollout.write = lambda problem, sample, model: bench.solution(10 + sample)
    settings = rl.settings(config)
    with bench.making() as ctx:
        target = rl.make(ctx, settings, ModelFiles("backbone"), problems)
    assert isinstance(target, TrainedModel)
    assert {r.problem.id for r in target.rollouts()} <= {"p0", "p1", "p2"}
    assert all(not r.reward.terms for r in target.rollouts())
    assert {s.max_new_tokens for s in bench.fleet.rollout.samplings} == {17}
    assert [row["stage"] for row in read_jsonl(target.directory / "metrics.jsonl")] == ["rl", "rl"]
    assert bench.counts() == {"prompts_too_long": 1}
    assert bench.fleet.policy.loads[0][:3] == ("backbone", "language_model", 2)
    assert target.model == str(target.directory / "model")
    assert rl.roles(settings) == ("rollout", "verifier", "policy")
