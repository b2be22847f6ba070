"""What `auto` sizes are taken from."""

from __future__ import annotations

from pathlib import Path

import pytest

from iterative_sft_cli import machine


def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "none"),))
    whole = machine.total_memory()
    assert whole > 1 << 28
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_LIMITS", (str(limit),))
    for text, expected in (("max\n", whole), (f"{whole * 2}\n", whole), ("1000000\n", 1_000_000)):
        limit.write_text(text)
        assert machine.total_memory() == expected
