"""The filters of misbehaving.py, resolved and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterative_sft_cli.filters import FilterChain, ResolvedFilter
from iterative_sft_cli.filters.contract import inspect_filter
from iterative_sft_cli.filters.resolved import Location
from iterative_sft_cli.types import Sample

HERE = Path(__file__).parent


def plugin(attribute: str, **options: Any) -> ResolvedFilter:
    """A filter of misbehaving.py without the resolving worker."""
    import misbehaving

    shape = inspect_filter(getattr(misbehaving, attribute))
    fields = {
        "name": attribute,
        "use": f"misbehaving.py:{attribute}",
        "key": "filters[3]",
        "kind": shape.kind,
        "role": "verifier",
        "arguments": {},
        "shape": shape,
        "spec": None,
        "location": Location(attribute, path=str(HERE / "misbehaving.py")),
        "target": None,
        "isolated": True,
        "prefix_stable": False,
        "reads": frozenset(),
        "source_hash": "0",
        "timeout_s": 20.0,
        "startup_timeout_s": 20.0,
        "workers": 1,
    }
    return ResolvedFilter(**{**fields, **options})


def run(one: ResolvedFilter, samples: list[Sample], **options: Any) -> list[Any]:
    with FilterChain([one], seed=0, round_index=1, **options) as chain:
        judged = chain.open_shard().finish(samples)
        later = chain.finish_round(judged)
    return [(j.says or tuple(later[j.sample.sample_id]))[0] for j in judged]
