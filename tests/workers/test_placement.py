"""Placement arithmetic, by hand."""

from __future__ import annotations

import pytest

from pns.config import Device, Placement, Pool
from pns.errors import UserError
from workers import placement

CLUSTER = Placement(
    rollout=Pool(4, gpus=1, cpus=2),
    policy=Pool(4, gpus=1, cpus=4),
    reward_model=Pool(2, gpus=0.5, cpus=1),
    judge=Pool(1, gpus=2, cpus=0),
)


def test_totals_on_gpus_count_fractions() -> None:
    assert placement.totals(CLUSTER, "cuda") == {"GPU": 4 + 4 + 2 * 0.5 + 2, "CPU": 8 + 16 + 2}


def test_no_role_takes_a_gpu_on_cpu() -> None:
    assert placement.totals(CLUSTER, "cpu") == {"GPU": 0, "CPU": 8 + 16 + 2}


def test_a_policy_rank_has_a_whole_cpu() -> None:
    small = Placement(
        rollout=Pool(cpus=0.5),
        policy=Pool(replicas=2, cpus=0.5),
        reward_model=Pool(cpus=0),
        judge=Pool(cpus=0),
    )
    assert placement.totals(small, "cpu")["CPU"] == 0.5 + 2 * 1


def test_enough_is_enough() -> None:
    placement.check(CLUSTER, {"GPU": 11, "CPU": 26}, "cuda")
    placement.check(CLUSTER, {"CPU": 26}, "cpu")


def test_gpu_shortage_names_both_numbers_and_the_way_out() -> None:
    asked = Placement(rollout=Pool(4), policy=Pool(4), reward_model=Pool(1, gpus=0), judge=Pool(1))
    with pytest.raises(UserError) as error:
        placement.check(asked, {"GPU": 8, "CPU": 64})
    assert str(error.value) == (
        "placement needs 9 GPUs (rollout 4 + policy 4 + judge 1), the cluster offers 8: lower placement.rollout.replicas or add a node"
    )


def test_cpu_shortage() -> None:
    with pytest.raises(
        UserError,
        match=r"placement needs 26 CPUs \(rollout 8 \+ policy 16 \+ reward_model 2\), the cluster offers 16: ",
    ):
        placement.check(CLUSTER, {"CPU": 16}, "cpu")


def test_a_single_replica_cannot_be_lowered() -> None:
    asked = Placement(rollout=Pool(1, gpus=8), policy=Pool(1), reward_model=Pool(1), judge=Pool(1))
    with pytest.raises(UserError, match=r"lower placement\.rollout\.gpus or add a node"):
        placement.check(asked, {"GPU": 8, "CPU": 64})


def test_resolve_device() -> None:
    assert placement.resolve_device(Device.auto, 0) == "cpu"
    assert placement.resolve_device(Device.auto, 2) == "cuda"
    assert placement.resolve_device(Device.cpu, 2) == "cpu"
    with pytest.raises(UserError, match=r"placement\.device is cuda and the cluster offers no GPU"):
        placement.resolve_device(Device.cuda, 0)


@pytest.mark.parametrize("asked", [CLUSTER, Placement()])
def test_local_resources_are_enough_for_the_placement(asked: Placement) -> None:
    local = placement.local_resources(asked, "cpu")
    placement.check(asked, {"CPU": local["num_cpus"], "GPU": local["num_gpus"]}, "cpu")
    assert local["num_gpus"] == 0
    assert set(placement.local_resources(asked, "cuda")) == {"num_cpus"}


def test_table_has_every_role_and_the_totals() -> None:
    text = placement.table(CLUSTER)
    assert [line.split()[0] for line in text.splitlines()] == [
        "role",
        "rollout",
        "policy",
        "reward_model",
        "judge",
        "total:",
    ]
    assert text.splitlines()[3].split() == ["reward_model", "2", "0.5", "1"]
    assert text.splitlines()[-1] == "total: 11 GPUs, 26 CPUs; 2 verifier processes"
    assert placement.table(CLUSTER, "cpu").splitlines()[-1].startswith("total: 0 GPUs")
