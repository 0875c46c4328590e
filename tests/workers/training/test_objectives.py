"""Objectives over plain tensors, without processes, and a preference loss added from outside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pns.algo.losses import LossAndMetrics, PairTerms
from pns.config import Constraint, PreferenceConfig, hyper_parameters
from pns.errors import UserError
from pns.preference_losses import PREFERENCE_LOSSES, PreferenceLossEntry
from pns.recipe import load
from workers.training.batching import Batch
from workers.training.objectives import (
    BcpgObjective,
    BradleyTerryObjective,
    GrpoObjective,
    PreferenceObjective,
    SftObjective,
    StepLabelObjective,
    WeightedReinforceObjective,
    estimate_kl,
    mismatched_rows,
    with_length_bias,
    with_means_by_sign,
)

# Two pairs: completions of 2, 1, 3 and 1 tokens.
LOG_PROBS = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.5, -1.0, -4.0])
DATA: dict[str, Any] = {
    "completion_lengths": torch.tensor([2, 1, 3, 1]),
    "ref_log_probs": torch.tensor([-1.5, -2.0, -2.0, -1.0, -1.0, -1.0, -2.0]),
    "weight": torch.ones(4),
    "num_groups": 2,
}


def difference_loss(pairs: PairTerms, beta: float) -> LossAndMetrics:
    """Of the policy's log-probabilities alone; a loss that the table does not have."""
    margin_B = beta * (pairs.chosen_B - pairs.rejected_B)
    return -margin_B, {"margin": margin_B.detach()}


BASE = ["models.backbone=somewhere", "reward.terms.coherence.weight=0"]


def test_a_loss_from_outside_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PreferenceLossEntry(f"{__name__}:difference_loss", {"beta": 3.0}, needs_reference=False)
    monkeypatch.setitem(PREFERENCE_LOSSES, "difference", entry)
    base = [*BASE, "preference.loss=difference"]
    settings = load(None, base).preference
    assert hyper_parameters(settings) == {"beta": 3.0}
    with pytest.raises(UserError, match=r"nll_weight: 1\.0 is not read by preference.loss=difference"):
        load(None, [*base, "preference.nll_weight=1.0"])
    objective = PreferenceObjective(settings.loss, hyper_parameters(settings))
    assert objective.needs == ()
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, metrics = objective.compute({"log_probs": log_probs}, DATA)
    # Sums -3, -3, -2 and -4: differences 0 and 2.
    assert (loss.item(), metrics["margin"].item()) == (-3.0, 3.0)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.5, -1.5, 1.5, -1.5, -1.5, -1.5, 1.5]


def test_an_unknown_loss_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="'simpow' is not the name of a loss; did you mean simpo"):
        load(None, [*BASE, "preference.loss=simpow"])


@pytest.mark.parametrize(("name", "entry"), PREFERENCE_LOSSES.items())
def test_every_loss_takes_what_the_table_says(name: str, entry: PreferenceLossEntry) -> None:
    objective = PreferenceObjective(name, entry.defaults, kl=0.5)
    data = {key: value for key, value in DATA.items() if key in objective.needs or key != "ref_log_probs"}
    if entry.needs_score_gaps:
        data["score_gap"] = torch.ones(4)
    loss, _ = objective.compute({"log_probs": LOG_PROBS}, data)
    assert loss.isfinite()
    assert set(entry.defaults) <= set(vars(PreferenceConfig()))
    for needed in objective.needs:
        with pytest.raises(ValueError, match="needs the re"):
            objective.compute({"log_probs": LOG_PROBS}, {k: v for k, v in data.items() if k != needed})


def test_preference_metrics_by_hand() -> None:
    objective = PreferenceObjective("sigmoid", {"beta": 1.0})
    loss, metrics = objective.compute({"log_probs": LOG_PROBS}, DATA)
    # Log-ratios 0.5, -1, 1 and -2: margins 1.5 and 3. The chosen sides are 1 and 2 tokens longer.
    margins = [1.5, 3.0]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 2)
    whole = with_length_bias({name: value.item() for name, value in metrics.items()})
    assert whole["margin"] == pytest.approx(2.25)
    assert (whole["chosen_log_prob"], whole["rejected_log_prob"]) == (-2.5, -3.5)
    assert whole["chosen_log_ratio"] == pytest.approx(0.75)
    assert whole["chosen_nll"] == pytest.approx((3 / 2 + 2 / 3) / 2)
    assert whole["length_bias"] == pytest.approx(1.0)
    assert not any(name.startswith("_") for name in whole)


def test_parts_of_a_batch_add_up_and_padding_weighs_nothing() -> None:
    objective = PreferenceObjective("rpo", {"beta": 0.3, "nll_weight": 0.5})
    whole, metrics = objective.compute({"log_probs": LOG_PROBS}, DATA)
    sums = dict.fromkeys(metrics, 0.0)
    total = 0.0
    for tokens, rows in ((slice(0, 3), slice(0, 2)), (slice(3, 7), slice(2, 4))):
        part = DATA | {
            "completion_lengths": torch.cat([DATA["completion_lengths"][rows], torch.tensor([1, 1])]),
            "ref_log_probs": torch.cat([DATA["ref_log_probs"][tokens], torch.zeros(2)]),
            "weight": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        }
        log_probs = torch.cat([LOG_PROBS[tokens], torch.tensor([-7.0, -8.0])])
        loss, of_part = objective.compute({"log_probs": log_probs}, part)
        total += loss.item()
        for name, value in of_part.items():
            sums[name] += value.item()
    assert total == pytest.approx(whole.item())
    assert sums == pytest.approx({name: value.item() for name, value in metrics.items()})


