"""Damaged samples of rounds that are over: an error where something still needs them, else set aside, noted, and done without."""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.rounds.stages import Stages
from iterative_sft_cli.rounds.thinning import looks_back
from iterative_sft_cli.samples import ACCEPTED, DROPPED, GENERATED, HINTED, PROMPTS, ROUND_VERDICTS, VERDICTS
from iterative_sft_cli.stats import RoundCounter
from iterative_sft_cli.train.pool import pool_rounds

SAMPLES = (f"{GENERATED}-", f"{ACCEPTED}-", VERDICTS, PROMPTS)
"""How the names of the shards begin that hold a round's samples; the others are read in their own round only."""


def needed_rounds(stages: Stages, first_open: int) -> set[int]:
    """The rounds before `first_open` whose samples `train.data`, or a filter that looks back, will read again."""
    config = stages.config
    if any(looks_back(one) for one in stages.filters):
        return set(range(1, first_open))
    rounds = range(first_open, config.rounds + 1)
    return {one for later in rounds for one in pool_rounds(config.at_round(later).train.data, later)}


def settle_losses(stages: Stages, first_open: int) -> None:
    """Look through the samples of rounds before `first_open`. What is damaged goes to quarantine where nothing needs it any more, and what is
    left of that round stands for it; where it is needed, reading it is the error that says so (exit 4)."""
    shards = stages.run.shards
    needed = needed_rounds(stages, first_open)
    for round_index in range(1, first_open):
        if round_index in needed:
            continue
        lost = shards.give_up_damaged(round_index, SAMPLES)
        if not lost:
            continue
        number = len(shards.names(round_index, f"{DROPPED}-damaged-"))
        rows, asked = what_is_left(shards, round_index)
        shards.seal(round_index, f"{DROPPED}-damaged-{number}", rows, {"asked": asked, "lost": lost})
        stages.view.note(
            f"warning: round {round_index}: {', '.join(lost)} damaged or gone, now in quarantine; nothing needs its samples any more"
        )


def what_is_left(shards: Any, round_index: int) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """(accepted samples by hash, [prompt, samples, accepted]) of the shards that can still be read, as for a round that was dropped."""
    kept: list[dict[str, Any]] = []
    counts: dict[str, list[int]] = {}
    later = shards.read(round_index, ROUND_VERDICTS)
    dropped = {row["sample_id"] for row in (later or ([], {}))[0] if not all(says["keep"] for says in row["says"])}
    for name in shards.names(round_index, f"{GENERATED}-"):
        made = shards.read(round_index, name)
        said = shards.read(round_index, name.replace(GENERATED, VERDICTS, 1))
        if made is None or said is None:
            continue
        for row, verdict in zip(made[0], said[0], strict=True):
            accepted = bool(verdict["kept"]) and row["sample_id"] not in dropped
            if HINTED not in row:
                one = counts.setdefault(row["prompt_id"], [0, 0])
                one[0] += 1
                one[1] += accepted
            if accepted:
                key = RoundCounter.key_of(row["prompt_id"], row["completion"])
                kept.append({"sample_id": row["sample_id"], "key": key})
    return kept, [[prompt_id, *one] for prompt_id, one in counts.items()]
