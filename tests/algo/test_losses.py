"""Losses against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pns.algo.losses import (
    LossAndMetrics,
    PairTerms,
    bcpg_loss,
    bradley_terry_loss,
    dpo_loss,
    grpo_loss,
    gspo_loss,
    kto_kl,
    length_normalised_nll,
    offset_dpo_loss,
    row_sums,
    sft_loss,
    weighted_reinforce_loss,
)
from pns.config import Constraint, PreferenceConfig, hyper_parameters
from pns.preference_losses import PREFERENCE_LOSSES


def grpo(
    log_probs: torch.Tensor | list[float],
    old: list[float],
    advantages: list[float],
    ref: list[float] | None = None,
    mask: list[float] | None = None,
    num_tokens: int | None = None,
    **options: Any,
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
        **options,
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
    assert log_prob.grad.tolist() == pytest.approx(
        [0.0, 0.1 * (1 - 2) / 2]
    )  # pulls the token's probability up


def test_grpo_counts_tokens_of_the_whole_batch() -> None:
    """Two micro-batches of unequal size add up to the loss of both, and masked tokens do not count."""
    whole, _ = grpo(
        [-1.0, -1.5, -2.0, -9.0],
        [-1.1, -1.4, -2.0, -1.0],
        [1.0, 1.0, -3.0, 7.0],
        mask=[1.0, 1.0, 1.0, 0.0],
        num_tokens=3,
    )
    first, _ = grpo([-1.0], [-1.1], [1.0], num_tokens=3)
    second, _ = grpo([-1.5, -2.0], [-1.4, -2.0], [1.0, -3.0], num_tokens=3)
    assert whole.item() == pytest.approx(first.item() + second.item())


def test_dual_clip_bounds_what_a_bad_token_that_became_likely_costs() -> None:
    log_probs = torch.tensor([-1.0 + math.log(5), -1.0 + math.log(5), -1.0], requires_grad=True)
    loss, metrics = grpo(log_probs, [-1.0] * 3, [-2.0, 2.0, -2.0], dual_clip=3.0)
    loss.backward()
    # 3 * 2 instead of 5 * 2; the upper clip as before; a ratio of 1 is far from the bound.
    assert loss.item() == pytest.approx((6.0 - 2.56 + 2.0) / 3)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, 0.0, 2 / 3])


def test_importance_weighs_the_surrogate_and_not_the_kl() -> None:
    log_probs = torch.tensor([-1.0, -1.0], requires_grad=True)
    ref = [-1.0, -1.0 + math.log(2)]
    loss, metrics = grpo(log_probs, [-1.0] * 2, [1.0, -4.0], ref=ref, importance_T=torch.tensor([2.0, 0.5]))
    loss.backward()
    k3 = 1 - math.log(2)
    assert metrics["policy_loss"].item() == pytest.approx((-2.0 + 2.0) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(0.1 * k3 / 2, rel=1e-5)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-1.0, 1.0 - 0.1 / 2])


def test_one_token_that_is_far_off_does_not_own_the_kl() -> None:
    """e^15 is 3.3 million."""
    _, metrics = grpo([-16.0, -1.0], [-16.0, -1.0], [0.0, 0.0], ref=[-1.0, -1.0])
    assert metrics["kl"].item() == pytest.approx(10.0 / 2)


def gspo(log_probs: torch.Tensor, ref: list[float] | None = None) -> tuple[Any, dict[str, Any]]:
    """Two rows of two tokens and one, of which the first row's first token has a ratio of 4, and a row of
    padding."""
    return gspo_loss(
        log_probs_T=log_probs,
        old_log_probs_T=torch.tensor([-2.0, -1.0, -1.0, 0.0]),
        ref_log_probs_T=None if ref is None else torch.tensor(ref),
        advantages_B=torch.tensor([3.0, -1.0, 0.0]),
        mask_T=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        lengths_B=torch.tensor([2, 1, 1]),
        clip_low=0.2,
        clip_high=1.5,
        kl_coefficient=0.1,
        num_rows=2,
        weight_B=torch.tensor([1.0, 1.0, 0.0]),
    )


def test_gspo_by_hand() -> None:
    log_probs = torch.tensor([-2.0 + math.log(4), -1.0, -1.0, 0.0], requires_grad=True)
    loss, metrics = gspo(log_probs)
    loss.backward()
    # s = (4 * 1)^(1/2) = 2, inside 1 + 1.5, and 1.
    assert loss.item() == pytest.approx((-2.0 * 3.0 + 1.0) / 2)
    assert (metrics["ratio"].item(), metrics["clip_fraction"].item()) == (pytest.approx(1.5), 0.0)
    assert log_probs.grad is not None
    # Every token of a row gets s A / |y|, whatever its own ratio.
    assert log_probs.grad.tolist() == pytest.approx([-1.5, -1.5, 0.5, 0.0])


def test_gspo_clips_a_whole_row_and_its_kl_is_a_mean_of_means() -> None:
    log_probs = torch.tensor([-2.0 + math.log(9), -1.0, -1.0, 0.0], requires_grad=True)
    ref = [-2.0 + math.log(9), -1.0 + math.log(2), -1.0 + math.log(2), 5.0]
    loss, metrics = gspo(log_probs, ref)
    k3 = 1 - math.log(2)
    assert metrics["kl"].item() == pytest.approx((k3 / 2 + k3) / 2)
    assert loss.item() == pytest.approx(
        (-2.5 * 3.0 + 1.0) / 2 + 0.1 * metrics["kl"].item()
    )  # s = 3 is clipped
    assert metrics["clip_fraction"].item() == 0.5


def test_the_gradient_at_a_temperature_is_that_of_the_sampler() -> None:
    """Two tokens from a vocabulary of three, of which only the first decides the reward. After a good first
    token the second one does not matter: the expected gradient on its logits is 0 with log-probabilities at
    the temperature of sampling, and is not with those at 1."""
    temperature = 0.5
    second_logits = torch.tensor([0.2, -0.4, 0.9], requires_grad=True)
    sampler_V = torch.softmax(second_logits.detach() / temperature, 0)

    def expected_gradient(trained_temperature: float) -> torch.Tensor:
        log_probs_V = torch.log_softmax(second_logits / trained_temperature, 0)
        old_V = log_probs_V.detach()
        total = torch.zeros(())
        for token, probability in enumerate(sampler_V):
            loss, _ = grpo(log_probs_V[[token]], old_V[[token]].tolist(), [1.0])
            total = total + probability * loss
        (gradient,) = torch.autograd.grad(total, second_logits)
        return gradient

    torch.testing.assert_close(expected_gradient(temperature), torch.zeros(3), atol=1e-6, rtol=0.0)
    assert expected_gradient(1.0).abs().max() > 0.05


def test_dpo_is_ln_2_at_the_reference() -> None:
    sums = torch.tensor([-10.0, -3.0])
    loss, metrics = dpo_loss(pair_terms(sums, sums - 4, sums, sums - 4), beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert metrics["margin"].tolist() == [0.0, 0.0]
    assert metrics["accuracy"].tolist() == [0.0, 0.0]


def test_dpo_by_hand_with_and_without_label_smoothing() -> None:
    chosen, rejected = torch.tensor([-8.0], requires_grad=True), torch.tensor([-15.0], requires_grad=True)
    pairs = pair_terms(chosen, rejected, torch.tensor([-10.0]), torch.tensor([-12.0]))
    plain, metrics = dpo_loss(pairs, beta=0.5)
    smoothed, _ = dpo_loss(pairs, beta=0.5, label_smoothing=0.1)
    # margin = 0.5 (2 + 3) = 2.5
    assert metrics["margin"].item() == 2.5
    assert (
        metrics["chosen_reward"].item(),
        metrics["rejected_reward"].item(),
        metrics["accuracy"].item(),
    ) == (1.0, -1.5, 1.0)
    assert plain.item() == pytest.approx(math.log1p(math.exp(-2.5)))
    assert smoothed.item() == pytest.approx(
        0.9 * math.log1p(math.exp(-2.5)) + 0.1 * math.log1p(math.exp(2.5))
    )
    plain.sum().backward()
    slope = 0.5 / (1 + math.exp(2.5))  # beta sigmoid(-margin)
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-slope, slope))


def pair_terms(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    tokens: tuple[int, int] = (4, 5),
    nll: float = 2.0,
    gap: float = 3.0,
    kl: float = 1.0,
) -> PairTerms:
    return PairTerms(
        chosen,
        rejected,
        torch.full(chosen.shape, tokens[0]),
        torch.full(chosen.shape, tokens[1]),
        torch.full_like(chosen, nll),
        ref_chosen,
        ref_rejected,
        torch.full_like(chosen, gap),
        kl,
    )


def preference(
    settings: PreferenceConfig, *sums: torch.Tensor | None, **terms: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the sums of chosen and rejected sides, and of the same under the reference."""
    pairs = pair_terms(*sums, **terms)
    return PREFERENCE_LOSSES[settings.loss].function(pairs, **hyper_parameters(settings))


