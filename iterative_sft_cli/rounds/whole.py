"""What looks at a whole round: its judged samples as one lazy sequence, and the surplus over what was asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.filters import FilterSays, Judged
from iterative_sft_cli.rounds.stages import Stages
from iterative_sft_cli.samples import GENERATED, VERDICTS, read_generated
from iterative_sft_cli.types import Prompt

SURPLUS = "until_accepted"
"""The name under which what is more than `until_accepted` or `until_total` asked for stands in the verdicts."""


def find_surplus(judged: Sequence[Judged], each: Mapping[str, int], total: int | None) -> dict[str, list[FilterSays]]:
    """Of the samples that passed, in order: those beyond a prompt's number or the round's are dropped as `surplus`."""
    counts: Counter[str] = Counter()
    passed = 0
    said = {}
    for one in judged:
        key = one.sample.prompt_id
        keep = counts[key] < each.get(key, math.inf) and (total is None or passed < total)
        counts[key] += keep
        passed += keep
        said[one.sample.sample_id] = [FilterSays(SURPLUS, keep, None, None if keep else "surplus")]
    return said


class JudgedRound(Sequence[Judged]):
    """The samples of a round that passed the streaming filters, in order, read from the sealed shards as they are asked for."""

    def __init__(self, stages: Stages, prompts: dict[str, Prompt], round_index: int) -> None:
        self._stages = stages
        self._prompts = prompts
        self._round_index = round_index
        self._index: list[tuple[str, int]] = []
        self._open: tuple[str, list[Judged]] | None = None
        for name in stages.run.shards.names(round_index, GENERATED):
            self._index += [(name, i) for i, one in enumerate(self._load(name)) if one.kept]

    def _load(self, name: str) -> list[Judged]:
        if self._open is None or self._open[0] != name:
            shards = self._stages.run.shards
            samples = read_generated(shards, self._round_index, name, self._prompts)
            verdicts = shards.read(self._round_index, name.replace(GENERATED, VERDICTS, 1))[0]
            judged = [Judged.from_rows(s, v["says"], v["kept"]) for s, v in zip(samples, verdicts, strict=True)]
            self._open = (name, judged)
        return self._open[1]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, position = self._index[index]
        return self._load(name)[position]