OFFLINE = [
    BcpgObjective(0.3, Constraint.squared_log_ratio),
    BcpgObjective(0.3, Constraint.kl),
    WeightedReinforceObjective(),
]
TOKEN_DATA = DATA | {
    "token_advantages": torch.tensor([0.5, 0.5, -0.5, 0.1, 0.1, -0.5, 0.0]),
    "mask": torch.ones(7),
    "num_tokens": 7.0,
}


@pytest.mark.parametrize("objective", OFFLINE, ids=str)
def test_parts_of_an_offline_batch_add_up_and_padding_weighs_nothing(objective: Any) -> None:
    whole, metrics = objective.compute({"log_probs": LOG_PROBS}, TOKEN_DATA)
    total, sums = 0.0, dict.fromkeys(metrics, 0.0)
    for tokens in (slice(0, 3), slice(3, 7)):
        names = ("ref_log_probs", "token_advantages", "mask")
        part = TOKEN_DATA | {name: torch.cat([TOKEN_DATA[name][tokens], torch.zeros(1)]) for name in names}
        log_probs = torch.cat([LOG_PROBS[tokens], torch.tensor([-7.0])])
        loss, of_part = objective.compute({"log_probs": log_probs}, part)
        total += loss.item()
        for name, value in of_part.items():
            sums[name] += value.item()
    assert total == pytest.approx(whole.item())
    assert sums == pytest.approx({name: value.item() for name, value in metrics.items()})
    means = with_length_bias(with_means_by_sign(sums))
    # Log-ratios 0.5, 0, -1, 0.5, 0.5, 0 and -2; -log pi of positive tokens 1, 2, 0.5 and 0.5.
    assert means["log_ratio"] == pytest.approx(-1.5 / 7)
    assert means["positive_log_ratio"] == pytest.approx(1.5 / 4)
    assert means["positive_nll"] == pytest.approx(4 / 4)
    assert means["negative_log_ratio"] == pytest.approx(-1 / 2)
    assert not any(name.startswith("_") for name in means)


def test_the_other_objectives_by_hand() -> None:
    data = {"mask": torch.tensor([1.0, 0, 1, 1, 1, 1, 1]), "num_tokens": 6.0, **DATA}
    assert SftObjective().compute({"log_probs": LOG_PROBS}, data)[0].item() == pytest.approx(10 / 6)
    scores = torch.tensor([1.0, -0.5, 0.0, 2.0])
    loss, metrics = BradleyTerryObjective(centre=0.01).compute({"scores": scores}, data)
    expected = math.log1p(math.exp(-1.5)) + 0.01 * 0.25 + math.log1p(math.exp(2)) + 0.01 * 4
    assert (loss.item(), metrics["accuracy"].item()) == pytest.approx((expected / 2, 0.5))
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
    data |= {"old_log_probs": LOG_PROBS, "advantages": advantages}
    del data["ref_log_probs"]
    loss, metrics = GrpoObjective(0.2, 0.28, 0.1).compute({"log_probs": LOG_PROBS}, data)
    assert loss.item() == pytest.approx(-(1 - 1 + 3 * 0.5 + 2) / 6)
    assert "kl" not in metrics


def test_kto_estimates_the_divergence_on_the_next_pairs_completions() -> None:
    rows = Batch(
        [[1], [1], [2], [2]], [[3, 4], [5], [6], [7, 8]], {"margin_mask": [[1, 0], [1], [1], [1, 1]]}
    )
    mismatched = mismatched_rows(rows)
    assert mismatched.prompt_ids == rows.prompt_ids
    assert mismatched.completion_ids == [[6], [7, 8], [3, 4], [5]]
    assert mismatched.token_values["margin_mask"] == [[1], [1, 1], [1, 0], [1]]
    own = [np.array(values, np.float32) for values in ([-1.0], [-1.0, -2.0], [-3.0, -9.0], [-1.0])]
    mismatched.token_values["ref_log_probs"] = [row - 0.5 for row in own]
    assert estimate_kl(own, mismatched) == pytest.approx((0.5 + 1.0 + 0.5 + 0.5) / 4)
    assert estimate_kl([row - 9 for row in own], mismatched) == 0.0
    with pytest.raises(UserError, match="one pair is not enough"):
        mismatched_rows(Batch([[1], [1]], [[2], [3]]))


def test_labels_of_steps_by_hand() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, 3.0], requires_grad=True)
    data = {
        "label": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "weight": torch.tensor([1.0, 1, 1, 0]),
        "num_groups": 3,
    }
    loss, metrics = StepLabelObjective().compute({"scores": scores}, data)
    expected = math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log1p(math.exp(0.5))
    assert loss.item() == pytest.approx(expected / 3)
    assert metrics["accuracy"].item() == pytest.approx(1 / 3)
    assert metrics["correct_share"].item() == pytest.approx(2 / 3)
    loss.backward()
    assert scores.grad is not None
    # (sigmoid(s) - label) / rows; nothing for the row of padding.
    gradient = [-1 / (1 + math.exp(2)) / 3, -1 / (1 + math.exp(-1)) / 3, 1 / (1 + math.exp(-0.5)) / 3, 0.0]
    assert scores.grad.tolist() == pytest.approx(gradient)
