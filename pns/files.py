"""Files that are complete or absent, JSON lines, and hashes of files.

A file is written beside its place and moved there when it is whole: a reader, or the next start after a
crash, sees the old content or all of the new one.
"""

import codecs
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from pns.errors import UserError
from pns.records import fields_of, is_record, to_json

PARTIAL = ".partial-"  # begins the name of whatever is being written
_MISSING = "does not exist; name a file that is there, or run the stage that writes it"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without error, else leaves nothing."""
    # Two processes may write the same file at once (a cache): each has a partial file of its own.
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # a name never leads to half a file
    finally:
        partial.unlink(missing_ok=True)
    sync_to_disk(path.parent)  # the move itself is lost in a crash until the directory is on disk


def sync_to_disk(path: Path) -> None:
    """Return when the file or the entries of the directory `path` are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a record or plain value, atomically; a figure that is not finite, which JSON has not, as null."""
    text = json.dumps(_finite(to_json(value)), indent=2, ensure_ascii=False)
    with replacing(Path(path)) as file:
        file.write(f"{text}\n".encode())


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises UserError for a missing or damaged one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} {_MISSING}") from None
    except json.JSONDecodeError as error:
        way_out = "remove it, and run the stage that writes it again"
        raise UserError(f"{path} is not valid JSON (line {error.lineno}): {way_out}") from error


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write records or dicts, one a line, atomically. Raises ValueError for a number that is not finite."""
    with replacing(Path(path)) as file:
        file.writelines(_line(row) for row in rows)


def read_jsonl(path: str | Path, growing: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises UserError as `json_lines`."""
    return [row for _, row in json_lines(path, growing)]


def json_lines(path: str | Path, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a `.jsonl` or `.jsonl.gz` file, without its blank lines. `growing`: a
    last line without an end is still being written, and left out. Raises UserError, naming file and line,
    for a file that cannot be read and a line that is no JSON object."""
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if growing and not line.endswith(b"\n"):
                    return
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
                if line.strip():
                    yield number, _json_object(line, path, number)
    except FileNotFoundError:
        raise UserError(f"{path} {_MISSING}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip raises any of them for a damaged file
        raise UserError(f"{path}: cannot be read ({error}); mend it or name another file") from error


def rows_from(path: Path, first_step: int) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file whose `step` is `first_step` or later; the others are not read."""
    with open(path, "rb") as file:
        return [
            _json_object(line, path, number)
            for number, line in enumerate(file, start=1)
            if _step(line, path, number) >= first_step
        ]


def cut_rows(path: str | Path, keep_below_step: int | None = None) -> None:
    """Cut a JSON-lines file at an unfinished last line, and at the first row from `keep_below_step` on."""
    end = 0
    with open(path, "r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # a crash cut it
                break
            if keep_below_step is not None and _step(line, Path(path), number) >= keep_below_step:
                break
            end += len(line)
        file.truncate(end)
        os.fsync(file.fileno())


def append_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Add records or dicts to a JSON-lines file, on disk when this returns."""
    with open(path, "ab") as file:
        file.writelines(map(_line, rows))  # a crash cuts at most the last lines
        file.flush()
        os.fsync(file.fileno())


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(named_files: Iterable[tuple[str, Path]]) -> str:
    """One SHA-256 over the names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for name, file in named_files:
        # The zero byte: no name can pass for the end of one and the beginning of a hash.
        digest.update(f"{name}\0{sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of JSON values, the same for any order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_tree(path: Path) -> str:
    """One SHA-256 over the names and contents of all files in a directory, or of one file."""
    return sha256_of_files(files_below(path))


def stat_of_tree(path: Path) -> list[list[Any]]:
    """[name, bytes, time of change in ns] of every file: while it stays, `sha256_of_tree` does, too."""
    status = ((name, file.stat()) for name, file in files_below(path))
    return [[name, entry.st_size, entry.st_mtime_ns] for name, entry in status]  # as JSON has it


def files_below(path: Path) -> list[tuple[str, Path]]:
    """(name below `path`, file), sorted; `path` itself where it is a file; none where it does not exist."""
    if path.is_file():
        return [(path.name, path)]
    # In one order: that of a directory differs between machines.
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted((str(file.relative_to(path)), file) for file in files)


def _line(row: Any) -> bytes:
    if _all_finite(row):
        try:
            return orjson.dumps(row, _plain, _LINE)
        except TypeError:  # an integer of more than 64 bits, and what is no JSON for json either
            pass
    # NaN is no JSON: other readers would refuse the whole file.
    return f"{json.dumps(to_json(row), ensure_ascii=False, allow_nan=False)}\n".encode()


# Our records go through `_plain`, which knows which fields count.
_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS


def _plain(value: Any) -> Any:
    """`value`, which orjson does not know, as something that it knows."""
    if is_record(value):
        return fields_of(value)
    if isinstance(value, tuple):  # a subclass, as is a float that comes here
        return list(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is not written as JSON")


def _all_finite(value: Any) -> bool:
    """False where a number in `value` is NaN or infinite, which orjson would write as null."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        try:
            return math.isfinite(sum(value))  # thousands of log-probabilities at once
        except (TypeError, OverflowError):  # other things than numbers, or very large ones
            return all(map(_all_finite, value))
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    return not is_record(value) or all(map(_all_finite, fields_of(value).values()))


def _step(line: bytes, path: Path, number: int) -> int:
    """The step of a row, which its line begins with: a row of thousands of tokens is not read for it."""
    begun = _STEP.match(line)
    return int(begun[1]) if begun else _json_object(line, path, number)["step"]


_STEP = re.compile(rb'\{"step": ?(\d+)[,}]')


def _json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
        fault = "" if isinstance(value, dict) else f"a {type(value).__name__}"
    except UnicodeDecodeError:
        fault = "not UTF-8 text"
    except json.JSONDecodeError as error:
        fault = error.msg
    except ValueError as error:  # a number of thousands of digits
        fault = str(error)
    if fault:
        way_out = "mend or remove the line"
        if fault == "not UTF-8 text":
            way_out = "save the file as UTF-8"
        elif number == 1 and line.lstrip().startswith(b"["):
            way_out = "of a list of objects, name the file .json, or write one object a line"
        raise UserError(f"{path}, line {number}: not a JSON object ({fault}); {way_out}")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
