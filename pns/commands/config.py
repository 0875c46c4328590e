"""`pns config`: every key with default, range and meaning; some of them; or a recipe with all defaults."""

import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pns.commands.recipes import find_recipe, shipped_recipes
from pns.config import Config, to_dict
from pns.errors import UserError
from pns.fields import Key, walk_keys
from pns.recipe import load, suggest_key

WIDTH = 110
MIN_MEANING_WIDTH = 30
MAX_DEFAULT_WIDTH = 16  # a longer one stands behind the meaning


def print_config(subject: str, overrides: list[str], over: Sequence[Path] = ()) -> None:
    """`subject` is a recipe's file or name (then the files `over` it and `overrides` are applied), a key, a
    section, or empty: all keys. Raises UserError."""
    if subject.endswith((".yaml", ".yml")) or subject in shipped_recipes():
        print(OmegaConf.to_yaml(to_dict(load(find_recipe(subject), overrides, over=over))), end="")
    elif over:
        raise UserError(f"config: --with {over[0]} belongs to a recipe: name one")
    elif overrides or "=" in subject:
        raise UserError(
            f"config: {subject} is not a recipe: KEY=VALUE belongs after a .yaml file or a recipe's name"
        )
    else:
        print("\n".join(describe_keys(select_keys(subject))))


def select_keys(name: str) -> list[Key]:
    """The key called `name`, or all keys below it. Raises UserError if there is none."""
    keys = list(walk_keys(Config()))
    selected = [key for key in keys if not name or key.name == name or key.name.startswith(f"{name}.")]
    if not selected:
        raise UserError(f"config: {name}: unknown key{suggest_key(name, Config())}")
    return selected


def describe_keys(keys: Sequence[Key]) -> Iterator[str]:
    """Lines: what a section is, and below it its keys in columns; key, default, range, meaning."""
    sections: dict[str, list[Key]] = {}
    for key in keys:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for name, members in sections.items():
        # The first paragraph of a docstring says what the section is.
        meaning = str(inspect.getdoc(type(members[0].section))).split("\n\n")[0]
        yield from textwrap.wrap(f"{name}: {meaning}" if name else meaning, WIDTH)
        yield from describe_columns(members)
        yield ""


def describe_columns(keys: list[Key]) -> Iterator[str]:
    rows = []
    for key in keys:
        default, meaning = spell(key.value), explain(key)
        if len(default) > MAX_DEFAULT_WIDTH:
            default, meaning = "...", f"{meaning}; default {default}"
        rows.append((key.name, default, str(key.allowed or ""), meaning))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    indent = 2 + sum(width + 2 for width in widths if width)
    meaning_width = max(WIDTH - indent, MIN_MEANING_WIDTH)
    for *columns, meaning in rows:
        padded = [text.ljust(width) for text, width in zip(columns, widths, strict=True) if width]
        first, *rest = textwrap.wrap(meaning, meaning_width, break_on_hyphens=False)
        yield "  " + "  ".join([*padded, first])
        yield from (" " * indent + line for line in rest)


def explain(key: Key) -> str:
    """The meaning, with the values to choose from."""
    if not isinstance(key.value, Enum):
        return key.meaning
    choices = " | ".join(choice.name for choice in type(key.value))
    return f"{choices}: {key.meaning}"


def spell(value: Any) -> str:
    """A value as a recipe spells it."""
    if isinstance(value, Enum):
        return value.name
    return json.dumps(value) if value is None or isinstance(value, bool | str | list | dict) else str(value)
