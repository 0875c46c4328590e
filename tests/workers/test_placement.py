"""Placement arithmetic, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pns.config import (
    Config,
    Device,
    Endpoint,
    Placement,
    Pool,
    RewardConfig,
    RewardTerm,
    ServicePool,
    TermKind,
)
from pns.errors import UserError
from workers.placement import (
    bundles,
    check_labels,
    check_placement,
    local_resources,
    resolve_device,
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
    coherence=ServicePool(1, gpus=2, cpus=0),
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
    check_placement(CLUSTER, ["rollout", "verifier"], {"GPU": 4, "CPU": 8}, "cuda")


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
    check_placement(config, ["coherence"], {}, "cuda")


def test_no_role_takes_a_gpu_on_cpu() -> None:
    assert totals(CLUSTER, ALL, "cpu") == {"GPU": 0, "CPU": 8 + 16 + 2}


def test_a_policy_rank_has_a_whole_cpu() -> None:
    small = configure(Pool(cpus=0.5), Pool(replicas=2, cpus=0.5), ServicePool(cpus=0), ServicePool(cpus=0))
    assert totals(small, ALL, "cpu")["CPU"] == 0.5 + 2 * 1


def test_enough_is_enough() -> None:
    check_placement(CLUSTER, ALL, {"GPU": 11, "CPU": 26}, "cuda")
    check_placement(CLUSTER, ALL, {"CPU": 26}, "cpu")


def test_gpu_shortage_names_both_numbers_and_the_way_out() -> None:
    asked = configure(Pool(4), Pool(4), ServicePool(1, gpus=0), ServicePool(1))
    with pytest.raises(UserError) as error:
        check_placement(asked, ALL, {"GPU": 8, "CPU": 64}, "cuda")
    assert str(error.value) == (
        "placement needs 9 GPUs (rollout 4 + policy 4 + coherence 1), the cluster offers 8: "
        "lower placement.rollout.replicas or add a node"
    )


def test_a_term_is_lowered_under_its_own_key() -> None:
    asked = configure(Pool(1), Pool(1), ServicePool(1), ServicePool(8))
    with pytest.raises(UserError, match=r"lower reward\.terms\.coherence\.pool\.replicas or add a node"):
        check_placement(asked, ALL, {"GPU": 8, "CPU": 64}, "cuda")


def test_cpu_shortage() -> None:
    addends = r"rollout 8 \+ policy 16 \+ plausibility 2"
    with pytest.raises(UserError, match=rf"needs 26 CPUs \({addends}\), the cluster offers 16: "):
        check_placement(CLUSTER, ALL, {"CPU": 16}, "cpu")


def test_a_single_replica_cannot_be_lowered() -> None:
    asked = configure(Pool(1, gpus=8), Pool(1), ServicePool(1), ServicePool(1))
    with pytest.raises(UserError, match=r"lower placement\.rollout\.gpus or add a node"):
        check_placement(asked, ALL, {"GPU": 8, "CPU": 64}, "cuda")


@pytest.mark.parametrize("gpus", [0.5, 0.25])
def test_two_policy_ranks_share_no_gpu(gpus: float) -> None:
    shared = Config(placement=Placement(policy=Pool(2, gpus=gpus)))
    with pytest.raises(UserError, match=rf"placement\.policy\.gpus: {gpus} lets .*\.replicas=1") as error:
        check_placement(shared, ["policy"], {"GPU": 8, "CPU": 64}, "cuda")
    assert "\n" not in str(error.value)
    check_placement(shared, ["policy"], {"CPU": 64}, "cpu")
    for pool in (Pool(1, gpus=gpus), Pool(2, gpus=0.6)):  # ranks of 0.6 cannot meet on one
        alone = Config(placement=Placement(policy=pool))
        check_placement(alone, ["policy"], {"GPU": 8, "CPU": 64}, "cuda")


def test_resolve_device() -> None:
    assert resolve_device(Device.auto, 0) == "cpu"
    assert resolve_device(Device.auto, 2) == "cuda"
    assert resolve_device(Device.cpu, 2) == "cpu"
    with pytest.raises(UserError, match=r"placement\.device is cuda and the cluster offers no GPU"):
        resolve_device(Device.cuda, 0)


@pytest.mark.parametrize("asked", [CLUSTER, Config()])
def test_local_resources_are_enough_for_the_placement(asked: Config) -> None:
    local = local_resources(asked, ALL, "cpu")
    check_placement(asked, ALL, {"CPU": local["num_cpus"], "GPU": local["num_gpus"]}, "cpu")
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
    check_placement(asked, ["plausibility"], {"CPU": 2, "scorer": 1}, "cpu")
    with pytest.raises(UserError) as error:
        check_placement(asked, ["plausibility"], {"CPU": 2}, "cpu")
    assert str(error.value) == (
        "placement needs 1 of the resource scorer (plausibility 1), the cluster offers 0: "
        "lower reward.terms.plausibility.pool.replicas or add a node"
    )
    check_labels(asked, ["plausibility"], [{"zone": "b"}, {"zone": "a", "other": "c"}])
    with pytest.raises(UserError, match=r"plausibility\.pool\.labels: no node of the cluster has zone=a: "):
        check_labels(asked, ["plausibility"], [{"zone": "b"}])
    asked.reward.terms["coherence"].pool.labels = {"zone": "b"}
    with pytest.raises(UserError, match=r"coherence\.pool\.labels\.zone: b; another pool asks for a"):
        local_resources(asked, ALL, "cpu")
