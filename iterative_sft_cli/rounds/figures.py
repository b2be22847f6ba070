"""A round's row of statistics, put together from sealed shards and the ledger alone, and what is shown of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from heapq import merge
from itertools import islice
from typing import Any

from iterative_sft_cli.rounds.gather import Gathered
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.thinning import accepted_keys
from iterative_sft_cli.samples import TRAIN, TRIALS, StoredSample, iter_round
from iterative_sft_cli.stats import RoundCounter, TrainCounter

SEED_LOSS_ROWS = 16
"""Seed rows whose loss is followed: enough to see forgetting, few enough to cost nothing beside a round."""

SHOWN_OF = 512
"""Samples of a round among which those that are shown are chosen."""


def count_round(stages: Stages, round_index: int) -> RoundCounter:
    """The round's figures, from its sealed shards."""
    counter = RoundCounter(known=known_before(stages, round_index))
    for stored in iter_round(stages.run.shards, round_index, stages.known):
        counter.add(stored)
    return counter


def known_before(stages: Stages, round_index: int) -> array[int]:
    """Hashes of what was accepted in earlier rounds, as `RoundCounter` makes them, in ascending order."""
    for earlier in range(1, round_index):
        if earlier not in stages.accepted_keys:
            stages.accepted_keys[earlier] = accepted_keys(stages.run.shards, earlier, stages.known)
    return array("Q", merge(*(stages.accepted_keys[earlier] for earlier in range(1, round_index))))


def round_row(stages: Stages, config: Any, round_index: int) -> dict[str, Any]:
    """The round's statistics without its evaluation."""
    row: dict[str, Any] = {"round": round_index}
    train = TrainCounter()
    seed_loss = None
    for entry in stages.run.ledger.rows():
        if entry["round"] != round_index:
            continue
        if entry["event"] == "step":
            train.add(entry)
        elif entry["event"] == "undone":
            train.undo()
        elif entry["event"] == "seed_loss":
            seed_loss = entry["value"]
        elif entry["event"] == "tuned":
            row |= {f"generate/{key}": value for key, value in entry.items() if key not in ("event", "round")}
    if round_index:
        counter = count_round(stages, round_index)
        row = {**row, **counter.generate_row(), **counter.rationalize_row(), **counter.filters_row()}
        row |= drift(row, stages.run.stats.rows())
        trials = trial_tokens(stages, round_index)
        if trials:
            row["generate/trial_tokens"] = trials
    if round_index or train.num_steps or train.undone:
        found = stages.run.shards.iter_rows(round_index, TRAIN)
        row |= train.row(sum(1 for _ in found) if found else len(stages.warmup_rows) if not round_index else 0)
    if seed_loss is not None:
        row["train/seed_loss"] = seed_loss
    return row


def drift(row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """`generate/length_drift`: mean completion tokens over those of the first round, less 1."""
    first = next((one["generate/mean_tokens"] for one in earlier if one.get("generate/mean_tokens")), None)
    now = row.get("generate/mean_tokens")
    return {} if not first or now is None else {"generate/length_drift": now / first - 1.0}


def trial_tokens(stages: Stages, round_index: int) -> int:
    """Tokens that the search for temperature and threshold took."""
    shards = stages.run.shards
    rows = [
        row for name in shards.names(round_index, TRIALS) for row in (shards.read(round_index, name) or ((), {}))[0]
    ]
    return sum(len(row["completion_ids"]) for row in rows)


def follow_seed_loss(stages: Stages, log: RoundLog) -> None:
    """Log the loss on the first rows of the seed data, where there is seed data and the learner can tell: a rise is forgetting."""
    rows = (stages.warmup_rows or stages.mix_rows)[:SEED_LOSS_ROWS]
    loss = getattr(stages.learner, "loss", None)
    if rows and loss is not None:
        log("seed_loss", value=float(loss(rows)))


def log_selected(log: RoundLog, found: Gathered, num_steps: int) -> None:
    """Log how many rows train, by the round they come from."""
    origins: dict[str, int] = {}
    for origin in found.rounds:
        origins[str(origin)] = origins.get(str(origin), 0) + 1
    log("selected", num_rows=len(found.rows), num_steps=num_steps, rows_of_round=origins)


def show_samples(stages: Stages, round_index: int, each: int = 3) -> None:
    """Hand a few accepted and rejected samples of the round to the view."""
    stored = list(islice(iter_round(stages.run.shards, round_index, stages.known), SHOWN_OF))
    stages.view.samples(round_index, *pick_samples(stored, each))


def pick_samples(stored: Sequence[StoredSample], each: int = 3) -> tuple[list[StoredSample], list[StoredSample]]:
    """(accepted, rejected): at most `each`, different prompts and different reasons first."""
    picked: list[list[StoredSample]] = []
    for accepted in (True, False):
        group = [one for one in stored if one.accepted is accepted]
        seen: set[tuple[str, str]] = set()
        first: list[StoredSample] = []
        rest: list[StoredSample] = []
        for one in group:
            why = one.rejected_by
            key = (str(why["filter"]), str(why.get("reason"))) if why else (one.sample.prompt_id, "")
            (rest if key in seen else first).append(one)
            seen.add(key)
        picked.append((first + rest)[:each])
    return picked[0], picked[1]
