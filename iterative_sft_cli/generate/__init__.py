"""Completions from prompts: the embedded engine, vLLM servers, OpenAI-compatible servers and plug-in engines.

Guarantee: importing this package imports no torch; an engine's libraries are imported when it is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory

__all__ = ["Engine", "EngineOutOfMemory", "await_earlier_servers", "open_engine", "open_host"]


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


def starts_servers(section: Any) -> bool:
    """Whether a `GenerateConfig` has isft start vLLM servers."""
    return section.engine == "vllm" and not section.vllm.base_urls


def open_host(section: Any, *, loaded: Any, run_dir: Path) -> Any:
    """The vLLM servers of this host for a process that has no engine; None where isft starts none."""
    if not starts_servers(section):
        return None
    from iterative_sft_cli.generate.vllm_host import HostServers

    return HostServers(section, loaded=loaded, run_dir=run_dir, logs=None)


def await_earlier_servers(section: Any, run_dir: Path) -> None:
    """Return when the servers of an earlier process of this run have left the device, where there may be any."""
    if starts_servers(section):
        from iterative_sft_cli.generate.vllm_server import await_earlier

        await_earlier(run_dir)
