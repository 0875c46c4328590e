"""What a generation engine is: inputs, outputs and interface, and the seeded sampling that all share.

A sample depends on the weights, the prompt, the sampling settings and the request's own seed, not on what
else is in the batch: the noise of every token is a hash of (seed, position in the completion, token id), so
engines, devices and batches agree on it up to the rounding of the logits.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pns.data.prompts import find_tokenizer
from pns.data.thinking import ThinkingBudget
from pns.errors import UserError
from workers.broadcast import Seat, member


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. Of the tempered distribution `min_p` leaves out tokens below this share of
    the likeliest one's probability (0: none), then `top_k` keeps so many of the likeliest (0: all), then
    `top_p` in (0, 1] the smallest set of at least this probability: vLLM's order.

    Before the temperature `repetition_penalty` (arXiv 1909.05858, 1: none) divides positive logits, and
    multiplies others, of tokens in prompt or completion; `frequency_penalty` is taken off for each time that
    a token is in the completion, `presence_penalty` once. A completion ends with the token that makes its
    text hold one of `stop`. Where `thinking` says so, a token is what it forces, whatever the rest says.
    """

    temperature: float
    top_p: float = 1.0
    max_new_tokens: int = 128
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    thinking: ThinkingBudget | None = None

    @property
    def penalties(self) -> "Penalties":
        return self.presence_penalty, self.frequency_penalty, self.repetition_penalty


Penalties = tuple[float, float, float]  # presence, frequency, repetition
NO_PENALTIES: Penalties = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Request:
    id: str
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sample:
    """`finish_reason` is "stop" after an end token or one of the `stop` texts, else "length"; `token_ids`
    (T,) include what ended them. `log_probs` (T,) are of the unmodified distribution (temperature 1, no
    penalty, nothing left out) of the weights `weights_version`."""

    id: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    weights_version: int


# By name, in memory that may not be written; or a replica's first seat in the group that they are sent to.
Weights = dict[str, torch.Tensor] | Seat


def tensors_of(weights: Weights, worker: int = 0) -> Iterable[tuple[str, torch.Tensor]]:
    """For one of the replica's workers, each of which has a seat of its own."""
    if isinstance(weights, dict):
        return weights.items()
    return member(replace(weights, rank=weights.rank + worker)).receive()


class Engine(Protocol):
    """One model on one device. Not safe for concurrent calls."""

    def load(self, model_path: str) -> None:
        """Take the weights, as version 0, and the architecture of a checkpoint directory or Hub id."""

    def update_weights(self, weights: Weights, version: int) -> None:
        """Replace all weights by copies of these; names and shapes as in the checkpoint. ValueError for other
        names: then the engine is of no use before it has been given the right ones."""

    def sleep(self) -> None:
        """Leave the device to others. What it held is gone: after `wake_up` it needs weights before it can
        be asked. Nothing to do without a model."""

    def wake_up(self) -> None:
        """Take the device again."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sample]:
        """Yield each sample as soon as it is finished, in no particular order."""

    def log_probs(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Natural-log probabilities (T,) float32 at temperature 1 of each completion after its prompt."""


def check_names(expected: set[str], given: set[str], tied: bool) -> None:
    """ValueError unless `given` are the `expected` weights; a head `tied` to the embedding is optional."""
    optional = {"lm_head.weight"} if tied else set()
    missing, unknown = expected - given - optional, given - expected - optional
    if missing or unknown:
        raise ValueError(
            f"weight update: {len(missing)} names missing {sorted(missing)[:3]}, "
            f"{len(unknown)} unknown {sorted(unknown)[:3]}"
        )


class StopWatch:
    """Sees when the text of a growing completion holds one of `stops`. The token in which a text ends is
    known by that text's last character, so that few tokens have the text before them decoded."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # Tokens that a stop can lie in, each with a byte of it at least; and some that a tokenizer may trim.
        self.window = max(len(stop.encode()) for stop in stops) + 4
        self._may_end: dict[int, bool] = {}

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of the tokens (the last `window` are enough) completes a stop."""
        last = token_ids[-1]
        if last not in self._may_end:
            text = self._decode([last])
            # White space may be trimmed, and a part of a character is no text yet.
            self._may_end[last] = "\ufffd" in text or any(
                stop[-1] in text or stop[-1].isspace() for stop in self._stops
            )
        if not self._may_end[last]:
            return False
        tail = self._decode(token_ids[-self.window :])
        return any(stop in tail for stop in self._stops)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


