"""Ray, for as long as a run lasts."""

import os
import signal
from collections.abc import Collection

import ray
import torch

from pns.config import Config
from pns.errors import UserError
from workers.placement import check_labels, check_placement, local_resources, resolve_device


class Cluster:
    """The cluster of RAY_ADDRESS (as in a submitted job), else a local one.

    Entering gives the device, "cpu" or "cuda", after the placement of `roles` has been checked against what
    the cluster offers (UserError).
    """

    def __init__(self, config: Config, roles: Collection[str]) -> None:
        self._config, self._roles = config, roles

    def __enter__(self) -> str:
        address = os.environ.get("RAY_ADDRESS")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            return self._join(address) if address else self._start()
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # `ray.init` puts its own in the place of the command's

    def __exit__(self, *error: object) -> None:
        ray.shutdown()

    def _join(self, address: str) -> str:
        # The workers' output stays in Ray's log files: the driver's shows the run.
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        offered = ray.cluster_resources()
        try:
            device = resolve_device(self._config.placement.device, offered.get("GPU", 0))
            check_placement(self._config, self._roles, offered, device)
            check_labels(self._config, self._roles, [node["Labels"] for node in ray.nodes() if node["Alive"]])
        except UserError:
            ray.shutdown()  # `__exit__` is not called after a failed `__enter__`
            raise
        return device

    def _start(self) -> str:
        gpus = torch.cuda.device_count()
        device = resolve_device(self._config.placement.device, gpus)
        resources = local_resources(self._config, self._roles, device)
        # Before Ray starts, which takes seconds. All but GPUs are logical here, and enough.
        offered = {"CPU": resources["num_cpus"], "GPU": gpus} | resources["resources"]
        check_placement(self._config, self._roles, offered, device)
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **resources
        )
        return device