# sft reads the chosen side alone.
WITH_MARGIN = [name for name in PREFERENCE_LOSSES if name != "sft"]


def test_sft_is_the_chosen_sides_nll_whatever_was_rejected() -> None:
    sums = torch.tensor([-3.0, -5.0], requires_grad=True)
    nll = torch.tensor([0.75, 0.5], requires_grad=True)
    pairs = PairTerms(sums, sums - 1, torch.tensor([4, 4]), torch.tensor([4, 4]), nll)
    loss, metrics = PREFERENCE_LOSSES["sft"].function(pairs)
    loss.sum().backward()
    assert loss.tolist() == nll.tolist()
    assert (nll.grad.tolist() if nll.grad is not None else None, sums.grad) == ([1.0, 1.0], None)
    assert metrics["margin"].tolist() == [1.0, 1.0]


def log1pexp(x: float) -> float:
    """-log sigmoid(-x)"""
    return math.log1p(math.exp(x))


# Sums -8 and -15 under the policy, -10 and -12 under the reference: log-ratios 2 and -3. With 4 and 5 tokens:
# averages -2, -3, log-ratios per token 0.5 and -0.6.
@pytest.mark.parametrize(
    ("settings", "loss", "chosen_reward", "rejected_reward"),
    [
        (PreferenceConfig("sigmoid", beta=0.5), log1pexp(-2.5), 1.0, -1.5),
        (PreferenceConfig("sigmoid"), log1pexp(-0.5), 0.2, -0.3),
        (
            PreferenceConfig("cdpo", beta=0.5, label_smoothing=0.2),
            0.8 * log1pexp(-2.5) + 0.2 * log1pexp(2.5),
            1.0,
            -1.5,
        ),
        (PreferenceConfig("robust", beta=0.5), (0.9 * log1pexp(-2.5) - 0.1 * log1pexp(2.5)) / 0.8, 1.0, -1.5),
        (PreferenceConfig("hinge"), 1 - 0.5, 0.2, -0.3),
        (PreferenceConfig("hinge", beta=0.5), 0.0, 1.0, -1.5),  # 1 - 2.5 < 0
        (PreferenceConfig("ipo"), (0.5 + 0.6 - 5) ** 2, 0.05, -0.06),  # 1 / (2 * 0.1) = 5
        (PreferenceConfig("length_normalised"), log1pexp(-5 * 1.1), 2.5, -3.0),
        (PreferenceConfig("simpo"), log1pexp(-(2 * (-2 + 3) - 1)), -4.0, -6.0),
        # odds p / (1 - p) = 1 / (e^2 - 1) and 1 / (e^3 - 1); -log sigmoid(log R) = log(1 + 1 / R)
        (PreferenceConfig("orpo"), 2 + 0.1 * math.log(1 + (math.e**2 - 1) / (math.e**3 - 1)), -0.2, -0.3),
        (PreferenceConfig("rpo", beta=0.5, nll_weight=3.0), log1pexp(-2.5) + 3 * 2, 1.0, -1.5),
        (PreferenceConfig("offset", beta=0.5, offset_scale=0.5), log1pexp(-(2.5 - 0.5 * 3)), 1.0, -1.5),
        # 1 - sigmoid(0.5 (2 - 1)) and 2 (1 - sigmoid(0.5 (1 + 3))), halved
        (
            PreferenceConfig("kto", beta=0.5, undesirable_weight=2.0),
            (1 / (1 + math.exp(0.5)) + 2 / (1 + math.exp(2))) / 2,
            1.0,
            -1.5,
        ),
    ],
    ids=lambda value: value.loss if isinstance(value, PreferenceConfig) else "",
)
def test_preference_losses_by_hand(
    settings: PreferenceConfig, loss: float, chosen_reward: float, rejected_reward: float
) -> None:
    found, metrics = preference(
        settings, *torch.tensor([[-8.0], [-15.0], [-10.0], [-12.0]], dtype=torch.float64)
    )
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "margin": chosen_reward - rejected_reward,
            "accuracy": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("settings", "weight", "nll"),
    [
        (PreferenceConfig("sigmoid"), 1.0, 0.0),
        (PreferenceConfig("cdpo"), 1.0, 0.0),
        (PreferenceConfig("robust"), 1.0, 0.0),
        (PreferenceConfig("offset"), 1.0, 0.0),
        (PreferenceConfig("length_normalised"), 1.0, 0.0),
        (PreferenceConfig("simpo", target_margin=0.0), 1.0, 0.0),
        (PreferenceConfig("rpo", nll_weight=3.0), 1.0, 6.0),
        (PreferenceConfig("orpo", odds_ratio_weight=0.3), 0.3, 2.0),
    ],
    ids=lambda value: value.loss if isinstance(value, PreferenceConfig) else "",
)
def test_sigmoid_losses_are_ln_2_at_zero_margin(
    settings: PreferenceConfig, weight: float, nll: float
) -> None:
    sums = torch.tensor([-20.0, -1e-3, -400.0, 0.0])
    refs = (sums - 4, sums - 4) if PREFERENCE_LOSSES[settings.loss].needs_reference else (None, None)
    loss, metrics = preference(settings, sums, sums, *refs, tokens=(7, 7), gap=0.0)
    assert loss.tolist() == pytest.approx([weight * math.log(2) + nll] * 4)
    assert metrics["margin"].tolist() == metrics["accuracy"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("settings", "gap"),
    [
        (PreferenceConfig("cdpo", beta=0.3, label_smoothing=0.0), 3.0),
        (PreferenceConfig("robust", beta=0.3, label_smoothing=0.0), 3.0),
        (PreferenceConfig("rpo", beta=0.3, nll_weight=0.0), 3.0),
        (PreferenceConfig("offset", beta=0.3, offset_scale=0.0), 3.0),
        (PreferenceConfig("offset", beta=0.3), 0.0),
        (
            PreferenceConfig("offset", beta=0.3),
            -3.0,
        ),  # the reward model contradicts the verifier, and is overruled
        (PreferenceConfig("length_normalised", beta=0.3), 3.0),  # one token
    ],
    ids=lambda value: value.loss if isinstance(value, PreferenceConfig) else str(value),
)
def test_variants_become_dpo(settings: PreferenceConfig, gap: float) -> None:
    sums = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20 - 40
    plain, plain_metrics = preference(PreferenceConfig("sigmoid", beta=0.3), *sums)
    loss, metrics = preference(settings, *sums, tokens=(1, 1), gap=gap)
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=0)
    assert {name: value.tolist() for name, value in metrics.items()} == {
        name: value.tolist() for name, value in plain_metrics.items()
    }


