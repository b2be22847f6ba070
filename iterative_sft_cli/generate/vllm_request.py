"""What a vLLM server is asked for one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iterative_sft_cli.types import Decoding

TOKENS_AN_EVENT = 8
"""Tokens the server gathers before it sends them: fewer events to read, soon enough for the time-out."""


def completion_body(
    model: str, prompt_ids: Sequence[int], decoding: Decoding, *, seed: int, limit: int
) -> dict[str, Any]:
    """Token ids in, token ids with log-probabilities out, in a stream."""
    return {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": limit,
        "n": 1,
        "seed": seed,
        "temperature": decoding.temperature if decoding.do_sample else 0.0,
        "top_p": decoding.top_p if decoding.do_sample else 1.0,
        "top_k": decoding.top_k if decoding.do_sample else 0,
        "min_p": decoding.min_p if decoding.do_sample else 0.0,
        "repetition_penalty": decoding.repetition_penalty,
        "stop": list(decoding.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(decoding.eos_token_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": True,
        "stream_interval": TOKENS_AN_EVENT,
    }
