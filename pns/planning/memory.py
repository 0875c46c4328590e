"""Memory of a process by part, in GB (10^9 bytes): a formula a line.

N weights, S ranks that hold a copy of them together; b bytes of an element that is computed with (bfloat16 2,
float32 4). On a CPU the formulas are those of the same process without a GPU, where `device` is host memory.
"""

from dataclasses import dataclass

from pns.config import Lora, PolicyConfig
from pns.planning.assumptions import Assumptions
from pns.planning.shapes import Shape
from workers.sizes import FORWARD_TOKENS, PIECE_LOGITS, VLLM_BATCHED_TOKENS, WEIGHTS_BUCKET_BYTES

GB = 1e9
FLOAT32 = 4
BFLOAT16 = 2

Parts = dict[str, float]  # what it is for -> GB


def total(parts: Parts) -> float:
    return sum(parts.values())


def largest(*moments: Parts) -> Parts:
    """The moment with the highest sum: memory of one moment is free for the next."""
    return max(moments, key=total)


# Policy


@dataclass(frozen=True)
class Training:
    """One model in the policy's processes."""

    shape: Shape
    ranks: int
    device: str  # "cpu" or "cuda"
    dtype_bytes: int  # b
    micro_batch_tokens: int
    checkpointing: bool
    reference: bool = False  # a second, frozen model beside it
    score_head: bool = False  # a reward model
    lora_rank: int = 0
    fsdp_size: int = 0  # ranks that hold a copy of the model together; 0: all
    offload: bool = False  # the state is in host memory

    @property
    def shards(self) -> int:
        return self.fsdp_size or self.ranks

    @property
    def dtype(self) -> str:
        """That is computed with."""
        return "bfloat16" if self.dtype_bytes == BFLOAT16 else "float32"

    @property
    def parameters(self) -> int:
        """N: without the language model's head where a score head stands for it."""
        return self.shape.body_parameters if self.score_head else self.shape.parameters

    @property
    def trained_parameters(self) -> int:
        return self.shape.lora_parameters(self.lora_rank) if self.lora_rank else self.parameters


def training_of(
    shape: Shape, ranks: int, device: str, settings: PolicyConfig, tokens: int, **options: bool
) -> Training:
    """`options`: reference, score_head. Reward models have no adapter."""
    lora: Lora = settings.lora
    dtype = settings.dtype.value
    computes_bfloat16 = dtype == "bfloat16" or (dtype == "auto" and device == "cuda")
    return Training(
        shape=shape,
        ranks=ranks,
        device=device,
        dtype_bytes=BFLOAT16 if computes_bfloat16 else FLOAT32,
        micro_batch_tokens=min(tokens, settings.max_tokens_per_micro_batch),
        checkpointing=settings.gradient_checkpointing,
        lora_rank=0 if options.get("score_head") else lora.rank,
        fsdp_size=settings.fsdp_size,
        offload=settings.offload and device == "cuda",
        **options,
    )


def policy_memory(of: Training, assumed: Assumptions) -> Parts:
    """At the peak: the backward pass of a micro-batch; without a GPU while a checkpoint is written. One is
    read into the tensors that are there."""
    fullest = training_memory(of)
    if of.device == "cuda":
        return fullest | {"context": assumed.context_gb}
    fullest |= written_on_the_host(of)
    return fullest | {"freed, kept by the allocator": assumed.cpu_heap * total(fullest)}


def training_memory(of: Training) -> Parts:
    """Of the backward pass, whose fullest moment is at the head or at the last layer."""
    state = {} if of.offload else state_and_gradients(of)
    return state | largest(head_backward(of), layer_backward(of))


def state_and_gradients(of: Training) -> Parts:
    """What is there from the second micro-batch on, over the ranks of a copy."""
    gradients = FLOAT32 * of.trained_parameters / of.shards / GB
    return training_state(of) | {"gradients (float32)": gradients}


def training_state(of: Training) -> Parts:
    """What is there from the first step on, over the ranks of a copy."""
    state = {
        "weights (float32)": FLOAT32 * of.parameters / of.shards / GB,
        "Adam (2 x float32)": 2 * FLOAT32 * of.trained_parameters / of.shards / GB,
    }
    if of.reference and not of.lora_rank:  # an adapter that is switched off is the reference
        # Held as it is computed with: nothing of it is trained.
        state[f"reference ({of.dtype})"] = of.dtype_bytes * of.parameters / of.shards / GB
    return state


def head_backward(of: Training) -> Parts:
    """The backward pass begins at the head: the activations of all layers are there."""
    if of.score_head:
        return kept_activations(of)
    head = of.shape.embedding_parameters  # vocabulary times hidden size
    gathered, sums = of.dtype_bytes * head, 0
    if not of.lora_rank:  # a gradient summed in float32, and each piece's or the last cast of it
        sums = FLOAT32 * head + (of.dtype_bytes * head if of.dtype_bytes < FLOAT32 else 0)
    piece = PIECE_LOGITS[of.device]
    logits = piece * (2 * FLOAT32 + (of.dtype_bytes if of.dtype_bytes < FLOAT32 else 0))
    rows = 2 * of.micro_batch_tokens * of.shape.hidden * of.dtype_bytes  # hidden states and their gradient
    parts = {"head: gradient": sums / GB, "head: pieces of logits": (logits + rows) / GB}
    parts["gathered weights"] = gathered / GB if of.device == "cuda" else unsharded_model(of)
    return kept_activations(of) | parts


