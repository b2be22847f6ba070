"""A new run that begins with the stored samples of a round of another, judged by other filters; `isft train` goes on with it.

For round 1 the result is, byte for byte, that of a run that had these filters from the start. For a later round the rounds
before it are copied as they happened. The new directory appears by one rename, whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig, diff_configs
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.filters import FilterChain, ResolvedFilter, resolve_filters
from iterative_sft_cli.report.again import splitter_of
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.rounds.evaluation import eval_filters, vote_of
from iterative_sft_cli.rounds.weights import round_key
from iterative_sft_cli.rundir import Checkpoint, RunDir, jsonl, layout
from iterative_sft_cli.samples import EVAL, GENERATED, PROMPTS, read_eval_prompts, sample_from_row
from iterative_sft_cli.types import Prompt

MAY_DIFFER = ("filters", "train", "guards", "eval.correct", "eval.metric", "eval.rank_by", "checkpoints")
"""What a fork may have otherwise than the run that its samples come from."""


def check_config(run: Run, loaded: LoadedConfig) -> None:
    """Raises ConfigError for a config whose samples would not be those that are stored."""
    found = [
        one
        for one in diff_configs(run.config, loaded.merged)
        if one.cls == "frozen" and not one.path.replace("[", ".").startswith(MAY_DIFFER)
    ]
    if found:
        raise ConfigError(
            "this config would have drawn other samples",
            problems=[
                f"{loaded.path}: differs from the run in {run.path} in more than its filters and training:",
                *(f"{one.path}: was {one.old!r}, is {one.new!r}" for one in found),
            ],
            hint="take these keys back, or train a run of its own",
        )


def fork(run: Run, index: int, loaded: LoadedConfig, filters: Sequence[ResolvedFilter], new: Path) -> list[str]:
    """Make the run directory `new` with everything before round `index` and its generated samples, unjudged.

    Returns notes for the user. Raises ConfigError and DataError when that cannot be done; then nothing is left behind.
    """
    check_config(run, loaded)
    new = new.expanduser().resolve()
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise ConfigError(f"{new}: something is there already", expected="a folder that does not exist yet")
    start = start_checkpoint(run, index)
    temp = new.with_name(f".{new.name}.fork-{os.getpid()}")
    new.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **run.view.environment,
        "filters": {one.name: source_of(one) for one in filters},
        "builtins": {one.name: one.source_hash for one in filters if one.builtin},
        "config_dir": str(loaded.base_dir.resolve()),
        "changes": [],
        "forked_from": {"run_id": run.view.run_id, "round": index},
    }
    try:
        made = RunDir.create(
            temp,
            config_source=loaded.source,
            resolved={**loaded.merged, "output_dir": str(new)},
            environment=environment,
        )
        with made:
            notes = fill(run, made, index, loaded, filters, start)
            made.telemetry.append({"event": "fork", "from": run.view.run_id, "round": index})
        (temp / layout.LOCK).unlink(missing_ok=True)
        if new.exists():
            new.rmdir()
        os.rename(temp, new)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return notes


def start_checkpoint(run: Run, index: int) -> Checkpoint | None:
    """The checkpoint that round `index` began with; None when it began with the starting model. Raises DataError when it is gone."""
    key = round_key(index - 1)
    if index == 1 and run.settings.warmup is None:
        return None
    if key not in run.view.keys:
        raise DataError(
            f"round {index} began with checkpoint {key}, which was not kept",
            where=str(run.path),
            hint=f"this run has {', '.join(run.view.keys) or 'no checkpoints'}; checkpoints.keep decides how many stay",
        )
    found = run.view.checkpoint(key, verify=True)
    keeps_state = run.settings.train.start_from == "previous"
    if keeps_state and found.manifest.get("state") is not None and not found.has_state:
        raise DataError(
            f"the optimizer of checkpoint {key} was not kept",
            where=str(found.path),
            hint="only the two newest checkpoints keep it; fork at a later round, or at round 1",
        )
    return found


def fill(
    run: Run,
    made: RunDir,
    index: int,
    loaded: LoadedConfig,
    filters: Sequence[ResolvedFilter],
    start: Checkpoint | None,
) -> list[str]:
    """Copy what the new run begins with."""
    view = run.view
    notes = []
    config = loaded.config
    judges = same_judges(run, config, filters)
    for earlier in [r for r in view.rounds if r < index]:
        for name in view.shards.names(earlier, ""):
            if name.startswith(f"{EVAL}-") and start is None and not judges:
                continue
            copy_shard(run, made, earlier, name)
    if start is not None:
        copy_history(run, made, start)
        if not judges:
            notes.append(f"the evaluations before round {index} were judged by the old filters; later ones are not")
    elif not judges and config.eval is not None:
        for name in view.shards.names(0, f"{EVAL}-"):
            judge_evaluation(run, made, name, filters, loaded)
    for name in view.shards.names(index, ""):
        if name == PROMPTS or name.startswith((GENERATED, f"split-{GENERATED}")):
            copy_shard(run, made, index, name)
    return notes


def same_judges(run: Run, config: Any, filters: Sequence[ResolvedFilter]) -> bool:
    """Whether the evaluation is judged by the same filters, with the same arguments and code, as in the old run."""
    if config.eval is None or run.settings.eval is None:
        return config.eval is run.settings.eval
    try:
        old = resolve_filters(run.settings.filters, base_dir=run.base_dir)
    except ConfigError:
        return False
    known = run.view.environment
    hashes = {**(known.get("filters") or {}), **(known.get("builtins") or {})}
    before = [
        what_it_is(one) for one in eval_filters(old, run.settings.eval) if hashes.get(one.name) == one.source_hash
    ]
    return before == [what_it_is(one) for one in eval_filters(filters, config.eval)]


def source_of(one: ResolvedFilter) -> str | None:
    """What `environment.json` says of a filter's code, as a start of the run writes it."""
    return "built-in" if one.builtin else one.source_hash


