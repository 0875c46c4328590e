"""A study's page: what each arm came to beside the others, what its negatives are like, and of how many
problems a source has one at all."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pns.algo.judging import rubric_score
from pns.algo.negatives import degeneration
from pns.data.checker import Checker
from pns.files import read_json, read_jsonl
from pns.records import Rollout, Verdict, from_json
from pns.report.examples import Example, Side, examples
from pns.report.figures import Line, bars, curve, differences, first_wrong_step, histogram, roc
from pns.report.page import Section, grid, page
from pns.report.solutions import CORRECT, checker_of, first_wrong
from pns.report.tables import Share, results_table, table

MEAN = "mean"
_STARTS = ("backbone", "target")  # models that no arm trained
_EXAMPLES = 3
# How often the target solves a problem -> whether a share of right samples is meant.
_SOLVED = {
    "never": lambda share: share == 0,
    "less than half": lambda share: 0 < share < 0.5,
    "half and more": lambda share: 0.5 <= share < 1,
    "always": lambda share: share == 1,
}
_MARKED = (
    "Accuracy in %, mean over seeds with its 95 % interval (bootstrap over seeds and problems). ▲ ▼: better "
    "or worse than the target, paired (over suites corrected by Holm)."
)
Figures = dict[str, float | None]


@dataclass(frozen=True)
class SourceNegatives:
    """What the negatives of a source are like in one run; of their errors nothing where no checker knows the
    problems."""

    problem_ids: frozenset[str]
    figures: Figures
    first_errors: Counter[str]  # kinds
    first_wrong_steps: list[int | None]


@dataclass(frozen=True)
class Backbone:
    """What a study found of one backbone: the pages of its runs, one a seed, and accuracies as
    `pns.commands.compare` compares them: suite (and "mean") -> model -> figures."""

    pages: Sequence[Path]
    compared: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @property
    def arms(self) -> list[str]:
        return [model for model in self.compared[MEAN] if model not in _STARTS]

    @cached_property
    def sources(self) -> list[str]:
        """The first arm of each set of negatives."""
        places = {negatives_place(self.pages[0], arm): arm for arm in reversed(self.arms)}
        return [arm for arm in self.arms if arm in places.values()]

    @cached_property
    def negatives(self) -> dict[str, list[SourceNegatives]]:
        """Arm -> its negatives in each run. Arms may share them, and are read and checked together: with
        those of five runs that takes a minute."""
        read: dict[Path, SourceNegatives] = {}
        for own in self.pages:
            checker = checker_of(own)
            for place in {negatives_place(own, arm) for arm in self.arms} - read.keys():
                read[place] = read_negatives(place, checker)
        return {arm: [read[negatives_place(own, arm)] for own in self.pages] for arm in self.arms}

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """Arm -> what its negatives and pairs are like, means over the runs of what each knows."""
        return {arm: self._mean_figures(arm) for arm in self.arms}

    def _mean_figures(self, arm: str) -> Figures:
        runs = zip(self.pages, self.negatives[arm], strict=True)
        rows = [own.figures | pair_figures(page_path, arm) for page_path, own in runs]
        names = dict.fromkeys(name for row in rows for name in row)
        known = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
        return {name: fmean(values) if values else None for name, values in known.items()}

    @cached_property
    def first_errors(self) -> dict[str, dict[str, float]]:
        """Arm -> kind of error by the checker, the most frequent first -> share of the negatives of all runs
        whose first error it is. Empty where no checker knows the problems."""
        counted = {
            arm: sum((own.first_errors for own in self.negatives[arm]), Counter[str]()) for arm in self.arms
        }
        of_sources = sum((counted[arm] for arm in self.sources), Counter[str]())
        kinds = [kind for kind, _ in of_sources.most_common()]
        return {arm: {kind: own[kind] / own.total() for kind in kinds} for arm, own in counted.items() if own}

    @cached_property
    def coverage(self) -> dict[str, dict[str, float]]:
        """Arm -> how often the target solves a problem -> share of such problems of which the arm's source
        has a negative, over all runs. All sources draw as many samples of a problem."""
        num_of, with_one = Counter[str](), Counter[tuple[str, str]]()
        for run, page_path in enumerate(self.pages):
            right: dict[str, list[bool]] = {}
            for rollout in read_rollouts(page_path / "solve" / "rollouts.jsonl"):
                right.setdefault(rollout.problem.id, []).append(rollout.reward.verdict is Verdict.CORRECT)
            solved = {identity: how_often(fmean(verdicts)) for identity, verdicts in right.items()}
            num_of.update(solved.values())
            for arm in self.arms:
                known = self.negatives[arm][run].problem_ids & solved.keys()
                with_one.update((arm, solved[identity]) for identity in known)
        shares: dict[str, dict[str, float]] = {}
        for arm in self.arms:
            shares[arm] = {often: with_one[arm, often] / num_of[often] for often in _SOLVED if num_of[often]}
            shares[arm]["all"] = sum(with_one[arm, often] for often in _SOLVED) / num_of.total()
        return shares


def study_sentence(name: str, found: Backbone, references: Sequence[str]) -> str:
    """What the arms were worth on the mean of the suites, against each of `references`, as far as the paired
    intervals tell them apart."""
    mean = found.compared[MEAN]
    parts = []
    for arm in (own for own in found.arms if own not in references):
        against = mean[arm]["against"]
        said = [difference_words(against[other], other) for other in references if other in against]
        parts.append(f"{arm} {100 * mean[arm]['accuracy']:.1f} % ({', '.join(said)})")
    start = f"target {100 * mean['target']['accuracy']:.1f} %"
    over = f"{len(found.pages)} seeds, mean of {len(found.compared) - 1} suites"
    return f"{name}, {over}: {start}, {', '.join(parts)}."


def difference_words(difference: Mapping[str, Any], other: str) -> str:
    points, low, high = (f"{100 * difference[figure]:+.1f}" for figure in ("difference", "low", "high"))
    verdict = difference["verdict"]
    if verdict in ("better", "worse"):
        return f"{verdict} than {other} by {points} [{low}, {high}]"
    return f"not distinguishable from {other}: {points} [{low}, {high}]"


def negatives_place(page_path: Path, arm: str) -> Path:
    return (page_path / f"synthesize_{arm}").resolve()


def read_negatives(place: Path, checker: Checker | None) -> SourceNegatives:
    negatives = read_rollouts(place / "negatives.jsonl")
    problem_ids = frozenset(own.problem.id for own in negatives)
    counts = read_json(place / "counts.json")
    made = degeneration(negatives, ())
    figures: Figures = {
        "negatives": float(len(negatives)),
        "problems with one": float(len(problem_ids)),
        "box-only flips dropped": float(counts.get("box_only_flip", 0)),
        "most frequent offset of the answer": made.get("top_offset_share"),
        "different 4-grams": made.get("distinct_4"),
    }
    if checker is None or not negatives:
        return SourceNegatives(problem_ids, figures, Counter(), [])
    # The checker takes no part in any reward.
    checks = [checker.check(own.problem, own.completion.text) for own in negatives]
    rubrics = [rubric_score(checker.rubric(own.problem, own.completion.text)) for own in negatives]
    wrong_steps = [check.first_wrong_step for check in checks]
    known_steps = [step for step in wrong_steps if step is not None]
    figures |= {
        "first wrong step": fmean(known_steps) if known_steps else None,
        "single error": fmean(check.single_error for check in checks),
        "rubric": fmean(rubrics),
    }
    first_errors = Counter(check.kinds[0] for check in checks if check.kinds)
    return SourceNegatives(problem_ids, figures, first_errors, wrong_steps)


def pair_figures(page_path: Path, arm: str) -> Figures:
    """What an arm's pairs are like."""
    quality = read_json(page_path / f"pair_{arm}" / "quality.json")
    source = read_json(page_path / f"pair_{arm}" / "manifest.json")["settings"]["source"]
    return {
        "pairs": float(quality["counts"]["kept"]),
        "tokens": quality["tokens_mean"].get(source),
        "perplexity": quality.get("perplexity", {}).get(source),
        "reward model, mean": quality["reward_model_mean"].get(source),
        "AUROC, held-out reward model": quality["auroc_held_out"].get(source),
        "AUROC, fresh detector": quality.get("detector", {}).get(source, {}).get("auroc"),
        "one-sidedness": quality["one_sidedness"].get(source),
        "one-sidedness of the pairs": quality["one_sidedness"].get("pairs"),
    }


