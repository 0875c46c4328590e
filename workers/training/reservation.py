"""The place of the policy's processes."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pns.config import Pool
from pns.errors import UserError
from workers.runtime import Runtime


def reserve(pool: Pool, runtime: Runtime, fsdp_size: int = 0) -> list[Any]:
    """Placement groups with one bundle per rank, in the order of ranks: one group, on as few nodes as Ray
    finds, or with `fsdp_size` (a divisor of the replicas) groups of so many bundles, each on one node.
    UserError when there is no place for them in time."""
    # At least one CPU, as verl's helper task asks for one.
    bundle = {"CPU": max(1.0, pool.cpus)} | pool.resources
    if runtime.device == "cuda":
        bundle["GPU"] = pool.gpus
    size = fsdp_size or pool.replicas
    selectors = [pool.labels] * size if pool.labels else None
    strategy = "STRICT_PACK" if fsdp_size else "PACK"
    groups = [
        placement_group([bundle] * size, strategy=strategy, bundle_label_selector=selectors)
        for _ in range(pool.replicas // size)
    ]
    deadline = time.monotonic() + runtime.start_timeout_seconds
    # verl would wait for ever, and without a word.
    if not all(group.wait(max(0.0, deadline - time.monotonic())) for group in groups):
        release(groups)
        labels = ", ".join(f"{label}={value}" for label, value in pool.labels.items())
        where = f" on nodes with {labels}" if labels else ""
        together = f", {size} on one node (policy.fsdp_size)" if fsdp_size else ""
        free = {name: amount for name, amount in ray.available_resources().items() if name in bundle}
        needs = f"placement.policy needs {pool.replicas} x {bundle}{where}{together}"
        waited = f"{runtime.start_timeout_seconds:g} s were not enough to get them; free now: {free}"
        raise UserError(f"{needs}, and {waited}: lower placement.policy or add a node")
    return _by_address(groups)


def release(groups: Sequence[Any]) -> None:
    """Give a place back."""
    for group in groups:
        remove_placement_group(group)


def _by_address(groups: list[Any]) -> list[Any]:
    """As verl numbers ranks: the same on the same nodes, whatever the order in which they answered."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}

    def address(group: Any) -> str:
        return addresses[placement_group_table(group)["bundles_to_node_id"][0]]

    return sorted(groups, key=address)
