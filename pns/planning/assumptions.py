"""What a plan takes for granted: shares of published peaks, speeds of copies, lengths of texts.

`pns plan RECIPE --assumptions` prints them; a cluster file may set others under `assumptions`.
"""

from dataclasses import dataclass
from typing import Any

from pns.fields import Range, above, at_least, key, up_to


def _assumed(value: float, meaning: str, source: str, allowed: Range) -> Any:
    return key(value, meaning, allowed, source=source)


# Where "estimated" stands no GPU has measured it; "by the code": counted from what is executed.
_SINGLE_CORE = "estimated: 2 to 4 times a slow core's, measured"


@dataclass
class Assumptions:
    """Shares are of the published peak; GB are 10^9 bytes."""

    completion_share: float = _assumed(
        0.34, "mean completion, of rollout.max_new_tokens", "700 of 2048: common for mathematics", up_to(1)
    )
    prompt_tokens: int = _assumed(
        150, "mean prompt, tokens, where the limit is not less", "common for mathematics", at_least(1)
    )
    judge_prompt_tokens: int = _assumed(
        330, "the judge's instructions, tokens", "pns.algo.judging in Qwen2.5's tokens", at_least(0)
    )
    step_judge_prompt_tokens: int = _assumed(
        450, "the same of the step judge", "pns.algo.step_judging, estimated from characters", at_least(0)
    )
    wrong_share: float = _assumed(
        0.5, "of the samples that are wrong: labelled, where steps are", "not known before sampling", up_to(1)
    )
    step_tokens: int = _assumed(
        50,
        "mean step of a wrong completion, in bcpg.segments' limits",
        "estimated: two sentences",
        at_least(1),
    )
    step_line_tokens: int = _assumed(
        15, "the step judge reads for each step beside it", "pns.algo.step_judging", at_least(0)
    )
    step_grade_tokens: int = _assumed(
        4, "the step judge writes for each step, one after the other", "pns.algo.step_judging", at_least(1)
    )
    decode_bandwidth: float = _assumed(
        0.8, "share of memory bandwidth that decoding reaches", "estimated; common of vLLM", up_to(1)
    )
    prefill_flops: float = _assumed(
        0.5, "share of peak operations that prefill reaches", "estimated; common of vLLM", up_to(1)
    )
    host_step_seconds: float = _assumed(
        1e-3, "of the host for each decoding step", "estimated: 4 ms with 256 sequences", at_least(0)
    )
    host_sequence_seconds: float = _assumed(
        12e-6, "of the host for each sequence of it", "estimated: as above", at_least(0)
    )
    noise_bytes: float = _assumed(
        336, "moved for each logit by the seeded noise", "by the code: 25 passes of `perturb`", at_least(0)
    )
    training_flops: float = _assumed(
        0.4, "share of peak that training reaches, recomputation counted", "estimated: eager layers", up_to(1)
    )
    reward_model_flops: float = _assumed(
        0.4, "the same of a reward model", "estimated: padded rows, eager layers", up_to(1)
    )
    judge_flops: float = _assumed(
        0.3, "the same of a judge", "estimated: masked attention, four passes", up_to(1)
    )
    verdicts_per_second: float = _assumed(
        486,
        "of one verifier process, of answers that may become negatives",
        "measured: tests/bench/verifier.py",
        above(0),
    )
    device_to_host_gb_s: float = _assumed(4, "of a copy to pageable memory, or back", "estimated", above(0))
    host_optimizer_gb_s: float = _assumed(
        10, "that a rank's optimizer reads and writes of host memory", "estimated", above(0)
    )
    pickle_gb_s: float = _assumed(1.5, "of pickling tensors", _SINGLE_CORE, above(0))
    store_gb_s: float = _assumed(4, "of writing into the object store", "estimated", above(0))
    unpickle_gb_s: float = _assumed(0.6, "of reading pickled tensors", _SINGLE_CORE, above(0))
    node_to_node_gb_s: float = _assumed(
        1.5, "of Ray's objects between machines", "estimated: 1 to 2", above(0)
    )
    peer_gb_s: float = _assumed(100, "of NCCL between GPUs of a machine", "estimated: NVLink", above(0))
    broadcast_gb_s: float = _assumed(
        8, "of NCCL to other machines, where the network is not slower", "verl's figure: 8.25", above(0)
    )
    context_gb: float = _assumed(
        1.0, "of a GPU for each process: CUDA context, NCCL's buffers", "estimated", at_least(0)
    )
    graphs_gb: float = _assumed(1.0, "of vLLM's CUDA graphs, beside its share", "estimated", at_least(0))
    process_gb: float = _assumed(
        3.0, "host memory of a process with CUDA's libraries", "estimated", at_least(0)
    )
    cpu_process_gb: float = _assumed(
        0.8, "host memory of a process without, models apart", "measured: the tiny run, 7.6 GiB", at_least(0)
    )
    driver_gb: float = _assumed(
        4.0, "host memory of the driver with a step's rollouts, and of Ray's own", "estimated", at_least(0)
    )
    verifier_gb: float = _assumed(0.1, "of each verifier process", "estimated: forks of one", at_least(0))
    cpu_heap: float = _assumed(
        0.4,
        "of a policy process's memory on a CPU: freed, kept by the allocator",
        "measured: tests/bench/policy_memory.py",
        at_least(0),
    )
    rollout_bytes: float = _assumed(
        35,
        "of rollouts.jsonl for each token",
        "measured: 24 of log-probability, 7 of id, 4 of text",
        above(0),
    )
