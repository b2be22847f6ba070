"""The rows a round trains on: accepted samples of the pool, in their forms and with their weights, and seed data.

A pure function of sealed verdicts, config and seed; the order is that of rounds and samples, seed data last.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from iterative_sft_cli.config.expression import Expression
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rounds.hints import fill
from iterative_sft_cli.rounds.rows import PackedRows
from iterative_sft_cli.rounds.stages import Stages
from iterative_sft_cli.samples import StoredSample, iter_accepted
from iterative_sft_cli.train.pool import draw_seed_rows, num_seed_rows, pool_rounds
from iterative_sft_cli.types import Message, TrainRow, derive_seed

SEED_DATA = 0
"""The round that seed data counts as coming from."""

NO_SCORES: Mapping[str, float | None] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows with, for each, its scores (none for seed data, nor where no threshold reads them) and the round it comes from."""

    rows: Sequence[TrainRow]
    scores: list[Mapping[str, float | None]]
    rounds: list[int]

    @classmethod
    def of_seed_data(cls, rows: Sequence[TrainRow]) -> Gathered:
        """Seed data alone, as the warm-up trains on."""
        return cls(rows, [NO_SCORES] * len(rows), [SEED_DATA] * len(rows))


def scores_of(stored: StoredSample) -> dict[str, float | None]:
    """What the filters scored a sample, by filter name."""
    return {says["filter"]: says.get("score") for says in stored.says}


def weight_of(expression: Expression | None, stored: StoredSample) -> float:
    """The training weight that `train.weight_by` gives a sample; 1 without it. Raises DataError when a score is missing."""
    if expression is None:
        return 1.0
    scores = scores_of(stored)
    missing = sorted(name for name in expression.names if scores.get(name) is None)
    if missing:
        raise DataError(
            f"sample {stored.sample.sample_id} has no score `{missing[0]}`",
            where="train.weight_by",
            hint="name a filter that scores every accepted sample",
        )
    return float(expression({name: float(scores[name] or 0.0) for name in expression.names}))


def gather_rows(stages: Stages, config: Any, round_index: int) -> Gathered:
    """The rows of a round in the order of their rounds and samples, seed data last."""
    section = config.train
    expression = Expression(section.weight_by) if section.weight_by is not None else None
    scored = any(one.threshold is not None for one in section.passes or ())
    rows, scores, rounds = PackedRows(), list[Mapping[str, float | None]](), list[int]()

    def add(row: TrainRow, said: Mapping[str, float | None], origin: int) -> None:
        rows.append(row)
        scores.append(said)
        rounds.append(origin)

    pool = iter_accepted(stages.run.shards, pool_rounds(section.data, round_index), stages.known)
    if config.rationalize is not None and config.rationalize.max_share is not None:
        pool = iter(limit_hinted(list(pool), config.rationalize.max_share, seed=config.seed, round_index=round_index))
    for stored in pool:
        for row in rows_of(stages, section, stored, weight_of(expression, stored)):
            add(row, scores_of(stored) if scored else NO_SCORES, stored.sample.round_index)
    if section.max_rows is not None:
        kept = not_evicted(len(rows), int(section.max_rows), section.evict, seed=config.seed, round_index=round_index)
        rows = PackedRows(rows[i] for i in kept)
        scores, rounds = [scores[i] for i in kept], [rounds[i] for i in kept]
    if section.mix is not None:
        share = 1.0 if section.mix.share == "all" else float(section.mix.share)
        wanted = num_seed_rows(share, len(rows), len(stages.mix_rows))
        for index in draw_seed_rows(len(stages.mix_rows), wanted, seed=config.seed, round_index=round_index):
            add(stages.mix_rows[index], NO_SCORES, SEED_DATA)
    return Gathered(rows, scores, rounds)


def rows_of(stages: Stages, section: Any, stored: StoredSample, weight: float) -> Iterator[TrainRow]:
    """The training rows of one accepted sample: as it was generated, or one in each of `train.formats`."""
    if section.formats is None:
        row = stages.encoder.training_row(stored.sample, weight=weight)
        yield row if stored.ref_logprobs is None else replace(row, ref_logprobs=stored.ref_logprobs)
        return
    for form, encoder in zip(section.formats, stages.format_encoders, strict=True):
        if (form.prompt, form.completion, form.few_shot) == ("{prompt}", "{completion}", None):
            yield encoder.training_row(stored.sample, weight=weight)
        else:
            yield encoder.conversation_row(stored.sample.sample_id, in_form(form, stored), weight=weight)


def in_form(form: Any, stored: StoredSample) -> tuple[str | list[Message], str]:
    """(prompt, completion) of a sample in one of `train.formats`."""
    sample = stored.sample
    parts = {"completion": sample.completion, "final": sample.final, "answer": answer_of(stored)}
    completion = fill(form.completion, prompt=_text(sample.prompt), **parts)
    if isinstance(sample.prompt, str):
        return fill(form.prompt, prompt=sample.prompt, **parts), completion
    *before, last = sample.prompt
    return [*before, {**last, "content": fill(form.prompt, prompt=str(last["content"]), **parts)}], completion


def _text(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def answer_of(stored: StoredSample) -> str:
    """What a vote or a verifier took for the sample's answer (`answer` in its extras), else the reference."""
    for says in stored.says:
        answer = (says.get("extra") or {}).get("answer")
        if answer is not None:
            return str(answer)
    return "" if stored.sample.answer is None else str(stored.sample.answer)


def limit_hinted(pool: list[StoredSample], share: float, *, seed: int, round_index: int) -> list[StoredSample]:
    """The pool with second tries making up at most `share` of it; which ones stay is drawn from (seed, round)."""
    hinted = [index for index, stored in enumerate(pool) if stored.hinted]
    most = len(hinted) if share >= 1.0 else math.floor(share / (1.0 - share) * (len(pool) - len(hinted)) + 1e-9)
    if len(hinted) <= most:
        return pool
    kept = set(random.Random(derive_seed(seed, "hinted", round_index)).sample(hinted, most))
    return [stored for index, stored in enumerate(pool) if not stored.hinted or index in kept]


def not_evicted(size: int, most: int, which: str, *, seed: int, round_index: int) -> Sequence[int]:
    """Which of `size` rows stay, at most `most`: the newest, or a draw without replacement from (seed, round), in their order."""
    if size > most and which == "random":
        return sorted(random.Random(derive_seed(seed, "evict", round_index)).sample(range(size), most))
    return range(max(0, size - most), size)
