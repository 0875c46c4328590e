"""What a policy is trained on: one frozen class an objective, over plain tensors.

`compute(outputs, data)` takes what the model gave for the rows of a micro-batch (`log_probs` (C,) of the
completion tokens, rows end to end, or `scores` (B,) of the rows) and what stands beside them: the values of
`Batch`, `completion_lengths` and `weight` (B,), and the counts of the whole batch, `num_tokens` and
`num_groups`. It returns the loss and metrics without gradient, scalars that add up over micro-batches to the
means over the whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pns.algo import losses
from pns.algo.losses import LossAndMetrics
from pns.config import Constraint
from pns.errors import UserError
from pns.preference_losses import PREFERENCE_LOSSES
from workers.training.batching import Batch

Head = Literal["language_model", "score"]


@dataclass(frozen=True)
class GrpoObjective:
    """`pns.algo.losses.grpo_loss`; the mean is over the tokens in `mask`."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    dual_clip: float = 0.0
    temperature: float = 1.0  # of the log-probabilities
    group_size = 1
    head: ClassVar[Head] = "language_model"
    needs = ("old_log_probs", "advantages")

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        return losses.grpo_loss(
            log_probs_T=outputs["log_probs"],
            old_log_probs_T=data["old_log_probs"],
            ref_log_probs_T=data.get("ref_log_probs", None),
            advantages_T=torch.repeat_interleave(data["advantages"], data["completion_lengths"]),
            mask_T=data["mask"],
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coefficient=self.kl_coefficient,
            num_tokens=data["num_tokens"],
            dual_clip=self.dual_clip,
            importance_T=data.get("importance", None),
        )