@pytest.mark.parametrize("loss", WITH_MARGIN)
def test_preference_gradients(loss: str) -> None:
    """Against finite differences; and every loss pulls chosen up and pushes rejected down."""
    sums = [
        -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10
        for seed in range(4)
    ]
    chosen, rejected = sums[0].requires_grad_(), sums[1].requires_grad_()
    settings = PreferenceConfig(loss)
    assert torch.autograd.gradcheck(
        lambda c, r: preference(settings, c, r, sums[2], sums[3])[0], (chosen, rejected)
    )
    preference(settings, chosen, rejected, sums[2], sums[3])[0].sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", WITH_MARGIN)
def test_extreme_log_probs_and_empty_margins(loss: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -1e-30, -1e-8, -0.6931471805599453, -1.0, -1e3, -1e6], dtype=dtype)
    sums = torch.cartesian_prod(values, values, values)
    for tokens in ((4, 5), (0, 5), (4, 0), (0, 0), (1, 1)):
        chosen, rejected, ref = (
            column.clone() * (count > 0) for column, count in zip(sums.T, (*tokens, 1), strict=True)
        )
        chosen.requires_grad_()
        rejected.requires_grad_()
        found, metrics = preference(
            PreferenceConfig(loss),
            chosen,
            rejected,
            ref * (tokens[0] > 0),
            ref * (tokens[1] > 0),
            tokens=tokens,
        )
        found.sum().backward()
        assert chosen.grad is not None
        assert rejected.grad is not None
        for value in (found, chosen.grad, rejected.grad, *metrics.values()):
            assert value.shape == found.shape
            assert value.dtype == dtype
            assert value.isfinite().all()


