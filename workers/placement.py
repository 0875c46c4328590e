"""From the configuration to what its roles ask of a cluster: pure arithmetic, no Ray.

A role is "rollout", "policy", "verifier" or a service (`pns.config.services`); only roles that are used
count. On CPU no role takes a GPU; the verifier's processes, and the threads that ask an endpoint, belong to
the driver and take nothing that Ray counts.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pns.config import Config, Device, EngineKind, Pool, RolloutEngine, ServicePool, WeightTransport, services
from pns.errors import UserError
from workers.packing import Bundles, Misfit, Node, counted, first_misfit, has_labels, needed_together
from workers.runtime import process_environment

FIXED_ROLES = ("rollout", "policy", "verifier")
_COUNTED = ("GPU", "CPU")  # by Ray itself; other resources have names of their own
# Logical CPUs of a local Ray, for short tasks of the driver and for replicas that `pns scale` adds: numbers
# alone, Ray starts no process for one.
_SPARE_CPUS = 40
_SPARE_SHARES = 32  # of each custom resource of a pool: as many replicas more


class NoRoomError(UserError):
    """The nodes that are there now do not offer what the roles need; more nodes can."""


def used_roles(config: Config, roles: Collection[str]) -> tuple[str, ...]:
    """`roles`, each once, in the order of the configuration. Raises UserError for one that there is not."""
    terms = config.reward.terms
    # A role is looked up by name alone: a term of the same name would start in the place of the role.
    if taken := [name for name in terms if name in FIXED_ROLES]:
        raise UserError(f"reward.terms.{taken[0]}: {taken[0]} is a role already; choose another name")
    known = (*FIXED_ROLES, *services(config))
    if unknown := [role for role in roles if role not in known]:
        raise UserError(f"reward.terms has no term {unknown[0]!r}; there are: {', '.join(terms) or 'none'}")
    return tuple(role for role in known if role in roles)


def bundles(config: Config, roles: Collection[str], device: str) -> list[Bundles]:
    """What each used role asks of Ray on `device` ("cpu" or "cuda"), in the order of the configuration."""
    pools: dict[str, tuple[str, Pool]] = {
        "rollout": ("placement.rollout", config.placement.rollout),
        "policy": ("placement.policy", config.placement.policy),
    }
    for name, service in services(config).items():
        if not service.url:
            pools[name] = (f"{service.key}.pool", service.pool)
    shared = config.placement.colocate
    if any(role in shared for role in roles):
        roles = [*roles, *shared]  # the place of both is taken, whichever is used
    asked = []
    for role in used_roles(config, roles):
        if role not in pools:  # processes or threads of the driver
            continue
        key, pool = pools[role]
        if shared and role == "policy":
            pool = shared_pool(config)
        gpus = 0.0 if device == "cpu" else pool.gpus
        cpus = max(1.0, pool.cpus) if role == "policy" else pool.cpus  # verl's own task takes one
        amounts = {"GPU": gpus, "CPU": cpus} | pool.resources
        grown = pool.max_replicas if isinstance(pool, ServicePool) else 0
        most = grown or pool.replicas
        together = max(1, ranks_on_a_node(config)) if role == "policy" else 1
        inside = "policy" if shared and role == "rollout" else ""
        asked.append(Bundles(role, key, pool.replicas, amounts, pool.labels, most, together, inside))
    return asked


def shared_pool(config: Config) -> Pool:
    """The policy's pool, with room in each rank's bundle for its part of a rollout replica."""
    rollout, policy = config.placement.rollout, config.placement.policy
    return replace(policy, cpus=max(1.0, policy.cpus) + rollout.cpus / ranks_per_replica(config))


def ranks_per_replica(config: Config) -> int:
    """Of the policy, with whose GPUs a rollout replica works where they are shared."""
    return max(1, int(config.placement.rollout.gpus))


def broadcasts_weights(pool: Pool, engine: RolloutEngine, device: str, colocated: bool) -> bool:
    """Whether rollout replicas get new weights from process to process. UserError where they cannot: NCCL
    takes no two processes on one GPU."""
    own_gpus = device == "cuda" and pool.gpus >= 1 and not colocated
    if engine.weight_transport is not WeightTransport.broadcast:
        return engine.weight_transport is WeightTransport.auto and own_gpus
    if device == "cuda" and not own_gpus:
        raise UserError(
            "rollout.weight_transport: broadcast needs whole GPUs of rollout's own: set it to store, or "
            "placement.rollout.gpus=1 and placement.colocate=[]"
        )
    return True


def ranks_on_a_node(config: Config) -> int:
    """How many ranks of the policy have to lie on one node together; 0: none."""
    if config.placement.colocate and not config.policy.fsdp_size and ranks_per_replica(config) > 1:
        return ranks_per_replica(config)
    return config.policy.fsdp_size


def totals(config: Config, roles: Collection[str], device: str) -> dict[str, float]:
    """{"GPU": ..., "CPU": ..., custom resource: ...}: the sums over the used roles."""
    sums: dict[str, float] = {"GPU": 0, "CPU": 0}
    for b in counted(bundles(config, roles, device)):
        for unit, amount in b.amounts.items():
            sums[unit] = sums.get(unit, 0) + b.replicas * amount
    return sums


def check_placement(config: Config, roles: Collection[str], nodes: Sequence[Node], device: str) -> None:
    """Raise UserError unless every policy rank has a GPU on `device` that no other rank has, and NoRoomError
    unless the nodes have the GPUs, CPUs, custom resources and labels that the used roles ask for: all
    together, and for each process on one node."""
    asked = counted(bundles(config, roles, device))
    for b in asked:
        gpus = b.amounts["GPU"]
        if b.role == "policy" and b.replicas > 1 and 0 < gpus <= 0.5:
            raise UserError(
                f"{b.key}.gpus: {gpus:g} lets two of {b.replicas} replicas share a GPU, and ranks exchange "
                f"gradients only between GPUs (NCCL): set {b.key}.gpus above 0.5, or {b.key}.replicas=1"
            )
    for fault in _room_faults(asked, totals(config, roles, device), nodes):
        raise NoRoomError(fault)


def _room_faults(asked: list[Bundles], needed: dict[str, float], nodes: Sequence[Node]) -> Iterator[str]:
    for unit in needed:
        offered = sum(node.resources.get(unit, 0.0) for node in nodes)
        if needed[unit] <= offered:
            continue
        shares = {b.role: b.replicas * b.amounts.get(unit, 0) for b in asked}
        # The way out that frees most; a role of one replica can only ask for less.
        largest = max(asked, key=lambda b: shares[b.role])
        knob = "replicas" if largest.replicas > 1 else _key_of(unit)
        addends = " + ".join(f"{role} {share:g}" for role, share in shares.items() if share)
        units = f"{unit}s" if unit in _COUNTED else f"of the resource {unit}"
        yield (
            f"placement needs {needed[unit]:g} {units} ({addends}), the cluster offers {offered:g}: "
            f"lower {largest.key}.{knob} or add a node"
        )
    for b in asked:
        if not any(has_labels(node, b.labels) for node in nodes):
            yield f"{b.key}.labels: no node of the cluster has {_said(b)}: add one or change the labels"
    if misfit := first_misfit(asked, nodes):
        yield _describe(misfit)


def _describe(misfit: Misfit) -> str:
    b = misfit.bundles
    needed = needed_together(b)
    short = next(unit for unit, left in misfit.left.items() if left < needed[unit])
    lowered = f"{b.key}.{'replicas' if misfit.index else _key_of(short)}"
    processes = f"{b.role} process {misfit.index + 1} of {b.replicas}"
    if b.together > 1:
        group, groups = misfit.index // b.together + 1, b.replicas // b.together
        processes = f"{b.role} group {group} of {groups}, {b.together} ranks together,"
        lowered = "policy.fsdp_size" if group == 1 else lowered  # or the replica beside them
    where = f"one node with {_said(b)}" if b.labels else "one node"
    # A plan may not know how many there are of something.
    units = [unit for unit, left in misfit.left.items() if math.isfinite(left)]
    needs, left = (
        " and ".join(f"{amounts[unit]:g} {unit}" for unit in units) for amounts in (needed, misfit.left)
    )
    return (
        f"placement: {processes} needs {needs} on {where}, and the best node, {misfit.node}, has {left} "
        f"left: lower {lowered} or add a node"
    )


def _key_of(unit: str) -> str:
    """Of a resource, below its pool."""
    return f"{unit.lower()}s" if unit in _COUNTED else f"resources.{unit}"


def _said(bundles: Bundles) -> str:
    return ", ".join(f"{label}={value}" for label, value in bundles.labels.items())


def plain_labels(bundles: Bundles) -> dict[str, str]:
    """The labels with one value. Ray's selectors can also be !VALUE or in(VALUE,...), which it matches."""
    return {label: value for label, value in bundles.labels.items() if not set(value) & set("!()")}


