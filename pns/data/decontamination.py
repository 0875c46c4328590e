"""Training problems that are also benchmark problems, or nearly so.

Three tests, the first that holds names the match: `exact`, the same text but for spaces and dollar signs;
`alnum`, the same letters and digits (signs may differ); `13gram`, at least half of the benchmark problem's
different sequences of 13 words are in the training problem. A word is a run of letters or a run of digits, in
lower case, so that `2x-3` and `2x - 3` are the same. The last test also finds templates filled with other
numbers: for training a removal too many costs little, a leaked benchmark problem costs the benchmark.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pns.records import Problem

NUM_WORDS = 13  # as in GPT-3's report (arXiv 2005.14165)
MIN_SHARE = 0.5
_WORD = re.compile(r"[^\W\d_]+|\d+")
_SPACES_AND_DOLLARS = re.compile(r"[\s$]+")


@dataclass(frozen=True)
class Overlap:
    """`share` of the benchmark problem's word sequences found in training; 1 for `exact` and `alnum`."""

    suite: str
    benchmark_id: str
    train_id: str
    match: str
    share: float


class Overlaps:
    """Finds the overlaps of any problem with `benchmarks`. Time per problem is linear in its length."""

    def __init__(self, benchmarks: Iterable[Problem]) -> None:
        self._problems: list[Problem] = []
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._alnum: dict[str, list[int]] = defaultdict(list)
        self._grams: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._num_grams: list[int] = []
        for index, problem in enumerate(benchmarks):
            self._problems.append(problem)
            self._exact[_exact(problem.prompt)].append(index)
            self._alnum[_alnum(problem.prompt)].append(index)
            grams = _grams(problem.prompt)
            self._num_grams.append(len(grams))
            for gram in grams:
                self._grams[gram].append(index)

    def of(self, problem: Problem) -> list[Overlap]:
        """The benchmark problems that `problem` overlaps with, in their order."""
        found: dict[int, tuple[str, float]] = {}
        for index in self._exact.get(_exact(problem.prompt), ()):
            found[index] = ("exact", 1.0)
        # Not of problems without a letter or digit, which would all be the same.
        if alnum := _alnum(problem.prompt):
            for index in self._alnum.get(alnum, ()):
                found.setdefault(index, ("alnum", 1.0))
        shared = Counter(index for gram in _grams(problem.prompt) for index in self._grams.get(gram, ()))
        for index, count in shared.items():
            if (share := count / self._num_grams[index]) >= MIN_SHARE:
                found.setdefault(index, ("13gram", share))
        return [
            Overlap(self._problems[index].suite, self._problems[index].id, problem.id, match, share)
            for index, (match, share) in sorted(found.items())
        ]


def decontaminate(problems: Sequence[Problem], overlaps: Overlaps) -> tuple[list[Problem], list[Overlap]]:
    """The problems without an overlap, and the overlaps of the others."""
    kept: list[Problem] = []
    removed: list[Overlap] = []
    for problem in problems:
        found = overlaps.of(problem)
        removed += found
        if not found:
            kept.append(problem)
    return kept, removed


def _exact(text: str) -> str:
    return _SPACES_AND_DOLLARS.sub("", text)


def _alnum(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[start : start + NUM_WORDS]) for start in range(len(words) - NUM_WORDS + 1)}
