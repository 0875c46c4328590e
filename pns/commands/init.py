"""`pns init NAME`: a commented recipe for a user's own model and problems, checked as far as it goes."""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from pns.commands.config import explain, spell
from pns.config import Config, stages
from pns.errors import UserError
from pns.fields import walk_keys
from pns.preflight import check_models, check_problems
from pns.recipe import data_faults, key_faults, load, read, resolve_path, term_faults

WIDTH = 110
BENCHMARKS = ("gsm8k", "math500")  # where no suite is named


def init_recipe(name: str, backbone: str, train: str, suites: Sequence[str], out: Path) -> None:
    """Write the recipe to `out` and say what it lacks, or the next command. `suites` are NAME=FILE; files and
    directories are relative to the working directory. Raises UserError where nothing can be written."""
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
        raise UserError(f"init: {name!r} names a recipe and its run: letters, digits, dots, - and _ alone")
    if unnamed := [suite for suite in suites if not re.fullmatch("[^=]+=.+", suite)]:
        raise UserError(f"--suite {unnamed[0]} is not of the form NAME=FILE")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: a recipe's file ends in .yaml")
    here = Path.cwd()
    files = dict(suite.split("=", 1) for suite in suites)
    text = recipe_text(
        name,
        resolve_path(backbone, here, named=True),
        resolve_path(train, here, named=True),
        {suite: resolve_path(file, here, named=False) for suite, file in files.items()},
    )
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{out} is there already and stays as it is: name another with --out FILE") from error
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    print(f"{out}: written")
    missing = list(faults(out))
    for fault in missing:
        print(f"  still missing: {fault}")
    print(f"next: {f'mend that in {out}, then ' if missing else ''}pns plan {out}")


def recipe_text(name: str, backbone: str, train: str, suites: dict[str, str]) -> str:
    """`templates/recipe.yaml.jinja` with meanings and defaults from the schema."""
    keys = {key.name: key for key in walk_keys(Config())}

    def about(key_name: str, more: str = "") -> str:
        """The key's meaning, and what there is to say here, as a comment that stands where the key does."""
        margin, meaning = "  " * key_name.count("."), explain(keys[key_name]) + more
        lines = textwrap.wrap(meaning, WIDTH - len(margin) - 2, break_on_hyphens=False)
        return f"\n{margin}".join(f"# {line}" for line in lines)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pns.commands"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)  # YAML reads it
    return environment.get_template("recipe.yaml.jinja").render(
        name=name,
        backbone=backbone,
        train=train,
        suites=suites,
        benchmarks=[] if suites else list(BENCHMARKS),
        about=about,
        default=lambda key_name: spell(keys[key_name].value),
    )


def faults(recipe: Path) -> Iterator[str]:
    """All that the recipe lacks; where that is nothing, the first thing that is wrong."""
    config = read(recipe)
    missing = [*key_faults(config), *data_faults(config.data, training=True), *term_faults(config)]
    yield from missing
    if not missing:
        try:
            load(recipe)
            check_models(config, stages(config))
            check_problems(config)
        except UserError as error:
            yield str(error)
