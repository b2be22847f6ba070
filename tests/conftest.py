"""Shared fixtures: a toy experiment whose whole run takes milliseconds."""

from __future__ import annotations

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
