"""How much memory this machine has: what everything that is `auto` is sized by, never what is free of it."""

from __future__ import annotations

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
