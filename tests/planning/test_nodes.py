"""Placement: one that there is, and none where machines are too small one by one."""

from __future__ import annotations

from pns.planning.hardware import ClusterFile, NodeType
from pns.planning.nodes import Machine, Process, homes, kinds_of, nodes_of, place


def machines(count: int, gpus: int = 8, cpus: int = 0, kind: str = "H100") -> list[Machine]:
    return nodes_of(ClusterFile({"node": NodeType(count=count, gpus=gpus, cpus=cpus, gpu=kind)}))


def processes(role: str, num: int, gpus: float, cpus: float = 1.0, gb: float = 10.0) -> list[Process]:
    return [Process(role, rank, gpus, cpus, gb) for rank in range(num)]


def test_ranks_stay_on_one_machine_where_they_fit() -> None:
    nodes = machines(2)
    asked = [*processes("rollout", 4, 1), *processes("policy", 8, 1), *processes("judge", 4, 1)]
    assert place(asked, nodes) == []
    assert [node.described() for node in nodes] == ["policy 8", "rollout 4, judge 4"]
    assert homes(nodes, "policy") == {"node-1"}


def test_a_process_of_several_gpus_needs_them_on_one_machine() -> None:
    asked = [*processes("policy", 8, 1), *processes("rollout", 2, 4)]
    assert place(asked, machines(2)) == []
    # 16 GPUs in all, and no machine with four of them.
    assert place(processes("rollout", 4, 4), machines(8, gpus=2)) == processes("rollout", 4, 4)


def test_fractions_share_a_gpu() -> None:
    nodes = machines(1, gpus=2)
    assert place([*processes("a", 2, 0.5), *processes("policy", 1, 1)], nodes) == []
    assert [len(gpu.residents) for gpu in nodes[0].gpus] == [1, 2]
    assert nodes[0].gpus[1].used_gb == 20


def test_ranks_with_a_copy_of_the_model_lie_on_one_machine() -> None:
    asked = [Process("policy", rank, 1, 1, 10.0, together=4) for rank in range(8)]
    nodes = machines(2, gpus=6)
    assert place([*processes("rollout", 4, 1), *asked], nodes) == []
    assert [node.described() for node in nodes] == ["policy 4, rollout 2", "policy 4, rollout 2"]
    assert place(asked, machines(3, gpus=3)) == asked
    assert place(asked, machines(2, gpus=6, cpus=3)) == asked


def test_cpus_are_counted_where_they_are_known() -> None:
    assert len(place(processes("rollout", 3, 1, cpus=2), machines(1, cpus=5))) == 1
    assert place(processes("rollout", 3, 1, cpus=200), machines(1)) == []


def test_memory_decides_between_kinds() -> None:
    small, large = NodeType(gpus=1, gpu="L40S"), NodeType(gpus=1, gpu="H200")
    nodes = nodes_of(ClusterFile({"small": small, "large": large}))
    assert place(processes("judge", 1, 1, gb=70), nodes) == []
    assert homes(nodes, "judge") == {"large"}
    assert [kind.name for kind in kinds_of(nodes, "judge")] == ["H200"]
