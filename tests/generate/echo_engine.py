"""A whole plug-in engine: it answers with the prompt's own last tokens. Named in a config as `echo_engine.py:make`.

generate: {engine: path/to/echo_engine.py:make, args: {num_tokens: 4}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, Completion, Decoding, Request


class EchoEngine:
    """Answers with the last `num_tokens` tokens of the prompt and an EOS; the sample's seed decides how many are left out."""

    deterministic = True  # the same plan gives the same bytes

    def __init__(self, context: Any, num_tokens: int) -> None:
        self.context = context
        self.num_tokens = num_tokens
        self.heartbeat: Callable[[int], None]  # the loop sets it

    def begin(self, weights: Path | None) -> None:
        """`weights` is a Hugging Face folder, or None for the trainer's live model in `context.loaded`."""

    def end(self) -> None:
        """Free what `begin` took."""

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """JSON that is stored with the shard and given back to `generate`, also when a run is resumed."""
        return {"max_rows": 1}

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """Every sample of `requests` once, in any order, each as soon as it is finished."""
        for request in requests:
            for index, seed in zip(request.sample_indices, request.seeds, strict=True):
                if len(request.prompt_ids) >= 100:
                    yield Completion(request.prompt_id, index, (), PROMPT_TOO_LONG)
                    continue
                ids = (*request.prompt_ids[-self.num_tokens :][seed % 2 :], decoding.eos_token_ids[0])
                self.heartbeat(len(ids))
                if len(ids) > decoding.max_new_tokens:
                    yield Completion(request.prompt_id, index, ids[: decoding.max_new_tokens], LENGTH)
                else:
                    yield Completion(request.prompt_id, index, ids, EOS)


def make(context: Any, num_tokens: int = 3) -> EchoEngine:
    """`context` is an `iterative_sft_cli.generate.plugin.EngineContext`; the rest comes from `generate.args`."""
    return EchoEngine(context, num_tokens)
