"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pns.algo.losses import bradley_terry_loss, dpo_loss, grpo_loss, length_normalised_nll, row_sums, sft_loss


def grpo(
    log_probs: torch.Tensor | list[float],
    old: list[float],
    advantages: list[float],
    ref: list[float] | None = None,
    mask: list[float] | None = None,
    num_tokens: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return grpo_loss(
        log_probs_T=torch.as_tensor(log_probs),
        old_log_probs_T=torch.tensor(old),
        ref_log_probs_T=None if ref is None else torch.tensor(ref),
        advantages_T=torch.tensor(advantages),
        mask_T=torch.tensor(mask or [1.0] * len(old)),
        clip_low=0.2,
        clip_high=0.28,
        kl_coefficient=0.1,
        num_tokens=num_tokens or len(old),
    )


def test_grpo_on_policy_is_minus_the_mean_advantage() -> None:
    loss, metrics = grpo([-1.0, -2.0, -0.5], [-1.0, -2.0, -0.5], [1.0, -2.0, 4.0])
    assert loss.item() == pytest.approx(-1.0)
    assert metrics["clip_fraction"].item() == 0
    assert metrics["ratio"].item() == pytest.approx(1.0)
    assert metrics["nll"].item() == pytest.approx(3.5 / 3)
    assert "kl" not in metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.5, 2.0, -2.56, True),  # good and already much likelier: 1.28 * 2, no gradient
        (1.25, 2.0, -2.5, False),  # inside the raised upper bound
        (1.5, -2.0, 3.0, False),  # bad and likelier: the full ratio, never clipped
        (0.5, -2.0, 1.6, True),  # bad and already much less likely: 0.8 * -2
        (0.5, 2.0, -1.0, False),  # good and less likely: the full ratio
    ],
)
def test_grpo_clips_on_both_sides(ratio: float, advantage: float, expected: float, clipped: bool) -> None:
    log_prob = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    loss, metrics = grpo(log_prob, [-1.0], [advantage])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["clip_fraction"].item() == clipped
    assert log_prob.grad is not None
    assert log_prob.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-6)


def test_grpo_kl_is_k3_against_the_reference() -> None:
    log_prob = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, metrics = grpo(log_prob, [-1.0, -1.0], [0.0, 0.0], ref=[-1.0, -1.0 + math.log(2)])
    loss.backward()
    k3 = 2 - math.log(2) - 1  # of the second token; 0 for the first
    assert metrics["kl"].item() == pytest.approx(k3 / 2)
    assert loss.item() == pytest.approx(0.1 * k3 / 2)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0.0, 0.1 * (1 - 2) / 2])  # pulls the token's probability up


def test_grpo_counts_tokens_of_the_whole_batch() -> None:
    """Two micro-batches of unequal size add up to the loss of both, and masked tokens do not count."""
    whole, _ = grpo([-1.0, -1.5, -2.0, -9.0], [-1.1, -1.4, -2.0, -1.0], [1.0, 1.0, -3.0, 7.0], mask=[1.0, 1.0, 1.0, 0.0], num_tokens=3)
    first, _ = grpo([-1.0], [-1.1], [1.0], num_tokens=3)
    second, _ = grpo([-1.5, -2.0], [-1.4, -2.0], [1.0, -3.0], num_tokens=3)
    assert whole.item() == pytest.approx(first.item() + second.item())


def test_dpo_is_ln_2_at_the_reference() -> None:
    sums = torch.tensor([-10.0, -3.0])
    loss, metrics = dpo_loss(sums, sums - 4, sums, sums - 4, beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert metrics["margin"].tolist() == [0.0, 0.0]
    assert metrics["accuracy"].tolist() == [0.0, 0.0]


def test_dpo_by_hand_with_and_without_label_smoothing() -> None:
    chosen, rejected = torch.tensor([-8.0], requires_grad=True), torch.tensor([-15.0], requires_grad=True)
    plain, metrics = dpo_loss(chosen, rejected, torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.5)
    smoothed, _ = dpo_loss(chosen, rejected, torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.5, label_smoothing=0.1)
    # margin = 0.5 (2 + 3) = 2.5
    assert metrics["margin"].item() == 2.5
    assert (metrics["chosen_reward"].item(), metrics["rejected_reward"].item(), metrics["accuracy"].item()) == (1.0, -1.5, 1.0)
    assert plain.item() == pytest.approx(math.log1p(math.exp(-2.5)))
    assert smoothed.item() == pytest.approx(0.9 * math.log1p(math.exp(-2.5)) + 0.1 * math.log1p(math.exp(2.5)))
    plain.sum().backward()
    slope = 0.5 / (1 + math.exp(2.5))  # beta sigmoid(-margin)
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-slope, slope))


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([-0.5, 2.0], requires_grad=True)
    loss, metrics = bradley_terry_loss(chosen, rejected, centre=0.01)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1.5)) + 0.01 * 0.25, math.log1p(math.exp(2.0)) + 0.01 * 4.0])
    assert metrics["margin"].tolist() == [1.5, -2.0]
    assert metrics["accuracy"].tolist() == [1.0, 0.0]
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad[0].item() == pytest.approx(-1 / (1 + math.exp(1.5)) + 2 * 0.01 * 0.5)
    assert rejected.grad[1].item() == pytest.approx(1 / (1 + math.exp(-2.0)) + 2 * 0.01 * 2.0)


def test_centring_moves_both_scores_of_a_pair_to_zero() -> None:
    scores = torch.tensor([[30.0, 10.0]], requires_grad=True)
    loss, _ = bradley_terry_loss(scores[:, 0], scores[:, 1], centre=0.01)
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([0.8, 0.8], abs=1e-6)


def test_row_sums_and_length_normalised_nll() -> None:
    log_probs, lengths = torch.tensor([-1.0, -2.0, -3.0, -6.0]), torch.tensor([3, 1])
    assert row_sums(log_probs, lengths).tolist() == [-6.0, -6.0]
    assert length_normalised_nll(log_probs, lengths).tolist() == [2.0, 6.0]


def test_sft_is_the_mean_over_the_counted_tokens() -> None:
    log_probs = torch.tensor([-1.0, -5.0, -3.0], requires_grad=True)
    loss = sft_loss(log_probs, torch.tensor([1.0, 0.0, 1.0]), num_tokens=4)
    loss.backward()
    assert loss.item() == 1.0
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-0.25, 0.0, -0.25]
