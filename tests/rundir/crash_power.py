"""Power cuts: every legal state of the disk after a cut must recover, and nothing that was reported saved may be gone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import toy_loop
from crash_base import TOY, KillAt, Killed, Subject, Tally, empty, finish, hooked
from disk_model import Disk, Entry, Recorder, State

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import RunDir, fs, peek, verify
from iterative_sft_cli.rundir.layout import parse_key

SPARE = "spare"
"""A shard that is given up after a checkpoint has listed it."""

DAMAGE = "damage"
"""Label of the syncs that make the planted damage certain; not one of ours."""


def phases(run: Path) -> None:
    """The recorded history: two rounds to the end, the same run with three, then damage that recovery mends, then a shard given up."""
    toy_loop.train(run, 2)
    say(run, "going on")
    with RunDir.open(run) as held:
        held.shards.seal(1, SPARE, [{"id": 1}], {})
    toy_loop.train(run, 3)
    say(run, "damaged")
    disk = fs.FileSystem()
    for name in ("config.yaml", "ledger.jsonl"):
        disk.truncate(run / name, 3)
        disk.sync_file(run / name, DAMAGE)
    RunDir.open(run).close()
    say(run, "mended")
    with RunDir.open(run) as held:
        say(run, f"giving up shard 0001/{SPARE}")
        held.shards.remove(1, SPARE)
    toy_loop.train(run, 3)


def say(run: Path, what: str) -> None:
    if fs.hook is not None:
        fs.hook(fs.Op("ack", run, what))


def record(root: Path, subject: Subject = TOY) -> tuple[list[Entry], dict[str, str]]:
    """The log of a whole run (the toy's: of `phases`) in the empty folder `root`, and what it holds in the end."""
    recorder = Recorder(root)
    with hooked(recorder):
        (phases if subject is TOY else subject.train)(root / "run")
    return recorder.log, subject.contents(root / "run")


def check_state(state: State, root: Path, gold: dict[str, str], subject: Subject = TOY) -> str | None:
    """Start from a state that a power cut left; what is wrong, None when every promise holds."""
    state.build(empty(root))
    run = root / "run"
    try:
        view = peek(run) if run.exists() else None
    except DataError as error:
        return f"refused: {error}"
    acked = [label for label in state.acked if label in ("damaged", "mended")]
    if view is not None and acked[-1:] != ["damaged"]:
        bad = [finding for finding in verify(run) if finding.damage]
        if bad:
            return f"a power cut looks like damage: {bad[:2]}"
    problem = lost_promise(state, run, view is not None and view.finished)
    return problem or finish(run, gold, subject)


def lost_promise(state: State, run: Path, finished: bool) -> str | None:
    """What had been reported saved before the power cut and is not there."""
    keys = [label.removeprefix("checkpoint ") for label in state.acked if label.startswith("checkpoint ")]
    shards = [label.removeprefix("shard ") for label in state.acked if label.startswith("shard ")]
    shards = [name for name in shards if f"giving up shard {name}" not in state.acked]
    if not state.acked:
        return None
    if state.acked[-1] == "outcome 0" and not finished:
        return "it was reported complete and is not"
    try:
        with RunDir.open(run) as held:
            newest = held.checkpoints.newest()
            if keys and (newest is None or parse_key(newest.key) < parse_key(keys[-1])):
                return f"checkpoint {keys[-1]} was reported saved, the newest is {newest.key if newest else None}"
            for name in shards:
                number, _, stem = name.partition("/")
                if held.shards.read(int(number), stem) is None:
                    return f"shard {name} was reported sealed and is not there"
            odd = [moved for moved in held.quarantined if moved[0] not in ("ledger.jsonl", "stats.jsonl")]
            if odd and "damaged" not in state.acked:
                return f"a power cut put {odd[:2]} into quarantine"
    except DataError as error:
        return f"what was reported saved cannot be opened: {error}"
    return None


def power_states(
    log: list[Entry], *, every: int = 1, num_random: int = 4, seed: int = 0, skip: str | None = None
) -> Iterator[State]:
    """Distinct legal states over the whole log, in random order of the moment of the cut; with `skip`, first those in which the missing syncs
    are the newest."""
    rng = random.Random(seed)
    disk = Disk(log, skip)
    seen: set[int] = set()
    moments = list(range(seed % every, len(log) + 1, every))
    rng.shuffle(moments)
    rounds = [(at, num_random, False) for at in moments]
    if skip is not None:
        left_out = [index for index, entry in enumerate(log) if entry.kind == "sync" and entry.label == skip]
        near = [at + 1 + after for after in range(25) for at in left_out if at + 1 + after <= len(log)]
        rounds = [(at, 0, True) for at in near] + [(at, num_random, False) for at in near] + rounds
    for at, number, few in rounds:
        for state in disk.states(at, rng=rng, num_random=number, few=few):
            key = hash((tuple(sorted(state.tree.items())), tuple(state.acked)))
            if key not in seen:
                seen.add(key)
                yield state


def power_loss(
    root: Path, *, limit: int | None, every: int = 1, num_random: int = 4, seed: int = 0, subject: Subject = TOY
) -> Tally:
    """Cut the power in every legal way, start again: nothing wrong, nothing lost that was reported saved."""
    log, gold = record(empty(root), subject)
    tally = Tally()
    for state in power_states(log, every=every, num_random=num_random, seed=seed):
        if limit is not None and tally.trials >= limit:
            break
        tally.trials += 1
        problem = check_state(state, root, gold, subject)
        if problem is not None:
            tally.fail(f"power cut at {state.at}: {problem}")
    return tally


def sync_labels(log: list[Entry]) -> list[str]:
    return sorted({entry.label for entry in log if entry.kind == "sync" and entry.label != DAMAGE})


def first_failure_without(
    label: str, log: list[Entry], gold: dict[str, str], root: Path, *, limit: int
) -> tuple[int, str | None]:
    """(states looked at, the first broken promise) when the syncs with `label` are left out."""
    looked = 0
    for state in power_states(log, every=1, num_random=2, skip=label):
        if looked >= limit:
            break
        looked += 1
        problem = check_state(state, root, gold)
        if problem is not None:
            return looked, problem
    return looked, None


def recovery_is_idempotent(root: Path, *, limit: int, seed: int = 0) -> Tally:
    """Opening twice leaves what opening once left, and a kill inside the first opening changes nothing either."""
    log, gold = record(empty(root))
    rng = random.Random(seed)
    tally = Tally()
    for state in power_states(log, every=7, num_random=2, seed=seed):
        if tally.trials >= limit:
            break
        state.build(empty(root))
        run = root / "run"
        if not run.exists() or peek(run) is None:
            continue
        tally.trials += 1
        with contextlib.suppress(Killed), hooked(KillAt(rng.randrange(12))):
            RunDir.open(run).close()
        RunDir.open(run).close()
        once = toy_loop.contents(run)
        RunDir.open(run).close()
        if toy_loop.contents(run) != once:
            tally.fail(f"power cut at {state.at}: the second recovery changed something")
        problem = finish(run, gold)
        if problem is not None:
            tally.fail(f"power cut at {state.at}: {problem}")
    return tally
