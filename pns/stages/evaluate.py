"""Accuracy of models on every suite: sampling, verdicts, statistics. `pns evaluate` runs the same stage on
one model.

A completion is correct when the verifier finds its final answer equal to the gold one. Cut off at the token
limit or without a final answer it is wrong, and counted under that name; so is a problem whose prompt fills
the model's context, which is not asked. A completion whose answer the verifier cannot decide is `unverified`:
no right answer, counted and listed. The number of problems never shrinks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pns.algo.scores import COUNTED, MEAN, final_verdict, summarise
from pns.config import Config, Decoding, Thinking
from pns.data.prompts import Messages, Prompts, context_tokens
from pns.errors import UserError
from pns.files import read_jsonl, write_json, write_jsonl
from pns.records import Answered, Problem, Verdict
from pns.report.browse import write_pages
from pns.run.place import UNFINISHED
from pns.run.stage import stage
from pns.stages.artefacts import AnyModel, Evaluation
from pns.stages.context import Context, Suites
from pns.stages.stream import Ask, Unfinished, stable_seed, stream
from workers.rollout.endpoint import ChatRequest, ModelAtEndpoint, Reply
from workers.rollout.engine import Sample, Sampling


@dataclass(frozen=True)
class AtEndpoint:
    """The models are names at this server, which alone counts: how it is asked changes no result."""

    url: str


def endpoint_settings(config: Config) -> AtEndpoint | None:
    """None where rollout samples: how suites are decoded comes with them."""
    url = config.evaluate.endpoint.url
    return AtEndpoint(url) if url else None


def roles_of(settings: AtEndpoint | None) -> tuple[str, ...]:
    return ("verifier",) if settings else ("rollout", "verifier")


@stage(Evaluation, endpoint_settings, roles_of)
def evaluate(
    ctx: Context, settings: AtEndpoint | None, models: Mapping[str, AnyModel], suites: Suites
) -> Evaluation:
    """Scores of `models` on `suites`; completions that an interruption left are not asked for again."""
    evaluation = Evaluation(ctx.directory)
    write_json(evaluation.suites_file, suites.described())
    ctx.track.begin("evaluate", len(models), 0)
    answered: dict[str, list[Answered]] = {}
    for index, (name, model) in enumerate(models.items()):
        file = evaluation.completions_file(name)
        if not file.exists():
            answer(ctx, evaluation, name, model.model, suites, settings is not None)
        answered[name] = evaluation.completions(name)
        right = sum(row.verdict is Verdict.CORRECT for row in answered[name])
        ctx.track.log(index, {f"{name}_accuracy": right / len(answered[name])})
    ctx.track.end()
    scores = summarise(answered, suites.decodings, ctx.seed)
    write_json(evaluation.scores_file, scores)
    write_pages(evaluation.pages, {name: read_jsonl(evaluation.completions_file(name)) for name in models})
    totals = {what: sum(scores[MEAN][name][what] for name in models) for what in COUNTED}
    ctx.place.count(**totals)
    return evaluation


def answer(
    ctx: Context, evaluation: Evaluation, name: str, model: str, suites: Suites, at_endpoint: bool = False
) -> None:
    """Write the rows of every sample of every problem, in order.

    The seed of a sample follows from the run's seed, the problem and the sample's number alone, so neither
    the order, the number of replicas nor an interruption changes it.
    """
    # A server's context is not known here: it refuses what does not fit.
    longest = 0 if at_endpoint else context_tokens(model, ctx.fleet.runtime.trust_remote_code)
    rows: dict[str, Answered] = {}
    asks: list[Ask] = []
    for suite, problems in suites.problems.items():
        decoding = suites.decodings[suite]
        sampling = suite_sampling(ctx.messages, decoding)
        for problem in problems:
            # Room for one token at least.
            fits = at_endpoint or len(ctx.prompts.encode(problem)) < longest
            for sample in range(decoding.samples_per_problem or 1):
                seed = stable_seed(ctx.seed, "evaluate", problem.id, sample)
                row = not_asked(problem, sample, seed)
                if fits:
                    asks.append(Ask(answered_key(row), problem, sample, seed, sampling))
                rows[answered_key(row)] = row  # keeps its place, also where an answer replaces it
    file = evaluation.completions_file(name)
    unfinished: Unfinished[Answered] = Unfinished(file.with_suffix(UNFINISHED), Answered, answered_key)
    scorer, label = AnswerScorer(ctx), f"evaluate  {name}"
    if at_endpoint:
        sampled = partial(replies, model)
        answers = stream(ctx, asks, scorer, unfinished, has_completion, None, label, sampled)
    else:
        answers = stream(ctx, asks, scorer, unfinished, lambda row: True, model, label)
    rows |= {ask.key: row for ask, row in zip(asks, answers, strict=True)}
    write_jsonl(file, rows.values())
    # Only now that the whole file is there: until then these rows are what an interruption leaves.
    unfinished.drop(list(unfinished.rows))


def replies(model: str, ctx: Context, asks: Sequence[Ask]) -> Iterator[list[Reply]]:
    """Of the model of this name at evaluate.endpoint."""
    thinking = ctx.messages.data.thinking
    told = {} if thinking is Thinking.auto else {"enable_thinking": thinking is Thinking.on}
    asked = ModelAtEndpoint(model, ctx.fleet.config.evaluate.endpoint, told)
    requests = [
        ChatRequest(ask.key, ctx.messages.messages(ask.problem), ask.seed, ask.sampling) for ask in asks
    ]
    yield from asked.stream(requests)


def has_completion(row: Answered) -> bool:
    """Whether a server has answered: what it failed for is asked again after an interruption."""
    return row.finish_reason in ("stop", "length")


def answered_key(row: Answered) -> str:
    return f"{row.problem.suite}/{row.problem.id}#{row.sample}"


def check_samplings(messages: Messages, suites: Suites) -> None:
    """Raises UserError for a suite that cannot be decoded as it says."""
    for decoding in suites.decodings.values():
        suite_sampling(messages, decoding)


def suite_sampling(messages: Messages, decoding: Decoding) -> Sampling:
    """Of a decoding whose gaps are filled (`pns.data.benchmarks.decodings`). Raises UserError for a thinking
    budget of a model without a reasoning block, or of a server."""
    sampling = decoding_sampling(decoding, messages.data.stop)
    if not decoding.thinking_budget:
        return sampling
    if not isinstance(messages, Prompts):
        fault = f"{decoding.thinking_budget}, and no request to a server can ask for it"
        way_out = "leave it out and set it at the server, or evaluate the model's directory"
        raise UserError(f"evaluate.thinking_budget: {fault}: {way_out}")
    return replace(sampling, thinking=messages.thinking_budget(decoding.thinking_budget))


def decoding_sampling(decoding: Decoding, stop: str = "") -> Sampling:
    """As `suite_sampling`, without a thinking budget; `stop` is the prompt's."""
    assert decoding.temperature is not None
    assert decoding.top_p is not None
    assert decoding.max_new_tokens is not None
    stops = tuple(dict.fromkeys([*([stop] if stop else []), *(decoding.stop or [])]))
    return Sampling(
        decoding.temperature,
        decoding.top_p,
        decoding.max_new_tokens,
        decoding.top_k or 0,
        decoding.min_p or 0.0,
        decoding.presence_penalty or 0.0,
        decoding.frequency_penalty or 0.0,
        decoding.repetition_penalty or 1.0,
        stops,
    )