def layer_backward(of: Training) -> Parts:
    """The backward pass of the last layer."""
    shape = of.shape
    # FSDP holds this layer's weights and the next one's, and in float32 what was reduced before: a head of
    # its own at first, then a layer. A tied head stays until the end, weights and gradient.
    layer, head = shape.layer_parameters, 0 if of.score_head else shape.embedding_parameters
    if of.device == "cuda":
        gathered = 2 * of.dtype_bytes * layer / GB
        if shape.tied and not of.score_head:
            gathered += of.dtype_bytes * head / GB
    else:
        gathered = unsharded_model(of)
    if of.lora_rank:
        reduced = 0.0
    elif shape.tied:
        reduced = of.dtype_bytes * head + FLOAT32 * layer
    else:
        reduced = FLOAT32 * max(head, layer)
    parts = {"gathered weights": gathered, "gradients under way": reduced / GB}
    # Beside what a layer keeps: the gradients of two of the feed-forward part's products.
    between = 2 * shape.intermediate * of.dtype_bytes * of.micro_batch_tokens
    if of.checkpointing:
        between += layer_activation_bytes(shape, of.dtype_bytes) * of.micro_batch_tokens
    return kept_activations(of) | parts | {"activations: one layer": between / GB}


def unsharded_model(of: Training) -> float:
    """On a CPU a rank gathers every weight once a step and keeps it, to save time."""
    return of.dtype_bytes * of.parameters / GB


def kept_activations(of: Training) -> Parts:
    """From the forward pass to the backward pass, of all layers: their inputs, or all that they compute."""
    shape = of.shape
    per_layer = (
        shape.hidden * of.dtype_bytes if of.checkpointing else layer_activation_bytes(shape, of.dtype_bytes)
    )
    name = "activations: inputs of layers" if of.checkpointing else "activations: all layers"
    return {name: shape.layers * per_layer * of.micro_batch_tokens / GB}


def layer_activation_bytes(shape: Shape, dtype_bytes: int) -> int:
    """What a layer keeps of one token for its backward pass, as transformers writes it without fusing.

    A norm: its input in float32, the normalised and the scaled one. Attention: queries, keys and values, its
    output twice (per row, and laid end to end). Feed-forward: gate, its activation, up, their product.
    """
    norms = 2 * shape.hidden * (FLOAT32 + 2 * dtype_bytes)
    attention = 3 * shape.query_width + 2 * shape.kv_width
    if shape.qk_norm:
        norms += (shape.query_width + shape.kv_width) * (FLOAT32 + dtype_bytes)
    feed_forward = 4 * shape.intermediate
    return norms + dtype_bytes * (attention + feed_forward)


def away_on_the_host(of: Training) -> Parts:
    """Of a rank whose GPU another role has: gradients are dropped. What is offloaded is there anyhow."""
    return {} if of.offload else {"models that are away": total(training_state(of))}


def written_on_the_host(of: Training) -> Parts:
    """A rank's copy of what it writes, while training goes on; reward models have no checkpoints."""
    return {} if of.score_head else {"checkpoint that is written": state_gb(of) / of.shards}


# Rollout


