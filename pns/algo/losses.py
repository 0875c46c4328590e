"""Losses of the policy and of the reward model, as functions of tensors.

Axes: `_T` completion tokens of all rows laid end to end, `_B` rows or pairs. Log-probabilities are natural
logs at temperature 1. Global counts (over all micro-batches and ranks of one optimizer step) come in as
arguments, so that the sum of what is returned over micro-batches and ranks is the mean over the whole batch,
however the batch was split. The metrics beside a loss add up in the same way.

A preference loss is a function of `PairTerms` and its hyper-parameters; `pns.preference_losses` names them.
It returns the losses (B,) and, (B,) each and without gradient, `chosen_reward` and `rejected_reward` (the
implicit rewards of the loss's paper), `margin` (their difference, before any target or offset) and `accuracy`
(1 where margin > 0). A "log-ratio" is log pi - log pi_ref.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pns.config import Constraint

# Of k3, whose exponential would let a single token that is far off decide the whole step.
_MAX_K3 = 10.0
# The same of `bcpg_loss`: of the ratio pi / pi_ref, so that a token that is far off is still drawn back.
_MAX_RATIO = 10.0

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


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
    dual_clip: float = 0.0,
    importance_T: Tensor | None = None,
) -> LossAndMetrics:
    """Group-relative policy optimisation with clip-higher and token-level aggregation.

    With rho = exp(log pi - log pi_old) and d = log pi_ref - log pi, `L = sum_t m_t [ -min(rho A, clip(rho, 1
    - clip_low, 1 + clip_high) A) + kl_coefficient (exp(d) - d - 1) ] / num_tokens`: the clipped surrogate of
    arXiv 1707.06347, the group-relative objective and k3 KL penalty of arXiv 2402.03300 (equations 3 and 4),
    the separate upper bound and the mean over tokens of arXiv 2503.14476 (section 3). k3 counts up to 10 nats
    a token.

    `dual_clip` c > 1 keeps the surrogate of a negative advantage above c A (arXiv 1912.09729, equation 5).
    `importance_T` weighs the surrogate: min(pi_old / pi_rollout, cap) where the log-probabilities of the old
    policy are not those of the engine that sampled.

    `mask_T` is 1 for tokens that count and 0 for the others; `num_tokens` is its sum over the whole batch.
    Without `ref_log_probs_T` there is no KL term. Returns the loss (a scalar) and `policy_loss`, `kl` (k3, if
    there is a reference), `clip_fraction` (share of tokens whose gradient the clip removed), `ratio` (mean
    rho), `old_kl` (mean log pi_old - log pi) and `nll` (mean -log pi).
    """
    ratio_T = torch.exp(log_probs_T - old_log_probs_T)
    clipped_T = torch.clamp(ratio_T, 1 - clip_low, 1 + clip_high)
    surrogate_T = torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    cut_T = ((ratio_T > 1 + clip_high) & (advantages_T > 0)) | ((ratio_T < 1 - clip_low) & (advantages_T < 0))
    if dual_clip:
        floor_T = dual_clip * advantages_T
        too_low_T = (advantages_T < 0) & (surrogate_T < floor_T)
        surrogate_T, cut_T = torch.where(too_low_T, floor_T, surrogate_T), cut_T | too_low_T
    policy_loss_T = -surrogate_T if importance_T is None else -surrogate_T * importance_T

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
        kl = mean(_k3(ref_log_probs_T, log_probs_T))
        loss = loss + kl_coefficient * kl
        metrics["kl"] = kl.detach()
    return loss, metrics


def gspo_loss(
    log_probs_T: Tensor,
    old_log_probs_T: Tensor,
    ref_log_probs_T: Tensor | None,
    advantages_B: Tensor,
    mask_T: Tensor,
    lengths_B: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
    num_rows: int,
    weight_B: Tensor,
) -> LossAndMetrics:
    """Group sequence policy optimisation (arXiv 2507.18071, equations 5 to 7).

    With s = exp(mean over a row's tokens of log pi - log pi_old), `L = sum_b w_b [ -min(s A, clip(s, 1 -
    clip_low, 1 + clip_high) A) ] / num_rows`, and the KL penalty of `grpo_loss` as the mean over rows of the
    mean over their tokens. `mask_T` is 1 for tokens that count; `lengths_B` are all tokens of the rows;
    `weight_B` is 0 for padding. Metrics as `grpo_loss`, `clip_fraction` of rows.
    """
    counts_B = row_sums(mask_T, lengths_B).clamp(min=1)

    def row_means(values_T: Tensor) -> Tensor:
        return row_sums(values_T * mask_T, lengths_B) / counts_B

    def mean(values_B: Tensor) -> Tensor:
        return (values_B * weight_B).sum() / num_rows

    log_ratio_B = row_means(log_probs_T - old_log_probs_T)
    ratio_B = torch.exp(log_ratio_B)
    clipped_B = torch.clamp(ratio_B, 1 - clip_low, 1 + clip_high)
    loss = mean(-torch.minimum(ratio_B * advantages_B, clipped_B * advantages_B))
    cut_B = ((ratio_B > 1 + clip_high) & (advantages_B > 0)) | ((ratio_B < 1 - clip_low) & (advantages_B < 0))
    metrics = {
        "policy_loss": loss.detach(),
        "clip_fraction": mean(cut_B.to(mask_T.dtype)),
        "ratio": mean(ratio_B.detach()),
        "old_kl": mean(-log_ratio_B.detach()),
        "nll": mean(row_means(-log_probs_T.detach())),
    }
    if ref_log_probs_T is not None:
        kl = mean(row_means(_k3(ref_log_probs_T, log_probs_T)))
        loss = loss + kl_coefficient * kl
        metrics["kl"] = kl.detach()
    return loss, metrics


def _k3(ref_log_probs_T: Tensor, log_probs_T: Tensor) -> Tensor:
    difference_T = ref_log_probs_T - log_probs_T
    return torch.clamp(torch.exp(difference_T) - difference_T - 1, max=_MAX_K3)


@dataclass(frozen=True)
class PairTerms:
    """What a preference loss may read of pairs, (B,) each: sums of log-probabilities over the tokens that
    take part in the margin, under the policy and under the reference (`ref_`); how many tokens those are
    (with none, sum and average are 0); `length_normalised_nll` of the whole chosen completion, whatever the
    margin; the reward model's score difference r_w - r_l in log-odds; and `kto_kl` of the whole batch."""

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor
    chosen_nll_B: Tensor
    ref_chosen_B: Tensor | None = None
    ref_rejected_B: Tensor | None = None
    score_gap_B: Tensor | None = None
    kl: float | Tensor = 0.0

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected sides. Raises ValueError without a reference."""
        if self.ref_chosen_B is None or self.ref_rejected_B is None:
            raise ValueError("the loss needs the reference's log-probabilities")
        return self.chosen_B - self.ref_chosen_B, self.rejected_B - self.ref_rejected_B

    def per_token(self, chosen_B: Tensor, rejected_B: Tensor) -> tuple[Tensor, Tensor]:
        """Averages of sums over the tokens of the margin."""
        chosen_average_B = chosen_B / self.chosen_tokens_B.clamp(min=1)  # 0 tokens: the sum is 0 as well
        return chosen_average_B, rejected_B / self.rejected_tokens_B.clamp(min=1)


def dpo_loss(pairs: PairTerms, beta: float, label_smoothing: float = 0.0) -> LossAndMetrics:
    """Direct preference optimisation.

    With the margin h = beta [(log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)], `L = -(1 - e)
    log sigmoid(h) - e log sigmoid(-h)`: arXiv 2305.18290 (equation 7), and for e = `label_smoothing` in [0,
    0.5) its conservative form, cDPO (arXiv 2403.00409 compares both).
    """
    margin_B, metrics = _rewards(beta, pairs.log_ratios())
    kept_B, flipped_B = functional.logsigmoid(margin_B), functional.logsigmoid(-margin_B)
    return -(1 - label_smoothing) * kept_B - label_smoothing * flipped_B, metrics


def robust_dpo_loss(pairs: PairTerms, beta: float, label_smoothing: float) -> LossAndMetrics:
    """Robust DPO: unbiased when the share e = `label_smoothing` in [0, 0.5) of the pairs is swapped.

    With the margin h of `dpo_loss`, `L = [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e)`: arXiv
    2403.00409 (section 3.1). It is negative for large margins and not bounded from below.
    """
    margin_B, metrics = _rewards(beta, pairs.log_ratios())
    kept_B, flipped_B = -functional.logsigmoid(margin_B), -functional.logsigmoid(-margin_B)
    loss_B = ((1 - label_smoothing) * kept_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)
    return loss_B, metrics


def hinge_loss(pairs: PairTerms, beta: float) -> LossAndMetrics:
    """Hinge loss of sequence likelihood calibration (SLiC, arXiv 2305.10425, section 2.2) on log-ratios.

    With the margin h of `dpo_loss`, `L = max(0, 1 - h)`: arXiv 2309.06657 (section 3.2, hinge-norm).
    """
    margin_B, metrics = _rewards(beta, pairs.log_ratios())
    return functional.relu(1 - margin_B), metrics


def offset_dpo_loss(pairs: PairTerms, beta: float, offset_scale: float) -> LossAndMetrics:
    """DPO with an offset: the margin has to exceed what the reward model says the pair is apart.

    With the margin h of `dpo_loss` and the reward model's score difference g = r_w - r_l (`score_gap_B`, in
    log-odds), `L = -log sigmoid(h - offset_scale max(g, 0))`: arXiv 2402.10571 (section 4), with the identity
    as the increasing function of the gap instead of its logarithm, so that a gap of 0 gives DPO. The paper
    orders a pair by its scores; here a verifier did, so a reward model that prefers the rejected side (g < 0)
    is overruled and the pair has no offset. The `margin` metric is h. Raises ValueError without scores.
    """
    if pairs.score_gap_B is None:
        raise ValueError("the loss needs the reward model's score differences")
    margin_B, metrics = _rewards(beta, pairs.log_ratios())
    offset_B = offset_scale * pairs.score_gap_B.clamp(min=0)  # the verifier overrules the reward model
    return -functional.logsigmoid(margin_B - offset_B), metrics


def rpo_loss(pairs: PairTerms, beta: float, nll_weight: float) -> LossAndMetrics:
    """`dpo_loss` plus `nll_weight` times the chosen side's NLL a token (arXiv 2404.19733, equation 1)."""
    loss_B, metrics = dpo_loss(pairs, beta)
    return loss_B + nll_weight * pairs.chosen_nll_B, metrics


def chosen_nll_loss(pairs: PairTerms) -> LossAndMetrics:
    """The chosen side's NLL a token alone: what the rejected sides are compared with (rejection-sampling
    fine-tuning, arXiv 2308.01825). The margin's metrics are of log-probabilities, as it has no reference."""
    _, metrics = _rewards(1.0, (pairs.chosen_B, pairs.rejected_B))
    return pairs.chosen_nll_B, metrics


def length_normalised_dpo_loss(pairs: PairTerms, beta: float) -> LossAndMetrics:
    """DPO on log-ratios per token: `L = -log sigmoid(h)`, h = beta [log-ratio(chosen) / |chosen| -
    log-ratio(rejected) / |rejected|]: arXiv 2411.15124 (section 5.1)."""
    margin_B, metrics = _rewards(beta, pairs.per_token(*pairs.log_ratios()))
    return -functional.logsigmoid(margin_B), metrics


def ipo_loss(pairs: PairTerms, beta: float) -> LossAndMetrics:
    """Identity preference optimisation: the margin is regressed on 1 / (2 beta), not pushed up for ever.

    `L = (log-ratio(chosen) / |chosen| - log-ratio(rejected) / |rejected| - 1 / (2 beta))^2`: arXiv 2310.12036
    (equation 17, tau = `beta`). The paper's log-ratios are of whole sequences; per token, as here and in TRL,
    the target does not depend on the length.
    """
    chosen_average_B, rejected_average_B = averages = pairs.per_token(*pairs.log_ratios())
    loss_B = (chosen_average_B - rejected_average_B - 1 / (2 * beta)) ** 2
    return loss_B, _rewards(beta, averages)[1]


def simpo_loss(pairs: PairTerms, beta: float, target_margin: float) -> LossAndMetrics:
    """Simple preference optimisation, without a reference.

    `L = -log sigmoid(beta log pi(chosen) / |chosen| - beta log pi(rejected) / |rejected| - target_margin)`:
    arXiv 2405.14734 (equation 6, gamma = `target_margin`).
    """
    margin_B, metrics = _rewards(beta, pairs.per_token(pairs.chosen_B, pairs.rejected_B))
    return -functional.logsigmoid(margin_B - target_margin), metrics


def orpo_loss(pairs: PairTerms, odds_ratio_weight: float) -> LossAndMetrics:
    """Odds ratio preference optimisation: supervised learning of the chosen side and a preference for it.

    With p = exp(log pi(y) / |y|) and odds(y) = p / (1 - p), `L = chosen_nll - odds_ratio_weight log
    sigmoid(log odds(chosen) - log odds(rejected))`: arXiv 2403.07691 (equations 4, 6 and 7, lambda =
    `odds_ratio_weight`). The paper defines no reward; as in TRL it is lambda log p. p stays below 1 by the
    dtype's epsilon, which keeps the odds and their gradient finite.
    """
    chosen_average_B, rejected_average_B = averages = pairs.per_token(pairs.chosen_B, pairs.rejected_B)
    ratio_loss_B = -functional.logsigmoid(_log_odds(chosen_average_B) - _log_odds(rejected_average_B))
    _, metrics = _rewards(odds_ratio_weight, averages)
    return pairs.chosen_nll_B + odds_ratio_weight * ratio_loss_B, metrics


def kto_loss(
    pairs: PairTerms, beta: float, desirable_weight: float, undesirable_weight: float
) -> LossAndMetrics:
    """Kahneman-Tversky optimisation: the mean over a pair as a desirable and an undesirable example.

    With the log-ratios d and the reference point z = `kl` (`kto_kl`, in nats, before beta), `L_w = lambda_D
    (1 - sigmoid(beta (d_w - z)))`, `L_l = lambda_U (1 - sigmoid(beta (z - d_l)))`, `L = (L_w + L_l) / 2`:
    arXiv 2402.01306 (section 4.1, equation 7).
    """
    chosen_ratio_B, rejected_ratio_B = ratios = pairs.log_ratios()
    desirable_B = desirable_weight * torch.sigmoid(beta * (pairs.kl - chosen_ratio_B))
    undesirable_B = undesirable_weight * torch.sigmoid(beta * (rejected_ratio_B - pairs.kl))
    _, metrics = _rewards(beta, ratios)
    return (desirable_B + undesirable_B) / 2, metrics


def kto_kl(log_ratios_B: Tensor) -> Tensor:
    """KTO's reference point, an estimate of KL(pi || pi_ref) as a scalar without gradient: `max(0, mean)` of
    the log-ratios of prompts with another prompt's completion, (x_i, y_j), over the whole batch, at least one
    row (arXiv 2402.01306, section 4.1)."""
    return log_ratios_B.detach().mean().clamp(min=0)


def _log_odds(log_p_B: Tensor) -> Tensor:
    """`log p - log(1 - p)`."""
    # Each formula of log(1 - p) is exact on its own side of p = 1/2 (Maechler, "Accurately computing log(1 -
    # exp(-|a|))", 2012); at p = 1 both would be infinite.
    log_p_B = log_p_B.clamp(max=-torch.finfo(log_p_B.dtype).eps)
    complement_B = torch.where(
        log_p_B < -math.log(2), torch.log1p(-torch.exp(log_p_B)), torch.log(-torch.expm1(log_p_B))
    )
    return log_p_B - complement_B


def _rewards(scale: float, sides: tuple[Tensor, Tensor]) -> LossAndMetrics:
    """The margin, with its gradient, and the metrics of every preference loss; rewards are scaled sides."""
    chosen_reward_B, rejected_reward_B = scale * sides[0], scale * sides[1]
    margin_B = chosen_reward_B - rejected_reward_B
    return margin_B, {
        "margin": margin_B.detach(),
        "accuracy": (margin_B > 0).to(margin_B.dtype),
        "chosen_reward": chosen_reward_B.detach(),
        "rejected_reward": rejected_reward_B.detach(),
    }


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, centre: float) -> LossAndMetrics:
    """Centre-regularised Bradley-Terry loss of a reward model, one per pair.

    `L = -log sigmoid(r_w - r_l) + centre (r_w + r_l)^2`: arXiv 2203.02155 (equation 1) with the centring term
    of arXiv 2312.09244, which keeps scores symmetric around 0, so that sigmoid(r) is a score in (0, 1). The
    metrics are `margin` (r_w - r_l), `accuracy` (margin > 0), `chosen_score` and `rejected_score`.
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
    """`-log pi(y) / |y|` of each row (B,): what RPO adds for the chosen side."""
    return -row_sums(log_probs_T, lengths_B) / lengths_B


def sft_loss(log_probs_T: Tensor, mask_T: Tensor, num_tokens: int) -> Tensor:
    """Negative log-likelihood of the tokens in `mask_T`, `-sum_t m_t log pi_t / num_tokens`, as a scalar."""
    return -(log_probs_T * mask_T).sum() / num_tokens


def bcpg_loss(
    log_probs_T: Tensor,
    ref_log_probs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    beta: float,
    constraint: Constraint,
    num_tokens: int,
) -> LossAndMetrics:
    """Behaviour-constrained policy gradient on samples of pi_ref: a reconstruction of the objective of
    BCPG-NSA (arXiv 2505.14403), whose advantages `pns.algo.offline.token_advantages` gives.

    With d = log pi - log pi_ref, `L = sum_t m_t [ -A log pi + beta c(d) ] / num_tokens`, where c(d) is
    d^2 / 2 (`squared_log_ratio`) or e^d - d - 1 (`kl`). The gradient is `-sum_t m_t [ A - beta c'(d) ] grad
    log pi / num_tokens`. Under squared_log_ratio a token in isolation has its optimum at log pi = log pi_ref
    + A / beta: finite for every A, where plain policy gradient on a negative has none. At pi = pi_ref c and
    c' are 0.

    kl is k3 (http://joschu.net/blog/kl-approx.html) for samples of pi_ref: its mean is KL(pi_ref || pi), not
    the KL(pi || pi_ref) of `grpo_loss`, whose formula has that mean on samples of pi alone. Near pi_ref it is
    squared_log_ratio. Its optimum d = log(1 + A / beta) exists for A > -beta alone: below that nothing ends
    the fall of a token, as KL(pi_ref || pi) grows with -log pi like the objective itself. e^d counts up to
    10, and from there on linearly in d.

    `mask_T` is 1 for tokens that count, `num_tokens` its sum over the whole batch. Returns the loss (a
    scalar) and `policy_loss`, `constraint` (the mean of c) and what `_by_sign` gives.
    """
    log_ratio_T = log_probs_T - ref_log_probs_T
    if constraint is Constraint.squared_log_ratio:
        constraint_T = log_ratio_T**2 / 2
    else:
        constraint_T = _truncated_ratio(log_ratio_T, _MAX_RATIO) - log_ratio_T - 1
    policy_loss = -(advantages_T * log_probs_T * mask_T).sum() / num_tokens
    mean_constraint = (constraint_T * mask_T).sum() / num_tokens
    metrics = {"policy_loss": policy_loss.detach(), "constraint": mean_constraint.detach()}
    metrics |= _by_sign(log_probs_T, ref_log_probs_T, advantages_T, mask_T, num_tokens)
    return policy_loss + beta * mean_constraint, metrics


def weighted_reinforce_loss(
    log_probs_T: Tensor,
    ref_log_probs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    max_ratio: float,
    num_tokens: int,
) -> LossAndMetrics:
    """REINFORCE with signed weights (W-REINFORCE: lambda PSR + NSR, arXiv 2506.01347) on samples of pi_ref.

    The paper samples from the policy that it updates. Here old samples stand for those of pi by the ratio rho
    = pi / pi_ref of each token: the gradient is `-sum_t m_t A min(rho, max_ratio) grad log pi / num_tokens`,
    of `L = -sum_t m_t A f(rho) / num_tokens` with f(rho) = rho up to `max_ratio` and max_ratio (1 + log rho -
    log max_ratio) beyond. For A < 0 L is bounded from below, as rho and its gradient go to 0 with pi: it has
    no constraint. The ratio is a token's, as in arXiv 1707.06347: what stands before it is as it was sampled.

    Arguments as `bcpg_loss`; `max_ratio` >= 1. Returns the loss (a scalar) and `policy_loss`, `truncated`
    (share of tokens with rho above `max_ratio`) and what `_by_sign` gives.
    """
    log_ratio_T = log_probs_T - ref_log_probs_T
    loss = -(advantages_T * _truncated_ratio(log_ratio_T, max_ratio) * mask_T).sum() / num_tokens
    truncated_T = (log_ratio_T > math.log(max_ratio)).to(mask_T.dtype)
    metrics = {"policy_loss": loss.detach(), "truncated": (truncated_T * mask_T).sum() / num_tokens}
    metrics |= _by_sign(log_probs_T, ref_log_probs_T, advantages_T, mask_T, num_tokens)
    return loss, metrics


def _truncated_ratio(log_ratio_T: Tensor, max_ratio: float) -> Tensor:
    """The function of the log-ratio whose derivative is min(ratio, max_ratio): the ratio up to `max_ratio`,
    beyond it linear in the log-ratio."""
    log_max = math.log(max_ratio)
    return torch.exp(log_ratio_T.clamp(max=log_max)) + max_ratio * functional.relu(log_ratio_T - log_max)


def _by_sign(
    log_probs_T: Tensor, ref_log_probs_T: Tensor, advantages_T: Tensor, mask_T: Tensor, num_tokens: int
) -> dict[str, Tensor]:
    """`advantage_positive` and `advantage_negative`, shares of tokens with such an advantage; `log_ratio`,
    its mean over all tokens; and, with names that begin with _, parts of means over the tokens of one sign,
    which have to be divided by its share: a quotient cannot be added up over micro-batches."""
    log_ratio_T = (log_probs_T - ref_log_probs_T).detach()
    positive_T, negative_T = ((sign * advantages_T > 0).to(mask_T.dtype) for sign in (1, -1))

    def mean(values_T: Tensor) -> Tensor:
        return (values_T * mask_T).sum() / num_tokens

    return {
        "log_ratio": mean(log_ratio_T),
        "advantage_positive": mean(positive_T),
        "advantage_negative": mean(negative_T),
        "_positive_log_ratio": mean(log_ratio_T * positive_T),
        "_negative_log_ratio": mean(log_ratio_T * negative_T),
        "_positive_nll": mean(-log_probs_T.detach() * positive_T),
    }


def step_label_loss(scores_B: Tensor, labels_B: Tensor) -> LossAndMetrics:
    """Binary cross-entropy of a process reward model, one per row, which ends with the step that is graded.

    `L = -l log sigmoid(s) - (1 - l) log sigmoid(-s)` for the score s at the step's end and its label l, 1 for
    correct, 0 for wrong: arXiv 2305.20050 (section 2.6). The metrics are `accuracy` (of s > 0 as the label)
    and `correct_share` (l).
    """
    loss_B = functional.binary_cross_entropy_with_logits(scores_B, labels_B, reduction="none")
    right_B = (scores_B > 0) == (labels_B > 0.5)
    return loss_B, {"accuracy": right_B.to(scores_B.dtype), "correct_share": labels_B}
