"""The first filters of a chain in another process: which those are, and all that they need there, as JSON values.

Guarantee: what such a process says of a shard is what the chain itself would have said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from iterative_sft_cli.filters.chain import FilterChain
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.runtime import Runtime
from iterative_sft_cli.types import Prompt


@dataclass(frozen=True, slots=True)
class Judging:
    """How the shards of one announcement are judged where they are made. `part` is what `share` gave.

    `trained_after`: prompt ids to token ids, where samples are not trained after the ids they were generated after.
    """

    part: dict[str, Any]
    round_index: int
    prompts: Mapping[str, Prompt]
    trained_after: Mapping[str, Sequence[int]] = field(default_factory=dict)


def share(
    chain: FilterChain,
    prompts: Mapping[str, Prompt],
    *,
    groups: bool,
    trained_after: Mapping[str, Sequence[int]] | None = None,
) -> Judging | None:
    """The first filters of `chain`, for other processes; None when not even the first one may run there.

    With `groups` a shard holds all samples that group filters look at.
    """
    end = next((i for i in range(chain.streaming_end) if not _may_leave(chain, i, groups)), chain.streaming_end)
    if chain.needs_device or not end:
        return None
    part = {
        "filters": [[one.name, one.arguments] for one in chain.filters[:end]],
        "seed": chain.seed,
        "round_index": chain.round_index,
        "max_length": chain.max_length,
    }
    return Judging(part, chain.round_index, prompts, trained_after or {})


def _may_leave(chain: FilterChain, index: int, groups: bool) -> bool:
    """Whether a filter needs nothing that the run directory holds: earlier rounds, caches of paid answers, batch sizes."""
    one, runner = chain.filters[index], chain.runners[index]
    cached = one.spec is not None and one.spec.cached
    here_only = one.needs_device or one.shape.takes_context or runner.batched or cached
    return (one.kind == "sample" or groups) and not here_only and is_plain(one.arguments)


def is_plain(value: Any) -> bool:
    """Whether a value comes out of JSON as it went in."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def open_part(
    part: Mapping[str, Any], filters: Sequence[ResolvedFilter], *, encoder: Any, runtime: Runtime
) -> FilterChain:
    """The chain that `share` described, of this process's own `filters`."""
    by_name = {one.name: one for one in filters}
    return FilterChain(
        [replace(by_name[name], arguments=arguments) for name, arguments in part["filters"]],
        seed=part["seed"],
        round_index=part["round_index"],
        encoder=encoder,
        max_length=part["max_length"],
        runtime=runtime,
    )
