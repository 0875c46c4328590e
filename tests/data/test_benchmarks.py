"""The named sets: table, checks at load, field mapping of Hub copies, decontamination; the real sets where a
copy of them lies beside."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pns.config import Config, Data, DataSource, Decoding, Evaluate, JsonlData
from pns.data import benchmarks
from pns.data.benchmarks import BENCHMARKS, TRAINING_SETS, Hub, ProblemSet, content_hash, decoding
from pns.data.decontamination import Overlaps, decontaminate
from pns.data.problems import load_named, load_problem_sets, load_suites, read_hub, read_problems, removals
from pns.errors import UserError
from pns.recipe import load
from pns.records import AnswerRule, Problem

DATA = Path(os.environ["PNS_DATA"])
here = pytest.mark.skipif(
    not (DATA / "benchmarks").is_dir(), reason=f"the problem sets are not there: {DATA}"
)
local = Data(source=DataSource.jsonl, root=str(DATA))
SEVEN = ("gsm8k", "math500", "amc23", "minerva_math", "olympiadbench", "aime24", "aime25")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------------------ the real sets


@here
@pytest.mark.parametrize("name", [*BENCHMARKS, *TRAINING_SETS])
def test_real_sets_are_those_of_the_table(name: str) -> None:
    """Load checks count and hash; here the records are read by hand."""
    table = BENCHMARKS if name in BENCHMARKS else TRAINING_SETS
    problems, identity = load_named(name, local, table)
    rows = []
    for part in table[name].parts or [name]:
        path = next(path for path in sorted(DATA.glob(f"*/{part}.*")))
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        rows += [json.loads(line) for line in text.split("\n") if line]
    assert identity.count == len(rows) == table[name].count
    assert identity.sha256 == table[name].sha256
    assert identity.without_answer == tuple(row["id"] for row in rows if not row["answer"])
    asked = [row for row in rows if row["answer"]]
    assert [(p.id, p.prompt, p.answer) for p in problems] == [
        (row["id"], row["problem"], row["answer"]) for row in asked
    ]
    assert [p.level for p in problems] == [str(row.get("level", "")).removeprefix("Level ") for row in asked]
    assert [p.subject for p in problems] == [row.get("subject", "") for row in asked]


@here
def test_a_set_in_parts_needs_all_of_them(tmp_path: Path) -> None:
    shutil.copy(DATA / "benchmarks/math500.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"math: .*nor are all of .*math_test_minus_math500\.jsonl\)"):
        load_named("math", Data(root=str(tmp_path)))


@here
def test_files_are_those_of_the_sums() -> None:
    """The README's own sums: a second check, over bytes."""
    import hashlib

    lines = [
        line.split()
        for line in (DATA / "README.md").read_text().splitlines()
        if line.count("  ") == 1 and len(line.split()[0]) == 64
    ]
    assert len(lines) >= 14
    for digest, name in lines:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest


@here
def test_rules_of_real_answers() -> None:
    problems = {problem.id: problem for problem in load_named("olympiadbench", local)[0]}
    assert sum(problem.rule.unordered for problem in problems.values()) == 94
    assert sum(problem.rule.unit != "" for problem in problems.values()) == 8
    assert problems["olympiadbench/2592"].rule.tolerance == 0.1
    assert sum(problem.rule.tolerance > 0 for problem in problems.values()) == 1


