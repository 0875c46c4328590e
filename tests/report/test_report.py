"""The report of a run from what its stages wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pns.config import Config
from pns.files import write_json, write_jsonl
from pns.report.run_report import write_report
from pns.run.page import RunPage
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import METRICS

SCORES = {
    suite: {
        model: {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 40}
        for model, accuracy in (("backbone", 0.5), ("target", 0.6), ("result", 0.625))
    }
    for suite in ("gsm8k", "mean")
}
for scores in SCORES.values():
    difference = {"difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.01, "verdict": "better"}
    scores["target"]["against"] = {"backbone": difference}
    unclear = {
        "difference": 0.025,
        "low": -0.05,
        "high": 0.1,
        "p_value": 0.5,
        "verdict": "not distinguishable",
    }
    scores["result"]["against"] = {"backbone": difference, "target": unclear}
BEFORE = {
    "wrong_rate": 0.4,
    "format_rate": 0.9,
    "plausibility_mean": 0.3,
    "coherence_mean": 0.5,
    "single_error_share": None,
}
QUALITY = {
    "counts": {"pairs": 5},
    "unscored": 0,
    "tokens_mean": {"correct": 40.0, "rs": 41.5, "pns": 38.0},
    "detector": {"pns": {"auroc": 0.62, "low": 0.55, "high": 0.7, "num_problems": 40}},
    "one_sidedness": {"pairs": 0.5, "rs": 0.3, "pns": 0.75},
    "one_sidedness_by_chance": {"pairs": 0.4, "rs": 0.25, "pns": 0.2},
    "first_wrong_step": {"pns": {"index": 1.5, "share": 0.4, "known": 1.0}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The page of a run that has got to reverse RL."""
    with RunPage.open(tmp_path / "r") as page:
        page.begin(Config(), {})
        page.save(peak_memory_gib=2.5)
    with made_stage(page.path, "reverse_rl") as place:
        write_json(
            place.directory / "generator.json", {"before": BEFORE, "after": BEFORE | {"wrong_rate": 0.9}}
        )
        place.count(samples=3)
        rows = []
        for step in range(5):
            values = {"reward": step / 10, "loss": None if step else 1.0}
            rows.append({"stage": "reverse_rl", "step": step, "time": 0.0, "values": values})
        write_jsonl(place.directory / METRICS, rows)
    return page.path


@contextmanager
def made_stage(page: Path, name: str, **settings: Any) -> Iterator[Place]:
    """A finished stage that the page leads to."""
    place = Place(page.parent / "stages" / f"{name}-0123")
    with place.making({"stage": name, "settings": settings, "roles": {}, "seed": 0, "inputs": []}):
        (page / name).symlink_to(place.directory)
        yield place


def printed(run: Path) -> str:
    out = io.StringIO()
    write_report(run, PlainTerminal(out, 120))
    return out.getvalue()


def table_rows(text: str) -> list[list[str]]:
    """The rows of all tables, heads too, a cell an item."""
    lines = [line.replace("┃", "│").split("│")[1:-1] for line in text.splitlines()]
    return [[cell.strip() for cell in cells] for cells in lines if cells]


def test_report_of_a_whole_run(run: Path) -> None:
    with made_stage(run, "synthesize") as place:
        write_jsonl(place.directory / "negatives.jsonl", [])
    with made_stage(run, "pair", source="pns") as place:
        write_jsonl(place.directory / "pairs.jsonl", [])
        write_jsonl(place.directory / "rollouts.jsonl", [])
        scores = {"correct": [1.0, 2.0], "rs": [-1.0], "pns": [0.5, 1.5, 1.0]}
        write_json(place.directory / "scores.json", scores)
        write_json(place.directory / "quality.json", QUALITY)
        one_step = {"stage": "pair", "step": 0, "time": 0.0, "values": {"pairs": 5.0}}
        write_jsonl(place.directory / METRICS, [one_step])
    with made_stage(run, "evaluate") as place:
        write_json(place.directory / "scores.json", SCORES)
    text = printed(run)
    report = json.loads((run / "report.json").read_text())
    assert report["suites"] == SCORES
    assert report["generator"]["after"] == BEFORE | {"wrong_rate": 0.9}
    assert report["pairs"] == QUALITY
    assert list(report["stages"]) == ["reverse_rl", "synthesize", "pair", "evaluate"]  # as they ended
    assert report["stages"]["reverse_rl"]["counts"] == {"samples": 3}
    assert report["wall_seconds"] > 0
    assert report["peak_memory_gib"] == 2.5
    assert report["versions"]["python"]
    in_table = {cells[0]: cells[1:] for cells in table_rows(text)}
    assert in_table["suite"] == ["backbone", "target", "result", "n"]
    accuracies = ["50.0 [40.0, 60.0]", "60.0 [50.0, 70.0]", "62.5 [52.5, 72.5]"]
    assert in_table["gsm8k"] == [*accuracies, "40"]
    assert in_table["negatives"] == ["correct", "rs", "pns"]
    assert in_table["tokens"] == ["40", "41.5", "38"]
    assert in_table["AUROC, detector"] == ["-", "-", "0.62 [0.55, 0.70]"]
    assert in_table["one-sidedness"] == ["-", "0.3 (0.25)", "0.75 (0.2)"]
    assert "one-sidedness of the pairs: 0.5 (0.4)" in text
    assert in_table["first wrong step"] == ["-", "-", "1.5 (0.4)"]
    assert in_table["wrong answers"] == ["0.4", "0.9"]


