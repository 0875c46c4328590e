"""Placement arithmetic, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pns.config import (
    Config,
    Device,
    Endpoint,
    Placement,
    PolicyConfig,
    Pool,
    RewardConfig,
    RewardTerm,
    ServicePool,
    TermKind,
)
from pns.errors import UserError
from workers.packing import Node
from workers.placement import (
    NoRoomError,
    bundles,
    check_placement,
    environments,
    local_resources,
    resolve_device,
    resolve_joined_device,
    totals,
    used_roles,
)

ALL = ("rollout", "policy", "verifier", "plausibility", "coherence")


def configure(rollout: Pool, policy: Pool, plausibility: ServicePool, coherence: ServicePool) -> Config:
    terms = {
        "plausibility": RewardTerm(TermKind.reward_model, 0.25, pool=plausibility),
        "coherence": RewardTerm(TermKind.judge, 0.25, pool=coherence),
    }
    placement = Placement(rollout=rollout, policy=policy)
    return Config(placement=placement, reward=RewardConfig(terms=terms))


CLUSTER = configure(
    rollout=Pool(4, gpus=1, cpus=2),
    policy=Pool(4, gpus=1, cpus=4),
    plausibility=ServicePool(2, gpus=0.5, cpus=1),
    coherence=ServicePool(2, gpus=1, cpus=0),
)


def test_totals_on_gpus_count_fractions() -> None:
    assert totals(CLUSTER, ALL, "cuda") == {"GPU": 4 + 4 + 2 * 0.5 + 2, "CPU": 8 + 16 + 2}


def test_only_roles_that_are_used_count() -> None:
    assert totals(CLUSTER, ["policy"], "cuda") == {"GPU": 4, "CPU": 16}
    assert totals(CLUSTER, ["verifier"], "cuda") == {"GPU": 0, "CPU": 0}
    assert [b.role for b in bundles(CLUSTER, ["coherence", "rollout", "verifier"], "cuda")] == [
        "rollout",
        "coherence",
    ]
    check_placement(CLUSTER, ["rollout", "verifier"], [Node("n0", {"GPU": 4, "CPU": 8})], "cuda")


def test_roles_come_once_in_the_order_of_the_configuration_and_unknown_ones_are_named() -> None:
    assert used_roles(CLUSTER, ["coherence", "verifier", "rollout", "coherence"]) == (
        "rollout",
        "verifier",
        "coherence",
    )
    with pytest.raises(UserError, match=r"no term 'judge'; there are: plausibility, coherence"):
        used_roles(CLUSTER, ["judge"])
    taken = Config(reward=RewardConfig(terms={"policy": RewardTerm()}))
    with pytest.raises(UserError, match=r"reward\.terms\.policy: policy is a role already"):
        used_roles(taken, ["policy"])


def test_a_judge_behind_an_endpoint_asks_nothing_of_ray() -> None:
    asked = RewardTerm(TermKind.judge, 0.25, model="grader", endpoint=Endpoint(url="http://host:8000/v1"))
    config = Config(reward=RewardConfig(terms={"coherence": asked}))
    assert used_roles(config, ["coherence"]) == ("coherence",)
    assert bundles(config, ["coherence"], "cuda") == []
    check_placement(config, ["coherence"], [Node("n0", {})], "cuda")


def test_no_role_takes_a_gpu_on_cpu() -> None:
    assert totals(CLUSTER, ALL, "cpu") == {"GPU": 0, "CPU": 8 + 16 + 2}


def test_a_policy_rank_has_a_whole_cpu() -> None:
    small = configure(Pool(cpus=0.5), Pool(replicas=2, cpus=0.5), ServicePool(cpus=0), ServicePool(cpus=0))
    assert totals(small, ALL, "cpu")["CPU"] == 0.5 + 2 * 1


def test_enough_is_enough() -> None:
    check_placement(CLUSTER, ALL, [Node("n0", {"GPU": 11, "CPU": 26})], "cuda")
    check_placement(CLUSTER, ALL, [Node("n0", {"CPU": 26})], "cpu")


def test_gpu_shortage_names_both_numbers_and_the_way_out() -> None:
    asked = configure(Pool(4), Pool(4), ServicePool(1, gpus=0), ServicePool(1))
    with pytest.raises(UserError) as error:
        check_placement(asked, ALL, [Node("n0", {"GPU": 8, "CPU": 64})], "cuda")
    assert str(error.value) == (
        "placement needs 9 GPUs (rollout 4 + policy 4 + coherence 1), the cluster offers 8: "
        "lower placement.rollout.replicas or add a node"
    )


def test_a_term_is_lowered_under_its_own_key() -> None:
    asked = configure(Pool(1), Pool(1), ServicePool(1), ServicePool(8))
    with pytest.raises(UserError, match=r"lower reward\.terms\.coherence\.pool\.replicas or add a node"):
        check_placement(asked, ALL, [Node("n0", {"GPU": 8, "CPU": 64})], "cuda")


def test_cpu_shortage() -> None:
    addends = r"rollout 8 \+ policy 16 \+ plausibility 2"
    with pytest.raises(UserError, match=rf"needs 26 CPUs \({addends}\), the cluster offers 16: "):
        check_placement(CLUSTER, ALL, [Node("n0", {"CPU": 16})], "cpu")


def test_a_single_replica_cannot_be_lowered() -> None:
    asked = configure(Pool(1, gpus=8), Pool(1), ServicePool(1), ServicePool(1))
    with pytest.raises(UserError, match=r"lower placement\.rollout\.gpus or add a node"):
        check_placement(asked, ALL, [Node("n0", {"GPU": 8, "CPU": 64})], "cuda")


@pytest.mark.parametrize("gpus", [0.5, 0.25])
def test_two_policy_ranks_share_no_gpu(gpus: float) -> None:
    shared = Config(placement=Placement(policy=Pool(2, gpus=gpus)))
    with pytest.raises(UserError, match=rf"placement\.policy\.gpus: {gpus} lets .*\.replicas=1") as error:
        check_placement(shared, ["policy"], [Node("n0", {"GPU": 8, "CPU": 64})], "cuda")
    assert "\n" not in str(error.value)
    check_placement(shared, ["policy"], [Node("n0", {"CPU": 64})], "cpu")
    for pool in (Pool(1, gpus=gpus), Pool(2, gpus=0.6)):  # ranks of 0.6 cannot meet on one
        alone = Config(placement=Placement(policy=pool))
        check_placement(alone, ["policy"], [Node("n0", {"GPU": 8, "CPU": 64})], "cuda")


def test_resolve_device() -> None:
    assert resolve_device(Device.auto, 0) == "cpu"
    assert resolve_device(Device.auto, 2) == "cuda"
    assert resolve_device(Device.cpu, 2) == "cpu"
    with pytest.raises(UserError, match=r"placement\.device is cuda and the cluster offers no GPU"):
        resolve_device(Device.cuda, 0)


@pytest.mark.parametrize("asked", [CLUSTER, Config()])
def test_local_resources_are_enough_for_the_placement(asked: Config) -> None:
    local = local_resources(asked, ALL, "cpu")
    check_placement(asked, ALL, [Node("n0", {"CPU": local["num_cpus"], "GPU": local["num_gpus"]})], "cpu")
    assert local["num_gpus"] == 0
    assert set(local_resources(asked, ALL, "cuda")) == {"num_cpus", "resources", "labels"}


def grown(**pool: Any) -> Config:
    return configure(Pool(1), Pool(1), ServicePool(2, **pool), ServicePool(1))


def test_a_local_ray_has_room_for_pools_that_grow() -> None:
    small, large = (local_resources(grown(max_replicas=most), ALL, "cpu")["num_cpus"] for most in (0, 9))
    assert large == small + 7
    assert small >= 1 + 1 + 2 + 1 + 32


def test_custom_resources_and_labels_are_offered_locally_and_have_to_be_there_on_a_cluster() -> None:
    asked = grown(resources={"scorer": 0.5}, labels={"zone": "a", "tier": "!spot"})
    local = local_resources(asked, ["plausibility"], "cpu")
    assert local["resources"]["scorer"] >= 1 + 16
    assert local["labels"] == {"zone": "a"}
    check_placement(asked, ["plausibility"], [Node("n0", {"CPU": 2, "scorer": 1})], "cpu")
    with pytest.raises(UserError) as error:
        check_placement(asked, ["plausibility"], [Node("n0", {"CPU": 2})], "cpu")
    assert str(error.value) == (
        "placement needs 1 of the resource scorer (plausibility 1), the cluster offers 0: "
        "lower reward.terms.plausibility.pool.replicas or add a node"
    )
    room = {"CPU": 2.0, "scorer": 1.0}
    labels: list[dict[str, str]] = [{"zone": "b"}, {"zone": "a", "tier": "spot"}, {"zone": "a", "other": "c"}]
    nodes = [Node(f"n{index}", room, own) for index, own in enumerate(labels)]
    check_placement(asked, ["plausibility"], nodes, "cpu")
    with pytest.raises(NoRoomError, match=r"labels: no node of the cluster has zone=a, tier=!spot: "):
        check_placement(asked, ["plausibility"], nodes[:2], "cpu")
    asked.reward.terms["coherence"].pool.labels = {"zone": "b"}
    with pytest.raises(UserError, match=r"coherence\.pool\.labels\.zone: b; another pool asks for a"):
        local_resources(asked, ALL, "cpu")


def eights(number: int, **labels: str) -> list[Node]:
    return [Node(f"n{index}", {"GPU": 8, "CPU": 64}, labels) for index in range(number)]


def split(rollout: Pool, ranks: int, plausibility: ServicePool, coherence: ServicePool) -> Config:
    return configure(rollout, Pool(ranks), plausibility, coherence)


HALF, ONE = ServicePool(2, gpus=0.5), ServicePool(2)
PACKED = {
    "2 x 8: 8 ranks, TP 4, 2 x 0.5, 2": (split(Pool(1, gpus=4), 8, HALF, ONE), eights(2)),
    "2 x 8 to the last GPU": (split(Pool(1, gpus=4), 8, ServicePool(4, gpus=0.5), ONE), eights(2)),
    "ranks over two nodes, TP 4 beside them": (split(Pool(1, gpus=4), 10, HALF, ServicePool(1)), eights(2)),
    "TP 4 before single GPUs that could scatter": (split(Pool(3, gpus=4), 1, ONE, HALF), eights(2)),
    "0.6 and 0.4 on one": (
        split(Pool(1), 1, ServicePool(2, gpus=0.4), ServicePool(2, gpus=0.6)),
        [Node("n0", {"GPU": 4, "CPU": 9})],
    ),
    "ten tenths on one": (
        split(Pool(1), 1, ServicePool(10, gpus=0.1), ServicePool(1, gpus=0)),
        [Node("n0", {"GPU": 3, "CPU": 99})],
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_placements_that_fit(name: str) -> None:
    check_placement(PACKED[name][0], ALL, PACKED[name][1], "cuda")


LEFT_OUT = {
    "TP 4 where the total is enough": (
        split(Pool(1, gpus=4), 13, ServicePool(1, gpus=0), ServicePool(1, gpus=0)),
        [
            Node("a", {"GPU": 8, "CPU": 64}),
            Node("b", {"GPU": 8, "CPU": 64}),
            Node("c", {"GPU": 1, "CPU": 64}),
        ],
        "placement: rollout process 1 of 1 needs 4 GPU and 1 CPU on one node, and the best node, b, has 3 GPU "
        "and 59 CPU left: lower placement.rollout.gpus or add a node",
    ),
    "TP 4 on nodes of two": (
        split(Pool(2, gpus=4), 1, HALF, HALF),
        [Node(f"n{index}", {"GPU": 2, "CPU": 64}) for index in range(8)],
        "placement: rollout process 1 of 2 needs 4 GPU and 1 CPU on one node, and the best node, n1, has 2 GPU "
        "and 64 CPU left: lower placement.rollout.gpus or add a node",
    ),
    "0.6 and 0.6 share no GPU": (
        split(Pool(1), 1, ServicePool(2, gpus=0.6), ServicePool(1, gpus=0)),
        [Node("n0", {"GPU": 3.2, "CPU": 64})],
        "placement: plausibility process 2 of 2 needs 0.6 GPU and 1 CPU on one node, and the best node, n0, "
        "has 0.4 GPU and 61 CPU left: lower reward.terms.plausibility.pool.replicas or add a node",
    ),
    "CPUs of one node": (
        split(Pool(1, cpus=40), 1, HALF, ServicePool(1, cpus=30)),
        [Node("n0", {"GPU": 8, "CPU": 64}), Node("n1", {"GPU": 0, "CPU": 64})],
        "placement: coherence process 1 of 1 needs 1 GPU and 30 CPU on one node, and the best node, n0, has "
        "6 GPU and 23 CPU left: lower reward.terms.coherence.pool.cpus or add a node",
    ),
    "labels of a full node": (
        split(Pool(1), 8, HALF, ServicePool(2, labels={"zone": "a"})),
        [Node("n0", {"GPU": 9, "CPU": 64}, {"zone": "a"}), Node("n1", {"GPU": 8, "CPU": 64}, {"zone": "b"})],
        "placement: coherence process 2 of 2 needs 1 GPU and 1 CPU on one node with zone=a, and the best node, "
        "n0, has 0 GPU and 55 CPU left: lower reward.terms.coherence.pool.replicas or add a node",
    ),
    "custom resources of one node": (
        split(Pool(1), 1, HALF, ServicePool(1, resources={"slot": 2})),
        [Node(f"n{index}", {"GPU": 8, "CPU": 64, "slot": 1}) for index in range(2)],
        "placement: coherence process 1 of 1 needs 1 GPU and 1 CPU and 2 slot on one node, and the best node, "
        "n0, has 6 GPU and 62 CPU and 1 slot left: lower reward.terms.coherence.pool.resources.slot or add a "
        "node",
    ),
    "too few in total": (
        split(Pool(1, gpus=4), 13, HALF, ONE),
        eights(2),
        "placement needs 20 GPUs (rollout 4 + policy 13 + plausibility 1 + coherence 2), the cluster offers "
        "16: lower placement.policy.replicas or add a node",
    ),
    "a label that no node has": (
        split(Pool(1, labels={"zone": "in(c, d)"}), 1, HALF, ONE),
        eights(2, zone="a"),
        "placement.rollout.labels: no node of the cluster has zone=in(c, d): add one or change the labels",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_does_not_fit_is_named_in_one_line_with_the_way_out(name: str) -> None:
    asked, nodes, message = LEFT_OUT[name]
    with pytest.raises(NoRoomError) as error:
        check_placement(asked, ALL, nodes, "cuda")
    assert str(error.value) == message


def test_ranks_fill_the_emptiest_node_as_a_packed_group_does() -> None:
    nodes = [Node("n0", {"GPU": 4, "CPU": 64}), Node("n1", {"GPU": 8, "CPU": 64})]
    asked = Config(placement=Placement(rollout=Pool(1, gpus=8), policy=Pool(4)))
    with pytest.raises(NoRoomError, match=r"rollout process 1 of 1 needs 8 GPU .* has 4 GPU"):
        check_placement(asked, ["rollout", "policy"], nodes, "cuda")


def test_a_copy_of_the_model_lies_on_one_node() -> None:
    nodes = [Node("n0", {"GPU": 6, "CPU": 64}), Node("n1", {"GPU": 6, "CPU": 64})]
    asked = Config(placement=Placement(policy=Pool(8)), policy=PolicyConfig(fsdp_size=4))
    check_placement(asked, ["policy"], nodes, "cuda")
    asked.placement.rollout = Pool(2, gpus=2)  # beside the ranks of each
    check_placement(asked, ["policy", "rollout"], nodes, "cuda")
    asked.placement.policy.replicas = 12
    with pytest.raises(NoRoomError) as error:
        check_placement(asked, ["policy"], nodes, "cuda")
    assert str(error.value) == (
        "placement: policy group 3 of 3, 4 ranks together, needs 4 GPU and 4 CPU on one node, and the "
        "best node, n0, has 2 GPU and 60 CPU left: lower placement.policy.replicas or add a node"
    )
    asked.policy.fsdp_size = 12
    with pytest.raises(NoRoomError, match=r"needs 12 GPU .*, n0, has 6 GPU .*: lower policy\.fsdp_size or"):
        check_placement(asked, ["policy"], nodes, "cuda")


def test_shared_gpus_count_once() -> None:
    placement = Placement(rollout=Pool(2, gpus=2, cpus=4), policy=Pool(4, cpus=3))
    apart, shared = Config(placement=placement), Config(placement=replace(placement))
    shared.placement.colocate = ["rollout", "policy"]
    roles = ["rollout", "policy", "verifier"]
    assert totals(apart, roles, "cuda") == {"GPU": 8, "CPU": 2 * 4 + 4 * 3}
    # Its part of a replica in each rank's bundle, also where one of the two is not used.
    for used in (roles, ["rollout"], ["policy"]):
        assert totals(shared, used, "cuda") == {"GPU": 4, "CPU": 4 * (3 + 4 / 2)}
    assert totals(shared, ["verifier"], "cuda") == {"GPU": 0, "CPU": 0}
    # The GPUs of a replica lie on one node.
    check_placement(shared, roles, [Node(f"n{index}", {"GPU": 3, "CPU": 10}) for index in range(2)], "cuda")
    scattered = [
        Node("n0", {"GPU": 3, "CPU": 10}),
        *(Node(f"n{index}", {"GPU": 1, "CPU": 10}) for index in (1, 2)),
    ]
    with pytest.raises(NoRoomError, match=r"policy group 2 of 2, 2 ranks together, needs 2 GPU and 10 CPU"):
        check_placement(shared, roles, scattered, "cuda")
    local = local_resources(shared, roles, "cpu")
    check_placement(shared, roles, [Node("n0", {"CPU": local["num_cpus"]})], "cpu")


def test_auto_is_no_word_for_cpu_on_a_joined_cluster() -> None:
    auto = Config()
    assert resolve_joined_device(auto, ["policy"], 8) == "cuda"
    assert resolve_joined_device(auto, ["verifier"], 0) == "cpu"  # which could use no GPU
    with pytest.raises(
        UserError, match=r"auto .* no GPU: set placement\.device=cpu, or cuda and .*wait"
    ) as error:
        resolve_joined_device(auto, ["policy"], 0)
    assert not isinstance(error.value, NoRoomError)  # nothing to wait for
    named = Config(placement=Placement(device=Device.cpu))
    assert resolve_joined_device(named, ["policy"], 0) == "cpu"
    named.placement.device = Device.cuda
    with pytest.raises(NoRoomError):
        resolve_joined_device(named, ["policy"], 0)


def test_environments_are_what_each_role_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5_0")
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    on_gpus, on_cpu = (environments(CLUSTER, ALL, device) for device in ("cuda", "cpu"))
    assert list(on_gpus) == ["rollout", "policy", "plausibility", "coherence"]
    assert {variables["NCCL_IB_HCA"] for variables in on_gpus.values()} == {"mlx5_0"}
    assert on_gpus["rollout"]["VLLM_CACHE_ROOT"].endswith("/vllm")
    assert "VERL_PLATFORM" not in on_gpus["policy"]
    assert on_gpus["policy"]["NCCL_CUMEM_ENABLE"] == "0"
    assert on_cpu["policy"]["VERL_PLATFORM"] == "cpu"
    assert on_cpu["policy"]["OMP_NUM_THREADS"] == "4"
    assert "VLLM_CACHE_ROOT" not in on_cpu["rollout"]
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/scratch/vllm")
    assert environments(CLUSTER, ["rollout"], "cuda")["rollout"]["VLLM_CACHE_ROOT"] == "/scratch/vllm"
