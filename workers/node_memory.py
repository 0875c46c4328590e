"""Peak memory of the nodes of a cluster, host and GPUs, by a small actor on each."""

import threading
from typing import Any, Self

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_INTERVAL_SECONDS = 5.0
_LIMIT_SECONDS = 10.0  # for the nodes to answer at the end
_GIB = 2**30


def gpu_gib() -> list[float]:
    """Used memory of each GPU of this machine, by everything on it; empty where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library or no driver: whatever it is called, there is nothing to read
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    return [pynvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB for handle in handles]


class Watcher:
    """On one node: the highest readings since it began."""

    def __init__(self) -> None:
        self._host_gib, self._gpu_gib = 0.0, gpu_gib()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._read()
            threading.Event().wait(_INTERVAL_SECONDS)

    def _read(self) -> None:
        self._host_gib = max(self._host_gib, psutil.virtual_memory().used / _GIB)
        self._gpu_gib = [max(both) for both in zip(self._gpu_gib, gpu_gib(), strict=True)]

    def peaks(self) -> dict[str, Any]:
        """`host_gib`, of `host_total_gib`, and `gpu_gib` of each GPU."""
        self._read()
        total = psutil.virtual_memory().total / _GIB
        return {"host_gib": self._host_gib, "host_total_gib": total, "gpu_gib": self._gpu_gib}


class NodeMemory:
    """While the block runs, every node that was there at its beginning is watched."""

    def __enter__(self) -> Self:
        self._watchers = {
            node["NodeManagerAddress"]: ray.remote(Watcher)
            .options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            )
            .remote()
            for node in ray.nodes()
            if node["Alive"]
        }
        return self

    def __exit__(self, *error: object) -> None:
        for watcher in self._watchers.values():
            ray.kill(watcher)

    def peaks(self) -> dict[str, dict[str, Any]]:
        """Address of a node -> `Watcher.peaks`; without nodes that have gone or do not answer."""
        asked = {watcher.peaks.remote(): address for address, watcher in self._watchers.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LIMIT_SECONDS)
        found = {}
        for reference in answered:
            try:
                found[asked[reference]] = ray.get(reference)
            except ray.exceptions.RayActorError:  # its node has gone
                continue
        return dict(sorted(found.items()))
