"""The round-wide part of a chain: the first `samples` filter and everything after it, over the round's survivors.

The sequence stays lazy: samples are read when a filter asks, only verdicts and scores are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from iterative_sft_cli.filters.contract import Outcome
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.runners import Runner
from iterative_sft_cli.filters.says import FilterSays, Judged
from iterative_sft_cli.types import Sample

Prepare = Callable[[Sample], tuple[Sample, FilterSays | None]]

CHUNK = 512
"""Samples that per-sample and batched filters of the round part take at a time."""


class RoundView(Sequence[Sample]):
    """The samples at `indices` of the round, each with the scores it got so far. Slices are views too."""

    def __init__(
        self, prepare: Prepare, judged: Sequence[Judged], indices: Sequence[int], scores: dict[int, dict[str, float]]
    ) -> None:
        self._prepare = prepare
        self._judged = judged
        self._indices = indices
        self._scores = scores

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return RoundView(self._prepare, self._judged, self._indices[index], self._scores)
        at = self._indices[index]
        sample, _ = self._prepare(self._judged[at].sample)
        new = self._scores.get(at)
        return replace(sample, scores={**sample.scores, **new}) if new else sample

    def __iter__(self) -> Iterator[Sample]:
        for position in range(len(self._indices)):
            yield self[position]


def judge_round_part(
    judged: Sequence[Judged], steps: Sequence[tuple[ResolvedFilter, Runner]], prepare: Prepare
) -> tuple[dict[str, list[FilterSays]], set[str]]:
    """What the filters of `steps` say of every survivor, by sample id, in the round's order; and which of them gave bare floats.

    `prepare` gives a sample its reasoning and final part.
    """
    alive: list[int] = []
    ids: dict[int, tuple[str, str]] = {}
    for index, entry in enumerate(judged):
        if entry.kept:
            alive.append(index)
            ids[index] = (entry.sample.sample_id, entry.sample.prompt_id)
    said: dict[int, list[FilterSays]] = {index: [] for index in alive}
    scores: dict[int, dict[str, float]] = {}
    floats: set[str] = set()
    for one, runner in steps:
        if not alive:
            break
        outcomes = _run(one, runner, prepare, judged, alive, ids, scores)
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
    return {ids[index][0]: says for index, says in said.items()}, floats


def _run(
    one: ResolvedFilter,
    runner: Runner,
    prepare: Prepare,
    judged: Sequence[Judged],
    alive: list[int],
    ids: dict[int, tuple[str, str]],
    scores: dict[int, dict[str, float]],
) -> list[Outcome]:
    if one.kind == "samples":
        whole: list[Outcome] = _value(runner.judge_many(RoundView(prepare, judged, alive, scores)))
        return whole
    outcomes: dict[int, Outcome] = {}
    if one.kind == "group":
        groups: dict[str, list[int]] = {}
        for index in alive:
            groups.setdefault(ids[index][1], []).append(index)
        for members in groups.values():
            results = _value(runner.judge_many(list(RoundView(prepare, judged, members, scores))))
            outcomes.update(zip(members, results, strict=True))
        return [outcomes[index] for index in alive]
    ordered: list[Outcome] = []
    for start in range(0, len(alive), CHUNK):
        chunk = list(RoundView(prepare, judged, alive[start : start + CHUNK], scores))
        if runner.batched:
            ordered += runner.judge_batch(chunk)
        else:
            ordered += [_value(result) for result in [runner.judge(sample) for sample in chunk]]
    return ordered


def _value(result: Any) -> Any:
    return result.result() if isinstance(result, Future) else result
