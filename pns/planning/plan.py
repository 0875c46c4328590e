"""A plan: roles with their memory, machines, stages with their time, and what does not fit.

`make_estimate` puts together what the other files compute; it starts, reads and fetches nothing but small
local files.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pns.config import STEP_SERVICES, Config, DataSource, EngineKind, services
from pns.planning import memory, speed, work
from pns.planning.assumptions import Assumptions
from pns.planning.hardware import ClusterFile, GpuKind
from pns.planning.memory import GB, Cache, Parts, Training, total
from pns.planning.nodes import Machine, Process, homes, kinds_of, lay_inside, nodes_of, place
from pns.planning.shapes import KnownModel, find_model
from pns.planning.work import Lengths, Phase, StageWork, Updates
from workers.packing import Bundles, counted
from workers.placement import broadcasts_weights, bundles
from workers.sizes import FORWARD_TOKENS, VLLM_JUDGE_BATCH, VLLM_JUDGE_SHARE

OBJECT_STORE = "object store (weights)"  # a part of a machine's memory


@dataclass(frozen=True)
class RoleMemory:
    """Of one GPU of a role (on a CPU: of one process) in some stages."""

    role: str
    stages: tuple[str, ...]
    parts: Parts
    note: str = ""

    @property
    def gb(self) -> float:
        return total(self.parts)


@dataclass(frozen=True)
class StageTime:
    """One phase of a stage; `seconds` by part for one time, None where they cannot be told."""

    stage: str
    phase: str
    times: int
    sampled_tokens: int
    trained_tokens: int
    scored: int
    seconds: Mapping[str, float] | None = None
    overlaps: bool = False

    @property
    def once(self) -> float | None:
        """Sampling, verdicts and scores go on at once; training after them, or beside those of the next time;
        and then the sync."""
        if self.seconds is None:
            return None
        after = ("other log-probs", "update", "turns")
        together = [value for name, value in self.seconds.items() if name not in (*after, "sync")]
        sampling, training = max(together, default=0.0), sum(self.seconds.get(name, 0.0) for name in after)
        both = max(sampling, training) if self.overlaps else sampling + training
        return both + self.seconds.get("sync", 0.0)

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda name: (self.seconds or {})[name]) if self.seconds else ""


@dataclass
class Estimate:
    """Everything that `pns plan` says."""

    config: Config
    device: str
    cluster: ClusterFile | None  # None: this machine's CPU
    stated: bool  # the cluster file was given
    lengths: Lengths
    models: dict[str, KnownModel | None]
    stages: dict[str, StageWork]
    placed: list[Bundles]
    memory: list[RoleMemory] = field(default_factory=list)
    rollout_gpu_gb: float = 0.0  # of the GPUs that rollout is on
    caches: dict[str, Cache] = field(default_factory=dict)
    training: dict[str, Training] = field(default_factory=dict)
    nodes: list[Machine] = field(default_factory=list)
    unplaced: list[Process] = field(default_factory=list)
    host: dict[str, Parts] = field(default_factory=dict)  # node -> host memory at its fullest moment
    stores: Parts = field(default_factory=dict)  # node -> what lies in Ray's object store at a sync
    machine_gb: float = 0.0  # of this machine
    times: list[StageTime] = field(default_factory=list)
    disk: Parts = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def gpu_of(self, role: str) -> GpuKind | None:
        """The GPU that a role's speed is told for: the slowest that it is on; None on a CPU."""
        return min(kinds_of(self.nodes, role), key=lambda kind: kind.tflops, default=None)

    @property
    def broadcasts(self) -> bool:
        """New weights come to rollout from process to process, not through Ray's object store."""
        placement = self.config.placement
        return broadcasts_weights(
            placement.rollout, self.config.rollout, self.device, bool(placement.colocate)
        )

    @property
    def num_gpus(self) -> float:
        return sum(b.replicas * b.amounts["GPU"] for b in counted(self.placed))

    def bundle(self, role: str) -> Bundles | None:
        return next((b for b in self.placed if b.role == role), None)

    def peak(self, role: str) -> float:
        """GB of the fullest stage of a role."""
        return max((own.gb for own in self.memory if own.role == role), default=0.0)

    def gpu_gb(self, role: str, assumed: Assumptions) -> float:
        """GB that a process of a role takes of its GPU; of the policy, with what takes turns with it."""
        rollout = self.bundle("rollout")
        if role != "policy" or rollout is None or rollout.inside != role:
            return self.peak(role)
        return max(self.peak("policy") + self.asleep_gb(assumed), self.peak("rollout") + assumed.context_gb)

    def asleep_gb(self, assumed: Assumptions) -> float:
        return total(memory.asleep(self.config.rollout.engine is EngineKind.vllm, assumed))

    def seconds(self, stage: str) -> float | None:
        """Of the whole stage."""
        own = [time for time in self.times if time.stage == stage]
        if any(time.once is None for time in own):
            return None
        return sum(time.times * (time.once or 0.0) for time in own)

    def bound(self, stage: str) -> str:
        """The part of the stage that takes longest over all its phases."""
        sums: dict[str, float] = {}
        for time in self.times:
            if time.stage == stage and time.seconds:
                for name, value in time.seconds.items():
                    sums[name] = sums.get(name, 0.0) + time.times * value
        return max(sums, key=lambda name: sums[name]) if sums else ""