def how_often(share: float) -> str:
    return next(name for name, fits in _SOLVED.items() if fits(share))


def read_rollouts(file: Path) -> list[Rollout]:
    return [from_json(Rollout, row) for row in read_jsonl(file)]


def study_page(name: str, backbones: Mapping[str, Backbone], references: Sequence[str]) -> str:
    """The page as one file."""
    sentences = [study_sentence(own, found, references) for own, found in backbones.items()]
    sections = [
        section for own, found in backbones.items() for section in sections_of(own, found, references)
    ]
    return page(name, " ".join(sentences), sections)


def sections_of(name: str, found: Backbone, references: Sequence[str]) -> Iterator[Section]:
    yield results(name, found, references)
    yield training(name, found)
    yield quality(name, found)
    shown = side_by_side(found.pages[0], found.sources)
    if shown:
        lead = (
            "Problems of the first seed of which every source has a negative; the first wrong step is marked."
        )
        yield Section(f"{name}: side by side", examples(shown), lead)


def results(name: str, found: Backbone, references: Sequence[str]) -> Section:
    rows: dict[str, dict[str, Share]] = {}
    gains: dict[str, dict[str, Share]] = {}
    for suite in [MEAN, *(suite for suite in found.compared if suite != MEAN)]:
        for model, own in found.compared[suite].items():
            verdict = own.get("against", {}).get("target", {}).get("verdict", "")
            rows.setdefault(model, {})[suite] = Share(own["accuracy"], own["low"], own["high"], verdict)
    for model in found.arms:
        against = found.compared[MEAN][model].get("against", {})
        for other in (reference for reference in references if reference in against):
            own = against[other]
            gain = Share(own["difference"], own["low"], own["high"])
            gains.setdefault(f"against {other}", {})[model] = gain
    seeds = {
        model: {f"run {number}": Share(value) for number, value in enumerate(own["runs"])}
        for model, own in found.compared[MEAN].items()
    }
    figures = [
        differences("Mean of the suites", gains, "points of accuracy, paired over seeds, 95 %"),
        bars("Mean of the suites in each run", seeds, "right answers"),
    ]
    return Section(f"{name}: results", results_table(rows, caption=_MARKED) + grid(figures))


