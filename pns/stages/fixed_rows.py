"""What the stages share that train on rows which are all there before the first step."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pns.errors import UserError
from pns.run.reference_cache import reference_log_probs
from pns.stages.context import Context
from workers.checkpoints import local_directory
from workers.training.batching import Batch


def select_rows(rows: Batch, indices: Sequence[int]) -> Batch:
    """The rows `indices`, in their order."""

    def of_taken(values: Sequence[object]) -> list:
        return [values[index] for index in indices]

    return Batch(
        of_taken(rows.prompt_ids),
        of_taken(rows.completion_ids),
        {name: of_taken(values) for name, values in rows.token_values.items()},
        {name: of_taken(values) for name, values in rows.row_values.items()},
    )


def kept_reference(ctx: Context, model: str, rows: Batch) -> Sequence[np.ndarray]:
    """Log-probabilities of every completion token under `model`, which the policy holds untrained: from the
    cache that all runs share, or computed and kept there."""
    return reference_log_probs(ctx.fleet.policy, ctx.shared / "reference_cache", local_directory(model), rows)


def stop_after_skipped(
    ctx: Context,
    stage: str,
    max_skipped_updates: int,
    step: int,
    history: Sequence[Mapping[str, float | None]],
    batch: Batch,
    places: Sequence[str],
) -> None:
    """Raises UserError, naming where rows of `step`'s batch are from (`places`, one a row), once more than
    `max_skipped_updates` updates of `history` were skipped because the loss or its gradient was not finite.
    The weights are as they were before the step."""
    num_skipped = sum(bool(metrics.get("update_skipped")) for metrics in history)
    ctx.place.count(updates_skipped=num_skipped)
    if num_skipped <= max_skipped_updates:
        return
    named = list(dict.fromkeys(places[row] for row in not_finite(ctx, batch))) or list(dict.fromkeys(places))
    others = f" and {len(named) - 1} more" if len(named) > 1 else ""
    raise UserError(
        f"{stage}: the loss or its gradient is not finite at step {step} ({named[0]}{others}): lower "
        f"{stage}.optimizer.learning_rate, or allow {stage}.max_skipped_updates"
    )


def not_finite(ctx: Context, batch: Batch) -> Iterator[int]:
    """The rows that have a log-probability that is not finite."""
    for row, log_probs_T in enumerate(ctx.fleet.policy.log_probs(batch)):
        if not np.isfinite(log_probs_T).all():
            yield row
