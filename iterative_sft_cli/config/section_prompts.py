"""The `prompts` and `eval` sections: where questions come from, which columns are read, and which are taken each round."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from iterative_sft_cli.config.expression import GRAMMAR, Expression, ExpressionError
from iterative_sft_cli.config.fields import (
    ByShape,
    Count,
    CountFromZero,
    ListTag,
    NonNegative,
    NumberTag,
    Positive,
    ScalarTag,
    Section,
    Share,
    Text,
    Texts,
    WordOrNumber,
    WordTag,
)
from iterative_sft_cli.config.findings import finding, show
from iterative_sft_cli.config.schedule import Scheduled
from iterative_sft_cli.config.section_run import ConditionText


class DatasetSource(Section):
    """A data set on the hub, or a folder that `datasets` can load. A text instead of a mapping is its `id`."""

    id: Text
    """Hub id or folder."""
    name: Text | None = None
    """Configuration of the data set; null is its only one."""
    split: Text = "train"
    """Split."""
    revision: Text | None = None
    """Branch, tag or commit; null is the default branch, whose commit is recorded."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value


class ReasoningGymSource(Section):
    """Tasks made by the reasoning-gym package. A text instead of a mapping is its `task`."""

    task: Text
    """Name of the task, such as chain_sum."""
    size: Count = 500
    """Number of prompts."""
    seed: CountFromZero = 0
    """Prompt i is made from seed + i, so keep the seeds of `prompts` and `eval` further apart than their sizes."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task, such as {min_terms: 2, max_terms: 2}."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_task(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value


def _pattern(value: Any) -> Any:
    if isinstance(value, str):
        try:
            compiled = re.compile(value)
        except re.error as error:
            raise finding(
                f"{show(value)} is not a regular expression ({error})", expected="a regular expression"
            ) from None
        if compiled.groups > 1:
            raise finding(
                f"the pattern has {compiled.groups} groups", expected="one group, or none to take the whole match"
            )
    return value


class ColumnSpec(Section):
    """A column, and the part of it that is wanted. A text instead of a mapping is its `column`."""

    column: Text
    """Name of the column; a dot goes into a nested object."""
    pattern: Annotated[Text | None, BeforeValidator(_pattern)] = None
    """Regular expression: its group, or the whole last match, is taken; null takes the whole value."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_column(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value


class SkipConfig(Section):
    """Prompts that are left out because of how they went before."""

    solved_at_least: Scheduled[Share | None] = None
    """Leave out prompts whose last acceptance rate was this or more; null leaves none out."""
    solved_at_most: Scheduled[Share | None] = None
    """Leave out prompts whose last acceptance rate was this or less; null leaves none out."""


class CurriculumConfig(Section):
    """A window of levels that moves up from round to round. Needs `order: curriculum` and levels that are numbers."""

    start: float
    """Highest level that round 1 asks."""
    step: Positive = 1.0
    """How far the highest level moves up, each round that `promote_if` allows."""
    width: Positive | None = None
    """Levels above `highest - width` are asked, 1 asks the highest alone; null asks all up to the highest."""
    promote_if: ConditionText | None = None
    """Condition over the last round's statistics, such as `filters/accept_rate >= 0.9`, without which the level stays; null always moves up."""


class SourceConfig(Section):
    """One source of rows: exactly one of `path`, `dataset`, `reasoning_gym` and `use`."""

    path: Text | None = None
    """A .jsonl, .json, .csv or .parquet file, relative to this config."""
    dataset: DatasetSource | None = None
    """A data set on the hub."""
    reasoning_gym: ReasoningGymSource | None = None
    """Tasks made by reasoning-gym, with their verifier."""
    use: Text | None = None
    """Installed prompt source, pkg.mod:factory or path/file.py:factory that returns the rows."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the factory in `use`."""
    limit: Count | None = None
    """Take only the first so many rows; null takes all."""


FewShot = Annotated[
    Annotated[Text, ScalarTag] | Annotated[list[dict[str, Any]], ListTag],
    ByShape,
]
PerRound = Annotated[
    Annotated[Literal["all"], WordTag]
    | Annotated[Annotated[float, Field(gt=0)] | Annotated[int, Field(ge=1)], NumberTag],
    WordOrNumber,
]


def _expression(value: Any) -> Any:
    """An arithmetic expression, checked for its grammar."""
    if isinstance(value, str):
        try:
            Expression(value)
        except ExpressionError as error:
            raise finding(str(error), expected=GRAMMAR) from None
    return value


