"""Supervised training on the tiny world (`pns tiny make`): a backbone that solves problems, the judge that
grades solutions by the checker's rubric, or the one that labels their steps."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pns.algo.judging import Scores, Template, make_nonce, render_tiny, rubric_score
from pns.files import read_jsonl, write_json, write_jsonl
from pns.records import Problem, from_json
from pns.run.stage import OutputFile, Stage
from pns.stages.artefacts import TrainedModel
from pns.stages.context import Context, draw
from pns.stages.stream import stable_seed
from pns.tiny import world
from pns.tiny.settings import TinyTask, WarmStart
from pns.tiny.step_judge import solution_steps, step_agreement, step_candidates, step_labels, step_row
from pns.tiny.tokenizer import build_tokenizer
from workers.rollout.engine import Request, Sampling
from workers.training.batching import Batch
from workers.training.objectives import SftObjective

# The most solution steps of a problem until that share of `curriculum_steps`.
CURRICULUM = {
    TinyTask.solve: ((0.4, 2), (1.0, 3)),
    TinyTask.judge: ((0.2, 1), (0.5, 2), (1.0, 3)),
    TinyTask.process_reward: ((0.2, 1), (0.5, 2), (1.0, 3)),
    TinyTask.outcome_reward: ((0.5, 2), (1.0, 3)),
    TinyTask.step_judge: ((0.5, 1), (0.75, 2), (1.0, 3)),
}
# Problems whose sampled solutions the judge is trained ("train") and measured ("reward") on.
NUM_GRADED = {"train": 3000, "reward": 500}
CORRUPTED_SHARE, SAMPLED_SHARE = 0.35, 0.35  # of the judge's training rows; the rest are right solutions
MAX_NEW_TOKENS = 96  # of a sampled solution
# The reward term of the default configuration whose service grades: what is measured is what a run will use.
GRADER = "coherence"
ROLES = {
    TinyTask.solve: ("policy",),
    TinyTask.judge: ("rollout", "policy", GRADER),
    TinyTask.step_judge: ("rollout", "policy"),
}

Candidate = tuple[Problem, str]  # a problem and the text of a solution


class WarmStarted(TrainedModel):
    """A model of the tiny world, what it was made from, and how well a judge agrees with the checker."""

    quality_file = OutputFile("quality.json")

    @property
    def untrained(self) -> str:
        return str(self.directory / "untrained")

    def samples_file(self, split: str) -> Path:
        return self.directory / f"samples-{split}.jsonl"


def warm_start_stage(settings: WarmStart) -> Stage[WarmStarted]:
    """The stage with these settings, which are no part of a run's configuration."""
    roles = ROLES[settings.task]
    return Stage("warm_start", warm_start, WarmStarted, lambda config: settings, lambda settings: roles)


def warm_start(ctx: Context, settings: WarmStart) -> WarmStarted:
    """Train the model, from the last checkpoint where there is one; a judge is measured at the end."""
    made, policy = WarmStarted(ctx.directory), ctx.fleet.policy
    solves = settings.task is TinyTask.solve
    initial = settings.starts_from or (made.untrained if solves else settings.samples_from)
    sampled = [] if solves else sampled_solutions(ctx, settings, made, "train")
    if initial == made.untrained:
        save_untrained(settings, ctx.seed, initial)
    policy.load(initial, "language_model", settings.optimizer, settings.steps, ctx.seed)
    first_step = ctx.resume()
    ctx.track.begin("warm_start", settings.steps, first_step)
    for step in ctx.steps(first_step, settings.steps):
        batch = make_batch(ctx, settings, sampled, step)
        ctx.track.log(step, policy.train_step(batch, SftObjective()))
        ctx.save_policy(step + 1, settings.checkpoint_every, settings.steps)
    ctx.track.end()
    policy.export(made.model)
    if not solves:
        measure = judge_quality if settings.task is TinyTask.judge else step_judge_quality
        write_json(made.quality_file, measure(ctx, settings, made))
    return made


