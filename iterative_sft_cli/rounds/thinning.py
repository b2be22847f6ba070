"""`samples.keep`: what stays of the samples of rounds that are over, and what later rounds read of them.

The newest committed round is never thinned, so a start that falls back by one checkpoint finds its samples. What replaces a
shard is sealed before the shard is given up, and the seal of what was given up stays and says so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.samples import (
    ACCEPTED,
    DROPPED,
    GENERATED,
    HINTED,
    VERDICTS,
    Known,
    Shards,
    iter_round,
    kept_of,
    read_round_verdicts,
)
from iterative_sft_cli.stats import RoundCounter


def check_keep(config: Any, filters: Sequence[Any]) -> None:
    """Raises ConfigError when `samples.keep: n` would drop what a filter may read: those with a `context` can look back."""
    keep = config.samples.keep
    if isinstance(keep, str) or config.rounds <= keep:
        return
    for one in filters:
        if looks_back(one):
            raise ConfigError(
                f"samples.keep: {keep} drops the samples that the filter `{one.name}` may read (its `context` looks back)",
                where=one.key,
                hint="samples.keep: accepted keeps them; leave `context` out of a filter that does not need it",
            )


def looks_back(one: Any) -> bool:
    """Whether a filter may read the accepted samples of earlier rounds."""
    return bool(one.shape.takes_context and not (one.builtin and one.arguments.get("scope") != "run"))


def thin_rounds(stages: Stages, config: Any, round_index: int, log: RoundLog) -> None:
    """Give up what `samples.keep` does not keep, now that `round_index` is over. Doing it again changes nothing."""
    keep = config.samples.keep
    through = round_index - (1 if isinstance(keep, str) else int(keep))
    if keep == "all" or through < 1:
        return
    log("thinned", through=through, keep=keep)
    stages.run.checkpoints.newest()  # nothing goes before the commit is on the disk
    for earlier in range(1, through + 1):
        thin(stages.run.shards, earlier, ACCEPTED if keep == "accepted" else DROPPED)


def thin(shards: Any, round_index: int, word: str) -> None:
    """Replace a round's shards by those of `word` (accepted or dropped). What is dropped already, or was damaged, stays so."""
    if (word == ACCEPTED and kept_of(shards, round_index) == "none") or shards.names(
        round_index, f"{DROPPED}-damaged-"
    ):
        return
    prefixes = (f"{GENERATED}-",) if word == ACCEPTED else (f"{GENERATED}-", f"{ACCEPTED}-")
    old = [name for name in shards.names(round_index, "") if name.startswith(prefixes)]
    sealed = set(shards.names(round_index, f"{word}-"))
    later = read_round_verdicts(shards, round_index) if old else {}
    for name in old:
        new = replacement(name, word)
        if new not in sealed:
            rows, meta = _replaced(shards, round_index, name, word, later)
            shards.seal(round_index, new, rows, meta)
            sealed.add(new)
    for name in [*old, *shards.names(round_index, VERDICTS)]:
        shards.remove(round_index, name)


def settle_thinned(shards: Any, rounds: Sequence[int], first_open: int) -> None:
    """Finish what a crash interrupted in rounds that are over; set aside what stands for the samples of rounds from `first_open` on,
    which are made again because the run went back behind them."""
    for round_index in rounds:
        stand_ins = [name for word in (ACCEPTED, DROPPED) for name in shards.names(round_index, f"{word}-")]
        if round_index >= first_open:
            for name in stand_ins:
                shards.discard(round_index, name, "the run went back behind this round: its samples are made again")
        elif stand_ins:
            thin(shards, round_index, DROPPED if kept_of(shards, round_index) == "none" else ACCEPTED)


def replacement(name: str, word: str) -> str:
    """The shard that stands for another one: `accepted-00000` for `generated-00000`."""
    return f"{word}-{name.partition('-')[2]}"


def _replaced(
    shards: Any, round_index: int, name: str, word: str, later: dict[str, list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, meta = shards.read(round_index, name)
    if name.startswith(ACCEPTED):
        kept, asked = rows, meta["asked"]
    else:
        verdicts, _ = shards.read(round_index, name.replace(GENERATED, VERDICTS, 1))
        counts: dict[str, list[int]] = {}
        kept = []
        for row, verdict in zip(rows, verdicts, strict=True):
            says = [*verdict["says"], *later.get(row["sample_id"], ())]
            accepted = bool(verdict["kept"]) and all(one["keep"] for one in says)
            if HINTED not in row:
                made = counts.setdefault(row["prompt_id"], [0, 0])
                made[0] += 1
                made[1] += accepted
            if accepted:
                kept.append({**row, "says": says})
        asked = [[prompt_id, *made] for prompt_id, made in counts.items()]
    if word == DROPPED:
        keys = [RoundCounter.key_of(row["prompt_id"], row["completion"]) for row in kept]
        kept = [{"sample_id": row["sample_id"], "key": key} for row, key in zip(kept, keys, strict=True)]
    return kept, {**meta, "asked": asked}


def asked_in(shards: Shards, round_index: int, known: Known = MappingProxyType({})) -> Iterator[tuple[str, int, int]]:
    """(prompt, samples, accepted) of what a round drew, in the order asked; a prompt may come several times. Second tries with a hint do
    not count."""
    stand_ins = [*shards.names(round_index, f"{ACCEPTED}-"), *shards.names(round_index, f"{DROPPED}-")]
    if not stand_ins:
        for stored in iter_round(shards, round_index, known):
            if not stored.hinted:
                yield stored.sample.prompt_id, 1, int(stored.accepted)
        return
    for name in stand_ins:
        found = shards.read(round_index, name)
        yield from map(tuple, found[1]["asked"] if found else ())


def accepted_keys(shards: Shards, round_index: int, known: Known) -> array[int]:
    """Hashes of what a round accepted, as `RoundCounter` makes them, in ascending order, also of a round whose samples were dropped."""
    if kept_of(shards, round_index) == "none":
        names = shards.names(round_index, f"{DROPPED}-")
        keys = {int(row["key"]) for name in names for row in (shards.read(round_index, name) or ([], {}))[0]}
    else:
        keys = {
            RoundCounter.key_of(one.sample.prompt_id, one.sample.completion)
            for one in iter_round(shards, round_index, known)
            if one.accepted
        }
    return array("Q", sorted(keys))
