"""The chain-of-thought judge as a service: rubric scores 0-3 of a solution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pns.algo.judging import (
    DIMENSIONS,
    MAX_SCORE,
    Judgement,
    Template,
    make_nonce,
    parse_verdict,
    render_text,
    render_tiny,
    verdict_parts,
)
from pns.config import EngineKind, RewardConfig, ServicePool
from workers.rewards.service import Outcome, ScoringPool
from workers.rewards.verdict_model import CHARACTERS_PER_TOKEN, Reply, VerdictModel, rounded
from workers.runtime import Runtime

if TYPE_CHECKING:
    from workers.rewards.vllm_grades import VllmGrades

Candidate = tuple[str, str]  # problem text, solution text
_DIGITS = [str(digit) for digit in range(MAX_SCORE + 1)]


class Judge(VerdictModel):
    """A language model that grades (problem, solution) pairs; what it raises is said in `VerdictModel`. On
    vLLM it has `gpus`, and a request's candidates go through it together."""

    def __init__(
        self,
        model_path: str,
        runtime: Runtime,
        seed: int = 0,
        forward_tokens: int = 0,
        engine: EngineKind = EngineKind.transformers,
        gpus: float = 1.0,
    ) -> None:
        on_vllm = engine is EngineKind.vllm
        grades = dict.fromkeys(Template, _DIGITS)
        super().__init__("judge", model_path, runtime, seed, forward_tokens, grades, with_model=not on_vllm)
        self._between = [self._encode(part) for part in verdict_parts(self._template, "")[1:4]]
        self._vllm: VllmGrades | None = None
        if on_vllm:
            from workers.rewards.vllm_grades import VllmGrades

            self._vllm = VllmGrades(model_path, runtime, gpus)
            self._max_tokens = self._vllm.max_tokens

    def score(self, candidates_B: Sequence[Candidate]) -> list[Outcome[Judgement]]:
        """Scores (relevance, coherence, completeness, clarity), each with the probabilities of 0 to 3 at its
        place: those of a path on which every digit before was the likeliest one. Missing: "too_long" (for the
        model's context with the verdict), "not_finite", "unparsable"."""
        nonces, prompts = [], []
        for problem, solution in candidates_B:
            nonces.append(make_nonce(self._seed, problem, solution, self._template))
            prompts.append(self._prompt(problem, solution, nonces[-1]))
        reply_tokens = len(DIMENSIONS) + sum(map(len, self._between))
        room = self._max_tokens - reply_tokens
        outcomes: list[Outcome[Judgement]] = [Outcome(None, "too_long")] * len(prompts)
        lengths = {row: len(prompt) for row, prompt in enumerate(prompts) if len(prompt) <= room}
        for rows in [list(lengths)] if self._vllm else self._batches(lengths):
            replies = self._decode([prompts[row] for row in rows])
            for row, reply in zip(rows, replies, strict=True):
                outcomes[row] = self._read(reply, nonces[row])
        return outcomes

    def _prompt(self, problem: str, candidate: str, nonce: str) -> list[int]:
        """Token ids up to the verdict's first digit."""
        if self._template is Template.TINY:
            return self._encode(render_tiny(problem, candidate, nonce))
        messages = render_text(problem, candidate, nonce, self._without_added)
        return self._encode_chat(messages, verdict_parts(self._template, nonce)[0])

    def _decode(self, prompts: list[list[int]]) -> list[Reply | None]:
        if self._vllm is not None:
            filled_in = self._vllm.fill_in(prompts, self._between, self._grades_V.tolist())
            return [None if own is None else (own[0], rounded(own[1])) for own in filled_in]
        if self._template is Template.TINY and len(prompts) == 1:
            return [self._guess(prompts[0], len(DIMENSIONS))]
        return self._fill_in(prompts, self._between, [self._grades_V] * len(DIMENSIONS))

    def _read(self, reply: Reply | None, nonce: str) -> Outcome[Judgement]:
        if reply is None:
            return Outcome(None, "not_finite")
        ids, probabilities = reply
        before, *_, after = verdict_parts(self._template, nonce)
        scores = parse_verdict(before + self._tokenizer.decode(ids) + after, self._template, nonce)
        return Outcome(Judgement(scores, probabilities)) if scores else Outcome(None, "unparsable")


def _num_tokens(candidate: Candidate) -> int:
    return sum(map(len, candidate)) // CHARACTERS_PER_TOKEN + 1


class JudgePool(ScoringPool[Candidate, Judgement]):
    """Judge actors: items are (problem text, solution text), values four scores 0-3 with the digits'
    probabilities; `pns.algo.judging` makes them one number (`rubric_score`, `expected_score`)."""

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        seed: int,
        deadline_seconds: float = RewardConfig.deadline_seconds,
    ) -> None:
        build = functools.partial(
            Judge,
            runtime=runtime,
            seed=seed,
            forward_tokens=pool.batch_tokens,
            engine=pool.engine,
            gpus=pool.gpus,
        )
        super().__init__(name, pool, runtime, build, _num_tokens, deadline_seconds)
