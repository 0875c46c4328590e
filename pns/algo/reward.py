"""The composite reward of reverse RL, the ordinary reward of the backbone's RL, and the accounting of masked
completions.

A term that could not be computed is never a number: it masks the completion, with its cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pns.config import RewardConfig
from pns.errors import UserError
from pns.records import Reward, Verdict

VERDICT = "verdict"
PLAUSIBILITY = "plausibility"
COHERENCE = "coherence"


class TooManyMaskedError(UserError):
    """More completions of a step than `reward.max_masked_fraction` have no reward."""


def compose(
    format_ok: bool,
    verdict: Verdict,
    plausibility: float | None,
    coherence: float | None,
    missing: Mapping[str, str],
    config: RewardConfig,
) -> Reward:
    """The reward of one of the generator's completions; the gates are evaluated in the order of the method.

    `plausibility` in (0, 1) and `coherence` in [0, 1] are the unweighted terms, None where missing or not
    asked for; `missing` maps a term's name (`verdict`, `plausibility`, `coherence`) to why it could not be
    computed. A term of weight 0 is not needed.

    gated (default): malformed -> `config.malformed`; correct -> `config.correct`; unverified -> masked; a
    needed term missing -> masked; wrong -> w_wrong + w_rm * plausibility + w_cot * coherence. additive
    (`gated: false`, the ablation): the same without the gate on correct: malformed -> `config.malformed`;
    unverified or a needed term missing -> masked; otherwise w_wrong * [wrong] + w_rm * plausibility + w_cot *
    coherence, so that a correct completion earns the last two terms as well.

    Raises ValueError for a term outside its range (NaN included) or one that is given and also reported
    missing.
    """
    terms = {PLAUSIBILITY: plausibility, COHERENCE: coherence}
    for name, term in terms.items():
        if term is not None and not 0.0 <= term <= 1.0:
            raise ValueError(f"{name} {term} is outside [0, 1]")
        if term is not None and name in missing:
            raise ValueError(f"{name} is {term} and also reported missing: {missing[name]}")
    weights = config.weights
    weight_of = {PLAUSIBILITY: weights.reward_model, COHERENCE: weights.judge}
    causes: dict[str, str] = {}
    value: float | None = None
    if not format_ok:
        value = config.malformed
    elif verdict is Verdict.CORRECT and config.gated:
        value = config.correct
    elif verdict is Verdict.UNVERIFIED:
        causes = {VERDICT: missing.get(VERDICT, "unverified")}
    else:
        causes = {
            name: missing.get(name, "not computed")
            for name, term in terms.items()
            if weight_of[name] and term is None
        }
        if not causes:
            wrong, rm, cot = float(verdict is Verdict.WRONG), plausibility or 0.0, coherence or 0.0
            value = weights.wrong * wrong + weights.reward_model * rm + weights.judge * cot
    return Reward(value, format_ok, verdict, plausibility, coherence, causes)


def correctness(format_ok: bool, verdict: Verdict, missing: Mapping[str, str] | None = None) -> Reward:
    """The reward of ordinary RL (and of evaluation): 1 for a well-formed correct completion, 0 for a wrong or
    malformed one; a well-formed one that could not be verified is masked."""
    if format_ok and verdict is Verdict.UNVERIFIED:
        return Reward(None, format_ok, verdict, missing={VERDICT: (missing or {}).get(VERDICT, "unverified")})
    return Reward(float(format_ok and verdict is Verdict.CORRECT), format_ok, verdict)


def mask_report(rewards: Sequence[Reward]) -> dict[str, dict[str, int]]:
    """How many masked completions each term's failure caused: {term: {cause: count}}, most frequent cause
    first. A completion that lacks two terms counts under both."""
    counts: dict[str, Counter[str]] = {}
    for reward in rewards:
        if reward.masked:
            for term, cause in reward.missing.items():
                counts.setdefault(term, Counter())[cause] += 1
    return {term: dict(counts[term].most_common()) for term in sorted(counts)}


def masked_fraction(rewards: Sequence[Reward]) -> float:
    """Share of masked completions, 0 of none."""
    return sum(reward.masked for reward in rewards) / len(rewards) if rewards else 0.0


def check_masked(rewards: Sequence[Reward], max_fraction: float, where: str) -> None:
    """Raise TooManyMaskedError if more than `max_fraction` of `rewards` are masked; `where` names stage and
    step."""
    fraction = masked_fraction(rewards)
    if fraction <= max_fraction:
        return
    report = mask_report(rewards)
    causes = "; ".join(
        f"{term}: " + ", ".join(f"{count} x {cause}" for cause, count in report[term].items())
        for term in report
    )
    raise TooManyMaskedError(
        f"{where}: {sum(reward.masked for reward in rewards)} of {len(rewards)} completions have no reward ({fraction:.0%}; "
        f"reward.max_masked_fraction allows {max_fraction:.0%}): {causes}"
    )
