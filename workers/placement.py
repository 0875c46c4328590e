"""From the configuration's placement to what it asks of a cluster: pure arithmetic, no Ray.

On CPU no role takes a GPU; the verifier's processes belong to the driver and take nothing that Ray counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pns.config import Device, Placement, Pool
from pns.errors import UserError

_SPARE_CPUS = 8  # logical CPUs of a local Ray for short tasks of the driver


@dataclass(frozen=True)
class Bundles:
    """`replicas` processes of a role, each with `gpus` and `cpus`."""

    role: str
    replicas: int
    gpus: float
    cpus: float


def bundles(placement: Placement, device: str) -> list[Bundles]:
    """What each role asks of Ray on `device` ("cpu" or "cuda"), in the order of the configuration. A policy
    rank has at least one CPU."""
    pools: dict[str, Pool] = {
        role: getattr(placement, role) for role in ("rollout", "policy", "reward_model", "judge")
    }
    return [
        Bundles(
            role,
            pool.replicas,
            pool.gpus if device == "cuda" else 0.0,
            max(1.0, pool.cpus) if role == "policy" else pool.cpus,
        )
        for role, pool in pools.items()
    ]


def totals(placement: Placement, device: str) -> dict[str, float]:
    """{"GPU": ..., "CPU": ...}: the sums over all roles."""
    found = bundles(placement, device)
    return {"GPU": sum(b.replicas * b.gpus for b in found), "CPU": sum(b.replicas * b.cpus for b in found)}


def check(placement: Placement, cluster_resources: Mapping[str, float], device: str | None = None) -> None:
    """Raise UserError unless the cluster (`ray.cluster_resources()`) offers the GPUs and CPUs of all roles on
    `device` (None: the one that `resolve_device` takes on this cluster)."""
    device = device or resolve_device(placement.device, cluster_resources.get("GPU", 0.0))
    needed, found = totals(placement, device), bundles(placement, device)
    for unit in ("GPU", "CPU"):
        offered = cluster_resources.get(unit, 0.0)
        if needed[unit] > offered:
            shares = {b.role: b.replicas * (b.gpus if unit == "GPU" else b.cpus) for b in found}
            largest = max(shares, key=lambda role: shares[role])
            knob = "replicas" if getattr(placement, largest).replicas > 1 else f"{unit.lower()}s"
            parts = " + ".join(f"{role} {share:g}" for role, share in shares.items() if share)
            raise UserError(
                f"placement needs {needed[unit]:g} {unit}s ({parts}), the cluster offers {offered:g}: "
                f"lower placement.{largest}.{knob} or add a node"
            )


def resolve_device(device: Device, cluster_gpus: float) -> str:
    """ "cpu" or "cuda"; auto takes cuda where the cluster has GPUs. `cluster_gpus` counts real GPUs, not the
    logical ones of `local_resources`. Raises UserError for cuda without a GPU."""
    if device is Device.auto:
        return "cuda" if cluster_gpus > 0 else "cpu"
    if device is Device.cuda and cluster_gpus <= 0:
        raise UserError(
            "placement.device is cuda and the cluster offers no GPU: set placement.device=cpu or add a GPU node"
        )
    return device.value


def local_resources(placement: Placement, device: str) -> dict[str, int]:
    """Arguments of `ray.init` on one machine. CPUs are logical there: just enough for every role to be
    placed, however few cores there are. On cuda Ray counts the GPUs itself; on CPU no role asks for one."""
    resources = {"num_cpus": math.ceil(totals(placement, device)["CPU"]) + _SPARE_CPUS}
    return resources if device == "cuda" else resources | {"num_gpus": 0}


def table(placement: Placement, device: str | None = None) -> str:
    """The placement as text, one role a line, for `pns plan`. `device` None: the configured one; auto shows
    what is asked for on GPUs."""
    device = device or placement.device.value
    counted = "cpu" if device == "cpu" else "cuda"
    needed = totals(placement, counted)
    lines = [f"{'role':<14}{'replicas':>9}{'GPUs each':>11}{'CPUs each':>11}   device: {device}"]
    lines += [f"{b.role:<14}{b.replicas:>9}{b.gpus:>11g}{b.cpus:>11g}" for b in bundles(placement, counted)]
    return "\n".join(
        [
            *lines,
            f"total: {needed['GPU']:g} GPUs, {needed['CPU']:g} CPUs; {placement.verifier_processes} verifier processes",
        ]
    )
