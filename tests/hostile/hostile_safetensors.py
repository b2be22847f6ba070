"""Forty and more files that call themselves safetensors: each lies in one way. `make(name, whole)` builds one from a good file's bytes."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any


class Canary:
    """Unpickling it makes the folder that CANARY names."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ.get("CANARY", "/nonexistent/canary"),))


def parts(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a good file."""
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def build(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    """A file with this header, given as an object or as bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def changed(whole: bytes, **fields: Any) -> bytes:
    """The file with fields of its first tensor changed."""
    header, data = parts(whole)
    name = next(key for key in header if key != "__metadata__")
    return build({**header, name: {**header[name], **fields}}, data)


def first(whole: bytes) -> tuple[str, dict[str, Any], dict[str, Any], bytes]:
    header, data = parts(whole)
    name = next(key for key in header if key != "__metadata__")
    return name, header[name], header, data


def overlapping(whole: bytes) -> bytes:
    header, data = parts(whole)
    a, b = [key for key in header if key != "__metadata__"][:2]
    return build({**header, b: {**header[a]}}, data)


def with_gap(whole: bytes) -> bytes:
    header, data = parts(whole)
    last = max((key for key in header if key != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    begin, end = header[last]["data_offsets"]
    return build({**header, last: {**header[last], "data_offsets": [begin + 8, end + 8]}}, data + bytes(8))


def duplicate(whole: bytes) -> bytes:
    name, entry, header, data = first(whole)
    raw = json.dumps(header).encode()
    return build(raw[:-1] + b"," + json.dumps({name: entry}).encode()[1:], data)


def duplicate_field(whole: bytes) -> bytes:
    header, data = parts(whole)
    return build(json.dumps(header).encode().replace(b'"dtype"', b'"dtype": "F64", "dtype"', 1), data)


def constant(word: bytes) -> Callable[[bytes], bytes]:
    def make(whole: bytes) -> bytes:
        header, data = parts(whole)
        return build(json.dumps(header).encode().replace(b'"shape": [', b'"shape": [' + word + b", ", 1), data)

    return make


def pickled(protocol: int) -> Callable[[bytes], bytes]:
    return lambda whole: pickle.dumps(Canary(), protocol=protocol) + bytes(64)


def zipped(whole: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Canary()))
        archive.writestr("../../canary", b"x")
    return buffer.getvalue()


def in_header(whole: bytes) -> bytes:
    return struct.pack("<Q", 40) + pickle.dumps(Canary(), protocol=0)[:40].ljust(40) + bytes(40)


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "seven bytes": lambda whole: whole[:7],
    "the length alone": lambda whole: whole[:8],
    "length zero": lambda whole: build(b"", parts(whole)[1]),
    "length one": lambda whole: build(b"{", parts(whole)[1]),
    "length of 2**63": lambda whole: build(parts(whole)[0], parts(whole)[1], length=1 << 63),
    "length of 2**64 - 1": lambda whole: build(parts(whole)[0], parts(whole)[1], length=(1 << 64) - 1),
    "length past the end": lambda whole: build(parts(whole)[0], parts(whole)[1], length=len(whole)),
    "length into the data": lambda whole: build(parts(whole)[0], parts(whole)[1], length=len(whole) - 9),
    "length too short": lambda whole: build(parts(whole)[0], parts(whole)[1], length=20),
    "cut in the header": lambda whole: whole[:60],
    "cut in the data": lambda whole: whole[:-1],
    "bytes after the end": lambda whole: whole + b"\0",
    "a megabyte after the end": lambda whole: whole + bytes(1 << 20),
    "header of 17 MB": lambda whole: build(b"{" + b" " * (17 << 20) + b"}", b""),
    "header not JSON": lambda whole: build(b"{" + b"x" * 100, parts(whole)[1]),
    "header not UTF-8": lambda whole: build(b'{"\xff\xfe": 1}', parts(whole)[1]),
    "header a list": lambda whole: build(b"[1, 2, 3]", parts(whole)[1]),
    "header a number": lambda whole: build(b"12345678", parts(whole)[1]),
    "header behind a space": lambda whole: build(b" " + json.dumps(parts(whole)[0]).encode(), parts(whole)[1]),
    "nested without end": lambda whole: build(b'{"a":' + b"[" * 200_000, b""),
    "mappings without end": lambda whole: build(b'{"a":' * 100_000, b""),
    "an integer of 5000 digits": lambda whole: build(b'{"a": ' + b"9" * 5000 + b"}", b""),
    "duplicate tensor": duplicate,
    "duplicate field": duplicate_field,
    "a tensor that is null": lambda whole: build({**parts(whole)[0], "x": None}, parts(whole)[1]),
    "a tensor without dtype": lambda whole: build(
        {**parts(whole)[0], "x": {"shape": [0], "data_offsets": [0, 0]}}, parts(whole)[1]
    ),
    "a tensor with more": lambda whole: changed(whole, code="import os"),
    "dtype NaN": lambda whole: changed(whole, dtype="NaN"),
    "dtype null": lambda whole: changed(whole, dtype=None),
    "dtype object": lambda whole: changed(whole, dtype="O"),
    "dtype a list": lambda whole: changed(whole, dtype=["F32"]),
    "dtype in small letters": lambda whole: changed(whole, dtype="bf16"),
    "dtype of another size": lambda whole: changed(whole, dtype="F64"),
    "shape negative": lambda whole: changed(whole, shape=[-1, -1]),
    "shape of 2**62 squared": lambda whole: changed(whole, shape=[1 << 62, 1 << 62]),
    "shape whose bytes wrap to its size": lambda whole: changed(whole, shape=[(1 << 63) - 1, 2]),
    "shape of floats": lambda whole: changed(whole, shape=[1.5]),
    "shape of true": lambda whole: changed(whole, shape=[True]),
    "shape a text": lambda whole: changed(whole, shape="[4]"),
    "shape with NaN": constant(b"NaN"),
    "shape with -Infinity": constant(b"-Infinity"),
    "shape of a thousand ones": lambda whole: changed(whole, shape=[*([1] * 1000), *first(whole)[1]["shape"]]),
    "offsets negative": lambda whole: changed(whole, data_offsets=[-8, 8]),
    "offsets backwards": lambda whole: changed(whole, data_offsets=first(whole)[1]["data_offsets"][::-1]),
    "offsets past the end": lambda whole: changed(whole, data_offsets=[0, 1 << 40]),
    "offsets beyond 64 bits": lambda whole: changed(whole, data_offsets=[0, 1 << 70]),
    "offsets of three": lambda whole: changed(whole, data_offsets=[0, 1, 2]),
    "offsets of floats": lambda whole: changed(whole, data_offsets=[0.0, 4.0]),
    "offsets null": lambda whole: changed(whole, data_offsets=None),
    "overlapping tensors": overlapping,
    "a gap between tensors": with_gap,
    "metadata of numbers": lambda whole: build({**parts(whole)[0], "__metadata__": {"a": 1}}, parts(whole)[1]),
    "metadata a list": lambda whole: build({**parts(whole)[0], "__metadata__": ["x"]}, parts(whole)[1]),
    "a pickle": pickled(0),
    "a pickle of protocol 2": pickled(2),
    "a pickle of protocol 5": pickled(5),
    "a pickle in the header": in_header,
    "a zip as torch.save writes it": zipped,
    "a GGUF file": lambda whole: b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(100),
    "an HTML page": lambda whole: b"<!DOCTYPE html><html><body>404</body></html>",
    "a Git LFS pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


def make(name: str, good: Path) -> bytes:
    """The hostile file `name`, made from the good file."""
    return HOSTILE[name](good.read_bytes())
