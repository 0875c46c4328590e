"""`pns plan`: what a run asks of a cluster, how long it takes, and what does not fit."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pns.config import Config, Device, stages
from pns.errors import UserError
from pns.planning.faults import faults
from pns.planning.hardware import DEFAULT_GPU, ClusterFile, default_cluster, named_gpu, read_cluster
from pns.planning.page import as_json, print_plan
from pns.planning.plan import Estimate, make_estimate
from pns.planning.work import work_of
from pns.preflight import check_inputs, check_machine
from pns.recipe import load
from workers.placement import totals

_NVIDIA = Path("/proc/driver/nvidia/gpus")  # a directory for each GPU of this machine


@dataclass(frozen=True)
class PlanOptions:
    cluster: Path | None = None
    gpu: str = ""
    price: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    as_json: bool = False
    assumptions: bool = False


def plan_recipe(
    recipe: Path, overrides: Sequence[str], options: PlanOptions, over: Sequence[Path] = ()
) -> int:
    """Print the plan; the exit code is 2 where something does not fit the cluster file that is given."""
    config = load(recipe, list(overrides), over=over)
    check_inputs(config, stages(config))
    cluster = cluster_of(config, options)
    if cluster is None:
        check_machine(config, stages(config))
    lengths = options.prompt_tokens, options.completion_tokens
    plan = make_estimate(config, cluster, options.cluster is not None, *lengths)
    price = options.price or price_of(plan)
    if options.as_json:
        print(json.dumps(as_json(plan, price), indent=2))
    else:
        title = f"{recipe}: {Path(config.runs) / config.name}"
        print_plan(plan, title, price, options.assumptions)
    return 2 if options.cluster is not None and faults(plan) else 0


def cluster_of(config: Config, options: PlanOptions) -> ClusterFile | None:
    """The machines to plan for; None: this machine's CPU. Raises UserError."""
    if options.cluster is not None and options.gpu:
        raise UserError("--gpu and --cluster both say which GPUs there are: give one")
    cluster = read_cluster(options.cluster) if options.cluster else None
    device = config.placement.device
    if options.gpu:
        named_gpu(options.gpu, "--gpu")
    if device is Device.cpu and (options.gpu or cluster is not None):
        raise UserError("placement.device is cpu, and --gpu and --cluster plan for GPUs: set it to cuda")
    if device is Device.cpu or (device is Device.auto and not offers_gpus(cluster, options.gpu)):
        return None
    if cluster is not None:
        if not offers_gpus(cluster, ""):
            raise UserError(f"placement.device is cuda and {options.cluster} has no GPU: add nodes.NAME.gpus")
        return cluster
    used = {role for own in work_of(config).values() for role in own.roles}
    return default_cluster(options.gpu or DEFAULT_GPU, round(totals(config, used, "cuda")["GPU"] + 0.5))


def offers_gpus(cluster: ClusterFile | None, gpu: str) -> bool:
    if cluster is not None:
        return any(node.gpus for node in cluster.nodes.values())
    return bool(gpu) or _NVIDIA.is_dir()


def price_of(plan: Estimate) -> float:
    """Mean of the cluster file's prices over the GPUs that are taken; 0 where one of them has none."""
    taken = {node.type.price: 0.0 for node in plan.nodes if node.processes}
    for node in plan.nodes:
        if node.processes:
            taken[node.type.price] += sum(1 - gpu.free for gpu in node.gpus)
    num = sum(taken.values())
    return sum(price * gpus for price, gpus in taken.items()) / num if num and all(taken) else 0.0
