"""Agreement of step labels, by hand."""

import pytest

from pns.algo.agreement import agreement, cohens_kappa, consensus, label_quality
from pns.config import StepRule

JUDGE = [True, True, True, False, False, True, False, True, True, False]
MODEL = [True, True, False, False, False, True, True, True, False, False]


def test_kappa_by_hand() -> None:
    # 7 of 10 alike; 6 and 5 correct: by chance 0.6 x 0.5 + 0.4 x 0.5 = 0.5.
    assert cohens_kappa(JUDGE, MODEL) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohens_kappa(JUDGE, JUDGE) == 1
    assert cohens_kappa([True, False], [False, True]) == -1


@pytest.mark.parametrize("labels", [[], [True, True], [False]])
def test_kappa_of_labels_that_do_not_vary_tells_nothing(labels: list[bool]) -> None:
    assert cohens_kappa(labels, labels) is None


def test_agreement_has_marginals() -> None:
    assert agreement(JUDGE, MODEL) == {
        "agreement": 0.7,
        "kappa": pytest.approx(0.4),
        "judge_correct": 0.6,
        "process_reward_correct": 0.5,
    }
    assert set(agreement([], []).values()) == {None}


def test_label_quality_by_hand() -> None:
    # JUDGE says 6; MODEL, taken as exact, has 5; 4 are in both.
    quality = label_quality(JUDGE, MODEL)
    assert quality["precision"] == pytest.approx(4 / 6)
    assert quality["recall"] == pytest.approx(4 / 5)
    assert quality["f1"] == pytest.approx(8 / 11)
    assert quality["accuracy"] == pytest.approx(0.7)
    assert quality["kappa"] == pytest.approx(0.4)
    assert label_quality([False], [False])["precision"] is None


@pytest.mark.parametrize(
    ("rule", "correct"),
    [
        (StepRule.both, [True, False, False, False]),
        (StepRule.either, [True, True, True, False]),
        (StepRule.judge, [True, True, False, False]),
        (StepRule.process_reward, [True, False, True, False]),
    ],
)
def test_consensus_by_rule(rule: StepRule, correct: list[bool]) -> None:
    said = [(True, 0.5), (True, 0.49), (False, 0.9), (False, 0.1)]
    assert [consensus(judge, model, rule, 0.5) for judge, model in said] == correct


def test_a_missing_label_is_no_label() -> None:
    with pytest.raises(ValueError, match="missing"):
        consensus(None, 0.9, StepRule.either, 0.5)
    assert consensus(None, 0.9, StepRule.process_reward, 0.5)
