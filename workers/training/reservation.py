"""The place of the policy's processes."""

from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pns.config import Pool
from pns.errors import UserError
from workers.runtime import Runtime


def reserve(pool: Pool, runtime: Runtime) -> Any:
    """A placement group with one bundle per rank, on as few nodes as Ray finds. UserError when there is no
    place for them in time."""
    # At least one CPU, as verl's helper task asks for one.
    bundle = {"CPU": max(1.0, pool.cpus)} | pool.resources
    if runtime.device == "cuda":
        bundle["GPU"] = pool.gpus
    selectors = [pool.labels] * pool.replicas if pool.labels else None
    bundles = placement_group([bundle] * pool.replicas, strategy="PACK", bundle_label_selector=selectors)
    # verl would wait for ever, and without a word.
    limit = runtime.start_limit
    if not bundles.wait(limit.seconds):
        remove_placement_group(bundles)
        labels = ", ".join(f"{label}={value}" for label, value in pool.labels.items())
        where = f" on nodes with {labels}" if labels else ""
        free = {name: amount for name, amount in ray.available_resources().items() if name in bundle}
        needs = f"placement.policy needs {pool.replicas} x {bundle}{where}"
        waited = f"{limit.seconds:g} s were not enough to get them; free now: {free}"
        way_out = f"lower placement.policy, add a node, or raise {limit.key}"
        raise UserError(f"{needs}, and {waited}: {way_out}")
    return bundles


def release(bundles: Any) -> None:
    """Give a place back."""
    remove_placement_group(bundles)
