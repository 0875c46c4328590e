from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pns.algo.advantages import group_advantages, overlong_penalties
from pns.algo.formatting import check_format
from pns.algo.judging import Judgement
from pns.algo.masks import TooManyMaskedError, check_failures, mask_report
from pns.algo.reward import (
    _GATES,
    KINDS,
    RULES,
    Question,
    compose,
    correctness,
    deciding_gate,
    needed,
    rewarded,
    service_terms,
    sigmoid,
    weighted_terms,
)
from pns.config import (
    Advantage,
    Grading,
    Normalisation,
    RewardConfig,
    RewardInput,
    RewardTerm,
    TermKind,
    When,
)
from pns.recipe import GATES
from pns.records import Completion, Problem, Reward, Rollout, Verdict

GATED = RewardConfig()
ADDITIVE = RewardConfig(gates={"malformed": -1.0, "correct": None})
WRONG_06 = RewardTerm(TermKind.verdict, 0.6)
MODEL_04 = RewardTerm(TermKind.reward_model, 0.4)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (r"<think>a</think>\boxed{5}", "stop", ""),
        ("  <think>a</think>\nThe answer is $\\boxed{5}$.\n", "stop", ""),
        (r"<think>\boxed{4}</think>\[\boxed{5}\]", "stop", ""),  # a box inside the reasoning does not count
        (r"<think>a</think>\boxed{5}", "length", "not_ended"),
        (r"\boxed{5}", "stop", "no_reasoning_block"),
        (r"a</think>\boxed{5}", "stop", "no_reasoning_block"),
        (r"<think>a \boxed{5}", "stop", "unclosed_reasoning_block"),
        (r"</think><think>\boxed{5}", "stop", "text_before_reasoning"),
        (r"Hm <think>a</think>\boxed{5}", "stop", "text_before_reasoning"),
        (r"<think>a</think><think>b</think>\boxed{5}", "stop", "several_reasoning_blocks"),
        (r"<think>a</think></think>\boxed{5}", "stop", "several_reasoning_blocks"),
        (r"<think>a</think>\boxed{5}\boxed{5}", "stop", "several_answers"),
        (r"<think>a</think>\boxed{4} or \fbox{5}", "stop", "several_answers"),
        (r"<think>a</think>5", "stop", "no_answer"),
        (r"<think>\boxed{5}</think>", "stop", "no_answer"),
        (r"<think>a</think>\boxed{ }", "stop", "no_answer"),
        (r"<think>a</think>\boxed{5", "stop", "unclosed_answer"),
        (r"<think>a</think>\boxed{5} 5", "stop", "text_after_answer"),
    ],
)
def test_format_rules(text: str, finish: str, reason: str) -> None:
    check = check_format(text, finish)
    assert (check.ok, check.reason) == (not reason, reason)


def measured(
    format_ok: bool, verdict: Verdict, missing: dict[str, str] | None = None, **parts: Any
) -> Rollout:
    """What is known of a completion before it is rewarded: `text`, `tokens` (how many), and raw values."""
    text, num_tokens = parts.pop("text", r"<think>a</think>\boxed{7}"), parts.pop("tokens", 3)
    completion = Completion("c", "p", text, tuple(range(num_tokens)), (), "stop")
    reward = Reward(None, format_ok, verdict, missing=missing or {}, raw=parts)
    return Rollout(0, Problem("p", "How many?", "5"), completion, reward)


def both(plausibility: float, coherence: float) -> dict[str, float]:
    return {"plausibility": plausibility, "coherence": coherence}


def wrong_rewarded(scores: dict[str, float], rules: RewardConfig, **missing: str) -> Reward:
    """The reward of a well-formed wrong completion with these scores beside that of being wrong."""
    return compose(measured(True, Verdict.WRONG, missing), {"wrong": 1.0, **scores}, rules)


def test_gates_come_in_order() -> None:
    # malformed first, whatever else is known or missing
    assert compose(measured(False, Verdict.CORRECT), {}, GATED).value == -1.0
    assert compose(measured(False, Verdict.UNVERIFIED, {"verdict": "timeout"}), {}, GATED).value == -1.0
    # then correct: no term is needed
    correct = compose(measured(True, Verdict.CORRECT, {"plausibility": "actor died"}), {}, GATED)
    assert correct.value == 0.0
    assert correct.missing == {}
    # then unverified: masked, never "wrong"
    unverified = compose(measured(True, Verdict.UNVERIFIED, {"verdict": "timeout"}), {}, GATED)
    assert unverified.masked
    assert unverified.missing == {"verdict": "timeout"}
    # wrong: 0.5 + 0.25 * 0.8 + 0.25 * 0.5 = 0.825
    wrong = wrong_rewarded(both(0.8, 0.5), GATED)
    assert wrong.value == pytest.approx(0.825)
    assert wrong.terms == {"wrong": 1.0, **both(0.8, 0.5)}


