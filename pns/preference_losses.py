"""The preference losses by name: the function of each, what it reads, and its defaults.

A loss is a function in `pns.algo.losses` and an entry here. The configuration is checked against this table,
so reading it imports nothing heavy; a function is imported when it is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class PreferenceLossEntry:
    """`path` is "module:function" of a function of `PairTerms` and, by keyword, of the hyper-parameters in
    `defaults`, which are keys of the section `preference`."""

    path: str
    defaults: Mapping[str, float]
    needs_reference: bool = True
    needs_score_gaps: bool = False  # the reward model's scores of both sides
    needs_kl: bool = False  # an estimate of KL(policy || reference) for every step

    @property
    def function(self) -> Callable[..., Any]:
        return resolve_name(self.path)


# Losses on log-probabilities per token need a larger beta than those on their sums.
PREFERENCE_LOSSES: dict[str, PreferenceLossEntry] = {
    "sigmoid": PreferenceLossEntry("pns.algo.losses:dpo_loss", {"beta": 0.1}),
    "ipo": PreferenceLossEntry("pns.algo.losses:ipo_loss", {"beta": 0.1}),
    "hinge": PreferenceLossEntry("pns.algo.losses:hinge_loss", {"beta": 0.1}),
    "cdpo": PreferenceLossEntry("pns.algo.losses:dpo_loss", {"beta": 0.1, "label_smoothing": 0.1}),
    "robust": PreferenceLossEntry("pns.algo.losses:robust_dpo_loss", {"beta": 0.1, "label_smoothing": 0.1}),
    "simpo": PreferenceLossEntry(
        "pns.algo.losses:simpo_loss", {"beta": 2.0, "target_margin": 1.0}, needs_reference=False
    ),
    "kto": PreferenceLossEntry(
        "pns.algo.losses:kto_loss",
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        needs_kl=True,
    ),
    "orpo": PreferenceLossEntry(
        "pns.algo.losses:orpo_loss", {"odds_ratio_weight": 0.1}, needs_reference=False
    ),
    "rpo": PreferenceLossEntry("pns.algo.losses:rpo_loss", {"beta": 0.1, "nll_weight": 1.0}),
    "sft": PreferenceLossEntry("pns.algo.losses:chosen_nll_loss", {}, needs_reference=False),
    "length_normalised": PreferenceLossEntry("pns.algo.losses:length_normalised_dpo_loss", {"beta": 5.0}),
    "offset": PreferenceLossEntry(
        "pns.algo.losses:offset_dpo_loss", {"beta": 0.1, "offset_scale": 1.0}, needs_score_gaps=True
    ),
}
