"""Losses of the policy and of the reward model, as functions of tensors.

Axes: `_T` completion tokens of all rows laid end to end, `_B` rows or pairs. Log-probabilities are natural
logs at temperature 1. Global counts (over all micro-batches and ranks of one optimizer step) come in as
arguments, so that the sum of what is returned over micro-batches and ranks is the mean over the whole batch,
however the batch was split. The metrics beside a loss add up in the same way.

Preference losses take `chosen_B`, `rejected_B`: sums of log-probabilities over the tokens that take part in
the margin; `ref_chosen_B`, `ref_rejected_B`: the same under the reference policy; `chosen_tokens_B`,
`rejected_tokens_B`: how many tokens those are (with none, sum and average are 0); `chosen_nll_B`:
`length_normalised_nll` of the whole chosen completion, whatever the margin. They return the losses (B,) and,
(B,) each and without gradient, `chosen_reward` and `rejected_reward` (the implicit rewards of the loss's
paper), `margin` (their difference, before any target or offset) and `accuracy` (1 where margin > 0). A
"log-ratio" is log pi - log pi_ref.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pns import config


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

    With rho = exp(log pi - log pi_old) and d = log pi_ref - log pi, `L = sum_t m_t [ -min(rho A, clip(rho, 1
    - clip_low, 1 + clip_high) A) + kl_coefficient (exp(d) - d - 1) ] / num_tokens`: the clipped surrogate of
    arXiv 1707.06347, the group-relative objective and k3 KL penalty of arXiv 2402.03300 (equations 3 and 4),
    the separate upper bound and the mean over tokens of arXiv 2503.14476 (section 3).

    `mask_T` is 1 for tokens that count and 0 for the others; `num_tokens` is its sum over the whole batch.
    Without `ref_log_probs_T` there is no KL term. Returns the loss (a scalar) and `policy_loss`, `kl` (k3, if
    there is a reference), `clip_fraction` (share of tokens whose gradient the clip removed), `ratio` (mean
    rho), `old_kl` (mean log pi_old - log pi) and `nll` (mean -log pi).
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
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation.

    With the margin h = beta [(log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)], `L = -(1 - e)
    log sigmoid(h) - e log sigmoid(-h)`: arXiv 2305.18290 (equation 7), and for e = `label_smoothing` in [0,
    0.5) its conservative form, cDPO (arXiv 2403.00409 compares both).
    """
    chosen_reward_B = beta * (chosen_B - ref_chosen_B)
    rejected_reward_B = beta * (rejected_B - ref_rejected_B)
    margin_B = chosen_reward_B - rejected_reward_B
    loss_B = -(1 - label_smoothing) * functional.logsigmoid(
        margin_B
    ) - label_smoothing * functional.logsigmoid(-margin_B)
    return loss_B, _rewards(chosen_reward_B, rejected_reward_B)


def robust_dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Robust DPO: unbiased when the share e = `label_smoothing` in [0, 0.5) of the pairs has its sides
    swapped.

    With the margin h of `dpo_loss`, `L = [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e)`: arXiv
    2403.00409 (section 3.1). It is negative for large margins and not bounded from below.
    """
    chosen_reward_B = beta * (chosen_B - ref_chosen_B)
    rejected_reward_B = beta * (rejected_B - ref_rejected_B)
    margin_B = chosen_reward_B - rejected_reward_B
    kept_B, flipped_B = -functional.logsigmoid(margin_B), -functional.logsigmoid(-margin_B)
    loss_B = ((1 - label_smoothing) * kept_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)
    return loss_B, _rewards(chosen_reward_B, rejected_reward_B)


def hinge_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss of sequence likelihood calibration (SLiC, arXiv 2305.10425, section 2.2) on log-ratios.

    With the margin h of `dpo_loss`, `L = max(0, 1 - h)`: arXiv 2309.06657 (section 3.2, hinge-norm). No
    gradient from h = 1 on.
    """
    chosen_reward_B = beta * (chosen_B - ref_chosen_B)
    rejected_reward_B = beta * (rejected_B - ref_rejected_B)
    return functional.relu(1 - (chosen_reward_B - rejected_reward_B)), _rewards(
        chosen_reward_B, rejected_reward_B
    )


