"""Metric backends: gauges of Ray, for Prometheus, and through verl's `Tracking` tensorboard, wandb, mlflow,
trackio and the others it knows."""

import re
from collections.abc import Sequence
from typing import Any

from ray.util.metrics import Gauge

from pns.config import TrackingBackend
from pns.errors import UserError


class RayGauges:
    """Every metric as a gauge `pns_<metric>` with the tags `run` and `stage`, on the metrics port of the node
    that the driver is on, where a cluster's Prometheus reads it."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def log(self, data: dict[str, float], step: int) -> None:
        for key, value in data.items():
            stage, _, metric = key.partition("/")
            name = "pns_" + re.sub(r"\W", "_", metric)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, f"{metric} of the last step", ("run", "stage"))
            self._gauges[name].set(value, {"run": self._run, "stage": stage})

    def finish(self) -> None:
        self._gauges.clear()


class SeveralBackends:
    def __init__(self, backends: Sequence[Any]) -> None:
        self._backends = backends

    def log(self, data: dict[str, float], step: int) -> None:
        for backend in self._backends:
            backend.log(data, step)

    def finish(self) -> None:
        for backend in self._backends:
            backend.finish()


def open_backends(project: str, name: str, backends: list[str]) -> SeveralBackends:
    """Open backends of the run `name`. UserError for one that is unknown or not installed."""
    of_ray = TrackingBackend.ray.value
    opened: list[Any] = [RayGauges(name)] if of_ray in backends else []
    others = [backend for backend in backends if backend != of_ray]
    if others:
        opened.append(open_tracking(project, name, others))
    return SeveralBackends(opened)


def open_tracking(project: str, name: str, backends: list[str]) -> Any:
    """verl's `Tracking`. UserError as `open_backends`."""
    from verl.utils.tracking import Tracking  # many seconds, which most runs do not need

    unknown = sorted(set(backends) - set(Tracking.supported_backend))
    if unknown:
        known = ", ".join(sorted(Tracking.supported_backend))
        raise UserError(f"tracking.backends: {', '.join(unknown)} unknown; there are {known}")
    try:
        return Tracking(project, name, backends)
    except ImportError as error:
        way_out = "install the package (pip install 'pns[track]') or remove it"
        raise UserError(f"tracking.backends {backends}: {error}; {way_out}") from error
