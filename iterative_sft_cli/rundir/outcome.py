"""`outcome.json`: how the last start ended, and whether the run is complete. True only while the logs are as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterative_sft_cli.rundir.checkpoint import Checkpoint
from iterative_sft_cli.rundir.fs import FileSystem, read_bytes
from iterative_sft_cli.rundir.integrity import Damage, Stamp, read_document, render_document, stamp_bytes
from iterative_sft_cli.rundir.layout import LEDGER, OUTCOME, STATS, checkpoint_keys
from iterative_sft_cli.rundir.ledger import AppendLog
from iterative_sft_cli.rundir.seal import Shards


def write_outcome(
    run: Path,
    fs: FileSystem,
    *,
    code: int,
    reason: str,
    next_command: str,
    newest: Checkpoint | None,
    ledger: AppendLog,
    stats: AppendLog,
    shards: Shards,
) -> None:
    """Publish the outcome; with code 0 the logs are synced first, so that "complete" survives a power cut."""
    if code == 0:
        ledger.sync("ledger.data")
        stats.sync("stats.data")
    document = render_document(
        {
            "shards": shards.listed(),
            "code": code,
            "reason": reason,
            "next_command": next_command,
            "newest": newest.key if newest else None,
            "ledger": ledger.stamp().to_json(),
            "stats": stats.stamp().to_json(),
        }
    )
    fs.publish(run / OUTCOME, document, data_label="outcome.data", dir_label="outcome.dir")
    fs.acknowledge(run / OUTCOME, f"outcome {code}")


def read_outcome(run: Path) -> dict[str, Any] | None:
    """What `outcome.json` says; None when it is missing or damaged (it is made anew at the end of each start)."""
    try:
        return read_document(run / OUTCOME)
    except Damage:
        return None


def is_finished(run: Path, outcome: dict[str, Any] | None) -> bool:
    """Whether the run was completed and nothing has been done in it since."""
    if outcome is None or outcome.get("code") != 0:
        return False
    keys = checkpoint_keys(run)
    if outcome.get("newest") != (keys[-1] if keys else None):
        return False
    return all(
        Stamp.from_json(outcome[name]) == stamp_bytes(read_bytes(run / file) or b"")
        for name, file in (("ledger", LEDGER), ("stats", STATS))
    )
