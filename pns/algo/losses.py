"""Losses of the policy and of the reward model, as functions of tensors.

Axes: `_T` completion tokens of all rows laid end to end, `_B` rows or pairs. Log-probabilities are natural logs at temperature 1.
Global counts (over all micro-batches and ranks of one optimizer step) come in as arguments, so that the sum of what is returned over
micro-batches and ranks is the mean over the whole batch, however the batch was split. The metrics beside a loss add up in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def grpo_loss(
    log_probs_T: Tensor,
    old_log_probs_T: Tensor,
    ref_log_probs_T: Tensor | None,
    advantages_T: Tensor,
    mask_T: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Group-relative policy optimisation with clip-higher and token-level aggregation.

    With rho = exp(log pi - log pi_old) and d = log pi_ref - log pi,
    `L = sum_t m_t [ -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coefficient (exp(d) - d - 1) ] / num_tokens`:
    the clipped surrogate of arXiv 1707.06347, the group-relative objective and k3 KL penalty of arXiv 2402.03300 (equations 3 and 4), the
    separate upper bound and the mean over tokens of arXiv 2503.14476 (section 3).

    `mask_T` is 1 for tokens that count and 0 for the others; `num_tokens` is its sum over the whole batch. Without `ref_log_probs_T`
    there is no KL term. Returns the loss (a scalar) and `policy_loss`, `kl` (k3, if there is a reference), `clip_fraction` (share of
    tokens whose gradient the clip removed), `ratio` (mean rho), `old_kl` (mean log pi_old - log pi) and `nll` (mean -log pi).
    """
    ratio_T = torch.exp(log_probs_T - old_log_probs_T)
    clipped_T = torch.clamp(ratio_T, 1 - clip_low, 1 + clip_high)
    policy_loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    cut_T = ((ratio_T > 1 + clip_high) & (advantages_T > 0)) | ((ratio_T < 1 - clip_low) & (advantages_T < 0))

    def mean(values_T: Tensor) -> Tensor:
        return (values_T * mask_T).sum() / num_tokens

    loss = mean(policy_loss_T)
    metrics = {
        "policy_loss": loss.detach(),
        "clip_fraction": mean(cut_T.to(mask_T.dtype)),
        "ratio": mean(ratio_T.detach()),
        "old_kl": mean((old_log_probs_T - log_probs_T).detach()),
        "nll": mean(-log_probs_T.detach()),
    }
    if ref_log_probs_T is not None:
        difference_T = ref_log_probs_T - log_probs_T
        kl = mean(torch.exp(difference_T) - difference_T - 1)
        loss = loss + kl_coefficient * kl
        metrics["kl"] = kl.detach()
    return loss, metrics


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation, one loss per pair.

    With the margin h = beta [(log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)],
    `L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)`: arXiv 2305.18290 (equation 7), and for e = `label_smoothing` in [0, 0.5) its
    conservative form (arXiv 2403.00409 compares both).

    The inputs are sums of token log-probabilities over the tokens that take part in the margin. Returns the losses (B,) and, (B,) each,
    `margin` (h), `accuracy` (h > 0), `chosen_reward` and `rejected_reward` (beta times the log-ratio).
    """
    chosen_reward_B = beta * (chosen_B - ref_chosen_B)
    rejected_reward_B = beta * (rejected_B - ref_rejected_B)
    margin_B = chosen_reward_B - rejected_reward_B
    loss_B = -(1 - label_smoothing) * functional.logsigmoid(margin_B) - label_smoothing * functional.logsigmoid(-margin_B)
    return loss_B, {
        "margin": margin_B.detach(),
        "accuracy": (margin_B > 0).to(margin_B.dtype),
        "chosen_reward": chosen_reward_B.detach(),
        "rejected_reward": rejected_reward_B.detach(),
    }


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, centre: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Centre-regularised Bradley-Terry loss of a reward model, one per pair.

    `L = -log sigmoid(r_w - r_l) + centre (r_w + r_l)^2`: arXiv 2203.02155 (equation 1) with the centring term of arXiv 2312.09244, which
    keeps scores symmetric around 0, so that sigmoid(r) can be read as a score in (0, 1).

    Returns the losses (B,) and, (B,) each, `margin` (r_w - r_l), `accuracy` (margin > 0), `chosen_score` and `rejected_score`.
    """
    margin_B = chosen_B - rejected_B
    loss_B = -functional.logsigmoid(margin_B) + centre * (chosen_B + rejected_B) ** 2
    return loss_B, {
        "margin": margin_B.detach(),
        "accuracy": (margin_B > 0).to(margin_B.dtype),
        "chosen_score": chosen_B.detach(),
        "rejected_score": rejected_B.detach(),
    }


def row_sums(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """Sums (B,) over the rows of `values_T`, row b being its next `lengths_B[b]` entries."""
    rows_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=values_T.device), lengths_B)
    return values_T.new_zeros(len(lengths_B)).index_add(0, rows_T, values_T)


def length_normalised_nll(log_probs_T: Tensor, lengths_B: Tensor) -> Tensor:
    """`-log pi(y) / |y|` of each row (B,): the term that RPO adds for the chosen side (arXiv 2404.19733, equation 1)."""
    return -row_sums(log_probs_T, lengths_B) / lengths_B


def sft_loss(log_probs_T: Tensor, mask_T: Tensor, num_tokens: int) -> Tensor:
    """Negative log-likelihood of the tokens in `mask_T`, `-sum_t m_t log pi_t / num_tokens`, as a scalar."""
    return -(log_probs_T * mask_T).sum() / num_tokens