def test_orpo_odds_are_exact_on_both_sides_of_one_half() -> None:
    averages = [-1e-6, -0.3, -0.69, -0.7, -5.0, -40.0]
    expected = [a - math.log(-math.expm1(a)) for a in averages]  # log p - log(1 - p)
    for first, second in zip(range(5), range(1, 6), strict=True):
        chosen, rejected = (torch.tensor([averages[i]], dtype=torch.float64) for i in (first, second))
        loss, _ = preference(
            PreferenceConfig("orpo", odds_ratio_weight=1.0),
            chosen,
            rejected,
            None,
            None,
            tokens=(1, 1),
            nll=0.0,
        )
        assert loss.item() == pytest.approx(log1pexp(expected[second] - expected[first]), rel=1e-10)


def test_a_missing_score_is_not_a_number() -> None:
    sums = torch.zeros(4, 1)
    assert preference(PreferenceConfig("offset"), *sums, gap=math.nan)[0].isnan().all()
    pairs = PairTerms(*sums, torch.zeros(1), sums[0], sums[1])
    with pytest.raises(ValueError, match="needs the reward model's score differences"):
        offset_dpo_loss(pairs, beta=0.1, offset_scale=1.0)
    with pytest.raises(ValueError, match="needs the reference's"):
        preference(PreferenceConfig("ipo"), sums[0], sums[1], None, None)


