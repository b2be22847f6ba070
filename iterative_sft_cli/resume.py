"""Whether this config may go on with the run that is there: what is frozen is compared, what may change is written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig, diff_configs
from iterative_sft_cli.errors import EXIT_PLUGIN, ConfigError
from iterative_sft_cli.rounds.weights import ResumePoint
from iterative_sft_cli.rundir import RunDir, RunView
from iterative_sft_cli.samples import ROUND_VERDICTS, TRAIN, VERDICTS

RESUME_CHOICES = ("auto", "never", "must")
CONTENTS = (
    ("model", "the base model's files"),
    ("prompts", "the prompt file"),
    ("eval", "the eval prompt file"),
    ("filters", "a filter's source"),
    ("seed_data", "the seed data"),
)
"""What a run depends on beside its config, by its key in `environment.json`."""
MAY_CHANGE = ("versions", "isft", "builtins", "python", "platform", "machine", "threads", "processes", "kernels")
"""Facts that may change between starts; the promise of identical bytes ends there, and the ledger says where."""


def check_choice(found: RunView | None, path: Path, resume: str) -> None:
    """Hold `--resume` against what is there. Raises ConfigError."""
    if resume not in RESUME_CHOICES:
        raise ConfigError(f"--resume {resume}: expected one of {', '.join(RESUME_CHOICES)}")
    if found is None and resume == "must":
        raise ConfigError(f"{path}: no run to resume", hint="run without --resume must to start it")
    if found is not None and resume == "never":
        raise ConfigError(
            f"{path}: a run is there already",
            hint="choose another folder with --output-dir, or leave out --resume never to go on with it",
        )


def is_complete(found: RunView | None, loaded: LoadedConfig, allow_change: Sequence[str]) -> bool:
    """Whether the run is finished and this config asks for nothing more. Raises ConfigError for frozen changes."""
    if found is None or not found.finished or found.resolved.get("rounds") != loaded.merged.get("rounds"):
        return False
    check_drift(found.resolved, loaded, allow_change)
    return True


def is_untouched(run: RunDir | RunView) -> bool:
    """Whether nothing was generated or trained yet: then nothing is frozen."""
    found = RunDir.peek(run.path)
    return found is None or (not found.keys and not found.rounds)


def is_under(path: str, key: str) -> bool:
    """Whether a config path is `key` or lies below it."""
    return path == key or path.startswith((f"{key}.", f"{key}["))


def check_drift(before: dict[str, Any], loaded: LoadedConfig, allow_change: Sequence[str]) -> list[dict[str, Any]]:
    """The changes between the stored config and this one that the run takes on; raises ConfigError for frozen ones."""
    drifts = diff_configs(before, loaded.merged)
    frozen = [d for d in drifts if d.cls == "frozen" and not any(is_under(d.path, key) for key in allow_change)]
    if frozen:
        keys = " ".join(f"--allow-change {key}" for key in dict.fromkeys(d.path.split("[")[0] for d in frozen[:3]))
        raise ConfigError(
            "the config differs from the run that is there",
            problems=[
                f"{loaded.path}: differs from the run in {loaded.config.output_dir}:",
                *(f"{d.path}: was {d.old!r}, is {d.new!r}" for d in frozen),
            ],
            hint=f"undo the change, start another run with --output-dir DIR, or accept it with {keys}",
        )
    # more rounds change nothing of the rounds before: a longer run would have the same bytes
    return [{"key": d.path, "old": d.old, "new": d.new} for d in drifts if d.cls != "cosmetic" and d.path != "rounds"]


def check_contents(
    run: RunDir, facts: dict[str, Any], allow_change: Sequence[str], last_code: int | None
) -> list[dict[str, Any]]:
    """Compare data, plug-in sources, base model and libraries with what the run has used so far.

    Returns what changed and may. After exit 5 an edited filter is taken without asking if none of its verdicts in the open
    round is sealed; with `filters` in `allow_change` the open round is judged again from its stored samples.
    """
    before = run.environment
    changes: list[dict[str, Any]] = []
    for key, what in CONTENTS:
        if before.get(key) == facts.get(key):
            continue
        mended = key == "filters" and last_code == EXIT_PLUGIN and not open_verdicts(run)
        if key not in allow_change and not mended:
            raise ConfigError(
                f"{what} changed since this run began",
                where=key,
                hint=f"restore it, start another run with --output-dir DIR, or accept the change with --allow-change {key}",
            )
        changes.append({"key": key, "old": before.get(key), "new": facts.get(key)})
    for key in MAY_CHANGE:
        if before.get(key) != facts.get(key):
            changes.append({"key": key, "old": before.get(key), "new": facts.get(key)})
    return changes


def open_round(run: RunDir) -> int:
    """The round that is not committed yet."""
    point = ResumePoint.of(run.checkpoints.newest())
    return point.round_index if point.step is not None else point.round_index + 1


def open_verdicts(run: RunDir) -> list[str]:
    """The sealed verdicts of the round that is not committed yet."""
    return run.shards.names(open_round(run), VERDICTS)


def judge_again(run: RunDir) -> None:
    """Set the open round's verdicts aside, so that its stored samples are judged by the filters as they are now.

    Raises ConfigError when that round is already training on them.
    """
    if ResumePoint.of(run.checkpoints.newest()).step is not None:
        raise ConfigError(
            f"round {open_round(run)} is already training on what the filters accepted",
            where="filters",
            hint="let this round finish with the filters as they were, or start another run with --output-dir DIR",
        )
    index = open_round(run)
    for name in (*run.shards.names(index, VERDICTS), ROUND_VERDICTS, TRAIN):
        run.shards.discard(index, name, "the filters were changed: judged again")


def settle(
    run: RunDir,
    loaded: LoadedConfig,
    facts: dict[str, Any],
    *,
    drift: Sequence[dict[str, Any]],
    allow_change: Sequence[str],
    last_code: int | None,
) -> list[dict[str, Any]]:
    """Bring the run's records up to this start; returns every change so far, each with the round from which it counts.

    Raises ConfigError for a change that is not allowed.
    """
    if is_untouched(run):
        run.write_environment({**facts, "changes": []})
        run.write_config(loaded.source, loaded.merged)
        return []
    before = run.environment
    changes = [*drift, *check_contents(run, facts, allow_change, last_code)]
    known: list[dict[str, Any]] = list(before.get("changes", []))
    if any(is_under(change["key"], "filters") for change in changes) and open_verdicts(run):
        judge_again(run)
    if changes:
        point = ResumePoint.of(run.checkpoints.newest())
        since = open_round(run) + (point.step is not None)
        known += [{"round": since, **change} for change in changes]
        run.write_environment({**facts, "changes": known})
    if run.resolved != loaded.merged:
        run.write_config(loaded.source, loaded.merged)
    return known
