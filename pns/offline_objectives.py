"""The offline objectives by name: what each reads, and its defaults.

`nsa` is BCPG-NSA (arXiv 2505.14403), as METHOD reconstructs it; the others are its baselines on the same
samples. `pns.algo.offline` has the advantages, `pns.algo.losses` the losses. The configuration is checked
against this table, so reading it imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OfflineObjectiveEntry:
    """`defaults` are the hyper-parameters that it reads, keys of an arm of `bcpg.arms`."""

    defaults: Mapping[str, float]
    reads_steps: bool = False  # labels of the steps of wrong completions
    needs_reference: bool = True  # log-probabilities under the policy that sampled
    constrained: bool = False  # reads the key `constraint`


OFFLINE_OBJECTIVES: dict[str, OfflineObjectiveEntry] = {
    "nsa": OfflineObjectiveEntry(
        {"beta": 0.1, "correct_step_weight": 0.1}, reads_steps=True, constrained=True
    ),
    # Correct steps of wrong completions count neither way.
    "masked": OfflineObjectiveEntry({"beta": 0.1}, reads_steps=True, constrained=True),
    "bcpg": OfflineObjectiveEntry({"beta": 0.1}, constrained=True),
    # Right completions alone, by NLL (arXiv 2308.01825).
    "rft": OfflineObjectiveEntry({}, needs_reference=False),
    # Pairs of a right and a wrong completion, by DPO and NLL (arXiv 2404.19733).
    "rpo": OfflineObjectiveEntry({"beta": 0.1, "nll_weight": 1.0}),
    # lambda PSR + NSR (arXiv 2506.01347).
    "w_reinforce": OfflineObjectiveEntry({"positive_weight": 0.1}),
}