def training(name: str, found: Backbone) -> Section:
    """A curve per trained stage, the mean over seeds with the range."""
    figures = []
    for stage, metric, label in (
        ("rl", "accuracy", "right answers"),
        ("reverse_rl", "wrong_rate", "wrong answers"),
        ("preference", "margin", "margin"),
    ):
        lines = []
        names = ["rl"] if stage == "rl" else [f"{stage}_{arm}" for arm in found.arms]
        seen: set[Path] = set()
        for own in names:
            place = (found.pages[0] / own).resolve()
            if place not in seen and (place / "metrics.jsonl").is_file():
                seen.add(place)
                lines.append(line_over_seeds(found.pages, own, stage, metric))
        lines = [line for line in lines if line.y]
        if lines:
            figures.append(curve(stage, lines, "step", label, percent=metric != "margin"))
    lead = "Means over seeds; the bands reach from the lowest to the highest seed."
    return Section(f"{name}: training", grid(figures), lead)


def line_over_seeds(pages: Sequence[Path], directory: str, stage: str, metric: str) -> Line:
    curves = []
    for own in pages:
        rows = [row for row in read_jsonl(own / directory / "metrics.jsonl") if row["stage"] == stage]
        curves.append([row["values"][metric] for row in rows if row["values"].get(metric) is not None])
    # A stage may stop early: only steps that all runs have.
    by_step = list(zip(*curves, strict=False))
    means, lows, highs = ([of(values) for values in by_step] for of in (fmean, min, max))
    arm = directory.removeprefix(stage).removeprefix("_")
    return Line(arm, list(range(len(means))), means, lows, highs, smooth=5)


def quality(name: str, found: Backbone) -> Section:
    sources = found.sources
    rows = [
        [figure, *(written(found.figures[arm].get(figure)) for arm in sources)]
        for figure in dict.fromkeys(figure for arm in sources for figure in found.figures[arm])
    ]
    body = table(["", *sources], rows, "Means over seeds of what each source's negatives are like.")
    shares = {arm: {how: Share(own) for how, own in found.coverage[arm].items()} for arm in sources}
    body += results_table(
        shares,
        caption="Share of problems of which a source has a negative, by how often the target solves them, at "
        "the same number of samples.",
    )
    kinds = {
        arm: {kind: Share(share) for kind, share in own.items()}
        for arm, own in found.first_errors.items()
        if arm in sources
    }
    if kinds:
        body += results_table(kinds, caption="Share of negatives by the kind of their first error (checker).")
    figures = [bars("Problems with a negative", shares, "problems", "solved by the target")] if shares else []
    scores = scores_by_source(found.pages[0], sources)
    if scores.get(CORRECT):
        figures += [
            histogram("Scores of the reward model, first seed", scores, "raw score", CORRECT),
            roc("ROC of the reward model, first seed", scores, CORRECT),
        ]
    steps = {arm: found.negatives[arm][0].first_wrong_steps for arm in sources}
    if any(steps.values()):
        figures.append(first_wrong_step("First wrong step, first seed", steps))
    return Section(f"{name}: negatives", body + grid(figures))


