"""Memory by hand: what a GPU of each role holds, and what a layer keeps of a token."""

from __future__ import annotations

import pytest

from pns.config import Lora, PolicyConfig
from pns.planning import memory
from pns.planning.assumptions import Assumptions
from pns.planning.memory import GB, Training, total, training_of
from pns.planning.shapes import SHAPES

ASSUMED = Assumptions()


def training(name: str, ranks: int, device: str = "cuda", **options: bool) -> Training:
    return training_of(SHAPES[name], ranks, device, PolicyConfig(), 16384, **options)


# GB of a GPU: 16 N / R + 2 N / R of the reference + activations of 16k tokens, gathered layers and head, as
# estimated by hand from verl's and FSDP's code.
BY_HAND = {
    ("Qwen2.5-1.5B", 8): 11, ("Qwen2.5-1.5B", 16): 9,
    ("Qwen2.5-7B", 8): 29, ("Qwen2.5-7B", 16): 21,
    ("Llama-3.1-8B", 8): 32, ("Llama-3.1-8B", 16): 22,
    ("Qwen3-8B", 8): 34, ("Qwen3-8B", 16): 24,
    ("Qwen2.5-14B", 8): 51, ("Qwen2.5-14B", 16): 35,
    ("Qwen2.5-32B", 8): 94, ("Qwen2.5-32B", 16): 57,
}  # fmt: skip


@pytest.mark.parametrize(("name", "ranks"), list(BY_HAND))
def test_the_policy_by_hand(name: str, ranks: int) -> None:
    own = memory.training_memory(training(name, ranks, reference=True))
    assert total(own) + ASSUMED.context_gb == pytest.approx(BY_HAND[name, ranks], rel=0.1)


def test_the_parts_of_7b_on_eight_ranks() -> None:
    parts = memory.policy_memory(training("Qwen2.5-7B", 8, reference=True), ASSUMED)
    num, layer = 7.6156, 0.2331
    expected = {
        "weights (float32)": 4 * num / 8,
        "Adam (2 x float32)": 8 * num / 8,
        "reference (bfloat16)": 2 * num / 8,
        "gradients (float32)": 4 * num / 8,
        "gathered weights": 2 * 2 * layer,  # this layer's and the next one's, bfloat16
        "gradients under way": 4 * 152064 * 3584 / GB,  # the head's, float32: more than a layer's
        "activations: inputs of layers": 28 * 16384 * 3584 * 2 / GB,
        "context": 1.0,
    }
    # One layer: norms 2 x (4 + 2 + 2) H, attention 3 Q + 2 K, feed-forward 4 I and two gradients of I.
    per_token = 16 * 3584 + 2 * (3 * 3584 + 2 * 512 + 4 * 18944) + 2 * 2 * 18944
    expected["activations: one layer"] = 16384 * per_token / GB
    assert parts == pytest.approx(expected, rel=1e-3)


def test_a_copy_of_the_model_is_held_by_its_own_ranks() -> None:
    settings = PolicyConfig(fsdp_size=8)
    hybrid = training_of(SHAPES["Qwen2.5-7B"], 16, "cuda", settings, 16384, reference=True)
    one_copy = training("Qwen2.5-7B", 8, reference=True)
    assert memory.policy_memory(hybrid, ASSUMED) == memory.policy_memory(one_copy, ASSUMED)
    assert memory.state_gb(hybrid) == memory.state_gb(one_copy)  # one copy is written


def test_what_a_layer_keeps_is_what_autograd_saves() -> None:
    """Measured with saved-tensor hooks on a Qwen2 of hidden size 128, feed-forward part 512, 8 and 2 heads of
    16, packed rows of 256 tokens: 13,096 bytes a token and layer in float32, 7,080 in bfloat16 (40 of them
    are what a norm keeps of a row)."""
    from pns.planning.shapes import Shape

    shape = Shape(1000, 128, 4, 8, 2, 16, 512, tied=True, qkv_bias=True)
    assert memory.layer_activation_bytes(shape, 4) == pytest.approx(13096, rel=0.01)
    assert memory.layer_activation_bytes(shape, 2) == pytest.approx(7080, rel=0.01)


def test_checkpointing_saves_activations_and_an_adapter_state() -> None:
    def gb(**changes: object) -> float:
        settings = PolicyConfig(**changes)  # type: ignore[arg-type]
        own = training_of(SHAPES["Qwen2.5-7B"], 8, "cuda", settings, 16384, reference=True)
        return total(memory.policy_memory(own, ASSUMED))

    without = 28 * memory.layer_activation_bytes(SHAPES["Qwen2.5-7B"], 2) * 16384 / GB
    assert gb(gradient_checkpointing=False) - gb() == pytest.approx(without, rel=0.1)
    adapter = SHAPES["Qwen2.5-7B"].lora_parameters(16)
    assert adapter == 40_370_176  # PEFT's count of r=16 on all linear layers
    saved = (12 * (7.6156 - adapter / 1e9) + 2 * 7.6156) / 8  # gradients, Adam, and the reference
    assert gb() - gb(lora=Lora(rank=16)) == pytest.approx(saved + 2.18, abs=0.1)  # and the head's gradient