@here
@pytest.mark.parametrize(
    ("damage", "word"),
    [("short", "records, 30 are expected"), ("changed", "sha256"), ("missing", "does not exist")],
)
def test_a_damaged_set_is_an_error(tmp_path: Path, damage: str, word: str) -> None:
    lines = (DATA / "benchmarks" / "aime24.jsonl").read_text().splitlines(keepends=True)
    if damage == "short":
        lines = lines[:-1]
    elif damage == "changed":
        lines[3] = lines[3].replace('"answer": "', '"answer": "9', 1)
    if damage != "missing":
        (tmp_path / "aime24.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=word) as error:
        load_named("aime24", Data(root=str(tmp_path)))
    assert "aime24" in str(error.value)
    assert "\n" not in str(error.value)


@here
def test_overlaps_are_the_reference_answer() -> None:
    """Every pair and share of the reference, no other, in seconds."""
    begin = time.monotonic()
    sets = [name for name in BENCHMARKS if name != "math"]  # whose rest is one of the files
    overlaps = Overlaps(problem for name in sets for problem in load_named(name, local)[0])
    found = {}
    for file in sorted((DATA / "train").glob("*.jsonl*")):
        if file.stem != "overlaps":
            kept, removed = decontaminate(problems := read_problems(file, "train"), overlaps)
            assert len(kept) == len(problems) - len({overlap.train_id for overlap in removed})
            found |= {(overlap.benchmark_id, overlap.train_id): overlap for overlap in removed}
    reference = [json.loads(line) for line in (DATA / "train" / "overlaps.jsonl").read_text().splitlines()]
    assert set(found) == {(row["benchmark_id"], row["train_id"]) for row in reference}
    for row in reference:
        overlap = found[row["benchmark_id"], row["train_id"]]
        assert round(overlap.share, 2) == row["share"]
        assert (overlap.match == "13gram") is (row["match"] == "13gram")
    assert time.monotonic() - begin < 60


@here
def test_training_problems_of_a_suite_are_removed() -> None:
    files = JsonlData(train="gsm8k_train", reward="math_train")
    config = Config(
        data=Data(source=DataSource.jsonl, jsonl=files, benchmarks=["gsm8k", "amc23"], root=str(DATA))
    )
    sets = load_problem_sets(config)
    report = removals(sets.removed)
    # gsm8k_train holds one problem of gsm8k twice; math_train none of these two, but some of benchmarks that
    # lie beside them
    assert len(sets.train) == 7473 - report["train"]["problems"] == 7473 - 2
    assert len(sets.reward) == 7498 - report["reward"]["problems"] == 7498 - 32
    assert report["train"]["by_suite"] == {"gsm8k": 2}
    assert set(report["reward"]["by_suite"]) == {"math500", "olympiadbench", "college_math"}
    assert not {overlap.train_id for overlap in sets.removed["reward"]} & {
        problem.id for problem in sets.reward
    }
    config.data.decontaminate = False
    assert len(load_problem_sets(config).train) == 7473


# ------------------------------------------------------------------------------------------------------------------ the rules, by hand


def test_the_table_is_complete() -> None:
    assert set(SEVEN) <= set(BENCHMARKS)
    for name, found in (BENCHMARKS | TRAINING_SETS).items():
        assert len(found.sha256) == 64, name
        assert found.hub is None or len(found.hub.revision) == 40, name
    sampled = {name for name, found in BENCHMARKS.items() if found.decoding == Decoding(32, 0.6, 0.95)}
    assert sampled == {"amc23", "aime24", "aime25"}
    assert all(BENCHMARKS[name].decoding == Decoding(1, 0.0, 1.0) for name in BENCHMARKS.keys() - sampled)
    assert all(BENCHMARKS[name].hub for name in SEVEN)


def test_content_hash_by_hand() -> None:
    pairs = [("1+1?", "2"), ("a\nb", "x")]
    assert content_hash(pairs) == content_hash(reversed([("  1+1?", "2"), ("a\r\nb", "x\n")]))
    # sha256 of the two JSON lists in sorted order, one a line: printf '["1+1?", "2"]\n["a\\nb", "x"]' |
    # sha256sum
    assert content_hash(pairs) == "434e730996ef36d9a33b3a112f2b72dfa7036791702a73f6dda22c01192ec72d"
    for other in (
        [("1+1?", "3"), ("a\nb", "x")],
        [("1+1?", "2")],
        [("1+1?2", ""), ("a\nb", "x")],
        [*pairs, pairs[0]],
    ):
        assert content_hash(other) != content_hash(pairs)


def test_overlaps_by_hand() -> None:
    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
    ]
    text = " ".join(words)
    overlaps = Overlaps(
        [Problem("b", text + " $x=2$?", "1", "suite"), Problem("short", "What is $2-3$?", "1", "suite")]
    )

    def match(prompt: str) -> list[tuple[str, str, float]]:
        return [(o.benchmark_id, o.match, o.share) for o in overlaps.of(Problem("t", prompt, "1"))]

    assert match(text.replace(" ", "\n") + "x=2?") == [("b", "exact", 1.0)]
    assert match(text + " x2") == [("b", "alnum", 1.0)]
    assert match("What is 2 + 3?") == [("short", "alnum", 1.0)]
    # 16 words have 4 sequences of 13; the first 14 words two of them, the first 13 one
    assert match("Find it: " + text.upper() + " birds sing") == [("b", "13gram", 0.5)]
    assert match(" ".join(words[:13])) == []
    assert match("") == []