@dataclass(frozen=True)
class Cache:
    """What is left for keys and values on each GPU of a replica."""

    gb: float
    bytes_per_token: float

    def sequences(self, tokens: int) -> int:
        """How many of `tokens` fit at once."""
        return max(0, int(self.gb * GB // (self.bytes_per_token * tokens)))


def vllm_memory(
    shape: Shape, tensor_parallel: int, max_batch: int, fraction: float, gpu_gb: float, assumed: Assumptions
) -> tuple[Parts, Cache]:
    """Of one of a replica's GPUs: vLLM fills its share of the memory with cache; the sampler is not in it."""
    weights = 2 * shape.parameters / tensor_parallel / GB
    step = forward_gb(shape, VLLM_BATCHED_TOKENS, 2)
    logits = FLOAT32 * max_batch * shape.vocabulary / GB  # float32, of every sequence
    heads = max(1, shape.kv_heads / tensor_parallel)  # one is the least: then GPUs hold the same
    per_token = shape.kv_bytes() * heads / shape.kv_heads
    cache = Cache(fraction * gpu_gb - weights - step - logits, per_token)
    parts = {
        "weights (bfloat16)": weights,
        "one step": step + logits,
        "cache of keys and values": max(0.0, cache.gb),
        "sampler (noise)": sampler_gb(shape, max_batch),
        "CUDA graphs": assumed.graphs_gb,
        "context": assumed.context_gb,
    }
    return parts, cache


def asleep(is_vllm: bool, assumed: Assumptions) -> Parts:
    """What an engine keeps of a GPU that another role has; the policy keeps its context."""
    return {"context": assumed.context_gb} | ({"CUDA graphs": assumed.graphs_gb} if is_vllm else {})


def sampler_gb(shape: Shape, max_batch: int) -> float:
    """`perturb`: two float32 copies of the logits, and four int64 arrays for a block of 2^24 of them."""
    return (2 * FLOAT32 * max_batch * shape.vocabulary + 4 * 8 * 2**24) / GB


def transformers_memory(
    shape: Shape, max_batch: int, tokens: int, device: str, assumed: Assumptions
) -> tuple[Parts, Cache]:
    """Of the plain engine, whose cache has room for `tokens` of every sequence of a batch."""
    dtype_bytes = 2 if device == "cuda" else FLOAT32
    cache_gb = max_batch * tokens * shape.kv_bytes(dtype_bytes) / GB
    parts = {
        "weights": dtype_bytes * shape.parameters / GB,
        "cache of keys and values": cache_gb,
        "sampler (noise)": sampler_gb(shape, max_batch),
    }
    if device == "cuda":
        parts["context"] = assumed.context_gb
    return parts, Cache(cache_gb, shape.kv_bytes(dtype_bytes))


def vllm_cpu_memory(shape: Shape, max_batch: int, kv_cache_gib: float) -> tuple[Parts, Cache]:
    cache_gb = kv_cache_gib * 2**30 / GB
    parts = {
        "weights (float32)": FLOAT32 * shape.parameters / GB,
        "cache of keys and values": cache_gb,
        "sampler (noise)": sampler_gb(shape, max_batch),
    }
    return parts, Cache(cache_gb, shape.kv_bytes(FLOAT32))


# Reward models and judges


def forward_gb(shape: Shape, tokens: int, dtype_bytes: int) -> float:
    """The widest moment of a forward pass without gradients: a layer's feed-forward part (gate, up, their
    product) beside the residual, a norm in float32 and its result."""
    widest = dtype_bytes * (3 * shape.intermediate + 3 * shape.hidden) + 2 * FLOAT32 * shape.hidden
    return tokens * widest / GB


def scorer_memory(shape: Shape, judges: bool, batch_tokens: int, device: str, assumed: Assumptions) -> Parts:
    """A reward model (no head of a language model), or a judge with a cache for its four rounds."""
    dtype_bytes = 2 if device == "cuda" else FLOAT32
    tokens = batch_tokens or FORWARD_TOKENS[device]
    parts = {
        "weights": dtype_bytes * (shape.parameters if judges else shape.body_parameters) / GB,
        "activations": forward_gb(shape, tokens, dtype_bytes),
    }
    if judges:
        parts["cache of keys and values"] = tokens * shape.kv_bytes(dtype_bytes) / GB
    if device == "cuda":
        parts["context"] = assumed.context_gb
    return parts


# Host memory of processes with GPUs, at the two moments that take most


def policy_host(
    of: Training, rank: int, moment: str, assumed: Assumptions, broadcasts: bool = False
) -> Parts:
    """`moment` "load": rank 0 reads the whole model in float32; every rank does where the head is tied.
    "sync": rank 0 holds one bucket of the gathered weights, or a larger tensor; on its GPU where it
    `broadcasts` them."""
    model = FLOAT32 * of.parameters / GB
    parts = {"process": assumed.process_gb}
    if of.offload:
        parts["offloaded model"] = total(state_and_gradients(of))
    if moment == "load" and (rank == 0 or of.shape.tied):
        parts["whole model (float32)"] = model
    if moment == "sync" and rank == 0 and not broadcasts:
        embedding = BFLOAT16 * of.shape.embedding_parameters / GB
        parts["bucket of gathered weights"] = max(WEIGHTS_BUCKET_BYTES / GB, embedding)
    return parts


def rollout_host(shape: Shape, pickled_to: int, moment: str, assumed: Assumptions) -> Parts:
    """At a sync a replica reads the object store; with tensor parallelism that is pickled to the process of
    each of its GPUs, `pickled_to` of them."""
    parts = {"process": assumed.process_gb}
    if moment == "sync" and pickled_to > 1:
        parts["pickled weights"] = (1 + 2 * pickled_to) * BFLOAT16 * shape.parameters / GB
    return parts


def object_store_gb(shape: Shape) -> float:
    """Of each machine with the policy's first rank or a replica: the present weights."""
    return BFLOAT16 * shape.parameters / GB


# Disk


def state_gb(of: Training) -> float:
    """Of a checkpoint: the trained weights and both moments of Adam, float32, of one copy of the model."""
    return 3 * FLOAT32 * of.trained_parameters / GB


def export_gb(of: Training) -> float:
    """A model for others to read, in the dtype that is computed in."""
    return of.dtype_bytes * of.parameters / GB
