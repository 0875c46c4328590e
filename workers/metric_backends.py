"""Metric backends through verl's `Tracking`: tensorboard, wandb, mlflow, trackio and the others it knows."""

from typing import Any

from pns.errors import UserError


def open_backends(project: str, name: str, backends: list[str]) -> Any:
    """An open `Tracking` of the run `name`. UserError for a backend that is unknown or not installed."""
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
