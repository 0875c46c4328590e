"""Documents: short lines, a README of one sitting, links that lead somewhere, tables that follow the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pns import cli
from pns.preference_losses import PREFERENCE_LOSSES

ROOT = Path(__file__).parents[1]
ROOMS = ("pns", "workers", "recipes", "cluster", "docker", "tests")
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.md"))),
]
MAX_COLUMNS, MAX_README_LINES = 120, 130


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short_and_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > MAX_COLUMNS] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_is_one_sitting_and_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_README_LINES
    names = re.findall(r"^    (\w+) ", cli.build_parser().format_help(), re.MULTILINE)
    assert "run" in names
    for name in names:
        assert re.search(rf"^pns {name}\b", text, re.MULTILINE), name


def test_every_preference_loss_has_its_row() -> None:
    text = (ROOT / "pns" / "stages" / "README.md").read_text(encoding="utf-8")
    rows = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in PREFERENCE_LOSSES if f"`{name}`" not in rows] == []
