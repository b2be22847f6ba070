"""The round-wide part of a chain: the first `samples` filter and everything after it, over the round's survivors.

The sequence stays lazy: samples are read when a filter asks, only verdicts and scores are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iterative_sft_cli.filters.contract import Outcome
from iterative_sft_cli.filters.says import FilterSays, Judged
from iterative_sft_cli.types import Sample

if TYPE_CHECKING:
    from iterative_sft_cli.filters.chain import FilterChain

CHUNK = 512
"""Samples that per-sample and batched filters of the round part take at a time."""


class RoundView(Sequence[Sample]):
    """The samples at `indices` of the round, each with the scores it got so far. Slices are views too."""

    def __init__(
        self, chain: FilterChain, judged: Sequence[Judged], indices: Sequence[int], scores: dict[int, dict[str, float]]
    ) -> None:
        self._chain = chain
        self._judged = judged
        self._indices = indices
        self._scores = scores

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return RoundView(self._chain, self._judged, self._indices[index], self._scores)
        at = self._indices[index]
        sample, _ = self._chain.prepare(self._judged[at].sample)
        new = self._scores.get(at)
        return replace(sample, scores={**sample.scores, **new}) if new else sample

    def __iter__(self) -> Iterator[Sample]:
        for position in range(len(self._indices)):
            yield self[position]


def judge_round_part(chain: FilterChain, judged: Sequence[Judged]) -> dict[str, list[FilterSays]]:
    """What the round-wide filters say of every survivor, by sample id, in the round's order."""
    alive: list[int] = []
    ids: dict[int, tuple[str, str]] = {}
    for index, entry in enumerate(judged):
        if entry.kept:
            alive.append(index)
            ids[index] = (entry.sample.sample_id, entry.sample.prompt_id)
    said: dict[int, list[FilterSays]] = {index: [] for index in alive}
    scores: dict[int, dict[str, float]] = {}
    floats: set[str] = set()
    for position in range(chain.streaming_end, len(chain.filters)):
        if not alive:
            break
        one = chain.filters[position]
        outcomes = _run(chain, position, judged, alive, ids, scores)
        survivors = []
        for index, outcome in zip(alive, outcomes, strict=True):
            verdict = outcome.verdict
            said[index].append(FilterSays(one.name, verdict.keep, verdict.score, verdict.reason, verdict.extra))
            if verdict.score is not None:
                scores.setdefault(index, {})[one.name] = verdict.score
                if outcome.bare_float:
                    floats.add(one.name)
            if verdict.keep:
                survivors.append(index)
        alive = survivors
    chain._check_unread(sorted(floats))
    return {ids[index][0]: says for index, says in said.items()}


def _run(
    chain: FilterChain,
    position: int,
    judged: Sequence[Judged],
    alive: list[int],
    ids: dict[int, tuple[str, str]],
    scores: dict[int, dict[str, float]],
) -> list[Outcome]:
    one, runner = chain.filters[position], chain.runners[position]
    if one.kind == "samples":
        whole: list[Outcome] = _value(runner.judge_many(RoundView(chain, judged, alive, scores)))
        return whole
    outcomes: dict[int, Outcome] = {}
    if one.kind == "group":
        groups: dict[str, list[int]] = {}
        for index in alive:
            groups.setdefault(ids[index][1], []).append(index)
        for members in groups.values():
            results = _value(runner.judge_many(list(RoundView(chain, judged, members, scores))))
            outcomes.update(zip(members, results, strict=True))
        return [outcomes[index] for index in alive]
    ordered: list[Outcome] = []
    for start in range(0, len(alive), CHUNK):
        chunk = list(RoundView(chain, judged, alive[start : start + CHUNK], scores))
        if runner.batched:
            ordered += runner.judge_batch(chunk)
        else:
            ordered += [_value(result) for result in [runner.judge(sample) for sample in chunk]]
    return ordered


def _value(result: Any) -> Any:
    return result.result() if isinstance(result, Future) else result
