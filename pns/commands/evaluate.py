"""`pns evaluate MODEL`: the evaluate stage on any model; its directory is a page that keeps its own stage."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pns import driver
from pns.algo.scores import BOXED_TRUNCATED, COUNTED, THINKING_CUT, SuiteScores, add_difference, right_shares
from pns.config import Config, described_decoding
from pns.data.benchmarks import decoding, decodings
from pns.data.problems import load_suites
from pns.data.prompts import Messages, Prompts, context_tokens
from pns.errors import UserError
from pns.files import read_json, read_jsonl, write_json
from pns.records import Answered, from_json
from pns.report.run_report import difference_interval, interval
from pns.run.page import RunPage
from pns.run.place import STORE, UNFINISHED
from pns.run.stage import ModelFiles, Plan
from pns.run.terminal import open_terminal
from pns.run.tracking import METRICS
from pns.stages.artefacts import Evaluation
from pns.stages.context import Suites
from pns.stages.evaluate import check_samplings, evaluate
from pns.stages.session import session

# The longest completion by what writes it, tokens, where no key says it: reasoning models are published with
# this limit, and instruct models seldom write more.
MAX_NEW_TOKENS = {"a reasoning model": 32768, "an instruct model": 4096, "a base model": 2048}


def choose_max_new_tokens(config: Config, prompts: Prompts) -> None:
    """Set evaluate.max_new_tokens by what the model is, at most its context, and say so."""
    kind = "an instruct model" if config.data.chat_template else "a base model"
    if prompts.reasoning_block:
        kind = "a reasoning model"
    context = context_tokens(config.models.backbone, config.models.trust_remote_code)
    tokens = config.evaluate.max_new_tokens = min(MAX_NEW_TOKENS[kind], context)
    print(f"evaluate.max_new_tokens={tokens}, for {kind} with a context of {context}")


def evaluate_model(config: Config, against: Path | None = None, choose_limit: bool = False) -> Path:
    """Evaluate `config.models.backbone` on the suites of `config.data` and print the table; returns the
    directory, <runs>/<name>.

    A finished evaluation is not run again; an interrupted one asks for the missing completions. `against` is
    the directory of another evaluation of the same suites: its paired differences are added. `choose_limit`:
    the longest completion follows from what the model is. Raises UserError before anything starts where the
    inputs are wrong.
    """
    suite_problems, identities = load_suites(config)
    messages, digest = messages_of(config, choose_limit)
    suites = Suites(suite_problems, identities, decodings(config, suite_problems), config.data)
    check_samplings(messages, suites)
    if config.evaluate.from_generation_config:
        for suite, how in suites.decodings.items():
            print(f"{suite}: decoded as generation_config.json says: {described_decoding(how)}")
    model = Path(config.models.backbone).name
    with RunPage.open(Path(config.runs) / config.name) as page:
        plan = Plan(page.path / STORE, config, digest, page.attempts)
        evaluation = plan(evaluate, {model: ModelFiles(config.models.backbone)}, suites)
        earlier = read_other(against, evaluation, suites) if against else None
        (step,) = plan.steps
        if not step.is_done():
            with (
                closing(open_terminal()) as terminal,
                session(config, page, [step], messages, page.attempts, terminal) as making,
            ):
                making.make(step)
        scores = evaluation.scores()
        if earlier is not None:
            scores = compare_evaluations(scores, model, evaluation.completions(model), *earlier)
            differences = {suite: models[model]["against"] for suite, models in scores.items()}
            write_json(page.path / "comparison.json", differences)
        for table in evaluation_tables(scores, model):
            Console().print(table)
        for suite, models in scores.items():
            if warning := models[model].get("warning"):
                print(f"{suite}: {warning}")
        for suite, identity in identities.items():
            if identity.without_answer:
                print(f"{suite}: not asked, the source has no answer: {', '.join(identity.without_answer)}")
        print(f"{page.path / step.name}: scores.json, {model}.jsonl, browse/index.html")
        return page.path


def messages_of(config: Config, choose_limit: bool) -> tuple[Messages, str]:
    """How problems are asked, and its digest."""
    if config.evaluate.endpoint.url:
        messages = driver.load_messages(config)
        return messages, driver.messages_digest(messages)
    prompts = driver.load_prompts(config)
    if choose_limit:
        choose_max_new_tokens(config, prompts)
    return prompts, driver.prompts_digest(prompts)


def show_prompt(config: Config, choose_limit: bool = False) -> None:
    """Print the first prompt as the model reads it, special tokens included, and how suites are decoded."""
    suites, _ = load_suites(config)
    prompts, _ = messages_of(config, choose_limit)
    problem = next(iter(suites.values()))[0]
    said = ""
    if isinstance(prompts, Prompts):
        print(prompts.render(problem))
        said = f" {len(prompts.encode(problem))} tokens,"
    else:
        for turn in prompts.messages(problem):
            print(f"[{turn['role']}] {turn['content']}")
    print(f"--- data.prompt={config.data.prompt},{said} problem {problem.id}")
    for suite in suites:
        print(f"{suite}: {described_decoding(decoding(config, suite))}")


def read_other(path: Path, evaluation: Evaluation, suites: Suites) -> tuple[str, list[Answered]]:
    """Name and rows of the model that an evaluation's directory holds (or of one `<model>.jsonl` in it).
    Raises UserError unless there is one model, asked the same `suites` with the same decoding."""
    one_file = path.suffix == ".jsonl"
    folder = path.parent if one_file else path / "evaluate"
    kept = (file for file in sorted(folder.glob("*.jsonl")) if file.name != METRICS)
    files = [path] if one_file else [file for file in kept if not file.name.endswith(UNFINISHED)]
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        holds = f"has {len(files)} models ({names})" if files else "has no finished evaluation"
        raise UserError(f"--against {path}: {folder} {holds}; name one DIR/evaluate/MODEL.jsonl")
    if folder.resolve() == evaluation.directory.resolve():
        raise UserError(f"--against {path} is the evaluation itself: name another")
    theirs = read_json(folder / "suites.json")
    for suite, mine in suites.described().items():
        for what in ("sha256", "decoding"):
            if suite not in theirs or theirs[suite][what] != mine[what]:
                other = theirs[suite][what] if suite in theirs else "absent"
                difference = f"{what} of {suite} is {other} there and {mine[what]} here"
                raise UserError(f"--against {path}: {difference}; evaluate both in the same way")
    return files[0].stem, [from_json(Answered, row) for row in read_jsonl(files[0])]


def compare_evaluations(
    scores: SuiteScores, name: str, rows: Sequence[Answered], other: str, other_rows: Sequence[Answered]
) -> SuiteScores:
    """`scores` with the difference of `name` from `other`. Raises UserError unless both were asked the same
    problems as often."""
    label = other if other != name else f"{other} (other)"
    accuracies: dict[str, dict[str, list[float]]] = {label: {}, name: {}}
    for suite in dict.fromkeys(row.problem.suite for row in [*other_rows, *rows]):
        own = [row for row in rows if row.problem.suite == suite]
        others = [row for row in other_rows if row.problem.suite == suite]
        # Paired differences need the same problems, each asked as often.
        if Counter(row.problem.id for row in own) != Counter(row.problem.id for row in others):
            difference = f"the two evaluations differ in the problems or samples of {suite}"
            raise UserError(f"--against: {difference}; evaluate both with the same keys")
        shares, other_shares = right_shares(own), right_shares(others)
        accuracies[name][suite] = list(shares.values())
        accuracies[label][suite] = [other_shares[identity] for identity in shares]
    add_difference(scores, accuracies, label, name)
    return scores


def evaluation_tables(scores: Mapping[str, Mapping[str, Any]], name: str) -> list[Table]:
    """Terminal tables of one model: the suites, differences from other models, and by subject and level where
    the problems have them."""
    heads = ["suite", "n", "k", "accuracy % [95 %]", "as Qwen", "pass@k", "maj@k", "cut", "none", "long", "?"]
    meaning = "cut at the token limit (in brackets: after a box), without an answer, not "
    meaning += "asked (prompt too long), undecided (?)"
    caption = f"k samples a problem; as Qwen: as published figures count; completions {meaning}"
    if "minerva_math" in scores:
        caption += "; minerva_math: graders of published figures cannot read scientific notation (3.83e35)"
    cut = [
        f"{suite} {share(models[name][THINKING_CUT], models[name]['completions'])}"
        for suite, models in scores.items()
        if THINKING_CUT in models[name]
    ]
    if cut:
        caption += f"; reasoning closed by evaluate.thinking_budget: {', '.join(cut)}"
    table = Table(*heads, title=name, caption=caption)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for suite, models in scores.items():
        found = models[name]
        # Of the largest k alone: the figures rise with it, and a table has no room for all.
        best = [list(found.get(key, {}).values())[-1:] for key in ("pass_at", "majority_at")]
        best.insert(0, [found["qwen_accuracy"]] if "qwen_accuracy" in found else [])
        shares = [f"{100 * own[0]:.1f}" if own else "" for own in best]
        row = [suite, found["n"], found.get("samples_per_problem", ""), interval(found), *shares]
        counted = {what: str(found[what]) for what in COUNTED}
        if found.get(BOXED_TRUNCATED):
            counted["truncated"] += f" ({found[BOXED_TRUNCATED]})"
        cells = [*map(str, row), *counted.values()]
        table.add_row(*cells, end_section=suite == list(scores)[-2])  # a line above the mean
    shown = [table]
    for other in scores["mean"][name].get("against", {}):
        columns = ("suite", "difference % [95 %]", "p", "p corrected", "")
        differences = Table(*columns, title=f"{name} against {other}")
        differences.caption = "p of the suites corrected for their number (Holm); the mean is one test"
        for suite, models in scores.items():
            d = models[name]["against"][other]
            differences.add_row(suite, difference_interval(d), *p_values(d), d["verdict"])
        shown.append(differences)
    for what in ("subject", "level"):
        groups = Table("suite", what, "n", "accuracy % [95 %]")
        for suite, models in scores.items():
            for group, found in models[name].get(f"by_{what}", {}).items():
                groups.add_row(suite, group, str(found["n"]), interval(found))
        if groups.row_count:
            shown.append(groups)
    return shown


def share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)"


def p_values(difference: Mapping[str, float]) -> tuple[str, str]:
    return f"{difference['p_value']:.4f}", f"{difference['p_corrected']:.4f}"
