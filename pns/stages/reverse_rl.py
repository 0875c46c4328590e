"""Reverse RL: the generator learns to write solutions that look right and end wrong (arXiv 2602.03516)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pns.algo.judging import rubric_score
from pns.algo.negatives import degeneration
from pns.algo.reward import reward_rules, service_terms
from pns.config import Config, ReverseRl, RewardConfig, RewardModelStage, TermKind
from pns.data.checker import Checker
from pns.files import read_json, write_json
from pns.records import Problem, Rollout, Verdict
from pns.run.stage import stage
from pns.stages import grpo
from pns.stages.artefacts import AnyModel, Generator, RewardModels, TrainedModel
from pns.stages.context import Context, Problems
from pns.stages.refresh import Refresher
from pns.stages.scoring import Draws, by_verdict, load_terms, roll_out, unfinished_rollouts
from workers.rollout.engine import Sampling


@dataclass(frozen=True)
class ReverseRlSettings:
    reverse_rl: ReverseRl
    rules: RewardConfig
    max_new_tokens: int
    refreshing: RewardModelStage | None  # how the reward model is trained on, where it is
    measured_samples: int  # completions of the generator before and after
    measured_temperature: float


def reverse_rl_settings(config: Config) -> ReverseRlSettings:
    return ReverseRlSettings(
        config.reverse_rl,
        reward_rules(config),
        config.rollout.max_new_tokens,
        config.reward_model if config.reverse_rl.refresh_every else None,
        config.evaluate.generator_samples,
        config.evaluate.generator_temperature,
    )


@stage(Generator, reverse_rl_settings, lambda s: ("rollout", "verifier", "policy", *service_terms(s.rules)))
def reverse_rl(
    ctx: Context,
    settings: ReverseRlSettings,
    start: AnyModel,
    target: TrainedModel | None,
    rewards: RewardModels,
    train: Problems,
    measured: Problems,
) -> Generator:
    """The generator of negatives: `start` trained on `train`, measured before and after on others. `target`:
    whose right solutions a reward model that is refreshed sees beside the generator's (None: it is not)."""
    generator = Generator(ctx.directory)
    load_terms(ctx, settings.rules, rewards.main)
    fitting, rules = ctx.fitting(train), settings.rules
    if not generator.before_file.exists():  # not again after an interruption
        write_json(generator.before_file, measure_generator(ctx, settings, start.model, measured, "before"))
    limits = settings.max_new_tokens, rules.max_masked_fraction
    run = grpo.GrpoRun("reverse_rl", settings.reverse_rl, *limits, rules)

    def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
        return degeneration(rollouts, scored_terms(rules)) | checked_figures(rollouts, train.checker)

    refresher = None
    if settings.refreshing is not None and target is not None:
        reverse, training = settings.reverse_rl, settings.refreshing
        refresher = Refresher(ctx, reverse, training, rules, rewards, target, generator)
    stop = PlausibilityStop(settings.reverse_rl)
    grpo.train(ctx, run, generator, start.model, fitting, describe, stop, refresher)
    if refresher is not None:
        load_terms(ctx, rules, rewards.main)  # as before the training, so that the figures compare
    after = measure_generator(ctx, settings, generator.model, measured, "after")
    write_json(generator.figures_file, {"before": read_json(generator.before_file), "after": after})
    return generator


class PlausibilityStop:
    """Stop when the wrong rate and the format rate are reached and the watched term no longer rises."""

    def __init__(self, settings: ReverseRl) -> None:
        self._settings = settings
        self._best = 0.0
        self._steps_since = 0

    def __call__(self, step: int, metrics: Mapping[str, float | None]) -> bool:
        settings = self._settings
        wrong_rate, format_rate = metrics.get("wrong_rate") or 0.0, metrics.get("format_rate") or 0.0
        watched = metrics.get(f"{settings.stop_term}_mean") or 0.0
        if settings.max_hold_wrong_rate < 1 and wrong_rate >= settings.max_hold_wrong_rate:
            return True
        reached = wrong_rate >= settings.stop_wrong_rate and format_rate >= settings.stop_format_rate
        if not reached or not settings.stop_patience:
            return False
        if watched > self._best:
            self._best, self._steps_since = watched, 0
        else:
            self._steps_since += 1
        return self._steps_since >= settings.stop_patience


def measure_generator(
    ctx: Context, settings: ReverseRlSettings, model: str, problems: Problems, name: str
) -> dict[str, float]:
    """The generator's rates and scores on `measured_samples` completions of `problems`, taken in turn."""
    fitting, _ = ctx.prompts.fitting(problems.problems)
    in_turn: list[Problem] = [fitting[i % len(fitting)] for i in range(settings.measured_samples)]
    unfinished = unfinished_rollouts(ctx, name)
    sampling = Sampling(settings.measured_temperature, 1.0, settings.max_new_tokens)
    draws = Draws("generator", 1, sampling, settings.rules.max_masked_fraction, settings.rules)
    rollouts = roll_out(ctx, draws, in_turn, unfinished, model=model)
    terms = scored_terms(settings.rules)
    figures = degeneration(rollouts, terms) | checked_figures(rollouts, problems.checker)
    unfinished.drop(list(unfinished.rows))  # only their figures are kept
    return {**figures, "num_completions": float(len(rollouts))}


def scored_terms(rules: RewardConfig) -> list[str]:
    """Those that tell wrong completions apart: a verdict is the same of all."""
    return [name for name, term in rules.terms.items() if term.kind is not TermKind.verdict]


def checked_figures(rollouts: Sequence[Rollout], checker: Checker | None) -> dict[str, float]:
    """What only a checker knows of the wrong well-formed completions: the share with a single error, and the
    mean of the rubric in [0, 1] that they deserve."""
    if checker is None:
        return {}
    wrong = by_verdict(rollouts, Verdict.WRONG)
    single = [checker.check(r.problem, r.completion.text).single_error for r in wrong]
    rubrics = [rubric_score(checker.rubric(r.problem, r.completion.text)) for r in wrong]
    return {
        "single_error_share": sum(single) / len(single) if single else float("nan"),
        "checker_rubric_mean": sum(rubrics) / len(rubrics) if rubrics else float("nan"),
    }
