from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pns.algo.advantages import group_advantages, overlong_penalties
from pns.algo.formatting import check_format
from pns.algo.judging import Judgement
from pns.algo.reward import (
    KINDS,
    TooManyMaskedError,
    check_failures,
    compose,
    correctness,
    mask_report,
    needed,
    weighted_terms,
)
from pns.config import Advantage, RewardConfig, RewardTerm, TermKind
from pns.records import Completion, Problem, Reward, Verdict

GATED = RewardConfig()
ADDITIVE = RewardConfig(gated=False)
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


def both(plausibility: float, coherence: float) -> dict[str, float]:
    return {"plausibility": plausibility, "coherence": coherence}


def test_gates_come_in_order() -> None:
    # malformed first, whatever else is known or missing
    assert compose(False, Verdict.CORRECT, {}, {}, GATED).value == -1.0
    assert compose(False, Verdict.UNVERIFIED, {}, {"verdict": "timeout"}, GATED).value == -1.0
    # then correct: no term is needed
    correct = compose(True, Verdict.CORRECT, {}, {"plausibility": "actor died"}, GATED)
    assert correct.value == 0.0
    assert correct.missing == {}
    # then unverified: masked, never "wrong"
    unverified = compose(True, Verdict.UNVERIFIED, both(0.9, 1.0), {"verdict": "timeout"}, GATED)
    assert unverified.masked
    assert unverified.missing == {"verdict": "timeout"}
    # wrong: 0.5 + 0.25 * 0.8 + 0.25 * 0.5 = 0.825
    wrong = compose(True, Verdict.WRONG, both(0.8, 0.5), {}, GATED)
    assert wrong.value == pytest.approx(0.825)
    assert wrong.terms == both(0.8, 0.5)


def test_a_missing_term_masks_unless_its_weight_is_zero() -> None:
    masked = compose(True, Verdict.WRONG, {"plausibility": 0.8}, {"coherence": "unparsable"}, GATED)
    assert masked.masked
    assert masked.missing == {"coherence": "unparsable"}
    assert masked.terms == {"plausibility": 0.8}
    assert compose(True, Verdict.WRONG, {}, {}, GATED).missing == {
        "plausibility": "not computed",
        "coherence": "not computed",
    }
    no_judge = RewardConfig(wrong=0.6, terms={"plausibility": MODEL_04, "coherence": RewardTerm()})
    # 0.6 + 0.4 * 0.5 = 0.8
    assert compose(True, Verdict.WRONG, {"plausibility": 0.5}, {}, no_judge).value == pytest.approx(0.8)


def test_additive_form_drops_the_gate_on_correct() -> None:
    # correct: 0.5 * 0 + 0.25 * 0.8 + 0.25 * 0.4 = 0.3; wrong: 0.5 more
    assert compose(True, Verdict.CORRECT, both(0.8, 0.4), {}, ADDITIVE).value == pytest.approx(0.3)
    assert compose(True, Verdict.WRONG, both(0.8, 0.4), {}, ADDITIVE).value == pytest.approx(0.8)
    late = compose(True, Verdict.CORRECT, {"coherence": 0.4}, {"plausibility": "deadline"}, ADDITIVE)
    assert late.missing == {"plausibility": "deadline"}
    assert compose(True, Verdict.UNVERIFIED, both(0.8, 0.4), {}, ADDITIVE).masked
    assert compose(False, Verdict.WRONG, both(0.8, 0.4), {}, ADDITIVE).value == -1.0


def test_only_what_counts_is_needed() -> None:
    terms = {
        "plausibility": RewardTerm(TermKind.reward_model, 0.25),
        "unused": RewardTerm(TermKind.judge, 0.0),
        "second": RewardTerm(TermKind.reward_model, 0.1),
    }
    for gated, correct in ((True, ()), (False, ("plausibility", "second"))):
        rules = RewardConfig(terms=terms, gated=gated)
        assert weighted_terms(rules) == ("plausibility", "second")
        assert needed(True, Verdict.WRONG, rules) == ("plausibility", "second")
        assert needed(True, Verdict.CORRECT, rules) == correct
        assert needed(True, Verdict.UNVERIFIED, rules) == ()
        assert needed(False, Verdict.WRONG, rules) == ()


def test_terms_are_added_one_by_one_in_the_order_of_the_configuration() -> None:
    # with compensated summation, or in another order, the last digit differs
    weights = {"first": 0.1, "second": 0.2, "third": 0.3}
    terms = {name: RewardTerm(TermKind.judge, weight) for name, weight in weights.items()}
    given = {"third": 1.0, "first": 1.0, "second": 1.0}
    value = compose(True, Verdict.WRONG, given, {}, RewardConfig(wrong=0.0, terms=terms)).value
    assert value == 0.1 + 0.2 + 0.3
    assert value != 0.3 + 0.2 + 0.1
    assert value != math.fsum(weights.values())


def test_a_kind_says_what_is_asked_and_makes_the_answer_a_score() -> None:
    problem, completion = Problem("p", "How many?", "5"), Completion("c", "p", "text", (7, 8), (), "stop")
    model, judge = KINDS[TermKind.reward_model], KINDS[TermKind.judge]
    assert model.item((1, 2), problem, completion) == (1, 2, 7, 8)
    assert judge.item((1, 2), problem, completion) == ("How many?", "text")
    # sigmoid(ln 3) = 3 / 4
    assert [model.score(r) for r in (0.0, math.log(3), -2000.0, 2000.0)] == pytest.approx([0.5, 0.75, 0, 1])
    assert [judge.score(Judgement(scores)) for scores in ((0, 0, 0, 0), (3, 2, 1, 3), (3, 3, 3, 3))] == [
        0,
        0.75,
        1,
    ]
    assert set(KINDS) == set(TermKind)


@pytest.mark.parametrize("term", [math.nan, -0.1, 1.1, math.inf])
def test_a_term_outside_its_range_is_an_error(term: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        compose(True, Verdict.WRONG, both(term, 0.5), {}, GATED)
    with pytest.raises(ValueError, match="also reported missing"):
        compose(True, Verdict.WRONG, both(0.5, 0.5), {"coherence": "deadline"}, GATED)


@given(
    st.booleans(),
    st.sampled_from(Verdict),
    st.dictionaries(st.sampled_from(["plausibility", "coherence"]), st.floats(0, 1)),
    st.booleans(),
)
def test_no_value_exactly_when_a_cause_is_named(
    format_ok: bool, verdict: Verdict, terms: dict[str, float], gated: bool
) -> None:
    rules = RewardConfig(gated=gated)
    reward = compose(format_ok, verdict, terms, {}, rules)
    assert reward.masked == bool(reward.missing)
    if set(needed(format_ok, verdict, rules)) - terms.keys():
        assert reward.masked
    if reward.value is not None:
        assert -1 <= reward.value <= 1
        # nothing but a verified-wrong, well-formed completion earns the wrong share
        if reward.value >= 0.5 and gated:
            assert format_ok
            assert verdict is Verdict.WRONG


def test_ordinary_reward() -> None:
    assert correctness(True, Verdict.CORRECT).value == 1.0
    assert correctness(True, Verdict.WRONG).value == 0.0
    assert correctness(False, Verdict.CORRECT).value == 0.0
    assert correctness(False, Verdict.UNVERIFIED).value == 0.0
    masked = correctness(True, Verdict.UNVERIFIED, {"verdict": "timeout"})
    assert masked.masked
    assert masked.missing == {"verdict": "timeout"}


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
