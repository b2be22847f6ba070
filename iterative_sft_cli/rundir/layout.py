"""Names inside a run directory: what a file is called, how checkpoint keys sort, which names are allowed."""

from __future__ import annotations

import re
from pathlib import Path

from iterative_sft_cli.rundir.fs import TEMP_PREFIX, list_names

FORMAT = 1
"""Version of the layout; a directory with a greater one is refused untouched."""

MARKER = "isft-run.json"
LOCK = "LOCK"
LEASE = "LEASE"
CONFIG = "config.yaml"
RESOLVED = "resolved.yaml"
ENVIRONMENT = "environment.json"
RECORDS = (CONFIG, RESOLVED, ENVIRONMENT)
LEDGER = "ledger.jsonl"
STATS = "stats.jsonl"
TELEMETRY = "telemetry.jsonl"
OUTCOME = "outcome.json"
ROUNDS = "rounds"
CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
STATE_FOLDER = "state"
COPIES = "run.json"
JOURNAL = ".journal"
"""How the name of a journal ends: no shard, so that nobody takes it for a torn one."""

WHOLE_ROUND = 1 << 40
"""The step that a checkpoint after a whole round sorts by: behind every save inside the round."""

_KEY = re.compile(r"(\d{4,9})(?:-(\d{6,12}))?")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")


def parse_key(key: str) -> tuple[int, int]:
    """(round, step) of a checkpoint key, such as "0002" or "0002-000040"; keys sort by it. Raises ValueError."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"not a checkpoint key: {key!r}")
    return int(found.group(1)), WHOLE_ROUND if found.group(2) is None else int(found.group(2))


def is_partial(key: str) -> bool:
    """Whether `key` is a save inside a round."""
    return parse_key(key)[1] != WHOLE_ROUND


def open_round(key: str | None) -> int:
    """The first round that is not over when `key` is the newest checkpoint."""
    if key is None:
        return 0
    number, step = parse_key(key)
    return number + 1 if step == WHOLE_ROUND else number


def checkpoint_keys(run: Path) -> list[str]:
    """The keys of the checkpoints in `run`, oldest first, whether they are healthy or not."""
    return sorted((name for name in list_names(run / CHECKPOINTS) if _KEY.fullmatch(name)), key=parse_key)


def round_folder(run: Path, round_index: int) -> Path:
    """Where the shards of a round are."""
    return run / ROUNDS / f"{round_index:04d}"


def round_indices(run: Path) -> list[int]:
    """The rounds that have a folder, in order."""
    return sorted(int(name) for name in list_names(run / ROUNDS) if re.fullmatch(r"\d{4,9}", name))


def check_name(name: str) -> str:
    """`name` when it may be a shard's; raises ValueError for anything that could lead out of the folder."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not a shard name: {name!r}")
    return name


def is_temp(name: str) -> bool:
    """Whether a name is that of something unfinished."""
    return name.startswith(TEMP_PREFIX)
