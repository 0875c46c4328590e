"""The run's problems, and what is known of them."""

from __future__ import annotations

from pathlib import Path

from pns.answers.compare import same_answer
from pns.answers.extract import extract_boxed
from pns.config import Config, Data, DataSource, TinyData
from pns.data.problems import load_problem_sets, read_problems

OWN = Path(__file__).parents[1] / "cases" / "problems.jsonl"


def test_only_the_tiny_world_has_a_checker(tmp_path: Path) -> None:
    tiny = TinyData(num_train=2, num_reward=2, num_preference=2, num_test_per_suite=1)
    problems = load_problem_sets(Config(data=Data(tiny=tiny)))
    assert problems.checker is not None
    problem = problems.train[0]
    right = problem.solution or ""
    assert problems.checker.check(problem, right).first_wrong_end is None
    assert problems.checker.rubric(problem, right) == (3, 3, 3, 3)
    wrong = right.replace(f"boxed{{{problem.answer}}}", "boxed{0}")
    found = problems.checker.check(problem, wrong)
    assert (found.first_wrong_end, found.single_error) == (len(wrong), True)

    file = tmp_path / "own.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    data = Data(source=DataSource.jsonl)
    data.jsonl.train, data.jsonl.suites, data.decontaminate = str(file), {"own": str(file)}, False
    assert load_problem_sets(Config(data=data)).checker is None


def test_our_own_problems_have_the_answers_of_their_solutions() -> None:
    problems = read_problems(OWN, "train")
    assert len(problems) == len({problem.prompt for problem in problems}) == 32
    for problem in problems:
        solution = problem.solution or ""
        stated = extract_boxed(solution) or solution.rpartition("#### ")[2]
        assert same_answer(problem.answer, stated), problem.id
