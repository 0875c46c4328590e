"""Padded, packed and prefix-shared micro-batches, in plain torch: the same log-probabilities, losses and
gradients as transformers."""

from __future__ import annotations

import copy
import json
import math
import runpy
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from pns.algo import losses
from pns.config import Constraint, Layout
from workers.training import attention, log_probs
from workers.training.attention import NAME, Segments, packed_attention, segments_of
from workers.training.batching import Batch, Family, MicroBatch, micro_batch
from workers.training.log_probs import LogProbHead
from workers.training.objectives import BcpgObjective, Objective, WeightedReinforceObjective

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# Pairs of one prompt: ordinary, with a long common beginning, one side a single token, a prompt longer than
# both sides.
PAIRS = [
    ([5, 6, 7], [8, 9, 10, 11, 1], [12, 13, 1]),
    ([5, 6], [8, 9, 10, 11, 12, 13, 14, 1], [8, 9, 10, 11, 12, 15, 1]),
    ([7, 8, 9], [1], [10, 11, 1]),
    ([*range(3, 30)], [4, 1], [5, 6, 7, 1]),
]
BATCH = Batch(
    [prompt for prompt, *_ in PAIRS for _ in (0, 1)], [side for _, *sides in PAIRS for side in sides]
)


def model(name: str, tied: bool) -> torch.nn.Module:
    import transformers

    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    torch.manual_seed(1)
    return model_class(config_class(**SIZES, tie_word_embeddings=tied, attn_implementation="eager")).train()


def families(layout: Layout) -> list[Family]:
    lengths = [BATCH.length(row) for row in range(len(BATCH))]
    if layout is not Layout.shared:
        return [Family((row,), (length,)) for row, length in enumerate(lengths)]
    trunks = [3, 7, 3, 27]
    return [
        Family((2 * i, 2 * i + 1), (lengths[2 * i], lengths[2 * i + 1]), trunk)
        for i, trunk in enumerate(trunks)
    ]


def forward(own: torch.nn.Module, part: MicroBatch) -> Tensor:
    """Log-probabilities (C,) as the training processes compute them."""
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(part.token_ids).view(-1, part.width or len(part.token_ids))
    }
    if not part.width:
        inputs |= {
            "position_ids": torch.from_numpy(part.position_ids)[None],
            "segments": segments_of(part.families),
        }
    own.get_output_embeddings().ask(torch.from_numpy(part.predictors), torch.from_numpy(part.labels))
    return own(**inputs).logits


def by_transformers(plain: torch.nn.Module) -> Tensor:
    found = []
    for prompt, completion in zip(BATCH.prompt_ids, BATCH.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        found.append(
            -cross_entropy(
                plain(ids).logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="none"
            )
        )
    return torch.cat(found)


def dpo(log_probs_T: Tensor, shift: float) -> Tensor:
    lengths = torch.tensor([len(ids) for ids in BATCH.completion_ids])
    sums = losses.row_sums(log_probs_T, lengths)
    reference = sums.detach() + shift * torch.arange(len(sums))
    tokens, nll = (lengths[::2], lengths[1::2]), -sums[::2]
    pairs = losses.PairTerms(sums[::2], sums[1::2], *tokens, nll, reference[::2], reference[1::2])
    loss_B, _ = losses.dpo_loss(pairs, beta=0.5)
    return (loss_B - 0.2 * sums[::2]).mean() if shift else loss_B.mean()


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    ("name", "tied"), [("Qwen2", True), ("Qwen2", False), ("Llama", False), ("Qwen3", True)]
)
@pytest.mark.parametrize("max_logits", [2**22, 3 * VOCABULARY])
def test_every_layout_has_the_losses_and_gradients_of_transformers(
    layout: Layout, name: str, tied: bool, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(log_probs.PIECE_LOGITS, "cpu", max_logits)
    plain = model(name, tied)
    own = copy.deepcopy(plain)
    own.set_attn_implementation("sdpa" if layout is Layout.padded else NAME)
    own.set_output_embeddings(LogProbHead(own.get_output_embeddings()))
    part = micro_batch(BATCH, families(layout), layout)
    expected, found = by_transformers(plain), forward(own, part)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert dpo(found, shift=0.0).item() == pytest.approx(math.log(2), abs=1e-4)
    loss, expected_loss = dpo(found, shift=0.1), dpo(expected, shift=0.1)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    loss.backward()
    expected_loss.backward()
    gradients = {key: weight.grad for key, weight in plain.named_parameters()}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01
    for key, weight in own.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [*(BcpgObjective(0.3, form) for form in Constraint), WeightedReinforceObjective()],
    ids=["squared", "kl", "w_reinforce"],
)
def test_offline_objectives_have_one_loss_and_gradient_in_every_layout(objective: Objective) -> None:
    """Values of tokens stand beside their own tokens, wherever the layout holds these."""
    plain, found = model("Qwen2", tied=True), []
    rng = np.random.default_rng(0)
    advantages = [rng.uniform(-1, 1, len(ids)) for ids in BATCH.completion_ids]
    reference = [rng.uniform(-6, -1, len(ids)) for ids in BATCH.completion_ids]
    masks = [np.arange(len(ids)) != 1 for ids in BATCH.completion_ids]
    values: Any = {"token_advantages": advantages, "ref_log_probs": reference, "mask": masks}
    batch = replace(BATCH, token_values=values)
    for layout in Layout:
        own = copy.deepcopy(plain)
        own.set_attn_implementation("sdpa" if layout is Layout.padded else NAME)
        own.set_output_embeddings(LogProbHead(own.get_output_embeddings()))
        part = micro_batch(batch, families(layout), layout)
        data = {name: torch.from_numpy(own_values) for name, own_values in part.token_values.items()}
        loss, _ = objective.compute({"log_probs": forward(own, part)}, data | {"num_tokens": 30.0})
        loss.backward()
        found.append((loss.detach(), [weight.grad for weight in own.parameters()]))
    assert found[0][1][0].abs().max() > 0.01
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], atol=1e-5, rtol=1e-5)


