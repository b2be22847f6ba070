"""Reading, checking and comparing configs.

Nothing here imports torch, runs what a config names, or writes a file; a config with any number of mistakes is answered well within a
second, all mistakes at once.
"""

from __future__ import annotations

from iterative_sft_cli.config.drift import Drift, class_of, diff_configs
from iterative_sft_cli.config.expression import Expression, ExpressionError, MissingScore
from iterative_sft_cli.config.load import LoadedConfig, load_config, parse_config
from iterative_sft_cli.config.output import json_schema, resolved_yaml
from iterative_sft_cli.config.problems import InvalidConfig, Problem
from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.config.schema import (
    AdapterConfig,
    CheckpointsConfig,
    ColumnSpec,
    Config,
    DatasetSource,
    EvalConfig,
    FilterEntry,
    GenerateConfig,
    GuardsConfig,
    LmEvalConfig,
    MixConfig,
    ModelConfig,
    OpenAIConfig,
    ParallelConfig,
    PassConfig,
    PromptsConfig,
    RationalizeConfig,
    ReasoningGymSource,
    SamplesConfig,
    SeedDataConfig,
    SkipConfig,
    SourceConfig,
    SourceModel,
    TrainConfig,
    VllmConfig,
    WarmupConfig,
    WindowConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointsConfig",
    "ColumnSpec",
    "Config",
    "DatasetSource",
    "Drift",
    "EvalConfig",
    "Expression",
    "ExpressionError",
    "FilterEntry",
    "GenerateConfig",
    "GuardsConfig",
    "InvalidConfig",
    "LmEvalConfig",
    "LoadedConfig",
    "MissingScore",
    "MixConfig",
    "ModelConfig",
    "OpenAIConfig",
    "ParallelConfig",
    "PassConfig",
    "Problem",
    "PromptsConfig",
    "RationalizeConfig",
    "ReasoningGymSource",
    "SamplesConfig",
    "Schedule",
    "SeedDataConfig",
    "SkipConfig",
    "SourceConfig",
    "SourceModel",
    "TrainConfig",
    "VllmConfig",
    "WarmupConfig",
    "WindowConfig",
    "class_of",
    "diff_configs",
    "json_schema",
    "load_config",
    "parse_config",
    "resolved_yaml",
]
