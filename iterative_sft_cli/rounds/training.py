"""Train on what was accepted: a round's rows, its optimizer steps, saves between them, and the checkpoint that ends it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from iterative_sft_cli.config.expression import Expression
from iterative_sft_cli.errors import GuardStop, Interrupted, OutOfMemoryError, Preempted
from iterative_sft_cli.guards import HoursUp, check_hours
from iterative_sft_cli.rounds.gather import SEED_DATA, Gathered
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.weights import round_key
from iterative_sft_cli.samples import TRAIN
from iterative_sft_cli.train.base import TrainOutOfMemory
from iterative_sft_cli.train.pool import deal, times_trained
from iterative_sft_cli.types import TrainRow, derive_seed


@dataclass(frozen=True, slots=True)
class TrainPass:
    """One pass over some of the round's rows: settings and, for each optimizer step, the rows it trains on."""

    settings: Any
    steps: list[list[int]]


def plan_passes(section: Any, found: Gathered, *, seed: int, round_index: int) -> list[TrainPass]:
    """The passes of a round: one, or ReST's list of passes with rising thresholds (each on the rows that reach its threshold)."""
    planned = []
    for index, one in enumerate(section.passes or [None]):
        settings = section if one is None else section.model_copy(update={"passes": None, **one.overrides()})
        keep = [
            i
            for i, scores in enumerate(found.scores)
            if one is None or one.threshold is None or reaches(scores, one.by, one.threshold)
        ]
        steps = deal(
            len(keep),
            epochs=None if settings.epochs is None else float(settings.epochs),
            steps=None if settings.steps is None else int(settings.steps),
            batch_size=int(settings.batch_size),
            seed=seed,
            round_index=round_index,
            pass_index=index,
            groups=None if section.new_share is None else share_out(section, [found.rounds[i] for i in keep]),
        )
        planned.append(TrainPass(settings, [[keep[i] for i in step] for step in steps]))
    return planned


def share_out(section: Any, rounds: Sequence[int]) -> list[tuple[list[int], float]]:
    """(rows, share) of each round's rows and of the seed data under `train.new_share`: the newest round's share is fixed, earlier rounds
    count 1 each and seed data `mix.weight` in what is left."""
    if not rounds:
        return []
    members: dict[int, list[int]] = {}
    for index, origin in enumerate(rounds):
        members.setdefault(origin, []).append(index)
    newest = max(members)
    weights = {
        origin: float(section.mix.weight) if origin == SEED_DATA and section.mix is not None else 1.0
        for origin in members
        if origin != newest
    }
    whole = sum(weights.values())
    new = float(section.new_share) if whole else 1.0
    shares = {newest: new, **{origin: (1.0 - new) * weight / whole for origin, weight in weights.items()}}
    return [(members[origin], shares[origin]) for origin in sorted(members)]


def reaches(scores: Mapping[str, float | None], by: str | None, threshold: float) -> bool:
    """Whether a sample's value of the expression `by` is at least `threshold`; seed data (no scores) always does."""
    if not scores:
        return True
    expression = Expression(str(by))
    known = {name: float(value) for name, value in scores.items() if value is not None}
    return set(expression.names) <= known.keys() and expression(known) >= threshold


def steps_span(config: Any, round_index: int) -> tuple[int, int] | None:
    """(steps before this round, steps of all rounds) under `lr_schedule: continue`, which fixes the steps of every round."""
    if config.train.lr_schedule != "continue":
        return None
    steps = []
    for one in range(1, config.rounds + 1):
        section = config.at_round(one).train
        each = section.passes or [None]
        steps.append(sum(int(section.steps if p is None or p.steps is None else p.steps) for p in each))
    return sum(steps[: round_index - 1]), sum(steps)


def train_round(
    stages: Stages,
    passes: Sequence[TrainPass],
    rows: Sequence[TrainRow],
    *,
    round_index: int,
    keep_optimizer: bool,
    done: int,
    log: RoundLog,
    span: tuple[int, int] | None = None,
) -> bool:
    """Take the round's optimizer steps from step `done` on (0: all); weights and optimizer are already in place.

    `span`: (steps before this round, steps of all rounds) of one learning-rate shape over all rounds; None for a shape of its own each pass.
    A signal or the end of `guards.max_hours` saves the last whole step, then its exception goes on. Returns False when a step was not finite
    and the policy is to undo the round's training: the caller puts the weights back.
    """
    run, learner = stages.run, stages.learner
    total = sum(len(one.steps) for one in passes)
    last_saved, last_save = done, time.monotonic()
    step = 0
    start = time.monotonic()
    tokens = 0
    with stages.view.phase("train", round_index, total, "steps") as phase:

        def heartbeat(num_tokens: int) -> None:
            stages.stop()
            phase.advance(tokens=num_tokens)

        learner.heartbeat = heartbeat
        try:
            for index, one in enumerate(passes):
                if step + len(one.steps) <= done:
                    step += len(one.steps)
                    phase.advance(len(one.steps))
                    continue
                resumed = step < done
                seed = derive_seed(stages.config.seed, "train", round_index, index)
                before, whole = (0, len(one.steps)) if span is None else (span[0] + step, span[1])
                learner.begin(one.settings, whole, seed=seed, keep_optimizer=resumed or keep_optimizer or index > 0)
                for position, indices in enumerate(one.steps):
                    if step < done:
                        step += 1
                        phase.advance(1)
                        continue
                    log.muted = False
                    stages.stop()
                    check_hours(stages.config.guards, stages.hours())
                    stats = _step(stages, [rows[i] for i in indices], before + position, step, round_index)
                    _check_finite(one.settings, stats, round_index, step + 1)
                    step += 1
                    tokens += stats.get("num_tokens", 0)
                    log("step", step=step, **stats)
                    if stats.get("skipped_nonfinite") and one.settings.on_nonfinite == "rollback":
                        log("undone", step=step, reason="the loss or gradient is not finite")
                        stages.view.note(
                            f"round {round_index}: step {step} is not finite; the round's training is undone"
                        )
                        return False
                    phase.advance(1)
                    if step < total and _save_is_due(stages.config.checkpoints, step - last_saved, last_save):
                        save_mid_round(stages, round_index, step)
                        last_saved, last_save = step, time.monotonic()
        except (Preempted, Interrupted, HoursUp):
            affordable = stages.grace_s is None or stages.last_save_s <= stages.grace_s
            if step > last_saved and affordable:
                save_mid_round(stages, round_index, step)
            raise
    log.muted = False
    seconds = time.monotonic() - start
    run.telemetry.append({"event": "train", "round": round_index, "seconds": seconds, "num_tokens": tokens})
    return True


