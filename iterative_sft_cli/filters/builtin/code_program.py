"""Model-written code as the tests see it: functions that take and give plain data, or fail for a named reason."""

from __future__ import annotations

import builtins
from typing import Any, Protocol

PLAIN = (bool, int, float, complex, str, bytes, type(None))
MAX_OUTPUT_CHARS = 1_000_000
MAX_DEPTH = 100


class CodeFailed(Exception):
    """The code is wrong; `reason` is the word for the statistics."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class SandboxLacks(Exception):
    """The sandbox cannot run this code, which says nothing about whether it is right."""


class Program(Protocol):
    """Model-written code, loaded, whose functions can be called with plain data."""

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Raises CodeFailed, SandboxLacks, or the builtin exception that the code raised."""


def plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers, texts, None, and exact lists, tuples, dicts, sets and frozensets of such."""
    kind = type(value)
    if kind in PLAIN:
        return True
    if depth > MAX_DEPTH:
        return False
    if kind in (list, tuple, set, frozenset):
        return all(plain(one, depth + 1) for one in value)
    if kind is dict:
        return all(plain(k, depth + 1) and plain(v, depth + 1) for k, v in value.items())
    return False


def raised(text: str) -> Exception:
    """The builtin exception that `ValueError: text` names, so that a test can expect it; else RuntimeError."""
    kind, _, message = text.rpartition("\n")[2].partition(":")
    found = getattr(builtins, kind.strip(), None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(message.strip())
        except TypeError:
            return RuntimeError(text)
    return RuntimeError(text)
