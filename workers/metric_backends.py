"""Metric backends through verl's `Tracking`: tensorboard, wandb, mlflow, trackio and the others it knows."""

from __future__ import annotations

from typing import Any

from pns.errors import UserError


def open_backends(project: str, name: str, backends: list[str]) -> Any:
    """An open `Tracking` of the run `name`. Raises UserError for an unknown backend or one whose package is
    not installed."""
    from verl.utils.tracking import Tracking

    unknown = sorted(set(backends) - set(Tracking.supported_backend))
    if unknown:
        known = ", ".join(sorted(Tracking.supported_backend))
        raise UserError(f"tracking.backends: {', '.join(unknown)} unknown; there are {known}")
    try:
        return Tracking(project, name, backends)
    except ImportError as error:
        raise UserError(
            f"tracking.backends {backends}: {error}; install the package (pip install 'pns[track]') or "
            "remove it"
        ) from error
