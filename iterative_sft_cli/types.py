"""The records that travel between the stages; plug-ins import `Sample` and `Verdict` from the package root.

All are frozen: a stage replaces a record, it never changes one. No tensor appears here and nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One chat message: `{"role": ..., "content": ...}`."""

EOS = "eos"
"""finish_reason: the model wrote an end-of-sequence token (it is the last of `completion_ids`)."""
STOP = "stop"
"""finish_reason: a stop string was completed; it is part of the completion."""
LENGTH = "length"
"""finish_reason: cut off at `max_new_tokens` or at the model's context."""
PROMPT_TOO_LONG = "prompt_too_long"
"""finish_reason: the prompt leaves no room in the context; the completion is empty."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the data: what is asked, the reference answer, and the row it came from."""

    prompt_id: str
    prompt: str | list[Message]
    answer: Any = None
    level: Any = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, one completion of it, and all that is known of the pair.

    `completion_ids` are the token ids as sampled, with the EOS token last when `finish_reason` is "eos"; `completion` is
    their text without special tokens. `final` is the completion after a closed thinking block and `reasoning` what stood
    inside it (None without one). `logprob` is the sum over the completion's tokens in nats, None where the engine does
    not tell. `scores` maps a filter's name to the score it gave.
    """

    prompt_id: str
    sample_id: str
    round_index: int
    prompt: str | list[Message]
    completion: str
    answer: Any = None
    row: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    finish_reason: str = EOS
    logprob: float | None = None
    reasoning: str | None = None
    final: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    sample_index: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter says of one sample. `reason` is a short snake_case word for the statistics; extras become columns."""

    keep: bool
    score: float | None = None
    reason: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises TypeError for a `keep` that is not a bool and ValueError for a score that is not finite."""
        if type(self.keep) is not bool:
            raise TypeError(f"Verdict.keep must be a bool, got {type(self.keep).__name__}")
        if self.score is not None:
            if isinstance(self.score, bool) or not isinstance(self.score, int | float):
                raise TypeError(f"Verdict.score must be a number or None, got {type(self.score).__name__}")
            if not math.isfinite(self.score):
                raise ValueError(f"Verdict.score must be finite, got {self.score}")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt as an engine gets it: token ids, and for each wanted sample its index and 63-bit seed."""

    prompt_id: str
    prompt: str | list[Message]
    prompt_ids: tuple[int, ...]
    sample_indices: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an engine decodes, in Hugging Face's words. `temperature` is ignored when `do_sample` is false."""

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    keep_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion as an engine returns it; `text` is None when the loop is to decode the ids."""

    prompt_id: str
    sample_index: int
    token_ids: tuple[int, ...]
    finish_reason: str
    text: str | None = None
    logprob: float | None = None
    token_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One sequence to train on. `labels` has the length of `input_ids`, -100 where nothing is trained.

    `weight` multiplies the row's loss and may be negative; `ref_logprobs` (per trained token, nats) is what importance-weighted objectives
    compare with.
    """

    sample_id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    weight: float = 1.0
    ref_logprobs: tuple[float, ...] | None = None


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, such as (run seed, "generate", round, prompt_id, sample_index)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1
