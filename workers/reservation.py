"""The place of the policy's processes, and of rollout beside them (`placement.colocate`)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pns.config import Pool
from pns.errors import UserError
from workers.runtime import Runtime


@dataclass(frozen=True)
class Slot:
    """Where a rollout replica lies beside policy ranks: Ray's strategy, and the GPUs of their bundles by the
    ids that CUDA_VISIBLE_DEVICES takes (none on a CPU)."""

    strategy: Any
    gpu_ids: tuple[str, ...]


def reserve(pool: Pool, runtime: Runtime, on_a_node: int = 0) -> list[Any]:
    """Placement groups with one bundle per rank, in the order of ranks: one group, on as few nodes as Ray
    finds, or groups of `on_a_node` bundles (a divisor of the replicas), each on one node.
    UserError when there is no place for them in time."""
    # At least one CPU, as verl's helper task asks for one.
    bundle = {"CPU": max(1.0, pool.cpus)} | pool.resources
    if runtime.device == "cuda":
        bundle["GPU"] = pool.gpus
    size = on_a_node or pool.replicas
    selectors = [pool.labels] * size if pool.labels else None
    strategy = "STRICT_PACK" if on_a_node else "PACK"
    groups = [
        placement_group([bundle] * size, strategy=strategy, bundle_label_selector=selectors)
        for _ in range(pool.replicas // size)
    ]
    limit = runtime.start_limit
    deadline = time.monotonic() + limit.seconds
    # verl would wait for ever, and without a word.
    if not all(group.wait(max(0.0, deadline - time.monotonic())) for group in groups):
        release(groups)
        labels = ", ".join(f"{label}={value}" for label, value in pool.labels.items())
        where = f" on nodes with {labels}" if labels else ""
        together = f", each {size} on one node" if on_a_node else ""
        free = {name: amount for name, amount in ray.available_resources().items() if name in bundle}
        needs = f"placement.policy needs {pool.replicas} x {bundle}{where}{together}"
        waited = f"{limit.seconds:g} s were not enough to get them; free now: {free}"
        way_out = f"lower placement.policy, add a node, or raise {limit.key}"
        raise UserError(f"{needs}, and {waited}: {way_out}")
    return _by_address(groups)


def slots(groups: Sequence[Any], bundles_per_slot: int, runtime: Runtime) -> list[Slot]:
    """A slot for each `bundles_per_slot` bundles of groups that nobody uses yet, in the order of ranks."""
    bundles = [(group, index) for group in groups for index in range(group.bundle_count)]
    strategies = [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        for group, index in bundles
    ]
    gpu_ids: list[list[str]] = [[] for _ in bundles]
    if runtime.device == "cuda":
        asked = [
            ray.remote(_gpu_ids).options(num_cpus=0, num_gpus=1, scheduling_strategy=strategy).remote()
            for strategy in strategies
        ]
        gpu_ids = ray.get(asked, timeout=runtime.start_limit.seconds)
    return [
        Slot(strategies[first], tuple(chain(*gpu_ids[first : first + bundles_per_slot])))
        for first in range(0, len(bundles), bundles_per_slot)
    ]


def _gpu_ids() -> list[str]:
    return ray.get_runtime_context().get_accelerator_ids()["GPU"]


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
