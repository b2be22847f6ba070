"""The filters: what decides which samples are trained on, why, and with which score. Imports no torch."""

from __future__ import annotations

from iterative_sft_cli.filters.chain import AcceptedHistory, FilterChain, Shard
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.filters.resolve import ResolvedFilter, resolve_filters
from iterative_sft_cli.filters.runners import Runtime
from iterative_sft_cli.filters.says import FilterSays, FunnelRow, Judged, funnel

__all__ = [
    "AcceptedHistory",
    "Context",
    "FilterChain",
    "FilterSays",
    "FunnelRow",
    "Judged",
    "ResolvedFilter",
    "Runtime",
    "Shard",
    "funnel",
    "resolve_filters",
]
