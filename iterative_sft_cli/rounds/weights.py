"""Which weights serve and train: where a resumed run stands, and one engine session shared by eval and generation."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.base import Engine
from iterative_sft_cli.guards import best_round
from iterative_sft_cli.train.base import Learner

LIVE = "live"


@dataclass(frozen=True, slots=True)
class Source:
    """One of the models that make a round's samples: its name in the config, its share, and how to get at it.

    `serve` and `weights` (the content hash) are called only when something is to be generated.
    """

    name: str
    share: float
    serve: Callable[[], Engine]
    weights: Callable[[], str]


class EngineSession:
    """Serves one set of weights at a time and hands the device to the trainer and back.

    Asking again for the weights that are served costs nothing, so a round's eval and the next round's generation share a session.
    An engine that has weights of its own on the trainer's device (`shares_device`) reads what it needs in `prepare`; the trainer's
    weights leave the device before its `begin` and come back after its `end`. Every switch is a telemetry row `switch_s`.
    """

    def __init__(self, engine: Engine, learner: Learner, telemetry: Any) -> None:
        self.engine = engine
        self._learner = learner
        self._telemetry = telemetry
        self._serving: str | None = None

    @property
    def serving(self) -> str | None:
        """The name of the weights that are served."""
        return self._serving

    def serve(self, key: str, weights: Path | None) -> Engine:
        """The engine, serving the weights named `key`: those in the folder `weights`, or the live ones when None."""
        if self._serving != key:
            start = time.monotonic()
            if self._serving is None:
                self._learner.offload()
            else:
                self.engine.end()
                if self._apart() and weights is None:
                    # they are to be read once more
                    self._learner.reload()
                    self._learner.offload()
            self._serving = key
            if self._apart():
                self.engine.prepare(weights)  # type: ignore[attr-defined]
                away = getattr(self._learner, "offload_weights", None)
                if away is not None:
                    away()
            self.engine.begin(weights)
            self._telemetry.append({"event": "switch", "to": "generate", "switch_s": time.monotonic() - start})
            proof = getattr(self.engine, "proof", None)
            if proof:
                self._telemetry.append({"event": "probe", "nats": dict(proof)})
        return self.engine

    def _apart(self) -> bool:
        return bool(getattr(self.engine, "shares_device", False))

    def close(self) -> None:
        """Free the engine's memory and give the device back to the trainer."""
        if self._serving is not None:
            start = time.monotonic()
            self._serving = None
            self.engine.end()
            self._learner.reload()
            self._telemetry.append({"event": "switch", "to": "train", "switch_s": time.monotonic() - start})


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where the newest checkpoint left off: `step` optimizer steps into `round_index`, or past its training when None."""

    key: str | None
    round_index: int
    step: int | None

    def in_training(self, round_index: int) -> bool:
        """Whether `round_index` is to be continued in the middle of its training."""
        return self.round_index == round_index and self.step is not None

    def past_training(self, round_index: int) -> bool:
        """Whether the checkpoint of `round_index` is committed."""
        return self.key is not None and self.step is None and self.round_index >= round_index

    @classmethod
    def of(cls, checkpoint: Any) -> ResumePoint:
        """The point that a checkpoint (None: no checkpoint yet) stands for."""
        if checkpoint is None:
            return cls(None, 0, None)
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", checkpoint.key)
        if match is None:
            raise DataError(f"checkpoints/{checkpoint.key} is not a checkpoint's name")
        return cls(checkpoint.key, int(match[1]), int(match[2]) if match[2] else None)


def restore(learner: Learner, checkpoint: Any) -> None:
    """Put the learner where `checkpoint` was taken: with its full-precision state where it has one."""
    if checkpoint is None:
        return
    if (checkpoint.path / "state").is_dir():
        learner.load_state(checkpoint.path)
    else:
        learner.load_weights(checkpoint.path)


def round_key(round_index: int) -> str:
    """The checkpoint's name of a whole round."""
    return f"{round_index:04d}"


def best_folder(run: Any, rows: Sequence[dict[str, Any]], metric: str) -> tuple[str, Path | None]:
    """(key, folder) of the best evaluated checkpoint; the base model, (`base`, None), when round 0 without warm-up is best."""
    best = best_round(rows, metric)
    if best is None:
        raise DataError("`best` needs an evaluated round and there is none yet", where="eval")
    checkpoint = run.checkpoints.verified(round_key(best))
    if checkpoint is None:
        if best == 0:
            return ("base", None)
        raise DataError(
            f"checkpoints/{round_key(best)}, the best by {metric}, is gone or damaged",
            hint="set checkpoints.keep_best: true for the next run; `isft verify RUN` says what is damaged",
        )
    return (checkpoint.key, checkpoint.path)
