"""Log-probabilities of chosen tokens from hidden states, without the logits of all of them at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pns.errors import UserError
from workers.sizes import PIECE_LOGITS


class LogProbHead(torch.nn.Module):
    """The head of a language model, giving log-probabilities of chosen tokens instead of logits; `ask` before
    the forward pass. It holds the head's own weight under the same name."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        if head.bias is not None:
            raise UserError("language-model heads with a bias are not supported")
        self.weight = head.weight

    def ask(self, predictors_C: Tensor, labels_C: Tensor, temperature: float = 1.0) -> None:
        """For the log-probabilities of `labels_C` as predicted at the places `predictors_C`, counted over all
        rows of hidden states, from logits divided by `temperature`."""
        self._asked = predictors_C, labels_C, temperature

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Natural-log probabilities (C,) float32."""
        predictors_C, labels_C, temperature = self._asked
        hidden_CH = hidden_BSH.flatten(0, 1).index_select(0, predictors_C)
        return _LogProbs.apply(hidden_CH, self.weight, labels_C, temperature)


class _LogProbs(torch.autograd.Function):
    """Log-softmax of a linear map over the temperature at one label per row, piece by piece: the logits of a
    piece are computed again in the backward pass, so that those of all rows are never held. The gradient of
    log p_y with respect to the logits is (onehot(y) - p) / temperature."""

    @staticmethod
    def forward(
        ctx: Any, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, temperature: float
    ) -> Tensor:
        ctx.size = max(1, PIECE_LOGITS[hidden_CH.device.type] // len(weight_VH))
        log_probs_C, normalisers_C = hidden_CH.new_empty(2, len(hidden_CH), dtype=torch.float32)
        for rows in _pieces(len(hidden_CH), ctx.size):
            logits = (hidden_CH[rows].to(weight_VH.dtype) @ weight_VH.T).float().div_(temperature)
            log_probs_C[rows] = -cross_entropy(logits, labels_C[rows], reduction="none")
            normalisers_C[rows] = logits.gather(-1, labels_C[rows, None]).squeeze(-1) - log_probs_C[rows]
        ctx.temperature = temperature
        ctx.save_for_backward(hidden_CH, weight_VH, labels_C, normalisers_C)
        return log_probs_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        gradient_C = gradients[0] / ctx.temperature
        hidden_CH, weight_VH, labels_C, normalisers_C = ctx.saved_tensors
        hidden_gradient_CH = torch.empty_like(hidden_CH)
        weight_gradient_VH = None
        if ctx.needs_input_grad[1]:  # summed in float32: the pieces are many
            weight_gradient_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for rows in _pieces(len(hidden_CH), ctx.size):
            hidden = hidden_CH[rows].to(weight_VH.dtype)
            logits = (hidden @ weight_VH.T).float().div_(ctx.temperature)
            # The gradient of the logits, in their place: (onehot(y) - p) times that of log p_y.
            logits.sub_(normalisers_C[rows, None]).exp_().mul_(-gradient_C[rows, None])
            logits.scatter_add_(-1, labels_C[rows, None], gradient_C[rows, None])
            logits = logits.to(weight_VH.dtype)
            hidden_gradient_CH[rows] = (logits @ weight_VH).to(hidden_CH.dtype)
            if weight_gradient_VH is None:
                continue
            if weight_VH.dtype == torch.float32:  # in place, which takes one dtype only
                weight_gradient_VH.addmm_(logits.T, hidden)
            else:
                weight_gradient_VH += logits.T @ hidden
        if weight_gradient_VH is not None:
            weight_gradient_VH = weight_gradient_VH.to(weight_VH.dtype)
        return hidden_gradient_CH, weight_gradient_VH, None, None


def _pieces(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
