"""The filters: what decides which samples are trained on, why, and with which score. Imports no torch.

Names are loaded when they are first used, so that a worker process starts without the main process's libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iterative_sft_cli.filters.chain import AcceptedHistory, FilterChain, Shard
    from iterative_sft_cli.filters.context import Context
    from iterative_sft_cli.filters.resolve import check_filters, resolve_filters
    from iterative_sft_cli.filters.resolved import ResolvedFilter
    from iterative_sft_cli.filters.runtime import Runtime
    from iterative_sft_cli.filters.says import FilterSays, FunnelRow, Judged, funnel
    from iterative_sft_cli.filters.sharing import Judging, open_part, share

__all__ = [
    "AcceptedHistory",
    "Context",
    "FilterChain",
    "FilterSays",
    "FunnelRow",
    "Judged",
    "Judging",
    "ResolvedFilter",
    "Runtime",
    "Shard",
    "check_filters",
    "funnel",
    "open_part",
    "resolve_filters",
    "share",
]

_WHERE = {
    "AcceptedHistory": "chain",
    "Context": "context",
    "FilterChain": "chain",
    "FilterSays": "says",
    "FunnelRow": "says",
    "Judged": "says",
    "Judging": "sharing",
    "ResolvedFilter": "resolved",
    "Runtime": "runtime",
    "Shard": "chain",
    "check_filters": "resolve",
    "funnel": "says",
    "open_part": "sharing",
    "resolve_filters": "resolve",
    "share": "sharing",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
