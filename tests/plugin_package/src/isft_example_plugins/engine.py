"""An engine: answers every prompt with a fixed text, so that filters can be tried without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.types import EOS, Completion, Decoding, Request


class Echo:
    """Says `text` to every prompt; the last token is the first EOS token of the decoding."""

    deterministic = True

    def __init__(self, text: str, encode: Callable[[str], Sequence[int]] | None) -> None:
        self.text = text
        self._ids = tuple(encode(text)) if encode is not None else tuple(text.encode())
        self.heartbeat: Callable[[int], None] = lambda num_tokens: None

    def begin(self, weights: Path | None) -> None:
        """Nothing to serve."""

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """One row at a time."""
        return {"max_rows": 1}

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """The same completion for every sample of every request."""
        ids = (*self._ids, *decoding.eos_token_ids[:1])
        for request in requests:
            for index in request.sample_indices:
                self.heartbeat(len(ids))
                yield Completion(request.prompt_id, index, ids, EOS, self.text)

    def end(self) -> None:
        """Nothing to free."""


def open_echo(
    section: Any,
    *,
    loaded: Any | None = None,
    encoder: Any | None = None,
    base_dir: Path | None = None,
    run_dir: Path | None = None,
    seed: int = 0,
) -> Echo:
    """The engine of `generate: {engine: echo, args: {text: ...}}`."""
    tokenizer = getattr(encoder, "tokenizer", None)
    encode = (lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenizer is not None else None
    return Echo(str(section.args.get("text", "I do not know.")), encode)