def test_kto_reference_point_is_the_mean_above_zero_and_a_constant() -> None:
    ratios = torch.tensor([3.0, -1.0, 1.0], requires_grad=True)
    assert kto_kl(ratios).item() == 1.0
    assert kto_kl(-ratios).item() == 0.0
    assert not kto_kl(ratios).requires_grad


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = (
        torch.tensor([1.0, 0.0], requires_grad=True),
        torch.tensor([-0.5, 2.0], requires_grad=True),
    )
    loss, metrics = bradley_terry_loss(chosen, rejected, centre=0.01)
    assert loss.tolist() == pytest.approx(
        [math.log1p(math.exp(-1.5)) + 0.01 * 0.25, math.log1p(math.exp(2.0)) + 0.01 * 4.0]
    )
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


REF = [-1.0, -2.0, -0.5]


def offline(
    log_ratios: list[float],
    advantages: list[float],
    form: Constraint | None = Constraint.squared_log_ratio,
    mask: tuple[float, ...] = (1.0, 1.0, 1.0),
    **options: float,
) -> tuple[float, list[float], dict[str, torch.Tensor]]:
    """Loss, its gradient and metrics of three tokens, `log_ratios` away from the reference, over 4 tokens of
    the whole batch; W-REINFORCE where there is no `form` of a constraint."""
    ref = torch.tensor(REF, dtype=torch.float64)
    log_probs = (ref + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    given = log_probs, ref, torch.tensor(advantages, dtype=torch.float64), torch.tensor(mask)
    found: LossAndMetrics
    if form is None:
        found = weighted_reinforce_loss(*given, max_ratio=options["max_ratio"], num_tokens=4)
    else:
        found = bcpg_loss(*given, beta=options["beta"], constraint=form, num_tokens=4)
    loss, metrics = found
    loss.backward()
    assert log_probs.grad is not None
    assert not any(value.requires_grad for value in metrics.values())
    return loss.item(), log_probs.grad.tolist(), metrics


def test_bcpg_by_hand() -> None:
    """A token of a right completion, a correct step of a wrong one, and a wrong step; then one that does not
    count."""
    ratios, advantages = [0.5, -1.0, -2.0], [0.75, 0.1, -0.25]
    loss, gradient, metrics = offline(ratios, advantages, beta=0.2)
    policy = -(0.75 * -0.5 + 0.1 * -3.0 - 0.25 * -2.5)
    constraint = (0.25 + 1.0 + 4.0) / 2
    assert loss == pytest.approx((policy + 0.2 * constraint) / 4)
    assert gradient == pytest.approx([-(0.75 - 0.1) / 4, -(0.1 + 0.2) / 4, -(-0.25 + 0.4) / 4])
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(
        {
            "policy_loss": policy / 4,
            "constraint": constraint / 4,
            "log_ratio": -2.5 / 4,
            "advantage_positive": 0.5,
            "advantage_negative": 0.25,
            "_positive_log_ratio": -0.5 / 4,
            "_negative_log_ratio": -2.0 / 4,
            "_positive_nll": 3.5 / 4,
        }
    )
    loss, gradient, _ = offline(ratios, advantages, beta=0.2, mask=(1.0, 0.0, 1.0))
    assert loss == pytest.approx((policy + 0.3 * -1.0 + 0.2 * 2.125) / 4)
    assert gradient[1] == 0


def test_bcpg_with_the_kl_by_hand() -> None:
    """Beyond a ratio of 10 the constraint is linear in the log-ratio."""
    ratios, advantages = [0.5, -1.0, math.log(20)], [0.75, -0.25, 0.0]
    loss, gradient, metrics = offline(ratios, advantages, Constraint.kl, beta=0.2)
    k3 = [math.exp(0.5) - 1.5, math.exp(-1.0), 10 * (1 + math.log(2)) - math.log(20) - 1]
    assert metrics["constraint"].item() == pytest.approx(sum(k3) / 4)
    assert loss == pytest.approx((0.75 * 0.5 - 0.25 * 3.0 + 0.2 * sum(k3)) / 4)
    slopes = [math.exp(0.5) - 1, math.exp(-1.0) - 1, 9.0]
    expected = [-(a - 0.2 * slope) / 4 for a, slope in zip(advantages, slopes, strict=True)]
    assert gradient == pytest.approx(expected)


def test_the_kl_is_that_of_the_reference_from_the_policy() -> None:
    """Over all tokens of a context, weighed as the reference samples them, k3 has the mean KL(ref || pi)."""
    ref, policy = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.2, 0.3, 0.5]).double().log()
    zero = torch.zeros(3).double()
    _, metrics = bcpg_loss(policy, ref, zero, ref.exp(), beta=1.0, constraint=Constraint.kl, num_tokens=1)
    assert metrics["constraint"].item() == pytest.approx((ref.exp() * (ref - policy)).sum().item())


