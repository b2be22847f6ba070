"""Generate, filter, train, checkpoint, evaluate, write the row, next round: the whole loop, and the only file that knows all stages.

Every phase leaves sealed files; a phase whose files are there is read, not done again. That is all there is to resuming:
`ResumePoint` says which round the newest checkpoint belongs to, and the loop walks over that round with what is sealed.
"""

from __future__ import annotations

import time
from typing import Any

from iterative_sft_cli.alarms import say_alarms
from iterative_sft_cli.config.expression import Expression
from iterative_sft_cli.filters import FilterChain
from iterative_sft_cli.guards import best_round, check_round
from iterative_sft_cli.rounds.decisions import check_stop, roll_back
from iterative_sft_cli.rounds.evaluation import eval_filters, evaluate, is_due
from iterative_sft_cli.rounds.figures import count_round, follow_seed_loss, log_selected, round_row, show_samples
from iterative_sft_cli.rounds.gather import Gathered, gather_rows
from iterative_sft_cli.rounds.history import choose_prompts
from iterative_sft_cli.rounds.judge import judge_round
from iterative_sft_cli.rounds.losses import settle_losses
from iterative_sft_cli.rounds.placing import place_weights, undo_training
from iterative_sft_cli.rounds.search import tune
from iterative_sft_cli.rounds.sources import live_hash, reads_warmup, sources_of
from iterative_sft_cli.rounds.splits import FilterSplits
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.thinning import settle_thinned, thin_rounds
from iterative_sft_cli.rounds.training import (
    commit_round,
    plan_passes,
    seal_training_rows,
    steps_span,
    train_round,
)
from iterative_sft_cli.rounds.weights import LIVE, ResumePoint, restore, round_key
from iterative_sft_cli.samples import AcceptedEarlier


def run_rounds(stages: Stages) -> None:
    """Run every round that is left; returns when the last one's statistics are written.

    Raises the errors of `errors.py`; whatever is raised, what was sealed stays and the same call goes on from there.
    """
    checkpoint = stages.run.checkpoints.newest()
    point = ResumePoint.of(checkpoint)
    first_open = point.round_index + (point.step is None)
    settle_losses(stages, first_open)
    settle_thinned(stages.run.shards, range(1, stages.config.rounds + 1), first_open)
    restore(stages.learner, checkpoint)
    with stages.runtime:
        try:
            for round_index in range(0 if point.round_index == 0 else point.round_index, stages.config.rounds + 1):
                one_round(stages, round_index, point)
        finally:
            stages.session.close()


def one_round(stages: Stages, round_index: int, point: ResumePoint) -> None:
    """One round, or what is left of it. Round 0 is the warm-up and the evaluation of the starting model."""
    config, run = stages.config.at_round(round_index), stages.run
    start = time.monotonic()
    log = RoundLog(run.ledger, round_index, muted=point.in_training(round_index) or point.past_training(round_index))
    set_retention(stages, config)
    for change in stages.changes:
        if change["round"] == round_index:
            log("changed", key=change["key"], old=change["old"], new=change["new"])
    if not point.past_training(round_index):
        if round_index == 0:
            warm_up(stages, config, point, log)
        else:
            learn(stages, config, round_index, point, log)
    log.muted = False
    row = round_row(stages, config, round_index)
    if is_due(config.eval, round_index, stages.config.rounds):
        chain = FilterChain(
            eval_filters(stages.filters, config.eval),
            seed=config.seed,
            round_index=round_index,
            cache_dir=stages.cache_dir,
            runtime=stages.runtime,
            encoder=stages.encoder,
            batch_sizes=FilterSplits(run.shards, round_index, "eval"),
        )
        with chain:
            row |= evaluate(
                stages,
                config,
                round_index=round_index,
                weights_hash=lambda: live_hash(stages),
                open_engine=lambda: stages.session.serve(LIVE, None),
                chain=chain,
                log=log,
            )
    if len(row) > 1:
        log("round", **{key: row[key] for key in row if key.startswith("eval/") or key == "filters/num_accepted"})
        run.stats.append(row)
        stages.view.round_done(row, time.monotonic() - start)
        say_alarms(run.stats.rows(), stages.view.note)
    run.telemetry.append({"event": "safety", "round": round_index, **stages.cost.row()})
    thin_rounds(stages, config, round_index, log)


