"""Recipes by name, their list, the wheel that holds them, and `pns init`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pns import cli
from pns.commands.recipes import RECIPES, find_recipe, headlines, shipped_recipes
from pns.config import Device, services
from pns.planning.work import work_of
from pns.recipe import load
from workers.placement import totals

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny" / "qwen2"
PROBLEMS = ROOT / "tests" / "cases" / "problems.jsonl"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "command", [["run"], ["plan"], ["evaluate", str(TINY), "--recipe"]], ids=lambda c: c[0]
)
def test_a_wrong_name_is_said_with_the_near_one(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail(capsys, *command, "qwen2.5-7")
    assert "'qwen2.5-7' is no file" in line
    assert line.endswith("did you mean qwen2.5-7b?")
    assert fail(capsys, *command, "zzz").endswith("pns recipes lists the names")
    assert "absent.yaml does not exist" in fail(capsys, *command, "absent.yaml")


def test_a_name_works_from_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["plan", "tiny-qwen2"]) == 0
    assert str(tmp_path / "runs" / "tiny-qwen2") in capsys.readouterr().out
    assert cli.main(["config", "qwen2.5-7b", "rl.steps=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["name"], printed["rl"]["steps"]) == ("qwen2.5-7b", 3)
    assert printed["models"]["backbone"] == "Qwen/Qwen2.5-7B-Instruct"
    Path("tiny-qwen2").write_text("seed: 3\n")
    assert find_recipe("tiny-qwen2") == Path("tiny-qwen2")  # a file that is there is the file


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name, path in shipped_recipes().items():
        what, hardware = headlines(path)
        assert re.search(
            rf"^{re.escape(name)} +\S+ +{re.escape(hardware)}\n +{re.escape(what)}$", out, re.MULTILINE
        )


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_hardware_that_a_recipe_names_is_what_it_takes(name: str) -> None:
    text, config = shipped_recipes()[name].read_text(), load(shipped_recipes()[name])
    assert re.match("# .+\n# Hardware: .+\n[^#]", text)
    hardware = headlines(shipped_recipes()[name])[1]
    if "tiny" in name:
        return
    assert config.placement.device is Device.cuda
    used = {role for own in work_of(config).values() for role in own.roles}
    assert totals(config, used, "cuda")["GPU"] == float(hardware.split(" x ")[0])
    pools = {"policy": config.placement.policy, "rollout": config.placement.rollout}
    named = {"reward model": "plausibility", "judge": "coherence", "step judge": "step_judge"}
    for said, role in (named | {"process reward": "process_reward"}).items():
        pools[said] = services(config)[role].pool
    for number, role in re.findall(rf"(\d+) ({'|'.join(pools)})", hardware):
        assert pools[role].replicas == int(number), role


def test_the_wheel_holds_every_recipe() -> None:
    code = (
        "from setuptools import Distribution; d = Distribution({'script_name': ''}); d.parse_config_files(); "
        "build = d.get_command_obj('build_py'); build.ensure_finalized(); "
        "print(*build.get_outputs(include_bytecode=False), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    built = {line.partition("build/lib/")[2] for line in done.stdout.splitlines()}
    files = {str(path.relative_to(ROOT)) for path in RECIPES.rglob("*") if path.is_file()}
    assert files <= built
    assert "pns/commands/templates/recipe.yaml.jinja" in built


def test_init_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "mine"]) == 0
    out = capsys.readouterr().out
    missing = re.findall(r"still missing: (\S+) is empty", out)
    assert missing == ["models.backbone", "data.jsonl.train", "reward.terms.coherence.model"]
    assert out.splitlines()[-1] == "next: mend that in mine.yaml, then pns plan mine.yaml"
    before = Path("mine.yaml").read_bytes()
    assert "mine.yaml is there already and stays as it is" in fail(capsys, "init", "mine", "--train", "x")
    assert Path("mine.yaml").read_bytes() == before


def test_init_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("own data").mkdir()
    Path("own data/train.jsonl").write_bytes(PROBLEMS.read_bytes())
    model, suite = "--backbone=own model", "--suite=held_out=own data/train.jsonl"
    Path("own model").symlink_to(TINY)
    words = [model, "--train", "own data/train.jsonl", suite, "--out", "own data/mine.yaml"]
    assert cli.main(["init", "first-try", *words]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["next: pns plan own data/mine.yaml"]
    config = load("own data/mine.yaml")
    assert config.name == "first-try"
    judge = config.reward.terms["coherence"].model
    assert config.models.backbone == judge == str(tmp_path / "own model")
    assert (
        config.data.jsonl.train
        == config.data.jsonl.suites["held_out"]
        == str(tmp_path / "own data/train.jsonl")
    )
    assert config.data.benchmarks == []
    text = Path("own data/mine.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "math_trian"], "data.jsonl.train: 'math_trian' .*did you mean math_train?"),
        (["--train", "absent.jsonl"], "data.jsonl.train: .*absent.jsonl' is not a file"),
        (["--train", "bad.jsonl"], "bad.jsonl, line 2: field 'answer' is missing"),
        (["--train", "math_train", "--suite", "own=absent.jsonl"], "data.jsonl.suites.own: .*is not a file"),
        (
            ["--train", "math_train", "--backbone", "./absent"],
            "models.backbone: .*absent is neither a directory",
        ),
    ],
)
def test_init_checks_what_it_wrote(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?"}\n')
    assert cli.main(["init", "mine", "--backbone", str(TINY), *words]) == 0
    (missing,) = re.findall("still missing: (.*)", capsys.readouterr().out)
    assert re.search(message, missing)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a/b"], "'a/b' names a recipe and its run"),
        (["mine", "--suite", "own.jsonl"], "--suite own.jsonl is not of the form NAME=FILE"),
        (["mine", "--out", "mine.txt"], "--out mine.txt: a recipe's file ends in .yaml"),
        (["mine", "--out", "nowhere/mine.yaml"], "nowhere/mine.yaml cannot be written: No such file"),
    ],
)
def test_init_writes_nothing_on_wrong_use(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in fail(capsys, "init", *words)
    assert list(tmp_path.iterdir()) == []
