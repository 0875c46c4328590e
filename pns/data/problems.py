"""Problems of a run: the tiny world, named sets or local files, checked before anything starts."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pns.answers.compare import same_answer
from pns.answers.extract import boxed_span
from pns.config import Config, Data, DataSource, external_pairs
from pns.data.benchmarks import BENCHMARKS, TRAINING_SETS, Hub, ProblemSet, content_hash, decodings
from pns.data.checker import Checker
from pns.data.decontamination import Overlap, Overlaps, decontaminate
from pns.data.tables import table_rows
from pns.errors import UserError
from pns.records import AnswerRule, Problem
from pns.tiny import world as tiny_world

TRAINING = ("train", "reward", "preference")
# What others call the fields of a problem.
_OTHER_NAMES = {
    "problem": ("question", "prompt", "query", "instruction", "input", "Problem", "Question"),
    "answer": ("final_answer", "expected_answer", "solution", "target", "output", "gold", "Answer"),
}
_SUITES_SEED = 0


@dataclass(frozen=True)
class Identity:
    """Which problems a suite has: where they are from, the number of records, their `content_hash`, and the
    ids of records that the source marks as broken and that have no answer: they are not asked."""

    source: str
    count: int
    sha256: str
    without_answer: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProblemSets:
    """The run's problems: `train` for RL, `reward` for the reward models, `preference` for synthesis and
    pairs, `suites` for evaluation.

    `removed` are the overlaps with benchmarks for which problems of each training part were left out.
    `checker` judges derivations step by step, where the problems are of a kind that allows it."""

    train: list[Problem]
    reward: list[Problem]
    preference: list[Problem]
    suites: dict[str, list[Problem]]
    identities: dict[str, Identity] = field(default_factory=dict)
    removed: dict[str, list[Overlap]] = field(default_factory=dict)
    checker: Checker | None = None


def load_problem_sets(config: Config) -> ProblemSets:
    """All problems of the run. Raises UserError for a missing, empty, malformed, short or changed file (file
    and line number)."""
    data = config.data
    suites, identities = load_suites(config)
    if data.source is DataSource.tiny:
        sizes = vars(data.tiny)
        train, reward, preference = (
            tiny_world.problems(part, None, sizes[f"num_{part}"], config.seed) for part in TRAINING
        )
        checker = tiny_world.StepChecker()
        return ProblemSets(train, reward, preference, suites, identities, checker=checker)
    if external_pairs(config):
        return ProblemSets([], [], [], suites, identities)
    names = {part: getattr(data.jsonl, part) or data.jsonl.train for part in TRAINING}
    parts = {part: _training_problems(name, part, data) for part, name in names.items()}
    removed: dict[str, list[Overlap]] = {}
    if data.decontaminate:
        overlaps = Overlaps(benchmark_problems(suites, data))
        for part in TRAINING:
            kept, removed[part] = decontaminate(parts[part], overlaps)
            if not kept:
                fault = f"every problem of {names[part]} is also in a suite"
                raise UserError(f"data.jsonl.{part}: {fault}; name another file")
            parts[part] = kept
    train, reward, preference = (parts[part] for part in TRAINING)
    return ProblemSets(train, reward, preference, suites, identities, removed)


def load_suites(config: Config) -> tuple[dict[str, list[Problem]], dict[str, Identity]]:
    """The suites of an evaluation, and what they are. Raises UserError also for a wrong decoding."""
    suites, identities = _read_suites(config)
    decodings(config, suites)
    return suites, identities


def _read_suites(config: Config) -> tuple[dict[str, list[Problem]], dict[str, Identity]]:
    data = config.data
    suites: dict[str, list[Problem]] = {}
    identities: dict[str, Identity] = {}
    if data.source is DataSource.tiny:
        for suite in tiny_world.SUITES:
            # The same whatever the run's seed: scores of different runs compare.
            split = "reward" if data.tiny.development else "test"  # no language model is trained on either
            suites[suite] = tiny_world.problems(split, suite, data.tiny.num_test_per_suite, _SUITES_SEED)
            identities[suite] = _identity("tiny world", suites[suite])
        return suites, identities
    for name in data.benchmarks:
        suites[name], identities[name] = load_named(name, data)
        if data.jsonl.limit:
            suites[name] = suites[name][: data.jsonl.limit]
            first = f"the first {data.jsonl.limit} of {identities[name].source}"
            identities[name] = _identity(first, suites[name])
    for name, path in data.jsonl.suites.items():
        suites[name] = read_problems(Path(path), name, data.jsonl.limit, data.jsonl.fields)
        identities[name] = _identity(path, suites[name])
    return suites, identities


def load_named(
    name: str, data: Data, table: Mapping[str, ProblemSet] = BENCHMARKS
) -> tuple[list[Problem], Identity]:
    """A set of `table` (BENCHMARKS or TRAINING_SETS), from `data.root` or the Hub, checked. Raises UserError
    for an unknown name, a missing file, and a count or content that differs."""
    if name not in table:
        raise UserError(f"{name}: no set of that name; there are {', '.join(table)} (own files: data.jsonl)")
    expected = table[name]
    if data.root:
        root = Path(data.root)
        path = _local_file(name, root)
        files = [path] if path.is_file() else [_local_file(part, root) for part in expected.parts]
        if not files or not all(file.is_file() for file in files):
            parts = f" (nor are all of {', '.join(map(str, files))})" if files else ""
            way_out = "data.root names a directory that has the file"
            raise UserError(f"{name}: {path} does not exist{parts}; {way_out}")
        records = [record for file in files for record in read_records(file)]
        source, pinned, count = " and ".join(map(str, files)), False, expected.count
    else:
        if expected.hub is None:
            way_out = f"name a directory that has {name}.jsonl with data.root=DIR"
            raise UserError(f"{name}: no Hub copy of it is known; {way_out}")
        revision = data.revisions.get(name, expected.hub.revision)
        source = f"hf://{expected.hub.repository}@{revision}"
        records = list(read_hub(name, expected.hub, revision))
        pinned, count = revision == expected.hub.revision, expected.hub.count or expected.count
    if len(records) != count:
        fault = f"{source} has {len(records)} records, {count} are expected"
        raise UserError(f"{name}: {fault}; fetch the whole set again")
    digest = content_hash((record["problem"], record["answer"]) for record in records)
    if not pinned and digest != expected.sha256:
        fault = f"has sha256 {digest[:16]}..., {expected.sha256[:16]}... is expected"
        way_out = "fetch the set again, or name one of your own under data.jsonl.suites"
        consequence = f"{fault}, and its scores would not compare"
        raise UserError(f"{name}: the content of {source} {consequence}: {way_out}")
    problems = [problem for record in records if (problem := to_problem(record, name))]
    asked = {problem.id for problem in problems}
    without_answer = tuple(record["id"] for record in records if record["id"] not in asked)
    return problems, Identity(source, count, digest, without_answer)


def read_problems(
    path: Path, suite: str, limit: int = 0, fields: Mapping[str, str] | None = None
) -> list[Problem]:
    """The problems of a file of one's own, at most `limit` (0: all); `fields` as data.jsonl.fields.

    A number as answer is its text; of an answer with GSM8K's `####` that is what follows the last of them, of
    one with a box what is in the last box, and the whole is the solution where there is no other. Records
    marked with a `note` (known to be broken) and no answer are left out; any other record without a problem
    or an answer is an error, as is a malformed line, a duplicate id or a file without problems. Raises
    UserError.
    """
    records = read_records(path, fields or {}, _with_final_answer)
    answered = (problem for record in records if (problem := to_problem(record, suite)))
    problems = list(islice(answered, limit or None))
    if not problems:
        raise UserError(f"{path}: no problems in it; name a file with one JSON object a line")
    return problems


def read_training_problems(path: Path, part: str, data: Data) -> list[Problem]:
    """As `read_problems`. Raises UserError also for a text that is there twice, with answers that differ."""
    problems = read_problems(path, part, data.jsonl.limit, data.jsonl.fields)
    answers: dict[str, Problem] = {}
    for problem in problems:
        first = answers.setdefault(problem.prompt.strip(), problem)
        if first.answer.strip() == problem.answer.strip():
            continue
        if same_answer(first.answer, problem.answer, problem.rule) is False:
            fault = f"problems {first.id} and {problem.id} are the same text with different answers"
            shown = f"{first.answer[:40]!r} and {problem.answer[:40]!r}"
            raise UserError(f"{path}: {fault}, {shown}: mend or remove one")
    return problems


def num_repeated(problems: Sequence[Problem]) -> int:
    """How many have the text of an earlier one."""
    return len(problems) - len({problem.prompt.strip() for problem in problems})


def to_problem(record: Mapping[str, Any], suite: str) -> Problem | None:
    """The problem of a checked record; None for one marked as broken that has no answer."""
    if record.get("note") and not record["answer"]:
        return None
    tolerance, unit = float(record.get("error") or 0), str(record.get("unit") or "").strip("$")
    rule = AnswerRule(bool(record.get("multiple")), tolerance, unit)
    subject, level = str(record.get("subject") or ""), str(record.get("level") or "")
    described = record.get("solution"), subject, level.removeprefix("Level ")  # MATH says "Level 3"
    return Problem(record["id"], record["problem"], record["answer"], suite, *described, rule)


def read_records(
    path: Path,
    fields: Mapping[str, str] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The records of a file, each with an `id` of its own; of `fields` the names that the file has. `change`
    is called with each before it is checked. Raises UserError with file and line number."""
    seen: set[str] = set()
    for number, (where, record) in enumerate(table_rows(path), start=1):
        record |= {own: record[name] for own, name in (fields or {}).items() if name in record}
        if change is not None:
            change(record)
        yield _checked(record, where, f"{path.stem}/{number}", seen)


