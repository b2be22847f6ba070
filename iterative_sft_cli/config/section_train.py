"""The `train` and `warmup` sections: where training starts, on which rows, and how it steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from iterative_sft_cli.config.expression import GRAMMAR, ExpressionError
from iterative_sft_cli.config.expression import Expression as ParsedExpression
from iterative_sft_cli.config.fields import (
    ByShape,
    Count,
    MappingTag,
    NonNegative,
    NumberTag,
    Positive,
    ScalarTag,
    Section,
    Share,
    Text,
    WordOrNumber,
    WordTag,
)
from iterative_sft_cli.config.findings import finding, show
from iterative_sft_cli.config.schedule import Scheduled
from iterative_sft_cli.config.section_prompts import DatasetSource, FewShot

StartFrom = Literal["previous", "base", "best", "warmup"]
SchedulerType = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


def _expression(value: Any) -> Any:
    """A number or an arithmetic expression over score names, checked for its grammar."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        try:
            ParsedExpression(value)
        except ExpressionError as error:
            raise finding(str(error), expected=GRAMMAR) from None
    return value


Expression = Annotated[Text, BeforeValidator(_expression)]
"""Arithmetic over score names, kept as text."""


class WindowConfig(Section):
    """Train on the accepted samples of the newest rounds."""

    window: Count
    """Number of rounds, the current one included."""


class SeedDataConfig(Section):
    """Rows written by people or another model: exactly one of `path` and `dataset`, with a completion or chat messages."""

    path: Text | None = None
    """A .jsonl, .json, .csv or .parquet file, relative to this config."""
    dataset: DatasetSource | None = None
    """A data set on the hub."""
    prompt: Text = "prompt"
    """Column with the question."""
    completion: Text = "completion"
    """Column with the text to learn."""
    messages: Text | None = None
    """Column with chat messages, read instead of `prompt` and `completion`; the assistant's are learned. Null reads those two."""
    limit: Count | None = None
    """Take only the first so many rows; null takes all."""


class MixConfig(SeedDataConfig):
    """Seed data mixed into every round's training rows."""

    share: Scheduled[
        Annotated[
            Annotated[Literal["all"], WordTag] | Annotated[Annotated[float, Field(gt=0, lt=1)], NumberTag], WordOrNumber
        ]
    ]
    """Share of the training rows that is seed data, drawn anew each round; 0.5 makes half of them seed rows, all takes every seed row."""
    weight: Positive = 1.0
    """With `new_share`: what the seed data counts for beside each earlier round, which counts 1; seed data of 10 levels beside rounds of one level counts 10."""


class FormatConfig(Section):
    """A form in which accepted samples are trained. `{prompt}`, `{completion}`, `{final}` and `{answer}` stand for parts of the sample."""

    prompt: Text = "{prompt}"
    """The text that is asked; chat messages only as `{prompt}`."""
    completion: Text = "{completion}"
    """The text to learn; {answer} is what a verifier or vote took for the sample's answer, else the reference."""
    few_shot: FewShot | None = None
    """Worked examples before the prompt; null are those of `prompts`, `none` uses none."""


class PassConfig(Section):
    """One of several passes over a round's samples, with a rising threshold (ReST's Improve steps)."""

    threshold: float | None = None
    """Keep samples whose `by` is at least this; null keeps all."""
    by: Expression | None = None
    """Expression over score names that `threshold` is compared with."""
    learning_rate: Positive | None = None
    """Peak learning rate of this pass; null is that of `train`."""
    epochs: Count | None = None
    """Epochs of this pass; null is that of `train`."""
    steps: Count | None = None
    """Optimizer steps of this pass, instead of `epochs`."""

    def overrides(self) -> dict[str, Any]:
        """The values of `train` that this pass replaces."""
        changes: dict[str, Any] = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        if self.epochs is not None or self.steps is not None:
            changes |= {"epochs": self.epochs, "steps": self.steps}
        return changes


