"""Policy training on real worker processes with tiny random models, against transformers and plain torch."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from pns import config
from pns.algo import losses
from pns.config import Layout
from pns.errors import UserError
from workers.broadcast import Meeting, member
from workers.runtime import Runtime
from workers.training.batching import Batch, Family, micro_batch, plan
from workers.training.objectives import (
    BcpgObjective,
    BradleyTerryObjective,
    GrpoObjective,
    GspoObjective,
    Head,
    PreferenceObjective,
    SftObjective,
)
from workers.training.policy import Policy, wait_for_all

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
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
OPTIMIZER = config.Optimizer(learning_rate=1e-2)
DPO = PreferenceObjective("sigmoid", {"beta": 0.1})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random models of three architectures, with a tokenizer each."""
    from tokenizers import Tokenizer, models
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2"
    )
    root, paths = tmp_path_factory.mktemp("models"), {}
    for name, config_class, model_class, tied in (
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, True),
        ("qwen2_untied", Qwen2Config, Qwen2ForCausalLM, False),
        ("llama", LlamaConfig, LlamaForCausalLM, False),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM, True),
    ):
        torch.manual_seed(3)
        model_class(config_class(**SIZES, tie_word_embeddings=tied)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        paths[name] = str(root / name)
    return paths


def start(replicas: int, **settings: Any) -> Policy:
    policy_config = config.PolicyConfig(max_tokens_per_micro_batch=96, **settings)
    return Policy(config.Pool(replicas=replicas), policy_config, Runtime(start_timeout_seconds=1800))


@pytest.fixture(scope="module")
def one_rank(ray_session: None) -> Iterator[Policy]:
    policy = start(1, gradient_checkpointing=False)
    yield policy
    policy.shutdown()


@pytest.fixture(scope="module")
def two_ranks(ray_session: None) -> Iterator[Policy]:
    policy = start(2, gradient_checkpointing=True)
    yield policy
    policy.shutdown()


@pytest.fixture(scope="module")
def four_ranks(ray_session: None) -> Iterator[Policy]:
    policy = start(4, gradient_checkpointing=False)
    yield policy
    policy.shutdown()


def rows(count: int, seed: int = 0) -> Batch:
    noise = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return noise.integers(2, VOCABULARY, noise.integers(low, high)).tolist()

    return Batch([tokens(2, 9) for _ in range(count)], [tokens(3, 20) for _ in range(count)])


def reference_log_probs(model: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    results = []
    for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        results.append(log_probs[len(prompt) - 1 :])
    return results


def causal(path: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def assert_same(given: list[np.ndarray], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert [len(row) for row in given] == [len(row) for row in expected]
    np.testing.assert_allclose(np.concatenate(given), torch.cat(expected).detach().numpy(), atol=tolerance)


# Spreading rows over ranks and micro-batches.


def pairs(count: int, seed: int = 0) -> Batch:
    """Chosen and rejected rows of one prompt; every third pair also has the first two tokens of its
    completions in common."""
    noise = np.random.default_rng(seed)
    prompts, completions = [], []
    for pair in range(count):
        prompt, start = (
            noise.integers(2, VOCABULARY, noise.integers(2, 9)).tolist(),
            [5, 6] if pair % 3 == 0 else [],
        )
        for side in (7, 8):
            prompts.append(prompt)
            completions.append([*start, side, *noise.integers(2, VOCABULARY, noise.integers(1, 18)).tolist()])
    return Batch(prompts, completions)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("layout", Layout)
def test_plan_places_every_row_once_within_the_budget(ranks: int, group_size: int, layout: Layout) -> None:
    batch = pairs(13, ranks)
    planned = plan(batch, group_size, ranks, 96, layout)
    assert len(planned) == ranks
    assert len({len(of_rank) for of_rank in planned}) == 1
    families = [family for of_rank in planned for micro in of_rank for family in micro]
    assert sorted(row for family in families for row in family.rows if row >= 0) == list(range(26))
    for micro in (micro for of_rank in planned for micro in of_rank):
        laid_out = micro_batch(batch, micro, layout)
        assert len(laid_out.token_ids) <= 96
        numbers = [row for row in laid_out.rows if row >= 0]
        assert group_size == 1 or all(
            numbers[i + 1] == numbers[i] + 1 and numbers[i] % 2 == 0 for i in range(0, len(numbers), 2)
        )
    work = [
        sum(family.tokens for micro in of_rank for family in micro if family.rows[0] >= 0)
        for of_rank in planned
    ]
    assert max(work) - min(work) <= 40 * group_size


def test_plan_shares_what_rows_of_one_prompt_begin_with() -> None:
    batch = Batch([[2, 3]] * 4 + [[4, 5]] * 2, [[6, 7, 8], [6, 7, 9, 9], [6, 2], [6, 7], [8], [8, 9]])
    assert plan(batch, 2, 1, 50, Layout.shared) == [
        [[Family((0, 1, 2, 3), (5, 6, 4, 4), 3), Family((4, 5), (3, 4), 2)]]
    ]
    apart = [Family((0, 1), (5, 6), 4), Family((2, 3), (4, 4), 3), Family((4, 5), (3, 4), 2)]
    assert [family for micro in plan(batch, 2, 1, 8, Layout.shared)[0] for family in micro] == apart
    assert plan(Batch([[2], [3]], [[4], [4]]), 2, 1, 50, Layout.shared) == [
        [[Family((0,), (2,)), Family((1,), (2,))]]
    ]


def test_micro_batches_hold_shared_beginnings_once() -> None:
    batch = Batch(
        [[2, 3], [2, 3], [4]],
        [[6, 7, 8], [6, 9], [5]],
        {"mask": [[1, 2, 3], [4, 5], [6]]},
        {"score": [1, 2, 3]},
    )
    shared = micro_batch(batch, [Family((0, 1), (5, 4), 3), Family((2,), (2,))], Layout.shared)
    assert shared.token_ids.tolist() == [2, 3, 6, 7, 8, 4, 5, 9]
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 3]
    assert shared.families == ((3, (2, 1)), (0, (2,)))
    assert shared.labels.tolist() == [6, 7, 8, 6, 9, 5]
    assert shared.predictors.tolist() == [1, 2, 3, 1, 2, 5]
    assert (shared.last.tolist(), shared.completion_lengths.tolist()) == ([4, 7, 6], [3, 2, 1])
    assert (shared.num_tokens, shared.num_padded) == (11, 15)
    assert shared.token_values["mask"].tolist() == [1, 2, 3, 4, 5, 6]
    padded = micro_batch(batch, [Family((0,), (5,)), Family((1,), (4,))], Layout.padded)
    assert (padded.token_ids.tolist(), padded.width) == ([2, 3, 6, 7, 8, 2, 3, 6, 9, 0], 5)
    assert (padded.predictors.tolist(), padded.last.tolist()) == ([1, 2, 3, 6, 7], [4, 8])


def test_plan_pads_ranks_without_rows_and_refuses_what_does_not_fit() -> None:
    one, two = Batch([[2]], [[3, 4]]), Batch([[2], [2]], [[3, 4], [5] * 30])
    assert plan(one, 1, 2, 50, Layout.packed) == [[[Family((0,), (3,))]], [[Family((-1,), (2,))]]]
    assert plan(two, 2, 2, 70, Layout.shared) == [[[Family((0, 1), (3, 31), 1)]], [[Family((-1,), (2,))] * 2]]
    for layout, tokens in ((Layout.padded, 62), (Layout.packed, 34), (Layout.shared, 33)):
        with pytest.raises(
            UserError,
            match=rf"2 rows that belong together of {tokens} tokens exceed .*max_tokens_per_micro_batch = 30",
        ):
            plan(two, 2, 1, 30, layout)


def test_a_row_of_padding_weighs_nothing() -> None:
    batch = Batch([[5, 6]], [[7]], {"mask": [[1.0]]}, {"advantages": [3.0]})
    part = micro_batch(batch, [Family((0,), (3,)), Family((-1,), (2,))], Layout.packed)
    assert part.token_ids.tolist() == [5, 6, 7, 0, 0]
    assert part.token_values["mask"].tolist() == [1.0, 0.0]
    assert (part.row_values["weight"].tolist(), part.row_values["advantages"].tolist()) == (
        [1.0, 0.0],
        [3.0, 0.0],
    )


# Waiting.


def test_waits_end_with_a_message_and_failures_at_once(ray_session: None) -> None:
    @ray.remote(num_cpus=0)
    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise ValueError("broken rank")

    said = r"waited 0.5 s for a training step; 1 of 2 processes .*, raise placement.step_timeout_seconds$"
    short = Runtime(step_timeout_seconds=0.5).step_limit
    with pytest.raises(TimeoutError, match=said):
        wait_for_all([ray.put(1), sleep.remote(5)], short, "a training step")
    never = sleep.remote(3600)
    with pytest.raises(ValueError, match="broken rank"):  # and not that nothing came in time
        wait_for_all([never, fail.remote()], Runtime().step_limit, "a training step")
    ray.cancel(never, force=True)


def test_a_pool_that_does_not_fit_is_refused_with_both_numbers(ray_session: None) -> None:
    with pytest.raises(
        UserError,
        match=r"placement.policy needs 2 x .'CPU': 1000\}, and .*free now: .*lower placement.policy, .* or raise placement.start_t",
    ):
        Policy(config.Pool(replicas=2, cpus=1000), config.PolicyConfig(), Runtime(start_timeout_seconds=0.5))


# Language models.


@pytest.mark.parametrize("name", ["qwen2", "qwen2_untied", "llama", "qwen3"])
def test_log_probs_are_those_of_transformers(
    one_rank: Policy, checkpoints: dict[str, str], name: str
) -> None:
    """The same processes take one architecture after another."""
    one_rank.load(checkpoints[name], "language_model", None, total_steps=1, seed=0)
    batch = rows(11)
    with torch.no_grad():
        assert_same(one_rank.log_probs(batch), reference_log_probs(causal(checkpoints[name]), batch))


def test_log_probs_and_gradients_at_a_temperature(one_rank: Policy, checkpoints: dict[str, str]) -> None:
    batch, temperature = rows(4), 0.6
    one_rank.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
    model = causal(checkpoints["qwen2"])
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits / temperature)
    log_probs = reference_log_probs(model, batch)
    found = one_rank.log_probs(batch, temperature)
    assert_same(found, [row.detach() for row in log_probs])
    loss = -torch.cat(log_probs).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    given = Batch(
        batch.prompt_ids, batch.completion_ids, {"old_log_probs": found}, {"advantages": [1.0] * len(batch)}
    )
    # On the old policy the surrogate's gradient with advantages of 1 is that of the mean log-probability.
    step = one_rank.train_step(given, GrpoObjective(0.2, 0.2, 0.0, temperature=temperature))
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_gspo_steps_depend_on_neither_layout_nor_ranks(
    one_rank: Policy, two_ranks: Policy, checkpoints: dict[str, str]
) -> None:
    batch = rows(7)
    results = []
    for policy in (one_rank, two_ranks):
        policy.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
        old = policy.log_probs(batch)
        values = {"old_log_probs": old, "ref_log_probs": old}
        advantages = {"advantages": [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.25]}
        given = Batch(batch.prompt_ids, batch.completion_ids, values, advantages)
        objective = GspoObjective(3e-4, 4e-4, 0.1)
        results.append([policy.train_step(given, objective) for _ in range(3)])
    assert results[0][0]["loss"] == pytest.approx(-sum(advantages["advantages"]) / 7, abs=1e-5)
    for one, two in zip(*results, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_fewer_rows_than_ranks(two_ranks: Policy, checkpoints: dict[str, str]) -> None:
    two_ranks.load(checkpoints["qwen2_untied"], "language_model", OPTIMIZER, total_steps=5, seed=0)
    batch = rows(1)
    with torch.no_grad():
        expected = reference_log_probs(causal(checkpoints["qwen2_untied"]), batch)
    assert_same(two_ranks.log_probs(batch), expected)
    assert two_ranks.train_step(batch, SftObjective())["loss"] == pytest.approx(
        -expected[0].mean().item(), abs=1e-5
    )


def test_token_advantages_count_alike_on_one_and_two_ranks(
    one_rank: Policy, two_ranks: Policy, checkpoints: dict[str, str]
) -> None:
    found, batch, noise = [], rows(7), np.random.default_rng(1)
    reference = [noise.uniform(-6, -1, len(ids)) for ids in batch.completion_ids]
    advantages = [noise.uniform(-1, 1, len(ids)) for ids in batch.completion_ids]
    given = replace(batch, token_values={"ref_log_probs": reference, "token_advantages": advantages})
    objective = BcpgObjective(0.1, config.Constraint.squared_log_ratio)
    for policy in (one_rank, two_ranks):
        policy.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
        steps = [policy.train_step(given, objective) for _ in range(2)]
        names = ("loss", "grad_norm", "constraint", "positive_log_ratio", "negative_log_ratio")
        found.append([step[name] for step in steps for name in names])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.fixture(scope="module")
def padded_on_one_rank(one_rank: Policy, checkpoints: dict[str, str]) -> list[dict[str, float]]:
    return preference_steps(one_rank, checkpoints["qwen2"], Layout.padded)


def preference_steps(
    policy: Policy, path: str, layout: Layout, lora: config.Lora | None = None
) -> list[dict[str, float]]:
    """Metrics of two DPO steps and one of RPO, with a margin that leaves out the end of the rejected side."""
    policy.settings = replace(policy.settings, layout=layout, lora=lora or config.Lora())
    policy.load(path, "language_model", config.Optimizer(learning_rate=1e-3), total_steps=5, seed=0)
    batch = pairs(9)  # two and four ranks get different numbers of them
    masks = [
        [1.0] * len(ids) if row % 2 == 0 else [1.0] * (len(ids) - 1) + [0.0]
        for row, ids in enumerate(batch.completion_ids)
    ]
    given = Batch(
        batch.prompt_ids,
        batch.completion_ids,
        {"ref_log_probs": policy.log_probs(batch), "margin_mask": masks},
    )
    rpo = PreferenceObjective("rpo", {"beta": 0.1, "nll_weight": 0.5})
    return [policy.train_step(given, objective) for objective in (DPO, DPO, rpo)]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        *((ranks, layout) for ranks in ("one_rank", "two_ranks") for layout in Layout),
        ("four_ranks", Layout.shared),
    ],
)
def test_preference_steps_depend_on_neither_layout_nor_ranks(
    ranks: str,
    layout: Layout,
    padded_on_one_rank: list[dict[str, float]],
    checkpoints: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    steps = preference_steps(request.getfixturevalue(ranks), checkpoints["qwen2"], layout)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[2]["margin"] > steps[1]["margin"] > steps[0]["margin"] - 1e-6
    for found, expected in zip(steps, padded_on_one_rank, strict=True):
        for metric in (
            "loss",
            "margin",
            "chosen_nll",
            "chosen_log_prob",
            "rejected_log_prob",
            "kl",
            "length_bias",
        ):
            assert found[metric] == pytest.approx(expected[metric], abs=2e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    batch = pairs(9)
    tokens = sum(batch.length(row) for row in range(18))
    common = sum(len(batch.prompt_ids[2 * pair]) + (2 if pair % 3 == 0 else 0) for pair in range(9))
    assert steps[0]["prefix_saved"] == pytest.approx(common / tokens if layout is Layout.shared else 0)
    assert steps[0]["padding_saved"] == 0 if layout is Layout.padded else 0 < steps[0]["padding_saved"] < 0.6
    assert steps[0]["tokens_per_second"] > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_are_the_same(
    one_rank: Policy, padded_on_one_rank: list[dict[str, float]], checkpoints: dict[str, str]
) -> None:
    try:
        one_rank.settings = replace(one_rank.settings, compile=True)
        steps = preference_steps(one_rank, checkpoints["qwen2"], Layout.shared)
    finally:
        one_rank.settings = replace(one_rank.settings, compile=False)
    for found, expected in zip(steps, padded_on_one_rank, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=2e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_metrics_of_preference_steps(
    padded_on_one_rank: list[dict[str, float]], checkpoints: dict[str, str]
) -> None:
    """Against plain torch, before the first step."""
    batch = pairs(9)
    with torch.no_grad():
        sums = np.array(
            [row.sum().item() for row in reference_log_probs(causal(checkpoints["qwen2"]), batch)]
        )
    lengths = np.array([len(ids) for ids in batch.completion_ids])
    first = padded_on_one_rank[0]
    assert first["chosen_log_prob"] == pytest.approx(sums[::2].mean(), abs=1e-4)
    assert first["rejected_log_prob"] == pytest.approx(sums[1::2].mean(), abs=1e-4)
    assert first["chosen_nll"] == pytest.approx((-sums / lengths)[::2].mean(), abs=1e-5)
    assert (first["margin"], first["kl"]) == pytest.approx((0, 0), abs=1e-6)
    assert padded_on_one_rank[1]["kl"] > 1e-8
    assert abs(padded_on_one_rank[1]["length_bias"]) <= 1


def test_bfloat16_computes_over_float32_master_weights(
    one_rank: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    path, batch = checkpoints["qwen2"], pairs(9)
    try:
        one_rank.settings = replace(one_rank.settings, dtype="bfloat16")
        one_rank.load(path, "language_model", config.Optimizer(learning_rate=1e-5), total_steps=5, seed=0)
        with torch.no_grad():
            difference = (
                np.concatenate(one_rank.log_probs(batch))
                - torch.cat(reference_log_probs(causal(path), batch)).numpy()
            )
        assert 1e-4 < np.abs(difference).max() < 0.1  # computed in bfloat16, and about right
        given = Batch(batch.prompt_ids, batch.completion_ids, {"ref_log_probs": one_rank.log_probs(batch)})
        assert one_rank.train_step(given, DPO)["loss"] == pytest.approx(math.log(2), abs=0.01)
        weights = one_rank.weights().tensors()
        start = causal(path).state_dict()
        changes = torch.cat(
            [(value - start[key]).abs().flatten() for key, value in weights.items() if "proj" in key]
        )
        assert 0 < changes.max() < 2e-5  # Adam's first step, smaller than bfloat16 resolves
        one_rank.export(tmp_path / "model")
        from safetensors.torch import load_file

        assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {
            torch.bfloat16
        }
    finally:
        one_rank.settings = replace(one_rank.settings, dtype="auto")


def test_lora_trains_the_adapter_and_switches_it_off_for_the_reference(
    two_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    path, batch = checkpoints["qwen2"], pairs(9)
    try:
        two_ranks.settings = replace(two_ranks.settings, lora=config.Lora(rank=4, alpha=8))
        two_ranks.load(path, "language_model", OPTIMIZER, total_steps=5, seed=0)
        two_ranks.load_reference(path)
        with torch.no_grad():
            expected = reference_log_probs(causal(path), batch)
        assert_same(two_ranks.log_probs(batch), expected)
        given = Batch(
            batch.prompt_ids, batch.completion_ids, {"ref_log_probs": two_ranks.reference_log_probs(batch)}
        )
        losses = [two_ranks.train_step(given, DPO)["loss"] for _ in range(2)]
        two_ranks.save(tmp_path / "checkpoint")
        losses.append(two_ranks.train_step(given, DPO)["loss"])
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert losses[2] < losses[1] < losses[0]
        assert_same(two_ranks.reference_log_probs(batch), expected)
        two_ranks.export(tmp_path / "model")
        with torch.no_grad():
            assert_same(
                two_ranks.log_probs(batch), reference_log_probs(causal(str(tmp_path / "model")), batch)
            )
        start, trained = causal(path).state_dict(), two_ranks.weights().tensors()
        changed = {
            key: int(torch.linalg.matrix_rank(value - start[key], atol=1e-4))
            for key, value in trained.items()
            if "proj.weight" in key
        }
        assert set(changed.values()) == {4}
        assert all(torch.equal(value, start[key]) for key, value in trained.items() if key not in changed)
        two_ranks.load(path, "language_model", OPTIMIZER, total_steps=5, seed=1)
        two_ranks.restore(tmp_path / "checkpoint")
        assert two_ranks.train_step(given, DPO)["loss"] == losses[2]
    finally:
        two_ranks.settings = replace(two_ranks.settings, lora=config.Lora())


def test_lora_in_bfloat16_trains_after_its_reference_was_asked_first(
    one_rank: Policy, checkpoints: dict[str, str]
) -> None:
    path, batch = checkpoints["qwen2"], pairs(9)
    whole = one_rank.settings
    try:
        one_rank.settings = replace(whole, dtype="bfloat16", lora=config.Lora(rank=4, alpha=8))
        one_rank.load(path, "language_model", OPTIMIZER, total_steps=5, seed=0)
        one_rank.load_reference(path)
        reference = one_rank.reference_log_probs(batch)
        given = Batch(batch.prompt_ids, batch.completion_ids, {"ref_log_probs": reference})
        losses = [one_rank.train_step(given, DPO)["loss"] for _ in range(3)]
        assert losses[0] == pytest.approx(math.log(2), abs=0.02)
        assert losses[2] < losses[1] < losses[0]
        np.testing.assert_array_equal(
            np.concatenate(one_rank.reference_log_probs(batch)), np.concatenate(reference)
        )
    finally:
        one_rank.settings = whole


def test_grpo_steps_are_those_of_plain_torch(
    one_rank: Policy, two_ranks: Policy, checkpoints: dict[str, str]
) -> None:
    batch, path = rows(7), checkpoints["qwen2"]
    advantages = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.25]
    model = causal(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with torch.no_grad():
        old = torch.cat(reference_log_probs(model, batch))
    lengths = torch.tensor([len(ids) for ids in batch.completion_ids])
    expected = []
    for _ in range(3):
        log_probs = torch.cat(reference_log_probs(model, batch))
        advantages_T = torch.repeat_interleave(torch.tensor(advantages), lengths)
        loss, metrics = losses.grpo_loss(
            log_probs, old, old, advantages_T, torch.ones_like(old), 0.2, 0.28, 0.1, len(old)
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        expected.append((loss.item(), norm, metrics["kl"].item(), metrics["clip_fraction"].item()))
    for policy in (one_rank, two_ranks):
        policy.load(path, "language_model", OPTIMIZER, total_steps=5, seed=0)
        before = policy.log_probs(batch)
        given = Batch(
            batch.prompt_ids,
            batch.completion_ids,
            {"old_log_probs": before, "ref_log_probs": before},
            {"advantages": advantages},
        )
        for loss_value, norm, kl, clip_fraction in expected:
            found = policy.train_step(given, GrpoObjective(clip_low=0.2, clip_high=0.28, kl_coefficient=0.1))
            assert found["loss"] == pytest.approx(loss_value, abs=1e-5)
            assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
            assert (found["kl"], found["clip_fraction"]) == pytest.approx((kl, clip_fraction), abs=1e-5)
            assert found["update_skipped"] == 0
        with torch.no_grad():
            assert_same(policy.log_probs(batch), reference_log_probs(model, batch), tolerance=1e-4)


def test_a_reference_stays_as_it_was(two_ranks: Policy, checkpoints: dict[str, str]) -> None:
    two_ranks.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
    two_ranks.load_reference(checkpoints["qwen2"])
    batch = rows(5)
    before = two_ranks.log_probs(batch)
    two_ranks.train_step(batch, SftObjective())
    np.testing.assert_array_equal(
        np.concatenate(two_ranks.reference_log_probs(batch)), np.concatenate(before)
    )
    assert np.abs(np.concatenate(two_ranks.log_probs(batch)) - np.concatenate(before)).max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2", "qwen2_untied", "qwen3", "llama"])
def test_a_reference_held_in_bfloat16_gives_what_its_float32_weights_give(
    two_ranks: Policy, checkpoints: dict[str, str], name: str
) -> None:
    whole, batch = two_ranks.settings, rows(5)
    try:
        two_ranks.settings = replace(whole, dtype="bfloat16")
        two_ranks.load(checkpoints[name], "language_model", OPTIMIZER, total_steps=5, seed=0)
        two_ranks.load_reference(checkpoints[name])
        np.testing.assert_array_equal(
            np.concatenate(two_ranks.reference_log_probs(batch)), np.concatenate(two_ranks.log_probs(batch))
        )
    finally:
        two_ranks.settings = whole


def test_the_learning_rate_warms_up_and_falls_to_zero(one_rank: Policy, checkpoints: dict[str, str]) -> None:
    optimizer = config.Optimizer(learning_rate=1.0, warmup_steps=2, schedule="cosine")
    one_rank.load(checkpoints["qwen2"], "language_model", optimizer, total_steps=4, seed=0)
    rates = [one_rank.train_step(rows(2), SftObjective())["lr"] for _ in range(4)]
    # Steps 1 to 4 run at 1/2, 1, and the cosine from 1 to 0 in three parts; `lr` is the next step's.
    assert rates == pytest.approx(
        [1.0, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2, 0.0]
    )


def test_the_learning_rate_counts_steps_and_not_updates(
    one_rank: Policy, checkpoints: dict[str, str]
) -> None:
    """Two updates a step, and a step without any: the cosine falls once a step and never climbs back."""
    optimizer = config.Optimizer(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    one_rank.load(checkpoints["qwen2"], "language_model", optimizer, total_steps=3, seed=0)
    for end_of_step in (False, True):
        first = one_rank.train_step(rows(2), SftObjective(), end_of_step=end_of_step)
    one_rank.pass_step()
    one_rank.train_step(rows(2), SftObjective(), end_of_step=False)
    last = one_rank.train_step(rows(2), SftObjective())
    assert first["lr"] == pytest.approx(0.5)  # of step 2, in the middle of the four parts that end at 0
    assert last["lr"] == pytest.approx(0.0, abs=1e-9)


def test_restore_repeats_the_next_step_to_the_bit(
    two_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    optimizer = config.Optimizer(learning_rate=1e-2, warmup_steps=3, schedule="cosine")
    two_ranks.load(checkpoints["qwen2"], "language_model", optimizer, total_steps=6, seed=0)
    for seed in range(2):
        two_ranks.train_step(rows(5, seed), SftObjective())
    two_ranks.save(tmp_path / "checkpoint")
    first = [two_ranks.train_step(rows(5, seed), SftObjective()) for seed in (2, 3)]
    two_ranks.load(checkpoints["qwen2"], "language_model", optimizer, total_steps=6, seed=1)
    two_ranks.restore(tmp_path / "checkpoint")
    again = [two_ranks.train_step(rows(5, seed), SftObjective()) for seed in (2, 3)]
    for name in ("loss", "grad_norm", "lr"):
        assert [step[name] for step in first] == [step[name] for step in again]


def assert_near(found: dict[str, float], expected: dict[str, float]) -> None:
    """The same sums in another order."""
    for name in ("loss", "grad_norm", "lr"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_untied", "score", "lora"])
def test_another_number_of_ranks_goes_on_where_training_was(
    one_rank: Policy, two_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path, kind: str
) -> None:
    """Two ranks, one, and two again, beside two ranks that were never interrupted."""
    path = checkpoints.get(kind, checkpoints["qwen2"])
    head: Head = "score" if kind == "score" else "language_model"
    objective: Any = BradleyTerryObjective(centre=0.01) if kind == "score" else SftObjective()
    optimizer = config.Optimizer(learning_rate=1e-2, warmup_steps=3, schedule="cosine")
    settings = one_rank.settings, two_ranks.settings
    lora = config.Lora(rank=4 if kind == "lora" else 0, alpha=8)

    def steps(policy: Policy, *numbers: int) -> list[dict[str, float]]:
        return [policy.train_step(pairs(4, number), objective) for number in numbers]

    try:
        for policy in (one_rank, two_ranks):
            policy.settings = replace(policy.settings, lora=lora)
        two_ranks.load(path, head, optimizer, total_steps=6, seed=0)
        expected = steps(two_ranks, 0, 1)
        two_ranks.save(tmp_path / "2")
        expected += steps(two_ranks, 2, 3, 4)
        one_rank.load(path, head, optimizer, total_steps=6, seed=1)
        one_rank.restore(tmp_path / "2")
        found = steps(one_rank, 2)
        one_rank.save(tmp_path / "1")
        two_ranks.load(path, head, optimizer, total_steps=6, seed=2)
        two_ranks.restore(tmp_path / "1")
        found += steps(two_ranks, 3, 4)
    finally:
        one_rank.settings, two_ranks.settings = settings
    for one, other in zip(found, expected[2:], strict=True):
        assert_near(one, other)
    assert expected[2]["loss"] != pytest.approx(
        expected[0]["loss"], rel=1e-2
    )  # there was something to restore


def test_a_checkpoint_before_the_first_update_has_no_moments(
    one_rank: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """The first update is the same to the bit: AdamW counts its steps from there."""
    one_rank.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
    one_rank.pass_step()
    one_rank.save(tmp_path)
    first = [one_rank.train_step(rows(5, seed), SftObjective()) for seed in (1, 2)]
    one_rank.restore(tmp_path)  # over a model that was trained meanwhile
    again = [one_rank.train_step(rows(5, seed), SftObjective()) for seed in (1, 2)]
    assert [step["loss"] for step in first] == [step["loss"] for step in again]
    assert [step["grad_norm"] for step in first] == [step["grad_norm"] for step in again]


def test_num_updates_tells_whether_the_weights_are_still_the_same(
    one_rank: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    def load() -> None:
        one_rank.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)

    load()
    changes: list[Callable[[], object]] = [
        load,
        lambda: one_rank.train_step(rows(5, 1), SftObjective()),
        lambda: one_rank.restore(tmp_path),
    ]
    one_rank.save(tmp_path)
    for change in changes:
        before = one_rank.num_updates
        one_rank.log_probs(rows(5, 1))
        one_rank.weights()
        one_rank.pass_step()
        assert one_rank.num_updates == before
        change()
        assert one_rank.num_updates > before


def test_what_is_no_whole_checkpoint_is_named(
    one_rank: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    one_rank.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
    with pytest.raises(UserError, match=r"holds no whole checkpoint of the policy .*: remove it"):
        one_rank.restore(tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written(
    two_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """What is written is the state at `begin_save`, whatever is trained meanwhile."""
    two_ranks.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=9, seed=0)
    two_ranks.train_step(rows(5, 0), SftObjective())
    expected = {}
    for name in "ab":  # the second waits for the first
        (tmp_path / name).mkdir()
        two_ranks.begin_save(tmp_path / name)
        expected[name] = two_ranks.train_step(rows(5, 1), SftObjective())["loss"]
    assert two_ranks.is_saved(waits=True)
    for name, loss in expected.items():
        two_ranks.restore(tmp_path / name)
        assert two_ranks.train_step(rows(5, 1), SftObjective())["loss"] == loss


def test_a_write_that_fails_is_not_lost(
    one_rank: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    one_rank.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=9, seed=0)
    one_rank.train_step(rows(5, 0), SftObjective())
    directory = tmp_path / "checkpoint"
    (directory / "__0_0.distcp").mkdir(parents=True)  # where the shards are to be written
    one_rank.begin_save(directory)
    one_rank.train_step(rows(5, 1), SftObjective())
    for _ in range(2):
        with pytest.raises(Exception, match="Is a directory"):
            one_rank.is_saved(waits=True)
    one_rank.save(tmp_path / "another")
    assert one_rank.is_saved()


def test_two_copies_of_two_ranks_train_as_one_copy_of_four(
    four_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """Hybrid sharding, with several micro-batches a rank and a checkpoint between; the copies stay equal."""
    one_copy, batches = four_ranks.settings, [rows(24, seed) for seed in range(3)]
    results = {}
    for fsdp_size in (0, 2):
        four_ranks.settings = replace(one_copy, fsdp_size=fsdp_size)
        four_ranks.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=5, seed=0)
        steps = [four_ranks.train_step(batch, SftObjective()) for batch in batches[:2]]
        four_ranks.save(tmp_path / str(fsdp_size))
        log_probs = four_ranks.log_probs(batches[2])
        steps.append(four_ranks.train_step(batches[2], SftObjective()))
        results[fsdp_size] = steps, four_ranks.weights().tensors(), log_probs
    four_ranks.restore(tmp_path / "2")
    again = four_ranks.train_step(batches[2], SftObjective())
    four_ranks.restore(tmp_path / "0")
    assert_near(four_ranks.train_step(batches[2], SftObjective()), results[0][0][2])
    four_ranks.settings = one_copy
    (steps, weights, log_probs), (hybrid_steps, hybrid_weights, hybrid_log_probs) = results.values()
    for one, two in zip(steps, hybrid_steps, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert {name: again[name] for name in ("loss", "grad_norm")} == {
        name: hybrid_steps[2][name] for name in ("loss", "grad_norm")
    }
    for name, weight in weights.items():
        torch.testing.assert_close(hybrid_weights[name], weight, rtol=0, atol=2e-4)
    assert_same(hybrid_log_probs, [torch.tensor(values) for values in log_probs], tolerance=1e-4)


def assert_sent(policy: Policy, expected: dict[str, torch.Tensor]) -> None:
    """To a group of the policy and this process, twice; also after a group in which nobody else was."""
    runtime = Runtime(sync_timeout_seconds=1200)
    lonely = Meeting(1, runtime)
    sending = policy.send_weights(lonely.seat(0))
    lonely.give_up()
    with pytest.raises(RuntimeError, match="was lost"):
        ray.get(sending)
    meeting = Meeting(1, runtime)
    for _ in range(2):
        sending = policy.send_weights(meeting.seat(0))
        received = dict(member(meeting.seat(1)).receive())
        assert received.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in received.items())
        assert ray.get(sending[0]) == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize("name", ["qwen2", "qwen2_untied"])
def test_weights_and_export_hold_the_trained_model(
    two_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    two_ranks.load(checkpoints[name], "language_model", OPTIMIZER, total_steps=5, seed=0)
    start = load_file(Path(checkpoints[name]) / "model.safetensors")
    weights = two_ranks.weights().tensors()
    assert weights.keys() == start.keys()
    assert all(torch.equal(weights[key], start[key]) for key in start)
    batch = rows(6)
    two_ranks.train_step(batch, SftObjective())
    newer = two_ranks.weights().tensors()
    assert_sent(two_ranks, newer)
    two_ranks.export(tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(
        torch.equal(value, exported[key]) and not torch.equal(value, start[key])
        for key, value in newer.items()
    )
    with torch.no_grad():
        assert_same(two_ranks.log_probs(batch), reference_log_probs(causal(str(tmp_path / "model")), batch))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
        == AutoTokenizer.from_pretrained(checkpoints[name]).get_vocab()
    )


# Reward models.


def toy_pairs(count: int, seed: int) -> Batch:
    """Chosen completions hold the token 5 somewhere, rejected ones the token 6."""
    noise = np.random.default_rng(seed)
    prompts, completions = [], []
    for _ in range(count):
        prompt, completion = (
            noise.integers(8, VOCABULARY, 4).tolist(),
            noise.integers(8, VOCABULARY, noise.integers(4, 9)).tolist(),
        )
        place = int(noise.integers(len(completion)))
        for mark in (5, 6):
            prompts.append(prompt)
            completions.append([*completion[:place], mark, *completion[place:]])
    return Batch(prompts, completions)


def test_bradley_terry_learns_and_exports_a_reward_model(
    two_ranks: Policy, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    two_ranks.load(checkpoints["qwen2"], "score", OPTIMIZER, total_steps=20, seed=0)
    held_out = toy_pairs(20, seed=99)
    start = two_ranks.scores(held_out)
    assert 0 < max(abs(score) for score in start) < 0.5
    first = two_ranks.train_step(toy_pairs(8, 0), BradleyTerryObjective(centre=0.01))
    assert first["loss"] == pytest.approx(math.log(2), abs=0.1)
    for step in range(1, 20):
        two_ranks.train_step(toy_pairs(8, step), BradleyTerryObjective(centre=0.01))
    scores = np.array(two_ranks.scores(held_out))
    assert np.mean(scores[::2] > scores[1::2]) > 0.9
    two_ranks.export(tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    assert model.num_labels == 1
    with torch.no_grad():
        ids = [
            torch.tensor([[*prompt, *completion]])
            for prompt, completion in zip(held_out.prompt_ids, held_out.completion_ids, strict=True)
        ]
        np.testing.assert_allclose(scores, [model(row).logits.item() for row in ids], atol=1e-5)
    two_ranks.load(str(tmp_path / "reward"), "score", None, total_steps=1, seed=7)
    np.testing.assert_allclose(two_ranks.scores(held_out), scores, atol=1e-5)


def test_the_score_head_depends_on_the_seed_alone(
    one_rank: Policy, two_ranks: Policy, checkpoints: dict[str, str]
) -> None:
    batch, found = toy_pairs(3, seed=0), {}
    for policy, seed in ((one_rank, 1), (two_ranks, 1), (one_rank, 2)):
        policy.load(checkpoints["llama"], "score", None, total_steps=1, seed=seed)
        found[policy is one_rank, seed] = policy.scores(batch)
    assert found[True, 1] == pytest.approx(found[False, 1], abs=1e-6)
    assert found[True, 1] != pytest.approx(found[True, 2], abs=1e-3)


# Wrong use.


def test_wrong_use_is_named(one_rank: Policy, checkpoints: dict[str, str]) -> None:
    with pytest.raises(UserError, match="/nowhere/model"):
        one_rank.load("/nowhere/model", "language_model", None, total_steps=1, seed=0)
    one_rank.load(checkpoints["qwen2"], "language_model", OPTIMIZER, total_steps=1, seed=0)
    batch = rows(3)
    with pytest.raises(ValueError, match="score head"):
        one_rank.scores(batch)
    with pytest.raises(ValueError, match="GrpoObjective needs old_log_probs, advantages"):
        one_rank.train_step(batch, GrpoObjective(0.2, 0.2, 0.0))
    with pytest.raises(ValueError, match="pairs of rows, the batch has 3 rows"):
        one_rank.train_step(
            Batch(batch.prompt_ids, batch.completion_ids, {"ref_log_probs": [[0.0]] * 3}), DPO
        )
    with pytest.raises(
        ValueError, match=f"token id {VOCABULARY} is outside the model's vocabulary of {VOCABULARY}"
    ):
        one_rank.log_probs(Batch([[3]], [[VOCABULARY]]))
    with pytest.raises(ValueError, match="a completion has 2 tokens and 1 mask"):
        one_rank.train_step(Batch([[3]], [[4, 5]], {"mask": [[1.0]]}), SftObjective())
    with pytest.raises(ValueError, match="empty prompt or completion"):
        one_rank.log_probs(Batch([[3]], [[]]))
    one_rank.load(checkpoints["qwen2"], "language_model", None, total_steps=1, seed=0)
    with pytest.raises(ValueError, match="without an optimizer"):
        one_rank.train_step(batch, SftObjective())
