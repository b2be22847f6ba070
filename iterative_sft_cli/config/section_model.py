"""The `model` section: which weights, in which precision, where, and with which adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from iterative_sft_cli.config.fields import (
    ByShape,
    Count,
    ListTag,
    NoneWord,
    Positive,
    Reference,
    ScalarTag,
    Section,
    Text,
)
from iterative_sft_cli.config.findings import finding, show


class AdapterConfig(Section):
    """A small set of weights trained beside frozen ones. A text instead of a mapping is its `type`."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    r: Count = 16
    """Rank of each update."""
    alpha: Positive = 32.0
    """Scale of the update; it is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which the adapter's input is dropped in training."""
    target_modules: Annotated[Annotated[Text, ScalarTag] | Annotated[list[Text], ListTag], ByShape] = "all-linear"
    """Layers that get the adapter: `all-linear`, or names (or a regular expression) in peft's words."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_type(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


def _device(value: Any) -> Any:
    kind, _, index = value.partition(":") if isinstance(value, str) else ("auto", "", "")
    if kind not in ("auto", "cpu", "cuda", "mps", "xpu") or (index and not index.isdigit()):
        raise finding(f"{show(value)} is not a device", expected="auto, cpu, cuda, cuda:N, mps or xpu")
    return value


class ModelConfig(Section):
    """The model that generates and is trained. A text instead of a mapping is its `path`."""

    path: Text | None = None
    """Hub id, local folder or .gguf file."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; null is the default branch, whose commit is recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute precision. auto: trained parameters in float32, frozen ones and all compute in bfloat16 where the hardware has it."""
    device: Annotated[Text, BeforeValidator(_device)] = "auto"
    """auto takes a GPU when there is one; without one a model over 1B parameters is refused unless `cpu` is written."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention implementation, in transformers' words."""
    adapter: Annotated[AdapterConfig | None, NoneWord] = None
    """Train an adapter and freeze the rest; null trains all parameters."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Store the frozen weights in fewer bits; needs an adapter."""
    trust_remote_code: bool = False
    """Run code that comes with the model; allowed only with a `revision` pinned to a full commit hash."""
    init: dict[str, Any] | None = None
    """Make a fresh model from these transformers config values (with `model_type`) instead of reading `path`."""
    tokenizer: Text | None = None
    """Hub id or folder of the tokenizer; null is the model's own. Required with `init`."""
    use: Reference | None = None
    """`pkg.mod:factory` that supplies model, tokenizer and engine, instead of `path` and `init`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the factory in `use`."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"path": value}
        if value is None or isinstance(value, Mapping | ModelConfig):
            return value
        raise finding(
            f"{show(value)} is not a model", expected="a hub id, a folder, a .gguf file, or a mapping with path"
        )
