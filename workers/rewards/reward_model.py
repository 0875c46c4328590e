"""The reward model as a service: raw scores r(x, y) of token sequences; sigmoid(r) is the reward term."""

import functools
import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from pns.config import RewardConfig, ServicePool
from pns.errors import UserError
from workers.rewards.service import FORWARD_TOKENS, Outcome, ScoringPool, micro_batches
from workers.runtime import Runtime


class RewardModel:
    """A sequence classifier with one output, read at each sequence's last token; float32 on CPU, bfloat16
    with a float32 head on a GPU.

    Raises UserError where `model_path` holds no trained reward head.
    """

    def __init__(self, model_path: str, runtime: Runtime, forward_tokens: int = 0) -> None:
        self._device = device = runtime.device
        self._forward_tokens = forward_tokens or FORWARD_TOKENS[device]
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                model_path,
                num_labels=1,
                dtype=torch.float32 if device == "cpu" else torch.bfloat16,
                trust_remote_code=runtime.trust_remote_code,
                output_loading_info=True,
            )
        except OSError as error:
            raise UserError(f"reward model {model_path}: {str(error).splitlines()[0]}") from error
        if any(name.startswith("score.") for name in report["missing_keys"]):  # drawn at random instead
            raise UserError(
                f"reward model {model_path} has no reward head (score.weight): name a model trained by the "
                "stage reward_model"
            )
        self._body = model.base_model.to(device).eval()
        # bfloat16 would round scores to three digits: too coarse for the differences within a group.
        self._head = model.score.to(device=device, dtype=torch.float32)
        self._vocabulary = model.config.vocab_size
        self._max_length = model.config.max_position_embeddings

    def score(self, token_ids_BT: Sequence[Sequence[int]]) -> list[Outcome[float]]:
        """r for each sequence of token ids (prompt and completion), any real number. Missing: "empty",
        "too_long" (beyond the model's positions), "token_id" (outside its vocabulary), "not_finite"."""
        outcomes: list[Outcome[float]] = [Outcome(None, self._refusal(row)) for row in token_ids_BT]
        lengths = {row: len(ids) for row, ids in enumerate(token_ids_BT) if outcomes[row].cause is None}
        # The last bits of a score depend on what shares its forward pass, and that on timing. On a CPU, where
        # runs are the same to the bit, a row is alone.
        alone = [[row] for row in lengths]
        for rows in alone if self._device == "cpu" else micro_batches(lengths, self._forward_tokens):
            values = self._forward([token_ids_BT[row] for row in rows])
            for row, value in zip(rows, values, strict=True):
                outcomes[row] = Outcome(value) if math.isfinite(value) else Outcome(None, "not_finite")
        return outcomes

    def _refusal(self, row: Sequence[int]) -> str | None:
        if not row:
            return "empty"
        if len(row) > self._max_length:
            return "too_long"
        return None if min(row) >= 0 and max(row) < self._vocabulary else "token_id"

    @torch.inference_mode()
    def _forward(self, rows: list[Sequence[int]]) -> list[float]:
        lengths_B = torch.tensor([len(row) for row in rows])
        ids_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        # Attention is causal and padding is on the right: no token that is read sees the padding, and no mask
        # is needed.
        hidden_BTD = self._body(input_ids=ids_BT.to(self._device), use_cache=False).last_hidden_state
        last_BD = hidden_BTD[torch.arange(len(rows)), (lengths_B - 1).to(self._device)]
        return self._head(last_BD.float()).squeeze(-1).tolist()


class RewardModelPool(ScoringPool[Sequence[int], float]):
    """Reward-model actors: items are token id sequences of prompt and completion, values raw scores r."""

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        deadline_seconds: float = RewardConfig.deadline_seconds,
    ) -> None:
        build = functools.partial(RewardModel, runtime=runtime, forward_tokens=pool.batch_tokens)
        super().__init__(name, pool, runtime, build, len, deadline_seconds)
