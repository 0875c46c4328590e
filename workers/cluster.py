"""Ray, for as long as a run lasts."""

import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import ray
import torch
from ray.autoscaler.sdk import request_resources

from pns.config import Config
from pns.errors import UserError
from workers.packing import Node, counted, needed_together
from workers.placement import (
    NoRoomError,
    bundles,
    check_placement,
    local_resources,
    resolve_device,
    resolve_joined_device,
)
from workers.probe import check_nodes, local_models

_LOOK_SECONDS, _SAY_SECONDS = 1.0, 30.0  # of waiting for nodes: between looks, and between lines


class Cluster:
    """The cluster of RAY_ADDRESS (as in a submitted job), else a local one.

    Entering gives the device, "cpu" or "cuda", after the placement of `roles` has been checked against what
    the nodes offer, and, of a cluster that was joined, that every node sees files and has versions as the
    driver does (UserError).
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
        try:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, ValueError) as error:
            way_out = "start the cluster, or unset it to start Ray here"
            raise UserError(f"RAY_ADDRESS: {address}: {str(error).splitlines()[0]}: {way_out}") from error
        with ExitStack() as stack:
            stack.callback(ray.shutdown)  # `__exit__` is not called after a failed `__enter__`
            device = self._wait_for_room()
            models = local_models(self._config, self._roles)
            limit_seconds = self._config.placement.start_timeout_seconds
            check_nodes(Path(self._config.runs).absolute(), models, limit_seconds)
            stack.pop_all()
        return device

    def _wait_for_room(self) -> str:
        """The device, once the nodes have what is asked for; an autoscaler is told what that is."""
        limit = self._config.placement.wait_for_nodes_seconds
        began, said = time.monotonic(), float("-inf")
        with ExitStack() as stack:
            while True:
                try:
                    return self._check_room()
                except NoRoomError as fault:
                    now = time.monotonic()
                    if now - began >= limit:
                        waited = f"waited {limit:g} s (placement.wait_for_nodes_seconds): " if limit else ""
                        raise UserError(f"{waited}{fault}") from None
                    if said < began:
                        # A request stands until another one is made.
                        stack.callback(request_resources, bundles=[])
                        self._request_nodes()
                    if now - said >= _SAY_SECONDS:
                        said = now
                        print(f"waiting for nodes: {fault}", file=sys.stderr, flush=True)
                time.sleep(_LOOK_SECONDS)

    def _check_room(self) -> str:
        nodes = live_nodes()
        cluster_gpus = sum(node.resources.get("GPU", 0) for node in nodes)
        device = resolve_joined_device(self._config, self._roles, cluster_gpus)
        check_placement(self._config, self._roles, nodes, device)
        return device

    def _request_nodes(self) -> None:
        """Only on a device that the recipe names is waited for nodes without any GPU there."""
        device = self._config.placement.device.value
        asked = counted(bundles(self._config, self._roles, "cpu" if device == "cpu" else "cuda"))
        on_a_node = [b for b in asked for _ in range(b.replicas // b.together)]
        shapes = [{unit: amount for unit, amount in needed_together(b).items() if amount} for b in on_a_node]
        request_resources(bundles=shapes, bundle_label_selectors=[b.labels for b in on_a_node])

    def _start(self) -> str:
        gpus = torch.cuda.device_count()
        device = resolve_device(self._config.placement.device, gpus)
        resources = local_resources(self._config, self._roles, device)
        # Before Ray starts, which takes seconds. All but GPUs are logical here, and enough.
        offered = {"CPU": resources["num_cpus"], "GPU": gpus} | resources["resources"]
        check_placement(self._config, self._roles, [Node("this machine", offered)], device)
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **resources
        )
        return device


def live_nodes() -> list[Node]:
    """The nodes of the cluster that Ray is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeName"], node["Resources"], node["Labels"]) for node in alive]
