"""Completions from prompts: the embedded engine, vLLM servers, OpenAI-compatible servers and plug-in engines.

Guarantee: importing this package imports no torch; an engine's libraries are imported when it is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory

__all__ = ["Engine", "EngineOutOfMemory", "open_engine"]


def open_engine(
    section: Any, *, loaded: Any | None, encoder: Any, base_dir: Path, run_dir: Path | None, seed: int
) -> Engine:
    """The engine that `section` (a `GenerateConfig`) names; nothing is served before its `begin`.

    `loaded` is the trainer's live model, which only the embedded engine needs. Raises ConfigError for an unknown engine.
    """
    if section.engine == "transformers":
        from iterative_sft_cli.errors import ConfigError
        from iterative_sft_cli.generate.embedded import EmbeddedEngine

        if loaded is None:
            raise ConfigError("engine transformers needs a model", where="generate.engine")
        return EmbeddedEngine(loaded, encoder=encoder, memory_gb=section.memory_gb)
    raise NotImplementedError(section.engine)