def test_the_recipe_knows_the_gates() -> None:
    assert tuple(_GATES) == GATES


def test_a_right_derivation_with_a_wrong_box_can_be_a_gate() -> None:
    flip = measured(True, Verdict.WRONG, text=r"<think>So it is \boxed{5}.</think>\boxed{7}")
    assert deciding_gate(flip, GATED) is None
    rules = RewardConfig(gates={"malformed": -1.0, "correct": 0.0, "box_only_flip": -0.5})
    assert deciding_gate(flip, rules) == "box_only_flip"
    assert needed(flip, rules) == ()
    assert compose(flip, {}, rules).value == -0.5
    assert deciding_gate(measured(True, Verdict.WRONG), rules) is None


def test_a_missing_term_masks_unless_its_weight_is_zero() -> None:
    masked = wrong_rewarded({"plausibility": 0.8}, GATED, coherence="unparsable")
    assert masked.masked
    assert masked.missing == {"coherence": "unparsable"}
    assert masked.terms == {"wrong": 1.0, "plausibility": 0.8}
    assert wrong_rewarded({}, GATED).missing == {"plausibility": "not computed", "coherence": "not computed"}
    no_judge = RewardConfig(terms={"wrong": WRONG_06, "plausibility": MODEL_04, "coherence": RewardTerm()})
    # 0.6 + 0.4 * 0.5 = 0.8
    assert wrong_rewarded({"plausibility": 0.5}, no_judge).value == pytest.approx(0.8)


def test_the_additive_form_drops_the_gate_on_correct() -> None:
    # correct: 0.5 * 0 + 0.25 * 0.8 + 0.25 * 0.4 = 0.3; wrong: 0.5 more
    right = measured(True, Verdict.CORRECT)
    assert compose(right, {"wrong": 0.0, **both(0.8, 0.4)}, ADDITIVE).value == pytest.approx(0.3)
    assert wrong_rewarded(both(0.8, 0.4), ADDITIVE).value == pytest.approx(0.8)
    late = measured(True, Verdict.CORRECT, {"plausibility": "deadline"})
    assert compose(late, {"wrong": 0.0, "coherence": 0.4}, ADDITIVE).missing == {"plausibility": "deadline"}
    assert compose(measured(True, Verdict.UNVERIFIED), {}, ADDITIVE).masked
    assert compose(measured(False, Verdict.WRONG), both(0.8, 0.4), ADDITIVE).value == -1.0


def test_only_what_counts_is_needed() -> None:
    terms = {
        "plausibility": RewardTerm(TermKind.reward_model, 0.25),
        "unused": RewardTerm(TermKind.judge, 0.0),
        "second": RewardTerm(TermKind.reward_model, 0.1, When.wrong),
        "third": RewardTerm(TermKind.reward_model, 0.1, When.correct),
        "short": RewardTerm(TermKind.length, 0.1, longest=9),
    }
    of_correct = ("plausibility", "third", "short")
    for gates, correct in ((GATED.gates, ()), (ADDITIVE.gates, of_correct)):
        rules = RewardConfig(gates, terms)
        assert weighted_terms(rules) == ("plausibility", "second", "third", "short")
        assert service_terms(rules) == ("plausibility", "second", "third")
        assert needed(measured(True, Verdict.WRONG), rules) == ("plausibility", "second", "short")
        assert needed(measured(True, Verdict.CORRECT), rules) == correct
        assert needed(measured(True, Verdict.UNVERIFIED), rules) == ()
        assert needed(measured(False, Verdict.WRONG), rules) == ()


def test_terms_are_added_one_by_one_in_the_order_of_the_configuration() -> None:
    # with compensated summation, or in another order, the last digit differs
    weights = {"first": 0.1, "second": 0.2, "third": 0.3}
    terms = {name: RewardTerm(TermKind.judge, weight) for name, weight in weights.items()}
    given = {"third": 1.0, "first": 1.0, "second": 1.0}
    value = compose(measured(True, Verdict.WRONG), given, RewardConfig(terms=terms)).value
    assert value == 0.1 + 0.2 + 0.3
    assert value != 0.3 + 0.2 + 0.1
    assert value != math.fsum(weights.values())