class ParallelConfig(Section):
    """How training is spread over processes. A text instead of a mapping is its `type`."""

    type: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """ddp: a whole copy on each process; fsdp2: parameters, gradients and optimizer cut into a piece each; auto is ddp."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the strategy, in accelerate's words."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_type(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


class TrainConfig(Section):
    """How the accepted samples are learned. `start_from` and `data` have no default because published methods disagree."""

    start_from: Scheduled[StartFrom]
    """Weights each round's training starts from: previous (round r - 1), base (the weights at `model`), best (by `eval.metric`) or warmup."""
    data: Scheduled[
        Annotated[Annotated[Literal["replace", "accumulate"], ScalarTag] | Annotated[WindowConfig, MappingTag], ByShape]
    ]
    """Accepted samples to train on: replace (this round's), accumulate (all rounds' so far) or {window: n} (the newest n rounds')."""
    mix: MixConfig | None = None
    """Seed data mixed in; null for none."""
    new_share: Scheduled[Annotated[float | None, Field(gt=0, lt=1)]] = None
    """Share of the trained rows that is this round's; the rest is shared out among earlier rounds (1 each) and seed data (`mix.weight`). Null takes every row equally often."""
    max_rows: Scheduled[Count | None] = None
    """Most rows of accepted samples to train on; null for no limit."""
    evict: Literal["oldest", "random"] = "oldest"
    """Which rows go when there are more than `max_rows`: those of the oldest rounds, or a random draw."""
    formats: list[FormatConfig] | None = None
    """Forms in which each accepted sample is trained, a row each; null trains it as it was generated."""
    objective: Text = "nll"
    """nll, dft, iw, rwr, or a plug-in's name or pkg.mod:attr."""
    objective_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the objective, such as {temperature: 0.5} for rwr."""
    weight_by: Scheduled[Expression | None] = None
    """Expression over score names that weighs each sample's loss, such as `exp(reward / 0.5)`; null weighs all alike."""
    epochs: Scheduled[Count | None] = None
    """Passes over the round's training rows; 1 when neither this nor `steps` is given."""
    steps: Scheduled[Count | None] = None
    """Optimizer steps each round, instead of `epochs`."""
    passes: list[PassConfig] | None = None
    """Several passes with rising thresholds; null for one without."""
    learning_rate: Scheduled[Positive] = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: SchedulerType = "linear"
    """Shape of the learning rate over a round's steps, in transformers' words."""
    lr_schedule: Literal["restart", "continue"] = "restart"
    """restart: each round runs the whole shape; continue: one shape over all rounds, which needs `steps`."""
    packing: bool = False
    """Put several rows into one sequence that cannot see each other."""
    warmup_ratio: Scheduled[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Scheduled[NonNegative] = 0.0
    """AdamW's decay of matrices; 0 for none."""
    max_grad_norm: Scheduled[NonNegative | None] = 1.0
    """Gradients with a larger norm are scaled down to it; 0 or null never scales."""
    on_nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """A step whose loss or gradient is NaN or infinite is never taken: skip leaves it out, stop ends the run (exit 3), rollback undoes the round's training."""
    batch_size: Scheduled[Count] = 32
    """Samples in one optimizer step, over all processes."""
    micro_batch_tokens: Annotated[Annotated[Literal["auto"], WordTag] | Annotated[Count, NumberTag], WordOrNumber] = (
        "auto"
    )
    """Tokens, padding included, computed at once; it bounds memory and does not change the result beyond rounding."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """Optimizer."""
    optimizer_state: Literal["keep", "fresh"] | None = None
    """Whether moments carry over to the next round; null is keep with `start_from: previous`, else fresh."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    offload: Literal["auto", "host", "disk", "none"] = "auto"
    """Where the optimizer, and beside vLLM servers that isft starts the weights too, wait while the engine generates: host memory, or a file in TMPDIR; auto is host for what is on a GPU and moves nothing on a CPU."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How training is spread over processes."""
    max_length: Count | None = None
    """Longest training row in tokens; null is the longest prompt plus `max_new_tokens`. A longer generated row is rejected as `too_long`."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a too long seed row stays; generated rows are never cut."""

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_and_optimizer(cls, value: Any) -> Any:
        """Fill the two defaults that depend on a neighbour."""
        if not isinstance(value, Mapping):
            return value
        filled = dict(value)
        if filled.get("epochs") is None and filled.get("steps") is None:
            filled["epochs"] = 1
        if filled.get("optimizer_state") is None:
            filled["optimizer_state"] = "keep" if filled.get("start_from") == "previous" else "fresh"
        return filled


class WarmupConfig(SeedDataConfig):
    """Supervised fine-tuning on seed data before round 1 (round 0). Null values are those of `train`."""

    epochs: Count | None = None
    """Passes over the seed data; 1 when neither this nor `steps` is given."""
    steps: Count | None = None
    """Optimizer steps, instead of `epochs`."""
    learning_rate: Positive | None = None
    """Peak learning rate."""
    lr_scheduler_type: SchedulerType | None = None
    """Shape of the learning rate."""
    warmup_ratio: Share | None = None
    """Share of the steps in which the learning rate rises from 0."""
    batch_size: Count | None = None
    """Rows in one optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"path": value}
        if isinstance(value, Mapping) and value.get("epochs") is None and value.get("steps") is None:
            return {**value, "epochs": 1}
        if value is not None and not isinstance(value, Mapping | WarmupConfig):
            raise finding(f"{show(value)} is not a warm-up", expected="none, or a mapping with path")
        return value

    def training(self, train: TrainConfig) -> TrainConfig:
        """The settings of round 0: those of `train` (of round 1), with the keys given here; plain negative log-likelihood, one pass."""
        names = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "batch_size")
        changes = {name: value for name in names if (value := getattr(self, name)) is not None}
        changes |= {"epochs": self.epochs, "steps": self.steps, "objective": "nll", "objective_args": {}}
        changes |= {"weight_by": None, "passes": None, "mix": None, "new_share": None, "lr_schedule": "restart"}
        return train.model_copy(update=changes)