def test_layouts_hold_no_more_than_they_say() -> None:
    held = {layout: len(micro_batch(BATCH, families(layout), layout).token_ids) for layout in Layout}
    lengths = [BATCH.length(row) for row in range(len(BATCH))]
    assert held == {
        Layout.padded: 8 * max(lengths),
        Layout.packed: sum(lengths),
        Layout.shared: sum(lengths) - 3 - 7 - 3 - 27,
    }


@pytest.mark.parametrize("trunk", [3, 40])
def test_segments_attend_to_their_trunk_and_themselves(trunk: int) -> None:
    """Against one masked attention over everything; a trunk shorter and one longer than the branches."""
    torch.manual_seed(2)
    segments = segments_of([(trunk, [5, 20, 1]), (0, [7]), (2, [4, 4])])
    owner = [0] * trunk + [1] * 5 + [10] * 7 + [20] * 2 + [21] * 4 + [2] * 20 + [3] + [22] * 4
    count = len(owner)
    query, key, value = torch.randn(1, 4, count, 8), torch.randn(1, 2, count, 8), torch.randn(1, 2, count, 8)
    seen = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        for j in range(i + 1):
            seen[i, j] = owner[i] == owner[j] or (
                owner[j] % 10 == 0 and owner[i] // 10 == owner[j] // 10 and owner[j] != 10
            )
    expected = scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, segments)
    torch.testing.assert_close(found.transpose(1, 2), expected)
    assert segments.longest == max(trunk + 20, 7)


def varlen_attn_2_11() -> None:
    """Has the signature of `torch.nn.attention.varlen.varlen_attn` in torch 2.11, as it is recorded."""


_CONTRACT = runpy.run_path(str(Path(__file__).parents[2] / "parity" / "record_gpu_signatures.py"))
_RECORDED = json.loads(_CONTRACT["RECORD"].read_text(encoding="utf-8"))["names"]
varlen_attn_2_11.__signature__, _ = _CONTRACT["parse"](_RECORDED["torch.nn.attention.varlen.varlen_attn"])


def row_by_row(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, scale: float | None) -> Tensor:
    """What the kernel computes: causal attention of each row, counted from its last key."""
    *ends, longest_q, longest_k = lengths
    assert [int(of_side.diff().max()) for of_side in ends] == [longest_q, longest_k]
    rows = []
    for (q_from, q_to), (k_from, k_to) in zip(*(pairwise(of_side.tolist()) for of_side in ends), strict=True):
        q, k, v = (
            tensor.transpose(0, 1) for tensor in (query[q_from:q_to], key[k_from:k_to], value[k_from:k_to])
        )
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        rows.append(scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("kernel", [varlen.varlen_attn, varlen_attn_2_11], ids=["installed", "2.11"])
def test_the_calls_of_the_variable_length_kernel(
    kernel: Any, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound to the kernel's signature, and computed as the kernel is documented."""
    named = []

    def call(*given: Any, **options: Any) -> Tensor:
        bound = signature(kernel).bind(*given, **options)
        assert bound.arguments["window_size"] == (-1, 0)  # causal
        named.append(options.get("enable_gqa"))
        return row_by_row(*bound.args[:7], scale=bound.arguments["scale"])

    call.__signature__ = signature(kernel)
    monkeypatch.setattr(varlen, "varlen_attn", call)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    segments = segments_of([(3, [5, 20, 1]), (0, [7]), (2, [4, 4])])
    count = sum(segments.leading) + sum(segments.branches)
    shapes = ((1, 4, count, 8), (1, heads, count, 8), (1, heads, count, 8))
    tensors = [torch.randn(shape) for shape in shapes]
    found = attention._flash(*tensors, segments, 0.3)
    torch.testing.assert_close(found, attention._by_row(*tensors, segments, 0.3))
    in_signature = "enable_gqa" in signature(kernel).parameters
    assert named == [heads != 4 if in_signature else None] * 2


def test_indices_of_branches_are_those_of_their_rows() -> None:
    ends, branch_ends, keys, key_ends = segments_of([(2, [1, 2]), (0, [3])]).indices(torch.device("cpu"))
    assert (ends.tolist(), branch_ends.tolist()) == ([0, 3, 6], [0, 2])
    assert (keys.tolist(), key_ends.tolist()) == ([0, 1, 6, 7], [0, 4])


def test_what_packed_rows_cannot_do_is_refused() -> None:
    tensors = [torch.zeros(1, 1, 6, 8)] * 3
    with pytest.raises(
        ValueError,
        match=r"a row of 6 tokens is longer than the model's attention window: set policy\.layout=padded",
    ):
        packed_attention(torch.nn.Module(), *tensors, None, Segments((6,)), sliding_window=4)
    with pytest.raises(ValueError, match="attention_dropout"):
        packed_attention(torch.nn.Module(), *tensors, None, Segments((6,)), dropout=0.1)


def test_log_probs_need_no_gradient_of_a_frozen_head() -> None:
    head = torch.nn.Linear(8, VOCABULARY, bias=False).requires_grad_(False)
    own, hidden = LogProbHead(head), torch.randn(1, 5, 8, requires_grad=True)
    own.ask(torch.arange(5), torch.arange(5))
    own(hidden).sum().backward()
    gradient, hidden.grad = hidden.grad, None
    assert own.weight.grad is None
    head(hidden).log_softmax(-1)[0, torch.arange(5), torch.arange(5)].sum().backward()
    torch.testing.assert_close(gradient, hidden.grad)
