"""What an engine is: token ids in, sampled token ids out. Plug-in engines implement `Engine` (entry-point group `isft.engines`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from iterative_sft_cli.types import Completion, Decoding, Request


class EngineOutOfMemory(Exception):
    """Raised by `Engine.generate` when memory runs out; the loop halves the plan's rows, records it, and asks again."""


def no_heartbeat(num_tokens: int) -> None:
    """An engine's heartbeat until the loop sets its own."""


@runtime_checkable
class Engine(Protocol):
    """A source of completions.

    `begin` makes the engine serve the given weights and may take memory; `end` frees it. Between them `plan` and
    `generate` may be called many times. `deterministic` says whether the same plan gives the same bytes. `heartbeat` is set by
    the loop; the engine calls it at least once a second while it generates with the number of tokens made since the last
    call. It drives the progress bar and the watchdog, and raises when the run is to stop: the exception passes through.
    An engine may also have `keep_prompts(prompts)`: token ids of prompts that the shards up to its next call come back to, so that it
    can read each once; what it makes of them must not depend on which shard asks first.
    """

    deterministic: bool
    heartbeat: Callable[[int], None]

    def begin(self, weights: Path | None) -> None:
        """Serve the weights in the Hugging Face folder `weights`; None means the live model the trainer holds."""

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """The batch shape for one shard, as JSON with at least `max_rows`: fixed before the shard starts, stored in its
        seal, replayed on resume. A pure function of config, model and machine, never of free memory."""

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """Yield every (prompt_id, sample_index) of `requests` exactly once, in any order, each as soon as it is finished."""

    def end(self) -> None:
        """Free what `begin` took."""
