"""`pns completion SHELL`: completion of verbs, options, recipes, keys of the configuration and runs."""

from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pns.commands.recipes import shipped_recipes
from pns.config import Config
from pns.fields import Key, walk_keys
from pns.preference_losses import PREFERENCE_LOSSES

SHELLS = ("bash", "zsh", "fish")
ASKED = "_ARGCOMPLETE"  # in the environment: a shell asks for completions, not for the command


def print_completion(shell: str) -> None:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["pns"], shell=shell))


def answer_shell(parser: ArgumentParser) -> None:
    """Print what the word under the cursor can become, and end the process."""
    import argcomplete

    argcomplete.autocomplete(parser)


def completed_by(argument: Action, complete: Callable[..., Iterable[str]]) -> None:
    """Let `complete` say what the argument's words can become: argcomplete looks for it there."""
    argument.completer = complete  # type: ignore[attr-defined]


def complete_recipe(prefix: str, **parsed: Any) -> list[str]:
    """Names of the recipes that come with PNS, and YAML files."""
    from argcomplete.completers import FilesCompleter

    files = FilesCompleter(("yaml", "yml"))(prefix)
    return [*shipped_recipes(), *files]


def complete_override(prefix: str, **parsed: Any) -> Iterator[str]:
    """`KEY=`, and where it is there already the values of a key that has few."""
    name, says_value, _ = prefix.partition("=")
    for key in walk_keys(Config()):
        if not says_value:
            yield f"{key.name}="
        elif key.name == name:
            yield from (f"{name}={choice}" for choice in choices(key))


def choices(key: Key) -> Iterable[str]:
    """The values that a key can have, where they can be counted."""
    if key.name == "preference.loss":
        return PREFERENCE_LOSSES
    if isinstance(key.value, bool):
        return ("true", "false")
    return type(key.value) if isinstance(key.value, Enum) else ()


def complete_run(prefix: str, **parsed: Any) -> list[str]:
    """Pages of runs below the directory that is being typed, or below runs/."""
    above = Path(prefix).parent if "/" in prefix else Path("runs")
    return [str(path.parent) for path in above.glob("*/config.yaml")]
