"""Losses and their gradients against those of TRL, recorded by `tests/parity/record_trl_losses.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pns.algo.losses import PairTerms, kto_kl
from pns.preference_losses import PREFERENCE_LOSSES

RECORDED = json.loads((Path(__file__).parents[1] / "parity" / "trl_losses.json").read_text(encoding="utf-8"))
NOT_IN_TRL = {"offset", "sft"}  # sft: an average of log-probabilities, nothing to compare


def sums(name: str) -> torch.Tensor:
    return torch.tensor([sum(pair[name]) for pair in RECORDED["pairs"]], dtype=torch.float64)


def lengths(name: str) -> torch.Tensor:
    return torch.tensor([len(pair[name]) for pair in RECORDED["pairs"]])


@pytest.mark.parametrize(
    "case",
    RECORDED["cases"],
    ids=lambda case: f"{case['loss']}-{'-'.join(map(str, case['hyper_parameters'].values()))}",
)
def test_loss_and_gradients_equal_those_of_trl(case: dict[str, Any]) -> None:
    entry, hyper_parameters = PREFERENCE_LOSSES[case["loss"]], case["hyper_parameters"]
    assert hyper_parameters.keys() == entry.defaults.keys()
    chosen, rejected = sums("chosen").requires_grad_(), sums("rejected").requires_grad_()
    # One pair is one batch there, so its reference point for KTO is the estimate from its own two mismatched
    # completions.
    kl = [
        kto_kl(
            torch.tensor(
                [sum(row) - sum(ref) for row, ref in zip(pair["kl"], pair["ref_kl"], strict=True)],
                dtype=torch.float64,
            )
        )
        for pair in RECORDED["pairs"]
    ]
    pairs = PairTerms(
        chosen,
        rejected,
        lengths("chosen"),
        lengths("rejected"),
        chosen_nll_B=-chosen / lengths("chosen"),
        ref_chosen_B=sums("ref_chosen") if entry.needs_reference else None,
        ref_rejected_B=sums("ref_rejected") if entry.needs_reference else None,
        kl=torch.stack(kl),
    )
    loss, _ = entry.function(pairs, **hyper_parameters)
    loss.sum().backward()
    for ours, theirs in (
        (loss, "losses"),
        (chosen.grad, "chosen_gradients"),
        (rejected.grad, "rejected_gradients"),
    ):
        assert ours is not None
        torch.testing.assert_close(
            ours.detach(), torch.tensor(case[theirs], dtype=torch.float64), rtol=1e-6, atol=1e-15
        )


def test_every_loss_that_trl_has_is_recorded_on_both_sides_of_its_bends() -> None:
    assert {case["loss"] for case in RECORDED["cases"]} == PREFERENCE_LOSSES.keys() - NOT_IN_TRL
    assert RECORDED["versions"]["trl"] == "1.16.0"
    kl = [sum(map(sum, pair["kl"])) - sum(map(sum, pair["ref_kl"])) for pair in RECORDED["pairs"]]
    assert min(kl) < 0 < max(kl)
    hinge = [value for case in RECORDED["cases"] if case["loss"] == "hinge" for value in case["losses"]]
    assert min(hinge) == 0 < max(hinge)
