"""Everything a round works with, built once before round 1 and handed from phase to phase."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from iterative_sft_cli.filters import FilterChain, Judged, Judging, Runtime, Shard
from iterative_sft_cli.filters.cache import FOLDER
from iterative_sft_cli.generate.base import Engine
from iterative_sft_cli.rounds.weights import EngineSession
from iterative_sft_cli.rundir.cost import CostMeter
from iterative_sft_cli.samples import StoredSample
from iterative_sft_cli.train.base import Learner
from iterative_sft_cli.types import Decoding, Prompt, Request, TrainRow


class Phase(Protocol):
    """A phase that is shown while it runs."""

    def advance(self, amount: int = 0, tokens: int = 0) -> None: ...


class View(Protocol):
    """What a person sees of a run; the loop tells it, it never asks."""

    def phase(self, name: str, round_index: int, total: int, unit: str) -> AbstractContextManager[Phase]: ...

    def round_done(self, row: dict[str, Any], seconds: float) -> None: ...

    def samples(self, round_index: int, accepted: Sequence[StoredSample], rejected: Sequence[StoredSample]) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class Stages:
    """The parts of a run. `stop` raises Preempted or Interrupted when a signal arrived, else returns at once."""

    config: Any
    run: Any
    encoder: Any
    eval_encoder: Any
    learner: Learner
    engine: Engine
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    filters: Sequence[Any]
    view: View
    stop: Callable[[], None]
    base_hash: str
    mix_rows: Sequence[TrainRow] = ()
    warmup_rows: Sequence[TrainRow] = ()
    grace_s: float | None = None
    base_folder: Path | None = None
    other_models: Mapping[str, Path] = field(default_factory=dict)
    hint_encoder: Any = None
    format_encoders: Sequence[Any] = ()
    harness: Callable[[], list[dict[str, Any]]] | None = None
    """Measures the tasks of `eval.lm_eval` on the live weights."""
    accepted_keys: dict[int, array[int]] = field(default_factory=dict)
    live_hash: str | None = None
    """The content hash of the live weights where they are not the newest checkpoint's (after a roll-back)."""
    rates: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)
    changes: Sequence[dict[str, Any]] = ()
    runtime: Runtime = field(default_factory=Runtime)
    """Workers and models of the filters: one set for every round and evaluation of the process."""
    session: EngineSession = field(init=False)
    started: float = field(default_factory=time.monotonic)
    last_save_s: float = 0.0
    cost: CostMeter = field(init=False)
    known: Mapping[str, Prompt] = field(init=False)
    """The run's prompts by id: what is read back from the run directory shares them."""

    def __post_init__(self) -> None:
        self.known = {prompt.prompt_id: prompt for prompt in self.prompts}
        self.cost = CostMeter(self.started)
        self.session = EngineSession(self.engine, self.learner, self.run.telemetry)

    @property
    def cache_dir(self) -> Path:
        """Where filters keep what saves work; it decides nothing and may be removed."""
        return Path(self.run.path) / FOLDER

    def announce(self, shards: Iterable[tuple[Sequence[Request], Decoding]], judging: Judging | None = None) -> None:
        """Tell an engine over several processes which shards it will be asked for, in order, so that it can share them out;
        `judging` says how they are judged where they are made."""
        announce = getattr(self.engine, "announce", None)
        if announce is not None:
            announce(shards, judging)

    def keep_prompts(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Tell an engine that can keep what it has read that the round's shards will come back to these prompts."""
        keep = getattr(self.engine, "keep_prompts", None)
        if keep is not None:
            keep(prompts)

    def open_shard(self, chain: FilterChain, earlier: Sequence[Judged] = ()) -> Shard:
        """A shard of `chain` that takes what was judged where it was made."""
        return chain.open_shard(earlier, getattr(self.engine, "elsewhere", None))

    def hours(self) -> float:
        """Wall time of this process's part of the run, in hours."""
        return (time.monotonic() - self.started) / 3600.0


class RoundLog:
    """The ledger as one round sees it: silent while the rows are those that the ledger already holds from before a resume."""

    def __init__(self, ledger: Any, round_index: int, *, muted: bool) -> None:
        self._ledger = ledger
        self._round_index = round_index
        self.muted = muted

    def __call__(self, event: str, **fields: Any) -> None:
        """Append a decision of this round."""
        if not self.muted:
            self._ledger.append({"event": event, "round": self._round_index, **fields})