def make_estimate(
    config: Config,
    cluster: ClusterFile | None,
    stated: bool,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
) -> Estimate:
    """The plan of a checked configuration on `cluster` (None: on this machine's CPU)."""
    assumed = cluster.assumptions if cluster else Assumptions()
    device = "cuda" if cluster else "cpu"
    stages = work.work_of(config, assumed)
    used = list(dict.fromkeys(role for own in stages.values() for role in own.roles))
    at_endpoints = {name for name, service in services(config).items() if service.url}
    placed = bundles(config, used, device)
    names = work.model_names(config)
    plan = Estimate(
        config=config,
        device=device,
        cluster=cluster,
        stated=stated,
        lengths=work.lengths_of(config, assumed, prompt_tokens, completion_tokens),
        models={model: find_model(name) for model, name in names.items() if model not in at_endpoints},
        stages=stages,
        placed=placed,
        nodes=nodes_of(cluster) if cluster else [],
    )
    for name in dict.fromkeys(names[model] for model, found in plan.models.items() if found is None):
        way_out = "give a directory with its config.json, or download it"
        plan.notes.append(f"{name}: its shape is not known here ({way_out}): what depends on it is left out")
    add_memory(plan, vllm_gpu_gb(plan, assumed), assumed)
    processes = [
        Process(b.role, rank, b.amounts["GPU"], b.amounts["CPU"], plan.gpu_gb(b.role, assumed), b.together)
        for b in counted(placed)
        for rank in range(b.replicas)
    ]
    plan.unplaced = place(processes, plan.nodes) if cluster else []
    for b in placed:
        if b.inside:
            lay_inside(plan.nodes, b.role, tensor_parallel(b))
    if hosts := kinds_of(plan.nodes, "rollout"):  # vLLM takes its share of the GPUs that it is on
        plan.memory.clear()
        add_memory(plan, hosts[0].memory_gb, assumed)
        for process in processes:
            process.gpu_gb = plan.gpu_gb(process.role, assumed)
    add_host(plan, assumed)
    add_times(plan, assumed)
    add_disk(plan, assumed)
    return plan


# Memory


def vllm_gpu_gb(plan: Estimate, assumed: Assumptions) -> float:
    """GB of the smallest kind of GPU whose share holds a replica and one sequence, or of the largest: what is
    planned for before it is known where the replicas are."""
    longest = plan.lengths.max_prompt + plan.lengths.max_completion
    kinds = sorted({gpu.kind.memory_gb for node in plan.nodes for gpu in node.gpus})
    shapes = [found for model in sampling_stages(plan) if (found := plan.models[model]) is not None]
    for gb in kinds:
        caches = [rollout_memory(plan, found, gb, assumed)[1] for found in shapes]
        if all(cache.sequences(longest) for cache in caches):
            return gb
    return kinds[-1] if kinds else 0.0