@dataclass(frozen=True)
class GspoObjective:
    """`pns.algo.losses.gspo_loss`; the mean is over rows."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    temperature: float = 1.0  # of the log-probabilities
    group_size = 1
    head: ClassVar[Head] = "language_model"
    needs = ("old_log_probs", "advantages")

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        return losses.gspo_loss(
            log_probs_T=outputs["log_probs"],
            old_log_probs_T=data["old_log_probs"],
            ref_log_probs_T=data.get("ref_log_probs", None),
            advantages_B=data["advantages"],
            mask_T=data["mask"],
            lengths_B=data["completion_lengths"],
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coefficient=self.kl_coefficient,
            num_rows=data["num_groups"],
            weight_B=data["weight"],
        )


@dataclass(frozen=True)
class PreferenceObjective:
    """The loss named `loss` in `pns.preference_losses` with every hyper-parameter that it reads; the mean is
    over pairs. `kl` is `estimate_kl` for the whole batch, unused by most losses."""

    loss: str
    hyper_parameters: Mapping[str, float] = field(default_factory=dict)
    kl: float = 0.0
    temperature = 1.0
    group_size = 2
    head: ClassVar[Head] = "language_model"

    @property
    def needs(self) -> tuple[str, ...]:
        entry = PREFERENCE_LOSSES[self.loss]
        reference = ("ref_log_probs",) if entry.needs_reference else ()
        return (*reference, "score_gap") if entry.needs_score_gaps else reference

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        log_probs_T, lengths_B = outputs["log_probs"], data["completion_lengths"]
        ref_T = data.get("ref_log_probs", None)
        nll_B = losses.length_normalised_nll(log_probs_T, lengths_B)
        pairs = self._pair_terms(log_probs_T, ref_T, nll_B[::2], data)
        loss_B, metrics_B = PREFERENCE_LOSSES[self.loss].function(pairs, **self.hyper_parameters)
        log_probs_T = log_probs_T.detach()
        chosen_B, rejected_B = _side_sums(log_probs_T, lengths_B)
        metrics_B |= {"chosen_nll": nll_B[::2].detach(), "rejected_nll": nll_B[1::2].detach()}
        metrics_B |= {"chosen_log_prob": chosen_B, "rejected_log_prob": rejected_B}
        if ref_T is not None:
            ref_chosen_B, _ = _side_sums(ref_T, lengths_B)
            metrics_B["chosen_log_ratio"] = chosen_B - ref_chosen_B
            difference_T = ref_T - log_probs_T
            k3_B = losses.row_sums(torch.exp(difference_T) - difference_T - 1, lengths_B) / lengths_B
            metrics_B["kl"] = k3_B.view(-1, 2).mean(-1)
        metrics_B |= _length_moments(metrics_B["margin"], lengths_B)
        return _mean_over_pairs(loss_B, metrics_B, data)

    def _pair_terms(
        self, log_probs_T: Tensor, ref_T: Tensor | None, chosen_nll_B: Tensor, data: Mapping[str, Any]
    ) -> losses.PairTerms:
        lengths_B = data["completion_lengths"]
        margin_T = data["margin_mask"] if "margin_mask" in data else torch.ones_like(log_probs_T)
        chosen_B, rejected_B = _side_sums(log_probs_T * margin_T, lengths_B)
        chosen_tokens_B, rejected_tokens_B = _side_sums(margin_T, lengths_B)
        pairs = losses.PairTerms(
            chosen_B, rejected_B, chosen_tokens_B, rejected_tokens_B, chosen_nll_B, kl=self.kl
        )
        if ref_T is not None:
            ref_chosen_B, ref_rejected_B = _side_sums(ref_T * margin_T, lengths_B)
            pairs = replace(pairs, ref_chosen_B=ref_chosen_B, ref_rejected_B=ref_rejected_B)
        # One value a row, of which the chosen one's counts.
        return replace(pairs, score_gap_B=data["score_gap"][::2]) if "score_gap" in data else pairs


@dataclass(frozen=True)
class BradleyTerryObjective:
    """`pns.algo.losses.bradley_terry_loss`; the mean is over pairs."""

    centre: float
    temperature = 1.0
    group_size = 2
    head: ClassVar[Head] = "score"
    needs = ()

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        scores = outputs["scores"]
        loss_B, metrics_B = losses.bradley_terry_loss(scores[::2], scores[1::2], self.centre)
        return _mean_over_pairs(loss_B, metrics_B, data)


@dataclass(frozen=True)
class SftObjective:
    """`pns.algo.losses.sft_loss`; the mean is over the tokens in `mask`."""

    temperature = 1.0
    group_size = 1
    head: ClassVar[Head] = "language_model"
    needs = ()

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        return losses.sft_loss(outputs["log_probs"], data["mask"], data["num_tokens"]), {}


@dataclass(frozen=True)
class BcpgObjective:
    """`pns.algo.losses.bcpg_loss`; the mean is over the tokens in `mask`."""

    beta: float
    constraint: Constraint
    temperature = 1.0
    group_size = 1
    head: ClassVar[Head] = "language_model"
    needs = ("ref_log_probs", "token_advantages")

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        return losses.bcpg_loss(
            log_probs_T=outputs["log_probs"],
            ref_log_probs_T=data["ref_log_probs"],
            advantages_T=data["token_advantages"],
            mask_T=data["mask"],
            beta=self.beta,
            constraint=self.constraint,
            num_tokens=data["num_tokens"],
        )


@dataclass(frozen=True)
class WeightedReinforceObjective:
    """`pns.algo.losses.weighted_reinforce_loss`; the mean is over the tokens in `mask`."""

    max_ratio: float = 2.0  # of pi / pi_ref
    temperature = 1.0
    group_size = 1
    head: ClassVar[Head] = "language_model"
    needs = ("ref_log_probs", "token_advantages")

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        return losses.weighted_reinforce_loss(
            log_probs_T=outputs["log_probs"],
            ref_log_probs_T=data["ref_log_probs"],
            advantages_T=data["token_advantages"],
            mask_T=data["mask"],
            max_ratio=self.max_ratio,
            num_tokens=data["num_tokens"],
        )


@dataclass(frozen=True)
class StepLabelObjective:
    """`pns.algo.losses.step_label_loss` of rows that end with a step, `label` 1 (correct) or 0; the mean is
    over rows."""

    temperature = 1.0
    group_size = 1
    head: ClassVar[Head] = "score"
    needs = ("label",)

    def compute(self, outputs: Mapping[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
        loss_B, metrics_B = losses.step_label_loss(outputs["scores"], data["label"])
        weight_B = data["weight"] / data["num_groups"]  # 0 for rows of padding
        sums = {name: (values * weight_B).sum() for name, values in metrics_B.items()}
        return (loss_B * weight_B).sum(), sums


Objective = (
    GrpoObjective
    | GspoObjective
    | PreferenceObjective
    | BradleyTerryObjective
    | SftObjective
    | BcpgObjective
    | WeightedReinforceObjective
    | StepLabelObjective
)


def _side_sums(values_T: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected rows, which take turns."""
    sums_B = losses.row_sums(values_T, lengths_B)
    return sums_B[::2], sums_B[1::2]


