"""Damage of every kind to every file of a run: `verify` finds it, and the next start mends it or says which file it cannot mend."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import toy_loop
from crash_base import TOY, KillAfter, Killed, Subject, Tally, empty, hooked

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import verify

UNCHECKED = {"LOCK", "telemetry.jsonl", "quarantine"}
"""What no checksum vouches for: neither is ever read by a start."""

Damage = Callable[[bytes, random.Random], bytes | None]


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) * 8)
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zero_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = rng.randrange(1, len(data) - start + 1)
    changed = data[:start] + b"\0" * length + data[start + length :]
    return changed if changed != data else flip_bit(data, rng)


def append_junk(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 40)).replace(b"\n", b" ")


def delete(data: bytes, rng: random.Random) -> None:
    return None


KINDS: dict[str, Damage] = {
    "bit flip": flip_bit,
    "truncation": truncate,
    "zeros": zero_out,
    "junk at the end": append_junk,
    "deleted": delete,
}


def checked_files(run: Path) -> list[Path]:
    return [
        path for path in sorted(run.rglob("*")) if path.is_file() and path.relative_to(run).parts[0] not in UNCHECKED
    ]


def unfinished_run(run: Path, subject: Subject, stop_after: str) -> None:
    """A run that stopped right after a save inside its last round."""
    try:
        with hooked(KillAfter(f"checkpoint {stop_after}")):
            subject.train(run)
    except Killed:
        gc.collect()
        return
    raise AssertionError("the run did not stop")


def damage_files(
    root: Path,
    *,
    trials: dict[str, int],
    swaps: int,
    seed: int = 0,
    subject: Subject = TOY,
    stop_after: str = "0003-000002",
) -> Tally:
    """`trials` of each kind of damage, dealt over the files of an unfinished run, and `swaps` of two files for each other."""
    rng = random.Random(seed)
    run, base = empty(root) / "run", root / "base"
    subject.train(run)
    gold = subject.contents(run)
    shutil.rmtree(run)
    unfinished_run(run, subject, stop_after)
    run.rename(base)
    files = [path.relative_to(base) for path in checked_files(base)]
    tally = Tally()
    for kind, number in trials.items():
        order: list[Path] = []
        for _ in range(number):
            order = order or rng.sample(files, len(files))
            name = order.pop()
            data = (base / name).read_bytes()
            if not data:
                continue
            _trial(root, base, {name: KINDS[kind](data, rng)}, f"{kind} in {name}", gold, tally, subject, stop_after)
    pairs = [(a, b) for a in files for b in files if a < b and (base / a).read_bytes() != (base / b).read_bytes()]
    alike = [(a, b) for a, b in pairs if a.name == b.name]
    for a, b in rng.sample(alike, min(swaps // 2, len(alike))) + rng.sample(pairs, swaps - swaps // 2):
        swapped = {a: (base / b).read_bytes(), b: (base / a).read_bytes()}
        _trial(root, base, swapped, f"{a} and {b} swapped", gold, tally, subject, stop_after)
    return tally


def _trial(
    root: Path,
    base: Path,
    changes: dict[Path, bytes | None],
    what: str,
    gold: dict[str, str],
    tally: Tally,
    subject: Subject,
    stop_after: str,
) -> None:
    tally.trials += 1
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    for name, data in changes.items():
        if data is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(data)
    # rows behind the last checkpoint are no history yet: junk there is a torn tail, not damage
    tail = {"ledger.jsonl", "stats.jsonl"} if what.startswith("junk") else set()
    if not any(finding.damage or finding.path in tail for finding in verify(run)):
        tally.fail(f"{what}: verify did not find it")
    try:
        subject.train(run)
    except DataError as error:
        tally.count("refused by name")
        # only a shard of a round that is over cannot be made again
        over = [name for name in changes if name.parts[0] == "rounds" and f"{name.parts[1]}" < stop_after[:4]]
        if not over:
            tally.fail(f"{what}: the next start refused: {error}")
        if not any(f"{name.parts[1]}/{name.name.partition('.')[0]}" in error.render() for name in over):
            tally.fail(f"{what}: the next start refused without naming it: {error}")
        return
    except Exception as error:  # noqa: BLE001 - anything else is the finding
        tally.fail(f"{what}: the next start failed: {type(error).__name__}: {error}")
        return
    tally.count("mended")
    got = subject.contents(run)
    other = {name for name in got | gold if got.get(name) != gold.get(name)}
    # a file that this start had no need to read stays as it is, for `verify` to tell
    unread = {name.as_posix() for name, data in changes.items() if _as_damaged(run / name, data)}
    if other - unread:
        tally.fail(f"{what}: other bytes in {sorted(other - unread)[:3]}")
    if other - {"outcome.json"} and not any(finding.damage for finding in verify(run)):
        tally.fail(f"{what}: left in place, and verify does not find it any more")
    for name, data in changes.items():
        # an old checkpoint is removed with all that is in it once later ones are committed
        pruned = name.parts[0] == "checkpoints" and not (run / "checkpoints" / name.parts[1]).is_dir()
        if data is not None and not pruned and name.name not in tail and not _is_kept(run, data):
            tally.fail(f"{what}: the damaged {name} is not in quarantine")


def _as_damaged(path: Path, data: bytes | None) -> bool:
    return not path.exists() if data is None else path.exists() and path.read_bytes() == data


def _is_kept(run: Path, data: bytes) -> bool:
    """Whether damaged bytes are still somewhere in the run: in quarantine, or where they were."""
    return any(path.is_file() and path.read_bytes() == data for path in run.rglob("*"))


def damage_finished(root: Path, *, flips: int, truncations: int, seed: int = 0) -> Tally:
    """Damage to a finished run: `verify` finds all of it."""
    rng = random.Random(seed)
    run = empty(root) / "run"
    toy_loop.train(run)
    files = checked_files(run)
    tally = Tally()
    for number in range(flips + truncations):
        path = files[number % len(files)]
        data = path.read_bytes()
        if not data:
            continue
        path.write_bytes(flip_bit(data, rng) if number < flips else truncate(data, rng))
        tally.trials += 1
        if not any(finding.damage for finding in verify(run)):
            tally.fail(f"damage to {path.relative_to(run)} was not found")
        path.write_bytes(data)
    for path in files:
        data = path.read_bytes()
        path.unlink()
        tally.trials += 1
        # without its outcome a run is merely not complete
        if path.name != "outcome.json" and not any(finding.damage for finding in verify(run)):
            tally.fail(f"the loss of {path.relative_to(run)} was not found")
        path.write_bytes(data)
    return tally
