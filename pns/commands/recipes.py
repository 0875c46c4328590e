"""The recipes that come with PNS, by name; `pns recipes` lists them."""

from pathlib import Path

from pns.errors import UserError, did_you_mean
from pns.recipe import load

# Beside the package, in a checkout and where it is installed alike.
RECIPES = Path(__file__).parents[2] / "recipes"
_HARDWARE = "Hardware: "


def shipped_recipes() -> dict[str, Path]:
    """Name -> file."""
    return {path.name.removesuffix(".yaml"): path for path in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(word: str) -> Path:
    """A file as it is, or the shipped recipe of that name. Raises UserError for a word that is neither; of a
    path without a file `load` says what there is."""
    shipped, path = shipped_recipes(), Path(word)
    if path.is_file() or path.name != word or path.suffix in (".yaml", ".yml"):
        return path
    if word not in shipped:
        hint = did_you_mean(word, shipped) or "; pns recipes lists the names"
        raise UserError(f"recipe {word!r} is no file, and no recipe of that name comes with PNS{hint}")
    return shipped[word]


def headlines(recipe: Path) -> tuple[str, str]:
    """What a shipped recipe is, and the hardware it is for: its first two lines, which are comments."""
    what, hardware = recipe.read_text(encoding="utf-8").splitlines()[:2]
    return what.removeprefix("# "), hardware.removeprefix(f"# {_HARDWARE}")


def print_recipes() -> None:
    """Name, backbone and hardware of each in a line, and below it what it is."""
    shipped = shipped_recipes()
    backbones = {name: load(path).models.backbone for name, path in shipped.items()}
    for name, backbone in backbones.items():
        if Path(backbone).is_dir():
            backbones[name] = str(Path(backbone).relative_to(RECIPES))
    first, second = (max(map(len, words)) + 2 for words in (backbones, backbones.values()))
    for name, path in shipped.items():
        what, hardware = headlines(path)
        print(f"{name:<{first}}{backbones[name]:<{second}}{hardware}\n{'':{first}}{what}")
    print("pns plan NAME: what a recipe asks for; pns run NAME: start it; pns init NAME: one of your own")
