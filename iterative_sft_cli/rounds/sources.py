"""The models that make a round's samples: the live weights, a checkpoint of this run, or others, each with its share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from iterative_sft_cli.rounds.stages import Stages
from iterative_sft_cli.rounds.weights import LIVE, Source, best_folder, round_key


def sources_of(stages: Stages, config: Any) -> list[Source]:
    """The sources of a round under `generate.from`; nothing is loaded before one of them serves."""
    wanted = config.generate.from_
    if isinstance(wanted, str):
        return [source_of(stages, config, wanted, 1.0)]
    return [source_of(stages, config, one.model, float(one.share)) for one in wanted]


def reads_warmup(config: Any) -> bool:
    """Whether some round starts from the warm-up's checkpoint or generates with it."""
    if config.warmup is None:
        return False
    for round_index in range(1, config.rounds + 1):
        at = config.at_round(round_index)
        wanted = at.generate.from_
        names = [wanted] if isinstance(wanted, str) else [one.model for one in wanted]
        if at.train.start_from == "warmup" or "warmup" in names:
            return True
    return False


def source_of(stages: Stages, config: Any, name: str, share: float) -> Source:
    """One source: `current`, `base`, `best`, `warmup`, or a model that was found when the run was built."""
    if name == "current":
        return Source(LIVE, share, lambda: stages.session.serve(LIVE, None), lambda: live_hash(stages))
    if name == "base":
        return _at_rest(stages, "base", share, base_folder(stages), stages.base_hash)
    if name in ("best", "warmup"):
        key, folder = round_key(0), None
        if name == "best":
            key, folder = best_folder(stages.run, stages.run.stats.rows(), config.eval.metric)
        checkpoint = stages.run.checkpoints.verified(key) if key != "base" else None
        if checkpoint is None:
            return _at_rest(stages, "base", share, base_folder(stages), stages.base_hash)
        return _at_rest(stages, key, share, folder or checkpoint.path, hash_of(checkpoint))
    return _at_rest(stages, name, share, stages.other_models[name], name)


def _at_rest(stages: Stages, key: str, share: float, folder: Path | None, weights: str) -> Source:
    return Source(key, share, lambda: stages.session.serve(key, folder), lambda: weights)


def base_folder(stages: Stages) -> Path | None:
    """A folder with the starting model; None when nothing was trained yet and the live weights are the starting model's."""
    return stages.base_folder


def live_hash(stages: Stages) -> str:
    """The content hash of the weights that are live: the newest checkpoint's, or the base model's before the first."""
    if stages.live_hash is not None:
        return stages.live_hash
    checkpoint = stages.run.checkpoints.newest()
    return stages.base_hash if checkpoint is None else hash_of(checkpoint)


def hash_of(checkpoint: Any) -> str:
    """The content hash of a checkpoint's weights."""
    files = {name: entry for name, entry in checkpoint.manifest["files"].items() if name != "state.json"}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode("ascii")).hexdigest()
