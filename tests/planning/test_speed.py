"""Times against estimates made by hand for an H100 (seconds)."""

from __future__ import annotations

import pytest

from pns.planning import speed
from pns.planning.assumptions import Assumptions
from pns.planning.hardware import GPU_KINDS
from pns.planning.memory import vllm_memory
from pns.planning.shapes import SHAPES
from pns.planning.work import Lengths, SamplingWork

ASSUMED, H100 = Assumptions(), GPU_KINDS["H100"]
LENGTHS = Lengths(prompt=150, completion=700, max_prompt=1024, max_completion=2048)


def replica(name: str) -> speed.RolloutReplica:
    _, cache = vllm_memory(SHAPES[name], 1, 256, 0.85, 80, ASSUMED)
    return speed.RolloutReplica(SHAPES[name], 1, 256, cache, H100)


def test_a_decoding_step_by_hand() -> None:
    """7B, 256 sequences of 500 tokens: 15.2 GB of weights and 7.3 of cache at 0.8 x 3,350 GB/s are 8.4 ms, the
    noise of 256 x 152,064 logits (13 GB) 4.9, the host 4.1."""
    step = replica("Qwen2.5-7B").step_seconds(256, 500, ASSUMED)
    assert step == pytest.approx(8.4e-3 + 4.9e-3 + 4.1e-3, rel=0.02)
    assert 256 / step == pytest.approx(15_000, rel=0.05)  # tokens a second
    assert 256 / replica("Qwen2.5-1.5B").step_seconds(256, 500, ASSUMED) == pytest.approx(23_000, rel=0.05)


@pytest.mark.parametrize(("problems", "seconds"), [(512, 58), (16, 17)])
def test_rollout_of_a_step(problems: int, seconds: float) -> None:
    """Four replicas, groups of eight; with few completions the longest decides."""
    sampling = SamplingWork("backbone", 8 * problems, problems, 2048)
    own = replica("Qwen2.5-7B").seconds(sampling, LENGTHS, 700, 4, ASSUMED)
    assert own == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize(
    ("name", "by_store", "broadcast"),
    [("Qwen2.5-1.5B", 2.3, 0.06), ("Qwen2.5-7B", 11.4, 0.3), ("Qwen2.5-32B", 49, 1.3)],
)
def test_sync(name: str, by_store: float, broadcast: float) -> None:
    shape = SHAPES[name]
    assert speed.store_seconds(shape, 1, False, ASSUMED) == pytest.approx(by_store, rel=0.1)
    assert speed.store_seconds(shape, 1, True, ASSUMED) > speed.store_seconds(shape, 1, False, ASSUMED)
    assert speed.broadcast_seconds(shape, None, ASSUMED) == pytest.approx(broadcast, rel=0.1)
    # Between machines at 8 GB/s, or what a slower network has.
    over_network = [speed.broadcast_seconds(shape, gb_s, ASSUMED) for gb_s in (40, 8, 4)]
    assert over_network[0] == over_network[1] < over_network[2]
    assert over_network[2] == pytest.approx(2 * shape.parameters * (1 / 100 + 1 / 4) / 1e9)


@pytest.mark.parametrize(("name", "seconds"), [("Qwen2.5-7B", 125), ("Qwen2.5-32B", 540)])
def test_a_judge_of_4096_completions_on_two_gpus(name: str, seconds: float) -> None:
    lengths = Lengths(150, 730, 1024, 2048)
    own = speed.scoring_seconds(SHAPES[name], True, 4096, lengths, 2, H100, ASSUMED)
    assert own == pytest.approx(seconds, rel=0.12)  # which counts the embedding and the head, too


def test_training_flops_by_hand() -> None:
    """8 N D: forward, twice that backward, and the layers once more; without checkpointing 6 N D."""
    shape = SHAPES["Qwen2.5-7B"]
    num = 28 * shape.layer_parameters
    head = shape.embedding_parameters
    assert speed.training_flops(shape, 1, 0, 0, True, False) == 8 * num
    assert speed.training_flops(shape, 1, 0, 0, False, False) == 6 * num
    assert speed.training_flops(shape, 1, 0, 0, False, True) == 4 * num  # an adapter
    assert speed.training_flops(shape, 0, 1, 0, False, False) == 8 * head  # which is computed twice
    # Scores and sums: two products of Q x context a token, half of it on average.
    assert speed.forward_flops(shape, 1, 0, 1000) - 2 * num == 2 * 28 * 3584 * 1000


def test_an_update_of_eight_gpus() -> None:
    """512 x 8 completions of 700 tokens and 512 shared prompts: 56 s at 40 % of the peak, the reference 14."""
    shape, held, in_head = SHAPES["Qwen2.5-7B"], 4096 * 700 + 512 * 150, 4096 * 700
    own = speed.training_flops(shape, held, in_head, 850, True, False)
    assert speed.update_seconds(shape, own, 8, 22, 3, H100, None, ASSUMED) == pytest.approx(56, rel=0.1)
    forward = speed.forward_flops(shape, held, in_head, 850)
    assert speed.update_seconds(shape, forward, 8, 22, 1, H100, None, ASSUMED) == pytest.approx(14, rel=0.1)


def test_an_offloaded_update_brings_weights_and_takes_gradients() -> None:
    """An eighth of 7B on each of eight ranks: 2 micro-batches of three passes bring 3.8 GB each time and take as
    many of gradients, at 4 GB/s; one step of Adam reads 16 bytes a weight and writes 12, at 10 GB/s."""
    assert speed.offload_seconds(SHAPES["Qwen2.5-7B"], 8, 2, 3, 1, ASSUMED) == pytest.approx(
        8 * 3.808 / 4 + 28 * 7.6156 / 8 / 10, rel=1e-3
    )
    forward_alone = speed.offload_seconds(SHAPES["Qwen2.5-7B"], 8, 2, 1, 0, ASSUMED)
    assert forward_alone == pytest.approx(2 * 3.808 / 4, rel=1e-3)


def test_ranks_on_two_machines_wait_for_the_network_where_it_is_slow() -> None:
    shape = SHAPES["Qwen2.5-7B"]
    flops = speed.training_flops(shape, 16384 * 16, 16384 * 16, 850, True, False)

    def seconds(network: float | None) -> float:
        return speed.update_seconds(shape, flops, 16, 1, 3, H100, network, ASSUMED)

    # 3 x 15.2 GB of weights and 30.5 of gradients, 15/16 of them from others, at 5 GB/s.
    assert seconds(5) == pytest.approx(76.2 * 15 / 16 / 5, rel=0.01)
    assert seconds(50) == seconds(None) == pytest.approx(2.5, rel=0.1)
    # A copy of the model on each: half of the 30.5 GB of gradients there and half back, a rank an eighth.
    assert speed.exchange_seconds(shape, 8, 2, 5) == pytest.approx(30.5 / 8 / 5, rel=0.01)