def test_what_is_offloaded_is_in_host_memory() -> None:
    shape, options = SHAPES["Qwen2.5-32B"], {"reference": True}
    own = training_of(shape, 8, "cuda", PolicyConfig(), 16384, **options)
    offloaded = training_of(shape, 8, "cuda", PolicyConfig(offload=True), 16384, **options)
    state = (4 + 8 + 4 + 2) * 32.764 / 8  # weights, Adam, gradients, the reference in bfloat16
    gpu = total(memory.policy_memory(offloaded, ASSUMED))
    assert total(memory.policy_memory(own, ASSUMED)) - gpu == pytest.approx(state, rel=1e-3)
    assert gpu < 40  # where 80 GB did not do
    host = memory.policy_host(offloaded, 1, "sync", ASSUMED) | memory.away_on_the_host(offloaded)
    assert total(host) == pytest.approx(ASSUMED.process_gb + state, rel=1e-3)
    on_cpu = training_of(shape, 8, "cpu", PolicyConfig(offload=True), 16384)  # all of it is there anyhow
    assert on_cpu == training_of(shape, 8, "cpu", PolicyConfig(), 16384)


def test_a_checkpoint_is_copied_to_the_host_before_it_is_written() -> None:
    own = training("Qwen2.5-32B", 8)
    assert memory.written_on_the_host(own) == pytest.approx(
        {"checkpoint that is written": 12 * 32.764 / 8}, rel=1e-3
    )
    assert memory.written_on_the_host(training("Qwen2.5-32B", 8, score_head=True)) == {}
    on_cpu = training("Qwen2.5-0.5B", 2, "cpu")  # which is the host
    assert memory.policy_memory(on_cpu, ASSUMED)["checkpoint that is written"] == pytest.approx(
        12 * 0.494 / 2, rel=1e-3
    )
    adapted = training_of(SHAPES["Qwen2.5-7B"], 8, "cuda", PolicyConfig(lora=Lora(rank=16)), 16384)
    assert memory.state_gb(adapted) == pytest.approx(12 * 0.04037, rel=1e-3)  # the adapter alone


def test_on_a_cpu_every_rank_gathers_the_model() -> None:
    parts = memory.training_memory(training("Qwen2.5-0.5B", 2, "cpu"))
    assert parts["gathered weights"] == pytest.approx(4 * 0.494, rel=1e-3)
    assert parts["weights (float32)"] == pytest.approx(2 * 0.494, rel=1e-3)


def test_the_cache_of_a_rollout_replica() -> None:
    shape = SHAPES["Qwen2.5-7B"]
    parts, cache = memory.vllm_memory(shape, 1, 256, 0.85, 80, ASSUMED)
    # 0.85 x 80 less 15.2 of weights, 0.16 of logits and 1.3 of one step of 8,192 tokens.
    assert cache.gb == pytest.approx(68 - 15.23 - 0.16 - 1.34, abs=0.01)
    assert cache.bytes_per_token == 57344
    assert cache.sequences(3072) == int(cache.gb * 1e9 // (57344 * 3072))
    assert parts["sampler (noise)"] == pytest.approx(0.85, abs=0.02)
    # Two GPUs: half of weights and of a token's cache on each.
    halves, split = memory.vllm_memory(shape, 2, 256, 0.85, 80, ASSUMED)
    assert halves["weights (bfloat16)"] == pytest.approx(parts["weights (bfloat16)"] / 2)
    assert split.bytes_per_token == 57344 / 2
    # Four heads of keys on eight GPUs: each holds one.
    _, eight = memory.vllm_memory(shape, 8, 256, 0.85, 80, ASSUMED)
    assert eight.bytes_per_token == 57344 / 4


def test_reward_model_and_judge() -> None:
    judge = memory.scorer_memory(SHAPES["Qwen2.5-32B"], True, 0, "cuda", ASSUMED)
    assert judge["weights"] == pytest.approx(65.5, abs=0.1)
    assert judge["cache of keys and values"] == pytest.approx(4.3, abs=0.05)  # 16,384 tokens of 262 KB
    assert 72 < total(judge) < 80  # it just fits
    scorer = memory.scorer_memory(SHAPES["Qwen3-4B"], False, 0, "cuda", ASSUMED)
    assert scorer["weights"] == pytest.approx(8.04, abs=0.05)


def test_host_memory_of_loading_and_of_a_sync() -> None:
    own = training("Qwen2.5-7B", 8)
    process = ASSUMED.process_gb
    assert total(memory.policy_host(own, 0, "load", ASSUMED)) == pytest.approx(30.5 + process, abs=0.1)
    assert total(memory.policy_host(own, 1, "load", ASSUMED)) == process
    tied = training("Qwen3-4B", 8)  # every rank reads it
    assert total(memory.policy_host(tied, 1, "load", ASSUMED)) == pytest.approx(16.1 + process, abs=0.1)
    # The embedding, of 152,064 x 3,584, is the largest tensor.
    assert total(memory.policy_host(own, 0, "sync", ASSUMED)) == pytest.approx(1.09 + process, abs=0.01)
    assert memory.object_store_gb(own.shape) == pytest.approx(15.2, abs=0.1)
    assert total(memory.rollout_host(own.shape, 1, "sync", ASSUMED)) == process
    assert memory.rollout_host(own.shape, 2, "sync", ASSUMED)["pickled weights"] == pytest.approx(76, abs=1)


@pytest.mark.parametrize(
    ("name", "gb"), [("Qwen2.5-1.5B", 18), ("Qwen2.5-7B", 91), ("Qwen3-8B", 98), ("Qwen2.5-32B", 394)]
)
def test_checkpoints(name: str, gb: float) -> None:
    assert memory.state_gb(training(name, 8)) == pytest.approx(gb, rel=0.03)
