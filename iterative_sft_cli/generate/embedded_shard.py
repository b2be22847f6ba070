"""One shard's decoding: rows are admitted, stepped, finished and compacted by a schedule that only the plan decides.

Guarantee: every (prompt, sample) of the requests is yielded exactly once; which rows share a step is a function of the
plan, the requests and the tokens drawn, never of time or free memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from iterative_sft_cli.generate.base import no_heartbeat
from iterative_sft_cli.generate.embedded_module import Decoder
from iterative_sft_cli.generate.embedded_prompts import KeptPrompts, ReadPrompt, common_prefix
from iterative_sft_cli.generate.embedded_sampling import Sampler
from iterative_sft_cli.generate.stops import StopWatch
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP, Completion, Decoding, Request

HEAD_ROWS = 64
"""Logits are made and sampled for so many rows at a time, so that they stay in the processor's cache."""
SLACK = 64
"""Positions that every row must be able to grow by when another one is admitted, so that it is not sent back at once."""


@dataclass(slots=True, eq=False)
class Row:
    """One sample being generated."""

    request: Request
    sample_index: int
    seed: int
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    watch: StopWatch | None = None

    def completion(self, reason: str, keep_logprobs: bool) -> Completion:
        """The finished record."""
        return Completion(
            prompt_id=self.request.prompt_id,
            sample_index=self.sample_index,
            token_ids=tuple(self.ids),
            finish_reason=reason,
            logprob=sum(self.logprobs),
            token_logprobs=tuple(self.logprobs) if keep_logprobs else None,
        )


Piece = tuple[Request, list[int]]
"""A prompt and the positions of the samples of it that are admitted together."""