def make_batch(ctx: Context, settings: WarmStart, sampled: list[Candidate], step: int) -> Batch:
    """Fresh problems with their solutions; or candidates with the checker's verdicts, after the curriculum
    `sampled` ones among them."""
    problems = fresh_problems(ctx, settings, step)
    if settings.task is TinyTask.solve:
        texts = demonstrations(ctx, settings, problems, step)
        solutions = [ctx.prompts.encode_completion(text) for text in texts]
        return Batch([ctx.prompts.encode(problem) for problem in problems], solutions)
    own = draw(sampled, settings.batch_size, step, ctx.seed) if step >= settings.curriculum_steps else []
    rng = random.Random(stable_seed(ctx.seed, settings.task.value, step))
    if settings.task is TinyTask.step_judge:
        encode_text = partial(ctx.prompts.tokenizer.encode, add_special_tokens=False)
        candidates = step_candidates(problems, own, rng)
        rows = [step_row(problem, text, ctx.seed, encode_text) for problem, text in candidates]
        prompts, labels, masks = map(list, zip(*rows, strict=True))
        return Batch(prompts, labels, {"mask": masks})
    asked, verdicts, encode = [], [], ctx.prompts.tokenizer.encode
    for problem, text in mixed_candidates(problems, own, rng):
        nonce = make_nonce(ctx.seed, problem.prompt, text, Template.TINY)
        asked.append(encode(render_tiny(problem.prompt, text, nonce), add_special_tokens=False))
        verdict = "".join(map(str, world.rubric(problem, text)))
        verdicts.append(encode(verdict, add_special_tokens=False))
    return Batch(asked, verdicts)


def demonstrations(ctx: Context, settings: WarmStart, problems: list[Problem], step: int) -> list[str]:
    """A solution of each problem, right ones or of mixed quality."""
    shares = settings.misconceptions, settings.slips, settings.misreadings
    if not any(shares):
        return [str(problem.solution) for problem in problems]
    rng = random.Random(stable_seed(ctx.seed, "demonstrations", step))
    return [world.mixed_solution(problem, rng, *shares) for problem in problems]


def fresh_problems(ctx: Context, settings: WarmStart, step: int) -> list[Problem]:
    """Training problems of one step; in the curriculum short ones alone, as looking up is learned first."""
    phases = CURRICULUM[settings.task]
    lasting = [longest for share, longest in phases if step < share * settings.curriculum_steps]
    max_steps = lasting[0] if lasting else world.MAX_STEPS
    seed = stable_seed(ctx.seed, "warm_start", step)
    return world.problems("train", None, settings.batch_size, seed, max_steps)


def mixed_candidates(fresh: list[Problem], sampled: list[Candidate], rng: random.Random) -> list[Candidate]:
    """One for each of the `fresh` problems: a right solution, one with a made-up error, or, where there are
    any, one that was `sampled` (of a problem of its own)."""
    candidates = []
    for index, problem in enumerate(fresh):
        kind = rng.random()
        if kind < SAMPLED_SHARE and sampled:
            candidates.append(sampled[index])
        elif kind < SAMPLED_SHARE + CORRUPTED_SHARE:
            candidates.append((problem, world.corrupt(problem, rng, rng.choice(world.ERROR_KINDS))))
        else:
            candidates.append((problem, world.random_solution(problem, rng)))
    return candidates


def judge_quality(ctx: Context, settings: WarmStart, made: WarmStarted) -> dict[str, float]:
    """`agreement` of the trained judge with the checker on fresh candidates of the three kinds."""
    sampled = sampled_solutions(ctx, settings, made, "reward")
    candidates = mixed_candidates([problem for problem, _ in sampled], sampled, random.Random(ctx.seed))
    judge = ctx.fleet.scorer(GRADER)
    judge.load(made.model)
    outcomes = judge.score([(problem.prompt, text) for problem, text in candidates])
    rubrics = [world.rubric(problem, text) for problem, text in candidates]
    pairs = zip(outcomes, rubrics, strict=True)
    return agreement([(outcome.value.scores, rubric) for outcome, rubric in pairs if outcome.value])


