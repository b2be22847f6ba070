"""Sampling from logits: one uniform per (row seed, position), inverse transform over the exact distribution.

Guarantee: a row's token is a pure function of its logits, its seed and its position; no global random generator is read or
advanced. Temperature, top_k, top_p, min_p and repetition penalty act as Hugging Face's logits processors do and in their
order (penalty, temperature, top_k, top_p, min_p); tokens that tie with the last one kept are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iterative_sft_cli.types import Decoding

_BLOCK = 128
"""Probabilities are summed in blocks of so many tokens; only the block that the uniform falls into is summed one by one."""

_LOG2E = math.log2(math.e)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) for each (seed, position): splitmix64's output function over seed + (position + 1) * golden ratio.

    `positions` count generated tokens from 0. Pure integer arithmetic modulo 2**64: the same on every machine.
    """
    with np.errstate(over="ignore"):
        state = np.asarray(seeds, dtype=np.uint64)
        state = state + (np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    uniform: np.ndarray = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


@dataclass(frozen=True, slots=True)
class Drawn:
    """What `Sampler.draw` returns: token ids and their log-probabilities (nats), one each per row."""

    tokens: list[int]
    logprobs: list[float]


class Sampler:
    """Draws tokens as a `Decoding` says. Holds buffers only; no state that changes a result.

    The log-probability of a drawn token is its log-softmax under the model's raw logits: before penalty, temperature and
    truncation, as vLLM reports it (`logprobs_mode=raw_logprobs`) and as the trainer computes it.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.needs_history = decoding.repetition_penalty != 1.0
        self._truncates = decoding.do_sample and (decoding.top_k > 0 or decoding.top_p < 1.0 or decoding.min_p > 0.0)
        tempered = decoding.do_sample and decoding.temperature != 1.0
        self._differs_from_raw = self.needs_history or self._truncates or tempered
        self._buffer: torch.Tensor | None = None

    def draw(
        self,
        logits: torch.Tensor,
        seeds: Sequence[int],
        positions: Sequence[int],
        history: Sequence[Sequence[int]] | None = None,
    ) -> Drawn:
        """One token for each row of `logits` [rows, vocabulary].

        `history` holds each row's prompt and generated ids and is read only under a repetition penalty.
        """
        decoding = self.decoding
        num_rows, vocab = logits.shape
        scores = self._scratch(num_rows, vocab, logits.device)
        values = scores[:, :vocab]
        values.copy_(logits)
        raw_top = values.amax(-1, keepdim=True)
        if self.needs_history:
            assert history is not None
            normaliser = _logsumexp(values - raw_top)
            self._penalise(values, history)
            top = values.amax(-1, keepdim=True)
        else:
            top, normaliser = raw_top, None
            if self._differs_from_raw:
                normaliser = _logsumexp(values - raw_top)
        if decoding.do_sample:
            # values become (values - top) / temperature in units of log 2, as exp2 is several times faster than exp
            scale = _LOG2E / decoding.temperature
            torch.add(top * -scale, values, alpha=scale, out=values)
            if self._truncates:
                values.masked_fill_(values < self._limit(values), -torch.inf)
            values.exp2_()
            uniform = torch.from_numpy(uniforms(seeds, positions)).to(logits.device)
            tokens, total = _invert(scores, uniform)
            if normaliser is None:
                normaliser = total.log()
        else:
            tokens = values.argmax(-1)
            normaliser = _logsumexp(values - top) if normaliser is None else normaliser
        chosen = logits.gather(1, tokens.unsqueeze(1)).float() - raw_top
        return Drawn(tokens.tolist(), (chosen.squeeze(1) - normaliser).tolist())

    def _scratch(self, num_rows: int, vocab: int, device: torch.device) -> torch.Tensor:
        """A float32 buffer [rows, vocabulary rounded up to whole blocks] whose padding is zero."""
        width = -(-vocab // _BLOCK) * _BLOCK
        buffer = self._buffer
        if buffer is None or buffer.shape[0] < num_rows or buffer.shape[1] != width or buffer.device != device:
            buffer = torch.zeros(num_rows, width, dtype=torch.float32, device=device)
            self._buffer = buffer
        return buffer[:num_rows]

    def _penalise(self, values: torch.Tensor, history: Sequence[Sequence[int]]) -> None:
        """Apply the repetition penalty to raw logits, for every token of a row's history."""
        penalty = self.decoding.repetition_penalty
        longest = max(len(ids) for ids in history)
        seen = torch.tensor([[*ids, *([ids[0]] * (longest - len(ids)))] for ids in history], device=values.device)
        found = values.gather(1, seen)
        values.scatter_(1, seen, torch.where(found < 0, found * penalty, found / penalty))

    def _limit(self, values: torch.Tensor) -> torch.Tensor:
        """For each row the smallest of `values` (log2 of probability, relative to the largest) that may be drawn, [rows, 1]."""
        decoding = self.decoding
        limit = values.new_full((values.shape[0], 1), math.log2(decoding.min_p) if decoding.min_p > 0 else -torch.inf)
        if 0 < decoding.top_k < values.shape[1]:
            kth = values.topk(decoding.top_k, dim=-1).values[:, -1:]
            if decoding.top_p < 1.0:
                kth = _nucleus(values, decoding.top_p, kth)
            return torch.maximum(limit, kth)
        if decoding.top_p < 1.0:
            limit = torch.maximum(limit, _nucleus(values, decoding.top_p, None))
        return limit


def _nucleus(values: torch.Tensor, top_p: float, limit: torch.Tensor | None) -> torch.Tensor:
    """The smallest value in the least set of largest tokens whose mass reaches `top_p` of what `limit` left in, [rows, 1]."""
    vocab = values.shape[1]
    exponentials = values.exp2()
    if limit is not None:
        exponentials.masked_fill_(values < limit, 0.0)
    total = exponentials.sum(-1, keepdim=True, dtype=torch.float64)
    width = min(256, vocab)
    while True:
        largest = values.topk(width, dim=-1).values
        mass = largest.exp2()
        if limit is not None:
            mass.masked_fill_(largest < limit, 0.0)
        cumulative = mass.double().cumsum(-1)
        if width == vocab or bool((cumulative[:, -1:] >= top_p * total).all()):
            before = cumulative - mass
            count = (before < top_p * total).sum(-1, keepdim=True).clamp_(min=1)
            return largest.gather(1, count - 1)
        width = min(width * 8, vocab)


def _logsumexp(values: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(values))) of rows whose largest value is 0, [rows]. Overwrites `values`."""
    return values.mul_(_LOG2E).exp2_().sum(-1).log_()


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index at which each row's running sum of `weights` exceeds uniform * total, and the totals (float64)."""
    num_rows, width = weights.shape
    blocks = weights.view(num_rows, width // _BLOCK, _BLOCK)
    running = blocks.sum(-1).double().cumsum_(-1)
    total = running[:, -1:]
    block, rest = _first_above(running, uniform.unsqueeze(1) * total)
    inside = blocks[torch.arange(num_rows, device=weights.device), block].double().cumsum_(-1)
    offset, _ = _first_above(inside, rest)
    return block * _BLOCK + offset, total.squeeze(1)


def _first_above(running: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first running sum above `target` (never one that adds nothing), and what of the target lies beyond it."""
    index = torch.searchsorted(running, target, right=True)
    last = torch.searchsorted(running, running[:, -1:].contiguous(), right=False)
    index = torch.minimum(index, last)
    before = running.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0.0)
    return index.squeeze(1), target - before
