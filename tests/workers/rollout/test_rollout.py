"""Rollout against a plain transformers forward, with random tiny models; one actor of each engine serves all
tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import pns.config as config
from pns.data.thinking import ThinkingBudget
from pns.errors import UserError
from tests.workers.rollout.given import Given
from workers.rollout.engine import StopWatch, check_names, penalise, perturb
from workers.rollout.pool import Request, RolloutPool, Sample, Sampling
from workers.runtime import Runtime

VOCAB, END, MAX_TOKENS = 50, 1, 256
ENGINES = ["transformers", "vllm"]


def build_model(architecture: str, tied: bool, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # of 32, the least that vLLM takes on CPU
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint directories: names are architecture, embedding, seed."""
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen2-tied-0", "qwen2-tied-1", "qwen2-untied-0", "qwen2-untied-1", "llama-untied-0"):
        architecture, embedding, seed = name.split("-")
        build_model(architecture, embedding == "tied", int(seed)).save_pretrained(root / name)
    letters().save_pretrained(root / "qwen2-tied-0")
    return {path.name: path for path in root.iterdir()}


def letters() -> PreTrainedTokenizerFast:
    """Every token is a character; token i is chr(48 + i)."""
    backend = Tokenizer(BPE(vocab={chr(48 + i): i for i in range(VOCAB)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=chr(48 + END))


def make_pool(engine: str, replicas: int = 1) -> RolloutPool:
    settings = config.RolloutEngine(engine=config.EngineKind(engine), max_batch=32, kv_cache_gib=0.05)
    runtime = Runtime(start_timeout_seconds=1800)
    return RolloutPool(config.Pool(replicas, gpus=0, cpus=1), settings, runtime)


@pytest.fixture(scope="module")
def pools(ray_session: None) -> Iterator[dict[str, RolloutPool]]:
    with ThreadPoolExecutor() as threads:
        started = dict(zip(ENGINES, threads.map(make_pool, ENGINES), strict=True))
    yield started
    for pool in started.values():
        pool.shutdown()


@pytest.fixture(params=ENGINES)
def pool(request: pytest.FixtureRequest, pools: dict[str, RolloutPool]) -> RolloutPool:
    return pools[request.param]


def make_requests(count: int, seed: int = 0) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(f"r{i}", tuple(draw.randrange(2, VOCAB) for _ in range(draw.randrange(5, 30))), 1000 + i)
        for i in range(count)
    ]


def collect(pool: RolloutPool, requests: Sequence[Request], sampling: Sampling) -> dict[str, Sample]:
    samples = [sample for chunk in pool.stream(requests, sampling) for sample in chunk]
    assert sorted(sample.id for sample in samples) == sorted(request.id for request in requests)
    return {sample.id: sample for sample in samples}


def forward_log_probs(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> np.ndarray:
    """The definition: one sequence, no padding, no cache."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    return np.array([log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)])


def assert_agrees(pool: RolloutPool, model: PreTrainedModel, version: int) -> None:
    requests = make_requests(12)
    samples = collect(pool, requests, Sampling(1.0, max_new_tokens=24))
    scored = pool.log_probs(
        [request.prompt_ids for request in requests], [samples[request.id].token_ids for request in requests]
    )
    for request, log_probs in zip(requests, scored, strict=True):
        sample = samples[request.id]
        expected = forward_log_probs(model, request.prompt_ids, sample.token_ids)
        np.testing.assert_allclose(sample.log_probs, expected, atol=1e-4)
        np.testing.assert_allclose(log_probs, expected, atol=1e-4)
        assert sample.weights_version == version


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2-untied"])
def test_log_probs_are_those_of_the_present_weights(
    pool: RolloutPool, models: dict[str, Path], kind: str
) -> None:
    tied = kind.endswith("-tied")
    first, second = build_model("qwen2", tied, 0), build_model("qwen2", tied, 1)
    pool.load(str(models[f"{kind}-0"]))
    assert_agrees(pool, first, 0)
    pool.update_weights(Given(second.state_dict()), 7)
    assert_agrees(pool, second, 7)
    with pytest.raises(AssertionError):  # the two models differ enough for stale weights to show
        assert_agrees(pool, first, 7)
    pool.load(str(models[f"{kind}-0"]))
    assert_agrees(pool, first, 0)


def test_a_sleep_takes_the_weights_and_the_pool_gives_the_present_ones_back(
    pool: RolloutPool, models: dict[str, Path]
) -> None:
    [actor] = pool._actors
    pool.load(str(models["qwen2-untied-0"]))
    pool.update_weights(Given(build_model("qwen2", False, 1).state_dict()), 7)
    requests, sampling = make_requests(12), Sampling(1.0, max_new_tokens=24)
    expected = collect(pool, requests, sampling)
    pool.sleep()
    pool.wake_up()
    with pytest.raises(RuntimeError, match="has been given no weights"):  # whoever forgets them
        ray.get(actor.log_probs.remote([[2]], [[3]]))
    assert collect(pool, requests, sampling) == expected
    pool.sleep()
    pool.wake_up()
    pool.update_weights(Given(build_model("qwen2", False, 0).state_dict()), 8)
    assert_agrees(pool, build_model("qwen2", False, 0), 8)
    pool.sleep()
    pool.wake_up()
    pool.load(str(models["qwen2-untied-1"]))
    assert_agrees(pool, build_model("qwen2", False, 1), 0)


def test_another_architecture(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["llama-untied-0"]))
    assert_agrees(pool, build_model("llama", False, 0), 0)


def test_an_engine_without_room_says_which_keys(ray_session: None, models: dict[str, Path]) -> None:
    settings = config.RolloutEngine(engine=config.EngineKind.vllm, kv_cache_gib=1e-6)
    pool = RolloutPool(config.Pool(replicas=1, gpus=0, cpus=1), settings, Runtime())
    try:
        with pytest.raises(UserError, match=r"vLLM does not start with .*rollout\.kv_cache_gib"):
            pool.load(str(models["qwen2-tied-0"]))
    finally:
        pool.shutdown()


def test_an_incomplete_update_is_refused(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["qwen2-untied-0"]))
    tensors = dict(build_model("qwen2", False, 1).state_dict())
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"1 names missing .*lm_head\.weight"):
        pool.update_weights(Given(tensors), 1)


# The prompt opens a block, which "=>" (two tokens here) closes.
THINKING = ThinkingBudget(6, "<", "=>", True, (13, 14))
SETTINGS = (
    Sampling(0.0),
    Sampling(1.0),
    Sampling(0.7, top_p=0.8),
    Sampling(1.0, top_k=5, top_p=0.9),
    Sampling(1.2, min_p=0.1),
    Sampling(0.0, repetition_penalty=1.3),
    Sampling(0.8, top_k=20, min_p=0.02, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1),
    Sampling(0.0, thinking=THINKING),
    Sampling(0.9, top_p=0.95, frequency_penalty=0.3, thinking=THINKING),
)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_engines_give_the_same_samples(
    pools: dict[str, RolloutPool], models: dict[str, Path], sampling: Sampling
) -> None:
    requests = make_requests(40)
    for pool in pools.values():
        pool.load(str(models["qwen2-tied-0"]))
    of_one, of_other = (collect(pool, requests, sampling) for pool in pools.values())
    same = sum(of_one[request.id].token_ids == of_other[request.id].token_ids for request in requests)
    assert same >= 39  # rounding may decide one near-tie
    unchanged = collect(pool, requests, Sampling(sampling.temperature, sampling.top_p))
    differ = [of_one[name].token_ids != unchanged[name].token_ids for name in unchanged]
    if sampling == Sampling(sampling.temperature, sampling.top_p):
        assert sum(differ) <= 1
    else:
        assert sum(differ) > 20
    if sampling.temperature:
        assert len({sample.token_ids for sample in of_one.values()}) > 30


def test_a_seed_gives_its_sample_whatever_the_batch(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["qwen2-tied-0"]))
    requests = make_requests(40)
    sampling = Sampling(1.0, max_new_tokens=20)
    alone = collect(pool, requests[7:8], sampling)["r7"]
    together = collect(pool, requests, sampling)["r7"]
    other_seed = collect(pool, [Request("r7", requests[7].prompt_ids, 5)], sampling)["r7"]
    assert alone.token_ids == together.token_ids
    assert alone.token_ids != other_seed.token_ids


def test_a_completion_ends_at_the_end_token_or_the_limit(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["qwen2-tied-0"]))
    samples = collect(pool, make_requests(60), Sampling(1.0, max_new_tokens=30))
    stopped = [sample for sample in samples.values() if sample.finish_reason == "stop"]
    cut = [sample for sample in samples.values() if sample.finish_reason == "length"]
    assert len(stopped) > 5
    assert len(cut) > 5
    assert len(stopped) + len(cut) == 60
    assert all(sample.token_ids[-1] == END and END not in sample.token_ids[:-1] for sample in stopped)
    assert all(len(sample.token_ids) == 30 and END not in sample.token_ids for sample in cut)
    assert all(len(sample.log_probs) == len(sample.token_ids) for sample in samples.values())


def test_a_stop_text_ends_a_completion_and_no_token_is_spent_after_it(
    pool: RolloutPool, models: dict[str, Path]
) -> None:
    pool.load(str(models["qwen2-tied-0"]))
    requests = make_requests(40)
    whole = collect(pool, requests, Sampling(1.0, max_new_tokens=60))
    text = {name: "".join(chr(48 + token) for token in own.token_ids) for name, own in whole.items()}
    of_two = max({own[i : i + 2] for own in text.values() for i in range(9, 12)} - {""}, key=len)
    stops = (of_two, text["r3"][5])
    cut = collect(pool, requests, Sampling(1.0, max_new_tokens=60, stop=stops))
    for name, sample in cut.items():
        ends = [text[name].find(stop) + len(stop) for stop in stops if stop in text[name]]
        length = min([*ends, len(text[name])])
        assert sample.token_ids == whole[name].token_ids[:length]  # and the sample is the same until there
        np.testing.assert_allclose(sample.log_probs, whole[name].log_probs[:length], atol=1e-4)
        assert sample.finish_reason == ("stop" if ends else whole[name].finish_reason)
    spent, before = (sum(len(sample.token_ids) for sample in own.values()) for own in (cut, whole))
    assert len(cut["r3"].token_ids) <= 6
    assert spent < 0.7 * before
    pool.load(str(models["qwen2-untied-0"]))
    with pytest.raises(UserError, match="has no tokenizer, which"):
        collect(pool, requests, Sampling(1.0, stop=stops))


def test_a_reasoning_block_is_closed_after_its_budget(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["qwen2-tied-0"]))
    requests, first, ids = make_requests(40), THINKING.tokens, THINKING.closing_ids
    free = collect(pool, requests, Sampling(1.0, max_new_tokens=24))
    cut = collect(pool, requests, Sampling(1.0, max_new_tokens=24, thinking=THINKING))
    went_on = 0
    for name, sample in cut.items():
        token_ids = free[name].token_ids
        if len(token_ids) <= first:  # it ended in time
            assert sample == free[name]
            continue
        assert sample.token_ids[: first + 2] == (*token_ids[:first], *ids)  # the same until there
        assert THINKING.cuts(letters(), sample.token_ids)
        went_on += len(sample.token_ids) > first + 2
    assert went_on > 20
    # Of the model, forced or not.
    model, sample = build_model("qwen2", True, 0), cut["r3"]
    expected = forward_log_probs(model, requests[3].prompt_ids, sample.token_ids)
    np.testing.assert_allclose(sample.log_probs, expected, atol=1e-4)
    # A block that the model has to open, and one that it has closed, are left alone.
    opened = replace(THINKING, opening=chr(48 + free["r3"].token_ids[2]), opened=False)
    closed = replace(THINKING, closing=chr(48 + free["r3"].token_ids[3]))
    for budget, is_cut in ((opened, True), (closed, False)):
        asked = Sampling(1.0, max_new_tokens=24, thinking=budget)
        token_ids = collect(pool, requests[3:4], asked)["r3"].token_ids
        assert (token_ids[first : first + 2] == ids) is is_cut
        assert (token_ids == free["r3"].token_ids) is not is_cut
    pool.load(str(models["qwen2-untied-0"]))
    with pytest.raises(UserError, match="has no tokenizer, which"):
        collect(pool, requests, Sampling(1.0, thinking=THINKING))


def test_a_stop_is_seen_in_the_token_that_completes_it() -> None:
    tokens = {0: "\nQ", 1: "ues", 2: "tion: W", 3: "hy", 4: ":"}

    class Words:
        decoded = 0

        def decode(self, token_ids: list[int], **_: Any) -> str:
            self.decoded += len(token_ids) > 1
            return "".join(tokens[token] for token in token_ids)

    words = Words()
    watch = StopWatch(words, ["\nQuestion:"])
    drawn = [3, 3, 4, 3, 0, 1, 2, 3]
    assert [watch.ends(drawn[: i + 1]) for i in range(8)] == [False] * 6 + [True, False]
    assert words.decoded == 2  # of the two tokens with a colon


def test_a_prompt_without_room_is_the_users_to_mend(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["qwen2-tied-0"]))
    with pytest.raises(UserError, match=r"request long: .*256"):
        list(pool.stream([Request("long", (5,) * MAX_TOKENS, 0)], Sampling(0.0)))
    assert len(collect(pool, make_requests(3), Sampling(0.0, max_new_tokens=4))) == 3


def test_samples_arrive_before_all_have_finished(pool: RolloutPool, models: dict[str, Path]) -> None:
    pool.load(str(models["qwen2-tied-0"]))
    chunks = list(pool.stream(make_requests(128), Sampling(1.0, max_new_tokens=200)))
    assert sum(map(len, chunks)) == 128
    # An actor hands over what has finished while the rest decodes; in how many parts is a matter of speed.
    assert len(chunks[0]) < 128


def test_a_killed_actor_loses_and_doubles_nothing(
    models: dict[str, Path], actor_processes: Callable[..., set[psutil.Process]]
) -> None:
    others = actor_processes("RolloutActor")
    pool = make_pool("transformers", replicas=2)
    try:
        pool.load(str(models["qwen2-untied-0"]))
        pool.update_weights(Given(build_model("qwen2", False, 1).state_dict()), 3)
        requests = make_requests(160)
        sampling = Sampling(1.0, max_new_tokens=120)
        expected = collect(pool, requests, sampling)
        victim, survivor = actor_processes("RolloutActor", len(others) + 2) - others
        seen: list[Sample] = []
        for chunk in pool.stream(requests, sampling):
            if not seen:
                victim.kill()
            seen += chunk
        present = actor_processes("RolloutActor", len(others) + 2) - others
        assert survivor in present
        assert victim not in present
        assert len(present) == 2  # one came in the place of the victim
        assert len(seen) == 160
        assert {sample.id: sample.token_ids for sample in seen} == {
            name: sample.token_ids for name, sample in expected.items()
        }
        assert {sample.weights_version for sample in seen} == {3}
    finally:
        pool.shutdown()


def test_perturbed_argmax_is_a_sample_of_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    count = 40_000
    logits = probs.log().expand(count, 5)

    def frequencies(temperature: float, top_p: float) -> torch.Tensor:
        drawn = perturb(logits, range(count), [3] * count, temperature, top_p).argmax(dim=-1)
        return torch.bincount(drawn, minlength=5) / count

    def tempered(temperature: float) -> torch.Tensor:
        return (probs.log() / temperature).softmax(dim=-1)

    # 0.01 is four standard errors of a frequency of one half
    torch.testing.assert_close(frequencies(1.0, 1.0), probs, atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(0.5, 1.0), tempered(0.5), atol=0.01, rtol=0)
    # 0.5 + 0.25 + 0.15 is the first sum to reach 0.8
    nucleus = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.0]) / 0.9
    torch.testing.assert_close(frequencies(1.0, 0.8), nucleus, atol=0.01, rtol=0)


def test_what_is_left_out_of_the_distribution() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()

    def kept(top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> int:
        return int(perturb(logits, [1], [0], 1.0, top_p, top_k, min_p).isfinite().sum())

    assert [kept(), kept(top_k=2), kept(top_k=9), kept(min_p=0.3), kept(min_p=1.0)] == [5, 2, 5, 3, 1]
    # 0.4 of 0.7 is 0.57: the nucleus is of what top_k and min_p have left, 0.4 + 0.3 without them.
    assert [kept(top_p=0.55), kept(top_p=0.55, top_k=2), kept(top_p=0.45, min_p=0.3)] == [2, 1, 1]


def test_penalties_by_their_formulas() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0, 1.0])
    penalised = penalise(logits, [0, 1], [2, 3, 3], (0.5, 0.25, 2.0))
    torch.testing.assert_close(penalised, torch.tensor([1.0, -4.0, 0.5 - 0.75, 0.5 - 1.0, 1.0]))
    torch.testing.assert_close(logits[0], torch.tensor(2.0))  # as it was


def test_noise_of_steps_and_seeds_is_independent() -> None:
    scores = perturb(
        torch.zeros(2000, 50), [seed for seed in range(1000) for _ in range(2)], [0, 1] * 1000, 1.0, 1.0
    )
    pairs = scores.view(1000, 2, 50)
    for a, b in ((pairs[:, 0], pairs[:, 1]), (pairs[:-1, 0], pairs[1:, 0]), (scores[:, :-1], scores[:, 1:])):
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 0.02  # four standard errors of 50,000 pairs


def test_a_tied_head_is_optional_an_untied_one_is_not() -> None:
    check_names({"a", "lm_head.weight"}, {"a"}, tied=True)
    check_names({"a"}, {"a", "lm_head.weight"}, tied=True)
    for expected, given in (({"a", "lm_head.weight"}, {"a"}), ({"a"}, {"a", "b"}), ({"a", "b"}, {"a"})):
        with pytest.raises(ValueError, match="weight update"):
            check_names(expected, given, tied=False)
