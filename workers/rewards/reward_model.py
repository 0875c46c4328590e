"""The reward model as a service: raw scores r(x, y) of token sequences or conversations; sigmoid(r) is the
reward term."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from pns.config import RewardConfig, ServicePool
from pns.data.prompts import encode_conversation, find_tokenizer
from pns.errors import UserError
from workers.rewards.reward_head import load_body, load_head, several_outputs, trusts_code
from workers.rewards.service import Outcome, ScoringPool, micro_batches
from workers.runtime import Runtime
from workers.sizes import FORWARD_TOKENS

_CHARACTERS_PER_TOKEN = 3  # a guess that sizes requests before they are tokenized

Conversation: TypeAlias = Sequence[Mapping[str, str]]  # turns of "role" and "content", the last one graded
TokensOrConversation: TypeAlias = Sequence[int] | Conversation


class RewardModel:
    """A causal body of transformers' own and a head with one output, read at each sequence's last token;
    float32 on CPU, bfloat16 with a float32 head on a GPU.

    Raises UserError where `model_path` holds no such model, whole and trained, or (`reads_chat`) none that
    reads conversations; `term` is the name of the reward term for that message.
    """

    def __init__(
        self,
        model_path: str,
        runtime: Runtime,
        forward_tokens: int = 0,
        reads_chat: bool = False,
        term: str = "NAME",
    ) -> None:
        self._path, self._device, self._term = model_path, runtime.device, term
        self._forward_tokens = forward_tokens or FORWARD_TOKENS[runtime.device]
        try:
            self._load(runtime)
        except OSError as error:
            raise UserError(f"reward model {model_path}: {str(error).splitlines()[0]}") from error
        if reads_chat:
            _ = self._tokenizer

    def _load(self, runtime: Runtime) -> None:
        stored, _ = PreTrainedConfig.get_config_dict(self._path)
        num_outputs = max(len(stored.get("id2label") or ()), stored.get("num_labels") or 1)
        if num_outputs > 1:
            raise UserError(several_outputs(self._path, num_outputs))
        head, head_names = load_head(self._path)
        architecture = (stored.get("architectures") or [""])[0]
        is_score = all(name.startswith("score.") for name in head_names)
        if architecture.endswith("ForSequenceClassification") and not is_score:
            fault = f"is of {architecture}, which does not read the last token"
            raise UserError(f"reward model {self._path} {fault}: name a causal model")
        self._trust = trusts_code(self._path, runtime)
        self._body = load_body(self._path, runtime, head_names)
        # bfloat16 would round scores to three digits: too coarse for the differences within a group.
        self._head = head.to(self._device)
        config = self._body.config.get_text_config()
        self._vocabulary, self._max_length = config.vocab_size, config.max_position_embeddings
        self._pad_token_id = config.pad_token_id

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = find_tokenizer(self._path, self._trust)
        if tokenizer is None or not tokenizer.chat_template:
            way_out = f"reward.terms.{self._term}.input=tokens"
            raise UserError(
                f"reward model {self._path} has no tokenizer with a chat template, so it reads no "
                f"conversations: {way_out}, if it reads the policy's token ids"
            )
        return tokenizer

    def score(self, items_B: Sequence[TokensOrConversation]) -> list[Outcome[float]]:
        """r for each item, any real number: token ids (prompt and completion), or a conversation, which the
        model's own tokenizer and chat template make into token ids. Missing: "empty", "too_long" (beyond the
        model's positions), "token_id" (outside its vocabulary), "not_finite"."""
        token_ids_BT = [self._token_ids(entry) for entry in items_B]
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

    def _token_ids(self, entry: TokensOrConversation) -> Sequence[int]:
        if not _is_conversation(entry):
            return cast(Sequence[int], entry)
        token_ids = list(encode_conversation(self._tokenizer, entry))
        # Classifiers of transformers read the last token that is not padding; some take the end of a turn
        # for padding.
        while token_ids and token_ids[-1] == self._pad_token_id:
            token_ids.pop()
        return token_ids

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


def _is_conversation(entry: TokensOrConversation) -> TypeGuard[Conversation]:
    return bool(entry) and isinstance(entry[0], Mapping)


def _num_tokens(entry: TokensOrConversation) -> int:
    if _is_conversation(entry):
        return sum(len(turn["content"]) for turn in entry) // _CHARACTERS_PER_TOKEN + 1
    return len(entry)


class RewardModelPool(ScoringPool[TokensOrConversation, float]):
    """Reward-model actors: items are token id sequences of prompt and completion, or conversations, values
    raw scores r. With `reads_chat` a model that cannot read conversations is refused when it is loaded."""

    def __init__(
        self,
        name: str,
        pool: ServicePool,
        runtime: Runtime,
        deadline_seconds: float = RewardConfig.deadline_seconds,
        reads_chat: bool = False,
    ) -> None:
        build = functools.partial(
            RewardModel, runtime=runtime, forward_tokens=pool.batch_tokens, reads_chat=reads_chat, term=name
        )
        super().__init__(name, pool, runtime, build, _num_tokens, deadline_seconds)