def _mean_over_pairs(loss_B: Tensor, metrics_B: dict[str, Tensor], data: Mapping[str, Any]) -> LossAndMetrics:
    weight_B = data["weight"][::2] / data["num_groups"]  # 0 for pairs of padding
    return (loss_B * weight_B).sum(), {name: (values * weight_B).sum() for name, values in metrics_B.items()}


def _length_moments(margin_B: Tensor, lengths_B: Tensor) -> dict[str, Tensor]:
    """What `with_length_bias` needs the means of: a correlation cannot be added up over micro-batches."""
    longer_B = (lengths_B[::2] - lengths_B[1::2]).to(margin_B.dtype)
    return {
        "_longer": longer_B,
        "_longer_2": longer_B**2,
        "_margin_2": margin_B**2,
        "_margin_longer": margin_B * longer_B,
    }


def with_length_bias(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a whole batch, those of a preference loss with `length_bias` instead of its moments: the
    correlation of the margin with how many tokens longer the chosen side is, 0 where either does not vary."""
    kept = {name: value for name, value in metrics.items() if not name.startswith("_")}
    if "_longer" in metrics:
        margin, longer = metrics["margin"], metrics["_longer"]
        spread = (metrics["_margin_2"] - margin**2) * (metrics["_longer_2"] - longer**2)
        covariance = metrics["_margin_longer"] - margin * longer
        kept["length_bias"] = covariance / spread**0.5 if spread > 1e-12 else 0.0  # below: rounding
    return kept


def with_means_by_sign(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a whole batch, those of an objective on `token_advantages` with `positive_log_ratio`,
    `positive_nll` and `negative_log_ratio`: means over the tokens with such an advantage, where there are
    any."""
    means = dict(metrics)
    for sign, names in (("positive", ("log_ratio", "nll")), ("negative", ("log_ratio",))):
        if share := metrics.get(f"advantage_{sign}"):
            means |= {f"{sign}_{name}": metrics[f"_{sign}_{name}"] / share for name in names}
    return means


def mismatched_rows(rows: Batch) -> Batch:
    """Every prompt with the completion of the next pair, and its margin mask, for KTO's estimate of the KL
    divergence. Raises UserError for a single pair."""
    if len(rows) < 4:  # the next pair would be the same one
        raise UserError(
            "preference.loss: one pair is not enough to estimate the KL divergence that this loss reads; "
            "give more, or choose another loss"
        )
    following = [(row + 2) % len(rows) for row in range(len(rows))]
    masks = [rows.token_values["margin_mask"][row] for row in following]
    return Batch(rows.prompt_ids, [rows.completion_ids[row] for row in following], {"margin_mask": masks})


def estimate_kl(log_probs: Sequence[np.ndarray], mismatched: Batch) -> float:
    """KTO's reference point for one step: `log_probs` are those of the policy as it is for `mismatched_rows`,
    which hold their `ref_log_probs`."""
    masks, reference = mismatched.token_values["margin_mask"], mismatched.token_values["ref_log_probs"]
    rows = zip(log_probs, masks, reference, strict=True)
    log_ratios = [float(np.dot(mask, own - ref)) for own, mask, ref in rows]
    return float(losses.kto_kl(torch.tensor(log_ratios)))
