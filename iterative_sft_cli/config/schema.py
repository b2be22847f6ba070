"""The whole config: every section, and `Config.at_round`, which turns schedules into the scalars of one round.

The attribute names are the YAML's keys; a Python keyword gets a trailing underscore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, model_validator

from iterative_sft_cli.config.fields import Count, CountFromZero, NoneWord, Section, Text, Texts
from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.config.section_filters import FilterEntry, default_name
from iterative_sft_cli.config.section_generate import (
    BudgetConfig,
    GenerateConfig,
    OpenAIConfig,
    RationalizeConfig,
    SearchConfig,
    SourceModel,
    VllmConfig,
)
from iterative_sft_cli.config.section_model import AdapterConfig, ModelConfig
from iterative_sft_cli.config.section_prompts import (
    ColumnSpec,
    CurriculumConfig,
    DatasetSource,
    EvalConfig,
    LmEvalConfig,
    PromptsConfig,
    ReasoningGymSource,
    SkipConfig,
    SourceConfig,
)
from iterative_sft_cli.config.section_run import CheckpointsConfig, GuardsConfig, SamplesConfig
from iterative_sft_cli.config.section_train import (
    FormatConfig,
    MixConfig,
    ParallelConfig,
    PassConfig,
    SeedDataConfig,
    TrainConfig,
    WarmupConfig,
    WindowConfig,
)
from iterative_sft_cli.types import Decoding

__all__ = [
    "AdapterConfig",
    "BudgetConfig",
    "CheckpointsConfig",
    "ColumnSpec",
    "Config",
    "CurriculumConfig",
    "DatasetSource",
    "EvalConfig",
    "FilterEntry",
    "FormatConfig",
    "GenerateConfig",
    "GuardsConfig",
    "LmEvalConfig",
    "MixConfig",
    "ModelConfig",
    "OpenAIConfig",
    "ParallelConfig",
    "PassConfig",
    "PromptsConfig",
    "RationalizeConfig",
    "ReasoningGymSource",
    "SamplesConfig",
    "SearchConfig",
    "SeedDataConfig",
    "SkipConfig",
    "SourceConfig",
    "SourceModel",
    "TrainConfig",
    "VllmConfig",
    "WarmupConfig",
    "WindowConfig",
]


class Config(Section):
    """A run: the model, the rounds, and what happens in each."""

    model: ModelConfig
    """The model: a hub id, a local folder, a .gguf file, or a mapping."""
    output_dir: Text
    """Run directory, relative to the current folder; {seed} and any {key.path} are replaced by that value."""
    seed: CountFromZero = 0
    """Seed from which every random decision is derived."""
    rounds: Count
    """Number of rounds; it may be raised when a run is resumed."""
    deterministic: bool = False
    """Use only kernels that repeat themselves, also on a GPU, at some cost in speed."""
    prompts: PromptsConfig
    """What is asked."""
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    """How completions are drawn."""
    rationalize: Annotated[RationalizeConfig | None, NoneWord] = None
    """A second try, with a hint, for prompts with nothing accepted; null for none."""
    filters: list[FilterEntry] = Field(default_factory=list)
    """What is accepted: filters in the order in which they run. Without any, every sample is trained on."""
    train: TrainConfig
    """How the accepted samples are learned."""
    warmup: Annotated[WarmupConfig | None, NoneWord] = None
    """Supervised fine-tuning on seed data before round 1; null for none."""
    eval: Annotated[EvalConfig | None, NoneWord] = None
    """Held-out prompts; null for none."""
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    """When a run stops early."""
    checkpoints: CheckpointsConfig = Field(default_factory=CheckpointsConfig)
    """When weights are saved."""
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    """How stored samples are kept."""
    tracking: Texts = Field(default_factory=list)
    """Trackers that get the statistics: trackio, tensorboard, wandb, mlflow; none by default."""

    @model_validator(mode="after")
    def _bind(self) -> Config:
        """Fix the span of every schedule to `rounds`; number filters of the same name, and tell each where it stands."""
        taken: set[str] = set()
        for index, entry in enumerate(self.filters):
            if entry.name in taken and entry.name == default_name(entry.use):
                count = next(n for n in range(2, len(self.filters) + 2) if f"{entry.name}_{n}" not in taken)
                self.filters[index] = entry = entry.model_copy(update={"name": f"{entry.name}_{count}"})
            taken.add(entry.name)
            entry._key = f"filters[{index}]"
        for name in type(self).model_fields:
            self.__dict__[name] = map_schedules(getattr(self, name), lambda schedule: schedule.bound(self.rounds))
        return self

    def at_round(self, round_index: int) -> Config:
        """The config of one round, counted from 1, with every schedule replaced by its value; 0 behaves like 1."""
        result: Config = map_schedules(self, lambda schedule: schedule.value(round_index))
        return result

    def eval_decoding(self, *, eos_token_ids: tuple[int, ...] = ()) -> Decoding:
        """The decoding of `eval`: its own keys, else those of `generate` in round 1. Needs `eval`."""
        if self.eval is None:
            raise ValueError("this config has no eval section")
        inherited = self.at_round(1).generate
        values = {name: getattr(inherited, name) for name in GenerateConfig.DECODING_FIELDS}
        for name in GenerateConfig.DECODING_FIELDS:
            own = getattr(self.eval, name, None)
            if own is not None:
                values[name] = own
        values["stop"] = tuple(values["stop"])
        values["keep_logprobs"] = False
        return Decoding(**values, eos_token_ids=eos_token_ids)

    def to_tree(self) -> dict[str, Any]:
        """The whole config with defaults as JSON-able values: what `resolved.yaml` holds, and valid as a config itself."""
        return self.model_dump(mode="json", by_alias=True)


def map_schedules(value: Any, change: Callable[[Schedule], Any]) -> Any:
    """A copy of `value` in which `change` was applied to every schedule; parts without schedules are shared."""
    if isinstance(value, Schedule):
        return change(value)
    if isinstance(value, Section):
        changes = {}
        for name, old in value.__dict__.items():
            new = map_schedules(old, change)
            if new is not old:
                changes[name] = new
        return value.model_copy(update=changes) if changes else value
    if isinstance(value, list):
        items = [map_schedules(item, change) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        entries = {key: map_schedules(item, change) for key, item in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    return value
