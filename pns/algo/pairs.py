"""Preference pairs: sides matched by length, where they diverge, what the margin covers, the export."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pns.config import MarginMask
from pns.records import Completion, PreferencePair, Problem

ENDED = -1  # stands for the token of a sequence that has ended before it diverges


def lengths_match(length_a: int, length_b: int, max_ratio: float) -> bool:
    """Whether |log(length_a / length_b)| <= log(max_ratio), in tokens; an empty side never matches."""
    shorter, longer = sorted((length_a, length_b))
    return shorter > 0 and longer <= max_ratio * shorter


def match_by_length(
    lengths_a: Sequence[int], lengths_b: Sequence[int], max_ratio: float
) -> list[tuple[int, int]]:
    """As many index pairs (a, b) with `lengths_match` as possible, no index twice; in order of length."""
    order_a = sorted(range(len(lengths_a)), key=lengths_a.__getitem__)
    order_b = sorted(range(len(lengths_b)), key=lengths_b.__getitem__)
    matched: list[tuple[int, int]] = []
    at_a = at_b = 0
    while at_a < len(order_a) and at_b < len(order_b):
        a, b = order_a[at_a], order_b[at_b]
        if lengths_match(lengths_a[a], lengths_b[b], max_ratio):
            matched.append((a, b))
            at_a, at_b = at_a + 1, at_b + 1
        elif lengths_a[a] <= lengths_b[b]:
            at_a += 1  # too short for this and every later b
        else:
            at_b += 1
    return matched


def build_pairs(
    problems: Sequence[Problem],
    chosen: Mapping[str, Sequence[Completion]],
    rejected: Mapping[str, Sequence[Completion]],
    max_length_ratio: float,
    pairs_per_problem: int = 1,
    source: str = "pns",
    sources: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Pair verified-correct (`chosen`) with negative (`rejected`) completions, both by problem id.

    Each chosen completion, in order, takes the first negative not yet taken that is within `max_length_ratio`
    of its length in tokens, until the problem has `pairs_per_problem`; arms that share `chosen` thus prefer
    the same chosen texts. A pair's source is that of `sources` by the id of its rejected completion, else
    `source`. Returns the pairs in the order of `problems`, and counts: `pairs`, and problems dropped for
    `no_chosen`, `no_rejected` (with a chosen one) and `length_ratio`.
    """
    pairs: list[PreferencePair] = []
    counts = {"pairs": 0, "no_chosen": 0, "no_rejected": 0, "length_ratio": 0}
    for problem in problems:
        candidates, negatives = chosen.get(problem.id, ()), list(rejected.get(problem.id, ()))
        if not candidates or not negatives:
            counts["no_rejected" if candidates else "no_chosen"] += 1
            continue
        own: list[PreferencePair] = []
        for candidate in candidates:
            if len(own) == pairs_per_problem:
                break
            length = len(candidate.token_ids)
            for negative in negatives:
                if lengths_match(length, len(negative.token_ids), max_length_ratio):
                    negatives.remove(negative)  # taken: each is used once
                    sides = candidate.text, negative.text
                    origin = sources.get(negative.id, source)
                    own.append(PreferencePair(problem.id, problem.prompt, *sides, origin))
                    break
        counts["length_ratio"] += not own
        pairs += own
    counts["pairs"] = len(pairs)
    return pairs, counts


def first_divergence(chosen_T: Sequence[int], rejected_T: Sequence[int]) -> int | None:
    """Index of the first token that differs, or that one side alone has; None for equal sequences."""
    for index, (right, wrong) in enumerate(zip_longest(chosen_T, rejected_T, fillvalue=ENDED)):
        if right != wrong:
            return index
    return None


def divergent_tokens(chosen_T: Sequence[int], rejected_T: Sequence[int]) -> tuple[int, int] | None:
    """The (right, wrong) tokens at the first divergence, `ENDED` beyond an end; None for equal sequences."""
    both = zip_longest(chosen_T, rejected_T, fillvalue=ENDED)
    return next(((right, wrong) for right, wrong in both if right != wrong), None)


def num_shared(chosen_T: Sequence[int], rejected_T: Sequence[int]) -> int:
    """Tokens that both sides have in common at their beginning."""
    divergence = first_divergence(chosen_T, rejected_T)
    return len(chosen_T) if divergence is None else divergence