def test_a_kind_says_what_is_asked_and_finds_the_number_in_the_answer() -> None:
    problem, completion = Problem("p", "How many?", "5"), Completion("c", "p", "text", (7, 8), (), "stop")
    user = {"role": "user", "content": "How many? Box it."}
    question = Question((1, 2), [user], problem, completion)
    model, judge = KINDS[TermKind.reward_model], KINDS[TermKind.judge]
    own, named = RewardTerm(), RewardTerm(model="owner/name")
    chat = (user, {"role": "assistant", "content": "text"})
    assert model.item(own, question) == (1, 2, 7, 8)
    assert model.item(named, question) == chat
    assert model.item(replace(own, input=RewardInput.chat), question) == chat
    assert model.item(replace(named, input=RewardInput.tokens), question) == (1, 2, 7, 8)
    assert judge.item(RewardTerm(), question) == ("How many?", "text")
    raw = judge.raw(Judgement((3, 2, 1, 3), ((0.0, 0.0, 0.5, 0.5),) * 4))
    assert json.loads(json.dumps(raw)) == raw
    # (3 + 2 + 1 + 3) / 12, and (2 + 3) / 2 / 3
    assert judge.value(RewardTerm(), raw) == 0.75
    assert judge.value(RewardTerm(grading=Grading.expected), raw) == pytest.approx(5 / 6)
    assert {*KINDS, *RULES} == set(TermKind)
    assert not set(KINDS) & set(RULES)


def term_rules(**term: Any) -> RewardConfig:
    return RewardConfig(ADDITIVE.gates, {"own": RewardTerm(weight=1.0, **term)})


def values_of(rollouts: Sequence[Rollout], group_size: int, **term: Any) -> list[float | None]:
    return [rollout.reward.value for rollout in rewarded(rollouts, group_size, term_rules(**term))]


def test_values_become_scores() -> None:
    wrongs = [measured(True, Verdict.WRONG, own=r) for r in (0.0, math.log(3), -2000.0, 2000.0)]
    # sigmoid(ln 3) = 3 / 4, which a reward model's is by itself
    for normalise in (Normalisation.auto, Normalisation.sigmoid):
        assert values_of(wrongs, 4, normalise=normalise) == pytest.approx([0.5, 0.75, 0, 1])
    assert values_of(wrongs, 4, normalise=Normalisation.none) == [0.0, math.log(3), -2000.0, 2000.0]


def test_a_z_score_is_of_the_group_and_of_what_it_has() -> None:
    # 1, 3 -> mean 2, deviation 1; no value: masked; a group of one; equal values
    groups = [
        [measured(True, Verdict.WRONG, own=1.0), measured(True, Verdict.WRONG, own=3.0)],
        [measured(True, Verdict.WRONG, own=9.0), measured(True, Verdict.WRONG, {"own": "deadline"})],
        [measured(True, Verdict.WRONG, own=4.0), measured(True, Verdict.WRONG, own=4.0)],
        [measured(False, Verdict.WRONG), measured(True, Verdict.CORRECT, own=5.0)],
    ]
    rows = [row for group in groups for row in group]
    values = values_of(rows, 2, normalise=Normalisation.z_score)
    assert values == [-1.0, 1.0, 0.0, None, 0.0, 0.0, -1.0, 0.0]


def test_rules_on_the_completion_itself() -> None:
    rows = [measured(True, Verdict.WRONG, tokens=n) for n in (5, 10, 20, 40)]
    # below 10: 5 / 10; above 20: 20 / 40
    assert values_of(rows, 4, kind=TermKind.length, shortest=10, longest=20) == [0.5, 1.0, 1.0, 0.5]
    assert values_of(rows, 4, kind=TermKind.length, shortest=10) == [0.5, 1.0, 1.0, 1.0]
    right = measured(True, Verdict.CORRECT)
    assert values_of([rows[0], right], 2, kind=TermKind.verdict) == [1.0, 0.0]


def test_diversity_is_the_share_of_other_errors_in_the_step() -> None:
    # 5 is right: errors +2, +2, +1; the others of each: 1 of 2 differ, 1 of 2, 2 of 2; the right one has none
    texts = [rf"<think>a</think>\boxed{{{answer}}}" for answer in (7, 7, 6, 5)]
    verdicts = [Verdict.WRONG] * 3 + [Verdict.CORRECT]
    rows = [measured(True, v, text=text) for v, text in zip(verdicts, texts, strict=True)]
    assert values_of(rows, 2, kind=TermKind.diversity) == [0.5, 0.5, 1.0, 0.0]
    assert values_of(rows[:1], 1, kind=TermKind.diversity) == [1.0]


