"""Files of rows, whatever their form: JSON lines, a JSON list, CSV, Parquet."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pns.errors import UserError
from pns.files import json_lines

_WORDS = {"true": True, "false": False}  # of CSV, which has text alone


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a .json, .csv or .parquet file, and of any other as JSON lines; `where` is "FILE, line
    N", or "FILE, row N" of what has no lines, from 1. Raises UserError for what cannot be read."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".json":
        yield from _list_rows(path)
    else:
        for number, row in json_lines(path):
            yield f"{path}, line {number}", row


def _list_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        way_out = "name a list of objects, or call a file of one object a line .jsonl"
        raise UserError(f"{path}: cannot be read as JSON ({error}); {way_out}") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: has no list of objects, [{{...}}, ...], but one {type(rows).__name__}; mend it"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: not a JSON object; mend or remove it")
        yield f"{path}, row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """An empty cell is no field."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    num = f"{len(reader.fieldnames or ())} fields as the first line has"
                    raise UserError(f"{where}: has not the {num}; mend it, with quotes around commas")
                yield where, {key: _WORDS.get(cell.lower(), cell) for key, cell in row.items() if cell}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); save it as UTF-8 text") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield (
                        f"{path}, row {number}",
                        {key: cell for key, cell in row.items() if cell is not None},
                    )
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); name another file") from error
