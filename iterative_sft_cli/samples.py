"""The stored form of samples: rows of the sealed shards, and the lazy readers that join them again.

A round's prompts stand once in `prompts.jsonl`; `generated-*.jsonl` rows name a prompt and hold what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.types import Prompt, Sample

GENERATED = "generated"
VERDICTS = "verdicts"
ROUND_VERDICTS = "verdicts-round"
PROMPTS = "prompts"
TRAIN = "train"
EVAL = "eval"
EVAL_PROMPTS = "prompts-eval"
"""The prompts of the evaluation, once a run: in `rounds/0000/`."""


TRIALS = "trial"
"""Shards of the search for a temperature and a threshold."""
ACCEPTED = "accepted"
"""Shards of an earlier round of which only the accepted samples stayed (`samples.keep: accepted`): each row with its verdicts."""
DROPPED = "dropped"
"""Shards that stand for those of a round whose samples were dropped (`samples.keep: n`): ids and hashes of what was accepted."""
HINTED = "hinted"
"""Part of the name of shards of second tries, and the key of a row under which the ids of the hinted prompt stand."""


Known = Mapping[str, Prompt]
"""Prompts that are in memory already, by id."""


class Shards(Protocol):
    """The part of a run directory that holds sealed JSONL files."""

    def read(self, round_index: int, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]] | None: ...

    def iter_rows(self, round_index: int, name: str) -> Iterator[dict[str, Any]] | None: ...

    def names(self, round_index: int, prefix: str) -> list[str]: ...


def prompt_to_row(prompt: Prompt) -> dict[str, Any]:
    """The JSON form of a prompt."""
    return {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.prompt,
        "answer": prompt.answer,
        "level": prompt.level,
        "row": dict(prompt.row),
    }


def prompt_from_row(row: Mapping[str, Any]) -> Prompt:
    """The prompt that `prompt_to_row` wrote."""
    return Prompt(row["prompt_id"], row["prompt"], row.get("answer"), row.get("level"), row.get("row") or {})


def sample_to_row(sample: Sample, seed: int) -> dict[str, Any]:
    """The JSON form of a sample as generated; the prompt is named, not repeated."""
    return {
        "sample_id": sample.sample_id,
        "prompt_id": sample.prompt_id,
        "sample_index": sample.sample_index,
        "round_index": sample.round_index,
        "completion": sample.completion,
        "completion_ids": list(sample.completion_ids),
        "prompt_ids": list(sample.prompt_ids),
        "finish_reason": sample.finish_reason,
        "seed": seed,
        "logprob": sample.logprob,
    }


def sample_from_row(row: Mapping[str, Any], prompt: Prompt) -> Sample:
    """The sample that `sample_to_row` wrote, joined with its prompt."""
    return Sample(
        prompt_id=prompt.prompt_id,  # not the row's: an equal text once a prompt, not once a sample
        sample_id=row["sample_id"],
        round_index=row["round_index"],
        prompt=prompt.prompt,
        completion=row["completion"],
        answer=prompt.answer,
        row=prompt.row,
        prompt_ids=tuple(row["prompt_ids"]),
        completion_ids=tuple(row["completion_ids"]),
        finish_reason=row["finish_reason"],
        logprob=row.get("logprob"),
        final=row["completion"],
        sample_index=row["sample_index"],
    )


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample of a sealed round with everything that was said of it; `says` are the filters' rows in order."""

    sample: Sample
    seed: int
    says: tuple[Mapping[str, Any], ...]
    accepted: bool
    hinted: bool = False
    """Whether it is a second try, made with a hint that `sample` does not show."""
    ref_logprobs: tuple[float, ...] | None = None
    """The log probability of each token of the completion when it was made, where `keep_logprobs` asked for them."""

    @property
    def rejected_by(self) -> Mapping[str, Any] | None:
        """The row of the filter that dropped the sample, None when it was accepted."""
        return next((says for says in self.says if not says["keep"]), None)


def _need(shards: Shards, round_index: int, name: str) -> list[dict[str, Any]]:
    found = shards.read(round_index, name)
    if found is None:
        raise _missing(round_index, name)
    return found[0]


def _missing(round_index: int, name: str) -> DataError:
    return DataError(
        f"rounds/{round_index:04d}/{name}.jsonl is missing or damaged",
        hint="run `isft verify` to see what is damaged; `isft train` on the same config makes again what it can",
    )


