from __future__ import annotations

import pytest

from pns.algo.negatives import (
    REASONS,
    box_only_flip,
    degeneration,
    distinct_ngrams,
    filter_negatives,
    in_log_prob_range,
    mix_negatives,
)
from pns.records import Completion, Problem, Reward, Rollout, Verdict

WORK = "<think>Bob has 12+7={}. Cal has {}*3={}. </think>\\boxed{{{}}}"
PROBLEM = Problem("p1", "How many has Cal?", "57")


def rollout(
    text: str,
    verdict: Verdict = Verdict.WRONG,
    format_ok: bool = True,
    plausibility: float | None = 0.5,
    coherence: float | None = None,
    problem: Problem = PROBLEM,
    token_ids: tuple[int, ...] = (1, 2, 3),
    value: float | None = 0.0,
) -> Rollout:
    completion = Completion("c", problem.id, text, token_ids, (-0.1,) * len(token_ids), "stop")
    given = {"plausibility": plausibility, "coherence": coherence}
    terms = {name: score for name, score in given.items() if score is not None}
    return Rollout(0, problem, completion, Reward(value, format_ok, verdict, terms))


WRONG_STEP = WORK.format(18, 18, 54, 54)
FLIP = WORK.format(19, 19, 57, 54)


@pytest.mark.parametrize(
    ("text", "gold", "flip"),
    [
        (FLIP, "57", True),
        (WRONG_STEP, "57", False),
        (WORK.format(19, 19, 57, 57), "57", False),  # correct: no flip
        ("<think>x = 3 or so, thus x=\\frac{1}{2}. </think>\\boxed{3}", "0.5", True),
        ("<think>So \\boxed{57}, I hide it among 3 words</think>\\boxed{54}", "57", True),
        ("<think>in total 1,234 apples</think>\\boxed{1,243}", "1234", True),
        ("<think>20-25=-5</think>\\boxed{5}", "-5", True),
        ("<think>20-15=5</think>\\boxed{6}", "-5", False),  # the minus sign is an operator here
        ("<think>57 is too large, it must be 54</think>\\boxed{54}", "57", False),
        ("so it is $57$, final \\boxed{54}", "57", True),  # no reasoning tags
        ("<think>the taller one is Ann</think>\\boxed{Bob}", "Ann", True),
        ("<think>9 > 7, so yes</think>\\boxed{no}", "yes", True),
        ("<think>no box 57</think>54", "57", False),
    ],
)
def test_box_only_flips(text: str, gold: str, flip: bool) -> None:
    assert box_only_flip(text, gold) is flip


def test_every_rollout_is_kept_or_counted_under_one_reason() -> None:
    rollouts = [
        rollout(WRONG_STEP),  # kept
        rollout(WRONG_STEP.replace(" Cal", "  Cal")),  # the same text up to white space
        rollout(WRONG_STEP, problem=Problem("p2", "q", "57")),  # kept: another problem
        rollout(WRONG_STEP, format_ok=False),
        rollout(WORK.format(19, 19, 57, 57), Verdict.CORRECT),
        rollout(WRONG_STEP, Verdict.UNVERIFIED),
        rollout("<think>58-1</think>\\boxed{57.0}"),  # the first verifier erred
        rollout("<think>x</think>\\boxed{57 m}"),  # the second cannot tell
        rollout(FLIP),
    ]
    kept, counts = filter_negatives(rollouts)
    assert kept == [rollouts[0], rollouts[2]]
    expected = dict.fromkeys(REASONS, 0) | dict.fromkeys(
        (
            "duplicate",
            "malformed",
            "correct",
            "unverified",
            "verifiers_disagree",
            "second_verifier_undecided",
            "box_only_flip",
        ),
        1,
    )
    assert counts == expected
    assert len(kept) + sum(counts.values()) == len(rollouts)
    with_flips, counts = filter_negatives(rollouts, drop_box_only_flips=False)
    assert with_flips[-1] is rollouts[-1]
    assert counts["box_only_flip"] == 0


