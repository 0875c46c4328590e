"""The one stream of sampled and scored rows: rollout hands over completions while others still decode, a
scorer turns each into a row, and a row is on disk as soon as it is whole. What an interruption left is not
asked again.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pns.files import append_jsonl, cut_rows, read_jsonl
from pns.records import Problem, from_json
from pns.stages.context import Context
from workers.rollout.engine import Request, Sample, Sampling

Row = TypeVar("Row")


def stable_seed(*parts: object) -> int:
    """A 31-bit seed from any printable parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Ask:
    """A completion that is wanted; `key` names its row."""

    key: str
    problem: Problem
    sample: int  # its number among the problem's completions
    seed: int
    sampling: Sampling


class RowScorer(Protocol[Row]):
    """Takes finished samples while others decode, and gives back a row for each."""

    def submit(self, samples: Sequence[tuple[Ask, Sample]]) -> None: ...

    def finished(self, wait: bool) -> list[tuple[str, Row]]:
        """(key, row) of the rows that have become whole since the last call; `wait`: of all the rest."""
        ...


class Unfinished(Generic[Row]):
    """The whole rows of work that is under way, by key, on disk and in memory."""

    def __init__(self, path: Path, record: type, key: Callable[[Row], str]) -> None:
        self._path, self._key = path, key
        self.rows: dict[str, Row] = {}
        if path.exists():
            cut_rows(path)  # at a line that was being written
            for values in read_jsonl(path):
                row: Row = from_json(record, values)
                self.rows[key(row)] = row

    def add(self, rows: Iterable[Row]) -> None:
        by_key = {self._key(row): row for row in rows}
        if by_key:
            append_jsonl(self._path, by_key.values())
            self.rows |= by_key

    def drop(self, keys: Iterable[str]) -> None:
        """Forget rows that have been written elsewhere."""
        for key in keys:
            self.rows.pop(key, None)
        if not self.rows:
            self._path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all of it."""
        self.drop(list(self.rows))


def stream(
    ctx: Context,
    asks: Sequence[Ask],
    scorer: RowScorer[Row],
    unfinished: Unfinished[Row],
    keep: Callable[[Row], bool],
    model: str | None = None,
    label: str = "",
    sampled: Callable[[Context, Sequence[Ask]], Iterator[list[Any]]] | None = None,
) -> list[Row]:
    """The row of every ask, in order. Each is kept in `unfinished` as soon as it is whole (if `keep` says so:
    one whose reward failed is asked again after an interruption), and one that is there already is not
    sampled again.

    `model` is loaded first where something is missing; None: rollout has its weights. Neither order, number
    of replicas nor interruption changes a sample: it depends on the seed of its ask alone. `label`: what
    progress is called. `sampled`: yields the samples of asks in the place of rollout, with their keys as ids.
    """
    rows = {ask.key: unfinished.rows[ask.key] for ask in asks if ask.key in unfinished.rows}
    missing = {ask.key: ask for ask in asks if ask.key not in rows}
    if missing and model is not None:
        ctx.fleet.rollout.load(model)

    def take(wait: bool) -> None:
        whole = dict(scorer.finished(wait))
        rows.update(whole)
        unfinished.add(row for row in whole.values() if keep(row))  # on disk before the next one comes

    for samples in (sampled or _rollout)(ctx, list(missing.values())):
        scorer.submit([(missing[sample.id], sample) for sample in samples])
        take(wait=False)
        if label:
            ctx.track.part(label, len(rows), len(asks))
    while len(rows) < len(asks):
        take(wait=True)  # row by row: what is whole is kept, however long the others take
        if label:
            ctx.track.part(label, len(rows), len(asks))
    return [rows[ask.key] for ask in asks]


def _rollout(ctx: Context, asks: Sequence[Ask]) -> Iterator[list[Sample]]:
    for sampling, requests in _requests(ctx, asks).items():
        yield from ctx.fleet.rollout.stream(requests, sampling)


def _requests(ctx: Context, asks: Iterable[Ask]) -> dict[Sampling, list[Request]]:
    """Grouped by how they are sampled; a problem is encoded once."""
    grouped: dict[Sampling, list[Request]] = {}
    prompts: dict[str, tuple[int, ...]] = {}
    for ask in asks:
        problem = ask.problem
        prompt_key = f"{problem.suite}/{problem.id}"
        if prompt_key not in prompts:
            prompts[prompt_key] = ctx.prompts.encode(problem)
        request = Request(ask.key, prompts[prompt_key], ask.seed)
        grouped.setdefault(ask.sampling, []).append(request)
    return grouped
