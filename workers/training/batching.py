"""Rows of token ids, and how they are spread over ranks and laid out in micro-batches.

Layouts (`config.Layout`): padded to the longest row; packed, rows end to end without padding; shared, packed
with what neighbouring rows of one prompt have in common at their beginning held, and computed, once. The
order of a packed micro-batch is that of `workers.training.attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, count

import numpy as np

from pns.config import Layout
from pns.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows to train on or to score; every list has one entry per row.

    `token_values` hold one number per completion token, `row_values` one per row. The objectives read:
    `old_log_probs`, `ref_log_probs` and `advantages` (a row value) for GRPO; `ref_log_probs` (unless the loss
    is reference-free), if given `margin_mask` (1 for tokens that take part in the margin), and for some
    losses `score_gap` (a row value) for preferences; `ref_log_probs` and `token_advantages` for the offline
    policy gradients; and for all of these but preferences, and for SFT, if given, `mask` (0 for tokens
    without loss); `label` (a row value, 1 or 0) for process reward models. For preferences and reward
    models rows come in pairs: chosen, rejected, chosen, ...
    """

    prompt_ids: Sequence[Sequence[int] | np.ndarray]
    completion_ids: Sequence[Sequence[int] | np.ndarray]
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

    @property
    def branches(self) -> tuple[int, ...]:
        """Tokens of each row after the trunk."""
        return tuple(length - self.trunk for length in self.lengths)


Unit = list[Family]  # what is not to be torn apart


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

    @property
    def computed_lengths(self) -> list[int]:
        """Tokens that are computed for each row; a trunk counts with its first branch."""
        lengths: list[int] = []
        for trunk, branches in self.families:
            lengths += [trunk + branches[0], *branches[1:]]
        return lengths


