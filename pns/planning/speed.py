"""Seconds of the parts of a step, from the published peaks of a GPU and the assumed shares of them."""

from dataclasses import dataclass

from pns.planning.assumptions import Assumptions
from pns.planning.hardware import GpuKind
from pns.planning.memory import BFLOAT16, FLOAT32, GB, Cache, Parts, total
from pns.planning.shapes import Shape
from pns.planning.work import Lengths, SamplingWork

TERA = 1e12


def forward_flops(shape: Shape, tokens: float, head_tokens: float, context: float) -> float:
    """A multiplication and an addition for every weight and token; scores and sums of attention over half of
    the mean `context`; the head where its output is asked for."""
    layers = 2 * shape.layers * shape.layer_parameters
    attention = 2 * shape.layers * shape.query_width * context
    head = 2 * shape.embedding_parameters
    return tokens * (layers + attention) + head_tokens * head


def training_flops(
    shape: Shape, tokens: float, head_tokens: float, context: float, checkpointing: bool, lora: bool
) -> float:
    """The backward pass is two forward passes: for the gradients of activations and of weights, which an
    adapter's frozen ones do not have. Checkpointing computes layers once more, the head always does."""
    layers = forward_flops(shape, tokens, 0, context)
    head = forward_flops(shape, 0, head_tokens, context)
    backward = 1 if lora else 2
    return layers * (1 + backward + checkpointing) + head * (2 + backward)


@dataclass(frozen=True)
class RolloutReplica:
    """A rollout replica."""

    shape: Shape
    tensor_parallel: int
    max_batch: int
    cache: Cache
    gpu: GpuKind
    seeded_noise: bool = True

    def step_seconds(self, batch: float, context: float, assumed: Assumptions) -> float:
        """One token for each of `batch` sequences: read the weights once and every sequence's cache, or
        compute; draw; and the host's part."""
        weights = 2 * self.shape.parameters / self.tensor_parallel
        caches = batch * context * self.cache.bytes_per_token
        noise = batch * self.shape.vocabulary * assumed.noise_bytes
        bandwidth = assumed.decode_bandwidth * self.gpu.bandwidth_gb_s * GB
        flops = forward_flops(self.shape, batch, batch, 2 * context) / self.tensor_parallel
        computing = flops / (assumed.prefill_flops * self.gpu.tflops * TERA)
        model = max((weights + caches) / bandwidth, computing)
        host = assumed.host_step_seconds + batch * assumed.host_sequence_seconds
        return model + noise / bandwidth + host

    def seconds(
        self,
        sampling: SamplingWork,
        lengths: Lengths,
        mean_completion: float,
        replicas: int,
        assumed: Assumptions,
    ) -> float:
        """All completions: prefill of each prompt once, full batches of mean length, and a tail in which the
        longest ends alone."""
        context = lengths.prompt + mean_completion / 2
        own = sampling.completions / replicas
        fitting = self.cache.sequences(int(lengths.prompt + mean_completion))
        batch = max(1.0, min(own, self.max_batch, fitting))
        full = own * mean_completion / batch * self.step_seconds(batch, context, assumed)
        tail = sampling.max_new_tokens - mean_completion
        alone = tail * self.step_seconds(1, lengths.prompt + sampling.max_new_tokens, assumed)
        prefill = forward_flops(
            self.shape, sampling.prompts / replicas * lengths.prompt, 0, lengths.prompt
        ) / (self.tensor_parallel * assumed.prefill_flops * self.gpu.tflops * TERA)
        return prefill + full + alone


def scoring_seconds(
    shape: Shape,
    judges: bool,
    completions: int,
    lengths: Lengths,
    replicas: int,
    gpu: GpuKind,
    assumed: Assumptions,
) -> float:
    """A forward pass of prompt and completion, with the judge's instructions where it `judges`."""
    tokens = lengths.prompt + lengths.completion + (assumed.judge_prompt_tokens if judges else 0)
    flops = completions * forward_flops(shape, tokens, 0, tokens)
    share = assumed.judge_flops if judges else assumed.reward_model_flops
    return flops / (replicas * share * gpu.tflops * TERA)


