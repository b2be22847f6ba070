"""The `generate` and `rationalize` sections: how completions are drawn, and from which engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

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
    VariableName,
    WordOrNumber,
    WordTag,
)
from iterative_sft_cli.config.schedule import Scheduled
from iterative_sft_cli.config.section_prompts import FewShot
from iterative_sft_cli.types import Decoding


class VllmConfig(Section):
    """vLLM servers: started by isft from an environment of their own, or already running at `base_urls`."""

    python: Text | None = None
    """Python interpreter of the environment that has vLLM; null looks for `vllm` on PATH."""
    tensor_parallel_size: Count = 1
    """GPUs of one server."""
    servers: Annotated[Annotated[Literal["auto"], WordTag] | Annotated[Count, NumberTag], WordOrNumber] = "auto"
    """Servers that are started on each host; auto is its visible GPUs / tensor_parallel_size, and one without a GPU."""
    while_training: Literal["auto", "sleep", "stop", "keep"] = "auto"
    """What servers that were started do while the trainer has the device: sleep (GPU only), stop, or keep their memory; auto is sleep on a GPU, keep on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU's memory that vLLM may take while it generates."""
    max_model_len: Count | None = None
    """Longest prompt and completion together, in tokens; null is the model's."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `vllm serve`, such as {enforce-eager: true}."""
    base_urls: Texts = Field(default_factory=list)
    """Addresses of servers that are already running; then none is started."""
    stage_to: Text | None = None
    """Folder on each host's own disk to which new weights are copied once and checked there; null reads them where they are."""
    reload: Text | None = None
    """How servers at `base_urls` take new weights: http, restart, or pkg.mod:fn."""


class OpenAIConfig(Section):
    """A server with OpenAI's interface, for teachers and remote models."""

    base_url: Text | None = None
    """Address, such as http://localhost:8000/v1."""
    model: Text | None = None
    """Name of the model there."""
    api_key_env: VariableName | None = None
    """Name of the environment variable that holds the key; null sends none. The key itself never stands in a config."""
    max_concurrency: Count = 16
    """Requests in flight at once."""
    max_retries: CountFromZero = 6
    """Tries again after a time-out, 429 or 5xx, with growing pauses."""
    requests_per_minute: Count | None = None
    """Limit on the rate of requests; null for none."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request."""


class SourceModel(Section):
    """One of several models that completions come from."""

    model: Text
    """current, base, best, warmup, a hub id or a folder."""
    share: Share
    """Its share of each prompt's samples; the shares add up to 1."""


