"""Which weights a round's training starts from, and going back to them when its training is undone.

Both are functions of checkpoints and committed statistics, so that a resumed round begins with the same bytes.
"""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.rounds.decisions import roll_back
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.weights import best_folder, restore, round_key


def place_weights(stages: Stages, config: Any, round_index: int) -> None:
    """Put the weights that this round's training starts from into the learner."""
    start = config.train.start_from
    if start == "base":
        stages.learner.load_weights(None, round_index=round_index)
    elif start == "best":
        stages.learner.load_weights(best_folder(stages.run, stages.run.stats.rows(), config.eval.metric)[1])
    elif start == "warmup":
        stages.learner.load_weights(stages.run.checkpoints.verified(round_key(0)).path)


def undo_training(stages: Stages, config: Any, round_index: int) -> None:
    """Weights and optimizer as they were when the training of `round_index` began."""
    before = stages.run.checkpoints.verified(round_key(round_index - 1)) if round_index else None
    if before is None:
        stages.learner.load_weights(None)
    else:
        restore(stages.learner, before)
    if round_index:
        roll_back(stages, config, round_index, RoundLog(stages.run.ledger, round_index, muted=True))
        place_weights(stages, config, round_index)
