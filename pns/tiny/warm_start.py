"""Supervised start on the tiny world: a backbone that solves problems, or the judge that grades solutions by
the checker's rubric."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from pns.algo.judging import Template, make_nonce, render_tiny, rubric_score
from pns.config import WarmStart
from pns.files import read_jsonl, write_json, write_jsonl
from pns.records import Problem, from_json
from pns.stages.context import Context, draw
from pns.stages.scoring import sample, stable_seed
from pns.tiny import world as tiny_world
from pns.tiny.tokenizer import build_tokenizer
from workers.training.batching import Batch
from workers.training.policy import Sft

# The most solution steps of a problem until that share of `curriculum_steps`.
CURRICULUM = {"solve": ((0.4, 2), (1.0, 3)), "judge": ((0.2, 1), (0.5, 2), (1.0, 3))}
Row = tuple[tuple[int, ...], tuple[int, ...]]  # ids without loss, ids with loss
Rows = Callable[[int], list[Row]]  # training step -> its rows

NUM_GRADED = {
    "train": 3000,
    "reward": 500,
}  # problems whose sampled solutions the judge is trained and measured on
CORRUPTED_SHARE, SAMPLED_SHARE = 0.35, 0.35  # of the judge's training rows; the rest are right solutions


def run(ctx: Context) -> None:
    """Writes `warm_start/model`; does nothing when `warm_start.steps` is 0."""
    settings, policy, directory = ctx.config.warm_start, ctx.fleet.policy, ctx.run.stage_dir("warm_start")
    if not settings.steps:
        return
    if settings.task == "solve":
        rows = solution_rows(ctx, settings)
        initial = str(directory / "initial")
        save_untrained(settings, ctx.config.seed, initial)
    else:
        rows = graded_rows(ctx, settings)
        initial = settings.samples_from
    policy.load(initial, "language_model", settings.optimizer, settings.steps, ctx.config.seed)
    first_step = 0
    if checkpoint := ctx.run.latest_checkpoint("warm_start"):
        policy.restore(checkpoint.path)
        first_step = checkpoint.step
    ctx.track.begin("warm_start", settings.steps, first_step)
    for step in range(first_step, settings.steps):
        batch = rows(step)
        ctx.track.log(
            step,
            policy.train_step(Batch([prompt for prompt, _ in batch], [answer for _, answer in batch]), Sft()),
        )
        if (step + 1) % 500 == 0 and step + 1 < settings.steps:
            with ctx.run.checkpoint("warm_start", step + 1) as checkpoint_dir:
                policy.save(checkpoint_dir)
    ctx.track.end()
    policy.export(directory / "model")
    if settings.task == "judge":
        write_json(directory / "quality.json", judge_quality(ctx, settings))


def solution_rows(ctx: Context, settings: WarmStart) -> Rows:
    """step -> (prompt ids, solution ids) of fresh training problems."""

    def rows(step: int) -> list[Row]:
        problems = fresh_problems(ctx, settings, step)
        return [(ctx.prompts.encode(p), ctx.prompts.encode_completion(str(p.solution))) for p in problems]

    return rows


def fresh_problems(ctx: Context, settings: WarmStart, step: int) -> list[Problem]:
    """Training problems of one step. During the curriculum short ones alone: looking a quantity up is learned
    first."""
    phases = CURRICULUM[settings.task]
    max_steps = next(
        (steps for share, steps in phases if step < share * settings.curriculum_steps), tiny_world.MAX_STEPS
    )
    return tiny_world.problems(
        "train", None, settings.batch_size, stable_seed(ctx.config.seed, "warm_start", step), max_steps
    )


def graded_rows(ctx: Context, settings: WarmStart) -> Rows:
    """step -> (judge's prompt, verdict) of right solutions, made-up errors and, after the curriculum, a
    model's samples."""
    sampled = sampled_solutions(ctx, settings, "train")

    def rows(step: int) -> list[Row]:
        rng = random.Random(stable_seed(ctx.config.seed, "judge", step))
        own = (
            draw(sampled, settings.batch_size, step, ctx.config.seed)
            if step >= settings.curriculum_steps
            else []
        )
        return [
            verdict_row(ctx, problem, text)
            for problem, text in graded(fresh_problems(ctx, settings, step), own, rng)
        ]

    return rows


def verdict_row(ctx: Context, problem: Problem, text: str) -> Row:
    """The judge's prompt, and the checker's rubric as four digits."""
    prompt = render_tiny(
        problem.prompt, text, make_nonce(ctx.config.seed, problem.prompt, text, Template.TINY)
    )
    verdict = "".join(map(str, tiny_world.rubric(problem, text)))
    encode = ctx.prompts.tokenizer.encode
    return tuple(encode(prompt, add_special_tokens=False)), tuple(encode(verdict, add_special_tokens=False))


def graded(
    fresh: list[Problem], sampled: list[tuple[Problem, str]], rng: random.Random
) -> list[tuple[Problem, str]]:
    """As many (problem, candidate) rows as `fresh` problems: right solutions, solutions with a made-up error,
    and `sampled` ones if any."""
    rows = []
    for index, problem in enumerate(fresh):
        kind = rng.random()
        if kind < SAMPLED_SHARE and sampled:
            rows.append(sampled[index])
        elif kind < SAMPLED_SHARE + CORRUPTED_SHARE:
            rows.append((problem, tiny_world.corrupt(problem, rng, rng.choice(tiny_world.ERROR_KINDS))))
        else:
            rows.append((problem, tiny_world.random_solution(problem, rng)))
    return rows


def judge_quality(ctx: Context, settings: WarmStart) -> dict[str, float]:
    """How well the trained judge agrees with the checker on fresh candidates of the three kinds: share of
    identical verdicts, mean absolute difference of the score in [0, 1], and the mean score it gives to
    candidates that the rubric gives 1 and 0."""
    sampled = sampled_solutions(ctx, settings, "reward")
    problems = [problem for problem, _ in sampled]
    candidates = graded(problems, sampled, random.Random(ctx.config.seed))
    ctx.fleet.judge.load(str(ctx.run.stage_dir("warm_start") / "model"))
    outcomes = ctx.fleet.judge.score(
        [(problem.prompt, text) for problem, text in candidates], ctx.config.reward.deadline_seconds
    )
    labels = [tiny_world.rubric(problem, text) for problem, text in candidates]
    rows = [
        (rubric_score(o.value), rubric_score(label), o.value == label)
        for o, label in zip(outcomes, labels, strict=True)
        if o.value
    ]
    full, none = [q for q, label, _ in rows if label == 1], [q for q, label, _ in rows if label == 0]
    return {
        "candidates": float(len(rows)),
        "same_verdict": float(np.mean([same for _, _, same in rows])),
        "absolute_difference": float(np.mean([abs(q - label) for q, label, _ in rows])),
        "mean_of_full_marks": float(np.mean(full)),
        "mean_of_no_marks": float(np.mean(none)),
    }


def sampled_solutions(ctx: Context, settings: WarmStart, split: str) -> list[tuple[Problem, str]]:
    """One sample of `warm_start.samples_from` at temperature 1 for each of the split's NUM_GRADED problems,
    drawn once and kept."""
    path = ctx.run.stage_dir("warm_start") / f"samples-{split}.jsonl"
    if not path.exists():
        problems = tiny_world.problems(split, None, NUM_GRADED[split], ctx.config.seed)
        ctx.fleet.rollout.load(settings.samples_from)
        rows: list[dict[str, Any]] = []
        for chunk in sample(ctx, problems, 1, 1.0, ("graded", split)):
            rows += [{"problem": problem, "text": completion.text} for _, problem, completion in chunk]
        write_jsonl(path, rows)
    return [(from_json(Problem, row["problem"]), row["text"]) for row in read_jsonl(path)]


def save_untrained(settings: WarmStart, seed: int, directory: str) -> None:
    """An untrained model of the configured shape with the tiny tokenizer, saved as a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    tokenizer = build_tokenizer()
    classes = {"qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}
    config = classes[settings.architecture](
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