def add_memory(plan: Estimate, gpu_gb: float, assumed: Assumptions) -> None:
    """Of every role in every stage, stages with the same parts together; `gpu_gb` is of rollout's GPUs."""
    plan.rollout_gpu_gb = gpu_gb
    for stage, own in plan.stages.items():
        for phase in own.phases:
            if phase.updates is not None and (training := trained_model(plan, phase.updates)):
                name = stage if phase.name == "step" else f"{stage}: {phase.name}"
                plan.training[name] = training
                add(plan, "policy", name, memory.policy_memory(training, assumed))
    for model, stages in sampling_stages(plan).items():
        found = plan.models.get(model)
        if found is not None:
            parts, cache = rollout_memory(plan, found, gpu_gb, assumed)
            plan.caches[model] = cache
            longest = plan.lengths.max_prompt + plan.lengths.max_completion
            note = f"cache: {cache.sequences(longest)} sequences of {longest} tokens at once"
            for stage in stages:
                add(plan, "rollout", stage, parts, note)
    for b in plan.placed:
        if b.role in ("rollout", "policy"):
            continue
        if (found := plan.models[b.role]) is not None:
            parts = service_memory(plan, b, found, gpu_gb, assumed)
            for stage, own in plan.stages.items():
                if b.role in own.roles:
                    add(plan, b.role, stage, parts)


def service_memory(
    plan: Estimate, b: Bundles, found: KnownModel, gpu_gb: float, assumed: Assumptions
) -> Parts:
    service = services(plan.config)[b.role]
    if service.pool.engine is EngineKind.vllm and plan.device == "cuda":
        fraction = VLLM_JUDGE_SHARE * min(1.0, service.pool.gpus)
        parts, _ = memory.vllm_memory(
            found.shape, tensor_parallel(b), VLLM_JUDGE_BATCH, fraction, gpu_gb, assumed
        )
        return {name: gb for name, gb in parts.items() if name != "sampler (noise)"}
    tokens = forward_tokens(plan, b.role, assumed)
    return memory.scorer_memory(found.shape, service.judges, tokens, plan.device, assumed)


def forward_tokens(plan: Estimate, role: str, assumed: Assumptions) -> int:
    """Tokens of a service's forward pass, at most. A completion whose steps are labelled is read whole."""
    tokens = services(plan.config)[role].pool.batch_tokens or FORWARD_TOKENS[plan.device]
    return max(tokens, longest_labelled(plan, role, assumed)) if role in STEP_SERVICES else tokens


def longest_labelled(plan: Estimate, role: str, assumed: Assumptions) -> int:
    """Tokens that `role`, one of STEP_SERVICES, reads of the longest prompt and completion."""
    own = plan.lengths
    text = own.max_prompt + own.max_completion
    num_steps = math.ceil(work.steps_of(plan.config, own.max_completion, assumed))
    if role == "process_reward":
        return text + num_steps  # separators
    beside = assumed.step_line_tokens + assumed.step_grade_tokens
    is_tiny = plan.config.data.source is DataSource.tiny  # its judge reads no instructions
    return text + (0 if is_tiny else assumed.step_judge_prompt_tokens) + num_steps * beside


def add(plan: Estimate, role: str, stage: str, parts: Parts, note: str = "") -> None:
    for index, own in enumerate(plan.memory):
        if own.role == role and own.parts == parts:
            plan.memory[index] = replace(own, stages=(*own.stages, stage))
            return
    plan.memory.append(RoleMemory(role, (stage,), parts, note))


