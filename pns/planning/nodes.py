"""The processes of a run on the machines of a cluster: one placement that there is, if there is one.

Ray decides by GPUs and CPUs and may choose another; it knows nothing of memory. So a process goes here where
its memory fits, if there is such a place, else where there is room.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pns.planning.hardware import ClusterFile, GpuKind, NodeType, gpu_of


@dataclass
class Process:
    """One process of a role; `gpu_gb` is of each of its GPUs. Every `together` of them lie on one machine."""

    role: str
    rank: int
    gpus: float
    cpus: float
    gpu_gb: float
    together: int = 1


@dataclass
class Gpu:
    kind: GpuKind
    free: float = 1.0
    residents: list[Process] = field(default_factory=list)

    @property
    def used_gb(self) -> float:
        return sum(process.gpu_gb for process in self.residents)


@dataclass
class Machine:
    name: str
    type: NodeType
    gpus: list[Gpu]
    free_cpus: float
    processes: list[Process] = field(default_factory=list)

    def place_for(self, process: Process) -> list[Gpu] | None:
        """GPUs for it and those that lie with it, the fullest that have room; None where it does not go
        here."""
        if process.together * process.cpus > self.free_cpus:
            return None
        share = min(process.gpus, 1.0)
        num = process.together * math.ceil(process.gpus)
        candidates = [gpu for gpu in self.gpus if gpu.free >= share - 1e-9]
        candidates.sort(key=lambda gpu: (not _fits(gpu, process), gpu.free))
        return candidates[:num] if len(candidates) >= num else None

    def take(self, process: Process, gpus: Sequence[Gpu]) -> None:
        for gpu in gpus:
            gpu.free -= min(process.gpus, 1.0)
            gpu.residents.append(process)
        self.free_cpus -= process.cpus
        self.processes.append(process)

    def described(self) -> str:
        """Its processes by role: rollout 4, policy 8."""
        counts = Counter(process.role for process in self.processes)
        return ", ".join(f"{role} {num}" for role, num in counts.items()) or "nothing"


def _fits(gpu: Gpu, process: Process) -> bool:
    return gpu.used_gb + process.gpu_gb <= gpu.kind.memory_gb


def nodes_of(cluster: ClusterFile) -> list[Machine]:
    """Every machine of a cluster file, empty."""
    nodes = []
    for name, kind in cluster.nodes.items():
        gpu = gpu_of(kind, f"nodes.{name}")
        for number in range(kind.count):
            gpus = [Gpu(gpu) for _ in range(kind.gpus)] if gpu else []
            own_name = name if kind.count == 1 else f"{name}-{number + 1}"
            nodes.append(Machine(own_name, kind, gpus, kind.cpus or math.inf))
    return nodes


def place(processes: Sequence[Process], nodes: Sequence[Machine]) -> list[Process]:
    """Put every process on a node: first those that need several GPUs of one machine, then the ranks of the
    policy, which exchange weights; returns those without a place."""
    unplaced = []
    ordered = sorted(processes, key=_difficulty, reverse=True)
    while ordered:
        process = ordered[0]
        together, ordered = ordered[: process.together], ordered[process.together :]
        offers = [(node, gpus) for node in nodes if (gpus := node.place_for(process)) is not None]
        if not offers:
            unplaced += together
            continue
        # First where its memory fits, then beside its own kind, then in the order of the file.
        node, gpus = min(offers, key=lambda offer: _order(process, *offer))
        of_each = len(gpus) // len(together)
        for index, own in enumerate(together):
            node.take(own, gpus[index * of_each : (index + 1) * of_each])
    return unplaced


def lay_inside(nodes: Sequence[Machine], role: str, ranks_each: int) -> None:
    """Processes of a role that have the GPUs of `ranks_each` ranks of the policy each, which are placed; the
    memory of both is counted as the ranks'."""
    laid: dict[int, Process] = {}
    for node in nodes:
        for gpu in node.gpus:
            for rank in [own.rank for own in gpu.residents if own.role == "policy"]:
                replica = rank // ranks_each
                if replica not in laid:
                    laid[replica] = Process(role, replica, ranks_each, 0.0, 0.0)
                    node.processes.append(laid[replica])
                gpu.residents.append(laid[replica])


def _difficulty(process: Process) -> tuple[float, bool, float]:
    return max(1.0, process.gpus), process.role == "policy", process.gpus


def _order(process: Process, node: Machine, gpus: Sequence[Gpu]) -> tuple[bool, bool]:
    fits = all(_fits(gpu, process) for gpu in gpus)
    with_own_kind = any(other.role == process.role for other in node.processes)
    return not fits, not with_own_kind


def kinds_of(nodes: Sequence[Machine], role: str) -> list[GpuKind]:
    """Of the GPUs that hold processes of a role, the one with least memory first."""
    gpus = [gpu for node in nodes for gpu in node.gpus if any(own.role == role for own in gpu.residents)]
    return sorted({gpu.kind for gpu in gpus}, key=lambda kind: kind.memory_gb)


def homes(nodes: Sequence[Machine], role: str) -> set[str]:
    """The nodes that hold processes of a role."""
    return {node.name for node in nodes if any(process.role == role for process in node.processes)}
