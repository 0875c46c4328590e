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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "pns_packed"


@dataclass(frozen=True)
class Segments:
    """Lengths in tokens: of every trunk with its first branch (`leading`), of every further branch
    (`branches`), and for each of these the family it belongs to (index into `leading`) and the length of its
    trunk."""

    leading: tuple[int, ...]
    branches: tuple[int, ...] = ()
    families: tuple[int, ...] = ()
    trunks: tuple[int, ...] = ()
    _indices: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(
            *self.leading,
            *(trunk + branch for trunk, branch in zip(self.trunks, self.branches, strict=True)),
            0,
        )

    def indices(self, device: torch.device) -> tuple[Tensor, ...]:
        """`(ends of leading, ends of branches, keys of branches, ends of those keys)`: cumulative lengths
        int32 with a leading 0, and the tokens (trunk, then branch) that each branch attends to."""
        if device not in self._indices:
            starts = torch.tensor((0, *self.leading)).cumsum(0)
            at = int(starts[-1])
            keys: list[Tensor] = []
            for branch, family, trunk in zip(self.branches, self.families, self.trunks, strict=True):
                keys += [
                    torch.arange(int(starts[family]), int(starts[family]) + trunk),
                    torch.arange(at, at + branch),
                ]
                at += branch
            lengths = [trunk + branch for trunk, branch in zip(self.trunks, self.branches, strict=True)]
            ends = [
                torch.tensor((0, *sizes)).cumsum(0).to(torch.int32)
                for sizes in (self.leading, self.branches, lengths)
            ]
            found = (ends[0], ends[1], torch.cat(keys) if keys else torch.empty(0, dtype=torch.long), ends[2])
            self._indices[device] = tuple(tensor.to(device) for tensor in found)
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
            f"a row of {segments.longest} tokens is longer than the model's attention window: set policy.layout=padded"
        )
    if dropout:
        raise ValueError(
            "attention dropout is not supported by packed rows: set attention_dropout to 0 in the model's config.json"
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
    further = zip(
        queries[num_leading:],
        keys[num_leading:],
        values[num_leading:],
        segments.families,
        segments.trunks,
        strict=True,
    )
    for q, k, v, family, trunk in further:
        k, v = (
            torch.cat([keys[family][:, :, :trunk], k], dim=2),
            torch.cat([values[family][:, :, :trunk], v], dim=2),
        )
        if trunk < q.shape[2]:  # cheaper than a mask, although the trunk's own outputs are thrown away
            rows.append(attend(torch.cat([queries[family][:, :, :trunk], q], dim=2), k, v)[:, trunk:])
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
    found = _variable_length(
        q[:split], k[:split], v[:split], leading_ends, leading_ends, longest, longest, scaling
    )
    if segments.branches:
        branches = _variable_length(
            q[split:],
            k[keys_of_branches],
            v[keys_of_branches],
            branch_ends,
            key_ends,
            max(segments.branches),
            segments.longest,
            scaling,
        )
        found = torch.cat([found, branches])
    return found.unsqueeze(0)


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
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, ends_q, ends_k, longest_q, longest_k, softmax_scale=scaling, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q,
        k,
        v,
        ends_q,
        ends_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def segments_of(families: Sequence[tuple[int, Sequence[int]]]) -> Segments:
    """`Segments` of families, each the length of its trunk and of its branches (at least one, each at least
    one token)."""
    leading = tuple(trunk + branches[0] for trunk, branches in families)
    further = [
        (branch, place, trunk) for place, (trunk, branches) in enumerate(families) for branch in branches[1:]
    ]
    lengths, places, trunks = zip(*further, strict=True) if further else ((), (), ())
    return Segments(leading, lengths, places, trunks)


AttentionInterface.register(NAME, packed_attention)
