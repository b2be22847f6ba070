"""max_per_prompt: caps the samples of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn, at_least
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(role="selector", cost="nothing", prefix_stable=True, check=at_least("n", 1))
_OVER = Verdict(False, None, "over_cap")


def max_per_prompt(group: Sequence[Sample], n: int) -> list[Verdict]:
    """Keep the first `n` samples of each prompt, in sample order; the rest is dropped as `over_cap`.

    Use `random_k` for a random choice and `top_k` for the best.
    """
    return [KEPT] * min(n, len(group)) + [_OVER] * max(0, len(group) - n)
