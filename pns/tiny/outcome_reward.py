"""The tiny world's reward model (`pns tiny make OUT task=outcome_reward`): at the end token, the score of
whether a solution is well-formed and its answer right. It is made as `pns.tiny.deepened` says, from the
checker's word: at every token, whether the solution is still right."""

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from pns.files import write_json
from pns.records import Problem
from pns.run.stage import Stage
from pns.stages.context import Context
from pns.tiny import world
from pns.tiny.deepened import (
    UNKNOWN,
    Grader,
    Rows,
    deepened,
    fit_comparison,
    fitted_candidates,
    padded,
    train,
)
from pns.tiny.process_reward import step_quality
from pns.tiny.settings import WarmStart
from pns.tiny.warm_start import Candidate, WarmStarted, mixed_candidates, sampled_solutions

WEIGHT_OF_END = 5.0  # of the end token in the loss; every other has 1


def outcome_reward_stage(settings: WarmStart) -> Stage[WarmStarted]:
    """The stage with these settings, which are no part of a run's configuration."""
    return Stage("warm_start", outcome_reward, WarmStarted, lambda config: settings, lambda own: ("rollout",))


def outcome_reward(ctx: Context, settings: WarmStart) -> WarmStarted:
    """Make the model in this process, on one thread, and measure it; after an interruption from the start."""
    from transformers import AutoTokenizer

    made = WarmStarted(ctx.directory)
    sampled = sampled_solutions(ctx, settings, made, "train")
    torch.set_num_threads(1)
    torch.manual_seed(ctx.seed)
    solver = settings.starts_from or settings.samples_from
    grader, rows_of = deepened(solver, settings.layers), partial(outcome_rows, ctx)
    ctx.track.begin("warm_start", settings.steps, 0)
    fit_comparison(grader, fitted_candidates(ctx, sampled), rows_of)
    train(ctx, settings, grader, sampled, rows_of)
    ctx.track.end()
    grader.model.save_pretrained(made.model)
    AutoTokenizer.from_pretrained(solver).save_pretrained(made.model)
    write_json(made.quality_file, quality(ctx, grader, sampled_solutions(ctx, settings, made, "reward")))
    return made


def outcome_rows(ctx: Context, candidates: Sequence[Candidate]) -> Rows:
    """Prompts and solutions with their end tokens, and the `token_labels` of the latter."""
    token_ids, of_solution, labels, weights = [], [], [], []
    for problem, text in candidates:
        prompt, solution = ctx.prompts.encode(problem), ctx.prompts.encode_completion(text)
        token_ids.append([*prompt, *solution])
        of_solution.append([False] * len(prompt) + [True] * len(solution))
        labels.append([UNKNOWN] * len(prompt) + token_labels(ctx, problem, text))
        weights.append([1.0] * (len(prompt) + len(solution) - 1) + [WEIGHT_OF_END])
    return Rows(
        padded(token_ids, 0), padded(of_solution, False), padded(labels, UNKNOWN), padded(weights, 0.0)
    )


def token_labels(ctx: Context, problem: Problem, text: str) -> list[float]:
    """Of every token of a solution: 1 before its first wrong step, 0 from that one's last token on, UNKNOWN
    between, as the step may be right so far; of the end token, 1 for a well-formed solution with the right
    answer."""
    found = world.check(problem, text)
    is_right = float(found.format_ok and found.answer_correct)
    starts = ctx.prompts.token_starts(text)
    if found.first_wrong_step is None:
        return [1.0] * len(starts) + [is_right]
    before = found.steps[: found.first_wrong_step]
    wrong_start = before[-1].end if before else 0
    labels = [1.0 if start < wrong_start else UNKNOWN for start in starts]
    num_begun = sum(start < (found.first_wrong_end or 0) for start in starts)
    last_wrong = max(num_begun - 1, 0)
    labels[last_wrong:] = [0.0] * len(labels[last_wrong:])
    return [*labels, is_right]


def quality(ctx: Context, grader: Grader, sampled: list[Candidate]) -> dict[str, dict[str, float]]:
    """`step_quality` of whole solutions: of fresh candidates of the three kinds, and of `sampled` alone."""
    fresh = mixed_candidates([problem for problem, _ in sampled], sampled, random.Random(ctx.seed))
    return {"candidates": measured(ctx, grader, fresh), "sampled": measured(ctx, grader, sampled)}


@torch.no_grad()
def measured(ctx: Context, grader: Grader, candidates: Sequence[Candidate]) -> dict[str, float]:
    probabilities, labels = [], []
    for candidate in candidates:
        rows = outcome_rows(ctx, [candidate])
        probabilities.append(grader.scores(rows.token_ids_BT)[0, -1].sigmoid().item())
        labels.append(rows.labels_BT[0, -1].item())
    return step_quality(np.array(probabilities), np.array(labels))
