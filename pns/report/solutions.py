"""The solutions that a run's pairs are made of, by problem and source, with their scores and first wrong
steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from pns.config import DataSource
from pns.data.checker import Checker
from pns.errors import UserError
from pns.files import json_lines, read_json
from pns.records import Problem, Rollout, Verdict, from_json
from pns.report.examples import Example, Side

CORRECT = "correct"  # the source of right solutions; wrong ones of the same model are "rs"
MOST_ROWS = 8000  # that are read of a file: pages stay of a size that can be read
_SIDES = 3  # of a problem and source
_SCORE = "reward model"


@dataclass(frozen=True)
class Solution:
    """A completion of a source. `first_wrong_step` is its number, None where it has none or no checker knows;
    `side`: "chosen" or "rejected" of a pair, or ""."""

    problem: Problem
    source: str
    text: str
    score: float | None = None
    first_wrong_step: int | None = None
    wrong: tuple[int, int] | None = None
    side: str = ""

    def shown(self) -> Side:
        name = f"{self.source}, {self.side}" if self.side else self.source
        scores = {} if self.score is None else {_SCORE: self.score}
        return Side(name, self.text, self.source == CORRECT, self.wrong, scores)


def checker_of(run_path: Path) -> Checker | None:
    """Of the run's problems, where there is one."""
    file = run_path / "config.yaml"
    try:
        config = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: run the recipe again, which writes it") from error
    if OmegaConf.select(config, "data.source") != DataSource.tiny.value:
        return None
    from pns.tiny.world import StepChecker

    return StepChecker()


def read_solutions(run_path: Path, checker: Checker | None) -> list[Solution]:
    """Right and wrong completions of the target and the negatives, of the first MOST_ROWS of each file. Empty
    where the run has no pairs of its own."""
    pair = run_path / "pair"
    if not (pair / "quality.json").is_file():
        return []
    sides = {}
    for _, row in islice(json_lines(pair / "pairs.jsonl"), MOST_ROWS):
        for side in ("chosen", "rejected"):
            sides[row["problem_id"], row[side]] = side
    scores = {name: iter(values) for name, values in read_json(pair / "scores.json").items()}
    # The scores are in the order of the completions, those without a score left out.
    known = not read_json(pair / "quality.json")["unscored"]
    found = []
    for source, rollout in _by_source(run_path):
        text = rollout.completion.text
        score = next(scores[source], None) if known and source in scores else None
        place, wrong = None, None
        if checker is not None and source != CORRECT:
            place, wrong = first_wrong(checker, rollout.problem, text)
        side = sides.get((rollout.problem.id, text), "")
        found.append(Solution(rollout.problem, source, text, score, place, wrong, side))
    return found


def _by_source(run_path: Path) -> Iterator[tuple[str, Rollout]]:
    """As the pair stage sees them: the target's own wrong ones stand aside where they are the negatives."""
    source = read_json(run_path / "pair" / "manifest.json")["settings"]["source"]
    made = run_path / "synthesize"
    origins = read_json(made / "sources.json") if (made / "sources.json").is_file() else {}
    own_are_negatives = "rs" in origins.values() if origins else source == "rs"
    names = {Verdict.CORRECT: CORRECT} | ({} if own_are_negatives else {Verdict.WRONG: "rs"})
    for rollout in _rollouts(run_path / "pair" / "rollouts.jsonl"):
        if name := names.get(rollout.reward.verdict):
            yield name, rollout
    for rollout in _rollouts(made / "negatives.jsonl"):
        yield origins.get(rollout.completion.id, source), rollout


def _rollouts(file: Path) -> Iterator[Rollout]:
    for _, row in islice(json_lines(file), MOST_ROWS):
        yield from_json(Rollout, row)


def first_wrong(checker: Checker, problem: Problem, text: str) -> tuple[int | None, tuple[int, int] | None]:
    """Number and place in the text of the first wrong step; None for a text without one."""
    check = checker.check(problem, text)
    number, end = check.first_wrong_step, check.first_wrong_end
    if number is None or end is None:
        return None, None
    if number < len(check.steps):
        return number, (check.steps[number].start, end)
    return number, (check.steps[-1].end if check.steps else 0, end)  # the final answer


def as_examples(solutions: Sequence[Solution]) -> list[Example]:
    """The problems that have a pair, each with at most three solutions of a source: first the pair, then
    the others."""
    by_problem: dict[str, dict[str, list[Solution]]] = {}
    for own in solutions:
        by_problem.setdefault(own.problem.id, {}).setdefault(own.source, []).append(own)
    found = []
    for sources in by_problem.values():
        if not any(own.side == "rejected" for group in sources.values() for own in group):
            continue
        distinct = [distinct_texts(sorted(group, key=lambda own: not own.side)) for group in sources.values()]
        sides = [own for group in distinct for own in group[:_SIDES]]
        sides.sort(key=lambda own: ("chosen", "rejected", "").index(own.side))
        problem = sides[0].problem
        found.append(Example(problem.prompt, problem.answer, [own.shown() for own in sides]))
    return found


def distinct_texts(group: Sequence[Solution]) -> list[Solution]:
    return list({own.text: own for own in reversed(group)}.values())[::-1]


def side_by_side(solutions: Sequence[Solution], num: int) -> list[Example]:
    """The first `num` problems that have a solution of every source: one of each, that of the pair where
    there is one."""
    sources = list(dict.fromkeys(own.source for own in solutions))
    chosen: dict[str, dict[str, Solution]] = {}
    for own in solutions:
        of_problem = chosen.setdefault(own.problem.id, {})
        if own.source not in of_problem or (own.side and not of_problem[own.source].side):
            of_problem[own.source] = own
    whole = [
        of_problem
        for of_problem in chosen.values()
        if len(of_problem) == len(sources) and any(own.side == "rejected" for own in of_problem.values())
    ]
    return [
        Example(
            of_problem[sources[0]].problem.prompt,
            of_problem[sources[0]].problem.answer,
            [of_problem[source].shown() for source in sources],
        )
        for of_problem in whole[:num]
    ]


def steps_by_source(solutions: Sequence[Solution]) -> dict[str, list[int | None]]:
    """Source of wrong ones -> the first wrong step of each."""
    found: dict[str, list[int | None]] = {}
    for own in solutions:
        if own.source != CORRECT:
            found.setdefault(own.source, []).append(own.first_wrong_step)
    return found
