"""What a run decides between two rounds from its committed statistics: to stop, or to go back to the best weights.

Both are pure functions of `stats.jsonl`, looked at before a round begins, so that a resumed run decides the same.
"""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.config.condition import Condition
from iterative_sft_cli.errors import GuardStop
from iterative_sft_cli.guards import best_round
from iterative_sft_cli.rounds.sources import hash_of
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.weights import best_folder, round_key


def check_stop(stages: Stages, config: Any, round_index: int) -> None:
    """Raises GuardStop when `guards.stop_if` holds after the rounds before this one."""
    rows = stages.run.stats.rows()
    if config.guards.stop_if is None or not Condition(config.guards.stop_if).holds(rows):
        return
    raise GuardStop(
        f"`{config.guards.stop_if}` holds after round {round_index - 1}",
        where="guards.stop_if",
        hint="`isft show RUN` has the figures; change or remove guards.stop_if and run the same command again to go on",
    )


def roll_back(stages: Stages, config: Any, round_index: int, log: RoundLog) -> None:
    """Take the best checkpoint's weights, with a fresh optimizer, in place of the last round's when `guards.rollback_if` holds.

    Samples of the round that is rolled back stay in the pool.
    """
    rows = stages.run.stats.rows()
    if config.guards.rollback_if is None or not Condition(config.guards.rollback_if).holds(rows):
        return
    best = best_round(rows, config.eval.metric)
    if best is None or best == rows[-1]["round"]:
        return
    key, folder = best_folder(stages.run, rows, config.eval.metric)
    stages.session.close()
    stages.learner.load_weights(folder)
    checkpoint = stages.run.checkpoints.verified(round_key(best)) if folder is not None else None
    stages.live_hash = stages.base_hash if checkpoint is None else hash_of(checkpoint)
    log("rolled_back", to=key)
    stages.view.note(f"round {round_index} goes on from checkpoint {key}: `{config.guards.rollback_if}` holds")
