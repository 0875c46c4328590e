"""report.html and browse/ of a run: one well-formed file, which loads nothing and shows hostile text as text."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pns.config import Config, DataSource
from pns.errors import UserError
from pns.files import write_json, write_jsonl
from pns.records import Problem, to_json
from pns.report.run_report import write_report
from pns.run.page import RunPage
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import METRICS
from pns.tiny.world import check, corrupt, problems

HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"></details></div> $x<y$ ]]> <a href="http://a">'
)
VOID = {"meta", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and keeps what the page would load and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


def finished(page: Path, name: str, files: Mapping[str, Any], **settings: Any) -> None:
    place = Place(page.parent / "stages" / f"{name}-0")
    with place.making({"stage": name, "settings": settings, "roles": {}, "seed": 0, "inputs": []}):
        for file, value in files.items():
            (write_jsonl if file.endswith(".jsonl") else write_json)(place.directory / file, value)
    (page / name).symlink_to(place.directory)


def steps(stage: str, series: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    num = max(map(len, series.values()))
    rows = [{name: values[at] for name, values in series.items() if at < len(values)} for at in range(num)]
    return [{"stage": stage, "step": at, "time": 0.0, "values": row} for at, row in enumerate(rows)]


def rollout(problem: Problem, text: str, verdict: str, number: int) -> dict[str, Any]:
    completion = {"id": f"{problem.id}#{number}", "problem_id": problem.id, "text": text, "token_ids": [1]}
    completion |= {"log_probs": [0.0], "finish_reason": "stop", "weights_version": 0}
    reward = {"value": 1.0, "format_ok": True, "verdict": verdict, "terms": {}, "missing": {}, "raw": {}}
    return {"step": 0, "problem": to_json(problem), "completion": completion, "reward": reward}


def made_run(
    directory: Path, own: Sequence[Problem], wrong: Sequence[str], config: Config, source: str = "pns"
) -> Path:
    """A run with a right solution, a wrong one of the target and a negative (`wrong`) for each problem."""
    with RunPage.open(directory / "r") as page:
        page.begin(config, {})
    right = [problem.solution or "" for problem in own]
    rng = [0.1, 0.5, 0.3, 0.6, 0.7, 0.65, 0.8]
    trained = {"accuracy": rng, "format_rate": [1.0] * 7, "kl": [None] * 5 + [0.1, 0.2], "nll": rng[::-1]}
    finished(page.path, "rl", {METRICS: steps("rl", trained)})
    negatives = [rollout(p, text, "wrong", 2) for p, text in zip(own, wrong, strict=True)]
    finished(page.path, "synthesize", {"negatives.jsonl": negatives})
    rows = [
        {"problem_id": p.id, "prompt": p.prompt, "chosen": chosen, "rejected": rejected}
        for p, chosen, rejected in zip(own, right, wrong, strict=True)
    ]
    rollouts = [rollout(p, text, "correct", 0) for p, text in zip(own, right, strict=True)]
    rollouts += [rollout(p, f"{HOSTILE}\\boxed{{0}}", "wrong", 1) for p in own]
    scores = {"correct": [1.25] * len(own), "rs": [-1.5] * len(own)} | {source: [2.75] * len(own)}
    quality = {"unscored": 0, "tokens_mean": {"correct": 9.0, "rs": 8.0, "pns": 9.5}}
    quality |= {"one_sidedness": {"pairs": 0.5}, "one_sidedness_by_chance": {"pairs": 0.4}}
    files = {"pairs.jsonl": rows, "rollouts.jsonl": rollouts, "scores.json": scores, "quality.json": quality}
    finished(page.path, "pair", files, source=source)
    start = {"accuracy": 0.3, "low": 0.25, "high": 0.35, "n": 40}
    better = {"difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "verdict": "better"}
    result = start | {"accuracy": 0.5, "against": {"backbone": better}}
    evaluation = {suite: {"backbone": start, "result": result} for suite in (HOSTILE, "mean")}
    finished(page.path, "evaluate", {"scores.json": evaluation})
    return page.path


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    own = problems("preference", None, 3, seed=0)
    wrong = [corrupt(problem, Random(0), "arithmetic") for problem in own]
    return made_run(tmp_path, own, wrong, Config())


def written(run: Path) -> Page:
    write_report(run, PlainTerminal(io.StringIO()))
    return Page((run / "report.html").read_text())


def test_a_runs_page_says_what_came_out(tiny_run: Path) -> None:
    page = written(tiny_run)
    assert "result" in page.text
    assert "better: +20.0 points [+10.0, +30.0] from backbone" in page.text
    titles = ["Results", "Training: rl", "Negatives", "Side by side"]
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)
    # Of the metrics only those that vary and were measured in most steps.
    assert page.tags.count("figure") == page.tags.count("svg") == 2 + 2 + 3
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert "Distance from the start" not in page.text
    assert "AUROC of correct against rs 1.00, pns 0.00" in page.text
    text = (tiny_run / "report.html").read_text()
    problem = problems("preference", None, 1, seed=0)[0]
    negative = corrupt(problem, Random(0), "arithmetic")
    found = check(problem, negative)
    assert found.first_wrong_step is not None
    step = found.steps[found.first_wrong_step]
    assert f'<mark title="first wrong step">{negative[step.start : step.end]}</mark>' in text
    assert "reward model 2.75" in text


def test_a_runs_page_loads_nothing_and_hostile_text_stays_text(tiny_run: Path) -> None:
    pages = [written(tiny_run), *(Page(file.read_text()) for file in (tiny_run / "browse").iterdir())]
    for page in pages:
        assert not {"script", "img", "link", "iframe"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    text = (tiny_run / "report.html").read_text()
    assert not re.search(r"https?:|@import|url\((?!#)", text.replace("http://a", ""))
    assert "default-src 'none'" in text
    page = pages[0]
    assert page.text.count("<script>alert(1)</script>") >= 3  # a suite's name and wrong solutions
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers))
    assert {value.removeprefix("#") for value in page.values("href") if value.startswith("#")} <= set(
        identifiers
    )
    for target in (value for value in page.values("href") if not value.startswith("#")):
        assert (tiny_run / target).is_file()


def test_solutions_have_an_index_and_a_way_back(tiny_run: Path) -> None:
    written(tiny_run)
    index = Page((tiny_run / "browse" / "index.html").read_text())
    assert index.values("href") == ["../report.html", "solutions-1.html"]
    assert "100.0 %" in index.text  # of the pairs: the wrong one scores higher
    solutions = Page((tiny_run / "browse" / "solutions-1.html").read_text())
    assert solutions.values("href") == ["index.html"]
    assert solutions.tags.count("mark") >= 3
    assert solutions.text.index("correct, chosen") < solutions.text.index("pns, rejected")


def test_without_a_checker_no_step_is_marked(tmp_path: Path) -> None:
    config = Config()
    config.data.source = DataSource.jsonl
    own = [Problem("p", HOSTILE, HOSTILE, solution=HOSTILE)]
    page = written(made_run(tmp_path, own, [f"other {HOSTILE}"], config))
    assert "mark" not in page.tags
    assert "First wrong step" not in page.text
    assert "script" not in page.tags
    assert "Side by side" in page.text


def test_where_the_targets_own_are_the_negatives_they_stand_alone(tmp_path: Path) -> None:
    own = problems("preference", None, 2, seed=0)
    wrong = [corrupt(problem, Random(0), "arithmetic") for problem in own]
    page = written(made_run(tmp_path, own, wrong, Config(), source="rs"))
    assert "rs, rejected reward model 2.75" in page.text
    assert "-1.50" not in page.text
    first = (tmp_path / "r" / "report.html").read_bytes()
    written(tmp_path / "r")
    assert (tmp_path / "r" / "report.html").read_bytes() == first  # the same data, the same page


def test_a_torn_row_of_metrics_is_left_out_and_a_broken_configuration_said(tiny_run: Path) -> None:
    with open(tiny_run / "rl" / METRICS, "a") as file:
        file.write('{"stage": "rl", "st')
    written(tiny_run)
    (tiny_run / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML: run the recipe again"):
        written(tiny_run)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_no_page_is_wider_than_a_telephone(tiny_run: Path, tmp_path: Path) -> None:
    written(tiny_run)
    # The copy is without the policy, which forbids the script, and has every fold open.
    measure = "<script>document.title = 'wide ' + document.documentElement.scrollWidth</script>"
    for file in (tiny_run / "report.html", *(tiny_run / "browse").iterdir()):
        text = re.sub("<meta http-equiv[^>]*>", "", file.read_text()).replace("<details", "<details open")
        copy = tmp_path / file.name
        copy.write_text(text + measure)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800", "--dump-dom"]
        done = subprocess.run([BROWSER, *options, copy.as_uri()], capture_output=True, text=True, timeout=60)
        width = re.search(r"<title>wide (\d+)", done.stdout)
        assert width is not None, done.stderr
        assert int(width[1]) <= 390, file.name
