"""The accounting of masked completions: what failed, for how many of those that asked for it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from pns.errors import UserError
from pns.records import Reward

# In `Reward.missing`, beside the names of terms.
VERDICT = "verdict"
ROLLOUT = "rollout"  # the engine failed: there is no completion


class TooManyMaskedError(UserError):
    """A term failed for more than `reward.max_masked_fraction` of the completions that it was asked for."""


def mask_report(rewards: Sequence[Reward]) -> dict[str, dict[str, int]]:
    """How many masked completions each term's failure caused: {term: {cause: count}}, most frequent cause
    first. A completion that lacks two terms counts under both."""
    counts: dict[str, Counter[str]] = {}
    for reward in rewards:
        if reward.masked:
            for term, cause in reward.missing.items():
                counts.setdefault(term, Counter())[cause] += 1
    return {term: dict(counts[term].most_common()) for term in sorted(counts)}


def check_failures(rewards: Sequence[Reward], max_fraction: float, where: str) -> None:
    """Raise TooManyMaskedError if a term, the verifier or the rollout engine failed for more than
    `max_fraction` of the completions of `rewards` that it was asked for; `where` names stage and step.

    The share is of what was asked, not of all: a judge that always fails would else go unnoticed in a step
    whose completions are mostly right. A single failure stops nothing, however few were asked.
    """
    asked: Counter[str] = Counter()
    for reward in rewards:
        asked[ROLLOUT] += 1
        asked[VERDICT] += reward.format_ok
        asked.update({*reward.terms, *reward.missing} - {ROLLOUT, VERDICT})
    _check_causes([reward.missing for reward in rewards], asked, max_fraction, where)


def check_missing(missing: Sequence[Mapping[str, str]], max_fraction: float, where: str) -> None:
    """As `check_failures`, of services that all of the completions were asked for: `missing` has, of each
    completion, service -> cause of those that failed."""
    names = {name for own in missing for name in own}
    _check_causes(missing, {name: len(missing) for name in names}, max_fraction, where)


def _check_causes(
    missing: Sequence[Mapping[str, str]], asked: Mapping[str, int], max_fraction: float, where: str
) -> None:
    causes: dict[str, Counter[str]] = {}
    for own in missing:
        for name, cause in own.items():
            causes.setdefault(name, Counter())[cause] += 1
    for name, counts in causes.items():
        num_failed = counts.total()
        if num_failed > 1 and num_failed > max_fraction * asked[name]:
            listed = ", ".join(f"{count} x {cause}" for cause, count in counts.most_common())
            raise TooManyMaskedError(
                f"{where}: {name} failed for {num_failed} of the {asked[name]} completions that it was asked "
                f"for ({num_failed / asked[name]:.0%}; reward.max_masked_fraction allows "
                f"{max_fraction:.0%}): {listed}"
            )