def resolve_device(device: Device, cluster_gpus: float) -> str:
    """ "cpu" or "cuda"; auto takes cuda where the cluster has GPUs. `cluster_gpus` counts real GPUs, not the
    logical ones of `local_resources`. Raises NoRoomError for cuda without a GPU."""
    if device is Device.auto:
        return "cuda" if cluster_gpus > 0 else "cpu"
    if device is Device.cuda and cluster_gpus <= 0:
        way_out = "set placement.device=cpu or add a GPU node"
        raise NoRoomError(f"placement.device is cuda and the cluster offers no GPU: {way_out}")
    return device.value


def resolve_joined_device(config: Config, roles: Collection[str], cluster_gpus: float) -> str:
    """As `resolve_device`, on a cluster that others started: its GPU nodes may be yet to come, so auto is no
    word for CPU there where a role could use a GPU. Raises UserError."""
    device = config.placement.device
    if device is Device.auto and cluster_gpus <= 0 and totals(config, roles, "cuda")["GPU"] > 0:
        way_out = "set placement.device=cpu, or cuda and placement.wait_for_nodes_seconds for nodes to come"
        raise UserError(f"placement.device is auto and the cluster of RAY_ADDRESS offers no GPU: {way_out}")
    return resolve_device(device, cluster_gpus)


