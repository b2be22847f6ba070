"""Length-framed JSON over pipes, and samples as JSON: all that passes between the main process and a filter worker.

A frame is four bytes of length, big-endian, and that many bytes of ASCII JSON; no pickle, no code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from iterative_sft_cli.types import Sample

HIDDEN = "[hidden]"
"""What stands for the value of an environment variable that was passed to a filter."""
MAX_REPLY_BYTES = 64 * 1024 * 1024
"""A longer reply breaks the protocol: a verdict is at most 64 KB, a round's verdicts come in parts."""


# bound now: a plug-in may replace them in the module
_dumps, _loads = json.dumps, json.loads


class BrokenWire(Exception):
    """The other side sent what is not a frame."""


def encode(message: Mapping[str, Any], hide: Sequence[str] = ()) -> bytes:
    """The frame of a message, each text of `hide` replaced by HIDDEN. Values that are not JSON become their text."""
    body = to_json(message)
    for secret in hide:
        body = body.replace(to_json(secret)[1:-1], HIDDEN.encode("ascii"))
    return struct.pack(">I", len(body)) + body


def to_json(value: Any) -> bytes:
    """ASCII JSON, keys in the order given; values that are not JSON become their text."""
    return _dumps(value, default=str, separators=(",", ":")).encode("ascii")


def frame_around(head: Mapping[str, Any], name: str, raw: bytes) -> bytes:
    """The frame of `head` plus one field that is JSON already."""
    body = to_json(head)[:-1] + b',"' + name.encode("ascii") + b'":' + raw + b"}"
    return struct.pack(">I", len(body)) + body


def read_frame(stream: BinaryIO, limit: int = 1 << 32) -> Any | None:
    """The next message; None at the end of the stream. Raises BrokenWire for torn or foreign bytes."""
    head = stream.read(4)
    if not head:
        return None
    size = struct.unpack(">I", head)[0] if len(head) == 4 else limit + 1
    if size > limit:
        raise BrokenWire(f"{head!r} is not the head of a frame")
    body = stream.read(size)
    if len(body) < size:
        return None
    try:
        return _loads(body)
    except ValueError as error:
        raise BrokenWire(f"a frame holds {body[:40]!r}") from error


def sample_to_wire(sample: Sample) -> dict[str, Any]:
    """All fields of a sample as JSON values."""
    return {
        "prompt_id": sample.prompt_id,
        "sample_id": sample.sample_id,
        "round_index": sample.round_index,
        "prompt": sample.prompt,
        "completion": sample.completion,
        "answer": sample.answer,
        "row": dict(sample.row),
        "prompt_ids": sample.prompt_ids,
        "completion_ids": sample.completion_ids,
        "finish_reason": sample.finish_reason,
        "logprob": sample.logprob,
        "reasoning": sample.reasoning,
        "final": sample.final,
        "scores": dict(sample.scores),
        "sample_index": sample.sample_index,
    }


def sample_from_wire(fields: dict[str, Any]) -> Sample:
    """The sample that `sample_to_wire` wrote; takes over `fields`."""
    fields["prompt_ids"] = tuple(fields["prompt_ids"])
    fields["completion_ids"] = tuple(fields["completion_ids"])
    return Sample(**fields)
