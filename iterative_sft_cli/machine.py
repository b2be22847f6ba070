"""The machine's memory: how much there is, by which everything that is `auto` is sized, and what running out of it looks like."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from typing import Any

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total_memory(device: str = "cpu") -> int:
    """Bytes of memory of the machine, or of the GPU; a container's limit where it is lower."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    total = _installed()
    for name in _LIMITS:
        try:
            with open(name, encoding="ascii") as stream:
                total = min(total, int(stream.read()))
        except (OSError, ValueError):
            continue
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of an accelerator, ran out."""
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def give_memory_back() -> None:
    """Have the C library return what was freed: glibc keeps pieces that are smaller than 32 MB for itself."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _installed() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError:
        return 8 << 30
    return int(psutil.virtual_memory().total)