def scores_by_source(page_path: Path, arms: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for arm in arms:
        scores = read_json(page_path / f"pair_{arm}" / "scores.json")
        source = read_json(page_path / f"pair_{arm}" / "manifest.json")["settings"]["source"]
        found.setdefault(CORRECT, scores.get(CORRECT, []))
        found[arm] = scores.get(source, [])
    return found


def side_by_side(page_path: Path, arms: Sequence[str]) -> list[Example]:
    """The first problems of which every source has a pair."""
    checker = checker_of(page_path)
    pairs = {
        arm: {row["problem_id"]: row for row in read_jsonl(page_path / f"pair_{arm}" / "pairs.jsonl")}
        for arm in arms
    }
    problems = {own.problem.id: own.problem for own in read_rollouts(page_path / "solve" / "rollouts.jsonl")}
    first, *others = pairs.values()
    common = [identity for identity in first if all(identity in other for other in others)]
    shown = []
    for identity in common[:_EXAMPLES]:
        problem, scores = problems[identity], first[identity].get("score_chosen")
        sides = [Side("right", first[identity]["chosen"], True, scores=scored(scores))]
        for arm, rows in pairs.items():
            text = rows[identity]["rejected"]
            wrong = first_wrong(checker, problem, text)[1] if checker else None
            sides.append(Side(arm, text, False, wrong, scored(rows[identity].get("score_rejected"))))
        shown.append(Example(problem.prompt, problem.answer, sides))
    return shown


def scored(score: float | None) -> dict[str, float]:
    return {} if score is None else {"reward model": score}


def written(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def study_markdown(name: str, found: Backbone, references: Sequence[str]) -> str:
    """The tables of one backbone as Markdown: accuracies, differences on the mean, negatives, coverage."""
    suites = [MEAN, *(suite for suite in found.compared if suite != MEAN)]
    lines = [f"## {name}, {len(found.pages)} seeds", "", f"| accuracy in % | {' | '.join(suites)} |"]
    lines.append("|---" * (len(suites) + 1) + "|")
    for model in found.compared[MEAN]:
        cells = [f"{100 * found.compared[suite][model]['accuracy']:.1f}" for suite in suites]
        own = found.compared[MEAN][model]
        cells[0] += f" [{100 * own['low']:.1f}, {100 * own['high']:.1f}]"
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", f"| mean of the suites | {' | '.join(f'against {own}' for own in references)} |"]
    lines.append("|---" * (len(references) + 1) + "|")
    for arm in found.arms:
        against = found.compared[MEAN][arm].get("against", {})
        cells = [interval_cell(against[own]) if own in against else "" for own in references]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    sources = found.sources
    lines += [
        "",
        f"| negatives, means over seeds | {' | '.join(sources)} |",
        "|---" * (len(sources) + 1) + "|",
    ]
    for figure in dict.fromkeys(figure for arm in sources for figure in found.figures[arm]):
        cells = [written(found.figures[arm].get(figure)) for arm in sources]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    lines += ["", f"| problems with a negative, solved by the target | {' | '.join(sources)} |"]
    lines.append("|---" * (len(sources) + 1) + "|")
    for often in found.coverage[sources[0]]:
        cells = [f"{100 * found.coverage[arm][often]:.0f} %" for arm in sources]
        lines.append(f"| {often} | {' | '.join(cells)} |")
    kinds = {arm: own for arm, own in found.first_errors.items() if arm in sources}
    if kinds:
        lines += ["", f"| first error, share of negatives | {' | '.join(kinds)} |"]
        lines.append("|---" * (len(kinds) + 1) + "|")
        for kind in next(iter(kinds.values())):
            cells = [f"{100 * own[kind]:.0f} %" for own in kinds.values()]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def interval_cell(difference: Mapping[str, Any]) -> str:
    points, low, high = (f"{100 * difference[figure]:+.1f}" for figure in ("difference", "low", "high"))
    mark = f" {difference['verdict']}" if difference["verdict"] in ("better", "worse") else ""
    return f"{points} [{low}, {high}]{mark}"