def _step(stages: Stages, batch: Sequence[TrainRow], position: int, step: int, round_index: int) -> dict[str, Any]:
    """One optimizer step; running out of memory halves the micro-batch, keeps the effective batch and is a sealed decision."""
    shards = stages.run.shards
    micro: int | None = None
    for name in shards.names(round_index, "split-train-"):
        found = shards.read(round_index, name)
        if found is not None and found[0][0]["step"] <= step:
            micro = found[0][0]["micro_batch_tokens"]
    while True:
        try:
            return strict(stages.learner.step(batch, position, micro))
        except TrainOutOfMemory as error:
            longest = max(len(row.input_ids) for row in batch)
            now = micro or sum(len(row.input_ids) for row in batch)
            if now <= longest:
                raise OutOfMemoryError(
                    "memory ran out while training on a single row",
                    where=f"round {round_index}, step {step + 1}",
                    hint="set train.gradient_checkpointing: true, lower max_length, use LoRA (model.adapter), or a smaller model",
                ) from error
            micro = max(longest, now // 2)
            tries = len(shards.names(round_index, f"split-train-{step:06d}-"))
            shards.seal(
                round_index, f"split-train-{step:06d}-{tries}", [{"step": step, "micro_batch_tokens": micro}], {}
            )


def strict(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics as JSON can hold them: what is not finite is null."""
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in stats.items()}


def _check_finite(section: Any, stats: Mapping[str, Any], round_index: int, step: int) -> None:
    if stats.get("skipped_nonfinite") and section.on_nonfinite == "stop":
        raise GuardStop(
            f"round {round_index}, step {step}: the loss or gradient is not finite; the step was not taken",
            where="train.on_nonfinite",
            hint="lower train.learning_rate or set train.max_grad_norm; with train.on_nonfinite: skip the same command goes on without such steps",
        )


def _save_is_due(section: Any, steps_since: int, last_save: float) -> bool:
    if section.every_steps is not None and steps_since >= section.every_steps:
        return True
    return section.every_s is not None and time.monotonic() - last_save >= section.every_s


def save_mid_round(stages: Stages, round_index: int, step: int) -> None:
    """A checkpoint between two optimizer steps, from which training goes on to the same bytes."""
    start = time.monotonic()
    key = f"{round_key(round_index)}-{step:06d}"
    stages.run.checkpoints.commit(
        key,
        lambda folder: stages.learner.save(folder, state=True),
        {"round": round_index, "step": step},
        size=_save_bytes(stages, state=True),
    )
    stages.run.checkpoints.drop_partial(round_index)
    stages.last_save_s = time.monotonic() - start
    stages.run.telemetry.append({"event": "save", "key": key, "seconds": stages.last_save_s})


def _save_bytes(stages: Stages, *, state: bool) -> int | None:
    """About how many bytes the learner is going to save, where it can tell."""
    tell = getattr(stages.learner, "save_bytes", None)
    return None if tell is None else int(tell(state=state))


def seal_training_rows(stages: Stages, round_index: int, rows: Sequence[TrainRow], passes: Sequence[TrainPass]) -> None:
    """Write which samples train, how often and with which weight, unless it is sealed already."""
    if stages.run.shards.iter_rows(round_index, TRAIN) is None:
        counts = times_trained([step for one in passes for step in one.steps], len(rows))
        stages.run.shards.seal(
            round_index,
            TRAIN,
            (
                {"sample_id": row.sample_id, "times": times, "weight": row.weight, "num_tokens": len(row.input_ids)}
                for row, times in zip(rows, counts, strict=True)
            ),
            {"num_steps": sum(len(one.steps) for one in passes)},
        )


def commit_round(stages: Stages, round_index: int, *, with_state: bool) -> None:
    """The round's checkpoint. Without saved state the live weights are read back from it, so that going on and resuming are the same."""
    start = time.monotonic()
    key = round_key(round_index)
    # hashing and syncing go on while the evaluation generates; the next seal waits for them
    stages.run.checkpoints.commit_async(
        key,
        lambda folder: stages.learner.save(folder, state=with_state),
        {"round": round_index, "step": None},
        size=_save_bytes(stages, state=with_state),
    )
    if not with_state:
        stages.learner.load_weights(stages.run.checkpoints.verified(key).path)
    stages.last_save_s = time.monotonic() - start
    stages.run.telemetry.append({"event": "save", "key": key, "seconds": stages.last_save_s})