class BudgetConfig(Section):
    """How a round's samples are shared out among its prompts, by how hard a first few samples show them to be. A text is its `kind`."""

    kind: Literal["prop_difficulty", "gvm"]
    """prop_difficulty: accepted samples wanted in proportion to the share that failed, `until_accepted` for the hardest (DART-Math); gvm: samples drawn in proportion to 1 / sqrt(p + alpha / p^(beta - 1)) of the accepted share p (GVM with equal gradient norms)."""
    pilot: Count = 8
    """Samples drawn of every prompt first; they count as the round's."""
    alpha: Positive = 1e-3
    """gvm: how much prompts that are hardly ever solved are held back."""
    beta: Positive = 2.0
    """gvm: exponent of the same."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class SearchConfig(Section):
    """Chooses each round's temperature and threshold by a trial on some prompts (B-STaR's balance score)."""

    temperature: list[Positive] = Field(default_factory=list)
    """Temperatures to try; none keeps `generate.temperature`."""
    filter: Text = "threshold"
    """Name of the `threshold` filter whose `min` is chosen."""
    min: list[float] = Field(default_factory=list)
    """Values of its `min` to try; none keeps it."""
    prompts: Count = 600
    """Prompts of the trial: the first so many of the round."""
    samples_per_prompt: Count | None = None
    """Samples of each in the trial; null is that of `generate`."""
    enough: Count = 8
    """Accepted samples of a prompt that are enough (n* of the paper)."""


class GenerateConfig(Section):
    """How completions are drawn. Names and meanings are Hugging Face's; the model's own generation_config only gives EOS ids."""

    DECODING_FIELDS: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "do_sample",
        "max_new_tokens",
        "stop",
        "keep_logprobs",
    )

    engine: Text = "transformers"
    """transformers (in this process), vllm, openai, or a plug-in's name or pkg.mod:attr."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments for a plug-in engine."""
    samples_per_prompt: Scheduled[Count] = 8
    """Completions drawn for each prompt and round; 1 when `do_sample` is false."""
    until_accepted: Scheduled[Count | None] = None
    """Stop drawing for a prompt once so many were accepted, at most `samples_per_prompt`; null always draws all."""
    wave_size: Count | None = None
    """Samples of a prompt in one wave of `until_accepted`; a wave looks at the verdicts of all waves but the one before it. null is `until_accepted`, or a sixteenth of `samples_per_prompt` where that is more."""
    until_total: Scheduled[Count | None] = None
    """Stop asking further prompts once so many samples of the round were accepted; null asks all of the round's prompts."""
    budget: BudgetConfig | None = None
    """Share samples out by difficulty; null draws alike for every prompt."""
    search: SearchConfig | None = None
    """Choose temperature and threshold anew each round; null takes those that are written."""
    from_: Scheduled[Annotated[Annotated[Text, ScalarTag] | Annotated[list[SourceModel], ListTag], ByShape]] = Field(
        default="current", alias="from"
    )
    """Which weights generate: current, base, best, warmup, another model's hub id or folder, or a list of {model, share}."""
    temperature: Scheduled[NonNegative] = 1.0
    """Sampling temperature; for greedy decoding write `do_sample: false`."""
    top_p: Scheduled[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this probability; 1 keeps all."""
    top_k: Scheduled[CountFromZero] = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: Scheduled[Share] = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 drops none."""
    repetition_penalty: Scheduled[Positive] = 1.0
    """Divide the scores of tokens that already occurred; 1 does nothing."""
    do_sample: Scheduled[bool] = True
    """false takes the most probable token each time (greedy)."""
    max_new_tokens: Scheduled[Count] = 256
    """Longest completion, in tokens; one that reaches it has finish reason `length`."""
    stop: Texts = Field(default_factory=list)
    """Texts that end a completion; they stay part of it."""
    keep_logprobs: bool = False
    """Record each token's log probability, as the importance-weighted objective needs."""
    memory_gb: Annotated[Annotated[Literal["auto"], WordTag] | Annotated[Positive, NumberTag], WordOrNumber] = "auto"
    """Memory for the key-value cache; auto is a function of config, model and the machine's total memory."""
    timeout_s: Positive = 600.0
    """Give up on an engine after so many seconds without a new token."""
    startup_timeout_s: Positive = 1800.0
    """Give up on a server that is not ready after so many seconds."""
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    """Settings of `engine: vllm`."""
    openai: OpenAIConfig = Field(default_factory=OpenAIConfig)
    """Settings of `engine: openai`."""

    @model_validator(mode="before")
    @classmethod
    def _greedy_draws_once(cls, value: Any) -> Any:
        """Greedy decoding without a number of samples draws one."""
        if isinstance(value, Mapping) and value.get("do_sample") is False and "samples_per_prompt" not in value:
            return {**value, "samples_per_prompt": 1}
        return value

    def decoding(self, *, eos_token_ids: tuple[int, ...] = ()) -> Decoding:
        """The decoding of a config that was resolved with `Config.at_round`."""
        values = {name: getattr(self, name) for name in self.DECODING_FIELDS}
        values["stop"] = tuple(self.stop)
        return Decoding(**values, eos_token_ids=eos_token_ids)


class RationalizeConfig(Section):
    """A second try for prompts with nothing accepted, with a hint that is stripped before training."""

    template: Text
    """The hinted prompt as a text that contains {answer}, and {prompt} where the question goes."""
    samples_per_prompt: Scheduled[Count] = 1
    """Completions drawn for each hinted prompt."""
    share: Scheduled[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Share of the prompts with nothing accepted that get a second try."""
    few_shot: FewShot | None = None
    """Worked examples with hints, instead of those of `prompts`; null keeps those, `none` uses none."""
    max_share: Annotated[float | None, Field(gt=0, le=1)] = None
    """Largest share of the round's training rows that may come from hints; null for no limit."""
