"""Wrong use: exit code 2 and one line, before anything heavy is imported or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pns import cli

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "verl", "vllm", "transformers")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that passes the checks, with a tokenizer of four tokens."""
    path = tmp_path / "model"
    shutil.copytree(ROOT / "recipes" / "tiny" / "qwen2", path)
    (path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": [{"id": 3}]})
    )
    return path


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "small.yaml"
    judge = f"reward: {{terms: {{coherence: {{model: {model}}}}}}}"
    path.write_text(
        f"models: {{backbone: {model}}}\n{judge}\nrollout: {{max_new_tokens: 96}}\nruns: {tmp_path / 'runs'}\n"
    )
    return path


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_missing_model(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    message = fail(capsys, "run", recipe, f"reward.terms.coherence.model={tmp_path / 'absent'}")
    assert "reward.terms.coherence.model" in message
    assert "absent" in message


def test_model_without_weights(capsys: pytest.CaptureFixture[str], recipe: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "safetensors" in fail(capsys, "run", recipe)


def test_tokenizer_larger_than_model(capsys: pytest.CaptureFixture[str], recipe: Path, model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 46}]}))
    message = fail(capsys, "run", recipe)
    assert "tokenizer of 47 tokens" in message
    assert "model of 46" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("no problems",)),
        ('{"problem": "1+1?", "answer": "2"}\n{"problem": \n', ("line 2", "not a JSON object")),
        ('{"problem": "1+1?"}\n', ("line 1", "'answer'")),
        ('{"problem": "1+1?", "answer": " "}\n', ("line 1", "empty")),
        ('{"problem": "1+1?", "answer": "2", "id": "x"}\n' * 2, ("line 2", "'x'", "twice")),
    ],
)
def test_bad_data(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, content: str, words: tuple[str, ...]
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(content)
    message = fail(
        capsys,
        "run",
        recipe,
        "data.source=jsonl",
        f"data.jsonl.train={data}",
        f"data.jsonl.suites.own={data}",
    )
    for word in ("train.jsonl", *words):
        assert word in message
    assert not (tmp_path / "runs").exists()


def test_from_after_until(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert "--until" in fail(capsys, "run", recipe, "--from", "pair", "--until", "rl")


@pytest.mark.parametrize("option", ["--from", "--until"])
def test_an_unknown_stage_is_said_with_the_near_one(
    capsys: pytest.CaptureFixture[str], recipe: Path, option: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(recipe), option, "preferences"])
    assert stopped.value.code == 2
    assert "unknown stage 'preferences'; did you mean preference?" in capsys.readouterr().err


def test_a_stage_that_this_run_does_not_have(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}")
    message = fail(capsys, "run", recipe, f"preference.data.path={pairs}", "--from", "pair")
    assert "--from pair: the stages of this run are preference, evaluate" in message


def test_an_unknown_key_is_said_with_the_near_one(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert "did you mean rl.steps?" in fail(capsys, "run", recipe, "rl.stepz=1")


def test_overrides_may_stand_after_options(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert "rl.stepz" in fail(capsys, "run", recipe, "--until", "rl", "rl.stepz=1")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", str(recipe), "--untill=rl", "rl.steps=1"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["runs", "rl.steps=1"])


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    (tmp_path / "stages" / "rl-1").mkdir(parents=True)
    monkeypatch.setattr("builtins.input", interrupt)
    assert cli.main(["gc", "--runs", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("pns: interrupted")
    assert (tmp_path / "stages" / "rl-1").is_dir()


def test_report_of_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "not a run directory" in fail(capsys, "report", tmp_path)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "absent.yaml"], ["run", "recipes/tiny-qwen2.yaml", "rl.stepz=1"]]
)
def test_help_and_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pns.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=300,
    )
    assert f"HEAVY [] {0 if arguments == ['--help'] else 2}" in done.stdout
