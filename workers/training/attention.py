"""Attention over rows that lie end to end, where rows may share their beginning: no padding, and a shared
beginning is computed once.

The tokens of a micro-batch are one sequence. A *family* of rows that begin alike is a trunk (what they share)
and branches (the rest of each row); a row of its own is a trunk with one branch. All trunks with their first
branch come first, then all further branches:

    trunk_1 branch_1a | trunk_2 branch_2a | ... | branch_1b | branch_1c | branch_2b | ...

Every token attends to its branch so far and to the trunk of its family. `Segments` says where they are. The
attention is registered with transformers as `NAME`; a model built with it takes the keyword argument
`segments` in its forward pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "pns_packed"


class Segments:
    """Lengths in tokens: of every trunk with its first branch (`leading`), of every further branch
    (`branches`), and for each of these the family it belongs to (index into `leading`) and the length of its
    trunk."""

    # No dataclass: FSDP would search each number of it for tensors, and build it anew, in every layer.
    def __init__(
        self,
        leading: tuple[int, ...],
        branches: tuple[int, ...] = (),
        families: tuple[int, ...] = (),
        trunks: tuple[int, ...] = (),
    ) -> None:
        self.leading, self.branches, self.families, self.trunks = leading, branches, families, trunks
        self._indices: dict[torch.device, tuple[Tensor, ...]] = {}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(*self.leading, *self.key_lengths, 0)

    @property
    def key_lengths(self) -> list[int]:
        """Tokens that the last token of every further branch attends to: its trunk and itself."""
        return [trunk + branch for trunk, branch in zip(self.trunks, self.branches, strict=True)]

    def indices(self, device: torch.device) -> tuple[Tensor, ...]:
        """`(ends of leading, ends of branches, keys of branches, ends of those keys)`: cumulative lengths
        int32 with a leading 0, and the tokens (trunk, then branch) that each branch attends to."""
        if device not in self._indices:
            starts = [0, *accumulate(self.leading)]
            next_branch = starts[-1]
            keys = [torch.empty(0, dtype=torch.long)]  # there may be no further branch
            for branch, family, trunk in zip(self.branches, self.families, self.trunks, strict=True):
                keys.append(torch.arange(starts[family], starts[family] + trunk))
                keys.append(torch.arange(next_branch, next_branch + branch))
                next_branch += branch
            leading_ends, branch_ends, key_ends = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
                for lengths in (self.leading, self.branches, self.key_lengths)
            )
            indices = (leading_ends, branch_ends, torch.cat(keys), key_ends)
            self._indices[device] = tuple(tensor.to(device) for tensor in indices)
        return self._indices[device]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within the rows of `segments`, in the form that transformers asks for: query (1, H, N,
    D), key and value (1, H_kv, N, D) to (1, N, H, D). Raises ValueError where a layer's attention window is
    shorter than a row."""
    if sliding_window is not None and segments.longest > sliding_window:
        raise ValueError(
            f"a row of {segments.longest} tokens is longer than the model's attention window: "
            "set policy.layout=padded"
        )
    if dropout:
        raise ValueError(
            "attention dropout is not supported by packed rows: set attention_dropout to 0 in the model's "
            "config.json"
        )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, segments, scaling), None
    return _by_row(query, key, value, segments, scaling), None


def _by_row(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """One call of torch's attention per row: no work on padding, whatever the lengths."""
    sizes = [*segments.leading, *segments.branches]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, mask, scale=scaling, is_causal=mask is None, enable_gqa=grouped
        ).transpose(1, 2)

    num_leading = len(segments.leading)
    rows = [attend(*row) for row in zip(queries[:num_leading], keys, values, strict=False)]
    branches = enumerate(zip(segments.families, segments.trunks, strict=True), start=num_leading)
    for branch, (family, trunk) in branches:
        # Trunk and branch: the whole row.
        row_q, k, v = (
            torch.cat([pieces[family][:, :, :trunk], pieces[branch]], dim=2)
            for pieces in (queries, keys, values)
        )
        q = queries[branch]
        if trunk < q.shape[2]:  # cheaper than a mask, although the trunk's own outputs are thrown away
            rows.append(attend(row_q, k, v)[:, trunk:])
        else:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(trunk)
            rows.append(attend(q, k, v, seen))
    return torch.cat(rows, dim=1)


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Two calls of a variable-length kernel: leading rows, and branches against trunk and branch (causal from
    the end)."""
    leading_ends, branch_ends, keys_of_branches, key_ends = segments.indices(query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, H, D)
    split = sum(segments.leading)
    longest = max(segments.leading)
    leading = (q[:split], k[:split], v[:split])
    attended = _variable_length(*leading, leading_ends, leading_ends, longest, longest, scaling)
    if segments.branches:
        branches = (q[split:], k[keys_of_branches], v[keys_of_branches])
        longest_branch = max(segments.branches)
        of_branches = _variable_length(
            *branches, branch_ends, key_ends, longest_branch, segments.longest, scaling
        )
        attended = torch.cat([attended, of_branches])
    return attended.unsqueeze(0)


def _variable_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    scaling: float | None,
) -> Tensor:
    """Flash attention where it is installed, else torch's own kernel for the same."""
    lengths = (ends_q, ends_k, longest_q, longest_k)
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scaling, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    # Fewer heads of keys than of queries: torch 2.11 takes them as they are, later ones ask for the word.
    grouping = {"enable_gqa": q.shape[1] != k.shape[1]} if _names_grouping(varlen_attn) else {}
    return varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), **grouping)


@cache
def _names_grouping(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in signature(kernel).parameters


@cache  # it is asked in every layer of every step
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def segments_of(families: Sequence[tuple[int, Sequence[int]]]) -> Segments:
    """`Segments` of families, each the length of its trunk and of its branches (at least one, each at least
    one token)."""
    leading = tuple(trunk + branches[0] for trunk, branches in families)
    lengths: list[int] = []
    owners: list[int] = []
    trunks: list[int] = []
    for family, (trunk, branches) in enumerate(families):
        num_further = len(branches) - 1
        lengths += branches[1:]
        owners += [family] * num_further
        trunks += [trunk] * num_further
    return Segments(leading, tuple(lengths), tuple(owners), tuple(trunks))


AttentionInterface.register(NAME, packed_attention)
