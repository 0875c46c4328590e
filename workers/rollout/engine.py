"""What a generation engine is: inputs, outputs and interface, and the seeded sampling that all share.

A sample depends on the weights, the prompt, the sampling settings and the request's own seed, not on what
else is in the batch: the noise of every token is a hash of (seed, position in the completion, token id), so
engines, devices and batches agree on it up to the rounding of the logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` in (0, 1] keeps the smallest set of tokens of at least this
    probability (after temperature)."""

    temperature: float
    top_p: float = 1.0
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Request:
    id: str
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sample:
    """`token_ids` (T,) include the end token when `finish_reason` is "stop" (else "length"). `log_probs` (T,)
    are of the unmodified distribution (temperature 1, no top-p) of the weights `weights_version`."""

    id: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    weights_version: int


class Engine(Protocol):
    """One model on one device. Not safe for concurrent calls."""

    def load(self, model_path: str) -> None:
        """Take the weights, as version 0, and the architecture of a checkpoint directory or Hub id."""

    def update_weights(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """Replace all weights; names and shapes as in the checkpoint. ValueError for other names."""

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


def perturb(
    logits_BV: torch.Tensor, seeds: Sequence[int], steps: Sequence[int], temperature: float, top_p: float
) -> torch.Tensor:
    """Scores (B, V) float32 whose argmax is a sample of softmax(logits / temperature), cut to `top_p`, row b
    drawn with (seeds[b], steps[b]): the Gumbel-max trick (arXiv 1611.01144, section 2). Temperature > 0."""
    scores_BV = logits_BV.float() / temperature
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
