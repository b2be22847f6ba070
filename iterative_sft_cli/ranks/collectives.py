"""The process group that gradients travel over, and the doors in front of its collectives.

Guarantee: there is none without a learner that trains over ranks; every collective is entered through a meeting on the store.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

from iterative_sft_cli.ranks.link import Link
from iterative_sft_cli.ranks.placement import interface_towards


def open_collectives(link: Link, parts: Any) -> None:
    """Make the process group of all ranks, for a learner that shares out steps. Raises RankError when one dies meanwhile."""
    if getattr(parts.learner, "shares", None) is None:
        return
    import torch
    import torch.distributed as dist

    from iterative_sft_cli.train import torch_ranks

    device = torch.device(parts.model.device)
    choose_interface(link.placement.address)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the CPU half carries what lies on the host, such as the optimizer's step counts
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    link.meet()
    try:
        dist.init_process_group(
            backend,
            store=link.store,
            rank=link.rank,
            world_size=link.size,
            timeout=timedelta(seconds=link.patience.collective_s),
        )
        torch_ranks.door = link.meet
        parts.learner.spread(None)
    except RuntimeError as error:
        raise link.blame(error) from error


def close_collectives() -> None:
    """Free the process group, where there is one."""
    import sys

    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        from iterative_sft_cli.train import torch_ranks

        torch_ranks.door = None
        dist.destroy_process_group()


def choose_interface(address: str) -> None:
    """Have gloo use the interface that leads to rank 0, unless GLOO_SOCKET_IFNAME says another: a host name's may not."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        numbers = socket.gethostbyname(address)
        routes = Path("/proc/net/route").read_text(encoding="ascii")
    except OSError:
        return
    name = interface_towards(numbers, routes)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
