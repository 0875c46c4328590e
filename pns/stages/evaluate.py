"""Accuracy of models on every suite: sampling, verdicts, statistics. `pns evaluate` runs the same code on a
single model.

A completion is correct when the verifier finds its final answer equal to the gold one. Cut off at the token
limit or without a final answer it is wrong, and counted under that name; so is a problem whose prompt fills
the model's context, which is not asked. A completion whose answer the verifier cannot decide is `unverified`:
no right answer, counted and listed. The number of problems never shrinks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum  # sums that do not depend on the order
from pathlib import Path
from typing import Any

from pns.algo.metrics import majority, mean_score, paired_difference, pass_at_k, score
from pns.answers.compare import same_answer
from pns.config import Config, Decoding
from pns.data import benchmarks
from pns.data.problems import Identity
from pns.data.prompts import context_tokens
from pns.errors import UserError
from pns.files import RowFile, cut_rows, read_jsonl, write_json, write_jsonl
from pns.records import AnswerRule, Problem, Score, Verdict, from_json, to_json
from pns.run.browse import write_pages
from pns.stages.context import Context
from pns.stages.models import backbone, target
from pns.stages.scoring import stable_seed
from workers.rollout.pool import Request, Sampling

_PROGRESS_SECONDS = 15.0
COUNTED = ("truncated", "no_answer", "prompt_too_long", "unverified")

Row = dict[str, Any]  # an `Answered` as JSON


@dataclass(frozen=True)
class Answered:
    """One sampled completion (text up to `data.stop`) and what became of it. `reason` says why the verdict is
    what it is: `equal`, `different`, `truncated`, `no_answer` or `prompt_too_long` (wrong), or the verifier's
    cause (unverified); `detail` is what the verifier says of the answers, in words."""

    problem: Problem
    sample: int
    seed: int
    completion: str
    num_tokens: int
    finish_reason: str
    extracted: str | None
    verdict: Verdict
    reason: str
    detail: str = ""


def run(ctx: Context) -> None:
    """The start, the RL-trained (where there is one) and the preference-trained backbone."""
    models = {
        "start": backbone(ctx),
        "rl": target(ctx),
        "preference": str(ctx.run.stage_dir("preference") / "model"),
    }
    if models["rl"] == models["start"]:
        del models["rl"]
    measure(ctx, models)


def measure(ctx: Context, models: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Score `models` (name -> path) on the suites of `ctx`; completions that an interruption left are not
    asked for again.

    Writes to `evaluate/`: `<model>.jsonl`, an `Answered` a line; `scores.json`, which is returned (suite ->
    model -> figures, with "mean"); `suites.json`, the suites' identities and decoding; `browse/`, pages to
    read completions.
    """
    directory = ctx.run.stage_dir("evaluate")
    decodings = benchmarks.decodings(ctx.config, ctx.problems.suites)
    write_json(directory / "suites.json", describe(ctx.config, ctx.problems.identities))
    ctx.track.begin("evaluate", len(models), 0)
    answered: dict[str, list[Row]] = {}
    for index, (name, model) in enumerate(models.items()):
        path, unfinished = directory / f"{name}.jsonl", directory / f"{name}.unfinished.jsonl"
        if not path.exists():
            write_jsonl(path, answer(ctx, name, model, decodings, unfinished))
            unfinished.unlink(missing_ok=True)
        answered[name] = read_jsonl(path)
        ctx.track.log(
            index,
            {
                f"{name}_accuracy": sum(row["verdict"] == "correct" for row in answered[name])
                / len(answered[name])
            },
        )
    ctx.track.end()
    scores = summarise(answered, decodings, ctx.config.seed)
    write_json(directory / "scores.json", scores)
    write_pages(directory / "browse", answered)
    ctx.run.count(
        "evaluate", **{what: sum(scores["mean"][name][what] for name in models) for what in COUNTED}
    )
    return scores


def describe(config: Config, identities: Mapping[str, Identity]) -> dict[str, dict[str, Any]]:
    """What the suites are and how they are decoded: two evaluations compare where this is the same."""
    return {
        suite: to_json(identities[suite]) | {"decoding": vars(benchmarks.decoding(config, suite))}
        for suite in identities
    }


