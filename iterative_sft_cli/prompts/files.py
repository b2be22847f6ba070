"""Reads rows from JSONL, JSON, CSV and parquet files ourselves, so that no library asks the network about a local file.

The guarantee: every row is a mapping of plain JSON values, and whatever is wrong is said with file and line.
"""

from __future__ import annotations

import csv
import datetime
import difflib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError

Located = tuple[str, dict[str, Any]]
"""A row behind the place it was read from, such as `prompts.jsonl:3`."""


def read_rows(path: str | Path, *, base_dir: Path = Path("."), limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file, by its suffix. Raises DataError."""
    return [row for _, row in located_rows(path, base_dir=base_dir, limit=limit)]


def located_rows(path: str | Path, *, base_dir: Path, limit: int | None = None) -> list[Located]:
    """As `read_rows`, each row with its place. `path` is relative to `base_dir`, else to the current folder."""
    found = find_data(path, base_dir)
    readers = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(found.suffix.lower())
    if reader is None:
        raise DataError(
            f"no reader for the suffix {found.suffix!r}",
            where=str(path),
            expected="a .jsonl, .json, .csv, .tsv or .parquet file",
        )
    try:
        rows = []
        for located in reader(found, str(path)):
            rows.append(located)
            if limit is not None and len(rows) >= limit:
                break
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if not rows:
        raise DataError("no rows", where=str(path), expected="at least one")
    return rows


def find_data(path: str | Path, base_dir: Path) -> Path:
    """The file that `path` names. Raises DataError with the nearest name there is."""
    wanted = Path(path).expanduser()
    for candidate in (base_dir / wanted, wanted):
        if candidate.is_file():
            return candidate
    if (base_dir / wanted).is_dir():
        raise DataError("this is a folder", where=str(path), expected="a file", hint="use `dataset` for a folder")
    try:
        names = [entry.name for entry in (base_dir / wanted).parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(wanted.name, names, n=1)
    hint = f"did you mean {wanted.parent / close[0]}?" if close else f"paths are relative to {base_dir.resolve()}"
    raise DataError("no such file", where=str(path), hint=hint)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1} of the line)", where=where) from error


def _loads(text: str, where: str) -> Any:
    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"not JSON: {error.msg} ({place})", where=where) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where) from error
    if "\\ud" in text.lower():  # an escape may have made half of a surrogate pair, which no file can hold
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("holds half of a surrogate pair", where=where) from error
    return value


def _jsonl(path: Path, name: str) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{name}:{number}"
            row = _loads(_text(line.rstrip(b"\r\n"), where), where)
            if not isinstance(row, dict):
                hint = "a file that is one JSON list is named .json" if number == 1 and isinstance(row, list) else None
                raise DataError(f"a {_kind(row)}", where=where, expected="a JSON object a line", hint=hint)
            # one object for a column's name, not one a row
            yield where, {sys.intern(column): value for column, value in row.items()}


def _json(path: Path, name: str) -> Iterator[Located]:
    value = _loads(_text(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), name), name)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f"a {_kind(value)}", where=name, expected='a list of objects, or {"data": [...]}')
    for number, row in enumerate(value, start=1):
        where = f"{name}: item {number}"
        if not isinstance(row, dict):
            raise DataError(f"a {_kind(row)}", where=where, expected="an object")
        yield where, row


def _csv(path: Path, name: str) -> Iterator[Located]:
    text = _text(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), name)
    csv.field_size_limit(1 << 27)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise DataError(f"the column {twice!r} is there twice", where=f"{name}:1")
        start = reader.line_num + 1
        for fields in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(f"{len(fields)} fields", where=where, expected=f"{len(header)}, as in the first line")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{name}:{reader.line_num}") from error


def _parquet(path: Path, name: str) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", plain(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"not parquet: {error}", where=name) from error


def _kind(value: Any) -> str:
    return {dict: "JSON object", list: "JSON list", str: "text", type(None): "null", bool: "truth value"}.get(
        type(value), "number"
    )


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dates as ISO text, sets sorted, tuples as lists, numpy scalars as numbers.

    Bytes (images, audio) become a note of their length: a run directory is no place for them. Other objects become text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    for method in ("tolist", "item"):  # numpy arrays and scalars
        if callable(getattr(value, method, None)):
            return plain(getattr(value, method)())
    return str(value)
