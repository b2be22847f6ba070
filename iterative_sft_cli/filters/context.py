"""What a filter may know beyond its samples: round, seed, derived randomness, a cache folder, earlier acceptances.

Every random draw is a pure function of (run seed, filter, round, prompt or sample), never of what ran before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.types import derive_seed


class Context:
    """Handed to filters that have a parameter `context`.

    `accepted_earlier` iterates over `{"prompt_id", "completion", "round_index"}` of samples accepted in earlier rounds;
    `cache_dir` is a folder that outlives the process (None in `isft filters test` and without a run); `eval_texts` are the evaluation's prompts
    (built-ins only).
    """

    __slots__ = ("_parts", "_rng", "accepted_earlier", "cache_dir", "eval_texts", "round_index", "seed")

    def __init__(
        self,
        *,
        round_index: int,
        seed: int,
        filter_name: str,
        subject: str,
        cache_dir: Path | None = None,
        accepted_earlier: Iterable[Mapping[str, Any]] = (),
        eval_texts: Sequence[str] = (),
    ) -> None:
        self.round_index = round_index
        self.seed = seed
        self.cache_dir = cache_dir
        self.accepted_earlier = accepted_earlier
        self.eval_texts = eval_texts
        self._parts = (filter_name, subject)
        self._rng: random.Random | None = None

    @property
    def rng(self) -> random.Random:
        """A generator of this sample (or group, or round) alone."""
        if self._rng is None:
            self._rng = random.Random(
                derive_seed(self.seed, "filter", self._parts[0], self.round_index, self._parts[1])
            )
        return self._rng
