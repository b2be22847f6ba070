"""Fixtures of the filter tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filter_samples import make_entries, new_sample

from iterative_sft_cli.filters import FilterChain, Judged, resolve_filters
from iterative_sft_cli.types import Sample


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


@pytest.fixture
def misbehaving_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find misbehaving.py by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