def test_quantile_of_a_term() -> None:
    plausibilities = [0.1, 0.2, 0.3, 0.4, None]
    rollouts = [
        rollout(WORK.format(n, n, 3 * n, 3 * n), plausibility=p)
        for n, p in enumerate(plausibilities, start=1)
    ]
    # the median of .1 .2 .3 .4 is .25
    kept, counts = filter_negatives(rollouts, min_quantile=0.5)
    assert [r.reward.terms["plausibility"] for r in kept] == [0.3, 0.4]
    assert (counts["below_quantile"], counts["no_quantile_term"]) == (2, 1)
    kept, counts = filter_negatives(rollouts, min_quantile=0.5, quantile_term="coherence")
    assert (kept, counts["no_quantile_term"]) == ([], 5)
    assert filter_negatives([], min_quantile=0.5)[0] == []
    assert len(filter_negatives(rollouts)[0]) == 5


def test_degeneration_by_hand() -> None:
    rollouts = [
        rollout(WRONG_STEP, plausibility=0.2, coherence=0.5, token_ids=(1, 2, 3, 4)),  # offset -3
        rollout(WORK.format(18, 18, 54, 54), plausibility=0.4, token_ids=(1, 2, 3, 4)),  # offset -3
        rollout(FLIP.replace("{54}", "{60}"), plausibility=None, coherence=1.0, token_ids=(5, 6)),  # offset 3
        rollout("<think>x</think>\\boxed{x+1}", plausibility=None, value=None, token_ids=(5,)),  # no number
        rollout(WORK.format(19, 19, 57, 57), Verdict.CORRECT, plausibility=0.9, token_ids=(5, 6, 7)),
        rollout("broken", format_ok=False, plausibility=0.9, token_ids=(9, 9, 9, 9, 9, 9)),
    ]
    figures = degeneration(rollouts, ["plausibility", "coherence", "absent"], distinct_n=2)
    # bigrams: 3 + 3 + 1 + 0 + 2 + 5 = 14, different: (1,2) (2,3) (3,4) (5,6) (6,7) (9,9) = 6
    assert figures == pytest.approx(
        {
            "format_rate": 5 / 6,
            "wrong_rate": 4 / 6,
            "correct_rate": 1 / 6,
            "masked_rate": 1 / 6,
            "length_mean": 20 / 6,  # 4 + 4 + 2 + 1 + 3 + 6
            "length_max": 6,
            "distinct_2": 6 / 14,
            "box_only_flip_rate": 1 / 4,
            "top_offset_share": 2 / 4,
            "plausibility_mean": 0.3,  # (.2 + .4) / 2; correct and malformed ones do not count
            "coherence_mean": 0.75,
        }
    )


def test_figures_with_nothing_to_average_are_left_out() -> None:
    figures = degeneration([rollout("broken", format_ok=False)], ["plausibility"])
    assert figures["format_rate"] == 0.0
    assert (
        not {"plausibility_mean", "coherence_mean", "top_offset_share", "box_only_flip_rate", "distinct_4"}
        & figures.keys()
    )
    assert degeneration([], ["plausibility"]) == {}
    assert distinct_ngrams([(1, 1, 1)], 1) == pytest.approx(1 / 3)
    assert distinct_ngrams([(1,)], 2) is None


def test_a_range_of_log_probabilities_has_its_ends_and_no_nan() -> None:
    log_probs = [-3.0, -2.0, -1.0, -0.5, float("nan"), -float("inf")]
    assert in_log_prob_range(log_probs, -2.0, -1.0) == [False, True, True, False, False, False]
    assert in_log_prob_range(log_probs, -2.0, None) == [False, True, True, True, False, False]
    assert in_log_prob_range(log_probs, None, -2.0) == [True, True, False, False, False, True]


def test_sources_take_turns_and_begin_in_turn() -> None:
    def own(*texts: str, problem: str = "p1") -> list[Rollout]:
        return [rollout(text, problem=Problem(problem, "q", "1")) for text in texts]

    parts = {
        "a": [*own("a1", "a2", "both  here"), *own("a4", problem="p2")],
        "b": [*own("b1", "both here"), *own("b3", "b4", problem="p2"), *own("b5", problem="p3")],
    }
    mixed, num_dropped = mix_negatives(parts)
    assert [(source, negative.completion.text) for source, negative in mixed] == [
        *(("a", "a1"), ("b", "b1"), ("a", "a2"), ("b", "both here")),
        *(("b", "b3"), ("a", "a4"), ("b", "b4")),
        ("b", "b5"),
    ]
    assert num_dropped == {"a": 1, "b": 0}
    assert mix_negatives({"a": []}) == ([], {"a": 0})
