"""What the report says of the memory of a cluster's nodes."""

from __future__ import annotations

import psutil
import ray

from workers.node_memory import NodeMemory


def test_every_node_says_its_peak(ray_session: None) -> None:
    with NodeMemory() as memory:
        peaks = memory.peaks()
    [node] = ray.nodes()
    assert list(peaks) == [node["NodeManagerAddress"]]
    [own] = peaks.values()
    total_gib = psutil.virtual_memory().total / 2**30
    assert 0 < own["host_gib"] <= own["host_total_gib"]
    assert abs(own["host_total_gib"] - total_gib) < 0.01
    assert all(gib >= 0 for gib in own["gpu_gib"])


def test_a_node_that_has_gone_is_left_out(ray_session: None) -> None:
    with NodeMemory() as memory:
        [watcher] = memory._watchers.values()
        ray.kill(watcher)
        assert memory.peaks() == {}