def sampling_stages(plan: Estimate) -> dict[str, list[str]]:
    """Model -> the stages that sample from it."""
    stages: dict[str, list[str]] = {}
    for stage, own in plan.stages.items():
        for model in dict.fromkeys(phase.sampling.model for phase in own.phases if phase.sampling):
            stages.setdefault(model, []).append(stage)
    return stages


def trained_model(plan: Estimate, updates: Updates) -> Training | None:
    """The model that `updates` train in the policy's processes; None where they train none, or one of a shape
    that is not known."""
    b, found = plan.bundle("policy"), plan.models[updates.model]
    if found is None or b is None or not updates.updates:
        return None
    # A rank's share of the rows, every one as long as may be.
    longest = plan.lengths.max_prompt + plan.lengths.max_completion
    tokens = max(updates.together, math.ceil(updates.rows / b.replicas)) * longest
    return memory.training_of(
        found.shape,
        b.replicas,
        plan.device,
        plan.config.policy,
        tokens,
        reference=updates.has_reference,
        score_head=updates.score_head,
    )


def rollout_memory(
    plan: Estimate, found: KnownModel, gpu_gb: float, assumed: Assumptions
) -> tuple[Parts, Cache]:
    settings, b = plan.config.rollout, plan.bundle("rollout")
    assert b is not None  # a stage samples
    if settings.engine is EngineKind.transformers:
        tokens = plan.lengths.max_prompt + plan.lengths.max_completion
        return memory.transformers_memory(found.shape, settings.max_batch, tokens, plan.device, assumed)
    if plan.device == "cpu":
        return memory.vllm_cpu_memory(found.shape, settings.max_batch, settings.kv_cache_gib)
    return memory.vllm_memory(
        found.shape, tensor_parallel(b), settings.max_batch, settings.memory_fraction, gpu_gb, assumed
    )


def tensor_parallel(b: Bundles) -> int:
    return max(1, int(b.amounts["GPU"]))


# Host memory and disk


def add_host(plan: Estimate, assumed: Assumptions) -> None:
    """Of every node at the fuller of two moments; on a CPU the sum of all processes and their models."""
    if plan.cluster is None:
        parts = {
            f"{b.role} x {b.replicas}": b.replicas * (plan.peak(b.role) + assumed.cpu_process_gb)
            for b in plan.placed
        }
        plan.host["this machine"] = parts | {"driver and Ray": 2 * assumed.cpu_process_gb}
        plan.machine_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
        return
    for node in plan.nodes:
        load, sync = (host_memory(plan, node, moment, assumed) for moment in ("load", "sync"))
        plan.host[node.name] = memory.largest(load, sync)
        plan.stores[node.name] = sync.get(OBJECT_STORE, 0.0)


def host_memory(plan: Estimate, node: Machine, moment: str, assumed: Assumptions) -> Parts:
    """Its processes together, by role, at "load" or "sync"."""
    parts: Parts = {}
    trained = max(plan.training.values(), key=lambda training: training.parameters, default=None)
    shape = trained.shape if trained is not None and not trained.score_head else None
    for process in node.processes:
        own: Parts = {"process": assumed.process_gb}
        if process.role == "policy" and trained is not None:
            own = memory.policy_host(trained, process.rank, moment, assumed, plan.broadcasts)
            if moment == "sync":
                own |= memory.written_on_the_host(trained)
                if plan.config.placement.colocate:
                    own |= memory.away_on_the_host(trained)
        elif process.role == "rollout" and shape is not None:
            pickled_to = 0 if plan.broadcasts else math.ceil(process.gpus)
            own = memory.rollout_host(shape, pickled_to, moment, assumed)
        elif moment == "load" and (found := plan.models.get(process.role)):
            own["weights on their way"] = 2 * found.shape.parameters / GB
        parts[process.role] = parts.get(process.role, 0.0) + total(own)
    if node is plan.nodes[0]:  # wherever the driver is started
        verifiers = plan.config.placement.verifier_processes
        parts["driver"] = assumed.driver_gb + verifiers * assumed.verifier_gb
    here = any(p.role == "rollout" or (p.role == "policy" and p.rank == 0) for p in node.processes)
    if moment == "sync" and shape is not None and here and not plan.broadcasts:
        parts[OBJECT_STORE] = memory.object_store_gb(shape)
    return parts


