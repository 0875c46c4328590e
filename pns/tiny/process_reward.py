"""The tiny world's process reward model (`pns tiny make OUT task=process_reward`): the probability that a
step of a solution is correct, learned from the checker's word on every step."""

import random
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pns.algo.metrics import auroc
from pns.files import write_json
from pns.records import Problem
from pns.run.stage import Stage
from pns.stages.context import Context, draw
from pns.stages.stream import stable_seed
from pns.tiny import world
from pns.tiny.settings import WarmStart
from pns.tiny.warm_start import Candidate, WarmStarted, fresh_problems, mixed_candidates, sampled_solutions
from workers.training.batching import Batch
from workers.training.objectives import StepLabelObjective

THRESHOLD = 0.5  # a step is taken for correct at this probability or above

_SENTENCES = re.compile(r".*?\. |.+", re.DOTALL)


def process_reward_stage(settings: WarmStart) -> Stage[WarmStarted]:
    """The stage with these settings, which are no part of a run's configuration."""
    roles = ("rollout", "policy")
    return Stage("warm_start", process_reward, WarmStarted, lambda config: settings, lambda settings: roles)


def process_reward(ctx: Context, settings: WarmStart) -> WarmStarted:
    """Train the model, from the last checkpoint where there is one, and measure it."""
    made, policy = WarmStarted(ctx.directory), ctx.fleet.policy
    sampled = sampled_solutions(ctx, settings, made, "train")
    initial = settings.starts_from or settings.samples_from
    policy.load(initial, "score", settings.optimizer, settings.steps, ctx.seed)
    first_step = ctx.resume()
    ctx.track.begin("warm_start", settings.steps, first_step)
    for step in ctx.steps(first_step, settings.steps):
        batch = step_batch(ctx, training_candidates(ctx, settings, sampled, step))
        ctx.track.log(step, policy.train_step(batch, StepLabelObjective()))
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()
    policy.export(made.model)
    write_json(made.quality_file, quality(ctx, sampled_solutions(ctx, settings, made, "reward")))
    return made


def training_candidates(
    ctx: Context, settings: WarmStart, sampled: list[Candidate], step: int
) -> list[Candidate]:
    """Right solutions, made-up errors and, after the curriculum, `sampled` ones."""
    own = draw(sampled, settings.batch_size, step, ctx.seed) if step >= settings.curriculum_steps else []
    rng = random.Random(stable_seed(ctx.seed, "process_reward", step))
    return mixed_candidates(fresh_problems(ctx, settings, step), own, rng)


def step_batch(ctx: Context, candidates: Sequence[Candidate]) -> Batch:
    """A row for every step of every candidate: the prompt and the solution up to the end of the step, with
    `label` 1 where the step is right. Neighbouring rows begin alike."""
    prompts, prefixes, labels = [], [], []
    for problem, text in candidates:
        prompt, prefix = ctx.prompts.encode(problem), []
        for sentence, is_right in labelled_steps(problem, text):
            token_ids = ctx.prompts.tokenizer.encode(sentence, add_special_tokens=False)
            prefix += token_ids
            if token_ids:  # of half a word the tokenizer reads nothing
                prompts.append(prompt)
                prefixes.append(tuple(prefix))
                labels.append(float(is_right))
    return Batch(prompts, prefixes, row_values={"label": labels})


def labelled_steps(problem: Problem, text: str) -> list[tuple[str, bool]]:
    """The steps of a solution, which joined are its text, each with whether it is right: free of errors of
    its own and not carrying on one before it. The box is the last step; what the checker cannot read as a
    step ends with a sentence and is wrong."""
    found = world.check(problem, text)
    steps, position = [], 0
    for step in found.steps:
        steps.append((text[position : step.end], not step.kinds and not step.carried))
        position = step.end
    rest = text[position:]
    if not found.format_ok:
        return steps + [(sentence, False) for sentence in _SENTENCES.findall(rest)]
    errors_in_steps = sum(len(step.kinds) for step in found.steps)
    return [*steps, (rest, found.answer_correct and len(found.kinds) == errors_in_steps)]


def quality(ctx: Context, sampled: list[Candidate]) -> dict[str, dict[str, float]]:
    """`step_quality` on fresh candidates of the three kinds, and on the wrong ones of `sampled` alone."""
    fresh = mixed_candidates([problem for problem, _ in sampled], sampled, random.Random(ctx.seed))
    wrong = [(p, text) for p, text in sampled if not world.check(p, text).answer_correct]
    return {"candidates": measured(ctx, fresh), "sampled_wrong": measured(ctx, wrong)}


def measured(ctx: Context, candidates: Sequence[Candidate]) -> dict[str, float]:
    """`step_quality` of the loaded model."""
    batch = step_batch(ctx, candidates)
    probabilities_B = 1 / (1 + np.exp(-np.array(ctx.fleet.policy.scores(batch))))
    return step_quality(probabilities_B, batch.row_values["label"])


def step_quality(probabilities_B: ArrayLike, labels_B: ArrayLike) -> dict[str, float]:
    """How well probabilities in [0, 1] that steps are correct agree with the checker's labels (1 correct, 0
    wrong), at the threshold: `accuracy`, its mean over both labels (`balanced_accuracy`), `precision` and
    `recall` of the steps called correct, Cohen's `kappa` and, of the probabilities, the `auroc`; shares of
    nothing are NaN."""
    probability_B, correct_B = np.asarray(probabilities_B), np.asarray(labels_B) > 0.5
    called_B = probability_B >= THRESHOLD
    accuracy = _share(called_B == correct_B)
    both, neither = correct_B.mean() * called_B.mean(), (~correct_B).mean() * (~called_B).mean()
    chance = float(both + neither)
    recall, wrong_found = _share(called_B[correct_B]), _share(~called_B[~correct_B])
    return {
        "steps": float(len(correct_B)),
        "correct_share": _share(correct_B),
        "accuracy": accuracy,
        "balanced_accuracy": (recall + wrong_found) / 2,
        "precision": _share(correct_B[called_B]),
        "recall": recall,
        "kappa": (accuracy - chance) / (1 - chance) if chance < 1 else float("nan"),
        "auroc": auroc(probability_B[correct_B], probability_B[~correct_B]),
    }


def _share(values_B: NDArray[np.bool_]) -> float:
    return float(np.mean(values_B)) if len(values_B) else float("nan")
