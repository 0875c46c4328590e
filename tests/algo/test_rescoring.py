"""What other rules of the reward leave known of a completion, and what they change, by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from pns.algo.advantages import rollout_advantages
from pns.algo.masks import TooManyMaskedError
from pns.algo.rescoring import (
    AdvantageChange,
    Change,
    answered,
    changed_terms,
    compare,
    measured,
    rewarded_anew,
    unknown_terms,
)
from pns.config import (
    Advantage,
    Endpoint,
    Grading,
    GrpoConfig,
    Normalisation,
    RewardConfig,
    RewardInput,
    RewardTerm,
    ServicePool,
    TermKind,
    When,
)
from pns.records import Completion, Problem, Reward, Rollout, Verdict

JUDGED = {"scores": [3, 3, 3, 0], "probabilities": [[0.0, 0.0, 0.0, 1.0]] * 4}


def rules(**changes: Any) -> RewardConfig:
    """0.5 for being wrong, 0.25 each for a reward model and a judge; `changes` of the judge."""
    judge = RewardTerm(TermKind.judge, 0.25, model="judge")
    terms = {
        "wrong": RewardTerm(TermKind.verdict, 0.5),
        "plausibility": RewardTerm(TermKind.reward_model, 0.25),
        "coherence": RewardTerm(**vars(judge) | changes),
    }
    return RewardConfig(terms=terms)


def rollout(verdict: Verdict = Verdict.WRONG, step: int = 0, number: int = 0, **parts: Any) -> Rollout:
    completion = Completion(f"p#{number}", "p", "text", (1, 2), (), "stop")
    return Rollout(step, Problem("p", "?", "5"), completion, Reward(None, True, verdict, **parts))


def valued(value: float | None, step: int = 0, **terms: float) -> Rollout:
    """With this reward."""
    completion = Completion("c", "p", "text", (1, 2), (), "stop")
    reward = Reward(value, True, Verdict.WRONG, terms=terms)
    return Rollout(step, Problem("p", "?", "5"), completion, reward)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0.125},
        {"when": When.wrong},
        {"normalise": Normalisation.z_score},
        {"grading": Grading.expected},
        {"pool": ServicePool(replicas=7)},
        {"endpoint": Endpoint(retries=7)},
    ],
)
def test_what_comes_after_a_value_leaves_its_term_as_it_is(change: dict[str, Any]) -> None:
    assert changed_terms(rules(), rules(**change)) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"kind": TermKind.reward_model},
        {"kind": TermKind.length, "longest": 9},
        {"endpoint": Endpoint("http://host/v1")},
    ],
)
def test_another_source_changes_its_term_alone(change: dict[str, Any]) -> None:
    assert changed_terms(rules(), rules(**change)) == {"coherence"}


def test_an_input_counts_for_what_it_reads() -> None:
    """`auto` of the run's own model is tokens, of a named one the chat."""

    def changed(before: RewardTerm, after: RewardTerm) -> bool:
        return bool(changed_terms(RewardConfig(terms={"t": before}), RewardConfig(terms={"t": after})))

    own = RewardTerm(weight=1.0)
    assert not changed(own, RewardTerm(weight=1.0, input=RewardInput.tokens))
    assert changed(own, RewardTerm(weight=1.0, input=RewardInput.chat))
    assert not changed(RewardTerm(model="m"), RewardTerm(model="m", input=RewardInput.chat))


def test_values_and_failures_of_unchanged_terms_stay() -> None:
    kept = rollout(raw={"plausibility": 0.5}, missing={"coherence": "too_long"}, terms={"wrong": 1.0})
    same = measured(kept, rules(), rules(weight=0.125))
    assert same.reward == Reward(
        None, True, Verdict.WRONG, missing={"coherence": "too_long"}, raw={"plausibility": 0.5}
    )
    assert unknown_terms(same, rules()) == ()
    # A failure is asked again where the term has another source, or where that is wanted.
    for again in (measured(kept, rules(), rules(model="other")), measured(kept, rules(), rules(), True)):
        assert again.reward == Reward(None, True, Verdict.WRONG, raw={"plausibility": 0.5})
        assert unknown_terms(again, rules()) == ("coherence",)


def test_what_the_verifier_and_the_engine_said_stays() -> None:
    for cause in ({"verdict": "timeout"}, {"rollout": "abort"}):
        unverified = rollout(Verdict.UNVERIFIED, missing=cause)
        again = measured(unverified, rules(), rules(model="other"), ask_failed=True)
        assert again.reward.missing == cause
        assert unknown_terms(again, rules()) == ()


