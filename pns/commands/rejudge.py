"""`pns evaluate --rejudge DIR`: the completions of an evaluation, judged again by the verifier of today."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pns.algo.scores import final_verdict, summarise
from pns.config import DataSource, Decoding
from pns.data.problems import load_suites
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_json, write_jsonl
from pns.recipe import read
from pns.records import Answered, Problem, Verdict, from_json, to_json
from pns.report.browse import write_pages

if TYPE_CHECKING:
    from workers.rewards.verifier import Verifier

ProblemKey = tuple[str, str]  # suite, id
ByKey = Mapping[ProblemKey, Problem]
OUT = "rejudged"  # beside the evaluation, which stays as it was
_BATCH = 256  # completions between two looks at the progress
_EXAMPLES = 10  # of changed verdicts that are shown
_VERDICTS = {Verdict.CORRECT: "right", Verdict.WRONG: "wrong", Verdict.UNVERIFIED: "undecided"}


def rejudge(
    directory: Path,
    processes: int,
    limit_seconds: float,
    overrides: Sequence[str] = (),
    new_golds: bool = False,
    console: Console | None = None,
) -> Path:
    """Judge every stored completion of a run or of an evaluation again, without its models, and print what
    changed. Writes <page>/rejudged: a JSON line a completion and model, scores.json, browse/, changed.jsonl
    (rows with the verdict and the reason that they had). Returns that directory; what it held before is
    replaced.

    How many gold answers differ now is said; `new_golds` judges by those. `overrides` (key=value) say where
    suites are read from, if not where they were. Raises UserError where there is no finished evaluation, or
    `new_golds` cannot be read.
    """
    console = console or Console()
    folder = evaluation_folder(directory)
    suites = read_json(folder / "suites.json")
    stored = {name: answered_rows(folder / f"{name}.jsonl") for name in stored_models(folder)}
    asked = {problem_key(row.problem): row.problem for rows in stored.values() for row in rows}
    now = problems_now(folder.parent, overrides, console, required=new_golds)
    golds = {key: problem for key, problem in asked.items() if key in now and differs(problem, now[key])}
    for line in gold_lines(asked, now, golds, new_golds):
        console.print(line, soft_wrap=True)
    from workers.rewards.verifier import Verifier

    verifier = Verifier(processes, limit_seconds)
    try:
        by = {key: now[key] for key in golds} if new_golds else {}
        judged = {name: judged_again(verifier, name, rows, by) for name, rows in stored.items()}
    finally:
        verifier.shutdown()
    out = folder.parent / OUT
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name, rows in judged.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    decodings = {suite: Decoding(**described["decoding"]) for suite, described in suites.items()}
    of_first_suite = next(iter(read_json(folder / "scores.json").values()))
    seed = next(iter(of_first_suite.values()))["seed"]
    write_json(out / "scores.json", summarise(judged, decodings, seed))
    write_pages(out / "browse", {name: [to_json(row) for row in rows] for name, rows in judged.items()})
    changed = [
        {"model": name} | to_json(new) | {"verdict_before": old.verdict.value, "reason_before": old.reason}
        for name, rows in judged.items()
        for old, new in zip(stored[name], rows, strict=True)
        if (old.verdict, old.reason) != (new.verdict, new.reason)
    ]
    write_jsonl(out / "changed.jsonl", changed)
    console.print(changes_table(stored, judged), examples_table(stored, judged), sep="\n")
    console.print(
        f"{out}: scores.json, changed.jsonl ({len(changed)} rows), browse/index.html", soft_wrap=True
    )
    return out


def evaluation_folder(directory: Path) -> Path:
    """Where the completions lie, of a page or of that folder itself."""
    for folder in (directory / "evaluate", directory):
        if (folder / "scores.json").is_file() and (folder / "suites.json").is_file():
            return folder
    way_out = "name the directory of a run or of `pns evaluate` whose evaluation is finished"
    raise UserError(f"--rejudge {directory}: no evaluate/scores.json there; {way_out}")


def stored_models(folder: Path) -> list[str]:
    """In the order of the scores."""
    names: dict[str, object] = next(iter(read_json(folder / "scores.json").values()), {})
    if missing := [name for name in names if not (folder / f"{name}.jsonl").is_file()]:
        raise UserError(f"--rejudge: {folder / missing[0]}.jsonl is missing, with the model's completions")
    return list(names)


def answered_rows(file: Path) -> list[Answered]:
    return [from_json(Answered, row) for row in read_jsonl(file)]


def problem_key(problem: Problem) -> ProblemKey:
    return problem.suite, problem.id


def problems_now(page: Path, overrides: Sequence[str], console: Console, required: bool) -> ByKey:
    """Those of the page's suites where they can be read without the Hub; else none, with the reason. Raises
    UserError if they are `required`."""
    try:
        config = read(page / "config.yaml", list(overrides))
        if config.data.source is DataSource.jsonl and config.data.benchmarks and not config.data.root:
            raise UserError("the sets are on the Hub: name a directory that has them with data.root=DIR")
        suites, _ = load_suites(config)
    except UserError as error:
        if required or overrides:
            raise
        console.print(f"gold answers are the stored ones ({error})", soft_wrap=True)
        return {}
    return {problem_key(problem): problem for own in suites.values() for problem in own}


def differs(before: Problem, now: Problem) -> bool:
    return (before.answer, before.rule) != (now.answer, now.rule)


def gold_lines(asked: ByKey, now: ByKey, golds: ByKey, new_golds: bool) -> Iterator[str]:
    """Of every suite with gold answers that differ now, or with problems that it no longer has."""
    taken = "those of now count" if new_golds else "the stored ones count (--new-golds: those of now)"
    for suite in dict.fromkeys(name for name, _ in asked) if now else ():
        names = [name for own, name in asked if own == suite]
        changed = [name for own, name in golds if own == suite]
        gone = sum((suite, name) not in now for name in names)
        if changed or gone:
            shown = f" ({', '.join(changed[:_EXAMPLES])})" if changed else ""
            counts = f"{len(changed)} differ now{shown}, {gone} are gone"
            yield f"{suite}: of {len(names)} gold answers {counts}; {taken}"


def judged_again(verifier: "Verifier", name: str, rows: Sequence[Answered], golds: ByKey) -> list[Answered]:
    """The rows with their verdicts of now, by the answer that `golds` has where it has one; of a problem that
    was not asked the verdict stays."""
    rows = [replace(row, problem=with_gold(row.problem, golds)) for row in rows]
    judged = []
    for start in track(range(0, len(rows), _BATCH), f"rejudge  {name}", transient=True):
        batch = rows[start : start + _BATCH]
        asked = [(row.problem.answer, row.completion, row.problem.rule) for row in batch]
        results = verifier.collect(verifier.submit(asked, for_negatives=False))
        for row, result in zip(batch, results, strict=True):
            if row.reason == "prompt_too_long":
                judged.append(row)
                continue
            verdict, reason = final_verdict(result.verdict, result.cause, result.extracted, row.finish_reason)
            extracted, said = result.extracted, result.reason
            judged.append(replace(row, extracted=extracted, verdict=verdict, reason=reason, detail=said))
    return judged


def with_gold(problem: Problem, golds: ByKey) -> Problem:
    now = golds.get(problem_key(problem), problem)
    return replace(problem, answer=now.answer, rule=now.rule)


def changes_table(
    stored: Mapping[str, Sequence[Answered]], judged: Mapping[str, Sequence[Answered]]
) -> Table:
    """Accuracies before and now, and the changes of verdicts, a row a model and suite."""
    table = Table("model", "suite", "n", "right before", "now", "changed", title="Judged again")
    for name, rows in judged.items():
        pairs = list(zip(stored[name], rows, strict=True))
        for suite in dict.fromkeys(row.problem.suite for row in rows):
            own = [(old, new) for old, new in pairs if new.problem.suite == suite]
            shares = [sum(row.verdict is Verdict.CORRECT for row in side) for side in zip(*own, strict=True)]
            kinds = Counter((old.verdict, new.verdict) for old, new in own if old.verdict is not new.verdict)
            changes = [f"{_VERDICTS[a]} -> {_VERDICTS[b]} {num}" for (a, b), num in kinds.most_common()]
            shown = [f"{100 * share / len(own):.1f} %" for share in shares]
            table.add_row(name, suite, str(len(own)), *shown, ", ".join(changes) or "-")
    return table


def examples_table(
    stored: Mapping[str, Sequence[Answered]], judged: Mapping[str, Sequence[Answered]]
) -> Table:
    """Some rows whose verdict changed."""
    table = Table(
        "problem", "gold", "answer", "before", "now", "because", title="Changed verdicts, some of them"
    )
    for name, rows in judged.items():
        for old, new in zip(stored[name], rows, strict=True):
            if old.verdict is not new.verdict and table.row_count < _EXAMPLES:
                verdicts = (_VERDICTS[old.verdict], _VERDICTS[new.verdict])
                answers = (new.problem.answer[:60], (new.extracted or "-")[:60])
                table.add_row(f"{new.problem.suite} {new.problem.id}", *answers, *verdicts, new.detail)
    return table
