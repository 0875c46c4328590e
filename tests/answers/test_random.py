"""Golds of the benchmarks changed at random; skipped where the files are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pns.answers.compare import compare_answers
from random_answers import mutations, rewritings

DATA = Path(os.environ["PNS_DATA"])
NUM = 500

pytestmark = pytest.mark.skipif(
    not (DATA / "benchmarks").is_dir(), reason=f"no benchmark files in {DATA / 'benchmarks'} (set PNS_DATA)"
)


def test_a_changed_value_is_never_the_same() -> None:
    missed = [row for row in mutations(DATA, NUM) if compare_answers(row[2], row[3], row[4]).same is True]
    assert missed == []


def test_another_spelling_is_never_different() -> None:
    missed = [row for row in rewritings(DATA, NUM) if compare_answers(row[2], row[3], row[4]).same is False]
    assert missed == []
