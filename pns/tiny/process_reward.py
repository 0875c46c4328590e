"""The tiny world's process reward model (`pns tiny make OUT task=process_reward`): the probability that a
step of a solution is correct, learned from the checker's word on every step."""

import random
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pns.algo.metrics import auroc
from pns.errors import UserError
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

# The prompt, the solution up to the end of a step, and whether this step is right.
Row = tuple[tuple[int, ...], tuple[int, ...], bool]

_OPERATORS = "+-*/"
# Of a solution's text; the "/" of "</think>" is none.
_CHANGEABLE = re.compile(rf"\d+|{'|'.join(world.NAMES)}|[{re.escape(_OPERATORS)}](?=\d)")
_SENTENCES = re.compile(r".*?\. |.+", re.DOTALL)


def process_reward_stage(settings: WarmStart) -> Stage[WarmStarted]:
    """The stage with these settings, which are no part of a run's configuration."""
    roles = ("rollout", "policy")
    return Stage("warm_start", process_reward, WarmStarted, lambda config: settings, lambda settings: roles)


def process_reward(ctx: Context, settings: WarmStart) -> WarmStarted:
    """Train the model, from the last checkpoint where there is one, and measure it."""
    made, policy = WarmStarted(ctx.directory), ctx.fleet.policy
    sampled = sampled_solutions(ctx, settings, made, "train")
    save_deepened(settings.starts_from or settings.samples_from, settings.layers, ctx.seed, made.untrained)
    policy.load(made.untrained, "score", settings.optimizer, settings.steps, ctx.seed)
    first_step = ctx.resume()
    ctx.track.begin("warm_start", settings.steps, first_step)
    for step in range(first_step, settings.steps):
        batch = make_batch(ctx, settings, sampled, step)
        ctx.track.log(step, policy.train_step(batch, StepLabelObjective()))
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()
    policy.export(made.model)
    write_json(made.quality_file, quality(ctx, sampled_solutions(ctx, settings, made, "reward")))
    return made


def make_batch(ctx: Context, settings: WarmStart, sampled: list[Candidate], step: int) -> Batch:
    """Of one half of the problems right solutions, made-up errors and, after the curriculum, `sampled` ones;
    of the other half two rows each that one word tells apart, from which looking up is learned fastest."""
    problems = fresh_problems(ctx, settings, step)
    num_mixed = settings.batch_size // 2
    own = draw(sampled, num_mixed, step, ctx.seed) if step >= settings.curriculum_steps else []
    rng = random.Random(stable_seed(ctx.seed, "process_reward", step))
    rows = step_rows(ctx, mixed_candidates(problems[:num_mixed], own, rng))
    for problem in problems[num_mixed:]:
        pair = [(problem, text) for text in one_change(problem, rng)]
        rows += [step_rows(ctx, [candidate])[-1] for candidate in pair]  # what comes before is the same
    return as_batch(rows)


def one_change(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """A right solution, and the same with another number, name or operator at one place, which mostly makes
    it wrong; both end with the step (or box) of that place."""
    right = world.random_solution(problem, rng)
    place = rng.choice(list(_CHANGEABLE.finditer(right)))
    word = place.group()
    if word in world.NAMES:
        others = [name for name in world.NAMES if name in problem.prompt]
    elif word in _OPERATORS:
        others = list(_OPERATORS)
    else:
        others = re.findall(r"\d+", problem.prompt + right)
        others += [str(abs(int(word) + difference)) for difference in (-10, -3, -2, -1, 1, 2, 3, 10)]
    other = rng.choice(sorted(set(others) - {word}))
    wrong = right[: place.start()] + other + right[place.end() :]
    return _to_end_of_sentence(right, place.start()), _to_end_of_sentence(wrong, place.start())


def _to_end_of_sentence(text: str, position: int) -> str:
    before, full_stop, _ = text[position:].partition(". ")
    return text[:position] + before + full_stop


def step_rows(ctx: Context, candidates: Sequence[Candidate]) -> list[Row]:
    """One for every step of every candidate. Neighbouring rows begin alike."""
    rows: list[Row] = []
    for problem, text in candidates:
        prompt, prefix = ctx.prompts.encode(problem), ()
        for sentence, is_right in labelled_steps(problem, text):
            token_ids = ctx.prompts.tokenizer.encode(sentence, add_special_tokens=False)
            prefix = (*prefix, *token_ids)
            if token_ids:  # of half a word the tokenizer reads nothing
                rows.append((prompt, prefix, is_right))
    return rows


def as_batch(rows: Sequence[Row]) -> Batch:
    """With the `label` 1 where the step is right, else 0."""
    prompts, prefixes, labels = zip(*rows, strict=True)
    return Batch(prompts, prefixes, row_values={"label": [float(is_right) for is_right in labels]})


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
    batch = as_batch(step_rows(ctx, candidates))
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


def save_deepened(model: str, layers: int, seed: int, directory: str) -> None:
    """The model with further blocks on top, `layers` in all, that change nothing as they are: what the model
    expects of the next token is known in its last block only, and a grader has to compare it with what came.
    Raises UserError where it has more blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shallow = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    num_known = shallow.config.num_hidden_layers
    if layers < num_known:
        raise UserError(f"layers: {layers}; {model} has {num_known}: give as many or more")
    shape = AutoConfig.from_pretrained(model, num_hidden_layers=layers, layer_types=None)
    torch.manual_seed(seed)
    deep = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    deep.load_state_dict(shallow.state_dict(), strict=False)
    for block in deep.base_model.layers[num_known:]:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    deep.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