def test_report_of_a_mixture_has_every_generator(run: Path) -> None:
    (run / "reverse_rl").unlink()
    for part in ("pns_backbone", "pns_target"):
        with made_stage(run, f"reverse_rl_{part}") as place:
            write_json(place.directory / "generator.json", {"before": BEFORE, "after": BEFORE})
    assert "pns_target after" in printed(run)
    generator = json.loads((run / "report.json").read_text())["generator"]
    assert list(generator) == [
        *("pns_backbone before", "pns_backbone after", "pns_target before", "pns_target after")
    ]


EXACT = {"accuracy": 0.9, "precision": 0.95, "recall": 0.8, "f1": 0.87, "kappa": 0.75}
LABELS = {
    "completions": 20,
    "steps": 80,
    "steps_per_completion": 4.0,
    "tokens_per_step": 12.0,
    "correct_share": 0.5,
    "with_correct_step": 0.9,
    "missing": {"step_judge": {"too_long": 1, "no_verdict": 2}},
    "agreement": {"agreement": 0.8, "kappa": 0.6, "judge_correct": 0.7, "process_reward_correct": 0.6},
    "exact": {"judge": EXACT, "process_reward": EXACT | {"precision": None}, "consensus": EXACT},
    "exact_share": 0.55,
}
TRAINED_ON = {
    "problems": 30,
    "right": 100,
    "wrong": 120,
    "unlabelled": {"too_long": 1, "no_verdict": 2},
    "tokens": {"positive": 5000, "zero": 0, "negative": 4000},
    "behaviour_gap": 0.002,
}


def score(accuracy: float, **differences: float) -> dict[str, Any]:
    """Of a model, with its differences from others."""
    against = {
        base: {
            "difference": value,
            "low": value - 0.05,
            "high": value + 0.05,
            "p_value": 0.01,
            "verdict": "better",
        }
        for base, value in differences.items()
    }
    figures = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 40}
    return figures | ({"against": against} if against else {})


def offline_run(page: Path, arms: tuple[str, ...]) -> list[list[str]]:
    """The rows of the report's tables of a run of method bcpg, whose arms label steps but for `rft`."""
    for arm in arms:
        with made_stage(page, f"bcpg_{arm}_1") as place:
            is_rft = arm == "rft"
            write_json(place.directory / "data.json", TRAINED_ON | ({"tokens": None} if is_rft else {}))
            rows = [{"stage": "bcpg", "step": n, "time": 0.0, "values": {"loss": 1.0}} for n in range(2)]
            write_jsonl(place.directory / METRICS, rows)
    with made_stage(page, "evaluate") as place:
        of_models = {"backbone": score(0.5), "target": score(0.6, backbone=0.1)}
        for arm in arms:
            of_models[arm] = score(
                0.7, backbone=0.2, target=0.1, **({} if arm == arms[0] else {arms[0]: 0.0})
            )
        write_json(place.directory / "scores.json", {"tiny": of_models, "mean": of_models})
    return table_rows(printed(page))


def test_report_of_arms_and_rounds(run: Path) -> None:
    for number in (10, 2):
        with made_stage(run, f"label_steps_nsa_{number}") as place:
            of_judge_alone = {key: LABELS[key] for key in ("steps", "correct_share")} | {"missing": {}}
            write_json(place.directory / "quality.json", LABELS if number == 2 else of_judge_alone)
    (run / "label_steps_masked_2").symlink_to(place.directory)  # one output of two arms
    rows = offline_run(run, ("rft", "nsa"))
    report = json.loads((run / "report.json").read_text())
    assert list(report["step_labels"]) == ["masked_2", "nsa_2", "nsa_10"]
    assert report["bcpg"] == {"nsa_1": TRAINED_ON, "rft_1": TRAINED_ON | {"tokens": None}}
    in_table = {cells[0]: cells[1:] for cells in rows}
    assert in_table["suite"] == ["backbone", "target", "rft", "nsa", "n"]
    qualities = ["0.95 / 0.8", "- / 0.8", "0.95 / 0.8"]
    assert in_table["masked_2"] == ["80", "0.5 (0.55)", "0.6", *qualities, "step_judge 3"]
    assert in_table["nsa_10"] == ["80", "0.5", "-", "- / -", "- / -", "- / -", "-"]
    assert in_table["nsa_2 as masked_2"] == [""] * 7
    assert in_table["label_steps_nsa_2"] == ["as label_steps_masked_2"]  # its time counts once
    assert in_table["nsa_1"] == ["30", "100", "120", "3", "5000", "0", "4000", "0.002"]
    assert in_table["rft_1"] == ["30", "100", "120", "3", "-", "-", "-", "0.002"]
    assert ["arm", "suite", "from backbone", "p", "from target", "p"] in rows
    differences = ["+20.0 [+15.0, +25.0]", "0.0100", "+10.0 [+5.0, +15.0]", "0.0100"]
    assert ["nsa", "tiny", *differences] in rows
    assert ["", "mean", *differences] in rows
    assert "What each arm was trained on" in (run / "report.html").read_text()


def test_more_than_four_models_are_rows(run: Path) -> None:
    rows = offline_run(run, ("rft", "bcpg", "nsa"))
    assert ["", "tiny", "mean"] in rows
    assert ["model", "n = 40", "n = 40"] in rows
    assert ["nsa", "70.0 [60.0, 80.0]", "70.0 [60.0, 80.0]"] in rows


def test_report_of_a_run_until_reverse_rl(run: Path) -> None:
    printed(run)
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"generator", "stages", "versions", "wall_seconds", "peak_memory_gib"}
    assert "Not evaluated yet. Finished: reverse_rl." in (run / "report.html").read_text()


def test_report_of_nothing(tmp_path: Path) -> None:
    assert write_report(tmp_path, PlainTerminal(io.StringIO())) == {"stages": {}}
