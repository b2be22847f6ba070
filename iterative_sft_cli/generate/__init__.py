"""Completions from prompts: the embedded engine, vLLM servers, OpenAI-compatible servers and plug-in engines.

Guarantee: importing this package imports no torch; an engine's libraries are imported when it is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory

__all__ = ["Engine", "EngineOutOfMemory", "open_engine"]


def open_engine(
    section: Any, *, loaded: Any | None, encoder: Any, base_dir: Path, run_dir: Path | None, seed: int
) -> Engine:
    """The engine that `section` (a `GenerateConfig`) names; nothing is served before its `begin`.

    `loaded` is the trainer's live model, which `openai` and plug-ins can do without. Raises ConfigError for an engine that is
    not there or does not take its arguments, PluginError for one whose import or start fails.
    """
    if section.engine == "openai":
        from iterative_sft_cli.generate.openai import OpenAIEngine

        return OpenAIEngine(section, encoder=encoder)
    if section.engine not in ("transformers", "vllm"):
        from iterative_sft_cli.generate.plugin import EngineContext, open_plugin

        return open_plugin(section.engine, EngineContext(section, loaded, encoder, base_dir, run_dir, seed))
    if loaded is None:
        raise ConfigError(f"engine {section.engine} needs a model", where="generate.engine")
    if section.engine == "vllm":
        from iterative_sft_cli.generate.vllm import VllmEngine

        return VllmEngine(section, loaded=loaded, encoder=encoder, run_dir=run_dir, base_dir=base_dir)
    from iterative_sft_cli.generate.embedded import EmbeddedEngine

    return EmbeddedEngine(loaded, encoder=encoder, memory_gb=section.memory_gb)
