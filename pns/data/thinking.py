"""The budget of a reasoning block: one that is still open after so many tokens is closed for the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ThinkingBudget:
    """`tokens` of a completion, the opening tag among them; `closing_ids` (K,) are then forced, one after the
    other, where the block between `opening` and `closing` is open. `opened` says that the prompt opens it. A
    block that begins later has no budget.

    Budget forcing (arXiv 2501.19393). Forced tokens are no samples of the policy: for evaluation alone.
    """

    tokens: int
    opening: str
    closing: str
    opened: bool
    closing_ids: tuple[int, ...]

    def forces_at(self, step: int) -> bool:
        """Whether the token after `step` others may be forced."""
        return 0 <= step - self.tokens < len(self.closing_ids)

    def forced(self, tokenizer: Any, token_ids: Sequence[int]) -> int | None:
        """What follows the first `token_ids` of a completion; None: what the model says."""
        if self.forces_at(len(token_ids)) and self._is_open(tokenizer, token_ids):
            return self.closing_ids[len(token_ids) - self.tokens]
        return None

    def cuts(self, tokenizer: Any, token_ids: Sequence[int]) -> bool:
        """Whether the block of a finished completion was closed for it."""
        return len(token_ids) > self.tokens and self._is_open(tokenizer, token_ids)

    def _is_open(self, tokenizer: Any, token_ids: Sequence[int]) -> bool:
        # As text: a tag may be several tokens, and lie in others than it has by itself.
        text = tokenizer.decode(list(token_ids[: self.tokens]), skip_special_tokens=False)
        text = (self.opening if self.opened else "") + text
        return text.rfind(self.opening) > text.rfind(self.closing)