@pytest.mark.parametrize("form", Constraint)
def test_at_the_reference_the_constraint_and_its_gradient_are_zero(form: Constraint) -> None:
    _, gradient, metrics = offline([0.0] * 3, [0.0] * 3, form, beta=3.0)
    assert (metrics["constraint"].item(), gradient) == (0.0, [0.0] * 3)
    # With the advantages there is the gradient of the policy alone, whatever beta.
    assert offline([0.0] * 3, [0.75, 0.1, -0.25], form, beta=3.0)[1] == [-0.1875, -0.025, 0.0625]


def test_tokens_rest_where_the_derivation_says() -> None:
    """At A / beta, and with the KL at log(1 + A / beta), which a token with A < -beta has not: it falls on."""
    advantages = [0.5, -0.5, 0.1]
    _, gradient, _ = offline([value / 0.2 for value in advantages], advantages, beta=0.2)
    assert gradient == pytest.approx([0.0] * 3)
    resting = [math.log(1 + value / 0.8) for value in advantages]
    assert offline(resting, advantages, Constraint.kl, beta=0.8)[1] == pytest.approx([0.0] * 3)
    assert offline([0.0, -50.0, 0.0], advantages, Constraint.kl, beta=0.2)[1][1] == pytest.approx(0.3 / 4)


