"""Rows of token ids, and how they are spread over ranks and laid out in micro-batches.

Layouts (`config.Layout`): padded to the longest row; packed, rows end to end without padding; shared, packed
with what neighbouring rows of one prompt have in common at their beginning held, and computed, once. The
order of a packed micro-batch is that of `workers.training.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise, takewhile

import numpy as np

from pns.config import Layout
from pns.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows to train on or to score; every list has one entry per row.

    `token_values` hold one number per completion token, `row_values` one per row. The losses read:
    `old_log_probs`, `ref_log_probs` and `advantages` (a row value) for `Grpo`; `ref_log_probs` (unless the
    loss is reference-free), if given `margin_mask` (1 for tokens that take part in the margin), and for some
    losses `score_gap` (a row value) for `Preference`; and for `Grpo` and `Sft`, if given, `mask` (0 for
    tokens without loss). For `Preference` and `BradleyTerry` rows come in pairs: chosen, rejected, chosen,
    rejected, ...
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    token_values: dict[str, Sequence[Sequence[float] | np.ndarray]] = field(default_factory=dict)
    row_values: dict[str, Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def length(self, row: int) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids[row]) + len(self.completion_ids[row])


@dataclass(frozen=True)
class Family:
    """Consecutive rows laid out together, of which the first `trunk` tokens are held once (0 for a row of its
    own). A row of -1 is padding: two tokens whose every value is 0."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    trunk: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in the packed layouts."""
        return sum(self.lengths) - self.trunk * (len(self.rows) - 1)


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    `token_ids` and `position_ids` (N,) int64; `width` is the padded length of a row, 0 where rows are packed,
    and then `families` are (trunk, branches) lengths. `predictors` (C,) are the places of the tokens whose
    output predicts the completion tokens `labels` (C,), row by row, `completion_lengths[b]` of each row;
    `last` (B,) the places of the rows' last tokens. `token_values` (C,) and `row_values` (B,) float32; `rows`
    (B,) are the rows' places in the batch, -1 for padding. `num_tokens` counts the tokens of all rows,
    `num_padded` what they would take padded.
    """

    rows: np.ndarray
    token_ids: np.ndarray
    position_ids: np.ndarray
    width: int
    families: tuple[tuple[int, tuple[int, ...]], ...]
    predictors: np.ndarray
    labels: np.ndarray
    completion_lengths: np.ndarray
    last: np.ndarray
    token_values: dict[str, np.ndarray]
    row_values: dict[str, np.ndarray]
    num_tokens: int
    num_padded: int


def plan(
    batch: Batch, group_size: int, ranks: int, max_tokens: int, layout: Layout
) -> list[list[list[Family]]]:
    """Spread rows over ranks and micro-batches: rank -> micro-batch -> families.

    `group_size` consecutive rows stay together; ranks get about the same work and the same number of
    micro-batches; rows of similar length share a micro-batch. A micro-batch holds at most `max_tokens`
    tokens, counted as its layout holds them. Raises UserError when a group is larger than `max_tokens`.
    """
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    groups = [range(start, start + group_size) for start in range(0, len(batch), group_size)]
    units = _units(
        batch, groups, min(max_tokens, -(-sum(map(batch.length, range(len(batch)))) // ranks)), layout
    )

    def size(members: Sequence[list[Family]]) -> int:
        if layout is Layout.padded:
            lengths = [length for unit in members for family in unit for length in family.lengths]
            return max(lengths) * len(lengths)
        return sum(family.tokens for unit in members for family in unit)

    for unit in units:
        if size([unit]) > max_tokens:
            rows = "a row" if group_size == 1 else f"{group_size} rows that belong together"
            raise UserError(
                f"{rows} of {size([unit])} tokens exceed policy.max_tokens_per_micro_batch = {max_tokens}: raise it"
            )
    if ranks == 1:
        shares = [list(range(len(units)))]
    elif len(units) >= ranks:
        shares = get_seqlen_balanced_partitions([size([unit]) for unit in units], ranks, equal_size=False)
    else:
        shares = [[index] for index in range(len(units))] + [[] for _ in range(ranks - len(units))]
    planned: list[list[list[list[Family]]]] = []
    for share in shares:
        batches: list[list[list[Family]]] = []
        for unit in sorted(
            (units[index] for index in share), key=lambda u: max(max(f.lengths) for f in u), reverse=True
        ):
            if batches and size([*batches[-1], unit]) <= max_tokens:
                batches[-1].append(unit)
            else:
                batches.append([unit])
        planned.append(batches)
    most = max(map(len, planned))
    padding = [Family((-1,), (2,))] * group_size
    for batches in planned:
        while len(batches) < most:
            largest = max(batches, key=len, default=[])
            if len(largest) < 2:
                batches.append([padding])
            else:
                half = len(largest) // 2
                batches[batches.index(largest)] = largest[:half]
                batches.append(largest[half:])
    return [[[family for unit in members for family in unit] for members in batches] for batches in planned]


def _units(batch: Batch, groups: Sequence[range], max_tokens: int, layout: Layout) -> list[list[Family]]:
    """What is not to be torn apart: the families of each group; in the shared layout neighbouring groups of
    one prompt as one family, as long as it has at most `max_tokens` tokens."""
    if layout is not Layout.shared:
        return [[Family((row,), (batch.length(row),)) for row in group] for group in groups]
    units: list[list[Family]] = []
    for group in groups:
        members = _share(batch, group)
        if (
            units
            and len(members) == 1
            and len(units[-1]) == 1
            and batch.prompt_ids[units[-1][0].rows[0]] == batch.prompt_ids[group[0]]
        ):
            merged = _share(batch, [*units[-1][0].rows, *group])
            if len(merged) == 1 and merged[0].tokens <= max_tokens:
                units[-1] = merged
                continue
        units.append(members)
    return units


def _share(batch: Batch, rows: Sequence[int]) -> list[Family]:
    """One family of rows that begin alike; a family each where they do not."""
    lengths = tuple(map(batch.length, rows))
    trunk = min((_common(batch, rows[0], row) for row in rows[1:]), default=0)
    if trunk:
        return [Family(tuple(rows), lengths, min(trunk, min(lengths) - 1))]  # every branch keeps a token
    return [Family((row,), (length,)) for row, length in zip(rows, lengths, strict=True)]


def _common(batch: Batch, one: int, other: int) -> int:
    """Tokens that two rows have in common at their beginning."""
    tokens = zip(
        *(chain(batch.prompt_ids[row], batch.completion_ids[row]) for row in (one, other)), strict=False
    )
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], tokens))


def micro_batch(batch: Batch, families: Sequence[Family], layout: Layout) -> MicroBatch:
    """The given families of `batch` laid out, with `weight` 1 beside the rows and 0 beside padding."""
    rows = [row for family in families for row in family.rows]
    prompts = [batch.prompt_ids[row] if row >= 0 else (0,) for row in rows]
    completions = [batch.completion_ids[row] if row >= 0 else (0,) for row in rows]
    lengths = np.array([length for family in families for length in family.lengths])
    width = int(lengths.max()) if layout is Layout.padded else 0
    if width:
        places = [np.arange(index * width, index * width + length) for index, length in enumerate(lengths)]
        num_held = width * len(rows)
    else:
        places = _places(families)
        num_held = sum(family.tokens for family in families)
    token_ids, position_ids = np.zeros(num_held, np.int64), np.zeros(num_held, np.int64)
    for place, prompt, completion in zip(places, prompts, completions, strict=True):
        token_ids[place] = np.fromiter((*prompt, *completion), np.int64, len(place))
        position_ids[place] = np.arange(len(place))
    row_values = {"weight": [1.0] * len(batch), **batch.row_values}
    return MicroBatch(
        rows=np.array(rows),
        token_ids=token_ids,
        position_ids=position_ids,
        width=width,
        families=tuple(
            (family.trunk, tuple(length - family.trunk for length in family.lengths)) for family in families
        ),
        predictors=np.concatenate(
            [place[len(prompt) - 1 : -1] for place, prompt in zip(places, prompts, strict=True)]
        ),
        labels=np.concatenate([np.asarray(completion, np.int64) for completion in completions]),
        completion_lengths=np.array([len(completion) for completion in completions]),
        last=np.array([place[-1] for place in places]),
        token_values={
            name: np.concatenate([values[row] if row >= 0 else (0.0,) for row in rows]).astype(np.float32)
            for name, values in batch.token_values.items()
        },
        row_values={
            name: np.array([values[row] if row >= 0 else 0.0 for row in rows], dtype=np.float32)
            for name, values in row_values.items()
        },
        num_tokens=int(lengths.sum()),
        num_padded=int(lengths.max()) * len(rows),
    )


def _places(families: Sequence[Family]) -> list[np.ndarray]:
    """Where the tokens of every row are: trunks with their first branches first, then the further branches."""
    starts = list(accumulate((family.lengths[0] for family in families), initial=0))
    at, places = starts.pop(), []
    for family, start in zip(families, starts, strict=True):
        places.append(np.arange(start, start + family.lengths[0]))
        ends = accumulate((length - family.trunk for length in family.lengths[1:]), initial=at)
        for branch_start, branch_end in pairwise(ends):
            places.append(np.concatenate([places[-1][: family.trunk], np.arange(branch_start, branch_end)]))
            at = branch_end
    return places


def check(batch: Batch, vocab_size: int) -> None:
    """Raises ValueError for an empty batch or row, values that do not fit the rows, and token ids outside the
    vocabulary."""
    if not len(batch):
        raise ValueError("the batch has no rows")
    if any(not len(ids) for ids in batch.prompt_ids) or any(not len(ids) for ids in batch.completion_ids):
        raise ValueError("a row has an empty prompt or completion")
    for ids in (*batch.prompt_ids, *batch.completion_ids):
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(
                f"token id {max(ids)} is outside the model's vocabulary of {vocab_size}: use the tokenizer of the model"
            )
    columns: dict[str, Sequence[object]] = {
        "completion_ids": batch.completion_ids,
        **batch.token_values,
        **batch.row_values,
    }
    for name, values in columns.items():
        if len(values) != len(batch):
            raise ValueError(f"the batch has {len(batch)} prompts and {len(values)} {name}")
    for name, rows in batch.token_values.items():
        for ids, row in zip(batch.completion_ids, rows, strict=True):
            if len(ids) != len(row):
                raise ValueError(f"a completion has {len(ids)} tokens and {len(row)} {name}")
