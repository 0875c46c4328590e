from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pns.algo.pairs import (
    ENDED,
    balance_flow,
    build_pairs,
    divergent_tokens,
    first_divergence,
    lengths_match,
    margin_masks,
    match_by_length,
    mean_distance,
    nearest_pairs,
    num_margin_tokens,
    num_shared,
    one_sidedness,
    one_sidedness_by_chance,
    preference_rows,
    token_flow,
)
from pns.config import MarginMask
from pns.records import Completion, PreferencePair, Problem

token_sequences = st.lists(st.integers(0, 3), max_size=6)


def completion(text: str, length: int) -> Completion:
    return Completion(text, "p", text, (7,) * length, (-1.0,) * length, "stop")


def test_length_bound() -> None:
    assert lengths_match(10, 15, 1.5)  # 15 / 10 = 1.5, the bound itself
    assert lengths_match(15, 10, 1.5)
    assert not lengths_match(10, 16, 1.5)
    assert not lengths_match(0, 0, 1.5)


def test_matching_by_length() -> None:
    # sorted: 10 20 30 against 11 14 100 -> 10-11; 20-14 is 1.43; 30-100 is 3.33
    assert match_by_length([30, 10, 20], [14, 100, 11], 1.5) == [(1, 2), (2, 0)]
    assert match_by_length([], [5], 1.5) == []


@given(st.lists(st.integers(1, 12), max_size=5), st.lists(st.integers(1, 12), max_size=5))
def test_matching_is_as_large_as_possible(a: list[int], b: list[int]) -> None:
    matched = match_by_length(a, b, 1.5)
    assert all(lengths_match(a[i], b[j], 1.5) for i, j in matched)
    assert len({i for i, _ in matched}) == len({j for _, j in matched}) == len(matched)

    def largest(remaining_a: list[int], remaining_b: list[int]) -> int:  # by trying everything
        if not remaining_a:
            return 0
        first, rest = remaining_a[0], remaining_a[1:]
        options = [largest(rest, remaining_b)]
        options += [
            1 + largest(rest, remaining_b[:j] + remaining_b[j + 1 :])
            for j, n in enumerate(remaining_b)
            if lengths_match(first, n, 1.5)
        ]
        return max(options)

    assert len(matched) == largest(a, b)


def test_pairs_of_a_problem_and_what_is_dropped() -> None:
    problems = [Problem(name, f"question {name}", "1") for name in ("both", "none", "alone", "long")]
    chosen = {
        "both": [completion("good", 10), completion("fine", 30)],
        "alone": [completion("good", 10)],
        "long": [completion("good", 10)],
    }
    rejected = {
        "both": [completion("much too long", 21), completion("bad", 20), completion("worse", 40)],
        "none": [completion("bad", 10)],
        "long": [completion("bad", 21)],
    }
    pairs, counts = build_pairs(problems, chosen, rejected, max_length_ratio=2.0)
    assert pairs == [PreferencePair("both", "question both", "good", "bad", "pns")]
    assert counts == {"pairs": 1, "no_chosen": 1, "no_rejected": 1, "length_ratio": 1}
    # two pairs a problem: 10 takes 20, then 30 takes 21 (the first not taken)
    pairs, counts = build_pairs(
        problems, chosen, rejected, max_length_ratio=2.0, pairs_per_problem=2, source="rs"
    )
    assert [(pair.chosen, pair.rejected, pair.source) for pair in pairs] == [
        ("good", "bad", "rs"),
        ("fine", "much too long", "rs"),
    ]
    assert counts["pairs"] == 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "index", "tokens"),
    [
        ([1, 2, 3], [1, 4, 3], 1, (2, 4)),
        ([1], [2], 0, (1, 2)),
        ([1, 2], [1, 2, 3], 2, (ENDED, 3)),
        ([1, 2], [1], 1, (2, ENDED)),
        ([1, 2], [1, 2], None, None),
        ([], [], None, None),
    ],
)
def test_first_divergence(
    chosen: list[int], rejected: list[int], index: int | None, tokens: tuple[int, int] | None
) -> None:
    assert first_divergence(chosen, rejected) == index
    assert divergent_tokens(chosen, rejected) == tokens


