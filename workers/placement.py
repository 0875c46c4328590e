"""From the configuration to what its roles ask of a cluster: pure arithmetic, no Ray.

A role is "rollout", "policy", "verifier" or the name of a reward term; only roles that are used count. On CPU
no role takes a GPU; the verifier's processes, and the threads that ask an endpoint, belong to the driver and
take nothing that Ray counts.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pns.config import Config, Device, ServicePool
from pns.errors import UserError

FIXED_ROLES = ("rollout", "policy", "verifier")
_COUNTED = ("GPU", "CPU")  # by Ray itself; other resources have names of their own
# Logical CPUs of a local Ray, for short tasks of the driver and for replicas that `pns scale` adds: numbers
# alone, Ray starts no process for one.
_SPARE_CPUS = 40
_SPARE_SHARES = 32  # of each custom resource of a pool: as many replicas more


@dataclass(frozen=True)
class Bundles:
    """`replicas` processes of a role, each with `amounts` of "GPU", "CPU" and custom resources, on nodes with
    `labels`; `key` is its pool in the configuration, `most` what the pool may grow to."""

    role: str
    key: str
    replicas: int
    amounts: dict[str, float]
    labels: dict[str, str]
    most: int


def used_roles(config: Config, roles: Collection[str]) -> tuple[str, ...]:
    """`roles`, each once, in the order of the configuration. Raises UserError for one that there is not."""
    terms = config.reward.terms
    # A role is looked up by name alone: a term of the same name would start in the place of the role.
    if taken := [name for name in terms if name in FIXED_ROLES]:
        raise UserError(f"reward.terms.{taken[0]}: {taken[0]} is a role already; choose another name")
    known = (*FIXED_ROLES, *terms)
    if unknown := [role for role in roles if role not in known]:
        raise UserError(f"reward.terms has no term {unknown[0]!r}; there are: {', '.join(terms) or 'none'}")
    return tuple(role for role in known if role in roles)


def bundles(config: Config, roles: Collection[str], device: str) -> list[Bundles]:
    """What each used role asks of Ray on `device` ("cpu" or "cuda"), in the order of the configuration."""
    pools = {
        "rollout": ("placement.rollout", config.placement.rollout),
        "policy": ("placement.policy", config.placement.policy),
    }
    for name, term in config.reward.terms.items():
        if not term.endpoint.url:
            pools[name] = (f"reward.terms.{name}.pool", term.pool)
    asked = []
    for role in used_roles(config, roles):
        if role not in pools:  # processes or threads of the driver
            continue
        key, pool = pools[role]
        gpus = 0.0 if device == "cpu" else pool.gpus
        cpus = max(1.0, pool.cpus) if role == "policy" else pool.cpus  # verl's own task takes one
        amounts, labels, most = {"GPU": gpus, "CPU": cpus}, {}, pool.replicas
        if isinstance(pool, ServicePool):
            amounts, labels, most = amounts | pool.resources, pool.labels, pool.max_replicas or most
        asked.append(Bundles(role, key, pool.replicas, amounts, labels, most))
    return asked


def totals(config: Config, roles: Collection[str], device: str) -> dict[str, float]:
    """{"GPU": ..., "CPU": ..., custom resource: ...}: the sums over the used roles."""
    sums: dict[str, float] = {"GPU": 0, "CPU": 0}
    for b in bundles(config, roles, device):
        for unit, amount in b.amounts.items():
            sums[unit] = sums.get(unit, 0) + b.replicas * amount
    return sums


def check_placement(
    config: Config, roles: Collection[str], cluster_resources: Mapping[str, float], device: str
) -> None:
    """Raise UserError unless the cluster (`ray.cluster_resources()`) offers the GPUs, CPUs and custom
    resources of the used roles on `device`, and every policy rank has a GPU that no other rank has."""
    needed = totals(config, roles, device)
    asked = bundles(config, roles, device)
    for b in asked:
        gpus = b.amounts["GPU"]
        if b.role == "policy" and b.replicas > 1 and 0 < gpus <= 0.5:
            raise UserError(
                f"{b.key}.gpus: {gpus:g} lets two of {b.replicas} replicas share a GPU, and ranks exchange "
                f"gradients only between GPUs (NCCL): set {b.key}.gpus above 0.5, or {b.key}.replicas=1"
            )
    for unit in needed:
        offered = cluster_resources.get(unit, 0.0)
        if needed[unit] <= offered:
            continue
        shares = {b.role: b.replicas * b.amounts.get(unit, 0) for b in asked}
        # The way out that frees most; a role of one replica can only ask for less.
        largest = max(asked, key=lambda b: shares[b.role])
        own = f"{unit.lower()}s" if unit in _COUNTED else f"resources.{unit}"
        knob = "replicas" if largest.replicas > 1 else own
        addends = " + ".join(f"{role} {share:g}" for role, share in shares.items() if share)
        units = f"{unit}s" if unit in _COUNTED else f"of the resource {unit}"
        raise UserError(
            f"placement needs {needed[unit]:g} {units} ({addends}), the cluster offers {offered:g}: "
            f"lower {largest.key}.{knob} or add a node"
        )


def check_labels(config: Config, roles: Collection[str], nodes: Sequence[Mapping[str, str]]) -> None:
    """Raise UserError where no node, given with its labels, has those that a used role asks for."""
    for b in bundles(config, roles, "cpu"):
        plain = plain_labels(b)
        if not any(plain.items() <= node.items() for node in nodes):
            asked = ", ".join(f"{label}={value}" for label, value in plain.items())
            raise UserError(
                f"{b.key}.labels: no node of the cluster has {asked}: add one or change the labels"
            )


def plain_labels(bundles: Bundles) -> dict[str, str]:
    """The labels with one value. Ray's selectors can also be !VALUE or in(VALUE,...), which it matches."""
    return {label: value for label, value in bundles.labels.items() if not set(value) & set("!()")}


def resolve_device(device: Device, cluster_gpus: float) -> str:
    """ "cpu" or "cuda"; auto takes cuda where the cluster has GPUs. `cluster_gpus` counts real GPUs, not the
    logical ones of `local_resources`. Raises UserError for cuda without a GPU."""
    if device is Device.auto:
        return "cuda" if cluster_gpus > 0 else "cpu"
    if device is Device.cuda and cluster_gpus <= 0:
        way_out = "set placement.device=cpu or add a GPU node"
        raise UserError(f"placement.device is cuda and the cluster offers no GPU: {way_out}")
    return device.value


def local_resources(config: Config, roles: Collection[str], device: str) -> dict[str, Any]:
    """Arguments of `ray.init` on one machine. CPUs and custom resources are numbers there: enough for every
    used role to be placed and to grow, however few cores there are, and the labels are those that are asked
    for. On cuda Ray counts the GPUs itself; on CPU no role asks for one. Raises UserError where two roles ask
    for nodes that one machine cannot be."""
    offered: Counter[str] = Counter()
    labels: dict[str, str] = {}
    for b in bundles(config, roles, device):
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
