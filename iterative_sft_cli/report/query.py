"""Which samples are wanted, and the walk over a run that finds them, first page first.

Only verdicts are read to decide; the text of a sample is decoded when it is one of those asked for.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.report.paging import EvalReader, RoundReader, prompt_of
from iterative_sft_cli.rundir import RunView
from iterative_sft_cli.samples import EVAL, HINTED, StoredSample, kept_of, sample_shards

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}


@dataclass(frozen=True, slots=True)
class ScoreCondition:
    """A bound on the score that a filter gave, such as `reward>=0.5`; a sample without that score does not meet it."""

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> ScoreCondition:
        """Read NAME>=NUMBER (or <=, >, <, =). Raises ConfigError."""
        found = re.fullmatch(r"\s*(.+?)\s*(>=|<=|>|<|=)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", text)
        try:
            if found is None:
                raise ValueError
            return cls(found.group(1), found.group(2), float(found.group(3)))
        except ValueError:
            raise ConfigError(f"--score {text}: not a condition", expected="such as numeric_answer>=0.5") from None

    def holds(self, says: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the sample's score of that name is within the bound."""
        scores = [one["score"] for one in says if one["filter"] == self.name and one.get("score") is not None]
        return bool(scores) and _OPERATORS[self.sign](float(scores[-1]), self.bound)


@dataclass(frozen=True, slots=True)
class SampleQuery:
    """What a page of samples is made of; None and empty fields ask for nothing.

    `filter_name` are samples which that filter dropped, `reason` those dropped with that reason, `prompt_id` one prompt's;
    `evaluation` asks for the samples of the rounds' evaluations, where accepted means correct.
    """

    rounds: tuple[int, ...]
    accepted: bool | None = None
    filter_name: str | None = None
    reason: str | None = None
    prompt_id: str | None = None
    scores: tuple[ScoreCondition, ...] = ()
    evaluation: bool = False

    @property
    def takes_all(self) -> bool:
        """Whether every sample of the rounds is wanted."""
        return self.accepted is None and not (self.filter_name or self.reason or self.prompt_id or self.scores)

    def matches(self, says: Sequence[Mapping[str, Any]], accepted: bool) -> bool:
        """Whether verdicts are as asked; the prompt is looked at elsewhere."""
        if self.accepted is not None and self.accepted != accepted:
            return False
        if self.filter_name or self.reason:
            dropped = next((one for one in says if not one["keep"]), None)
            if dropped is None or self.filter_name not in (None, dropped["filter"]):
                return False
            if self.reason not in (None, dropped.get("reason") or "rejected"):
                return False
        return all(condition.holds(says) for condition in self.scores)


def find_samples(view: RunView, query: SampleQuery, *, skip: int = 0) -> Iterator[StoredSample]:
    """The samples that `query` asks for, in the order of rounds and samples, without the first `skip`. Lazy."""
    for round_index in query.rounds:
        reader = EvalReader(view, round_index) if query.evaluation else RoundReader(view, round_index)
        names = reader.judged
        if query.prompt_id is not None:
            names = reader.shards_of(query.prompt_id, most_of(view, reader))
        for name in names:
            if skip and query.takes_all and (count := reader.count(name)) <= skip:
                skip -= count
                continue
            lines = None
            for position, sample_id, says, accepted in reader.says(name):
                if query.prompt_id is not None and prompt_of(sample_id, round_index) != query.prompt_id:
                    continue
                if not query.matches(says, accepted):
                    continue
                if skip:
                    skip -= 1
                    continue
                lines = lines or reader.generated(name)
                yield reader.stored(lines, position, says, accepted)


def most_of(view: RunView, reader: RoundReader) -> int | None:
    """The most samples of one prompt in a round, where that is known: not with second tries or a number that changes over rounds."""
    if reader.kept != "all" or (reader.names and HINTED in reader.names[-1]):
        return None
    section = view.resolved.get("eval" if isinstance(reader, EvalReader) else "generate") or {}
    most = section.get("samples_per_prompt")
    return most if isinstance(most, int) and not section.get("greedy") else None


def unjudged(view: RunView, rounds: Sequence[int]) -> int:
    """Samples of the rounds that are generated and not yet judged, from the seals alone."""
    total = 0
    for round_index in rounds:
        reader = RoundReader(view, round_index)
        total += sum(reader.count(name) for name in set(reader.names) - set(reader.judged))
    return total


def sampled_rounds(view: RunView, *, evaluation: bool = False) -> list[int]:
    """The rounds with generated samples (or with an evaluation), oldest first."""
    if evaluation:
        return [index for index in view.rounds if view.shards.names(index, f"{EVAL}-")]
    return [index for index in view.rounds if sample_shards(view.shards, index)]


def check_rounds(view: RunView, rounds: Iterable[int], *, evaluation: bool = False) -> None:
    """Raises ConfigError for a round whose samples (or evaluation) are not there: never made, or dropped since."""
    there = sampled_rounds(view, evaluation=evaluation)
    for index in rounds:
        if index not in there:
            gone = not evaluation and kept_of(view.shards, index) == "none"
            what = "its samples were dropped (samples.keep)" if gone else "no samples of that round"
            known = ", ".join(map(str, there)) or "none yet"
            raise ConfigError(f"--round {index}: {what}", expected=f"one of {known}")


def thinned_rounds(view: RunView) -> dict[int, str]:
    """The rounds of which `samples.keep` left the `accepted` samples, or `none`."""
    left = {index: kept_of(view.shards, index) for index in view.rounds}
    return {index: what for index, what in left.items() if what != "all"}


def filter_names(view: RunView) -> list[str]:
    """The names under which the filters of the run judge, in order; `generate` for what is rejected before them."""
    return ["generate", *(str(entry["name"]) for entry in view.resolved.get("filters", []))]