def answer(
    ctx: Context, name: str, model: str, decodings: Mapping[str, Decoding], unfinished: Path
) -> list[Row]:
    """The rows of every sample of every problem, in order. Each is appended to `unfinished` as soon as it has
    its verdict, and one that is there already is not sampled again. The seed of a sample follows from the
    run's seed, the problem and the sample's number alone, so neither the order, the number of replicas nor an
    interruption changes it."""
    wanted = {
        (suite, problem.id, sample): problem
        for suite, problems in ctx.problems.suites.items()
        for problem in problems
        for sample in range(decodings[suite].samples_per_problem or 1)
    }
    rows = _read_unfinished(unfinished, wanted)
    missing = [key for key in wanted if key not in rows]
    if missing:
        ctx.fleet.rollout.load(model)
        longest = context_tokens(model, ctx.config.models.trust_remote_code)
    requests: dict[Sampling, list[Request]] = {}
    keys: dict[str, tuple[str, str, int]] = {}
    encoded: dict[tuple[str, str], tuple[int, ...]] = {}
    for number, key in enumerate(missing):
        seed = stable_seed(ctx.config.seed, "evaluate", key[1], key[2])
        prompt_ids = encoded.get(key[:2]) or encoded.setdefault(key[:2], ctx.prompts.encode(wanted[key]))
        if len(prompt_ids) >= longest:
            rows[key] = to_json(unasked(wanted[key], key[2], seed))
            continue
        keys[str(number)] = key
        requests.setdefault(_sampling(decodings[key[0]]), []).append(Request(str(number), prompt_ids, seed))
    stream = _Verdicts(ctx, RowFile(unfinished), rows)
    shown = time.monotonic()
    for sampling, group in requests.items():
        seeds = {request.id: request.seed for request in group}
        for chunk in ctx.fleet.rollout.stream(group, sampling):
            found = []
            for item in chunk:
                key = keys[item.id]
                text, stopped = ctx.prompts.until_stop(ctx.prompts.decode(item.token_ids))
                reason = "stop" if stopped else item.finish_reason
                found.append((key, wanted[key], seeds[item.id], text, len(item.token_ids), reason))
            stream.submit(found)
            if time.monotonic() - shown >= _PROGRESS_SECONDS:
                shown = time.monotonic()
                print(f"evaluate  {name}  {len(rows)}/{len(wanted)} completions", flush=True)
    stream.finish()
    return [rows[key] for key in wanted]


def _sampling(settings: Decoding) -> Sampling:
    assert settings.temperature is not None
    assert settings.top_p is not None
    assert settings.max_new_tokens is not None
    return Sampling(settings.temperature, settings.top_p, settings.max_new_tokens)


def _read_unfinished(
    path: Path, wanted: Mapping[tuple[str, str, int], Problem]
) -> dict[tuple[str, str, int], Row]:
    if not path.exists():
        return {}
    cut_rows(path)
    rows = {(row["problem"]["suite"], row["problem"]["id"], row["sample"]): row for row in read_jsonl(path)}
    for key, row in rows.items():
        if (
            key not in wanted
            or row["problem"]["prompt"] != wanted[key].prompt
            or row["problem"]["answer"] != wanted[key].answer
        ):
            raise UserError(
                f"{path} has a completion of {key[1]} that this evaluation does not ask for: remove the file, or use another out=DIR"
            )
    return rows


class _Verdicts:
    """Takes finished completions while others decode, and stores each with its verdict."""

    def __init__(self, ctx: Context, file: RowFile, rows: dict[tuple[str, str, int], Row]) -> None:
        self._verifier, self._file, self._rows = ctx.fleet.verifier, file, rows
        self._waiting: list[tuple[list[tuple[tuple[str, str, int], Problem, int, str, int, str]], Any]] = []

    def submit(self, found: list[tuple[tuple[str, str, int], Problem, int, str, int, str]]) -> None:
        """Begin verifying (key, problem, seed, text, number of tokens, finish reason) items."""
        self._waiting.append(
            (found, self._verifier.submit([(p.answer, text, p.rule) for _, p, _, text, _, _ in found]))
        )
        self._advance(wait=False)

    def finish(self) -> None:
        self._advance(wait=True)

    def _advance(self, wait: bool) -> None:
        waiting = []
        for found, handle in self._waiting:
            if not (wait or self._verifier.done(handle)):
                waiting.append((found, handle))
                continue
            stored = []
            for (key, problem, seed, text, num_tokens, finish), result in zip(
                found, self._verifier.collect(handle), strict=True
            ):
                verdict, reason = judge(result.verdict, result.cause, result.extracted, finish)
                problem = replace(problem, solution=None)
                row = to_json(
                    Answered(
                        problem,
                        key[2],
                        seed,
                        text,
                        num_tokens,
                        finish,
                        result.extracted,
                        verdict,
                        reason,
                        result.reason,
                    )
                )
                stored.append(row)
                self._rows[key] = row
            self._file.append(stored)
        self._waiting = waiting


def unasked(problem: Problem, sample: int, seed: int) -> Answered:
    """What stands for a sample of a problem whose prompt leaves no room for an answer."""
    why = "prompt_too_long"
    return Answered(replace(problem, solution=None), sample, seed, "", 0, why, None, Verdict.WRONG, why)


def judge(
    verdict: Verdict, cause: str | None, extracted: str | None, finish_reason: str
) -> tuple[Verdict, str]:
    """The verdict that counts, and its reason, from the verifier's."""
    if finish_reason == "length":
        return Verdict.WRONG, "truncated"
    if extracted is None:
        return Verdict.WRONG, "no_answer"
    if verdict is Verdict.UNVERIFIED:
        return verdict, cause or "unknown"
    return verdict, "equal" if verdict is Verdict.CORRECT else "different"


