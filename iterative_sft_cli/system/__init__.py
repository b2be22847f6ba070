"""The operating system's answers under one name: the rest of the package never asks which system it runs on."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from iterative_sft_cli.system.windows import (
        OPEN_FLAGS,
        STACKS_SIGNAL,
        STOP_SIGNALS,
        belongs_to_this_user,
        boot_id,
        close_in_children,
        end_group,
        end_process,
        free_bytes,
        limit_process,
        peak_memory,
        process_alive,
        sync_directory,
        sync_file,
        try_lock,
    )
else:
    from iterative_sft_cli.system.posix import (
        OPEN_FLAGS,
        STACKS_SIGNAL,
        STOP_SIGNALS,
        belongs_to_this_user,
        boot_id,
        close_in_children,
        end_group,
        end_process,
        free_bytes,
        limit_process,
        peak_memory,
        process_alive,
        sync_directory,
        sync_file,
        try_lock,
    )

__all__ = [
    "OPEN_FLAGS",
    "STACKS_SIGNAL",
    "STOP_SIGNALS",
    "belongs_to_this_user",
    "boot_id",
    "close_in_children",
    "end_group",
    "end_process",
    "free_bytes",
    "limit_process",
    "peak_memory",
    "process_alive",
    "sync_directory",
    "sync_file",
    "try_lock",
]