def stop_watch(model_path: Path, sampling: Sampling, trust_remote_code: bool) -> StopWatch | None:
    """None where nothing is to be watched. Raises UserError for a checkpoint without a tokenizer."""
    if not sampling.stop:
        return None
    return StopWatch(tokenizer_of(str(model_path), trust_remote_code), sampling.stop)


@cache
def tokenizer_of(model_path: str, trust_remote_code: bool) -> Any:
    """Raises UserError for a checkpoint without a tokenizer."""
    tokenizer = find_tokenizer(model_path, trust_remote_code)
    if tokenizer is None:
        keys = "data.stop, evaluate.stop and evaluate.thinking_budget"
        raise UserError(f"{model_path} has no tokenizer, which {keys} need: save it there")
    return tokenizer


def force(scores_V: torch.Tensor, token: int) -> None:
    """Leave of the scores of one row, in place, `token` alone."""
    scores_V.fill_(float("-inf"))
    scores_V[token] = 0.0


def penalise(
    logits_V: torch.Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], penalties: Penalties
) -> torch.Tensor:
    """Logits (V,) float32 of one row with the penalties of `Sampling`."""
    presence, frequency, repetition = penalties
    logits_V = logits_V.float().clone()
    seen = torch.tensor(sorted({*prompt_ids, *output_ids}), dtype=torch.int64, device=logits_V.device)
    own = logits_V[seen]
    logits_V[seen] = torch.where(own > 0, own / repetition, own * repetition)
    if output_ids:
        drawn, counts = torch.tensor(list(output_ids), device=logits_V.device).unique(return_counts=True)
        logits_V[drawn] -= frequency * counts + presence
    return logits_V


def perturb(
    logits_BV: torch.Tensor,
    seeds: Sequence[int],
    steps: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int = 0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Scores (B, V) float32 whose argmax is a sample of softmax(logits / temperature), cut as `Sampling`
    says, row b drawn with (seeds[b], steps[b]): the Gumbel-max trick (arXiv 1611.01144, section 2).
    Temperature > 0."""
    scores_BV = logits_BV.float() / temperature
    if min_p > 0:
        least_B1 = scores_BV.amax(dim=-1, keepdim=True) + math.log(min_p)
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, float("-inf"))
    if 0 < top_k < scores_BV.shape[1]:
        least_B1 = scores_BV.topk(top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, float("-inf"))
    if top_p < 1.0:
        sorted_BV, order_BV = scores_BV.sort(dim=-1, descending=True)
        probs_BV = sorted_BV.softmax(dim=-1)
        outside_BV = (probs_BV.cumsum(dim=-1) - probs_BV) >= top_p
        scores_BV = scores_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), float("-inf"))
    # Noise in blocks of rows: 8-byte hashes of a whole (256, 150000) batch would take more than a GiB.
    rows = max(1, 2**24 // scores_BV.shape[1])
    for start in range(0, scores_BV.shape[0], rows):
        block = slice(start, start + rows)
        scores_BV[block] += _gumbel(seeds[block], steps[block], scores_BV.shape[1], scores_BV.device)
    return scores_BV


def _gumbel(
    seeds: Sequence[int], steps: Sequence[int], vocab_size: int, device: torch.device
) -> torch.Tensor:
    mask = 2**63 - 1  # a seed of 64 bits does not fit int64
    seeds_B = torch.tensor([seed & mask for seed in seeds], dtype=torch.int64).to(device)
    steps_B = torch.tensor(steps, dtype=torch.int64).to(device)
    keys_B1 = _mix(_mix(seeds_B).add_(steps_B)).unsqueeze(1)
    # splitmix64's increment, which tells neighbouring tokens apart in all bits; as int64 it is negative.
    tokens_V = torch.arange(vocab_size, dtype=torch.int64, device=device) * -7046029254386353131
    bits_BV = _mix(keys_B1 + tokens_V).bitwise_and_(2**32 - 1)
    # In (0, 1): 0 or 1 would give infinite noise.
    uniform_BV = bits_BV.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    # -log(E), E exponential; exact where E is small, which is where maxima lie
    return torch.log1p(uniform_BV.neg_()).neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) on int64, whose products wrap around."""
    # torch shifts in copies of the sign: the masks make the shifts those of unsigned numbers.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
