"""Finds the safetensors files of a model folder and checks their headers before a library opens them. Imports no torch.

Guarantee: a file that passes is exactly as long as its header says, every byte belongs to one tensor, and nothing larger than
the header itself was read; names lead nowhere but into the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from iterative_sft_cli.errors import DataError

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20
"""The largest models have headers of a few MB; a longer one is there to fill the memory."""
MAX_INDEX_BYTES = 64 << 20
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a safetensors file states it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises DataError where there are none, one is missing, or the index names a file elsewhere."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        files = [folder / name for name in _names_in(index)]
        for path in files:
            if not path.is_file():
                raise DataError("a weights file is missing", where=str(path), hint="fetch the model again")
        return files
    if single.is_file():
        return [single]
    pickles = [name for name in PICKLES if (folder / name).exists()]
    if pickles:
        raise DataError(
            f"the weights are a pickle ({pickles[0]}), which is never loaded",
            where=str(folder),
            expected=SINGLE,
            hint="choose a revision with safetensors, or convert it once in a place you trust",
        )
    raise DataError("no weights in the model's folder", where=str(folder), expected=SINGLE)


def _names_in(index: Path) -> list[str]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError("the index of the weights is damaged", where=str(index)) from error
    for name in sorted(names):
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or ":" in name or "\0" in name:
            raise DataError(
                f"the index names {name!r}", where=str(index), expected="names of .safetensors files in this folder"
            )
    return sorted(names)


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of the tensors, without their data. Raises DataError for a file that is damaged, cut, or lies about itself."""
    headers: dict[str, TensorHeader] = {}
    for path in files:
        try:
            found = _read_header(path)
            twice = headers.keys() & found.keys()
            if twice:
                raise ValueError(f"the tensor {min(twice)} is in another file too")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error)[:200]
            raise DataError(
                f"the weights file is damaged ({what or type(error).__name__})",
                where=str(path),
                hint="fetch the model again",
            ) from error
        headers |= found
    return headers


def _read_header(path: Path) -> dict[str, TensorHeader]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise ValueError(f"cut off: {size} bytes, the header alone would take {length}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("no safetensors header")
    entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    note = entries.pop("__metadata__", {})
    if not isinstance(note, dict) or not all(isinstance(value, str) for value in note.values()):
        raise ValueError("its metadata is no mapping of texts")
    headers, spans = {}, []
    for name, entry in entries.items():
        header, begin, end = _tensor(name, entry)
        headers[name] = header
        spans.append((begin, end))
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(begin, place)}")
        place = end
    if place != size - 8 - length:
        raise ValueError(f"{size} bytes, its header says {place + 8 + length}")
    return headers


def _tensor(name: str, entry: Any) -> tuple[TensorHeader, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry {name[:60]!r} is no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name[:60]} has the dtype {str(dtype)[:40]!r}")
    if not _whole_numbers(shape) or len(shape) > 64:
        raise ValueError(f"{name[:60]} has the shape {str(shape)[:60]}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name[:60]} has the offsets {str(offsets)[:60]}")
    if math.prod(shape) * _BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"{name[:60]} takes {offsets[1] - offsets[0]} bytes, which is not {dtype} {shape[:8]}")
    return TensorHeader(dtype, tuple(shape)), offsets[0], offsets[1]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 63 for one in value)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:60]!r} stands there twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
