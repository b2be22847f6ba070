"""What was said of a sample: one record a filter, their JSON rows, and the funnel that counts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from iterative_sft_cli.types import Sample

GENERATE = "generate"
"""Pseudo-filter of the rejections that precede the list: `thinking_unclosed`, `too_long`, `prompt_too_long`."""


@dataclass(frozen=True, slots=True)
class FilterSays:
    """One filter's verdict on one sample, under the filter's score name."""

    filter: str
    keep: bool
    score: float | None = None
    reason: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """JSON form; what is absent or empty is left out."""
        row: dict[str, Any] = {"filter": self.filter, "keep": self.keep}
        if self.score is not None:
            row["score"] = self.score
        if self.reason is not None:
            row["reason"] = self.reason
        if self.extra:
            row["extra"] = dict(self.extra)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> FilterSays:
        """The inverse of `to_row`."""
        return cls(row["filter"], row["keep"], row.get("score"), row.get("reason"), row.get("extra") or {})


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample with all that the filters said of it, in list order; `kept` is false as soon as one dropped it."""

    sample: Sample
    says: tuple[FilterSays, ...]
    kept: bool

    @property
    def rejected_by(self) -> FilterSays | None:
        """The verdict that dropped the sample."""
        return None if self.kept else self.says[-1]

    def to_row(self) -> dict[str, Any]:
        """The row of a verdicts shard; the sample itself stands in the generated shard."""
        return {
            "sample_id": self.sample.sample_id,
            "prompt_id": self.sample.prompt_id,
            "kept": self.kept,
            "says": [one.to_row() for one in self.says],
        }

    @classmethod
    def from_rows(cls, sample: Sample, says: Sequence[Mapping[str, Any]], kept: bool) -> Judged:
        """From a stored sample and the `says` rows of its verdicts; the sample gets the scores that they hold."""
        said = tuple(FilterSays.from_row(one) for one in says)
        scores = {one.filter: one.score for one in said if one.score is not None}
        return cls(replace(sample, scores={**sample.scores, **scores}) if scores else sample, said, kept)


@dataclass(frozen=True, slots=True)
class FunnelRow:
    """How many samples entered a filter, how many it dropped, and for which reasons (dropped ones only)."""

    filter: str
    entered: int
    dropped: int
    reasons: dict[str, int]


def funnel(rows: Iterable[Judged]) -> list[FunnelRow]:
    """A row a filter in list order, `generate` first when it dropped any. Sums: entered - dropped = entered of the next."""
    total = 0
    entered: dict[str, int] = {}
    dropped: dict[str, int] = {}
    reasons: dict[str, dict[str, int]] = {}
    depth: dict[str, int] = {}
    for judged in rows:
        total += 1
        for position, one in enumerate(judged.says):
            name = one.filter
            if name not in depth:
                depth[name] = -1 if name == GENERATE else position
                entered[name], dropped[name], reasons[name] = 0, 0, {}
            entered[name] += 1
            if not one.keep:
                dropped[name] += 1
                why = one.reason or "rejected"
                reasons[name][why] = reasons[name].get(why, 0) + 1
    if GENERATE in entered:
        entered[GENERATE] = total
    ordered = sorted(depth, key=lambda name: depth[name])
    return [
        FunnelRow(
            name, entered[name], dropped[name], dict(sorted(reasons[name].items(), key=lambda kv: (-kv[1], kv[0])))
        )
        for name in ordered
    ]
