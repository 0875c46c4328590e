"""GPUs by name, and the machines of a cluster file."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

from pns.errors import UserError, did_you_mean
from pns.fields import above, at_least, check_ranges, key, section
from pns.planning.assumptions import Assumptions
from pns.recipe import merge_layers


@dataclass(frozen=True)
class GpuKind:
    """Published numbers. GB are 10^9 bytes; makers mean 2^30, and the difference of 7 % is left to what no
    part of a plan names (fragmentation, the driver's own)."""

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    tflops: float  # dense bfloat16


# From the makers' data sheets: memory, memory bandwidth, dense bfloat16 (half of what is said with sparsity).
GPU_KINDS = {
    kind.name: kind
    for kind in (
        GpuKind("B200", 180, 7700, 2250),
        GpuKind("H200", 141, 4800, 989),
        GpuKind("H100", 80, 3350, 989),  # SXM
        GpuKind("H100-PCIe", 80, 2000, 756),
        GpuKind("A100-80", 80, 2039, 312),
        GpuKind("A100-40", 40, 1555, 312),
        GpuKind("L40S", 48, 864, 362),
        GpuKind("L4", 24, 300, 121),
        GpuKind("RTX4090", 24, 1008, 165),
    )
}
DEFAULT_GPU = "H100"
DEFAULT_GPUS_PER_NODE = 8


@dataclass
class NodeType:
    """Machines of one kind."""

    count: int = key(1, "machines", at_least(1))
    gpus: int = key(0, "GPUs of each", at_least(0))
    gpu: str = key("", f"their kind: {', '.join(GPU_KINDS)}; empty: the next three keys say it")
    gpu_memory_gb: float = key(0.0, "GB (10^9 bytes) of a GPU; 0: the kind's", at_least(0))
    bandwidth_gb_s: float = key(0.0, "memory bandwidth of a GPU, GB/s; 0: the kind's", at_least(0))
    tflops: float = key(0.0, "dense bfloat16 of a GPU, 10^12 operations/s; 0: the kind's", at_least(0))
    cpus: int = key(0, "CPU cores, as Ray counts them; 0: as many as are asked for", at_least(0))
    memory_gb: float = key(0.0, "host memory, GB; 0: not known, not checked", at_least(0))
    network_gb_s: float = key(40.0, "GB/s of a GPU to another machine; 400 Gbit/s are 50", above(0))
    price: float = key(0.0, "of one GPU for an hour, in any currency; 0: not known", at_least(0))


@dataclass
class ClusterFile:
    """A file for --cluster."""

    nodes: dict[str, NodeType] = key({}, "name -> machines of one kind")
    assumptions: Assumptions = section(Assumptions)


def read_cluster(path: Path) -> ClusterFile:
    """The file, checked. Raises UserError with key and way out."""
    if not path.is_file():
        raise UserError(f"--cluster {path}: no such file")
    try:
        layer = OmegaConf.create(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    cluster = merge_layers(ClusterFile, [(layer, path.parent)], str(path))
    check_ranges(cluster)
    if not cluster.nodes:
        raise UserError(f"{path}: nodes is empty: name at least one, e.g. nodes.gpu={{gpus: 8, gpu: H100}}")
    for name, node in cluster.nodes.items():
        gpu_of(node, f"{path}: nodes.{name}")
    return cluster


def gpu_of(node: NodeType, where: str) -> GpuKind | None:
    """The GPU of `node`, None where it has none. Raises UserError, which begins with `where`."""
    if not node.gpus:
        return None
    if node.gpu:
        stated = named_gpu(node.gpu, f"{where}.gpu")
    else:
        stated = GpuKind(f"{node.gpu_memory_gb:g} GB", 0, 0, 0)
    memory = node.gpu_memory_gb or stated.memory_gb
    bandwidth = node.bandwidth_gb_s or stated.bandwidth_gb_s
    tflops = node.tflops or stated.tflops
    if not (memory and bandwidth and tflops):
        raise UserError(f"{where}: give gpu, or gpu_memory_gb, bandwidth_gb_s and tflops")
    return GpuKind(stated.name, memory, bandwidth, tflops)


def named_gpu(name: str, where: str) -> GpuKind:
    """Raises UserError, which begins with `where`, for an unknown kind."""
    if name not in GPU_KINDS:
        hint = did_you_mean(name, GPU_KINDS) or f"; there are {', '.join(GPU_KINDS)}"
        raise UserError(f"{where}: {name!r} is no known GPU{hint}")
    return GPU_KINDS[name]


def default_cluster(kind: str, gpus: int) -> ClusterFile:
    """As many machines with eight GPUs of `kind` as hold `gpus`."""
    count = max(1, -(-gpus // DEFAULT_GPUS_PER_NODE))
    return ClusterFile({"node": NodeType(count=count, gpus=DEFAULT_GPUS_PER_NODE, gpu=kind)})
