"""The batch shape of a shard on this machine: how many rows, how much cache, how many tokens a prefill.

Guarantee: a pure function of config, model, requests and the machine's total memory, never of what is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iterative_sft_cli.machine import total_memory
from iterative_sft_cli.types import Decoding, Request

ROWS_A_STREAM = 192
"""Rows at once in each of the streams that a shard's decoding is dealt to on a CPU."""
LEAST_ROWS_A_STREAM = 24
"""A shard with fewer rows for each has fewer streams, with more threads in each: small products are bound by reading the weights."""
MAX_ROWS_CUDA = 512
PREFILL_TOKENS_CPU = 512
PREFILL_TOKENS_CUDA = 8192
CACHE_SHARE = 0.25
"""Share of the total memory that the cache may take when `generate.memory_gb` is auto."""


def num_positions(memory_gb: float | str, bytes_per_position: int, device: str) -> int:
    """Tokens of one row for which the cache has memory, at least 1."""
    memory = total_memory(device) * CACHE_SHARE if memory_gb == "auto" else float(memory_gb) * 2**30
    return max(int(memory // max(bytes_per_position, 1)), 1)


def prefill_tokens(device: str) -> int:
    """Tokens of prompts that are run together."""
    return PREFILL_TOKENS_CUDA if device.startswith("cuda") else PREFILL_TOKENS_CPU


def make_plan(
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    memory_gb: float | str,
    bytes_per_position: int,
    context_length: int,
    device: str,
    threads: int,
    shareable: bool,
    kept_tokens: int,
    num_kept: int,
) -> dict[str, Any]:
    """See the module's docstring. `bytes_per_position` is what one token of one row takes in the cache; prompts of `kept_tokens` tokens
    stay in it from shard to shard, `num_kept` of them in this one."""
    positions = max(num_positions(memory_gb, bytes_per_position, device) - kept_tokens, 1)
    cuda = device.startswith("cuda")
    num_samples = sum(len(request.seeds) for request in requests)
    # one thread a stream: small operations need no barrier, and a busy core slows only its own stream
    streams = 1 if cuda or not shareable else max(1, min(threads, num_samples // LEAST_ROWS_A_STREAM))
    rows = max(1, min(MAX_ROWS_CUDA if cuda else ROWS_A_STREAM * streams, num_samples))
    longest = min(max((len(r.prompt_ids) for r in requests), default=1) + decoding.max_new_tokens, context_length)
    # rows are admitted by what they hold, so twice as many as would fit at full length may start
    rows = max(1, min(rows, 2 * positions // max(longest, 1)))
    return {
        "max_rows": rows,
        "cache_tokens_per_row": max(positions // rows, longest if rows == 1 else 1),
        "prefill_tokens": prefill_tokens(device),
        "admit_rows": max(1, rows // 8),
        "streams": min(streams, rows),
        "order": "longest_prompt_first",
        "kept_prompts": num_kept,
        "threads": threads,
    }
