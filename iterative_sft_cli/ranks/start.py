"""Where a command becomes one rank of several: rank 0 runs it, the others work for rank 0.

Guarantee: a process that is alone imports nothing of what ranks need.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iterative_sft_cli.ranks.placement import Placement, find_placement
from iterative_sft_cli.watchdog import RETRIED


def as_rank(gpus: str | None, begin: Callable[[Any], int]) -> int:
    """Run `begin(ranks)` on rank 0 (`begin(None)` when this process is alone), serve rank 0 elsewhere; returns the exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a wait that is cut into slices is no news
    placement = find_placement()
    if gpus is not None:
        from iterative_sft_cli.ranks.lead import choose_placement

        placement = choose_placement(gpus)
    if placement is None:
        return begin(None)
    os.environ["LOCAL_RANK"] = str(placement.local_rank)
    if placement.rank:
        return work(placement)
    if placement.launcher != "isft":
        # rank 0 cannot start again alone: after a hang the launcher's restart is the second try
        os.environ[RETRIED] = "1"
    from iterative_sft_cli.ranks.lead import Ranks

    with Ranks(placement) as ranks:
        return begin(ranks)


def work(placement: Placement) -> int:
    """Be a rank other than 0; returns the exit code that the run ends with."""
    from iterative_sft_cli.ranks.worker import serve

    return serve(placement, open_parts)


def open_parts(setup: dict[str, Any]) -> Any:
    """The model and the filters as rank 0's config says, the model on this rank's device."""
    from dataclasses import replace

    from iterative_sft_cli.build import open_parts
    from iterative_sft_cli.config import LoadedConfig
    from iterative_sft_cli.filters import resolve_filters
    from iterative_sft_cli.filters.processes import cores

    loaded = LoadedConfig.from_resolved(
        setup["merged"], source=b"", path=Path(setup["run_dir"]) / "config.yaml", base_dir=Path(setup["base_dir"])
    )
    parts = open_parts(loaded, Path(setup["run_dir"]), serves=False)
    # every rank of a host has worker processes of its own: by default as many on the host as one process would have
    workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    filters = [
        one if one.device not in (None, "cpu") else replace(one, workers=one.workers or workers)
        for one in resolve_filters(loaded.config.filters, base_dir=loaded.base_dir)
    ]
    return replace(parts, filters=filters)
