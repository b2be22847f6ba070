"""Shared fixtures: a toy experiment whose whole run takes milliseconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_config import write_toy


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Path]:
    """Writes the toy experiment with changes: `toy(rounds=1, train={"data": "accumulate"})`."""

    def make(**changes: Any) -> Path:
        return write_toy(tmp_path, changes)

    return make


@pytest.fixture
def hide_packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`hide_packages("gguf")`: that package looks as if it were not installed. All others are found as ever, for libraries remember what
    they were told for as long as the process lives."""
    real = importlib.util.find_spec

    def hide(*gone: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name in gone else real(name, *more)
        )

    return hide
