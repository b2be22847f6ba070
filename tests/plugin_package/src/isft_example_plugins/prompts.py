"""A prompt source: a factory that yields one mapping a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def times_table(size: int = 10) -> Iterator[dict[str, Any]]:
    """`size` x `size` multiplications with their answers; `level` is the larger factor."""
    for a in range(1, size + 1):
        for b in range(1, size + 1):
            yield {"id": f"{a}x{b}", "prompt": f"What is {a} x {b}?", "answer": str(a * b), "level": max(a, b)}
