"""A model of one weight, and engines that are closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_helpers import Unigram

from iterative_sft_cli.generate.vllm import VllmEngine


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    base = tmp_path / "base"
    base.mkdir()
    (base / "w.json").write_text('{"w": 0.1}')
    model = SimpleNamespace(
        model=Unigram(0.1), device="cpu", compute_dtype=torch.float32, context_length=20, folder=base, has_adapter=False
    )

    def save(what: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "w.json").write_text(json.dumps({"w": what.model.w.item()}))
        if what.has_adapter:
            (folder / "adapter_config.json").write_text('{"r": 4}')

    monkeypatch.setattr("iterative_sft_cli.model.save_pretrained", save)
    return model


@pytest.fixture
def engines() -> Iterator[list[VllmEngine]]:
    opened: list[VllmEngine] = []
    yield opened
    for engine in opened:
        engine.close()
