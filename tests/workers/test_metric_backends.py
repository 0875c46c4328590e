"""Metrics where a cluster's Prometheus finds them."""

from __future__ import annotations

import re
import time
import urllib.request

import ray

from workers.metric_backends import open_backends


def exported(metric: str, limit_seconds: float = 60.0) -> list[str]:
    """The lines of a metric on the port that Prometheus reads, once there are any."""
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        with urllib.request.urlopen(address, timeout=10) as reply:
            text = reply.read().decode()
        if found := [line for line in text.splitlines() if re.match(rf"(ray_)?{metric}\b", line)]:
            return found
        time.sleep(1)
    return []


def test_metrics_are_gauges_of_run_and_stage(ray_session: None) -> None:
    backends = open_backends("pns", "small", ["ray"])
    backends.log({"rl/accuracy": 0.25, "rl/masked/verdict/timeout": 2.0}, 0)
    backends.log({"rl/accuracy": 0.5, "reverse_rl/accuracy": 0.75}, 1)
    found = "\n".join(exported("pns_accuracy"))
    for stage, value in (("rl", "0.5"), ("reverse_rl", "0.75")):
        [line] = [line for line in found.splitlines() if f'stage="{stage}"' in line]
        assert 'run="small"' in line
        assert line.endswith(f" {value}")
    assert "2.0" in exported("pns_masked_verdict_timeout")[0]
    backends.finish()