def set_retention(stages: Stages, config: Any) -> None:
    """Tell the run directory what to keep after the round's commit: the newest, and the best so far."""
    best = best_round(stages.run.stats.rows(), config.eval.metric) if config.eval else None
    keep_best = best is not None and config.checkpoints.keep_best
    stages.run.checkpoints.retain(
        config.checkpoints.keep,
        round_key(best) if keep_best and best is not None else None,
        needs_state=config.train.start_from == "previous",
        also=[round_key(0)] if reads_warmup(stages.config) else [],
    )


def learn(stages: Stages, config: Any, round_index: int, point: ResumePoint, log: RoundLog) -> None:
    """Generate, filter, train and commit one round."""
    run = stages.run
    if not point.in_training(round_index):
        check_stop(stages, config, round_index)
        roll_back(stages, config, round_index, log)
        sources = sources_of(stages, config)
        prompts = choose_prompts(stages, config, round_index)
        config, filters = tune(stages, config, prompts, round_index=round_index, source=sources[0], log=log)
        chain = FilterChain(
            filters,
            seed=config.seed,
            round_index=round_index,
            accepted_earlier=AcceptedEarlier(run.shards, round_index, stages.known),
            cache_dir=stages.cache_dir,
            runtime=stages.runtime,
            encoder=stages.encoder,
            batch_sizes=FilterSplits(run.shards, round_index, "filter"),
            max_length=config.train.max_length,
            scores_read=scores_read(config),
            eval_texts=[prompt_text(prompt.prompt) for prompt in stages.eval_prompts],
        )
        log("start", start_from=config.train.start_from, weights=", ".join(source.name for source in sources))
        with chain:
            judge_round(
                stages,
                config,
                prompts,
                round_index=round_index,
                sources=sources,
                chain=chain,
                log=log,
            )
        stages.session.close()
    show_samples(stages, round_index)
    if check_round(count_round(stages, round_index), config.guards, round_index=round_index):
        found = gather_rows(stages, config, round_index)
        passes = plan_passes(config.train, found, seed=config.seed, round_index=round_index)
        seal_training_rows(stages, round_index, found.rows, passes)
        log_selected(log, found, sum(len(one.steps) for one in passes))
        if not point.in_training(round_index):
            place_weights(stages, config, round_index)
        whole = train_round(
            stages,
            passes,
            found.rows,
            round_index=round_index,
            keep_optimizer=config.train.optimizer_state == "keep",
            done=point.step or 0 if point.in_training(round_index) else 0,
            log=log,
            span=steps_span(stages.config, round_index),
        )
        if not whole:
            undo_training(stages, config, round_index)
        follow_seed_loss(stages, log)
    else:
        log("skipped", reason="nothing accepted")
    commit_round(stages, round_index, with_state=config.train.start_from == "previous")
    stages.live_hash = None


def warm_up(stages: Stages, config: Any, point: ResumePoint, log: RoundLog) -> None:
    """Supervised training on seed data before round 1 (checkpoint 0000); nothing without a `warmup` section."""
    if config.warmup is None:
        return
    section = config.warmup.training(config.train)
    passes = plan_passes(section, Gathered.of_seed_data(stages.warmup_rows), seed=config.seed, round_index=0)
    log("start", start_from="base", weights="base")
    done = point.step or 0
    if not train_round(stages, passes, stages.warmup_rows, round_index=0, keep_optimizer=False, done=done, log=log):
        undo_training(stages, config, 0)
    follow_seed_loss(stages, log)
    commit_round(stages, 0, with_state=config.train.start_from == "previous")


def prompt_text(prompt: Any) -> str:
    """A prompt as one text; chat messages without the system's."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content", "")) for message in prompt if message.get("role") != "system")


def scores_read(config: Any) -> set[str]:
    """The scores that training reads, and the filters that decide what is correct in the evaluation."""
    read: set[str] = set(config.eval.correct or ()) | {config.eval.rank_by} - {None} if config.eval else set()
    if config.train.weight_by is not None:
        read |= set(Expression(config.train.weight_by).names)
    for one in config.train.passes or ():
        read |= set(Expression(one.by).names) if one.by else set()
    return read