def step_judge_quality(ctx: Context, settings: WarmStart, made: WarmStarted) -> dict[str, float]:
    """`step_agreement` of the trained step judge with the checker on fresh candidates as it was trained on,
    and, named "sampled_wrong_...", on the sampled ones with a wrong answer alone."""
    from workers.rewards.step_judge import StepJudge
    from workers.runtime import Runtime

    sampled = sampled_solutions(ctx, settings, made, "reward")
    judge = StepJudge(made.model, Runtime(), ctx.seed)

    def measured(candidates: list[Candidate]) -> dict[str, float]:
        items = [(problem.prompt, solution_steps(text)) for problem, text in candidates]
        exact = [step_labels(problem, solution_steps(text)) for problem, text in candidates]
        outcomes = zip(judge.score(items), exact, strict=True)
        return step_agreement([(outcome.value, labels) for outcome, labels in outcomes if outcome.value])

    fresh = [problem for problem, _ in sampled]
    wrong = [(problem, text) for problem, text in sampled if not world.check(problem, text).answer_correct]
    mixed = measured(step_candidates(fresh, sampled, random.Random(ctx.seed)))
    return mixed | {f"sampled_wrong_{name}": value for name, value in measured(wrong).items()}


def agreement(verdicts: Sequence[tuple[Scores, Scores]]) -> dict[str, float]:
    """Of (judge's, checker's) grades: the share of identical verdicts, the mean absolute difference of scores
    in [0, 1], and the judge's mean score of candidates that the rubric gives 1 and 0 (NaN where none is)."""
    judge_B = np.array([rubric_score(own) for own, _ in verdicts])
    checker_B = np.array([rubric_score(rubric) for _, rubric in verdicts])
    return {
        "candidates": float(len(verdicts)),
        "same_verdict": float(np.mean([own == rubric for own, rubric in verdicts])),
        "absolute_difference": float(np.mean(np.abs(judge_B - checker_B))),
        "mean_of_full_marks": float(np.mean(judge_B[checker_B == 1])),
        "mean_of_no_marks": float(np.mean(judge_B[checker_B == 0])),
    }


def sampled_solutions(ctx: Context, settings: WarmStart, made: WarmStarted, split: str) -> list[Candidate]:
    """One sample of `samples_from` at temperature 1 for each of the split's NUM_GRADED problems, drawn once;
    in the order in which the one rollout process finished them, which is always the same."""
    file = made.samples_file(split)
    if not file.exists():
        problems = world.problems(split, None, NUM_GRADED[split], ctx.seed)
        requests = []
        for p, problem in enumerate(problems):
            seed = stable_seed(ctx.seed, "graded", split, problem.id, p, 0)
            requests.append(Request(str(p), ctx.prompts.encode(problem), seed))
        ctx.fleet.rollout.load(settings.samples_from)
        rows = []
        for samples in ctx.fleet.rollout.stream(requests, Sampling(1.0, 1.0, MAX_NEW_TOKENS)):
            texts = {int(sample.id): ctx.prompts.decode(sample.token_ids) for sample in samples}
            rows += [{"problem": problems[p], "text": text} for p, text in texts.items()]
        write_jsonl(file, rows)
    return [(from_json(Problem, row["problem"]), row["text"]) for row in read_jsonl(file)]


def save_untrained(settings: WarmStart, seed: int, directory: str) -> None:
    """A Hugging Face directory with an untrained model of the configured shape and the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        settings.architecture.value,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.hidden_size // settings.heads,
        intermediate_size=settings.feed_forward_size,
        max_position_embeddings=512,
        initializer_range=settings.init_std,
        tie_word_embeddings=settings.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