def test_flow_and_its_one_sidedness() -> None:
    pairs = [([1, 5], [1, 6])] * 3 + [([6], [5])] + [([1, 8], [1, 9])] + [([2], [2])]
    flow = token_flow(pairs)
    assert flow == {(5, 6): 3, (6, 5): 1, (8, 9): 1}
    # |3 - 1| + |1 - 0| = 3 of 5
    assert one_sidedness(flow) == 0.6
    assert one_sidedness({(1, 2): 4}) == 1.0
    assert one_sidedness({(1, 2): 4, (2, 1): 4}) == 0.0
    assert one_sidedness({}) is None
    assert balance_flow(pairs) == [0, 3]  # one 5 -> 6 and the only 6 -> 5


def test_one_sidedness_by_chance() -> None:
    # A walk of 1, 2, 3, 4 steps is 1, 1, 1.5, 1.5 away: by hand over all 2, 4, 8, 16 walks.
    assert [mean_distance(steps) for steps in (1, 2, 3, 4)] == [1, 1, 1.5, 1.5]
    assert mean_distance(10_000) == pytest.approx(math.sqrt(2 * 10_000 / math.pi), rel=1e-3)
    flow = {(5, 6): 3, (6, 5): 1, (8, 9): 1}
    assert one_sidedness_by_chance(flow) == (1.5 + 1) / 5
    assert one_sidedness_by_chance({(1, 2): 1, (3, 4): 1}) == 1.0  # of single counts nothing else can be said
    assert one_sidedness_by_chance({}) is None


def test_every_negative_stands_beside_the_nearest_right_one() -> None:
    def side(*token_ids: int) -> Completion:
        return Completion("", "p", "", token_ids, (), "stop")

    rights = {"p": [side(1, 2, 3), side(1, 4, 3)], "none": []}
    negatives = {"p": [side(1, 4, 5), side(9), side(1, 2, 3, 7)], "none": [side(1)], "other": [side(2)]}
    assert nearest_pairs(rights, negatives) == [
        ((1, 4, 3), (1, 4, 5)),
        ((1, 2, 3), (9,)),  # as near as the other: the first
        ((1, 2, 3), (1, 2, 3, 7)),
    ]
    assert num_shared([1, 2], [1, 2]) == num_shared([1, 2], [1, 2, 3]) == 2


@given(st.lists(st.tuples(token_sequences, token_sequences), max_size=20))
def test_a_balanced_set_has_no_side(pairs: list[tuple[list[int], list[int]]]) -> None:
    kept = [pairs[index] for index in balance_flow(pairs)]
    assert one_sidedness(token_flow(kept)) in (None, 0.0)
    assert balance_flow(kept) == list(range(len(kept)))


def test_margin_masks() -> None:
    chosen, rejected = [1, 2, 3, 4], [1, 2, 9, 8, 7]

    def masks(margin: MarginMask, tokens: int | None = None) -> list[list[int]]:
        return [mask.tolist() for mask in margin_masks(chosen, rejected, margin, tokens)]

    assert masks(MarginMask.completion, 3) == [[1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert masks(MarginMask.first_wrong_step, 3) == [[1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert masks(MarginMask.first_wrong_step) == [[1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert masks(MarginMask.first_divergent_token) == [[0, 0, 1, 0], [0, 0, 1, 0, 0]]
    same = margin_masks([1, 2], [1, 2], MarginMask.first_divergent_token)
    assert [mask.tolist() for mask in same] == [[0, 0], [0, 0]]
    ended = margin_masks([1], [1, 2, 3], MarginMask.first_divergent_token)
    assert [mask.tolist() for mask in ended] == [[0], [0, 1, 0]]


def test_tokens_of_the_margin() -> None:
    # "Bob has 12" as tokens "Bob", " has", " 12" begins at 0, 3, 7; a margin of 8 characters ends inside the
    # third
    assert num_margin_tokens([0, 3, 7], 8) == 3
    assert num_margin_tokens([0, 3, 7], 7) == 2
    assert num_margin_tokens([0, 3, 7], 0) == 0
    assert num_margin_tokens([0, 3, 7], None) == 3


def test_standard_preference_rows() -> None:
    pair = PreferencePair("p", "2+2?", "4", "5")
    assert preference_rows([pair]) == [
        {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
        }
    ]
    row = preference_rows([pair], system_prompt="Think.", assistant_prefix="<think>")[0]
    assert row["prompt"][0] == {"role": "system", "content": "Think."}
    assert row["rejected"][0]["content"] == "<think>5"
