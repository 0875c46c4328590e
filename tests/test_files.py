"""Files that are complete or absent, JSON lines with one wording of their errors, and hashes."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pns.errors import UserError
from pns.files import (
    append_jsonl,
    cut_rows,
    json_lines,
    read_json,
    read_jsonl,
    remove,
    replacing,
    sha256_of_file,
    sha256_of_tree,
    stat_of_tree,
    write_json,
    write_jsonl,
)
from pns.records import Completion, Verdict, from_json, to_json


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5], "v": Verdict.WRONG})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5], "v": "wrong"}


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"x": 1}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(path, [{"x": 1.0}, {"x": math.nan}])

    def fail_halfway() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert read_jsonl(path) == [{"x": 1}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_missing_and_damaged_json_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{\n"x": \n')
    for path, message in (
        (tmp_path / "bad.json", r"bad.json is not valid JSON \(line"),
        (tmp_path / "no", "exist"),
    ):
        with pytest.raises(UserError, match=message):
            read_json(path)


def test_lines_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n \n{"x": "ë"}\r\n{"x": 3}', encoding="utf-8")
    expected = [(1, {"x": 1}), (4, {"x": "ë"}), (5, {"x": 3})]
    assert list(json_lines(tmp_path / "a.jsonl")) == expected
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert list(json_lines(str(tmp_path / "a.jsonl.gz"))) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', r"a.jsonl, line 2: not a JSON object \(Expecting value\)"),
        ("a.jsonl", b"[1]\n", r"line 1: not a JSON object \(a list\); of a list of objects, name"),
        ("a.jsonl", b"\xff\n", r"line 1: not a JSON object \(not UTF-8 text\)"),
        ("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}\n", r"line 1: not a JSON object \(Exceeds the limit"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 9, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("none.jsonl", None, "none.jsonl does not exist; name"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(json_lines(tmp_path / name))


def test_rows_are_appended_and_cut_at_a_torn_line_or_a_step(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, ({"step": step} for step in (0, 1, 1, 2)))
    with open(path, "a") as file:
        file.write('{"st')
    cut_rows(path)
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 1, 2]
    cut_rows(path, keep_below_step=1)
    assert read_jsonl(path) == [{"step": 0}]


def test_rows_are_what_json_reads(tmp_path: Path) -> None:
    log_probs = (-1.1920928955078125e-07, -0.0, 5e-324, 1e16, 0.1)
    completion = Completion("p#0", "p", "\u00e4\u2028\x00", (1, 2), log_probs, "stop")
    rows: list[Any] = [
        completion,
        {"large": 2**70, "nested": [[], {}, ((0.5,), (True, None))], "verdict": Verdict.WRONG},
        {"numpy": np.float64(0.1)},
    ]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert repr(read_jsonl(path)) == repr([json.loads(json.dumps(to_json(row))) for row in rows])
    assert repr(from_json(Completion, read_jsonl(path)[0])) == repr(completion)


@pytest.mark.parametrize(
    "row", [{"a": math.nan}, {"a": [1, math.inf]}, {"a": [math.inf, -math.inf]}, {"a": {"b": (math.nan,)}}]
)
def test_a_number_that_json_has_not_is_refused(row: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append_jsonl(tmp_path / "rows.jsonl", [row])


def test_the_hash_of_a_tree_is_of_names_and_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "b.txt").write_text("b")
        (tmp_path / name / "below" / "a.txt").write_text("a")
    a, b = (hashlib.sha256(letter).hexdigest() for letter in (b"a", b"b"))
    by_hand = hashlib.sha256(f"b.txt\0{b}\nbelow/a.txt\0{a}\n".encode()).hexdigest()
    assert sha256_of_tree(tmp_path / "one") == sha256_of_tree(tmp_path / "two") == by_hand
    assert sha256_of_file(tmp_path / "one" / "b.txt") == b
    before = stat_of_tree(tmp_path / "one")
    (tmp_path / "one" / "b.txt").write_text("longer")
    assert stat_of_tree(tmp_path / "one") != before
    assert sha256_of_tree(tmp_path / "one") != by_hand
    remove(tmp_path / "one")
    remove(tmp_path / "two" / "b.txt")
    remove(tmp_path / "absent")
    assert sha256_of_tree(tmp_path / "one") == hashlib.sha256().hexdigest()


def test_a_line_that_is_being_written_is_left_out_of_a_growing_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 1}\n{"x": 2')
    assert read_jsonl(path, growing=True) == [{"x": 1}]
    with pytest.raises(UserError, match="line 2: not a JSON object"):
        read_jsonl(path)
    path.write_text('{"x": 1}\n{"x": 2}\n')
    assert len(read_jsonl(path, growing=True)) == 2
