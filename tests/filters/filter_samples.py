"""Samples and config entries for the filter tests, in one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iterative_sft_cli.config import FilterEntry
from iterative_sft_cli.filters import Judged
from iterative_sft_cli.types import Sample

Judge = Callable[..., list[Judged]]


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


def outcome(judged: Judged) -> str | None:
    """The reason it was dropped, None when kept."""
    return None if judged.kept else judged.says[-1].reason


def reasons(judge: Judge, texts: list[str], *forms: Any, **fields: Any) -> list[str | None]:
    return [outcome(one) for one in judge([new_sample(text, i=i, **fields) for i, text in enumerate(texts)], *forms)]
