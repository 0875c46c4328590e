"""The tiny world: problems, the step checker, the rubric, corruptions, and the tokenizer."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pns.errors import UserError
from pns.records import Problem
from pns.tiny.tokenizer import build_tokenizer
from pns.tiny.world import (
    ERROR_KINDS,
    SPLITS,
    SUITES,
    check,
    corrupt,
    mixed_solution,
    parse_problem,
    problems,
    random_solution,
    rubric,
)

# Bob 12, Cal 19, Eve 57, Gus 69; Fay (6) is a distractor.
PROBLEM = Problem(
    "p",
    "Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. Gus has Eve plus Bob. Fay has half of Bob. "
    "How many has Gus? ",
    "69",
)
CAL, EVE, GUS = "Cal has 12+7=19. ", "Eve has 19*3=57. ", "Gus has 57+12=69. "


def write(*steps: str, box: int = 69) -> str:
    return f"<think>{''.join(steps)}</think>\\boxed{{{box}}}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def drawn_suites() -> dict[str, list[Problem]]:
    return {suite: problems("test", suite, 200, 0) for suite in SUITES}


@pytest.mark.parametrize(
    "text",
    [
        write(CAL, EVE, GUS),
        write("So Cal has 7+12=19. ", "3*19=57 for Eve. ", "So Gus has 12+57=69. "),
        write("12+7=19 for Cal. ", "Eve has 19+19+19=57. ", GUS),
    ],
)
def test_right_solutions(text: str) -> None:
    found = check(PROBLEM, text)
    assert found.correct
    assert found.answer_correct
    assert found.format_ok
    assert (found.first_wrong_step, found.first_wrong_end, found.kinds) == (None, None, ())
    assert [step.name for step in found.steps] == ["Cal", "Eve", "Gus"]
    assert (
        "<think>" + "".join(text[step.start : step.end] for step in found.steps)
        == text[: text.index("</think>")]
    )
    assert rubric(PROBLEM, text) == (3, 3, 3, 3)


# (solution, kinds, first wrong step, the sentence it ends with, rubric)
WRONG = [
    (
        write("Cal has 12+7=18. ", "Eve has 18*3=54. ", "Gus has 54+12=66. ", box=66),
        ["arithmetic"],
        0,
        "=18. ",
        (3, 3, 3, 3),
    ),
    (write(CAL, "Eve has 19*3=47. ", "Gus has 47+12=59. ", box=59), ["arithmetic"], 1, "=47. ", (3, 3, 3, 3)),
    (
        write("12-7=5 for Cal. ", "Eve has 5*3=15. ", "Gus has 15+12=27. ", box=27),
        ["operator"],
        0,
        " for Cal. ",
        (3, 3, 3, 3),
    ),
    (write(CAL, "Eve has 19+3=22. ", "Gus has 22+12=34. ", box=34), ["operator"], 1, "=22. ", (3, 3, 3, 3)),
    (
        write("Cal has 12+8=20. ", "Eve has 20*3=60. ", "Gus has 60+12=72. ", box=72),
        ["operand"],
        0,
        "=20. ",
        (3, 1, 3, 3),
    ),
    (write(CAL, "Eve has 19+19=38. ", "Gus has 38+12=50. ", box=50), ["operand"], 1, "=38. ", (3, 1, 3, 3)),
    (
        write("Cal has 12+8=20. ", "Eve has 20*4=80. ", "Gus has 80+12=92. ", box=92),
        ["operand"] * 2,
        0,
        "=20. ",
        (3, 0, 3, 3),
    ),
    (write(EVE, CAL, GUS), ["order"], 0, "=57. ", (0, 0, 0, 0)),
    (write(CAL, GUS, EVE), ["order"], 1, "=69. ", (0, 0, 0, 0)),
    (write(CAL, "Eve has 12*3=36. ", "Gus has 36+12=48. ", box=48), ["entity"], 1, "=36. ", (0, 0, 0, 0)),
    (write("Fay has 12+7=19. ", EVE, GUS), ["entity"], 0, "=19. ", (0, 0, 0, 0)),
    (write(CAL, EVE, "Ann has 57+12=69. "), ["entity"], 2, "=69. ", (0, 0, 0, 0)),
    (write("Bob has 12+1=13. ", CAL, EVE, GUS), ["entity"], 0, "=13. ", (0, 0, 0, 0)),
    (write(CAL, EVE, GUS, box=70), ["answer"], 3, "\\boxed{70}", (3, 0, 3, 0)),
    (write(CAL, EVE, GUS, box=19), ["query"], 3, "\\boxed{19}", (0, 0, 0, 0)),
    (write(CAL, EVE, box=57), ["query"], 2, "\\boxed{57}", (0, 0, 0, 0)),
    (write(CAL, EVE, GUS, "57+12=69 for Gus. "), ["duplicate"], 3, " for Gus. ", (0, 0, 0, 0)),
    (write(CAL, EVE, GUS, "Gus has 57+12=68. "), ["duplicate", "arithmetic"], 3, "=68. ", (0, 0, 0, 0)),
    (write(CAL, "Fay has 12/2=6. ", EVE, GUS), ["surplus"], 1, "=6. ", (0, 0, 0, 0)),
    (write(EVE, GUS), ["missing"], 0, "=57. ", (3, 2, 1, 3)),
    (write(CAL, EVE), ["missing"], 2, "\\boxed{69}", (3, 2, 1, 3)),
    (write(), ["missing"] * 3, 0, "\\boxed{69}", (3, 0, 0, 3)),
    (write(box=33), ["answer"] + ["missing"] * 3, 0, "\\boxed{33}", (3, 0, 0, 0)),
    # Both the step and its use are wrong: the repair is not consistent with the slip.
    (write("Cal has 12+7=18. ", EVE, GUS), ["arithmetic", "operand"], 0, "=18. ", (3, 1, 3, 3)),
    (
        write("Cal has 12+7=18. ", "Eve has 18*3=54. ", "Gus has 54+12=66. "),
        ["arithmetic", "answer"],
        0,
        "=18. ",
        (3, 0, 3, 0),
    ),
    (write(CAL, EVE, GUS) + " ", ["format"], 3, "\\boxed{69} ", (0, 0, 0, 0)),
    (write(CAL, EVE, GUS) + "\\boxed{69}", ["format"], 3, "\\boxed{69}", (0, 0, 0, 0)),
    (write(CAL, "Eve is 57. ", GUS), ["format"], 1, "Eve is 57. ", (0, 0, 0, 0)),
    (write("Cal has 12+07=19. ", EVE, GUS), ["format"], 0, "=19. ", (0, 0, 0, 0)),
    (write(CAL, EVE, GUS).removeprefix("<think>"), ["format"], 0, "=19. ", (0, 0, 0, 0)),
    (f"<think>{CAL}{EVE}{GUS}</think>", ["format"], 3, "</think>", (0, 0, 0, 0)),
    ("", ["format"], 0, "", (0, 0, 0, 0)),
    ("The answer is 69, \\frac{138}{2}.", ["format"], 0, ".", (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("text", "kinds", "first", "ending", "label"), WRONG)
def test_wrong_solutions(
    text: str, kinds: list[str], first: int, ending: str, label: tuple[int, ...]
) -> None:
    found = check(PROBLEM, text)
    assert not found.correct
    assert list(found.kinds) == kinds
    assert found.first_wrong_step == first
    assert text[: found.first_wrong_end].endswith(ending)
    assert found.single_error == (len(kinds) == 1 and kinds != ["format"])
    assert found.format_ok == ("format" not in kinds)
    assert found.answer_correct == ("\\boxed{69}" in text)
    assert rubric(PROBLEM, text) == label


def test_carried_steps_are_not_own_errors() -> None:
    steps = check(PROBLEM, WRONG[0][0]).steps
    assert [(step.kinds, step.carried) for step in steps] == [
        (("arithmetic",), False),
        ((), True),
        ((), True),
    ]


def test_accepts_exactly_the_right_solutions() -> None:
    """All right solutions of a small problem, written out here, against every change of one token of some of
    them."""
    problem = Problem(
        "q",
        "Dan has 8. Hal has 5. Ann has half of Dan. Bob has 2 times Hal. Cal has Ann plus Bob. "
        "How many has Cal? ",
        "14",
    )
    forms = {"Ann": ["8/2=4"], "Bob": ["5*2=10", "2*5=10", "5+5=10"], "Cal": ["4+10=14", "10+4=14"]}
    phrases = ("{0} has {1}. ", "So {0} has {1}. ", "{1} for {0}. ")
    right = {
        f"<think>{''.join(steps)}</think>\\boxed{{14}}"
        for order in (("Ann", "Bob", "Cal"), ("Bob", "Ann", "Cal"))
        for steps in itertools.product(
            *([p.format(name, form) for p in phrases for form in forms[name]] for name in order)
        )
    }
    assert len(right) == 2 * 3 * 9 * 6
    assert all(check(problem, text).correct for text in right)
    rng = Random(0)
    assert {random_solution(problem, rng) for _ in range(6000)} == right
    tokenizer = build_tokenizer()
    words = [tokenizer.decode([token]) for token in range(4, len(tokenizer))]
    tried = 0
    for text in sorted(right)[::60]:
        tokens = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        for position, word in itertools.product(range(len(tokens)), words):
            changed = "".join([*tokens[:position], word, *tokens[position + 1 :]])
            assert check(problem, changed).correct == (changed in right), changed
            tried += changed != text
    assert tried > 5000


@pytest.mark.parametrize("suite", SUITES)
def test_generated_solutions_are_right(suite: str, drawn_suites: dict[str, list[Problem]]) -> None:
    rng = Random(1)
    golds: dict[str, str] = {}
    many = 0
    for problem in drawn_suites[suite]:
        assert problem.solution is not None
        solutions = {problem.solution, *(random_solution(problem, rng) for _ in range(8))}
        assert all(check(problem, solution).correct for solution in solutions)
        many += len(solutions) > 1
        golds[problem.answer] = problem.solution
    assert many == 200
    for answer, solution in golds.items():
        assert verify(parse(f"\\boxed{{{answer}}}"), parse(solution))
        assert not verify(parse(f"\\boxed{{{int(answer) + 1}}}"), parse(solution))


def test_suites_differ(drawn_suites: dict[str, list[Problem]]) -> None:
    worlds = {
        suite: [parse_problem(problem.prompt) for problem in rows] for suite, rows in drawn_suites.items()
    }
    num_steps = {
        suite: {sum(not w.is_base(n) for n in w.needed()) for w in rows} for suite, rows in worlds.items()
    }
    assert num_steps == {"short": {1, 2}, "mul": {3}, "long": {4}} | {
        suite: {2, 3} for suite in ("base", "distract", "big", "shuffle")
    }
    assert all(
        len(w.facts) - len(w.needed()) == (suite == "distract")
        for suite, rows in worlds.items()
        for w in rows
    )
    assert all(50 <= int(problem.answer) <= 99 for problem in drawn_suites["big"])
    assert all(sum(f.relation in ("times", "half") for f in w.facts.values()) >= 2 for w in worlds["mul"])
    forward = {
        s: sum(
            all(w.values().keys() >= set(f.parts) for f in w.facts.values()) and in_order(w.text())
            for w in worlds[s]
        )
        for s in SUITES
    }
    assert forward["shuffle"] < 100
    assert all(count == 200 for suite, count in forward.items() if suite != "shuffle")


def in_order(prompt: str) -> bool:
    """Whether every fact of a problem refers to earlier facts only."""
    facts = list(parse_problem(prompt).facts.values())
    return all(
        part in {f.name for f in facts[:index]} for index, fact in enumerate(facts) for part in fact.parts
    )


def test_splits_are_disjoint_and_reproducible() -> None:
    drawn = {split: problems(split, None, 42, 3) for split in SPLITS}
    for split, rows in drawn.items():
        assert rows == problems(split, None, 42, 3)
        assert rows[:20] == problems(split, None, 20, 3)
        assert rows != problems(split, None, 42, 4)
        assert {parse_problem(problem.prompt).split() for problem in rows} == {split}
        assert len({problem.id for problem in rows}) == len({problem.prompt for problem in rows}) == 42
        assert {problem.suite for problem in rows} == set(SUITES)
    trees = [{parse_problem(problem.prompt).tree() for problem in rows} for rows in drawn.values()]
    assert all(not a & b for a, b in itertools.combinations(trees, 2))
    renamed = parse_problem("Eve has 7 more than Hal. Ann has 3. Hal has 12. How many has Eve? ")
    assert renamed.split() == parse_problem("Bob has 12. Cal has 7 more than Bob. How many has Cal? ").split()


def test_curriculum_limits_steps() -> None:
    rows = problems("train", None, 60, 0, max_steps=2)
    assert {len(check(problem, problem.solution or "").steps) for problem in rows} == {1, 2}
    assert "long" not in {problem.suite for problem in rows}


def test_wrong_derivations_seldom_give_the_right_answer() -> None:
    """Adding up or multiplying all numbers of a long problem in the order of the text is no short cut."""
    rng = Random(5)
    lucky = 0
    for problem in problems("test", "base", 100, 0):
        world = parse_problem(problem.prompt)
        numbers = [str(fact.number or 2) for fact in world.facts.values()]
        for _ in range(20):
            rng.shuffle(numbers)
            total = int(numbers[0])
            for number in numbers[1:]:
                total = total + int(number) if rng.random() < 0.7 else total * int(number)
            lucky += str(total) == problem.answer
    assert lucky / 2000 < 0.1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="unknown split 'dev'"):
        problems("dev", None, 1, 0)
    with pytest.raises(UserError, match="unknown suite 'hard'"):
        problems("test", "hard", 1, 0)
    with pytest.raises(UserError, match="max_steps=2"):
        problems("test", "long", 1, 0, max_steps=2)
    with pytest.raises(UserError, match="unknown kind of error 'typo'"):
        corrupt(PROBLEM, Random(0), "typo")
    with pytest.raises(UserError, match="cannot read"):
        check(Problem("x", "What is 1+1?", "2"), "")
    with pytest.raises(UserError, match="no fact about Cal"):
        check(Problem("x", "Bob has half of Cal. How many has Bob? ", "2"), "")
    with pytest.raises(UserError, match="circular"):
        check(Problem("x", "Bob has half of Cal. Cal has 2 times Bob. How many has Bob? ", "2"), "")


def test_mixed_solutions_have_the_misconceptions_that_are_asked_for() -> None:
    drawn = problems("train", None, 400, seed=5)
    rng = Random(0)
    kinds = Counter[str]()
    num_steps = 0
    for problem in drawn:
        relations = {fact.relation for fact in parse_problem(problem.prompt).facts.values()}
        found = check(problem, mixed_solution(problem, rng, {"times": 1.0}, 0, 0))
        assert found.correct or "times" in relations
        assert set(found.kinds) <= {"operator"}
        found = check(problem, mixed_solution(problem, rng, {}, 0.2, 0.1))
        kinds.update(kind for step in found.steps for kind in step.kinds)
        num_steps += len(found.steps)
    assert 0.14 < kinds["arithmetic"] / num_steps < 0.22
    assert 0.02 < kinds["entity"] / num_steps < 0.12


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_corruptions(kind: str, drawn_suites: dict[str, list[Problem]]) -> None:
    rng = Random(2)
    suites = ["distract"] if kind == "surplus" else ["base", "long"]
    made = 0
    for problem in [problem for suite in suites for problem in drawn_suites[suite][:30]]:
        found = check(problem, corrupt(problem, rng, kind))
        assert not found.correct
        if found.kinds[0] != ("format" if kind == "garbage" else kind):
            continue
        made += 1
        assert found.single_error == (kind not in ("format", "garbage"))
        if kind in ("order", "duplicate", "surplus", "missing"):
            assert found.answer_correct
        elif kind not in ("format", "garbage"):
            assert not found.answer_correct
    assert made >= (15 if kind == "surplus" else 50)


def test_tokenizer_round_trip(
    tokenizer: PreTrainedTokenizerFast, drawn_suites: dict[str, list[Problem]]
) -> None:
    assert 40 <= len(tokenizer) <= 60
    unknown = tokenizer.convert_tokens_to_ids("\N{REPLACEMENT CHARACTER}")
    lengths = []
    for problem in [problem for rows in drawn_suites.values() for problem in rows[:40]]:
        for text in (problem.prompt, problem.solution):
            ids = tokenizer.encode(text)
            assert unknown not in ids
            assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
        lengths.append(len(tokenizer.encode(problem.prompt)) + len(ids))
    assert max(lengths) <= 110
    for token in range(len(tokenizer)):
        assert tokenizer.encode(tokenizer.decode([token])) == [token]


def test_tokenizer_keeps_junk_visible(tokenizer: PreTrainedTokenizerFast) -> None:
    junk = r"Let $x=\frac{1}{2}$. Then Bob has 3"
    ids = tokenizer.encode(junk)
    assert tokenizer.decode(ids[-3:]) == "Bob has 3"
    assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode("") == []


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "user", "content": PROBLEM.prompt},
        {"role": "assistant", "content": write(CAL, EVE, GUS)},
    ]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == f"<bos>{PROBLEM.prompt}<solve>"
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == prompt + write(CAL, EVE, GUS) + "<eos>"
    ids = tokenizer.encode(whole)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{PROBLEM.prompt}<solve>{write(CAL, EVE, GUS)}"


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig, Qwen3Config])
def test_tokenizer_survives_saving(
    config: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """AutoTokenizer picks the class by the model's type: all of them must give the same ids."""
    tokenizer.save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    turns = [
        {"role": "user", "content": PROBLEM.prompt},
        {"role": "assistant", "content": write(CAL, EVE, GUS)},
    ]
    ids = tokenizer.apply_chat_template(turns)["input_ids"]
    assert loaded.apply_chat_template(turns)["input_ids"] == ids
    assert (
        loaded.decode(ids)
        == tokenizer.decode(ids)
        == f"<bos>{PROBLEM.prompt}<solve>{write(CAL, EVE, GUS)}<eos>"
    )
    for token in range(len(tokenizer)):
        assert loaded.encode(tokenizer.decode([token])) == [token]
    assert isinstance(loaded.encode("junk: x_1"), list)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "\\boxed{",
                "}",
                "Cal",
                "Eve",
                " has ",
                "So ",
                " for ",
                ". ",
                "=",
                *"+-*/0129",
                CAL,
                EVE,
                GUS,
            ]
        ),
        max_size=30,
    )
)
def test_checker_is_total_and_consistent(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = check(PROBLEM, text)
    assert found.correct == (not found.kinds)
    assert (found.first_wrong_end is None) == found.correct
    assert found.format_ok == ("format" not in found.kinds)
    assert all(0 <= score <= 3 for score in rubric(PROBLEM, text))
    for step in found.steps:
        assert text[step.start : step.end].endswith(". ")
