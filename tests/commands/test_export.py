"""`pns export`: what it writes loads as it is, says what the run's files say, and appears whole or not at
all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pns import cli
from pns.commands.export import PAPER
from pns.config import (
    BadPairs,
    Config,
    Data,
    DataSource,
    Evaluate,
    Models,
    PreferenceConfig,
    PreferenceData,
    to_dict,
)
from pns.data.preference import encode_pair, encode_row, load_pairs, read_rows
from pns.data.prompts import Prompts, load_tokenizer
from pns.files import write_json, write_jsonl
from pns.records import PreferencePair, Problem
from pns.run.page import RunPage
from pns.run.place import Place
from pns.run.tracking import METRICS

MODEL = Path(__file__).parents[2] / "recipes" / "tiny" / "qwen2"
PAIRS = [
    PreferencePair("tiny/1", "n3+n4", "n3+n4=n7", "n3+n4=n8;n8", "pns", 8, 1.5, 1.25),
    PreferencePair("tiny/2", "n1+n1", "n1+n1=n2", "n1+n1=n3"),
]
SCORES = {
    suite: {
        model: {"accuracy": accuracy, "low": 0.4, "high": 0.8, "n": 40}
        for model, accuracy in (("backbone", 0.5), ("result", 0.625))
    }
    for suite in ("chains", "mean")
}
QUALITY = {"counts": {"kept": 2}, "auroc_held_out": {"pns": 0.5125}, "one_sidedness": None}


def make_run(path: Path, config: Config, evaluated: bool = True) -> Path:
    """A finished run: a real page and real places, and a small trained model in the place of the result."""
    with RunPage.open(path) as page:
        page.begin(config, {})
    with made_stage(path, "rl") as place:
        place.count(samples=9)
        write_jsonl(place.directory / METRICS, [row("rl", 0, {"reward": 0.123})])
    if not (config.preference.data.path or config.preference.data.hub):
        with made_stage(path, "pair") as place:
            write_jsonl(place.directory / "pairs.jsonl", PAIRS)
            write_json(place.directory / "quality.json", QUALITY)
            place.count(samples=16, no_chosen=3)
    with made_stage(path, "preference", {"preference": to_dict(config)["preference"]}) as place:
        shutil.copytree(MODEL, place.directory / "model")
        (place.directory / "model" / "README.md").write_text("the run's own")
        problems = {pair.problem_id: Problem(pair.problem_id, pair.prompt, "") for pair in PAIRS}
        prompts = Prompts(load_tokenizer(str(MODEL)), config.data)
        external = config.preference.data.path
        own_pairs = None if external else path / "pair" / "pairs.jsonl"
        limits = config.policy.max_tokens_per_micro_batch, config.policy.layout
        loaded = load_pairs(config.preference, *limits, prompts, problems, own_pairs)
        write_json(place.directory / "data.json", loaded.summary())
        steps = [row("preference", step, {"loss": 0.6931 - step / 10}) for step in range(3)]
        write_jsonl(place.directory / METRICS, steps)
    if evaluated:
        with made_stage(path, "evaluate") as place:
            write_json(place.directory / "scores.json", SCORES)
    return path


def row(stage: str, step: int, values: dict[str, float]) -> dict[str, Any]:
    return {"stage": stage, "step": step, "time": 0.0, "values": values}


@contextmanager
def made_stage(page: Path, name: str, settings: dict[str, Any] | None = None) -> Iterator[Place]:
    """A finished stage that the page leads to."""
    place = Place(page.parent / "stages" / f"{name}-0123")
    made_from = {"stage": name, "settings": settings or {}, "roles": {}, "seed": 0, "inputs": []}
    with place.making(made_from):
        (page / name).symlink_to(place.directory)
        yield place


def settings(**keys: Any) -> Config:
    return Config(
        name="demo",
        models=Models(backbone="owner/base"),
        preference=PreferenceConfig(steps=3),
        evaluate=Evaluate(temperature=0.6),
        **keys,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "demo", settings(data=Data(instruction=";")))


def export(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert export(*arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_pairs_load_as_they_are_and_train_the_same(run: Path, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import DatasetCard

    assert export(run, tmp_path / "out", "--pairs-only") == 0
    out = tmp_path / "out" / "pairs"
    assert sorted(path.name for path in tmp_path.joinpath("out").rglob("*")) == [
        "README.md",
        "pairs",
        "train.jsonl",
        "train.parquet",
    ]

    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == [
        *(
            "prompt",
            "chosen",
            "rejected",
            "problem_id",
            "source",
            "margin_end",
            "score_chosen",
            "score_rejected",
        )
    ]
    assert loaded[0]["prompt"] == [{"content": "n3+n4;", "role": "user"}]
    assert loaded[1]["rejected"] == [{"content": "n1+n1=n3", "role": "assistant"}]
    assert (loaded[0]["margin_end"], loaded[1]["margin_end"]) == (8, None)

    prompts = Prompts(load_tokenizer(str(MODEL)), Data(instruction=";"))
    own = [encode_pair(prompts, Problem(pair.problem_id, pair.prompt, ""), pair, "") for pair in PAIRS]
    for name in ("train.jsonl", "train.parquet"):
        rows = [row for _, row in read_rows(PreferenceData(path=str(out / name)))]
        assert [encode_row(prompts.tokenizer, row, "") for row in rows] == own

    card = DatasetCard.load(out / "README.md")
    assert card.data.task_categories == ["text-generation"]
    assert card.data.size_categories == ["n<1K"]
    assert "arxiv:2602.03516" in card.data.tags
    for text in (
        hashlib.sha256((out / "train.jsonl").read_bytes()).hexdigest(),
        "2 pairs",
        "`owner/base`",
        "samples 16, no_chosen 3",
        "| auroc_held_out.pns | 0.5125 |",
        "| one_sidedness | - |",
        "instruction: ;",
        "a generator trained by reverse RL",
        "wrong on purpose and made to convince: never use it as a demonstration",
    ):
        assert text in card.text, text
    assert "reward 0.123" not in card.text
    assert "transformers" in card.text  # versions


def test_model_loads_as_it_is(run: Path, tmp_path: Path) -> None:
    import torch
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export(run, tmp_path / "out", "--model-only") == 0
    out = tmp_path / "out" / "model"
    assert not (tmp_path / "out" / "pairs").exists()
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "n3+n4"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(MODEL)(ids).logits)

    weights = run / "preference" / "model" / "model.safetensors"
    assert (out / "model.safetensors").samefile(weights)
    assert (weights.parent / "README.md").read_text() == "the run's own"

    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    sha256 = json.loads((run / "preference" / "data.json").read_text())["sha256"]
    for text in (
        sha256,
        "trained with plausible negative samples",
        "| mean | 50.0 [40.0, 80.0] | 62.5 [40.0, 80.0] | 40 |",
        "| loss | 0.6931 | 0.4931 |",
        "| preference.optimizer.learning_rate | 5e-07 |",
        "| evaluate.temperature | 0.6 |",
        "| dropped.pair_too_long | 0 |",
        'text after the problem: `";"`',
    ):
        assert text in card.text, text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {
        "name": "demo",
        "data": {"instruction": ";"},
        "models": {"backbone": "owner/base"},
        "preference": {"steps": 3},
        "evaluate": {"temperature": 0.6},
    }


def test_what_no_stage_wrote_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, "models/base")
    config = settings()
    config.models.backbone = str(tmp_path / "models/base")  # as a recipe's paths are after loading
    run = make_run(tmp_path / "demo", config, evaluated=False)
    (tmp_path / "out").mkdir()  # an empty one is taken
    assert export(run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "Scores" not in card
    assert "base_model" not in card  # a directory, no Hub id
    columns = (tmp_path / "out" / "pairs" / "README.md").read_text()
    assert "reverse_rl" not in columns


def test_cards_of_another_source_of_negatives_name_it(tmp_path: Path) -> None:
    assert export(make_run(tmp_path / "demo", settings(negatives="rs")), tmp_path / "out") == 0
    pairs, model = ((tmp_path / "out" / part / "README.md").read_text() for part in ("pairs", "model"))
    assert "from the source of negatives `rs`" in pairs
    assert "The rejected side is wrong: never use it as a demonstration" in pairs
    assert not [word for word in ("plausible", "reverse RL", "on purpose") if word in pairs + model]


def test_external_pairs_are_given_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.jsonl"
    rows = [
        {"prompt": "n3+n4", "chosen": "n3+n4=n7", "rejected": "n3+n4=n8", "licence": "x"},
        {"prompt": "n1", "chosen": "n1", "rejected": "n1"},
    ]
    write_jsonl(path, rows)
    config = settings()
    config.preference.data = PreferenceData(path=str(path), bad_pairs=BadPairs.drop)
    run = make_run(tmp_path / "demo", config)
    assert export(run, tmp_path / "out") == 0
    found = [
        row for _, row in read_rows(PreferenceData(path=str(tmp_path / "out" / "pairs" / "train.parquet")))
    ]
    assert found == [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    card = (tmp_path / "out" / "pairs" / "README.md").read_text()
    assert "read them from `theirs.jsonl`" in card
    assert "license:" not in card
    assert "| dropped.identical_sides | 1 |" in card
    assert "reverse RL" not in card
    model_card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "on pairs from elsewhere, `theirs.jsonl`" in model_card
    assert not [word for word in ("plausible", PAPER.lower(), "reasoning") if word in model_card.lower()]
    assert str(tmp_path) not in card + model_card

    write_jsonl(path, rows[:1])
    assert "is not what stage preference" in fail(capsys, run, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
    assert export(run, tmp_path / "out2", "--model-only") == 0  # needs the recorded hash only


def test_cards_of_own_problems_name_what_is_known(tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard, ModelCard

    base = tmp_path / "models" / "base"
    shutil.copytree(MODEL, base)
    config = settings(data=Data(source=DataSource.jsonl))
    config.models.backbone = str(base)
    config.data.jsonl.train = str(tmp_path / "mine.jsonl")
    config.data.jsonl.suites = {"own": str(tmp_path / "test.jsonl")}
    run = make_run(tmp_path / "demo", config)
    assert export(run, tmp_path / "out") == 0
    pairs, model = ((tmp_path / "out" / part / "README.md").read_text() for part in ("pairs", "model"))
    assert str(tmp_path) not in pairs + model
    assert "license:" not in (pairs + model).replace("Problems: ", "")
    assert "`mine.jsonl` (a file of the run's; its license is not known here)" in pairs
    assert "The license of the base model `base` is not known here" in model

    (base / "LICENSE").write_text("                Apache License\n          Version 2.0")
    config.data.jsonl.train = "gsm8k_train"
    again = make_run(tmp_path / "other" / "demo", config)
    assert export(again, tmp_path / "out2") == 0
    card = ModelCard.load(tmp_path / "out2" / "model" / "README.md").data
    assert (card.license, card.datasets, card.language) == ("apache-2.0", ["openai/gsm8k"], ["en"])
    data_card = DatasetCard.load(tmp_path / "out2" / "pairs" / "README.md")
    assert data_card.data.license is None  # MIT problems, solutions of a model under another license
    assert "`gsm8k_train`, `openai/gsm8k` (license: mit)" in data_card.text
    (base / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    assert export(again, tmp_path / "out3") == 0
    assert DatasetCard.load(tmp_path / "out3" / "pairs" / "README.md").data.license == "mit"


def test_cards_of_the_tiny_world(tmp_path: Path) -> None:
    config = settings()
    config.models.backbone = str(MODEL)
    assert export(make_run(tmp_path / "demo", config), tmp_path / "out") == 0
    pairs, model = ((tmp_path / "out" / part / "README.md").read_text() for part in ("pairs", "model"))
    assert str(MODEL) not in pairs + model
    assert "word problems of PNS's tiny world, made by a program" in pairs
    assert "Backbone: `qwen2`, then RL" in model
    assert "arxiv:2602.03516" in model


def test_nothing_half_written_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mixed.jsonl"
    turn = [{"role": "assistant", "content": "n7"}]
    plain = {"prompt": "n3+n4", "chosen": "n3+n4=n7", "rejected": "n3+n4=n8"}
    write_jsonl(
        path,
        [
            plain,
            {
                "prompt": [{"role": "user", "content": "n3+n4"}],
                "chosen": turn,
                "rejected": [turn[0] | {"content": "n8"}],
            },
        ],
    )
    config = settings()
    config.preference.data = PreferenceData(path=str(path))
    run = make_run(tmp_path / "demo", config)
    (tmp_path / ".partial-out").mkdir()  # of an export that was killed
    before = sorted(tmp_path.iterdir())
    assert "no common Parquet type" in fail(capsys, run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [name for name in before if name.name != ".partial-out"]


def test_wrong_use(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run directory" in fail(capsys, tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "x"):
        assert "exists and is not an empty directory" in fail(capsys, run, out)
    assert "is inside the run directory" in fail(capsys, run, run / "preference" / "model" / "out")
    with pytest.raises(SystemExit) as exited:
        export(run, tmp_path / "out", "--pairs-only", "--model-only")
    assert exited.value.code == 2
    capsys.readouterr()
    (run / "preference" / "manifest.json").unlink()
    assert "stage preference is not finished" in fail(capsys, run, tmp_path / "out")
    assert export(run, tmp_path / "pairs", "--pairs-only") == 0
    (run / "pair" / "manifest.json").unlink()
    capsys.readouterr()
    assert "stage pair is not finished" in fail(capsys, run, tmp_path / "out", "--pairs-only")
    (run / "config.yaml").write_text("unknown: 1\n")
    assert "config.yaml: Key 'unknown'" in fail(capsys, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
