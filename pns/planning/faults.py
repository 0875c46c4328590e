"""What does not fit, and the way out, a line each."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from pns.config import STEP_SERVICES, EngineKind, Method, services
from pns.errors import UserError
from pns.planning import memory
from pns.planning.assumptions import Assumptions
from pns.planning.memory import Training, total
from pns.planning.nodes import Gpu, Process
from pns.planning.plan import Estimate, forward_tokens, longest_labelled, tensor_parallel
from pns.planning.work import BACKBONE, REWARD_MODEL
from workers.packing import Node
from workers.placement import check_placement, totals

_RAY_STORE_SHARE, _RAY_STORE_GB = 0.3, 200.0  # of a machine's memory, and the most of it: Ray's defaults


def faults(plan: Estimate) -> list[str]:
    """All of them; empty: the plan fits, as far as it is known."""
    found = [*length_faults(plan), *step_faults(plan), *cache_faults(plan)]
    if plan.cluster is None:
        found += machine_faults(plan)
    else:
        found += [*pool_faults(plan), *place_faults(plan), *gpu_faults(plan), *host_faults(plan)]
    return list(dict.fromkeys(found))


def length_faults(plan: Estimate) -> Iterator[str]:
    """The longest row has to fit into the model and into a micro-batch."""
    longest = plan.lengths.max_prompt + plan.lengths.max_completion
    backbone = plan.models[BACKBONE]
    sum_said = f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}"
    if backbone is not None and longest > backbone.shape.max_positions:
        yield f"{sum_said} tokens do not fit the backbone's {backbone.shape.max_positions}: lower them"
    limit = plan.config.policy.max_tokens_per_micro_batch
    if plan.training and longest > limit:
        way_out = f"set policy.max_tokens_per_micro_batch={_power_of_two(longest)}"
        yield f"{sum_said} tokens do not fit policy.max_tokens_per_micro_batch = {limit}: {way_out}"


def step_faults(plan: Estimate) -> Iterator[str]:
    """The longest prompt and completion fit what labels their steps."""
    assumed = plan.cluster.assumptions if plan.cluster else Assumptions()
    for role in STEP_SERVICES:
        found = plan.models.get(role)
        if found is None or (tokens := longest_labelled(plan, role, assumed)) <= found.shape.max_positions:
            continue
        other = next(name for name in STEP_SERVICES if name != role).removeprefix("step_")
        yield (
            f"{role}: a prompt and completion of the longest are {tokens} tokens to it, and {found.name} has "
            f"{found.shape.max_positions} positions (what is longer gets no labels): lower "
            f"rollout.max_new_tokens, name a model with more, or ask the other alone (bcpg.rule={other})"
        )


def cache_faults(plan: Estimate) -> Iterator[str]:
    """Weights and cache of a vLLM replica fit into its share."""
    settings, b = plan.config.rollout, plan.bundle("rollout")
    if b is None or settings.engine is not EngineKind.vllm:
        return
    longest = plan.lengths.max_prompt + plan.lengths.max_completion
    for model, cache in plan.caches.items():
        found = plan.models[model]
        if found is None or cache.sequences(longest) >= 1:
            continue
        if plan.device == "cpu":
            gib = math.ceil(10 * cache.bytes_per_token * longest / 2**30) / 10
            yield f"rollout: the cache holds no {longest} tokens: set rollout.kv_cache_gib={gib:g}"
            continue
        budget = settings.memory_fraction * plan.rollout_gpu_gb
        weights = 2 * found.shape.parameters / memory.GB
        more = [n for n in (2, 4, 8) if n > tensor_parallel(b) and weights / n < 0.8 * budget]
        way_out = f"set {b.key}.gpus={more[0]}" if more else "take GPUs with more memory"
        yield (
            f"rollout: {weights:.0f} GB of weights and one sequence of {longest} tokens do not fit "
            f"{tensor_parallel(b)} x {budget:.0f} GB (rollout.memory_fraction): {way_out}"
        )


def pool_faults(plan: Estimate) -> Iterator[str]:
    """What GPUs of a process are used for."""
    for b in plan.placed:
        found = plan.models[BACKBONE if b.role in ("rollout", "policy") else b.role]
        if b.role == "rollout" and found is not None and found.shape.heads % tensor_parallel(b):
            yield f"{b.key}.gpus: {b.amounts['GPU']:g} must divide the model's {found.shape.heads} heads"


def place_faults(plan: Estimate) -> Iterator[str]:
    """What a run would be refused for; or processes that no single machine has room for, by role."""
    used = [b.role for b in plan.placed]
    # Custom resources and labels are not in a cluster file.
    unknown = dict.fromkeys(totals(plan.config, used, plan.device), math.inf)
    nodes = [
        Node(node.name, unknown | {"GPU": len(node.gpus), "CPU": node.type.cpus or math.inf})
        for node in plan.nodes
    ]
    try:
        check_placement(plan.config, used, nodes, plan.device)
    except UserError as error:
        yield str(error)
        return
    for role, num in Counter(process.role for process in plan.unplaced).items():
        b = plan.bundle(role)
        assert b is not None
        gpus, cpus = b.amounts["GPU"], b.amounts["CPU"]
        asked = f"{gpus:g} GPUs on one machine" if gpus > 1 else f"{gpus:g} GPU"
        free = sum(gpu.free for node in plan.nodes for gpu in node.gpus)
        way_out = f"lower {b.key}.gpus or {b.key}.replicas, or take larger machines"
        yield (
            f"{role}: {num} of {b.replicas} processes of {asked} and {cpus:g} CPU have no place "
            f"({free:g} GPUs are free): {way_out}"
        )


def gpu_faults(plan: Estimate) -> Iterator[str]:
    """GPUs whose processes need more memory than there is."""
    for node in plan.nodes:
        for gpu in node.gpus:
            if gpu.used_gb <= gpu.kind.memory_gb:
                continue
            residents = [process for process in gpu.residents if process.gpu_gb]
            worst = max(residents, key=lambda process: process.gpu_gb)
            if plan.config.placement.colocate and worst.role == "policy":
                fuller = max(("policy", "rollout"), key=plan.peak)
                worst = replace(worst, role=fuller)
            if worst.role == "rollout" and any(cache_faults(plan)):
                continue  # said there, with a better way out
            together = " + ".join(f"{p.role} {p.gpu_gb:.0f}" for p in residents)
            said = f"{gpu.kind.name} with {gpu.kind.memory_gb:g} GB"
            if len(residents) > 1:
                way_out = f"give {worst.role} a GPU of its own ({plan_key(plan, worst.role)}.gpus=1)"
                yield f"{together} GB do not fit one {said}: {way_out}"
            else:
                what = f"{worst.role}: {worst.gpu_gb:.0f} GB do not fit one {said}"
                yield f"{what}: {way_out_of(plan, worst, gpu)}"


def plan_key(plan: Estimate, role: str) -> str:
    b = plan.bundle(role)
    return b.key if b else role


def way_out_of(plan: Estimate, process: Process, gpu: Gpu) -> str:
    """The nearest change of the configuration with which the process fits its GPU."""
    assumed = plan.cluster.assumptions if plan.cluster else Assumptions()
    if process.role == "policy":
        asleep_gb = plan.asleep_gb(assumed) if plan.config.placement.colocate else 0.0
        return policy_way_out(plan, gpu.kind.memory_gb - asleep_gb, assumed)
    if process.role == "rollout":
        settings = plan.config.rollout
        over = (process.gpu_gb - gpu.kind.memory_gb) / gpu.kind.memory_gb
        fraction = math.floor(20 * (settings.memory_fraction - over)) / 20  # in steps of 0.05
        return f"set rollout.memory_fraction={max(0.05, fraction):g}"
    service, found = services(plan.config)[process.role], plan.models[process.role]
    assert found is not None  # its memory is known
    key, judges = service.key, service.judges
    fewest, tokens = 2048, forward_tokens(plan, process.role, assumed)
    if process.role in STEP_SERVICES:  # a completion is read whole
        fewest = max(fewest, longest_labelled(plan, process.role, assumed))
    while tokens > fewest:
        tokens = max(fewest, tokens // 2)
        parts = memory.scorer_memory(found.shape, judges, tokens, "cuda", assumed)
        if total(parts) <= gpu.kind.memory_gb:
            return f"set {key}.pool.batch_tokens={tokens}"
    endpoint = f", or serve it elsewhere ({key}.endpoint.url)" if judges else ""
    return (
        f"its weights alone are {2 * found.shape.parameters / memory.GB:.0f} GB, and a process uses one GPU: "
        + (f"name a smaller model, take larger GPUs{endpoint}")
    )


def policy_way_out(plan: Estimate, gpu_gb: float, assumed: Assumptions) -> str:
    """A single key, the cheapest first; else ranks, of which every stage needs the same number."""
    longest = plan.lengths.max_prompt + plan.lengths.max_completion
    tokens = max(own.micro_batch_tokens for own in plan.training.values())

    def fits(**changes: object) -> bool:
        changed = [replace(own, **changes) for own in plan.training.values()]  # type: ignore[arg-type]
        return all(total(memory.policy_memory(own, assumed)) <= gpu_gb for own in changed)

    if fits(checkpointing=True):
        return "set policy.gradient_checkpointing=true"
    halves = [tokens // 2**i for i in range(1, 10) if tokens // 2**i >= longest]
    for fewer in halves:
        if fits(micro_batch_tokens=fewer, checkpointing=True):
            return f"set policy.max_tokens_per_micro_batch={fewer}"
    if plan.config.policy.fsdp_size and fits(fsdp_size=0, checkpointing=True):
        return "set policy.fsdp_size=0"
    ranks = next(iter(plan.training.values())).ranks
    trained = [own for own in plan.training.values() if not own.score_head]
    fits_adapted = all(total(memory.policy_memory(_adapted(own), assumed)) <= gpu_gb for own in trained)
    for more in (2, 4, 8, 16, 32, 64, 128):
        if more > ranks and fits(ranks=more, checkpointing=True):
            or_adapter = ", or policy.lora.rank=32" if fits_adapted else ""
            return f"set placement.policy.replicas={more}{or_adapter}"
    if fits_adapted:
        return "set policy.lora.rank=32"
    if fits(offload=True, checkpointing=True):
        return "set policy.offload=true"
    return "name a smaller backbone or take larger GPUs"


def _adapted(own: Training) -> Training:
    return replace(own, lora_rank=32, checkpointing=True)


def host_faults(plan: Estimate) -> Iterator[str]:
    """Host memory of a machine, and its part for Ray's objects, where it is known how much it has."""
    for node in plan.nodes:
        known, parts = node.type.memory_gb, plan.host.get(node.name, {})
        if not known:
            continue
        if total(parts) > known:
            largest = max(parts, key=lambda name: parts[name])
            need = f"{total(parts):.0f} GB of host memory (most: {largest} {parts[largest]:.0f})"
            yield f"{node.name}: {need} do not fit {known:g}: take machines with more, or spread the roles"
        store = plan.stores.get(node.name, 0.0)
        limit = min(_RAY_STORE_SHARE * known, _RAY_STORE_GB)
        if store > limit:
            way_out = f"start Ray there with --object-store-memory={store * 1e9:.0f}"
            fault = f"{store:.0f} GB of weights do not fit Ray's store of {limit:.0f} GB"
            yield f"{node.name}: {fault}: {way_out}"