def add_disk(plan: Estimate, assumed: Assumptions) -> None:
    """Of the run directory, at most: two checkpoints and one that is being written, of one stage at a time;
    exports and rollouts of all."""
    if plan.training:
        plan.disk["3 checkpoints of a stage"] = 3 * max(map(memory.state_gb, plan.training.values()))
        exports = []
        for name, own in plan.training.items():
            num = 2 if name == "reward_model" else 1  # the main and the held-out one
            if name.endswith(": refreshing"):
                num = (plan.config.reverse_rl.steps - 1) // plan.config.reverse_rl.refresh_every
            exports.append(num * memory.export_gb(own))
        plan.disk["exported models"] = sum(exports)
    tokens = sum(time.times * time.sampled_tokens for time in plan.times if time.stage != "evaluate")
    plan.disk["rollouts.jsonl"] = tokens * assumed.rollout_bytes / GB


# Time


def add_times(plan: Estimate, assumed: Assumptions) -> None:
    for stage, own in plan.stages.items():
        for phase in own.phases:
            plan.times.append(time_of(plan, stage, phase, assumed))


def time_of(plan: Estimate, stage: str, phase: Phase, assumed: Assumptions) -> StageTime:
    lengths, sampled, held = plan.lengths, 0, 0
    if phase.sampling is not None:
        sampled = round(phase.sampling.completions * mean_completion(plan, phase))
    if phase.updates is not None:
        held = work.held_tokens(phase.updates, lengths, plan.config.policy.layout)
    parts = seconds_by_part(plan, phase, assumed) if plan.device == "cuda" else None
    scored = sum(phase.scored.values())
    return StageTime(stage, phase.name, phase.times, sampled, held, scored, parts, phase.overlaps)


def mean_completion(plan: Estimate, phase: Phase) -> float:
    """Where a suite has a limit of its own, the mean follows it."""
    assert phase.sampling is not None
    return plan.lengths.completion * phase.sampling.max_new_tokens / plan.lengths.max_completion


def seconds_by_part(plan: Estimate, phase: Phase, assumed: Assumptions) -> dict[str, float] | None:
    """None where a model of the phase has no known shape, or a role of it no place."""
    needed = [phase.sampling.model] if phase.sampling else []
    needed += [phase.updates.model] if phase.updates else []
    needed += [term for term in phase.scored if term in plan.models]
    if any(plan.models[model] is None for model in needed):
        return None
    roles = [
        ("rollout", phase.sampling),
        ("policy", phase.updates),
        *((term, plan.bundle(term)) for term in phase.scored),
    ]
    if any(plan.gpu_of(role) is None for role, is_used in roles if is_used is not None):
        return None
    return (
        sampling_seconds(plan, phase, assumed)
        | term_seconds(plan, phase, assumed)
        | policy_seconds(plan, phase, assumed)
    )


def sampling_seconds(plan: Estimate, phase: Phase, assumed: Assumptions) -> dict[str, float]:
    sampling, b, gpu = phase.sampling, plan.bundle("rollout"), plan.gpu_of("rollout")
    if sampling is None or b is None or gpu is None or not sampling.completions:
        return {}
    found = plan.models[sampling.model]
    assert found is not None  # `seconds_by_part` has looked
    cache = plan.caches[sampling.model]
    replica = speed.RolloutReplica(found.shape, tensor_parallel(b), plan.config.rollout.max_batch, cache, gpu)
    mean = mean_completion(plan, phase)
    verdicts = assumed.verdicts_per_second * plan.config.placement.verifier_processes
    return {
        "rollout": replica.seconds(sampling, plan.lengths, mean, b.replicas, assumed),
        "verifier": sampling.completions / verdicts,
    }