def local_resources(config: Config, roles: Collection[str], device: str) -> dict[str, Any]:
    """Arguments of `ray.init` on one machine. CPUs and custom resources are numbers there: enough for every
    used role to be placed and to grow, however few cores there are, and the labels are those that are asked
    for. On cuda Ray counts the GPUs itself; on CPU no role asks for one. Raises UserError where two roles ask
    for nodes that one machine cannot be."""
    offered: Counter[str] = Counter()
    labels: dict[str, str] = {}
    for b in counted(bundles(config, roles, device)):
        for unit, amount in b.amounts.items():
            spare = 0 if unit in _COUNTED else _SPARE_SHARES
            offered[unit] += math.ceil((b.most + spare) * amount)
        for label, value in plain_labels(b).items():
            if label.startswith("ray.io/"):  # Ray's own: it says what the machine is
                continue
            if labels.setdefault(label, value) != value:
                fault = f"another pool asks for {labels[label]}, and one machine has one value"
                raise UserError(f"{b.key}.labels.{label}: {value}; {fault}: remove one")
    num_cpus = offered.pop("CPU", 0) + _SPARE_CPUS
    del offered["GPU"]
    arguments = {"num_cpus": num_cpus, "resources": dict(offered), "labels": labels}
    return arguments if device == "cuda" else arguments | {"num_gpus": 0}


def environments(config: Config, roles: Collection[str], device: str) -> dict[str, dict[str, str]]:
    """The environment variables of each used role's processes on `device`, "cpu" or "cuda"."""
    vllm = config.rollout.engine is EngineKind.vllm
    of_roles = {}
    for b in bundles(config, roles, device):
        kind = b.role if b.role in FIXED_ROLES else "reward"
        variables = process_environment(kind, device, b.amounts["CPU"], vllm and kind == "rollout")
        of_roles[b.role] = dict(sorted(variables.items()))
    return of_roles