def what_it_is(one: ResolvedFilter) -> tuple[object, ...]:
    """Equal for filters that judge alike."""
    return (one.name, one.use, one.arguments, one.source_hash, one.on_error)


def copy_shard(run: Run, made: RunDir, index: int, name: str) -> None:
    """Seal a shard of the old run in the new one. Raises DataError when its bytes would differ."""
    found = run.view.shards.read(index, name)
    if found is None:
        raise DataError("missing", where=f"{run.path}/rounds/{index:04d}/{name}.jsonl")
    made.shards.seal(index, name, found[0], found[1])


def judge_evaluation(
    run: Run, made: RunDir, name: str, filters: Sequence[ResolvedFilter], loaded: LoadedConfig
) -> None:
    """Judge the stored answers of the starting model's evaluation by the new filters."""
    found = run.view.shards.read(0, name)
    if found is None:
        raise DataError("missing", where=f"{run.path}/rounds/0000/{name}.jsonl")
    rows, meta = found
    config = loaded.config.at_round(0)
    prompts = read_eval_prompts(run.view.shards)
    samples = [sample_from_row(row, prompts.get(row["prompt_id"]) or Prompt(row["prompt_id"], "")) for row in rows]
    splitter = splitter_of(run, 1, loaded.base_dir)
    chain = FilterChain(eval_filters(filters, config.eval), seed=config.seed, round_index=0, encoder=splitter)
    with chain:
        stream = chain.open_shard()
        for sample in samples:
            stream.submit(sample)
        judged = stream.finish(samples)
    new = [
        {**row, "correct": one.kept, "answer": vote_of(one), "says": [says.to_row() for says in one.says]}
        for row, one in zip(rows, judged, strict=True)
    ]
    made.shards.seal(0, name, new, meta)


def copy_history(run: Run, made: RunDir, start: Checkpoint) -> None:
    """Ledger, statistics and checkpoints up to `start`, as they were when it was committed."""
    logs = {"ledger": (made.ledger, run.path / layout.LEDGER), "stats": (made.stats, run.path / layout.STATS)}
    data = {name: path.read_bytes() for name, (_, path) in logs.items()}
    done = dict.fromkeys(logs, 0)
    limit = layout.parse_key(start.key)
    keys = [key for key in run.view.keys if layout.parse_key(key) <= limit and not layout.is_partial(key)]
    for key in keys:
        checkpoint = run.view.checkpoint(key, verify=True)
        for name, (log, path) in logs.items():
            size = checkpoint.log_stamp(name).size
            for row in jsonl.decode_rows(data[name][done[name] : size]):
                log.append(row)
            done[name] = size
            if log.stamp() != checkpoint.log_stamp(name):
                raise DataError(f"not what checkpoint {key} recorded", where=str(path), hint="isft verify RUN")
        made.checkpoints.commit(key, copier(checkpoint), checkpoint.state)


def copier(checkpoint: Checkpoint) -> Callable[[Path], None]:
    """Writes a checkpoint's model, and its optimizer where it has one, into an empty folder."""

    def write(folder: Path) -> None:
        for name in checkpoint.manifest["files"]:
            if name != layout.STATE:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, folder / name)
        if checkpoint.has_state:
            ignore = shutil.ignore_patterns(layout.MANIFEST)
            shutil.copytree(checkpoint.path / layout.STATE_FOLDER, folder / layout.STATE_FOLDER, ignore=ignore)

    return write