def _with_final_answer(record: dict[str, Any]) -> None:
    """The answer as text, without what leads to it."""
    answer = record.get("answer")
    if type(answer) in (int, float):  # no bool
        answer = str(answer)
    if isinstance(answer, str):
        final = answer.rpartition("####")[2].strip()
        if (span := boxed_span(final)) is not None:
            final = final[span[0] : span[1]]
        if final != answer.strip():
            record.setdefault("solution", answer)
        record["answer"] = final


def read_hub(name: str, hub: Hub, revision: str) -> Iterator[dict[str, Any]]:
    """The records of a Hub data set at a commit, with the names of fields and the form of answers that local
    files have. Raises UserError where it cannot be fetched or lacks a field."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    origin = f"{hub.repository} at {revision}"
    seen: set[str] = set()
    index = 0
    for config in hub.configs:
        try:
            rows = load_dataset(hub.repository, config, split=hub.split, revision=revision)
        except (DatasetsError, OSError, ValueError) as error:
            fault = f"{origin} cannot be fetched ({str(error).splitlines()[0]})"
            way_out = f"name a directory with {name}.jsonl with data.root=DIR"
            raise UserError(f"{name}: {fault}; {way_out}") from error
        if missing := set(hub.fields.values()) - set(rows.column_names):
            fault = f"{origin} has no field {sorted(missing)[0]!r}"
            raise UserError(f"{name}: {fault}; use the pinned revision")
        for row in rows:
            record = {key: row[field] for key, field in hub.fields.items()}
            record["answer"] = hub.answer(record["answer"])
            record["id"] = f"{name}/{record.get('id', index)}"
            if not record["answer"].strip():
                record |= {"answer": "", "note": "source answer is empty"}
            yield _checked(record, f"{hub.repository}, record {index}", record["id"], seen)
            index += 1


def _checked(record: dict[str, Any], where: str, identity: str, seen: set[str]) -> dict[str, Any]:
    for key in ("problem", "answer"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{where}: {_field_fault(record, key)}")
    record["id"] = str(record.get("id", identity))
    broken = record.get("note") and not record["answer"]
    if not broken and not (record["problem"].strip() and record["answer"].strip()):
        raise UserError(f"{where}: empty problem or answer; remove the line")
    if record["id"] in seen:
        raise UserError(f"{where}: id {record['id']!r} occurs twice; ids must be unique")
    seen.add(record["id"])
    return record


def _field_fault(record: Mapping[str, Any], key: str) -> str:
    if key in record:
        return f"field {key!r} is {json.dumps(record[key])[:40]}, and has to be text: mend or remove the line"
    there = ", ".join(str(name) for name in record) or "none"
    other = next((name for name in _OTHER_NAMES[key] if name in record), "NAME")
    return (
        f"field {key!r} is missing (there are: {there}); say which it is with data.jsonl.fields.{key}={other}"
    )


def removals(removed: Mapping[str, Sequence[Overlap]]) -> dict[str, Any]:
    """What decontamination left out, for decontamination.json: per part the number of problems, how many of
    them each suite accounts for, and the overlaps."""
    report = {}
    for part, overlaps in removed.items():
        # A problem that overlaps with several of one suite counts once there.
        pairs = {(overlap.suite, overlap.train_id) for overlap in overlaps}
        report[part] = {
            "problems": len({train_id for _, train_id in pairs}),
            "by_suite": dict(sorted(Counter(suite for suite, _ in pairs).items())),
            "overlaps": [vars(overlap) for overlap in overlaps],
        }
    return report


def _training_problems(name: str, part: str, data: Data) -> list[Problem]:
    if Path(name).is_file():
        return read_training_problems(Path(name), part, data)
    problems, _ = load_named(name, data, TRAINING_SETS)
    return problems[: data.jsonl.limit or None]


def benchmark_problems(suites: Mapping[str, list[Problem]], data: Data) -> Iterator[Problem]:
    """The suites' problems whole, whatever `limit` says, and those of every other set in `data.root`."""
    for name, problems in suites.items():
        if name in data.benchmarks and data.jsonl.limit:
            problems = load_named(name, data)[0]
        yield from problems
    if data.root:
        # In a fixed order: sets have another one in every process.
        for name in sorted(BENCHMARKS.keys() - suites.keys()):
            if _local_file(name, Path(data.root)).is_file():
                yield from load_named(name, data)[0]


def _identity(source: str, problems: list[Problem]) -> Identity:
    sha256 = content_hash((problem.prompt, problem.answer) for problem in problems)
    return Identity(source, len(problems), sha256)


def _local_file(name: str, root: Path) -> Path:
    """Where the set is below `root`, or where it would be."""
    folder = "benchmarks" if name in BENCHMARKS else "train"
    paths = [base / f"{name}{end}" for base in (root / folder, root) for end in (".jsonl", ".jsonl.gz")]
    return next((path for path in paths if path.is_file()), paths[0])