def test_an_opened_gate_asks_for_right_completions() -> None:
    right = rollout(Verdict.CORRECT)
    assert unknown_terms(right, rules()) == ()
    opened = RewardConfig(gates={"malformed": -1.0, "correct": None}, terms=rules().terms)
    assert unknown_terms(right, opened) == ("plausibility", "coherence")


def test_an_expectation_needs_probabilities() -> None:
    expected = rules(grading=Grading.expected)
    for judgement, names in ((JUDGED, ()), (JUDGED | {"probabilities": []}, ("coherence",))):
        kept = rollout(raw={"plausibility": 0.5, "coherence": judgement})
        assert unknown_terms(measured(kept, rules(), expected), expected) == names


def test_rewards_made_anew_by_hand() -> None:
    """0.5 + 0.25 * sigmoid(0) + 0.25 * 9/12 = 0.8125; with half the judge's weight 0.71875; an expectation of
    four threes is 1: 0.875."""
    kept = rollout(raw={"plausibility": 0.0, "coherence": JUDGED})
    values = {}
    for name, own in {
        "same": rules(),
        "half": rules(weight=0.125),
        "expected": rules(grading=Grading.expected),
    }.items():
        [row] = rewarded_anew([measured(kept, rules(), own)], 1, own, "s")
        values[name] = row.reward.value
    assert values == pytest.approx({"same": 0.8125, "half": 0.71875, "expected": 0.875})


def test_answers_are_added_to_what_is_known() -> None:
    lacking = rollout(raw={"plausibility": 0.5})
    other = rollout(raw={"coherence": JUDGED, "plausibility": 9.0}).reward
    assert answered(lacking, other, ["coherence"]).reward.raw == {"plausibility": 0.5, "coherence": JUDGED}
    failed = rollout(missing={"coherence": "too_long"}).reward
    assert answered(lacking, failed, ["coherence"]).reward.missing == {"coherence": "too_long"}


def test_groups_are_of_one_step() -> None:
    """z-scores of two groups: -1 and 1 in each, whatever the other step's values are."""
    own = RewardConfig(terms={"p": RewardTerm(weight=1.0, normalise=Normalisation.z_score)})
    rows = [rollout(step=s, raw={"p": v}) for s, v in ((0, 1.0), (0, 3.0), (1, 100.0), (1, 200.0))]
    rewards = [row.reward.value for row in rewarded_anew(rows, 2, own, "s")]
    assert rewards == pytest.approx([-1, 1, -1, 1])


def test_too_many_failures_of_a_step_stop() -> None:
    rows = [rollout(step=7, raw={"plausibility": 0.0}, missing={"coherence": "deadline"}) for _ in range(2)]
    with pytest.raises(
        TooManyMaskedError, match=r"s, step 7: coherence failed for 2 of the 2 .*2 x deadline"
    ):
        rewarded_anew(rows, 2, rules(), "s")


def test_a_comparison_by_hand() -> None:
    """One group: advantages (R - mean) are [0.25, 0, masked, -0.25] before and [-0.375, -0.125, 0.375, 0.125]
    after; the three rows with both rewards are in the opposite order."""
    before = [valued(0.5, p=1.0), valued(0.25, p=0.5), valued(None), valued(0.0, p=0.0)]
    after = [valued(0.0, p=0.25), valued(0.25, p=0.25), valued(0.75, q=1.0), valued(0.5)]
    settings = GrpoConfig(completions_per_problem=4, advantage=Advantage.dr_grpo)
    advantages = partial(rollout_advantages, settings=settings, max_new_tokens=9)
    compared = compare(before, after, {"p": 3}, advantages)
    assert compared.num_rollouts == 4
    assert compared.asked == {"p": 3}
    assert compared.masked == Change(1, 0)
    assert compared.reward == Change(0.25, 0.375)
    assert compared.terms == {"p": Change(0.5, 0.25), "q": Change(None, 1.0)}
    assert compared.num_rewarded_in_both == 3
    assert compared.rank_correlation == pytest.approx(-1.0)
    assert compared.advantages == AdvantageChange(num_both=2, changed_sign=2, became_zero=0, became_nonzero=2)


def test_advantages_are_of_a_step_at_a_time() -> None:
    """The second step's rewards become equal: its two advantages vanish, the first one's stay."""
    before = [valued(0.0), valued(1.0), valued(0.0, step=1), valued(1.0, step=1)]
    after = [valued(0.0), valued(1.0), valued(0.5, step=1), valued(0.5, step=1)]
    settings = GrpoConfig(completions_per_problem=2, advantage=Advantage.reinforce_pp)
    advantages = partial(rollout_advantages, settings=settings, max_new_tokens=9)
    compared = compare(before, after, {}, advantages)
    assert compared.advantages == AdvantageChange(num_both=2, changed_sign=0, became_zero=2, became_nonzero=0)
    assert compare(before, after, {}, None).advantages is None