def _per_round(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value <= 0 or (value > 1 and value != int(value)):
        raise finding(
            f"{show(value)} is neither a number of prompts nor a share of them",
            expected="all, an integer of at least 1, or a fraction up to 1.0",
        )
    return int(value) if value > 1 else value


class PromptsConfig(SourceConfig):
    """What is asked. Columns that are not named here reach the filters as `sample.row`."""

    prompt: Text = "prompt"
    """Column with the question: text, or a list of chat messages. A text is one user message when the tokenizer has a chat template."""
    answer: ColumnSpec | None = None
    """Column with the reference answer, or {column, pattern}; null when the filters need none."""
    id: Text | None = None
    """Column with a unique name of the prompt; null is the number of the row, from 0."""
    level: Text | None = None
    """Column with the difficulty: a number, or text in order; `curriculum` and the statistics use it."""
    system: Text | None = None
    """System message put before every prompt; null for none."""
    few_shot: FewShot | None = None
    """Worked examples put before every prompt: a .jsonl, .json or .yaml file of {prompt, completion}, a .txt file put in front as it is, or a list of such mappings."""
    template: Text | None = None
    """Chat template: null is the tokenizer's own, `none` uses none and joins plain text, else a Jinja file, a Jinja text, or the name of one of the tokenizer's."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values for the template, such as {enable_thinking: false}."""
    thinking_tags: Annotated[list[Text], Field(min_length=2, max_length=2)] = ["<think>", "</think>"]
    """What opens and what closes a thinking block in completions."""
    per_round: Scheduled[Annotated[PerRound, BeforeValidator(_per_round)]] = "all"
    """How many prompts each round takes: all, a number, or a fraction of them."""
    order: Scheduled[Literal["shuffle", "sequential", "curriculum", "hardest_first", "adaptive"]] = "shuffle"
    """In which order rounds take prompts: shuffle (seeded, each prompt once before any twice), sequential (going on where the last round stopped), curriculum (lowest level first), hardest_first (lowest last acceptance rate first), adaptive (longest not asked first, then lowest last acceptance rate: AdaSTaR)."""
    curriculum: CurriculumConfig | None = None
    """Levels that each round asks, with `order: curriculum`; null asks all, as `per_round` allows."""
    advance: Annotated[Text | None, BeforeValidator(_expression)] = None
    """With `order: adaptive`: the share of a round's prompts, first asked first, that count as asked, an expression over `accept_rate` such as `accept_rate ** 2`; null counts all."""
    skip: SkipConfig = Field(default_factory=SkipConfig)
    """Prompts to leave out because of earlier rounds."""


class LmEvalConfig(Section):
    """Tasks of lm-evaluation-harness, run on the live model."""

    tasks: Texts
    """Names or patterns of tasks."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the harness, such as {num_fewshot: 5, limit: 100, batch_size: 16}; include_path names folders of tasks of your own, relative to this config, and include_defaults: false leaves out the harness's, which take seconds to list."""


def _metric(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"(?:pass|maj|best)@[1-9]\d*|greedy", value):
        raise finding(f"{show(value)} is not a metric", expected="pass@K, maj@K, best@K or greedy, such as pass@1")
    return value


class EvalConfig(SourceConfig):
    """Prompts that are never trained on, asked of the starting model and after rounds. Null columns and decoding are inherited."""

    prompt: Text | None = None
    """Column with the question; null is the column of `prompts`."""
    answer: ColumnSpec | None = None
    """Column with the reference answer; null is the one of `prompts`."""
    id: Text | None = None
    """Column with a unique name; null is the one of `prompts` if the data has it."""
    level: Text | None = None
    """Column with the difficulty; null is the one of `prompts` if the data has it."""
    system: Text | None = None
    """System message; null is the one of `prompts`."""
    few_shot: FewShot | None = None
    """Worked examples; null are those of `prompts`."""
    template: Text | None = None
    """Chat template; null is the one of `prompts`."""
    template_kwargs: dict[str, Any] | None = None
    """Values for the template; null are those of `prompts`."""
    samples_per_prompt: Count = 1
    """Completions drawn for each prompt."""
    k: list[Count] = Field(default=[1], min_length=1)
    """The k of pass@k and maj@k that are reported, besides that of `metric`; none above `samples_per_prompt`."""
    greedy: bool = False
    """Also answer each prompt once without sampling, reported as `greedy`."""
    every: Count = 1
    """Evaluate after every so many rounds, always after the last, and the starting model."""
    correct: Texts | None = None
    """Names of the filters that must keep an answer for it to be correct; null is every per-sample verifier of `filters`."""
    metric: Annotated[Text, BeforeValidator(_metric)] = "pass@1"
    """The figure that defines `best`."""
    temperature: NonNegative | None = None
    """Sampling temperature; null is that of `generate` in round 1, for this and the keys below."""
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    """Nucleus sampling: keep the smallest set of tokens with this probability."""
    top_k: CountFromZero | None = None
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: Positive | None = None
    """Divide the scores of tokens that already occurred; 1 does nothing."""
    do_sample: bool | None = None
    """false takes the most probable token each time."""
    max_new_tokens: Count | None = None
    """Longest completion, in tokens."""
    stop: Texts | None = None
    """Texts that end a completion."""
    lm_eval: LmEvalConfig | None = None
    """Also run tasks of lm-evaluation-harness after each evaluated round."""
    rank_by: Text | None = None
    """Name of the per-sample filter whose score ranks answers for best@k; it then also runs in the evaluation. Null reports no best@k."""

    @model_validator(mode="after")
    def _report_the_metric(self) -> EvalConfig:
        """The k of the metric is reported too."""
        number = self.metric.partition("@")[2]
        if number and int(number) not in self.k:
            self.__dict__["k"] = sorted({*self.k, int(number)})
        return self
