"""The two files by which a run and other processes speak of its services."""

from __future__ import annotations

from pathlib import Path

import pytest

from pns.errors import UserError
from pns.run.place import lock_holder, locked
from pns.run.services import DONE, Board, ask_to_scale, read_board, read_request


def test_a_board_is_read_as_it_was_written_and_is_of_the_holder_of_the_lock(tmp_path: Path) -> None:
    assert read_board(tmp_path) is None
    assert lock_holder(tmp_path / "lock") == ""
    with locked(tmp_path / "lock", ""):
        board = Board("s1", lock_holder(tmp_path / "lock"), 5.0, {"judge": {"queued": 3}, "second": None})
        board.request, board.outcomes = "r1", {"judge": DONE, "second": ""}
        board.write(tmp_path)
        assert read_board(tmp_path) == board
        assert board.is_of_running(tmp_path)
        assert not Board("s1", "process 1 on elsewhere").is_of_running(tmp_path)
        assert not Board("s1", "").is_of_running(tmp_path)
    assert not board.is_of_running(tmp_path)  # it ended, however


def test_a_request_is_for_one_start_and_the_last_one_counts(tmp_path: Path) -> None:
    assert read_request(tmp_path, "s1") is None
    ask_to_scale(tmp_path, "s1", {"judge": 2})
    asked = ask_to_scale(tmp_path, "s1", {"judge": 4, "second": 1})
    assert read_request(tmp_path, "s1") == asked
    assert read_request(tmp_path, "s2") is None  # the recipe's numbers hold again
    (tmp_path / "scale.json").write_text("[1]")
    assert read_request(tmp_path, "s1") is None
    (tmp_path / "scale.json").write_text("{")
    with pytest.raises(UserError, match=r"scale\.json is not valid JSON"):
        read_request(tmp_path, "s1")
