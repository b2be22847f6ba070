"""The run directory: files, checkpoints, logs and lock. Whatever instant a run ends at, the next start finds it whole."""

from __future__ import annotations

from iterative_sft_cli.rundir.checkpoint import Checkpoint
from iterative_sft_cli.rundir.commit import Checkpoints, PendingCommit
from iterative_sft_cli.rundir.fs import require_space
from iterative_sft_cli.rundir.ledger import AppendLog, Telemetry
from iterative_sft_cli.rundir.run import RunDir
from iterative_sft_cli.rundir.seal import ShardReader, Shards
from iterative_sft_cli.rundir.verify import Finding, verify
from iterative_sft_cli.rundir.view import RunView, peek
from iterative_sft_cli.system import STOP_SIGNALS

__all__ = [
    "STOP_SIGNALS",
    "AppendLog",
    "Checkpoint",
    "Checkpoints",
    "Finding",
    "PendingCommit",
    "RunDir",
    "RunView",
    "ShardReader",
    "Shards",
    "Telemetry",
    "peek",
    "require_space",
    "verify",
]