def test_without_negatives_there_is_the_gradient_of_the_positives_alone() -> None:
    """For a fixed mean reward; from the samples alone it is 1, and the constraint is left."""
    ratios = [0.5, -1.0, -2.0]
    _, both, _ = offline(ratios, [0.75, 0.75, -0.25], beta=0.2)
    _, positives, _ = offline(ratios, [0.75, 0.75, -0.25], beta=0.2, mask=(1.0, 1.0, 0.0))
    assert positives == [*both[:2], 0.0]
    at_reference = offline([0.0] * 3, [0.75, 0.75, -0.25], beta=0.2, mask=(1.0, 1.0, 0.0))[1]
    assert at_reference == [-0.75 / 4, -0.75 / 4, 0.0]  # 3/4 of that of supervised learning
    _, only_right, _ = offline(ratios, [0.0] * 3, beta=0.2)
    assert only_right == pytest.approx([0.2 * ratio / 4 for ratio in ratios])


def test_weighted_reinforce_by_hand() -> None:
    """A right token that became likelier, a wrong one that became less likely, one far beyond the bound."""
    ratios, advantages = [math.log(1.5), math.log(0.5), math.log(6)], [0.1, -1.0, -1.0]
    loss, gradient, metrics = offline(ratios, advantages, None, max_ratio=2.0)
    assert loss == pytest.approx((-0.15 + 0.5 + 2 * (1 + math.log(3))) / 4)
    assert gradient == pytest.approx([-0.1 * 1.5 / 4, 0.5 / 4, 2.0 / 4])
    assert metrics["truncated"].item() == 0.25
    assert metrics["_negative_log_ratio"].item() == pytest.approx(math.log(3) / 4)


def test_weighted_reinforce_leaves_a_negative_that_has_gone_and_bcpg_draws_it_back() -> None:
    gone = [0.0, -60.0, 0.0]
    loss, gradient, _ = offline(gone, [0.0, -1.0, 0.0], None, max_ratio=2.0)
    assert 0 <= loss < 1e-20
    assert 0 <= gradient[1] < 1e-20
    assert offline(gone, [0.0, -1.0, 0.0], beta=0.1)[1][1] < 0  # its probability is to rise
