from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from model_helpers import MODELS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each tiny model."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny.save_tiny(root / name, model=make(), tokenizer=tiny.tiny_tokenizer())
        for name, make in MODELS.items()
    }
