"""The built-in filters: one file each, named like the filter, holding the callable and its `SPEC`.

Nothing is imported until a filter is used; optional libraries are imported inside the filters.
"""

from __future__ import annotations

import importlib
from typing import Any

from iterative_sft_cli.filters.builtin.spec import BuiltIn

NAMES: tuple[str, ...] = (
    "balance",
    "best_of_n",
    "code_tests",
    "contains",
    "dedup",
    "drop_solved",
    "embedding_similarity",
    "equations_valid",
    "exact_match",
    "finished",
    "json_schema",
    "judge",
    "language",
    "length",
    "length_vs_group",
    "majority",
    "math_verify",
    "max_per_prompt",
    "nonempty",
    "not_in_eval",
    "numeric_answer",
    "perplexity",
    "random_k",
    "reasoning_gym",
    "regex",
    "repetition",
    "reward_model",
    "threshold",
    "top_fraction",
    "top_k",
)


def load_builtin(name: str) -> tuple[Any, BuiltIn]:
    """The callable and the specification of a built-in. Raises KeyError for an unknown name."""
    if name not in NAMES:
        raise KeyError(name)
    module = importlib.import_module(f"{__name__}.{name}")
    spec: BuiltIn = module.SPEC
    return getattr(module, name), spec
