"""Version, help texts with examples that are right, and completion in a shell."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from pns import cli
from pns.commands.completion import SHELLS, complete_override, complete_recipe, complete_run
from pns.preference_losses import PREFERENCE_LOSSES

PNS = Path(sys.executable).with_name("pns")


def verbs(
    parser: argparse.ArgumentParser, name: str = "pns"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser that has a handler, with the words that lead to it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from verbs(below, f"{name} {word}")
    if parser.get_default("handler"):
        yield name, parser


def test_every_verb_has_an_example_that_is_right() -> None:
    parser = cli.build_parser()
    found = dict(verbs(parser))
    assert {"pns run", "pns job logs", "pns tiny make"} <= set(found)
    for name, own in found.items():
        example = (own.epilog or "").removeprefix("Example: ")
        if name == "pns completion":
            continue  # the example is a line of a shell
        assert example.startswith(name), name
        options, rest = parser.parse_known_args(shlex.split(example)[1:])
        assert options.handler is own.get_default("handler"), name
        assert not rest or ("overrides" in options and all("=" in word for word in rest)), name
        assert (own.description or "").endswith("."), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pns {version('pns')}\n"


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("{}")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("{}")
    assert {"tiny-qwen2", "own.yaml"} <= set(complete_recipe(""))
    assert "rl.steps=" in complete_override("rl.")
    assert list(complete_override("rollout.engine=")) == [
        "rollout.engine=vllm",
        "rollout.engine=transformers",
    ]
    assert list(complete_override("preference.loss=")) == [
        f"preference.loss={name}" for name in PREFERENCE_LOSSES
    ]
    assert list(complete_override("rl.steps=")) == []
    assert complete_run("") == ["runs/first"]


@pytest.mark.skipif(not PNS.exists(), reason="pns is not installed as a command")
def test_a_shell_completes() -> None:
    """What bash does at a tab, in bash."""
    script = (
        f'PATH={PNS.parent}:$PATH; eval "$(pns completion bash)"; '
        'COMP_LINE="pns run tiny-qwen2 rl.st"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9; '
        "_python_argcomplete pns; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.stdout == "rl.steps=\n", done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_its_code(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert "pns" in capsys.readouterr().out