def schedule(requests: Sequence[Request], max_rows: int) -> list[Piece]:
    """The admission order: longest prompts first (memory is asked for early, prompts of like length share a prefill), each
    with positions into its samples, split where one prompt has more samples than there are rows."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
    pieces: list[Piece] = []
    for i in order:
        wanted = range(len(requests[i].sample_indices))
        pieces.extend((requests[i], list(wanted[at : at + max_rows])) for at in range(0, len(wanted), max_rows))
    return pieces


class Shard:
    """Runs a shard, or one of `streams` equal shares of it, over a decoder.

    `budget` is how many positions the cache may hold; `heartbeat` is called after every step with the tokens it made. `kept` has
    prompts that are read once for several shards.
    """

    def __init__(
        self,
        decoder: Decoder,
        decoding: Decoding,
        plan: dict[str, Any],
        *,
        context_length: int,
        decode_text: Callable[[Sequence[int]], str],
        streams: int = 1,
        kept: KeptPrompts | None = None,
    ) -> None:
        self.decoder = decoder
        self.kept = kept
        self._reader = decoder.twin() if kept is not None else None
        self.decoding = decoding
        self.max_rows = max(int(plan["max_rows"]) // streams, 1)
        self.budget = self.max_rows * int(plan["cache_tokens_per_row"])
        self.prefill_tokens = int(plan["prefill_tokens"])
        self.admit_rows = max(int(plan["admit_rows"]) // streams, 1)
        self.context_length = context_length
        self.sampler = Sampler(decoding)
        self.eos = frozenset(decoding.eos_token_ids)
        self.decode_text = decode_text
        self.heartbeat: Callable[[int], None] = no_heartbeat
        self.rows: list[Row] = []
        self.preempted: list[Row] = []

    def run(self, pieces: Sequence[Piece]) -> Iterator[Completion]:
        """Yield completions as they finish. `pieces` come from `schedule` with at most `max_rows` samples each."""
        waiting: list[Piece] = []
        for request, samples in pieces:
            if len(request.prompt_ids) >= self.context_length or self.decoding.max_new_tokens < 1:
                reason = PROMPT_TOO_LONG if len(request.prompt_ids) >= self.context_length else LENGTH
                for k in samples:
                    yield Completion(request.prompt_id, request.sample_indices[k], (), reason, logprob=0.0)
            else:
                waiting.append((request, samples))
        waiting.reverse()
        try:
            prompts = [request.prompt_ids for request, _ in waiting]
            to_run = [prompt for prompt in prompts if self.kept is None or prompt not in self.kept]
            if to_run and (prefix := common_prefix(prompts)):
                self.decoder.share(prefix)
            while waiting or self.rows or self.preempted:
                if self.preempted or waiting:
                    yield from self._admit(waiting)
                if self.rows:
                    yield from self._step()
        finally:
            self.decoder.reset()
            self.rows = []

    def _admit(self, waiting: list[Piece]) -> Iterator[Completion]:
        """Take in what fits, once enough rows are free; what is not read yet is run."""
        free = self.max_rows - len(self.rows)
        if self.rows and free < min(self.admit_rows, self.max_rows):
            return
        batch: list[tuple[Sequence[int], list[Row]]] = []
        tokens, num_new = 0, 0
        held = self.decoder.cache.held() if self.rows else 0
        while self.preempted or waiting:
            if self.preempted:
                row = self.preempted[-1]
                prompt, num = (*row.request.prompt_ids, *row.ids[:-1]), 1
            else:
                request, samples = waiting[-1]
                prompt, num = request.prompt_ids, len(samples)
            total = len(self.rows) + num_new + num
            # as many of prompts that are kept: what a step holds must not depend on what was read before
            if total > self.max_rows or (batch and tokens + len(prompt) > self.prefill_tokens):
                break
            if held + tokens + len(prompt) + (num_new + num) * SLACK > self.budget and (self.rows or batch):
                break
            if self.preempted:
                batch.append((prompt, [self.preempted.pop()]))
            else:
                waiting.pop()
                batch.append((prompt, [self._row(request, k) for k in samples]))
            tokens, num_new = tokens + len(prompt), num_new + num
        if batch:
            yield from self._begin(batch)

    def _begin(self, batch: Sequence[tuple[Sequence[int], list[Row]]]) -> Iterator[Completion]:
        """The first token of each row, after prompts that were kept, then after those that are run now."""
        known = [(self._known(prompt), rows) for prompt, rows in batch]
        read = [(prompt, rows) for prompt, rows in known if prompt is not None]
        fresh = [one for one, (prompt, _) in zip(batch, known, strict=True) if prompt is None]
        features = [prompt.features for prompt, _ in read]
        if read:
            keys, values = [prompt.keys for prompt, _ in read], [prompt.values for prompt, _ in read]
            self.decoder.admit_read(keys, values, [len(rows) for _, rows in read])
        if fresh:
            features += self.decoder.admit([prompt for prompt, _ in fresh], [len(rows) for _, rows in fresh])
        start = len(self.rows)
        groups = [*(rows for _, rows in read), *(rows for _, rows in fresh)]
        prompt_of_row = [i for i, rows in enumerate(groups) for _ in rows]
        self.rows.extend(row for rows in groups for row in rows)
        # a row that was sent back has its next token already
        new = [i for i in range(len(prompt_of_row)) if not self.rows[start + i].ids]
        self._draw([start + i for i in new], torch.stack(features), [prompt_of_row[i] for i in new])
        self.heartbeat(len(new))
        yield from self._retire([start + i for i in new])

    def _known(self, prompt: Sequence[int]) -> ReadPrompt | None:
        """What is kept of a prompt, read now where it is not yet."""
        ids = tuple(prompt)
        if self.kept is None or self._reader is None or ids not in self.kept:
            return None
        return self.kept.read(ids, self._reader)

    def _row(self, request: Request, k: int) -> Row:
        limit = min(self.decoding.max_new_tokens, self.context_length - len(request.prompt_ids))
        watch = StopWatch(self.decoding.stop, self.decode_text) if self.decoding.stop else None
        return Row(request, request.sample_indices[k], request.seeds[k], limit, watch=watch)

    def _step(self) -> Iterator[Completion]:
        """One token for every row."""
        self._make_room()
        features = self.decoder.decode([row.ids[-1] for row in self.rows])
        everyone = list(range(len(self.rows)))
        self._draw(everyone, features, everyone)
        self.heartbeat(len(everyone))
        yield from self._retire(everyone)

    def _make_room(self) -> None:
        """Before a new block of the cache is opened: send the youngest rows back to the queue while it would not fit."""
        cache = self.decoder.cache
        columns = cache.next_block()
        if not columns or cache.held() + columns * cache.padded_rows <= self.budget:
            return
        cache.trim()
        while len(self.rows) > 1 and cache.held() + columns * cache.padded_rows > self.budget:
            self.preempted.append(self.rows[-1])
            self._reorder(cache.remove([len(self.rows) - 1]))
            cache.trim()

    def _reorder(self, old_numbers: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in old_numbers]

    @torch.inference_mode()
    def _draw(self, rows: Sequence[int], features: torch.Tensor, feature_of_row: Sequence[int]) -> None:
        """Sample the next token of the given rows."""
        for at in range(0, len(rows), HEAD_ROWS):
            part = rows[at : at + HEAD_ROWS]
            pick = feature_of_row[at : at + HEAD_ROWS]
            logits = self.decoder.logits(features[torch.tensor(pick, device=features.device)])
            states = [self.rows[i] for i in part]
            history = [[*r.request.prompt_ids, *r.ids] for r in states] if self.sampler.needs_history else None
            drawn = self.sampler.draw(logits, [r.seed for r in states], [len(r.ids) for r in states], history)
            for row, token, logprob in zip(states, drawn.tokens, drawn.logprobs, strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)

    def _retire(self, rows: Sequence[int]) -> Iterator[Completion]:
        """Take out the rows among `rows` that are finished; the last rows move into their places."""
        done: dict[int, str] = {}
        for i in rows:
            row = self.rows[i]
            if row.ids[-1] in self.eos:
                done[i] = EOS
            elif row.watch is not None and row.watch.feed(row.ids):
                done[i] = STOP
            elif len(row.ids) >= row.limit:
                done[i] = LENGTH
        if not done:
            return
        finished = [(self.rows[i], reason) for i, reason in done.items()]
        self._reorder(self.decoder.cache.remove(list(done)))
        for row, reason in finished:
            yield row.completion(reason, self.decoding.keep_logprobs)
