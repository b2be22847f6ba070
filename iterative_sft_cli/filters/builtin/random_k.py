"""random_k: keeps a random few of each prompt's samples."""

from __future__ import annotations

from collections.abc import Sequence

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn, at_least
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(role="selector", cost="one draw a prompt", check=at_least("k", 1))
_UNDRAWN = Verdict(False, None, "not_drawn")


def random_k(group: Sequence[Sample], k: int, context: Context) -> list[Verdict]:
    """Keep `k` samples of each prompt, drawn without replacement from (seed, round, prompt) (ReST-EM's cap of 10).

    The rest is dropped as `not_drawn`.
    """
    if len(group) <= k:
        return [KEPT] * len(group)
    drawn = set(context.rng.sample(range(len(group)), k))
    return [KEPT if index in drawn else _UNDRAWN for index in range(len(group))]