def test_words_of_a_formula() -> None:
    """Digits and letters part: the spelling `2x-3` is that of `2x - 3`."""
    base = "Let f be the function with f(x) = 2x-3 and let g be x+1. Find it"
    overlaps = Overlaps([Problem("b", base, "1", "suite")])
    assert [o.match for o in overlaps.of(Problem("t", base.replace("2x-3", "2 x - 3") + " now.", "1"))] == [
        "13gram"
    ]


def test_decoding_precedence() -> None:
    data = Data(source=DataSource.jsonl, benchmarks=["gsm8k", "aime24"])
    config = Config(data=data)
    assert decoding(config, "gsm8k") == Decoding(1, 0.0, 1.0, 2048)
    assert decoding(config, "aime24") == Decoding(32, 0.6, 0.95, 2048)
    assert decoding(config, "own") == Decoding(1, 0.0, 1.0, 2048)
    config.evaluate = Evaluate(
        samples_per_problem=4,
        temperature=1.0,
        per_suite={"aime24": Decoding(max_new_tokens=99, temperature=0.7)},
    )
    assert decoding(config, "gsm8k") == Decoding(4, 1.0, 1.0, 2048)
    assert decoding(config, "aime24") == Decoding(4, 0.7, 0.95, 99)
    config.evaluate = Evaluate(samples_per_problem=4)
    with pytest.raises(UserError, match=r"gsm8k asks for 4 samples at temperature 0"):
        decoding(config, "gsm8k")


def test_configuration_of_suites(tmp_path: Path) -> None:
    own = write(
        tmp_path / "own.jsonl",
        [{"problem": "1+1?", "answer": "2", "subject": "sums", "level": "Level 3", "multiple": True}],
    )
    base = ["data.source=jsonl", "models.backbone=owner/model"]
    config = load(
        None,
        [*base, f"data.jsonl.suites.own={own}", "evaluate.per_suite.own.temperature=0.5"],
        training=False,
    )
    suites, identities = load_suites(config)
    assert suites["own"] == [
        Problem("own/1", "1+1?", "2", "own", None, "sums", "3", AnswerRule(unordered=True))
    ]
    assert identities["own"].count == 1
    assert decoding(config, "own").temperature == 0.5
    for words, match in (
        ([], r"name at least one suite"),
        ([f"data.jsonl.suites.gsm8k={own}", "data.benchmarks=[gsm8k]"], r"suites\.gsm8k"),
        (["data.benchmarks=[gsm8k]", "evaluate.per_suite.gsm8k.top_p=2"], r"top_p: 2\.0 must be in"),
        (["data.benchmarks=[gsm8k]", "evaluate.samples_per_problem=0"], r"samples_per_problem: 0"),
        (
            [f"data.jsonl.suites.own={own}", "evaluate.per_suite.gsm8k.temperature=1"],
            r"per_suite\.gsm8k: no such suite; there are own",
        ),
        (
            [f"data.jsonl.suites.own={own}", "evaluate.samples_per_problem=2"],
            r"own asks for 2 samples at temperature 0",
        ),
    ):
        with pytest.raises(UserError, match=match):
            load_suites(load(None, [*base, *words], training=False))
    for name, match in (
        ("gsm9k", "no set of that name"),
        ("gsm8k_train", "no set of that name"),
        ("college_math", r"data\.root"),
    ):
        with pytest.raises(UserError, match=match):
            load_suites(load(None, [*base, f"data.benchmarks=[{name}]"], training=False))


