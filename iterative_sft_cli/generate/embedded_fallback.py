"""Decoding through transformers' own `generate`, for models whose cache ours cannot hold, and for encoder-decoders.

Guarantee: tokens are drawn by the same sampler with the same seeds as on the fast path; only the way keys, values or states
are kept is the model's. Rows of one call have prompts of one length, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from iterative_sft_cli.generate.embedded_sampling import Sampler
from iterative_sft_cli.generate.embedded_shard import Row
from iterative_sft_cli.generate.stops import StopWatch
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP, Completion, Decoding, Request

_STRUCTURAL = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What of the model's generation_config is about the architecture rather than about decoding."""


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's token itself and leaves `generate` (greedy) no other choice."""

    def __init__(self, rows: Sequence[Row], sampler: Sampler) -> None:
        self.rows = rows
        self.sampler = sampler
        self.finished: list[str | None] = [None] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        history = input_ids.tolist() if self.sampler.needs_history else None
        seeds = [row.seed for row in self.rows]
        step = max(len(row.ids) for row in self.rows)
        drawn = self.sampler.draw(scores, seeds, [step] * len(seeds), history)
        forced = torch.full_like(scores, -torch.inf)
        for i, row in enumerate(self.rows):
            if self.finished[i] is None:
                row.ids.append(drawn.tokens[i])
                row.logprobs.append(drawn.logprobs[i])
            forced[i, drawn.tokens[i]] = 0.0
        return forced


class _Finish(StoppingCriteria):  # type: ignore[misc]
    """Ends rows at EOS, at a stop string and at their limit."""

    def __init__(self, draw: _Draw, eos: frozenset[int], heartbeat: Callable[[int], None] | None) -> None:
        self.draw = draw
        self.eos = eos
        self.heartbeat = heartbeat

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        running = 0
        for i, row in enumerate(self.draw.rows):
            if self.draw.finished[i] is not None:
                continue
            running += 1
            if row.ids[-1] in self.eos:
                self.draw.finished[i] = EOS
            elif row.watch is not None and row.watch.feed(row.ids):
                self.draw.finished[i] = STOP
            elif len(row.ids) >= row.limit:
                self.draw.finished[i] = LENGTH
        if self.heartbeat is not None:
            self.heartbeat(running)
        return torch.tensor([reason is not None for reason in self.draw.finished], device=input_ids.device)


def generate_with_model(
    model: Any,
    requests: Sequence[Request],
    decoding: Decoding,
    plan: dict[str, Any],
    *,
    context_length: int,
    pad_token_id: int,
    decode_text: Callable[[Sequence[int]], str],
    heartbeat: Callable[[int], None] | None = None,
) -> Iterator[Completion]:
    """All completions of `requests`, at most `plan["max_rows"]` rows at a time."""
    encoder_decoder = bool(model.config.is_encoder_decoder)
    structural = {name: getattr(model.generation_config, name, None) for name in _STRUCTURAL}
    model.generation_config = GenerationConfig(**{k: v for k, v in structural.items() if v is not None})
    by_length: dict[int, list[Row]] = {}
    for request in requests:
        length = len(request.prompt_ids)
        for index, seed in zip(request.sample_indices, request.seeds, strict=True):
            room = context_length - (1 if encoder_decoder else length)
            if length > context_length or (not encoder_decoder and length >= context_length):
                yield Completion(request.prompt_id, index, (), PROMPT_TOO_LONG, logprob=0.0)
                continue
            watch = StopWatch(decoding.stop, decode_text) if decoding.stop else None
            limit = min(decoding.max_new_tokens, room)
            by_length.setdefault(length, []).append(Row(request, index, seed, limit, watch=watch))
    sampler = Sampler(decoding)
    eos = frozenset(decoding.eos_token_ids)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        for at in range(0, len(rows), int(plan["max_rows"])):
            part = rows[at : at + int(plan["max_rows"])]
            draw = _Draw(part, sampler)
            ids = torch.tensor([row.request.prompt_ids for row in part], device=model.device)
            settings = GenerationConfig(
                do_sample=False,
                max_new_tokens=part[0].limit,
                pad_token_id=pad_token_id,
                eos_token_id=None,
                use_cache=True,
            )
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([draw]),
                    stopping_criteria=StoppingCriteriaList([_Finish(draw, eos, heartbeat)]),
                )
            for row, reason in zip(part, draw.finished, strict=True):
                yield row.completion(reason or LENGTH, decoding.keep_logprobs)