def offset_dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    score_gap_B: Tensor,
    beta: float,
    offset_scale: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO with an offset: the margin has to exceed what the reward model says the pair is apart.

    With the margin h of `dpo_loss` and the reward model's score difference g = r_w - r_l (`score_gap_B`, in
    log-odds), `L = -log sigmoid(h - offset_scale max(g, 0))`: arXiv 2402.10571 (section 4), with the identity
    as the increasing function of the gap instead of its logarithm, so that a gap of 0 gives DPO. The paper
    orders a pair by its scores; here a verifier did, so a reward model that prefers the rejected side (g < 0)
    is overruled and the pair has no offset. The `margin` metric is h.
    """
    chosen_reward_B = beta * (chosen_B - ref_chosen_B)
    rejected_reward_B = beta * (rejected_B - ref_rejected_B)
    offset_B = offset_scale * score_gap_B.clamp(min=0)
    return -functional.logsigmoid(chosen_reward_B - rejected_reward_B - offset_B), _rewards(
        chosen_reward_B, rejected_reward_B
    )


def rpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    chosen_nll_B: Tensor,
    beta: float,
    nll_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`dpo_loss` plus `nll_weight` times the length-normalised NLL of the chosen completion: arXiv 2404.19733
    (equation 1)."""
    loss_B, metrics = dpo_loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    return loss_B + nll_weight * chosen_nll_B, metrics


def length_normalised_dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO on log-ratios per token: `L = -log sigmoid(h)`, h = beta [log-ratio(chosen) / |chosen| -
    log-ratio(rejected) / |rejected|]: arXiv 2411.15124 (section 5.1)."""
    chosen_reward_B = beta * _average(chosen_B - ref_chosen_B, chosen_tokens_B)
    rejected_reward_B = beta * _average(rejected_B - ref_rejected_B, rejected_tokens_B)
    return -functional.logsigmoid(chosen_reward_B - rejected_reward_B), _rewards(
        chosen_reward_B, rejected_reward_B
    )


def ipo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Identity preference optimisation: a margin is regressed on 1 / (2 beta) instead of being pushed up for
    ever.

    `L = (log-ratio(chosen) / |chosen| - log-ratio(rejected) / |rejected| - 1 / (2 beta))^2`: arXiv 2310.12036
    (equation 17, tau = `beta`). The paper's log-ratios are of whole sequences; per token, as here and in TRL,
    the target does not depend on the length.
    """
    chosen_average_B = _average(chosen_B - ref_chosen_B, chosen_tokens_B)
    rejected_average_B = _average(rejected_B - ref_rejected_B, rejected_tokens_B)
    loss_B = (chosen_average_B - rejected_average_B - 1 / (2 * beta)) ** 2
    return loss_B, _rewards(beta * chosen_average_B, beta * rejected_average_B)


def simpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    beta: float,
    target_margin: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Simple preference optimisation, without a reference.

    `L = -log sigmoid(beta log pi(chosen) / |chosen| - beta log pi(rejected) / |rejected| - target_margin)`:
    arXiv 2405.14734 (equation 6, gamma = `target_margin`).
    """
    chosen_reward_B = beta * _average(chosen_B, chosen_tokens_B)
    rejected_reward_B = beta * _average(rejected_B, rejected_tokens_B)
    return -functional.logsigmoid(chosen_reward_B - rejected_reward_B - target_margin), _rewards(
        chosen_reward_B, rejected_reward_B
    )


def orpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    chosen_nll_B: Tensor,
    odds_ratio_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Odds ratio preference optimisation, without a reference: supervised learning of the chosen side plus a
    preference for it.

    With p = exp(log pi(y) / |y|) and odds(y) = p / (1 - p), `L = chosen_nll - odds_ratio_weight log
    sigmoid(log odds(chosen) - log odds(rejected))`: arXiv 2403.07691 (equations 4, 6 and 7, lambda =
    `odds_ratio_weight`). The paper defines no reward; as in TRL it is lambda log p. p stays below 1 by the
    dtype's epsilon, which keeps the odds and their gradient finite.
    """
    chosen_average_B = _average(chosen_B, chosen_tokens_B)
    rejected_average_B = _average(rejected_B, rejected_tokens_B)
    ratio_loss_B = -functional.logsigmoid(_log_odds(chosen_average_B) - _log_odds(rejected_average_B))
    rewards = _rewards(odds_ratio_weight * chosen_average_B, odds_ratio_weight * rejected_average_B)
    return chosen_nll_B + odds_ratio_weight * ratio_loss_B, rewards


