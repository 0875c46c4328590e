"""Negatives that no generator was trained for: what plausible ones are compared with.

`rs` are the target's own wrong completions (`pns.stages.negatives.rejection_sample`), of which `hardest`
keeps those that the reward model likes best; `corrupted` changes right ones; `prompted` asks the backbone for
wrong ones; `given` reads them from a file.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pns.algo.formatting import check_format
from pns.algo.negatives import filter_negatives
from pns.answers.compare import same_answer
from pns.answers.extract import boxed_span
from pns.config import Config
from pns.errors import UserError
from pns.files import json_lines
from pns.records import Completion, Problem, Reward, Rollout, Verdict
from pns.run.stage import ModelFiles, stage
from pns.stages.artefacts import Negatives, RewardModels, TrainedModel
from pns.stages.context import Context, Problems
from pns.stages.scoring import by_verdict
from pns.stages.stream import stable_seed
from pns.stages.synthesize import (
    SynthesizeSettings,
    sample_negatives,
    sampling_roles,
    synthesize_settings,
    write_negatives,
)

_INTEGER = re.compile(r"(?<![\d.,])\d+(?![\d.,]*\d)")
_MOST = 9  # a changed number is off by at most this


@dataclass(frozen=True)
class HardestSettings:
    scored_by: str  # the reward term whose service scores


@stage(Negatives, lambda config: HardestSettings(config.pair.scored_by), lambda s: (s.scored_by,))
def hardest(ctx: Context, settings: HardestSettings, sampled: Negatives, rewards: RewardModels) -> Negatives:
    """Of each problem's negatives the one with the highest score of the reward model: hard negatives by
    selection, not by training. One without a score is left out."""
    ctx.track.begin("synthesize", 1, 0)
    rollouts, pool = sampled.negatives(), ctx.fleet.scorer(settings.scored_by)
    pool.load(rewards.main)
    outcomes = pool.score([ctx.prompts.encode(r.problem) + r.completion.token_ids for r in rollouts])
    best: dict[str, tuple[float, Rollout]] = {}
    for rollout, outcome in zip(rollouts, outcomes, strict=True):
        identity = rollout.problem.id
        if outcome.value is not None and (identity not in best or outcome.value > best[identity][0]):
            best[identity] = outcome.value, rollout
    kept = [rollout for _, rollout in best.values()]
    counts = {"not_hardest": len(rollouts) - len(kept)}
    return write_negatives(ctx, rollouts, kept, counts, "sample more per problem")


@stage(Negatives, synthesize_settings, sampling_roles)
def corrupted(
    ctx: Context, settings: SynthesizeSettings, target: TrainedModel, problems: Problems
) -> Negatives:
    """The target's right completions, each with a number of its reasoning and the answer changed
    (`corrupted_text`)."""
    samples = sample_negatives(ctx, settings, target.model, problems, rules=None)
    made = []
    for rollout in by_verdict(samples, Verdict.CORRECT):
        drawn = random.Random(stable_seed(ctx.seed, "corrupted", rollout.completion.id))
        text = corrupted_text(rollout.completion.text, drawn)
        if text is not None and boxes_another(text, rollout.problem.answer):
            tokens = ctx.prompts.encode_completion(text)
            completion = replace(rollout.completion, text=text, token_ids=tokens, log_probs=())
            reward = replace(rollout.reward, value=0.0, verdict=Verdict.WRONG)
            made.append(replace(rollout, completion=completion, reward=reward))
    kept, counts = filter_negatives(made, drop_box_only_flips=settings.synthesize.drop_box_only_flips)
    return write_negatives(ctx, made or samples, kept, counts, "their reasoning has no number to change")


def corrupted_text(text: str, drawn: random.Random) -> str | None:
    """`text` with one whole number before the box, drawn at random, off by 1 to 9 there and wherever it comes
    again, and from there on the answer off by as much. None where there is no number, or none in the box."""
    span = boxed_span(text)
    if span is None:
        return None
    places = [match for match in _INTEGER.finditer(text) if match.end() <= span[0]]
    if not places:
        return None
    boxed = _INTEGER.search(text, span[0], span[1])
    if boxed is None:
        return None
    place = drawn.choice(places)
    offset = drawn.choice([n for n in range(-_MOST, _MOST + 1) if n and int(place[0]) + n >= 0])

    def replaced(match: re.Match[str]) -> str:
        is_changed = match.start() >= place.start() and match[0] in (place[0], boxed[0])
        return str(int(match[0]) + offset) if is_changed else match[0]

    return _INTEGER.sub(replaced, text)


def boxes_another(text: str, gold: str) -> bool:
    span = boxed_span(text)
    return span is not None and same_answer(gold, text[slice(*span)]) is False


@dataclass(frozen=True)
class PromptedSettings:
    sampling: SynthesizeSettings
    instruction: str


def prompted_settings(config: Config) -> PromptedSettings:
    return PromptedSettings(synthesize_settings(config), config.sources.instruction)


@stage(Negatives, prompted_settings, lambda settings: sampling_roles(settings.sampling))
def prompted(ctx: Context, settings: PromptedSettings, backbone: ModelFiles, problems: Problems) -> Negatives:
    """What the backbone writes when it is told to end wrong, with `sources.instruction` after the problem. It
    has to be a model that follows instructions."""
    asked = [replace(own, prompt=f"{own.prompt}\n\n{settings.instruction}") for own in problems.problems]
    sampled = sample_negatives(ctx, settings.sampling, backbone.model, Problems(asked), rules=None)
    # Pairs are of the problem as it is, without the instruction.
    rollouts = [replace(own, problem=problems.by_id[own.problem.id]) for own in sampled]
    flips = settings.sampling.synthesize.drop_box_only_flips
    kept, counts = filter_negatives(rollouts, drop_box_only_flips=flips)
    return write_negatives(ctx, rollouts, kept, counts, "the backbone has to follow instructions")


@dataclass(frozen=True)
class GivenSettings:
    file: str
    drop_box_only_flips: bool


def given_settings(config: Config) -> GivenSettings:
    return GivenSettings(config.sources.file, config.synthesize.drop_box_only_flips)


@stage(Negatives, given_settings, lambda settings: ("verifier",))
def given(ctx: Context, settings: GivenSettings, problems: Problems) -> Negatives:
    """Those of `sources.file`, verified as all others are."""
    ctx.track.begin("synthesize", 1, 0)
    texts = read_given(Path(settings.file), problems.problems)
    verifier = ctx.fleet.verifier
    results = verifier.collect(verifier.submit([(p.answer, text, p.rule) for p, text in texts]))
    rollouts = []
    for number, ((problem, text), result) in enumerate(zip(texts, results, strict=True)):
        tokens = ctx.prompts.encode_completion(text)
        completion = Completion(f"{problem.id}#{number}", problem.id, text, tokens, (), "stop")
        format_ok = check_format(text, "stop", ctx.prompts.reasoning_block).ok
        reward = Reward(0.0, format_ok, result.verdict)
        rollouts.append(Rollout(0, problem, completion, reward))
    kept, counts = filter_negatives(rollouts, drop_box_only_flips=settings.drop_box_only_flips)
    return write_negatives(ctx, rollouts, kept, counts, f"{settings.file} needs wrong solutions")


def read_given(file: Path, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
    """(problem, wrong solution) of each line, {"problem": text or id, "completion": text}; those of other
    problems are left out. Raises UserError with file and line."""
    known: Mapping[str, Problem] = {p.id: p for p in problems} | {p.prompt.strip(): p for p in problems}
    found = []
    for number, row in json_lines(file):
        problem, text = row.get("problem"), row.get("completion")
        if not isinstance(problem, str) or not isinstance(text, str) or not text.strip():
            fault = 'needs "problem" (text or id) and "completion", both texts'
            raise UserError(f"{file}, line {number}: {fault}")
        if problem.strip() in known:
            found.append((known[problem.strip()], text))
    if not found:
        raise UserError(f"{file}: none of its problems is one of the run's (data.*.preference)")
    return found
