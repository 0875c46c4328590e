"""Clusters of several nodes on one machine: each has a raylet, labels and resources of its own, and one sees
other files than the driver. All have the machine's address, versions and clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cluster_utils
from ray.util.placement_group import placement_group_table

from pns.config import (
    Config,
    Device,
    EngineKind,
    Models,
    Placement,
    Pool,
    RewardConfig,
    RewardTerm,
    RolloutEngine,
    ServicePool,
    TermKind,
)
from pns.errors import UserError
from workers.cluster import Cluster
from workers.fleet import Fleet
from workers.probe import View, _faults_of, _versions
from workers.reservation import release, reserve, slots
from workers.rewards.service import Outcome, ScoringPool
from workers.rollout.pool import RolloutPool
from workers.runtime import Runtime

CPU = Runtime(start_timeout_seconds=600)


@pytest.fixture(scope="module")
def nodes(without_ray: None) -> Iterator[cluster_utils.Cluster]:
    """A head, a node of zone a, and one of zone b with two slots."""
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=4, num_gpus=0, labels={"zone": "a"})
    cluster.add_node(num_cpus=4, num_gpus=0, labels={"zone": "b"}, resources={"slot": 2})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def address(nodes: cluster_utils.Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    return nodes.address


@pytest.fixture
def connected(address: str) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def configure(runs: Path, wait_seconds: float = 0.0, backbone: str = "", **pool: Any) -> Config:
    term = RewardTerm(TermKind.judge, 0.5, pool=ServicePool(cpus=0.5, **pool))
    placement = Placement(Device.cpu, wait_for_nodes_seconds=wait_seconds)
    terms = RewardConfig(terms={"coherence": term})
    return Config(runs=str(runs), models=Models(backbone), placement=placement, reward=terms)


def zone_of(node_id: str) -> str:
    [labels] = [node["Labels"] for node in ray.nodes() if node["NodeID"] == node_id]
    return labels.get("zone", "none")


def naps() -> Callable[[str], Any]:
    """Builds a model that sleeps for each number and answers with its node. It travels by value: workers do
    not import this module."""

    class Naps:
        def score(self, items: Sequence[float]) -> list[Outcome[str]]:
            for seconds in items:
                time.sleep(seconds)
            return [Outcome(ray.get_runtime_context().get_node_id()) for _ in items]

    return lambda _: Naps()


@contextmanager
def pool_of(**keys: Any) -> Iterator[ScoringPool[float, str]]:
    pool = ScoringPool[float, str]("naps", ServicePool(cpus=0.5, **keys), CPU, naps(), lambda _: 512)
    try:
        pool.load("-")
        yield pool
    finally:
        pool.shutdown()


def test_every_role_goes_where_its_labels_and_resources_are(connected: None) -> None:
    with pool_of(replicas=2, labels={"zone": "a"}) as pool:
        assert {zone_of(outcome.value or "") for outcome in pool.score([0.0] * 20)} == {"a"}
    engine = RolloutEngine(EngineKind.transformers)
    rollout = RolloutPool(Pool(gpus=0, cpus=0.5, labels={"zone": "!a"}, resources={"slot": 1}), engine, CPU)
    [actor] = rollout._actors
    where = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    assert zone_of(ray.get(where)) == "b"
    rollout.shutdown()
    [ranks] = reserve(Pool(2, labels={"zone": "in(b)"}, resources={"slot": 1}), CPU)
    assert {zone_of(node) for node in placement_group_table(ranks)["bundles_to_node_id"].values()} == {"b"}
    release([ranks])
    groups = reserve(Pool(4, cpus=2), CPU, on_a_node=2)  # each on one of the nodes, which have four CPUs
    placed = [set(placement_group_table(group)["bundles_to_node_id"].values()) for group in groups]
    assert [len(on_nodes) for on_nodes in placed] == [1, 1]
    assert {zone_of(node) for on_nodes in placed for node in on_nodes} == {"a", "b"}
    release(groups)
    with pytest.raises(UserError, match="each 3 on one node, and 1 s were"):
        reserve(Pool(3, cpus=2), Runtime(start_timeout_seconds=1), on_a_node=3)
    with pytest.raises(UserError, match=r"placement\.policy needs 1 x .* on nodes with zone=c, and 1 s were"):
        reserve(Pool(1, labels={"zone": "c"}), Runtime(start_timeout_seconds=1))


def test_a_cluster_is_joined_where_all_fits_and_all_nodes_see_the_runs(address: str, tmp_path: Path) -> None:
    with Cluster(configure(tmp_path / "runs", labels={"zone": "a"}), ["coherence"]) as device:
        assert device == "cpu"
    assert list((tmp_path / "runs").iterdir()) == []
    crowded = configure(tmp_path / "runs", replicas=3, resources={"slot": 1}, labels={"zone": "b"})
    with pytest.raises(UserError, match="needs 3 of the resource slot"), Cluster(crowded, ["coherence"]):
        pass
    wide = configure(tmp_path / "runs", replicas=9, labels={"zone": "a"})  # of nine CPUs four are there
    fault = (
        r"coherence process 9 of 9 needs 0\.5 CPU on one node with zone=a, .* has 0 CPU left: lower reward"
    )
    with pytest.raises(UserError, match=fault), Cluster(wide, ["coherence"]):
        pass
    wide.placement.device = Device.auto
    with (
        pytest.raises(UserError, match=r"offers no GPU: set placement\.device=cpu"),
        Cluster(wide, ["coherence"]),
    ):
        pass
    assert not ray.is_initialized()


@contextmanager
def node_of(first: str, address: str, *options: str) -> Iterator[None]:
    """A node that a shell starts, after the command `first`, in mount namespaces of its own where it can."""
    start = f"{sys.executable} -m ray.scripts.scripts start --address={address} --num-cpus=1 --num-gpus=0"
    command = ["sh", "-c", f"{first} && exec {start} --block {' '.join(options)}"]
    unshare = ["unshare", "-rm"] if can_unshare() else []
    process = subprocess.Popen(
        unshare + command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def can_unshare() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


def test_nodes_that_are_to_come_are_waited_for(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = configure(tmp_path, wait_seconds=0.5, labels={"zone": "c"})
    with (
        pytest.raises(UserError, match=r"^waited 0\.5 s \(placement\.wait_.*\): reward.* zone=c: add one"),
        Cluster(late, ["coherence"]),
    ):
        pass
    late.placement.wait_for_nodes_seconds = 600
    capsys.readouterr()
    with node_of("sleep 2", address, "--labels=zone=c"), Cluster(late, ["coherence"]) as device:
        assert device == "cpu"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("waiting for nodes")]
    assert len(said) == 1
    assert "no node of the cluster has zone=c" in said[0]


@pytest.fixture
def own_files(address: str, tmp_path: Path) -> Iterator[Path]:
    """A directory in whose place a fourth node, "apart", has an empty one: its processes see other mounts, and
    their working directory is another one."""
    own = tmp_path / "own"
    own.mkdir()
    with node_of(f"mount -t tmpfs none {own}", address, "--node-name=apart"):
        yield own


@pytest.mark.skipif(not can_unshare(), reason="needs mount namespaces")
def test_a_node_that_sees_other_files_is_named(own_files: Path, tmp_path: Path) -> None:
    def fault(config: Config, roles: list[str]) -> str:
        with pytest.raises(UserError) as error, Cluster(config, roles):
            pass
        return str(error.value)

    until_there = {"wait_seconds": 600, "backbone": str(own_files / "model")}
    (own_files / "model").mkdir()
    elsewhere = configure(own_files / "runs", **until_there)
    elsewhere.placement.rollout = Pool(cpus=1)
    elsewhere.placement.policy = Pool(10, cpus=1)  # all CPUs, with that of the fourth node
    assert fault(elsewhere, ["policy"]).startswith(
        f"node apart does not see {own_files}/runs as the driver on "
    )
    shared = configure(tmp_path / "runs", **until_there)
    assert fault(shared, ["rollout"]).startswith(
        f"node apart has no directory {own_files}/model, a model that"
    )
    assert [path.name for path in (*own_files.iterdir(), *(own_files / "runs").iterdir())] == [
        "model",
        "runs",
    ]


def test_each_difference_of_a_node_is_a_line_of_its_own(tmp_path: Path) -> None:
    """By hand, as all nodes of this machine have one environment."""
    (tmp_path / "n1").write_text("token")

    def faults(view: View) -> list[str]:
        return list(_faults_of(view, "10.0.0.3", tmp_path, "n1", "token"))

    here = _versions()
    assert faults(View("token", "", [], here)) == []
    [version] = faults(View("token", "", [], here | {"torch": "2.1.0"}))
    assert version.startswith("node 10.0.0.3 has torch 2.1.0, the driver on ")
    [unwritable] = faults(View("token", "Permission denied", [], here))
    assert f"10.0.0.3 cannot read and write {tmp_path.parent} (Permission denied): " in unwritable
    [unseen, model] = faults(View("", "", ["/m"], here))
    assert "does not see" in unseen
    assert "has no directory /m, a model that the driver on " in model


def test_a_fleet_fills_nodes_to_the_last_gpu(nodes: cluster_utils.Cluster, connected: None) -> None:
    """Four logical GPUs on two nodes: two ranks, a whole one and two halves, which wait for it. Ray finds a
    place for so few in any order; what is seen here is that those who wait come up, and all beside the ranks."""
    pairs = [nodes.add_node(num_cpus=8, num_gpus=2) for _ in range(2)]
    shares = {"halves": ServicePool(2, gpus=0.5, cpus=0), "whole": ServicePool(1, gpus=1, cpus=0)}
    terms = {name: RewardTerm(TermKind.judge, 0.5, pool=pool) for name, pool in shares.items()}
    config = Config(placement=Placement(policy=Pool(2)), reward=RewardConfig(terms=terms))
    fleet = Fleet(config, Runtime("cuda", start_timeout_seconds=600))
    try:
        fleet.start(["halves", "whole", "policy"])
        assert fleet.scorer("whole").replicas + fleet.scorer("halves").replicas == 3
        assert ray.available_resources().get("GPU", 0) == 0
    finally:
        fleet.shutdown()
    for node in pairs:
        nodes.remove_node(node)


def test_rollout_has_the_gpus_of_the_ranks_that_it_lies_beside(
    nodes: cluster_utils.Cluster, connected: None
) -> None:
    """Two logical GPUs, and both roles on them: Ray counts them as the policy's, and rollout is told them."""
    pair = nodes.add_node(num_cpus=8, num_gpus=2)
    placement = Placement(rollout=Pool(2), policy=Pool(2), colocate=["rollout", "policy"])
    config = Config(placement=placement, rollout=RolloutEngine(EngineKind.transformers))
    runtime = Runtime("cuda", start_timeout_seconds=600)
    fleet = Fleet(config, runtime)
    try:
        fleet.start(["rollout", "policy"])
        assert sorted(slot.gpu_ids for slot in fleet._slots) == [("0",), ("1",)]
        [both] = slots(fleet._ranks, 2, runtime)  # of a replica over two GPUs
        assert sorted(both.gpu_ids) == ["0", "1"]
        visible = [
            ray.get(actor.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"]))
            for actor in fleet.rollout._actors
        ]
        assert [(ids,) for ids in visible] == [slot.gpu_ids for slot in fleet._slots]
        assert ray.available_resources().get("GPU", 0) == 0
    finally:
        fleet.shutdown()
    nodes.remove_node(pair)


def test_a_node_is_lost_and_another_comes_while_its_pool_scores(
    nodes: cluster_utils.Cluster, connected: None
) -> None:
    first = nodes.add_node(num_cpus=2, num_gpus=0, labels={"zone": "d"})
    with pool_of(replicas=2, labels={"zone": "d"}) as pool:
        handle = pool.submit([0.02] * 300)  # 3 s for two
        while pool.stats().scored < 50:
            time.sleep(0.02)
        lost = next(outcome.value for future in handle if future.done() and (outcome := future.result()))
        nodes.remove_node(first)
        second = nodes.add_node(num_cpus=2, num_gpus=0, labels={"zone": "d"})
        outcomes = pool.collect(handle)
        stats = pool.stats()
    assert all(outcome.cause is None for outcome in outcomes)
    assert (len(outcomes), stats.scored, stats.failures) == (300, 300, {})
    assert len({outcome.value for outcome in outcomes} - {lost}) == 1  # the other node did the rest
    nodes.remove_node(second)
