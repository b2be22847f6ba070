"""JSON lines as bytes: what is written can be read back exactly, and a torn line never harms its neighbours.

Everything outside ASCII is escaped, so no line separator of Unicode can split a record; NaN and infinity are refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

MAX_LINE_BYTES = 16 << 20


class BadLine(ValueError):
    """A line that cannot be a record: 1-based `line`, and the `problem`."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        self.problem = problem
        super().__init__(f"line {line}: {problem}")


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One record with its newline. Raises ValueError for NaN, infinity, or a record over the limit; TypeError for what JSON cannot hold."""
    line = json.dumps(row, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a record of {len(line)} bytes is over the limit of {MAX_LINE_BYTES}")
    return line


def encode_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Several records, one line each."""
    buffer = io.BytesIO()
    for row in rows:
        buffer.write(encode_row(row))
    return buffer.getvalue()


def decode_rows(data: bytes) -> list[dict[str, Any]]:
    """The records of a whole file. Raises BadLine at the first line that is none, a last line without newline included."""
    rows, tail = split_rows(data)
    if tail:
        raise BadLine(len(rows) + 1, "the last line is cut off")
    return rows


def iter_rows(data: bytes) -> Iterator[dict[str, Any]]:
    """The records of a whole file, one at a time. Raises BadLine."""
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.endswith(b"\n"):
            raise BadLine(number, "the last line is cut off")
        yield decode_row(line[:-1], number)


def split_rows(data: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """The records, and the torn bytes behind the last newline (empty when the file is whole). Raises BadLine for a bad line before that."""
    *lines, tail = data.split(b"\n")
    return [decode_row(line, number) for number, line in enumerate(lines, 1)], tail


def decode_row(line: bytes, number: int = 1) -> dict[str, Any]:
    """One record. Raises BadLine."""
    if len(line) > MAX_LINE_BYTES:
        raise BadLine(number, f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadLine(number, f"not valid JSON ({error})" if line else "empty") from error
    if not isinstance(row, dict):
        raise BadLine(number, f"a {type(row).__name__}, not an object")
    return row


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