def read_prompts(shards: Shards, round_index: int, known: Known = MappingProxyType({})) -> dict[str, Prompt]:
    """The prompts of a round by id, in their order; those that are also `known`, letter for letter, are the known objects."""
    rows = shards.iter_rows(round_index, PROMPTS)
    if rows is None:
        raise _missing(round_index, PROMPTS)
    found = {}
    for row in rows:
        prompt = known.get(row["prompt_id"])
        # as text: 1, 1.0 and True are equal, and a filter can tell them apart
        if prompt is None or repr(prompt_to_row(prompt)) != repr(row):
            prompt = prompt_from_row(row)
        found[prompt.prompt_id] = prompt
    return found


def read_eval_prompts(shards: Shards) -> dict[str, Prompt]:
    """The prompts of the run's evaluation by id; empty when nothing was evaluated."""
    found = shards.read(0, EVAL_PROMPTS)
    return {} if found is None else {row["prompt_id"]: prompt_from_row(row) for row in found[0]}


def read_generated(shards: Shards, round_index: int, name: str, prompts: Mapping[str, Prompt]) -> list[Sample]:
    """The samples of one sealed shard, in the shard's order."""
    return [sample_from_row(row, prompts[row["prompt_id"]]) for row in _need(shards, round_index, name)]


def read_round_verdicts(shards: Shards, round_index: int) -> dict[str, list[dict[str, Any]]]:
    """What the round-wide filters said, by sample id; empty when there were none."""
    found = shards.read(round_index, ROUND_VERDICTS)
    return {} if found is None else {row["sample_id"]: row["says"] for row in found[0]}


def sample_shards(shards: Shards, round_index: int) -> list[str]:
    """The shards that hold a round's samples, in their order: `accepted-00000` where it stands for `generated-00000`; none of a
    round whose samples were dropped."""
    thinned = {name.replace(ACCEPTED, GENERATED, 1): name for name in shards.names(round_index, f"{ACCEPTED}-")}
    if shards.names(round_index, f"{DROPPED}-"):
        return []
    whole = {*shards.names(round_index, f"{GENERATED}-"), *thinned}
    return [thinned.get(name, name) for name in sorted(whole)]


def kept_of(shards: Shards, round_index: int) -> str:
    """What `samples.keep` has left of a round: `all`, `accepted`, or `none`."""
    if shards.names(round_index, f"{DROPPED}-"):
        return "none"
    return "accepted" if shards.names(round_index, f"{ACCEPTED}-") else "all"


def iter_round(shards: Shards, round_index: int, known: Known = MappingProxyType({})) -> Iterator[StoredSample]:
    """Every sample of a judged round in order, one shard in memory at a time; of a thinned round, the accepted ones. Prompts that are
    `known` are not made anew.

    Raises DataError when a shard or its verdicts are missing or damaged, or the samples were dropped.
    """
    if kept_of(shards, round_index) == "none":
        raise DataError(
            f"the samples of round {round_index} were dropped",
            where="samples.keep",
            hint="samples.keep: accepted keeps what later rounds may read",
        )
    prompts = read_prompts(shards, round_index, known)
    later = read_round_verdicts(shards, round_index)
    for name in sample_shards(shards, round_index):
        for row, says, kept in _judged_rows(shards, round_index, name):
            says = (*says, *later.get(row["sample_id"], ())) if name.startswith(GENERATED) else says
            accepted = kept and all(one["keep"] for one in says)
            sample = sample_from_row(row, prompts[row["prompt_id"]])
            logprobs = row.get("token_logprobs")
            yield StoredSample(
                sample, row["seed"], says, accepted, HINTED in row, None if logprobs is None else tuple(logprobs)
            )


def _judged_rows(
    shards: Shards, round_index: int, name: str
) -> Iterator[tuple[dict[str, Any], tuple[Mapping[str, Any], ...], bool]]:
    rows = _need(shards, round_index, name)
    if name.startswith(ACCEPTED):
        yield from ((row, tuple(row["says"]), True) for row in rows)
        return
    verdicts = _need(shards, round_index, name.replace(GENERATED, VERDICTS, 1))
    for row, verdict in zip(rows, verdicts, strict=True):
        yield row, tuple(verdict["says"]), bool(verdict["kept"])


def iter_accepted(shards: Shards, rounds: Sequence[int], known: Known = MappingProxyType({})) -> Iterator[StoredSample]:
    """The accepted samples of the given rounds, oldest round first."""
    for round_index in rounds:
        for stored in iter_round(shards, round_index, known):
            if stored.accepted:
                yield stored


class AcceptedEarlier:
    """What was accepted before a round, as light records for filters that look back; reads lazily, may be iterated often."""

    def __init__(self, shards: Shards, before: int, known: Known = MappingProxyType({})) -> None:
        self._shards = shards
        self._before = before
        self._known = known

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for stored in iter_accepted(self._shards, range(1, self._before), self._known):
            yield {
                "prompt_id": stored.sample.prompt_id,
                "completion": stored.sample.completion,
                "round_index": stored.sample.round_index,
            }
