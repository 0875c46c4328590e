"""Accuracy of the start, the RL-trained and the preference-trained backbone on every suite."""

from __future__ import annotations

from collections.abc import Iterator

from pns.algo.metrics import score
from pns.records import Problem, Rollout, Score, Verdict, to_json
from pns.run.directory import write_json, write_jsonl
from pns.stages.context import Context
from pns.stages.models import backbone, target
from pns.stages.scoring import RewardKind, roll_out


def run(ctx: Context) -> None:
    """Writes `evaluate/scores.json` and one JSONL of completions and verdicts per model; a model already scored is not scored again."""
    directory = ctx.run.stage_dir("evaluate")
    models = {"start": backbone(ctx), "rl": target(ctx), "preference": str(ctx.run.stage_dir("preference") / "model")}
    fitting = {suite: ctx.prompts.fitting(problems) for suite, problems in ctx.problems.suites.items()}
    suites = {suite: kept for suite, (kept, _) in fitting.items()}
    ctx.track.begin("evaluate", len(models), 0)
    scores: dict[str, dict[str, Score]] = {}
    for index, (name, model) in enumerate(models.items()):
        path = directory / f"{name}.json"
        if not path.exists():
            found, rollouts = evaluate(ctx, suites, model)
            write_jsonl(directory / f"{name}.jsonl", rollouts)
            write_json(path, to_json(found))
        for suite, value in ctx.run.read_json(path).items():
            scores.setdefault(suite, {})[name] = Score(**value)
        ctx.track.log(index, {f"{name}_accuracy": scores["mean"][name].accuracy})
    ctx.track.end()
    write_json(directory / "scores.json", to_json(scores))
    ctx.run.count("evaluate", prompts_too_long=sum(too_long for _, too_long in fitting.values()))


def evaluate(ctx: Context, suites: dict[str, list[Problem]], model: str) -> tuple[dict[str, Score], list[Rollout]]:
    """Accuracy per suite, and over the problems of all suites as "mean"; with several samples a problem, the mean over them. A completion
    counts as correct when math-verify says so; an unverified one does not, and is reported in the rollouts with its cause."""
    settings = ctx.config.evaluate
    ctx.fleet.rollout.load(model)
    tagged = [(suite, problem) for suite, problems in suites.items() for problem in problems]
    rollouts = roll_out(
        ctx, [problem for _, problem in tagged], settings.samples_per_problem, settings.temperature, RewardKind.ANSWER, "evaluate"
    )
    by_suite: dict[str, list[bool]] = {}
    for (suite, _), correct in zip(repeat(tagged, settings.samples_per_problem), map(is_correct, rollouts), strict=True):
        by_suite.setdefault(suite, []).append(correct)
    by_suite["mean"] = [correct for found in list(by_suite.values()) for correct in found]
    num = settings.samples_per_problem
    return {suite: score(sum(found) / num, len(found) // num) for suite, found in by_suite.items()}, rollouts


def is_correct(rollout: Rollout) -> bool:
    return rollout.reward.verdict is Verdict.CORRECT


def repeat(tagged: list[tuple[str, Problem]], times: int) -> Iterator[tuple[str, Problem]]:
    return (item for item in tagged for _ in range(times))
