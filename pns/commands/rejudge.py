"""`pns evaluate --rejudge DIR`: the completions of an evaluation, judged again by the verifier of today."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pns.algo.scores import final_verdict, summarise
from pns.config import Decoding
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_json, write_jsonl
from pns.records import Answered, Verdict, from_json, to_json
from pns.report.browse import write_pages

if TYPE_CHECKING:
    from workers.rewards.verifier import Verifier

OUT = "rejudged"  # beside the evaluation, which stays as it was
_BATCH = 256  # completions between two looks at the progress
_EXAMPLES = 10  # of changed verdicts that are shown
_VERDICTS = {Verdict.CORRECT: "right", Verdict.WRONG: "wrong", Verdict.UNVERIFIED: "undecided"}


def rejudge(directory: Path, processes: int, limit_seconds: float, console: Console | None = None) -> Path:
    """Judge every stored completion of a run or of an evaluation again, without its models, and print what
    changed. Writes <page>/rejudged: a JSON line a completion and model, scores.json, browse/, changed.jsonl
    (rows with the verdict and the reason that they had). Returns that directory; what it held before is
    replaced. Raises UserError where there is no finished evaluation."""
    folder = evaluation_folder(directory)
    suites = read_json(folder / "suites.json")
    stored = {name: answered_rows(folder / f"{name}.jsonl") for name in stored_models(folder)}
    from workers.rewards.verifier import Verifier

    verifier = Verifier(processes, limit_seconds)
    try:
        judged = {name: judged_again(verifier, name, rows) for name, rows in stored.items()}
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
    console = console or Console()
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


def judged_again(verifier: "Verifier", name: str, rows: Sequence[Answered]) -> list[Answered]:
    """The rows with their verdicts of now; of a problem that was not asked it stays."""
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