def test_rewards_can_be_composed_again_with_other_rules() -> None:
    rows = [measured(True, Verdict.WRONG, plausibility=r, coherence={"scores": [3] * 4}) for r in (0.0, 1.0)]
    first = rewarded(rows, 2, GATED)
    other = replace(GATED, terms={**GATED.terms, "coherence": RewardTerm(TermKind.judge, 0.1)})
    again = rewarded(first, 2, other)
    assert [rollout.reward.value for rollout in first] == pytest.approx([0.875, 0.75 + 0.25 * sigmoid(1)])
    assert [rollout.reward.value for rollout in again] == pytest.approx([0.725, 0.6 + 0.25 * sigmoid(1)])
    assert rewarded(again, 2, GATED) == first


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(score: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        wrong_rewarded(both(score, 0.5), GATED)
    with pytest.raises(ValueError, match="also reported missing"):
        wrong_rewarded(both(0.5, 0.5), GATED, coherence="deadline")


@given(
    st.booleans(),
    st.sampled_from(Verdict),
    st.dictionaries(st.sampled_from(["wrong", "plausibility", "coherence"]), st.floats(0, 1)),
    st.booleans(),
)
def test_no_value_exactly_when_a_cause_is_named(
    format_ok: bool, verdict: Verdict, scores: dict[str, float], gated: bool
) -> None:
    rules, rollout = GATED if gated else ADDITIVE, measured(format_ok, verdict)
    reward = compose(rollout, scores, rules)
    assert reward.masked == bool(reward.missing)
    if set(needed(rollout, rules)) - scores.keys():
        assert reward.masked
    if reward.value is not None:
        assert -1 <= reward.value <= 1
        # nothing but a verified-wrong, well-formed completion earns the wrong share
        if reward.value >= 0.5 and gated:
            assert format_ok
            assert verdict is Verdict.WRONG


def test_ordinary_reward() -> None:
    values = {
        (format_ok, verdict): correctness(Reward(None, format_ok, verdict)).value
        for format_ok in (True, False)
        for verdict in (Verdict.CORRECT, Verdict.WRONG)
    }
    assert values.pop((True, Verdict.CORRECT)) == 1.0
    assert set(values.values()) == {0.0}
    assert correctness(Reward(None, False, Verdict.UNVERIFIED)).value == 0.0
    masked = correctness(Reward(None, True, Verdict.UNVERIFIED, missing={"verdict": "timeout"}))
    assert masked.masked
    assert masked.missing == {"verdict": "timeout"}


def test_what_the_engine_did_not_write_has_no_reward() -> None:
    dropped = measured(False, Verdict.UNVERIFIED, {"rollout": "abort"})
    for rules in (None, GATED):
        [rollout] = rewarded([dropped], 1, rules)
        assert (rollout.reward.value, rollout.reward.missing) == (None, {"rollout": "abort"})


def test_masked_completions_are_counted_by_term_and_cause() -> None:
    rewards = [
        Reward(None, True, Verdict.UNVERIFIED, missing={"verdict": "timeout"}),
        Reward(None, True, Verdict.UNVERIFIED, missing={"verdict": "timeout"}),
        Reward(None, True, Verdict.WRONG, missing={"plausibility": "deadline", "coherence": "unparsable"}),
        Reward(0.0, True, Verdict.CORRECT),
        Reward(-1.0, False, Verdict.WRONG),
    ]
    report = mask_report(rewards)
    assert report == {
        "coherence": {"unparsable": 1},
        "plausibility": {"deadline": 1},
        "verdict": {"timeout": 2},
    }
    check_failures(rewards, 0.5, "reverse_rl, step 3")  # 2 of 4 verdicts: the bound itself is allowed
    with pytest.raises(
        TooManyMaskedError, match=r"reverse_rl, step 3: verdict failed for 2 of the 4 .*50%.*40%.*2 x timeout"
    ):
        check_failures(rewards, 0.4, "reverse_rl, step 3")


def failing_judge(num_asked: int, num_failed: int) -> list[Reward]:
    missing = {"coherence": "deadline"}
    failed = [Reward(None, True, Verdict.WRONG, {"plausibility": 0.5}, missing)] * num_failed
    terms = {"plausibility": 0.5, "coherence": 0.5}
    return failed + [Reward(0.75, True, Verdict.WRONG, terms)] * (num_asked - num_failed)


def test_a_service_that_fails_for_all_it_was_asked_stops_a_run_of_right_completions() -> None:
    right = [Reward(0.0, True, Verdict.CORRECT)] * 80
    with pytest.raises(TooManyMaskedError, match=r"coherence failed for 20 of the 20 .*20 x deadline"):
        check_failures(right + failing_judge(20, 20), 0.2, "reverse_rl, step 0")
    malformed = [Reward(-1.0, False, Verdict.UNVERIFIED)] * 85
    dead = [Reward(None, True, Verdict.UNVERIFIED, missing={"verdict": "crashed"})] * 15
    with pytest.raises(TooManyMaskedError, match=r"verdict failed for 15 of the 15"):
        check_failures(malformed + dead, 0.2, "reverse_rl, step 0")


def test_a_share_below_the_bound_and_a_single_failure_go_on() -> None:
    check_failures(failing_judge(20, 4), 0.2, "")
    check_failures(failing_judge(1, 1), 0.2, "")
    check_failures([], 0.2, "")
    with pytest.raises(TooManyMaskedError, match="12 of the 20"):
        check_failures(failing_judge(20, 12), 0.2, "")


def test_an_engine_that_fails_stops_the_run() -> None:
    failed = [Reward(None, False, Verdict.UNVERIFIED, missing={"rollout": "abort"})] * 3
    with pytest.raises(TooManyMaskedError, match=r"rollout failed for 3 of the 10 .*3 x abort"):
        check_failures(failed + [Reward(1.0, True, Verdict.CORRECT)] * 7, 0.2, "")


def test_grpo_advantages_by_hand() -> None:
    # rewards 1, 0, 0, 1: mean 1/2, population std 1/2 -> +-1. Dr. GRPO: +-1/2
    assert group_advantages([[1, 0, 0, 1]]).tolist() == [[1, -1, -1, 1]]
    assert group_advantages([[1, 0, 0, 1]], Advantage.dr_grpo).tolist() == [[0.5, -0.5, -0.5, 0.5]]
    # 0, 3, 6: mean 3, variance (9 + 0 + 9) / 3 = 6
    np.testing.assert_allclose(group_advantages([[0, 3, 6]]), [[-3 / math.sqrt(6), 0, 3 / math.sqrt(6)]])


def test_masked_members_are_left_out_of_mean_and_deviation() -> None:
    # without the masked member: 1, 0, 0, 1 as above; a masked member read as 0 or -1 would shift the mean
    assert group_advantages([[1, None, 0, 0, 1]]).tolist() == [[1, 0, -1, -1, 1]]
    assert group_advantages([[1, math.nan, 0, 0, 1]]).tolist() == [[1, 0, -1, -1, 1]]


def test_groups_that_teach_nothing_contribute_nothing() -> None:
    groups = [[0.1, 0.1, 0.1], [None, None, 5.0], [None, None, None], [0.7, None, 0.7 + 1e-9]]
    for normalise in (True, False):
        assert group_advantages(groups, normalise).tolist() == [[0.0] * 3] * 4


def test_bad_rewards_are_errors() -> None:
    with pytest.raises(ValueError, match="infinite"):
        group_advantages([[1.0, math.inf]])
    with pytest.raises(ValueError, match="shape"):
        group_advantages([1.0, 2.0])


@given(st.lists(st.lists(st.none() | st.floats(-1, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_are_centred_and_scale_free(rewards: list[list[float | None]]) -> None:
    advantages = group_advantages(rewards)
    assert np.isfinite(advantages).all()
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-6)
    for row, group in zip(advantages, rewards, strict=True):
        assert all(row[g] == 0 for g in range(4) if group[g] is None)
        if row.any():
            members = [row[g] for g in range(4) if group[g] is not None]
            np.testing.assert_allclose(np.square(members).mean(), 1, rtol=1e-6)


def test_rloo_and_reinforce_pp_by_hand() -> None:
    # 0, 3, 6: the others' means are 4.5, 3, 1.5; of two unmasked members each is measured by the other.
    assert group_advantages([[0, 3, 6]], Advantage.rloo).tolist() == [[-4.5, 0, 4.5]]
    assert group_advantages([[1, None, 0]], Advantage.rloo).tolist() == [[1, 0, -1]]
    # centred: -1, 1 and -3, 3, and a group without spread that counts: variance (1 + 1 + 9 + 9) / 6.
    rewards = [[0, 2], [0, 6], [5, 5]]
    expected = np.array([[-1, 1], [-3, 3], [0, 0]]) / math.sqrt(20 / 6)
    np.testing.assert_allclose(group_advantages(rewards, Advantage.reinforce_pp), expected)
    assert group_advantages([[1, 1]], Advantage.reinforce_pp).tolist() == [[0, 0]]


def test_overlong_penalties_by_hand() -> None:
    assert overlong_penalties([10, 80, 85, 90, 100], 100, 20).tolist() == [0, 0, -0.25, -0.5, -1]