class AnswerScorer:
    """Gives every completion, up to the first stop text, its verdict and the reason."""

    def __init__(self, ctx: Context) -> None:
        self._verifier, self._ctx = ctx.fleet.verifier, ctx
        self._verifying: list[tuple[list[Answered], list[str], Any]] = []

    def submit(self, samples: Sequence[tuple[Ask, Sample | Reply]]) -> None:
        rows, keys = [], []
        for ask, sample in samples:
            thinking, cut = ask.sampling.thinking, False
            if isinstance(sample, Reply):
                whole, num_tokens = self._ctx.messages.canonical(sample.text), sample.num_tokens
            else:
                prompts, token_ids = self._ctx.prompts, sample.token_ids
                whole, num_tokens = prompts.decode(token_ids), len(token_ids)
                cut = thinking is not None and thinking.cuts(prompts.tokenizer, token_ids)
            text, stopped = until_stop(whole, ask.sampling.stop)
            reason = "stop" if stopped else sample.finish_reason
            problem = replace(ask.problem, solution=None)  # rows are read by people: a solution is long
            drawn = text, num_tokens, reason
            # What it will be once there is a verdict.
            row = Answered(problem, ask.sample, ask.seed, *drawn, None, Verdict.UNVERIFIED, "")
            rows.append(replace(row, thinking_cut=cut))
            keys.append(ask.key)
        answers = [(row.problem.answer, row.completion, row.problem.rule) for row in rows]
        self._verifying.append((rows, keys, self._verifier.submit(answers, for_negatives=False)))

    def finished(self, wait: bool) -> list[tuple[str, Answered]]:
        whole, still_verifying = [], []
        for rows, keys, handle in self._verifying:
            if not (wait or self._verifier.done(handle)):
                still_verifying.append((rows, keys, handle))
                continue
            wait = False  # for one at a time: what is whole is kept while the others take long
            for row, key, result in zip(rows, keys, self._verifier.collect(handle), strict=True):
                extracted, said = result.extracted, result.reason
                verdict, reason = final_verdict(result.verdict, result.cause, extracted, row.finish_reason)
                judged = replace(row, extracted=extracted, verdict=verdict, reason=reason, detail=said)
                whole.append((key, judged))
        self._verifying = still_verifying
        return whole


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of `stops`, and whether one was in it. Engines end completions with a stop: the
    text of the token that completed it goes beyond."""
    found = [begin for stop in stops if (begin := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def not_asked(problem: Problem, sample: int, seed: int) -> Answered:
    """What stands for a sample of a problem whose prompt leaves no room for an answer."""
    reason, asked = "prompt_too_long", replace(problem, solution=None)
    return Answered(asked, sample, seed, "", 0, reason, None, Verdict.WRONG, reason)