def plan(
    batch: Batch, group_size: int, ranks: int, max_tokens: int, layout: Layout
) -> list[list[list[Family]]]:
    """Spread rows over ranks and micro-batches: rank -> micro-batch -> families.

    `group_size` consecutive rows stay together; ranks get about the same work and the same number of
    micro-batches; rows of similar length share a micro-batch. A micro-batch holds at most `max_tokens`
    tokens, counted as its layout holds them. Raises UserError when a group is larger than `max_tokens`.
    """
    num_tokens = sum(map(batch.length, range(len(batch))))
    share_of_rank = -(-num_tokens // ranks)  # a family of more tokens would leave the other ranks idle
    units = _units(batch, group_size, min(max_tokens, share_of_rank), layout)
    sizes = [_size([unit], layout) for unit in units]
    if sizes and max(sizes) > max_tokens:
        rows = "a row" if group_size == 1 else f"{group_size} rows that belong together"
        first = next(size for size in sizes if size > max_tokens)
        raise UserError(
            f"{rows} of {first} tokens exceed policy.max_tokens_per_micro_batch = {max_tokens}: raise it"
        )
    planned = []
    for share in _shares(sizes, ranks):
        units_of_rank = [units[index] for index in share]
        planned.append(_fill_micro_batches(units_of_rank, max_tokens, layout))
    most = max(map(len, planned))  # a rank with less work takes part in as many forward passes
    for micro_batches in planned:
        _split_to(most, micro_batches, padding=[Family((-1,), (2,))] * group_size)
    return [[list(chain.from_iterable(members)) for members in of_rank] for of_rank in planned]


def _size(units: Sequence[Unit], layout: Layout) -> int:
    """Tokens that a micro-batch of `units` holds."""
    families = list(chain.from_iterable(units))
    if layout is not Layout.padded:
        return sum(family.tokens for family in families)
    lengths = [length for family in families for length in family.lengths]
    return max(lengths) * len(lengths)


def _shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The units of each rank, as indices into their `sizes`."""
    if ranks == 1:
        return [list(range(len(sizes)))]
    if len(sizes) < ranks:  # verl's function refuses this
        return [[rank] if rank < len(sizes) else [] for rank in range(ranks)]
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    return get_seqlen_balanced_partitions(sizes, ranks, equal_size=False)


def _fill_micro_batches(units: Sequence[Unit], max_tokens: int, layout: Layout) -> list[list[Unit]]:
    """The longest units first, so that rows of similar length come together."""
    micro_batches: list[list[Unit]] = []
    longest = num_held = 0  # tokens of the last micro-batch's longest row, and tokens or rows that it holds
    for unit in sorted(units, key=_longest, reverse=True):
        num_added = sum(len(family.rows) if layout is Layout.padded else family.tokens for family in unit)
        a_piece = longest if layout is Layout.padded else 1
        if micro_batches and (num_held + num_added) * a_piece <= max_tokens:
            micro_batches[-1].append(unit)
            num_held += num_added
        else:
            micro_batches.append([unit])
            longest, num_held = _longest(unit), num_added
    return micro_batches


def _longest(unit: Unit) -> int:
    """Tokens of its longest row."""
    return max(max(family.lengths) for family in unit)


def _split_to(count: int, micro_batches: list[list[Unit]], padding: Unit) -> None:
    """Make `count` micro-batches of them, in place: every rank has to take part in every forward pass, as
    they gather each other's weights."""
    while len(micro_batches) < count:
        largest = max(micro_batches, key=len, default=[])
        if len(largest) < 2:  # nothing left to split
            micro_batches.append([padding])
            continue
        half = len(largest) // 2
        micro_batches[micro_batches.index(largest)] = largest[:half]
        micro_batches.append(largest[half:])


def _units(batch: Batch, group_size: int, max_tokens: int, layout: Layout) -> list[Unit]:
    """The families of each group; in the shared layout neighbouring groups of one prompt as one family, as
    long as it has at most `max_tokens` tokens."""
    groups = [range(start, start + group_size) for start in range(0, len(batch), group_size)]
    if layout is not Layout.shared:
        return [[Family((row,), (batch.length(row),)) for row in group] for group in groups]
    units: list[Unit] = []
    for group in groups:
        unit = _families(batch, group)
        before = units[-1] if units else []
        if len(before) == len(unit) == 1 and _same_prompt(batch, before[0].rows[0], group[0]):
            merged = _merged(batch, before[0], unit[0])
            if merged and merged.tokens <= max_tokens:
                units[-1] = [merged]
                continue
        units.append(unit)
    return units


def _same_prompt(batch: Batch, first: int, second: int) -> bool:
    return np.array_equal(batch.prompt_ids[first], batch.prompt_ids[second])


def _merged(batch: Batch, one: Family, other: Family) -> Family | None:
    """Both as one family; None where they do not begin alike."""
    # What all rows of two families share is the least of what each shares and what their first rows share.
    common = _num_common(batch, one.rows[0], other.rows[0])
    if not common:
        return None
    lengths = one.lengths + other.lengths
    trunks = [family.trunk for family in (one, other) if len(family.rows) > 1]
    return Family(one.rows + other.rows, lengths, min(common, *trunks, min(lengths) - 1))


def _families(batch: Batch, rows: Sequence[int]) -> Unit:
    """One family of rows that begin alike; a family each where they do not."""
    lengths = tuple(map(batch.length, rows))
    trunk = min((_num_common(batch, rows[0], row) for row in rows[1:]), default=0)
    if trunk:
        return [Family(tuple(rows), lengths, min(trunk, min(lengths) - 1))]  # every branch keeps a token
    return [Family((row,), (length,)) for row, length in zip(rows, lengths, strict=True)]


def _num_common(batch: Batch, first: int, second: int) -> int:
    """Tokens that two rows have in common at their beginning."""
    num = min(batch.length(first), batch.length(second))
    first_ids, second_ids = (
        np.concatenate([batch.prompt_ids[row], batch.completion_ids[row]])[:num] for row in (first, second)
    )
    different = first_ids != second_ids
    return int(different.argmax()) if different.any() else num


def micro_batch(batch: Batch, families: Sequence[Family], layout: Layout) -> MicroBatch:
    """The given families of `batch` laid out, with `weight` 1 beside the rows and 0 beside padding."""
    rows = [row for family in families for row in family.rows]
    prompts = [batch.prompt_ids[row] if row >= 0 else (0,) for row in rows]
    completions = [batch.completion_ids[row] if row >= 0 else (0,) for row in rows]
    lengths = np.array([length for family in families for length in family.lengths])
    width = int(lengths.max()) if layout is Layout.padded else 0
    if width:
        places = [np.arange(start, start + length) for start, length in zip(count(0, width), lengths)]
        num_held = width * len(rows)
    else:
        places = _places(families)
        num_held = sum(family.tokens for family in families)
    token_ids, position_ids = np.zeros(num_held, np.int64), np.zeros(num_held, np.int64)
    predictors = []
    for place, prompt, completion in zip(places, prompts, completions, strict=True):
        token_ids[place[: len(prompt)]] = prompt
        token_ids[place[len(prompt) :]] = completion
        position_ids[place] = np.arange(len(place))
        predictors.append(place[len(prompt) - 1 : -1])  # each token is predicted by the one before it
    row_values = {"weight": [1.0] * len(batch), **batch.row_values}
    return MicroBatch(
        rows=np.array(rows),
        token_ids=token_ids,
        position_ids=position_ids,
        width=width,
        families=tuple((family.trunk, family.branches) for family in families),
        predictors=np.concatenate(predictors),
        labels=np.concatenate([np.asarray(completion, np.int64) for completion in completions]),
        completion_lengths=np.array([len(completion) for completion in completions]),
        last=np.array([place[-1] for place in places]),
        token_values={name: _of_tokens(values, rows) for name, values in batch.token_values.items()},
        row_values={name: _of_rows(values, rows) for name, values in row_values.items()},
        num_tokens=int(lengths.sum()),
        num_padded=int(lengths.max()) * len(rows),
    )


def _of_tokens(values: Sequence[Sequence[float] | np.ndarray], rows: Sequence[int]) -> np.ndarray:
    return np.concatenate([values[row] if row >= 0 else (0.0,) for row in rows]).astype(np.float32)


def _of_rows(values: Sequence[float], rows: Sequence[int]) -> np.ndarray:
    return np.array([values[row] if row >= 0 else 0.0 for row in rows], dtype=np.float32)


def _places(families: Sequence[Family]) -> list[np.ndarray]:
    """Where the tokens of every row are: trunks with first branches come before all further branches."""
    ends_of_leading = list(accumulate(family.lengths[0] for family in families))
    next_branch = ends_of_leading[-1]
    places: list[np.ndarray] = []
    for family, end in zip(families, ends_of_leading, strict=True):
        leading = np.arange(end - family.lengths[0], end)
        places.append(leading)
        for length in family.branches[1:]:
            branch = np.arange(next_branch, next_branch + length)
            places.append(np.concatenate([leading[: family.trunk], branch]))
            next_branch += length
    return places


def check_batch(batch: Batch, vocab_size: int) -> None:
    """ValueError for an empty batch or row, values that do not fit the rows, ids outside the vocabulary."""
    if not len(batch):
        raise ValueError("the batch has no rows")
    if any(not len(ids) for ids in batch.prompt_ids) or any(not len(ids) for ids in batch.completion_ids):
        raise ValueError("a row has an empty prompt or completion")
    for ids in (*batch.prompt_ids, *batch.completion_ids):
        lowest, highest = np.min(ids), np.max(ids)
        if lowest < 0 or highest >= vocab_size:  # on a GPU they would end in an assertion of the kernel
            raise ValueError(
                f"token id {highest} is outside the model's vocabulary of {vocab_size}: "
                "use the tokenizer of the model"
            )
    columns = {"completion_ids": batch.completion_ids, **batch.token_values, **batch.row_values}
    for name, values in columns.items():
        if len(values) != len(batch):
            raise ValueError(f"the batch has {len(batch)} prompts and {len(values)} {name}")
    for name, rows in batch.token_values.items():
        for ids, row in zip(batch.completion_ids, rows, strict=True):
            if len(ids) != len(row):
                raise ValueError(f"a completion has {len(ids)} tokens and {len(row)} {name}")
