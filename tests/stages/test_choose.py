"""What the arms of a study share: solutions, the problems that all have a negative of, and right sides."""

from __future__ import annotations

from typing import Any

import pytest

from pns.config import Config, PairStage
from pns.errors import UserError
from pns.files import read_jsonl, write_jsonl
from pns.records import Completion, PreferencePair, from_json
from pns.run.stage import ModelFiles
from pns.stages.artefacts import Negatives, RewardModels, Samples, TrainedModel
from pns.stages.choose import choose, pair_arm, shared_with_all, solve
from tests.stages.test_pair import negatives_of

TARGET = "target"


def solutions(bench: Any, right: dict[str, list[str]]) -> Samples:
    """Right completions by problem."""
    num = max(len(own) for own in right.values())
    ids = list(right)

    def write(problem: str, sample: int, model: str) -> str:
        own = right[problem]
        number = sample % num
        return own[number] if number < len(own) else bench.malformed

    bench.fleet.rollout.write = write
    config = Config(pair=PairStage(samples_per_problem=num))
    with bench.making("solve") as ctx:
        settings, target = solve.settings(config), TrainedModel(bench.store / TARGET)
        return solve.make(ctx, settings, target, bench.problems(len(ids)))


def negatives(bench: Any, name: str, texts: dict[str, list[str]]) -> Negatives:
    made = negatives_of(bench, texts)
    own = Negatives(bench.store / name, name)
    own.directory.mkdir()
    own.negatives_file.write_bytes(made.negatives_file.read_bytes())
    return own


def test_arms_have_the_same_problems_and_right_sides_and_their_own_wrong_ones(bench: Any) -> None:
    near, far = "So Ann=3. So Dan=4. ", "So Dan=4. So Ann=3. "
    samples = solutions(
        bench,
        {
            "p0": [bench.solution(10, far), bench.solution(10, near)],
            "p1": [bench.solution(11)],
            "p2": [bench.solution(12)],
        },
    )
    wrong_near = bench.solution(70, "So Ann=3. So Dan=9. ")
    first = negatives(
        bench, "first", {"p0": [wrong_near], "p1": [bench.solution(3)], "p2": [bench.solution(4)]}
    )
    other = negatives(bench, "other", {"p0": [bench.solution(71, near)], "p2": [bench.solution(5)]})
    with bench.making("choose") as ctx:
        choice = choose.make(ctx, choose.settings(Config()), samples, {"0": first, "1": other})
    # p1 has no negative of the other source; of p0 the second right one is nearer to both.
    assert list(choice.choice()) == ["p0", "p2"]
    target, sides = TrainedModel(bench.store / TARGET), {}
    for name, own in (("first", first), ("other", other)):
        with bench.making(f"pair_{name}") as ctx:
            rewards, backbone = RewardModels(bench.store / "rewards"), ModelFiles("backbone")
            settings = pair_arm.settings(Config())
            arguments = target, samples, own, rewards, bench.problems(3), backbone, choice
            made = pair_arm.make(ctx, settings, *arguments)
        pairs = [from_json(PreferencePair, row) for row in read(made)]
        sides[name] = [(pair.problem_id, pair.chosen) for pair in pairs]
        assert pairs[0].rejected == own.negatives()[0].completion.text
    assert sides["first"] == sides["other"] == [("p0", bench.solution(10, near)), ("p2", bench.solution(12))]
    with bench.making("pair_own") as ctx:  # without the choice: every problem that the source has one of
        arguments = target, samples, first, rewards, bench.problems(3), backbone, None
        made = pair_arm.make(ctx, settings, *arguments)
    assert [row["problem_id"] for row in read(made)] == ["p0", "p1", "p2"]


def read(pairs: Any) -> list[dict[str, Any]]:
    return list(read_jsonl(pairs.pairs_file))


def test_no_problem_in_common_is_said_with_the_way_out(bench: Any) -> None:
    samples = solutions(bench, {"p0": [bench.solution(10)]})
    empty = Negatives(bench.store / "empty")
    empty.directory.mkdir()
    write_jsonl(empty.negatives_file, [])
    with bench.making("choose") as ctx, pytest.raises(UserError, match=r"study\.pairs=own"):
        choose.make(ctx, choose.settings(Config()), samples, {"0": empty})


def test_how_near_a_solution_is_to_the_negatives_of_all_sources() -> None:
    def completion(*ids: int) -> Completion:
        return Completion("", "p", "", ids, (), "stop")

    right = completion(1, 2, 3, 4)
    assert shared_with_all(right, [[completion(1, 2, 9, 9), completion(1, 9, 9, 9)]], 2.0) == 2
    assert shared_with_all(right, [[completion(1, 2, 9, 9)], [completion(1, 9, 9, 9)]], 2.0) == 1
    assert shared_with_all(right, [[completion(1, 2, 9, 9)], []], 2.0) is None
    assert shared_with_all(right, [[completion(1)]], 2.0) is None  # too short for a pair