def machine_faults(plan: Estimate) -> Iterator[str]:
    """All processes and their models, on this machine without a GPU."""
    parts = plan.host["this machine"]
    if total(parts) > plan.machine_gb:
        largest = max(parts, key=lambda name: parts[name])
        need = f"{total(parts):.0f} GB of memory (most: {largest} {parts[largest]:.0f})"
        yield f"{need} do not fit this machine's {plan.machine_gb:.0f}: plan for GPUs with --gpu H100"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def remarks(plan: Estimate) -> list[str]:
    """What is worth knowing and no fault."""
    said = list(plan.notes)
    if plan.config.method is Method.bcpg:
        assumed = plan.cluster.assumptions if plan.cluster else Assumptions()
        share = f"{assumed.wrong_share:.0%} of the samples are taken to be wrong (wrong_share)"
        said.append(
            f"{share}; what arms have in common in the first round stands with the first that needs it"
        )
    kinds = {gpu.kind.name for node in plan.nodes for gpu in node.gpus}
    if len(kinds) > 1:
        said.append("Ray does not look at GPU memory: with several kinds of GPU it may choose the smaller")
    if plan.times and plan.cluster:
        said.append(
            "times are estimates from published peaks (--assumptions), without start-up and compiling; every "
            "completion is taken to be scored"
        )
    for name, own in (("rl", plan.config.rl), ("reverse_rl", plan.config.reverse_rl)):
        if own.dynamic_sampling and any(stage.startswith(name) for stage in plan.stages):
            said.append(f"{name}.dynamic_sampling may draw {own.dynamic_sampling} times more: not counted")
    growing = [b.role for b in plan.placed if b.most > b.replicas]
    if growing:
        said.append(f"{', '.join(growing)}: placed and timed with the replicas at the start")
    if plan.config.policy.lora.rank and REWARD_MODEL in plan.models:
        said.append("reward models are trained in full, without the adapter")
    return said
