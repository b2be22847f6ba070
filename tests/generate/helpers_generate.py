"""What the tests of the engines share: a loaded tiny model, an encoder over bytes, requests with derived seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import tiny
import torch

from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.types import Completion, Decoding, Request, derive_seed


class ByteEncoder:
    """The part of an encoder that engines use, over tests/tiny.py's tokenizer."""

    pad_token_id = tiny.PAD
    eos_token_ids = (tiny.EOS,)

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer if tokenizer is not None else tiny.tiny_tokenizer()

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def loaded_of(model: Any, *, dtype: torch.dtype = torch.float32, context: int = 256) -> Any:
    """As model.py's LoadedModel, with what engines read of it."""
    return SimpleNamespace(
        model=model,
        device="cpu",
        compute_dtype=dtype,
        context_length=context,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )


def engine_of(model: Any, **kwargs: Any) -> EmbeddedEngine:
    """An engine that serves `model`'s weights."""
    engine = EmbeddedEngine(loaded_of(model, **kwargs), encoder=ByteEncoder())
    engine.begin(None)
    return engine


def requests_of(lengths: Iterable[int], samples: int = 1, *, seed: int = 0) -> list[Request]:
    """Prompts of the given lengths with different ids, `samples` samples each."""
    return [
        Request(
            prompt_id=f"p{i}",
            prompt="",
            prompt_ids=tuple((11 * i + 7 * t) % 250 + 8 for t in range(length)),
            sample_indices=tuple(range(samples)),
            seeds=tuple(derive_seed(seed, i, k) for k in range(samples)),
        )
        for i, length in enumerate(lengths)
    ]


def run(
    engine: EmbeddedEngine, requests: Sequence[Request], decoding: Decoding, **plan: Any
) -> dict[tuple[str, int], Completion]:
    """All completions by (prompt_id, sample_index); asserts that each comes exactly once."""
    full = {**engine.plan(requests, decoding), **plan}
    found: dict[tuple[str, int], Completion] = {}
    for completion in engine.generate(requests, decoding, full):
        key = completion.prompt_id, completion.sample_index
        assert key not in found, key
        found[key] = completion
    assert set(found) == {(r.prompt_id, k) for r in requests for k in r.sample_indices}
    return found
