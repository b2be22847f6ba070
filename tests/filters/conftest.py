"""Samples and config entries for the filter tests, in one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from iterative_sft_cli.config import FilterEntry
from iterative_sft_cli.filters import FilterChain, Judged, resolve_filters
from iterative_sft_cli.types import Sample


def new_sample(
    completion: str = "The answer is 4.", answer: Any = "4", *, i: int = 0, prompt: str = "p0", **more: Any
) -> Sample:
    fields = {
        "prompt": "What is 2 + 2?",
        "final": completion,
        "completion_ids": tuple(range(len(completion.split()) + 1)),
    }
    return Sample(
        prompt_id=prompt,
        sample_id=f"1-{prompt}-{i}",
        round_index=1,
        completion=completion,
        answer=answer,
        sample_index=i,
        **{**fields, **more},
    )


def make_entries(*forms: Any) -> list[FilterEntry]:
    entries = []
    for index, form in enumerate(forms):
        entry = FilterEntry.model_validate(form)
        entry._key = f"filters[{index}]"
        entries.append(entry)
    return entries


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """make_sample(completion, answer, i=, prompt=, **fields of Sample)."""
    return new_sample


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., list[Judged]]:
    """judge(samples, *entries, **chain options) -> judged samples, the round part included."""

    def run(samples: Sequence[Sample], *forms: Any, base_dir: Path = tmp_path, **options: Any) -> list[Judged]:
        filters = resolve_filters(make_entries(*forms), base_dir=base_dir)
        with FilterChain(filters, **{"seed": 0, "round_index": 1, **options}) as chain:
            shard = chain.open_shard()
            for sample in samples:
                shard.submit(sample)
            judged = shard.finish(samples)
            later = chain.finish_round(judged)
        return [
            Judged(
                one.sample,
                (*one.says, *later.get(one.sample.sample_id, ())),
                one.kept and all(s.keep for s in later.get(one.sample.sample_id, ())),
            )
            for one in judged
        ]

    return run