def nearest_pairs(
    rights: Mapping[str, Sequence[Completion]], negatives: Mapping[str, Sequence[Completion]]
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Token ids of every negative of a problem that has right completions, beside those of the right one with
    the longest common prefix (the first of several); both sides are by problem id."""
    pairs: list[tuple[Sequence[int], Sequence[int]]] = []
    for identity in (name for name in negatives if rights.get(name)):
        candidates = [completion.token_ids for completion in rights[identity]]
        for negative in negatives[identity]:
            shared = [num_shared(right, negative.token_ids) for right in candidates]
            pairs.append((candidates[shared.index(max(shared))], negative.token_ids))
    return pairs


def token_flow(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Counter[tuple[int, int]]:
    """{(right, wrong): how many pairs of token ids replace the one by the other at the first divergence}."""
    tokens = (divergent_tokens(chosen, rejected) for chosen, rejected in pairs)
    return Counter(flow for flow in tokens if flow is not None)


def one_sidedness(flow: Mapping[tuple[int, int], int]) -> float | None:
    """How far a flow is from balance: sum of |n(a, b) - n(b, a)| over unordered token pairs, over all counts.
    0: as many wrong -> right as right -> wrong, for every two; 1: none the other way. None for no flow."""
    total = sum(flow.values())
    if not total:
        return None
    unordered = {(min(tokens), max(tokens)) for tokens in flow}
    return sum(abs(flow.get((a, b), 0) - flow.get((b, a), 0)) for a, b in unordered) / total


def one_sidedness_by_chance(flow: Mapping[tuple[int, int], int]) -> float | None:
    """The `one_sidedness` to expect of as many counts for every two tokens where either way is as likely:
    near 1 where most of them were seen once. None for no flow."""
    total = sum(flow.values())
    if not total:
        return None
    both_ways: Counter[tuple[int, int]] = Counter()
    for (a, b), count in flow.items():
        both_ways[min(a, b), max(a, b)] += count
    return sum(mean_distance(count) for count in both_ways.values()) / total


def mean_distance(num_steps: int) -> float:
    """Mean distance from the start of a walk of `num_steps` steps of 1 either way: E|2 Bin(n, 1/2) - n| =
    n C(n - 1, floor((n - 1) / 2)) / 2^(n - 1)."""
    return num_steps * math.comb(num_steps - 1, (num_steps - 1) // 2) / 2 ** (num_steps - 1)


def balance_flow(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Indices, ascending, of a largest subset of (chosen, rejected) token-id pairs whose flow is balanced: of
    every (right, wrong) as many as of (wrong, right), the earliest. Equal sequences are left out."""
    flow = token_flow(pairs)
    taken: Counter[tuple[int, int]] = Counter()
    kept: list[int] = []
    for index, (chosen, rejected) in enumerate(pairs):
        tokens = divergent_tokens(chosen, rejected)
        if tokens is not None and taken[tokens] < min(flow[tokens], flow[tokens[1], tokens[0]]):
            taken[tokens] += 1
            kept.append(index)
    return kept


def num_margin_tokens(token_starts_T: Sequence[int], margin_end: int | None) -> int:
    """Number of leading tokens that begin within the first `margin_end` characters (None: all), given the
    first character of each in ascending order."""
    if margin_end is None:
        return len(token_starts_T)
    return sum(start < margin_end for start in token_starts_T)


def margin_masks(
    chosen_T: Sequence[int],
    rejected_T: Sequence[int],
    margin: MarginMask,
    rejected_margin_tokens: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which tokens of each side take part in the preference margin: two 0/1 arrays of the sides' lengths.

    completion: all. first_wrong_step: all of chosen, and the first `rejected_margin_tokens` of rejected
    (None: all), which reach up to and include the first wrong step. first_divergent_token: on either side
    only the token at the first divergence (none for equal sequences, nor on a side that has ended before it).
    """
    chosen, rejected = np.ones(len(chosen_T), dtype=np.int64), np.ones(len(rejected_T), dtype=np.int64)
    if margin is MarginMask.first_wrong_step and rejected_margin_tokens is not None:
        rejected[rejected_margin_tokens:] = 0
    if margin is MarginMask.first_divergent_token:
        index = first_divergence(chosen_T, rejected_T)
        divergent = len(chosen) + len(rejected) if index is None else index  # beyond both ends: no token
        chosen[:divergent] = chosen[divergent + 1 :] = 0
        rejected[:divergent] = rejected[divergent + 1 :] = 0
    return chosen, rejected


def preference_rows(
    pairs: Sequence[PreferencePair], system_prompt: str = "", assistant_prefix: str = ""
) -> list[dict[str, list[dict[str, str]]]]:
    """The conversational preference format other trainers read: `prompt` (system turn if there is one, user
    turn), `chosen` and `rejected` (one assistant turn each, beginning with `assistant_prefix`)."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    rows = []
    for pair in pairs:
        prompt = [*system, {"role": "user", "content": pair.prompt}]
        chosen = [{"role": "assistant", "content": assistant_prefix + pair.chosen}]
        rejected = [{"role": "assistant", "content": assistant_prefix + pair.rejected}]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