def grading_seconds(
    shape: Shape,
    num_steps: float,
    forward_tokens: int,
    completions: int,
    lengths: Lengths,
    replicas: int,
    gpu: GpuKind,
    assumed: Assumptions,
) -> float:
    """What a step judge does beyond `scoring_seconds`: it reads a line before each step, and for each step's
    grade its weights once a batch, of as many completions as `forward_tokens` hold."""
    flops = completions * num_steps * assumed.step_line_tokens * forward_flops(shape, 1, 0, 0)
    beside = num_steps * (assumed.step_line_tokens + assumed.step_grade_tokens)
    row = lengths.prompt + lengths.completion + assumed.step_judge_prompt_tokens + beside
    passes = completions / max(1, int(forward_tokens / row)) * num_steps
    read = passes * 2 * shape.parameters / (assumed.decode_bandwidth * gpu.bandwidth_gb_s * GB)
    host = passes * assumed.host_step_seconds
    return (flops / (assumed.judge_flops * gpu.tflops * TERA) + read + host) / replicas


def update_seconds(
    shape: Shape,
    flops: float,
    ranks: int,
    num_micro_batches: float,
    passes: int,
    gpu: GpuKind,
    network_gb_s: float | None,
    assumed: Assumptions,
) -> float:
    """Computing, or, where ranks are on several machines (`network_gb_s` of each GPU), moving weights: every
    micro-batch gathers bfloat16 weights in each of `passes`, and one with gradients adds them in float32."""
    computing = flops / (ranks * assumed.training_flops * gpu.tflops * TERA)
    if network_gb_s is None:
        return computing
    reduced = FLOAT32 if passes > 1 else 0
    moved = (2 * passes + reduced) * shape.parameters * num_micro_batches * (ranks - 1) / ranks
    return max(computing, moved / (network_gb_s * GB))


def offload_seconds(
    shape: Shape, ranks: int, num_micro_batches: float, passes: int, updates: int, assumed: Assumptions
) -> float:
    """What `policy.offload` adds, as if nothing of it went on beside computing: every micro-batch brings the
    float32 weights in each of `passes` and takes its gradients back, and Adam reads weights, gradients and
    both moments and writes all but the gradients."""
    copies = num_micro_batches * (passes + (updates > 0)) * FLOAT32 / assumed.device_to_host_gb_s
    steps = updates * 7 * FLOAT32 / assumed.host_optimizer_gb_s
    return (copies + steps) * shape.parameters / ranks / GB


def exchange_seconds(shape: Shape, fsdp_size: int, copies: int, network_gb_s: float) -> float:
    """Of one update, where `fsdp_size` ranks of a machine hold a copy of the model: a ring adds the copies'
    float32 gradients, each rank's share of them over its own part of the network."""
    moved = 2 * (copies - 1) / copies * FLOAT32 * shape.parameters / fsdp_size
    return moved / (network_gb_s * GB)


def turns_seconds(state: Parts, assumed: Assumptions) -> float:
    """Of one step, in which the policy's state leaves its GPU for rollout, and comes back."""
    return 2 * total(state) / assumed.device_to_host_gb_s


def broadcast_seconds(shape: Shape, network_gb_s: float | None, assumed: Assumptions) -> float:
    """Bfloat16 weights gathered on rank 0, and sent from there to every replica at once; with `network_gb_s`
    of a GPU where they are on several machines."""
    gb = BFLOAT16 * shape.parameters / GB
    to_replicas = min(network_gb_s, assumed.broadcast_gb_s) if network_gb_s else assumed.peer_gb_s
    return gb / assumed.peer_gb_s + gb / to_replicas


def store_seconds(shape: Shape, tensor_parallel: int, crosses_nodes: bool, assumed: Assumptions) -> float:
    """Bfloat16 weights through the object store: copied from the GPU, written, brought to other machines, and
    copied to the GPU of every replica at once."""
    gb = BFLOAT16 * shape.parameters / GB
    speeds = [assumed.device_to_host_gb_s, assumed.store_gb_s, assumed.device_to_host_gb_s]
    if crosses_nodes:
        speeds.append(assumed.node_to_node_gb_s)
    if tensor_parallel > 1:  # vLLM pickles them to its own processes
        speeds += [assumed.pickle_gb_s, assumed.unpickle_gb_s]
    return sum(gb / speed for speed in speeds)