def test_hub_fields_become_records(tmp_path: Path) -> None:
    """The pinned mappings on copies in the Hub's own form; a directory stands for the data set."""
    rows = {
        "gsm8k": {"question": "How many?", "answer": "2 * 3 = <<2*3=6>>6\n#### 1,006"},
        "amc23": {"id": 0, "question": "How far?", "answer": 27.0, "url": ""},
        "aime24": {"id": 60, "problem": "Find it.", "solution": r"So \boxed{204}.", "url": ""},
        "olympiadbench": {
            "question": "Solve.",
            "final_answer": ["$1,2$"],
            "subfield": "Algebra",
            "is_multiple_answer": True,
            "unit": None,
            "error": None,
        },
        "math500": {
            "problem": "Add.",
            "solution": "s",
            "answer": "3",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/a/1.json",
        },
    }
    found = {}
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "test.jsonl", [row])
        hub = BENCHMARKS[name].hub
        assert hub is not None
        copy = Hub(str(tmp_path / name), hub.revision, hub.fields, hub.answer)
        found[name] = next(read_hub(name, copy, hub.revision))
    assert {name: record["answer"] for name, record in found.items()} == {
        "gsm8k": "1,006",
        "amc23": "27",
        "aime24": "204",
        "olympiadbench": "$1,2$",
        "math500": "3",
    }
    assert found["math500"]["id"] == "math500/test/a/1.json"
    assert found["gsm8k"]["id"] == "gsm8k/0"
    assert found["olympiadbench"]["multiple"] is True
    with pytest.raises(UserError, match="no field 'question'"):
        next(
            read_hub(
                "gsm8k",
                Hub(str(tmp_path / "math500"), "0" * 40, {"problem": "question", "answer": "answer"}),
                "0" * 40,
            )
        )


def test_hub_copies_are_counted_and_other_commits_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    write(folder / "test.jsonl", [{"q": "1+1?", "answer": "2"}, {"q": "2+2?", "answer": "4"}])
    hub = Hub(str(folder), "a" * 40, {"problem": "q", "answer": "answer"})
    digest = content_hash([("1+1?", "2"), ("2+2?", "4")])
    other = content_hash([("1+1?", "3")])

    def loaded(count: int, sha256: str, revision: str = "") -> int:
        monkeypatch.setitem(benchmarks.BENCHMARKS, "sums", ProblemSet(count, sha256, hub))
        problems, identity = load_named("sums", Data(revisions={"sums": revision} if revision else {}))
        assert identity.sha256 == digest
        assert identity.source.endswith("@" + (revision or "a" * 40))
        return len(problems)

    assert loaded(2, digest) == 2
    assert loaded(2, other) == 2  # the pinned commit stands for its content
    assert loaded(2, digest, "b" * 40) == 2
    with pytest.raises(UserError, match="has 2 records, 3 are expected"):
        loaded(3, digest)
    with pytest.raises(UserError, match="sha256"):
        loaded(2, other, "b" * 40)


def test_a_run_reports_what_it_removed(tmp_path: Path) -> None:
    asked = "A farmer has 3 hens and 4 cows and sells 2 of the hens; how many animals are left on the farm?"
    train = write(
        tmp_path / "train.jsonl",
        [{"problem": asked + " Say it.", "answer": "5"}, {"problem": "1+1?", "answer": "2"}],
    )
    suite = write(tmp_path / "suite.jsonl", [{"problem": asked, "answer": "5"}])
    data = Data(source=DataSource.jsonl, jsonl=JsonlData(train=str(train), suites={"own": str(suite)}))
    sets = load_problem_sets(Config(data=data))
    assert [problem.prompt for problem in sets.train] == ["1+1?"]
    assert removals(sets.removed)["train"] == {
        "problems": 1,
        "by_suite": {"own": 1},
        "overlaps": [
            {
                "suite": "own",
                "benchmark_id": "suite/1",
                "train_id": "train/1",
                "match": "13gram",
                "share": 1.0,
            }
        ],
    }
    shutil.copy(suite, train)
    with pytest.raises(UserError, match=r"every problem of .*train\.jsonl is also in a suite"):
        load_problem_sets(Config(data=data))


def test_a_models_own_decoding_comes_before_the_benchmarks(tmp_path: Path) -> None:
    config = Config(
        data=Data(benchmarks=["aime24"]), evaluate=Evaluate(min_p=0.1, from_generation_config=True)
    )
    config.evaluate.per_suite["aime24"] = Decoding(top_k=7)
    config.models.backbone = str(tmp_path)
    with pytest.raises(UserError, match=r"has no generation_config\.json; leave it false"):
        decoding(config, "aime24")
    said = {"do_sample": True, "temperature": 0.8, "top_k": 20, "min_p": 0.2, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    own = decoding(config, "aime24")
    assert (own.samples_per_problem, own.temperature, own.top_p) == (32, 0.8, 1.0)
    assert (own.top_k, own.min_p, own.repetition_penalty, own.presence_penalty) == (7, 0.1, 1.05, None)
    config.evaluate.from_generation_config = False
    assert decoding(config, "aime24").temperature == 0.6
