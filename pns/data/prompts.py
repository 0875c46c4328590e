"""Problems to token ids through the model's own chat template, and token ids back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pns.config import Data
from pns.errors import UserError
from pns.records import Problem


class Prompts:
    """Renders problems with a tokenizer's chat template.

    The prompt is [system turn] + user turn (problem and `data.instruction`) + generation prompt + `data.assistant_prefix`.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self.tokenizer = tokenizer
        self._data = data

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The conversation before the assistant's turn."""
        system = [{"role": "system", "content": self._data.system_prompt}] if self._data.system_prompt else []
        return [*system, {"role": "user", "content": problem.prompt + self._data.instruction}]

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids (T,)."""
        text = self.tokenizer.apply_chat_template(self.messages(problem), add_generation_prompt=True, tokenize=False)
        return tuple(self.tokenizer.encode(text + self._data.assistant_prefix, add_special_tokens=False))

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Completion ids (T,) with the end token, of a text as `decode` gives it: `data.assistant_prefix` is part of the prompt."""
        completion = text.removeprefix(self._data.assistant_prefix)
        return (*self.tokenizer.encode(completion, add_special_tokens=False), self.tokenizer.eos_token_id)

    def token_starts(self, text: str) -> list[int]:
        """The first character in `text`, as `decode` gives it, of each token of `encode_completion` but the end token."""
        completion = text.removeprefix(self._data.assistant_prefix)
        offsets = self.tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [start + len(text) - len(completion) for start, _ in offsets]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of completion ids, without the end token and other special tokens, with `data.assistant_prefix` before it."""
        return self._data.assistant_prefix + self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def fitting(self, problems: list[Problem]) -> tuple[list[Problem], int]:
        """The problems whose prompt has at most `data.max_prompt_tokens` tokens, and how many have not. Raises UserError if none has."""
        kept = [problem for problem in problems if len(self.encode(problem)) <= self._data.max_prompt_tokens]
        if not kept:
            shortest = min(len(self.encode(problem)) for problem in problems)
            raise UserError(
                f"data.max_prompt_tokens: {self._data.max_prompt_tokens}; the shortest of {len(problems)} prompts has {shortest}: raise it"
            )
        return kept, len(problems) - len(kept)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or Hub id."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would break the progress line

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