def term_seconds(plan: Estimate, phase: Phase, assumed: Assumptions) -> dict[str, float]:
    parts = {}
    for name, completions in phase.scored.items():
        b, found, gpu = plan.bundle(name), plan.models.get(name), plan.gpu_of(name)
        if b is not None and found is not None and gpu is not None:
            judges, shape = services(plan.config)[name].judges, found.shape
            told = completions, plan.lengths, b.replicas * tensor_parallel(b), gpu, assumed
            parts[name] = speed.scoring_seconds(shape, judges, *told)
            if judges and name in STEP_SERVICES:
                num_steps = work.steps_of(plan.config, plan.lengths.completion, assumed)
                parts[name] += speed.grading_seconds(
                    shape, num_steps, forward_tokens(plan, name, assumed), *told
                )
    return parts


def policy_seconds(plan: Estimate, phase: Phase, assumed: Assumptions) -> dict[str, float]:
    updates, b, gpu = phase.updates, plan.bundle("policy"), plan.gpu_of("policy")
    if updates is None or b is None or gpu is None:
        return {}
    found = plan.models[updates.model]
    assert found is not None  # `seconds_by_part` has looked
    shape, policy = found.shape, plan.config.policy
    held = work.held_tokens(updates, plan.lengths, policy.layout)
    in_head = 0 if updates.score_head else updates.rows * plan.lengths.completion
    context = plan.lengths.prompt + plan.lengths.completion
    per_rank = held / b.replicas / policy.max_tokens_per_micro_batch
    num_micro_batches = max(1.0, per_rank)
    on_nodes = homes(plan.nodes, "policy")
    speeds = [node.type.network_gb_s for node in plan.nodes if node.name in on_nodes]
    network = min(speeds) if len(on_nodes) > 1 else None
    gathering = None if policy.fsdp_size else network  # a copy of the model lies on one machine
    parts = {}
    if updates.forwards:
        flops = updates.forwards * speed.forward_flops(shape, held, in_head, context)
        batches = updates.forwards * num_micro_batches
        parts["other log-probs"] = speed.update_seconds(
            shape, flops, b.replicas, batches, 1, gpu, gathering, assumed
        )
    if updates.updates:
        lora = policy.lora.rank > 0 and not updates.score_head
        own = speed.training_flops(shape, held, in_head, context, policy.gradient_checkpointing, lora)
        passes = 2 + policy.gradient_checkpointing
        batches = updates.updates * num_micro_batches
        parts["update"] = speed.update_seconds(
            shape, updates.updates * own, b.replicas, batches, passes, gpu, gathering, assumed
        )
        if policy.fsdp_size and network is not None:
            copies = b.replicas // policy.fsdp_size
            exchange = speed.exchange_seconds(shape, policy.fsdp_size, copies, network)
            parts["update"] += updates.updates * exchange
    if policy.offload:
        forwards = updates.forwards * num_micro_batches
        parts["offload"] = speed.offload_seconds(shape, b.replicas, forwards, 1, 0, assumed)
        if updates.updates:
            parts["offload"] += speed.offload_seconds(
                shape, b.replicas, batches, passes, updates.updates, assumed
            )
    rollout = plan.bundle("rollout")
    training = trained_model(plan, updates)
    takes_turns = phase.sampling and rollout is not None and rollout.inside
    if takes_turns and training is not None and not policy.offload:
        parts["turns"] = speed.turns_seconds(memory.training_state(training), assumed)
    if phase.syncs and rollout is not None:
        apart = homes(plan.nodes, "rollout") - homes(plan.nodes, "policy")
        if plan.broadcasts:
            both = homes(plan.nodes, "rollout") | on_nodes
            slowest = min(node.type.network_gb_s for node in plan.nodes if node.name in both)
            parts["sync"] = speed.broadcast_seconds(shape, slowest if len(both) > 1 else None, assumed)
        else:
            parts["sync"] = speed.store_seconds(shape, tensor_parallel(rollout), bool(apart), assumed)
    return parts