def kto_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    kl: float | Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman-Tversky optimisation of a pair split into a desirable and an undesirable example; their losses
    are averaged.

    With the log-ratios d and the reference point z = `kl` (`kto_kl`, in nats, before beta), `L_w = lambda_D
    (1 - sigmoid(beta (d_w - z)))`, `L_l = lambda_U (1 - sigmoid(beta (z - d_l)))`, `L = (L_w + L_l) / 2`:
    arXiv 2402.01306 (section 4.1, equation 7).
    """
    chosen_ratio_B, rejected_ratio_B = chosen_B - ref_chosen_B, rejected_B - ref_rejected_B
    desirable_B = desirable_weight * torch.sigmoid(beta * (kl - chosen_ratio_B))
    undesirable_B = undesirable_weight * torch.sigmoid(beta * (rejected_ratio_B - kl))
    return (desirable_B + undesirable_B) / 2, _rewards(beta * chosen_ratio_B, beta * rejected_ratio_B)


def kto_kl(log_ratios_B: Tensor) -> Tensor:
    """KTO's reference point, an estimate of KL(pi || pi_ref) as a scalar without gradient: `max(0, mean)` of
    the log-ratios of prompts with another prompt's completion, (x_i, y_j), over the whole batch, at least one
    row (arXiv 2402.01306, section 4.1)."""
    return log_ratios_B.detach().mean().clamp(min=0)


def preference_loss(
    settings: config.PreferenceConfig,
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor | None,
    ref_rejected_B: Tensor | None,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    chosen_nll_B: Tensor,
    score_gap_B: Tensor | None,
    kl: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `settings.loss` names, with its hyper-parameters.

    Only the losses that are not `config.reference_free` read the reference, only `offset` reads `score_gap_B`
    (the reward model's r_w - r_l) and only `kto` reads `kl` (`kto_kl` of the whole batch). Raises ValueError
    when one that is read is missing.
    """
    loss, values = settings.loss, config.hyper_parameters(settings)
    policy = (chosen_B, rejected_B)
    tokens = (chosen_tokens_B, rejected_tokens_B)
    if loss is config.PreferenceLoss.simpo:
        return simpo_loss(*policy, *tokens, **values)
    if loss is config.PreferenceLoss.orpo:
        return orpo_loss(*policy, *tokens, chosen_nll_B, **values)
    if ref_chosen_B is None or ref_rejected_B is None:
        raise ValueError(f"{loss.value} needs the reference's log-probabilities")
    sums = (*policy, ref_chosen_B, ref_rejected_B)
    match loss:
        case config.PreferenceLoss.sigmoid | config.PreferenceLoss.cdpo:
            return dpo_loss(*sums, **values)
        case config.PreferenceLoss.robust:
            return robust_dpo_loss(*sums, **values)
        case config.PreferenceLoss.hinge:
            return hinge_loss(*sums, **values)
        case config.PreferenceLoss.ipo:
            return ipo_loss(*sums, *tokens, **values)
        case config.PreferenceLoss.length_normalised:
            return length_normalised_dpo_loss(*sums, *tokens, **values)
        case config.PreferenceLoss.kto:
            return kto_loss(*sums, kl, **values)
        case config.PreferenceLoss.rpo:
            return rpo_loss(*sums, chosen_nll_B, **values)
        case config.PreferenceLoss.offset:
            if score_gap_B is None:
                raise ValueError("offset needs the reward model's score differences")
            return offset_dpo_loss(*sums, score_gap_B, **values)


def _average(sums_B: Tensor, tokens_B: Tensor) -> Tensor:
    return sums_B / tokens_B.clamp(min=1)


def _log_odds(log_p_B: Tensor) -> Tensor:
    """`log p - log(1 - p)`, exact on both sides of p = 1/2."""
    log_p_B = log_p_B.clamp(max=-torch.finfo(log_p_B.dtype).eps)
    complement_B = torch.where(
        log_p_B < -math.log(2), torch.log1p(-torch.exp(log_p_B)), torch.log(-torch.expm1(log_p_B))
    )
    return log_p_B - complement_B


def _rewards(chosen_reward_B: Tensor, rejected_reward_B: Tensor) -> dict[str, Tensor]:
    margin_B = (chosen_reward_B - rejected_reward_B).detach()
    return {
        "margin": margin_B,
        "accuracy": (margin_B > 0).to(margin_B.dtype),
        "chosen_reward": chosen_reward_B.detach(),
        "rejected_reward": rejected_reward_B.detach(),
    }


def bradley_terry_loss(
    chosen_B: Tensor, rejected_B: Tensor, centre: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Centre-regularised Bradley-Terry loss of a reward model, one per pair.

    `L = -log sigmoid(r_w - r_l) + centre (r_w + r_l)^2`: arXiv 2203.02155 (equation 1) with the centring term
    of arXiv 2312.09244, which keeps scores symmetric around 0, so that sigmoid(r) can be read as a score in
    (0, 1).

    Returns the losses (B,) and, (B,) each, `margin` (r_w - r_l), `accuracy` (margin > 0), `chosen_score` and
    `rejected_score`.
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
    """`-log pi(y) / |y|` of each row (B,): the term that RPO adds for the chosen side (arXiv 2404.19733,
    equation 1)."""
    return -row_sums(log_probs_T, lengths_B) / lengths_B


def sft_loss(log_probs_T: Tensor, mask_T: Tensor, num_tokens: int) -> Tensor:
    """Negative log-likelihood of the tokens in `mask_T`, `-sum_t m_t log pi_t / num_tokens`, as a scalar."""
    return -(log_probs_T * mask_T).sum() / num_tokens
