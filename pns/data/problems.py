"""Problems of a run, from the tiny world or from local files, checked before anything starts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pns.config import Config, DataSource
from pns.data import tiny_world
from pns.errors import UserError
from pns.records import Problem


@dataclass(frozen=True)
class ProblemSets:
    """The run's problems: `train` for RL, `reward` for the reward models, `preference` for synthesis and pairs, `suites` for evaluation."""

    train: list[Problem]
    reward: list[Problem]
    preference: list[Problem]
    suites: dict[str, list[Problem]]


def load_problem_sets(config: Config) -> ProblemSets:
    """All problems of the run. Raises UserError for a missing, empty or malformed file (file and line number)."""
    data = config.data
    if data.source is DataSource.tiny:
        tiny = data.tiny
        return ProblemSets(
            train=tiny_world.problems("train", None, tiny.num_train, config.seed),
            reward=tiny_world.problems("reward", None, tiny.num_reward, config.seed),
            preference=tiny_world.problems("preference", None, tiny.num_preference, config.seed),
            # The test problems are the same whatever the run's seed: scores of different runs compare.
            suites={suite: tiny_world.problems("test", suite, tiny.num_test_per_suite, 0) for suite in tiny_world.SUITES},
        )
    files = data.jsonl
    return ProblemSets(
        train=read_problems(Path(files.train), "train", files.limit),
        reward=read_problems(Path(files.reward or files.train), "reward", files.limit),
        preference=read_problems(Path(files.preference or files.train), "preference", files.limit),
        suites={suite: read_problems(Path(path), suite, files.limit) for suite, path in files.suites.items()},
    )


def read_problems(path: Path, suite: str, limit: int = 0) -> list[Problem]:
    """The problems of a `.jsonl` or `.jsonl.gz` file, at most `limit` (0: all).

    Records marked with a `note` (known to be broken) and no answer are left out; any other record without a problem or an answer is an
    error, as is a malformed line, a duplicate id or a file without problems. Raises UserError.
    """
    found: list[Problem] = []
    seen: set[str] = set()
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not a JSON object ({error.msg}); mend or remove the line") from error
        if not isinstance(record, dict):
            raise UserError(f'{where}: not a JSON object; every line needs {{"problem": ..., "answer": ...}}')
        for key in ("problem", "answer"):
            if not isinstance(record.get(key), str):
                raise UserError(f"{where}: field {key!r} is missing or not a string")
        if record.get("note") and not record["answer"]:
            continue
        if not record["problem"].strip() or not record["answer"].strip():
            raise UserError(f"{where}: empty problem or answer; remove the line")
        identity = str(record.get("id", f"{path.stem}/{number}"))
        if identity in seen:
            raise UserError(f"{where}: id {identity!r} occurs twice; ids must be unique")
        seen.add(identity)
        found.append(Problem(identity, record["problem"], record["answer"], suite, record.get("solution")))
        if limit and len(found) == limit:
            break
    if not found:
        raise UserError(f"{path}: no problems in it; name a file with one JSON object a line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