def summarise(
    answered: Mapping[str, Sequence[Row]], decodings: Mapping[str, Decoding], seed: int
) -> dict[str, dict[str, Any]]:
    """Figures per suite and model, and under "mean" their unweighted mean over suites.

    `accuracy` (pass@1: the mean over problems of the share of right samples) with its 95 % interval [`low`,
    `high`] (Wilson over the n problems, which is on the safe side with several samples), counts of
    completions, how they were decoded; with several samples `pass_at` and `majority_at`; `by_subject` and
    `by_level` where the problems have them; `against` earlier models: paired difference, 95 % interval,
    p-value and verdict.
    """
    scores: dict[str, dict[str, Any]] = {suite: {} for suite in [*decodings, "mean"]}
    accuracies: dict[str, dict[str, list[float]]] = {}
    for name, rows in answered.items():
        by_suite = {suite: [row for row in rows if row["problem"]["suite"] == suite] for suite in decodings}
        for suite, own in by_suite.items():
            scores[suite][name] = figures(own) | vars(decodings[suite]) | {"seed": seed}
        accuracies[name] = {suite: list(_by_problem(own).values()) for suite, own in by_suite.items()}
        means = [_score(scores[suite][name]) for suite in decodings]
        totals = {
            what: sum(scores[suite][name][what] for suite in decodings) for what in ("completions", *COUNTED)
        }
        scores["mean"][name] = to_json(mean_score(means)) | totals
        for earlier in list(accuracies)[:-1]:
            compare(scores, accuracies, earlier, name)
    return scores


def compare(
    scores: dict[str, dict[str, Any]],
    accuracies: Mapping[str, Mapping[str, list[float]]],
    earlier: str,
    name: str,
) -> None:
    """Add to the figures of `name` its difference from `earlier`, whose accuracies are those of the same
    problems in the same order."""
    for suite in scores:
        suites = [suite] if suite != "mean" else [other for other in scores if other != "mean"]
        found = paired_difference(
            [accuracies[earlier][s] for s in suites], [accuracies[name][s] for s in suites]
        )
        scores[suite][name].setdefault("against", {})[earlier] = vars(found) | {"verdict": found.verdict}


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of one model on one suite."""
    by_problem: dict[str, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"]["id"], []).append(row)
    accuracy = _by_problem(rows)
    found: dict[str, Any] = to_json(score(fsum(accuracy.values()), len(accuracy))) | {
        "completions": len(rows),
        **{what: sum(row["reason"] == what for row in rows) for what in COUNTED[:-1]},
        "unverified": sum(row["verdict"] == "unverified" for row in rows),
        "unverified_problems": list(
            dict.fromkeys(row["problem"]["id"] for row in rows if row["verdict"] == "unverified")
        ),
        "mean_tokens": sum(row["num_tokens"] for row in rows) / len(rows),
    }
    samples = len(rows) // len(by_problem)
    if samples > 1:
        right = [sum(row["verdict"] == "correct" for row in own) for own in by_problem.values()]
        ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
        found["pass_at"] = {
            str(k): fsum(pass_at_k(samples, count, k) for count in right) / len(right) for k in ks
        }
        votes = [
            majority(answer_classes(own), [row["verdict"] == "correct" for row in own])
            for own in by_problem.values()
        ]
        found["majority_at"] = {str(samples): fsum(votes) / len(votes)}
    for what in ("subject", "level"):
        groups: dict[str, list[float]] = {}
        for problem_id, own in by_problem.items():
            if group := own[0]["problem"][what]:
                groups.setdefault(group, []).append(accuracy[problem_id])
        if groups:
            found[f"by_{what}"] = {
                group: to_json(score(fsum(groups[group]), len(groups[group]))) for group in sorted(groups)
            }
    return found


def answer_classes(rows: Sequence[Row]) -> list[int | None]:
    """The answers of one problem's samples as numbers, equal ones the same; None without one. Right answers
    are equal to each other; of others only those that `same_answer` finds equal."""
    rule: AnswerRule = from_json(AnswerRule, rows[0]["problem"]["rule"])
    representatives: list[tuple[bool, str]] = []
    classes: list[int | None] = []
    for row in rows:
        if row["extracted"] is None or row["reason"] == "truncated":
            classes.append(None)
            continue
        own = (row["verdict"] == "correct", row["extracted"])
        place = next(
            (i for i, other in enumerate(representatives) if _same_class(own, other, rule)),
            len(representatives),
        )
        if place == len(representatives):
            representatives.append(own)
        classes.append(place)
    return classes


def _same_class(one: tuple[bool, str], other: tuple[bool, str], rule: AnswerRule) -> bool:
    if one[0] or other[0]:
        return one[0] and other[0]
    return one[1] == other[1] or same_answer(one[1], other[1], rule) is True


def _by_problem(rows: Sequence[Row]) -> dict[str, float]:
    """Share of right samples of each problem, in order."""
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["problem"]["id"], []).append(row["verdict"] == "correct")
    return {problem_id: sum(found) / len(found) for problem_id, found in right.items()}


def _score(found: Mapping[str, Any]) -> Score:
    return Score(found["accuracy"], found["low"], found["high"], found["n"])
