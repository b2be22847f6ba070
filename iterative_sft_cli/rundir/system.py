"""The operating system's answers under one name: the rest of the package never asks which system it runs on."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from iterative_sft_cli.rundir.windows import (
        OPEN_FLAGS,
        STOP_SIGNALS,
        boot_id,
        close_in_children,
        free_bytes,
        peak_memory,
        process_alive,
        sync_directory,
        sync_file,
        try_lock,
    )
else:
    from iterative_sft_cli.rundir.posix import (
        OPEN_FLAGS,
        STOP_SIGNALS,
        boot_id,
        close_in_children,
        free_bytes,
        peak_memory,
        process_alive,
        sync_directory,
        sync_file,
        try_lock,
    )

__all__ = [
    "OPEN_FLAGS",
    "STOP_SIGNALS",
    "boot_id",
    "close_in_children",
    "free_bytes",
    "peak_memory",
    "process_alive",
    "sync_directory",
    "sync_file",
    "try_lock",
]
