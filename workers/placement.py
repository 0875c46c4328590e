"""From the configuration to what its roles ask of a cluster: pure arithmetic, no Ray.

A role is "rollout", "policy", "verifier" or the name of a reward term; only roles that are used count. On CPU
no role takes a GPU; the verifier's processes belong to the driver and take nothing that Ray counts.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pns.config import Config, Device
from pns.errors import UserError

FIXED_ROLES = ("rollout", "policy", "verifier")
_SPARE_CPUS = 8  # logical CPUs of a local Ray for short tasks of the driver


@dataclass(frozen=True)
class Bundles:
    """`replicas` processes of a role, each with `gpus` and `cpus`; `key` is its pool in the configuration."""

    role: str
    key: str
    replicas: int
    gpus: float
    cpus: float


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
        pools[name] = (f"reward.terms.{name}.pool", term.pool)
    asked = []
    for role in used_roles(config, roles):
        if role == "verifier":  # local processes of the driver
            continue
        key, pool = pools[role]
        gpus = 0.0 if device == "cpu" else pool.gpus
        cpus = max(1.0, pool.cpus) if role == "policy" else pool.cpus  # verl's own task takes one
        asked.append(Bundles(role, key, pool.replicas, gpus, cpus))
    return asked


def totals(config: Config, roles: Collection[str], device: str) -> dict[str, float]:
    """{"GPU": ..., "CPU": ...}: the sums over the used roles."""
    asked = bundles(config, roles, device)
    return {"GPU": sum(b.replicas * b.gpus for b in asked), "CPU": sum(b.replicas * b.cpus for b in asked)}


def check_placement(
    config: Config, roles: Collection[str], cluster_resources: Mapping[str, float], device: str
) -> None:
    """Raise UserError unless the cluster (`ray.cluster_resources()`) offers the GPUs and CPUs of the used
    roles on `device`, and every policy rank has a GPU that no other rank has."""
    needed = totals(config, roles, device)
    asked = bundles(config, roles, device)
    for b in asked:
        if b.role == "policy" and b.replicas > 1 and 0 < b.gpus <= 0.5:
            raise UserError(
                f"{b.key}.gpus: {b.gpus:g} lets two of {b.replicas} replicas share a GPU, and ranks exchange "
                f"gradients only between GPUs (NCCL): set {b.key}.gpus above 0.5, or {b.key}.replicas=1"
            )
    for unit in ("GPU", "CPU"):
        offered = cluster_resources.get(unit, 0.0)
        if needed[unit] <= offered:
            continue
        shares = {b.role: b.replicas * (b.gpus if unit == "GPU" else b.cpus) for b in asked}
        # The way out that frees most; a role of one replica can only ask for less.
        largest = max(asked, key=lambda b: shares[b.role])
        knob = "replicas" if largest.replicas > 1 else f"{unit.lower()}s"
        addends = " + ".join(f"{role} {share:g}" for role, share in shares.items() if share)
        raise UserError(
            f"placement needs {needed[unit]:g} {unit}s ({addends}), the cluster offers {offered:g}: "
            f"lower {largest.key}.{knob} or add a node"
        )


def resolve_device(device: Device, cluster_gpus: float) -> str:
    """ "cpu" or "cuda"; auto takes cuda where the cluster has GPUs. `cluster_gpus` counts real GPUs, not the
    logical ones of `local_resources`. Raises UserError for cuda without a GPU."""
    if device is Device.auto:
        return "cuda" if cluster_gpus > 0 else "cpu"
    if device is Device.cuda and cluster_gpus <= 0:
        way_out = "set placement.device=cpu or add a GPU node"
        raise UserError(f"placement.device is cuda and the cluster offers no GPU: {way_out}")
    return device.value


def local_resources(config: Config, roles: Collection[str], device: str) -> dict[str, int]:
    """Arguments of `ray.init` on one machine. CPUs are logical there: just enough for every used role to be
    placed, however few cores there are. On cuda Ray counts the GPUs itself; on CPU no role asks for one."""
    resources = {"num_cpus": math.ceil(totals(config, roles, device)["CPU"]) + _SPARE_CPUS}
    return resources if device == "cuda" else resources | {"num_gpus": 0}
