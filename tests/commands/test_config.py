"""`pns config`: every key is printed, in columns that fit, and an unknown one names the near one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pns import cli
from pns.commands.config import WIDTH, explain
from pns.config import Config
from pns.fields import walk_keys

ROOT = Path(__file__).parents[2]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_all_keys_with_default_range_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    lines = out.splitlines()
    words = " ".join(out.split())
    for key in walk_keys(Config()):
        assert sum(line.startswith(f"  {key.name} ") for line in lines) == 1, key.name
        assert " ".join(explain(key).split()) in words, key.name
    assert max(map(len, lines)) <= WIDTH
    steps = next(line for line in lines if line.startswith("  rl.steps "))
    assert steps.split(maxsplit=2)[1] == "100"
    assert "1 or more" in steps
    assert "training steps" in steps


def test_one_key_and_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "policy.dtype")
    assert "auto | bfloat16 | float32" in out
    assert "policy.compile" not in out
    section = printed(capsys, "rl.optimizer")
    assert "rl.optimizer.beta1  " in section
    assert "in [0, 1)" in section
    assert "reverse_rl" not in section
    assert "reward.terms.coherence.pool.gpus" in printed(capsys, "reward")


def test_a_recipes_merged_values(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes/tiny-llama.yaml"
    values = yaml.safe_load(printed(capsys, str(recipe), "rl.steps=7"))
    assert values["rl"]["steps"] == 7
    assert values["models"]["backbone"] == str(ROOT / "recipes/tiny/llama-mixed")
    assert values["policy"]["dtype"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rl.stepz"], ("rl.stepz", "did you mean rl.steps?")),
        (["polcy"], ("polcy", "did you mean policy?")),
        (["rl.steps=3"], ("rl.steps=3", "after a .yaml file")),
        (["rl", "rl.steps=3"], ("not a recipe",)),
        (["absent.yaml"], ("absent.yaml does not exist",)),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]) -> None:
    assert cli.main(["config", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_stage_names_suggest_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    for option, near in (("--from", "did you mean reverse_rl?"), ("--until", "did you mean reverse_rl?")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", "recipe.yaml", option, "reverse-rl"])
        assert stop.value.code == 2
        assert near in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run", "recipe.yaml", "--from", "zzz"])
    assert "the stages are rl, reward_model" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["rl"], [str(ROOT / "recipes/tiny-qwen2.yaml")]], ids=str)
def test_nothing_heavy_is_imported(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pns.cli import main\nmain(['config', *sys.argv[1:]])\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'verl', 'vllm') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout.endswith("[]\n")


def test_a_recipe_with_a_file_over_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    placement = tmp_path / "placement.yaml"
    placement.write_text("placement: {rollout: {replicas: 7}}\n")
    recipe = str(ROOT / "recipes/tiny-qwen2.yaml")
    over = ("--with", str(placement))
    for words in ((*over, recipe), (recipe, *over), (recipe, *over, "rl.steps=3")):
        config = yaml.safe_load(printed(capsys, *words))
        assert config["placement"]["rollout"]["replicas"] == 7
    assert config["rl"]["steps"] == 3
    assert cli.main(["config", *over]) == 2
    assert "belongs to a recipe" in capsys.readouterr().err
